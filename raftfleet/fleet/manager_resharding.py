"""Another number of workers than the data were written with: groups move to the shards that their names belong to now.

A name belongs to shard ``hash(name) % workers``, so another ``--workers`` gives most groups another shard of the node.
This module does not move anything itself; it tells the fleet how many of the node's shards take members, and takes
shards that have become empty out of the node. The members then move as they always do when their place is another: the
leader adds the new shard as a learner, fills it, promotes it, and removes the old one
(:mod:`raftfleet.fleet.reconcile`).

**Why the data stay where they are.** A member is (group uid, node, shard instance), and its instance stands in the
configurations of its group, on all its nodes. Three ways to move it at rest, before the workers open their stores, were
weighed:

* *Carry its records into another shard's store, under that shard's instance.* No configuration names that instance, so
  nobody would ask the moved member for anything: in effect the member is lost until the leader has added it as new. One
  node after the other that costs each group one member for a while; all nodes at once, which is what a new release of
  a configuration file does, costs every group its majority at the same moment: acknowledged entries would be there, and
  nobody allowed to use them (rule 15).
* *Carry them over and answer to the old instance as well.* Then one process votes and acknowledges under several
  instances, and an instance under several processes: messages, beats and digests go from instance to instance, so what
  one process says of its part ("I follow all these") would be taken for the whole. A crash in the middle of the copying
  leaves two stores that both hold the vote of one member, and whichever speaks first forgets the other's: rule 6.
* *Rewrite the configurations in the logs.* Entries that were committed would differ from their copies on other nodes.

A store that keeps its instance, its members and its votes breaks no rule, whenever a process dies, since nothing that
was promised changes its place; and every step of the move is an ordinary change of membership, which is committed by a
quorum before it counts (rules 3, 4, 6, 7). So a node runs as many shard processes as it has stores or is to have
workers, whichever is more:

* More workers than stores: the new shards are new instances, empty at first.
* Fewer: the surplus shards, the last ones, run on with the members that they have. Names do not belong to them, new
  members are not placed there, clients do not speak to them; requests reach them by the link, as those to any leader
  elsewhere. When they hold no member any more (and none that rests), the fleet is told that the node has only the first
  ones, and the surplus instances are gone for good. Then their stores are put aside and their processes end.

Available: a node that reshards restarts like any other, with all its members; nothing waits for the moving, and all
nodes may do so at once. While a group moves within one node it has two voters there for a moment (four of three):
should exactly that node die in that moment, the group waits for its return. Nothing is lost by it.

Crash-safe: the wish (``--workers``) and the stores are all there is to remember. What the fleet's log says decides: a
surplus store whose instance is gone there is put aside at the next start, one whose instance is not runs on.

Never is an instance given up that may hold a member: the shard itself is asked, and refuses.
"""

from __future__ import annotations

from typing import Any

from raftfleet.fleet.machine import FleetState, Node
from raftfleet.fleet.manager_entry import ManagerEntry
from raftfleet.fleet.manager_outputs import SECOND, DropShards
from raftfleet.fleet.manager_state import ignore_answer


class ManagerResharding(ManagerEntry):
    """Surplus shards, and how many of this node's shards take members. See the module's text."""

    def on_shard_lost(self, now_us: int, index: int) -> None:
        """The connection to the shard broke."""
        if index < len(self.shards):
            super().on_shard_lost(now_us, index)

    def on_shard_retired(self, now_us: int, index: int) -> None:
        """The shard's process has ended for good, as its supervisor knows. Told again and again, it is as well."""
        if index >= len(self.shards):
            return
        super().on_shard_lost(now_us, index)
        self.shards[index].is_retiring = self.shards[index].is_retired = True
        if all(shard.is_retired for shard in self.surplus):
            del self.shards[self.settings.placing :]
            self._outputs.append(DropShards(self.settings.placing))
            self._log("info", f"re-sharding is done: this node has {self.settings.placing} shards from now on")

    def _tend_resharding(self, state: FleetState, mine: Node | None) -> bool:
        """Do what resharding needs now. Returns whether nothing else about this node is to be told the fleet now."""
        surplus = [shard for shard in self.surplus if shard.instance]
        if self.surplus and all(shard.instance in state.gone for shard in surplus):
            self._retire_surplus()
            return True
        for index, shard in enumerate(self.surplus, self.settings.placing):
            if shard.instance in state.gone:  # only some: they begin anew, so that all are empty and go together
                self._reset_shard(index, shard)
                return True
        if mine is None or mine.instances != self.instances:
            return False
        if mine.workers != self.settings.placing:
            if self._due("workers", SECOND):
                self._log(
                    "info",
                    f"re-sharding: {mine.workers} shards took this node's members, {self.settings.placing} do from now "
                    "on; groups move one after the other",
                )
                self._propose(["workers", mine.name, self.settings.placing])
            return True
        if surplus and self._due("surplus", SECOND):
            self._look_at_surplus(mine)
        return False

    def _look_at_surplus(self, mine: Node) -> None:
        """Ask the surplus shards what they hold; when it is nothing, tell the fleet that they are no more."""
        held: list[int] = []
        count = len(self.surplus)

        def asked(code: int, body: Any) -> None:
            if code != 0 or not isinstance(body, dict):
                return
            held.append(body.get("members", 1) + body.get("resting", 1))
            if len(held) < count:
                return
            if sum(held):
                if self._due("resharding progress", 10 * SECOND):
                    self._log("info", f"re-sharding: {sum(held)} members are still to move within this node")
            elif self._due("give up surplus", 2 * SECOND):
                kept = list(self.instances[: self.settings.placing])
                self._propose(["instances", mine.name, kept, list(mine.instances)])

        for index in range(self.settings.placing, len(self.shards)):
            self._call_shard(index, "shard_info", {}, SECOND, asked)

    def _retire_surplus(self) -> None:
        for index, shard in enumerate(self.surplus, self.settings.placing):
            if shard.instance and self._due(f"retire {index}", SECOND):
                shard.is_retiring = True
                self._call_shard(index, "retire", {}, SECOND, ignore_answer)

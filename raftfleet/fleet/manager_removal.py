"""The end of nodes and of fleets: the operator's word, the purge, abandoning.

Rules:

* An operator's "this node is dead" (``remove_dead_node``) is never believed of a node that answers: of one that was
  started again without its memory it means that memory, of any other it is refused. It goes to all shards of
  all reachable nodes at once, since a group without a majority can only recover by it, and is proposed to the fleet
  until its state agrees. While a fleet is still being founded, it frees the founding from waiting for that node.
* Only the manager beside the fleet group's leader purges nodes that have been silent for the whole window.
* A fleet that is still empty (no group was ever added) and whose first voters are provably gone is abandoned: this
  node behaves as if it had crashed, which is always safe. One with groups waits for an operator (DESIGN 5.15).
"""

from __future__ import annotations

from typing import Any

from raftfleet.core.codes import NOT_ACTIVE, OK, REFUSED
from raftfleet.core.manager_messages import NodeRecord
from raftfleet.core.names import FLEET_GROUP, FLEET_UID
from raftfleet.core.roles import DAMAGED
from raftfleet.fleet.machine import FleetState, Node
from raftfleet.fleet.manager_outputs import MS, SECOND, Answer
from raftfleet.fleet.manager_rpc import ManagerRpcs
from raftfleet.fleet.manager_state import ignore_answer

RECOVERY_WAIT_US = 6 * SECOND
"""A fleet group that can recover from a declared death has a leader by then: a few election timeouts."""
ABANDON_AFTER_US = 3 * SECOND
"""Ten failed elections: a leader that is still possible has had its chance."""


class ManagerRemoval(ManagerRpcs):
    """Removing nodes that are dead, and leaving a fleet that is."""

    def _tend_removals(self, state: FleetState) -> None:
        for name, instances in list(self._removals.items()):
            node = state.nodes.get(name)
            if node is None or sorted(node.instances) != sorted(instances):
                del self._removals[name]
            elif self._due(f"remove {name}", SECOND):
                self._propose(["remove_node", name, "operator", instances])
        if not self.leads_fleet:
            return
        for name in list(self.unreachable):
            node = state.nodes.get(name)
            silent_us = self._now_us - self._heard_us.get(name, self._now_us)
            if node is not None and silent_us > self.settings.purge_window_us and self._due(f"purge {name}", SECOND):
                self._log("warning", f"node {name} has been unreachable for {silent_us // SECOND} s: it is removed")
                self._propose(["remove_node", name, "purged", list(node.instances)])

    def _consider_abandoning(self) -> None:
        """Leave a fleet that is empty and whose voters are provably gone for more than its quorum can spare.

        Not with data on a disk: leaving gives them up, and what is gone there may be brought back by an operator.
        """
        if self.settings.durable or (self.state is not None and self.state.counter):
            trouble = self._why_leaderless()
            if trouble != self._trouble:
                self._trouble = trouble
                self._log("warning", trouble)
            return

        # Without a copy of the state, members of groups on this node's shards tell that the fleet holds groups.
        if any(shard.info.get("members", 0) > (index == 0) for index, shard in enumerate(self.shards)):
            return
        value = self._value
        voters = self.shards[0].info.get("fleet_voters") or []
        if not voters and value is not None and value.fleet == self.fleet:
            voters = [voter.instances[0] for voter in value.voters]
        nodes = [node.instances[0] for node in self._known_nodes()]
        here = self._all_here()
        gone = self._provably_gone()
        losses = [
            (len(members), sum(i in gone or (here is not None and i not in here) for i in members))
            for members in (voters, nodes)
        ]
        memory = self.founding.memory.fleet
        if here is not None and memory is not None:
            losses.append((len(memory.nodes), len(memory.nodes) - len(here)))
        # A guess that is wrong costs what a crash of this node would: the fleet, if it lives, lets it in again.
        if any(size and lost > (size - 1) // 2 for size, lost in losses):
            self._leave("it never held a group, and too many of its nodes are gone for it to go on")

    def _why_leaderless(self) -> str:
        """Why the fleet group has no leader, as far as this node knows, and what to do.

        Nodes are declared dead for good: that is proposed of none that answers with all that it had.
        """
        sentences = ["the fleet group has no leader"]
        short = [
            str(index)
            for index, shard in enumerate(self.shards)
            if (shard.info.get("disk") or {}).get("state") in ("full", "low")
        ]
        if short:
            sentences.append(
                f"the disk of this node's shard {', '.join(short)} is full or nearly so, and nobody is elected where "
                "votes cannot be saved: free some space or add some"
            )
        gone = self._provably_gone()
        missing = {node.name for node in self._known_nodes() if node.instances[0] in gone} | set(self.unreachable)
        if missing:
            sentences.append(
                f"of {', '.join(sorted(missing))} nothing is heard, or what it held is lost: start the nodes that are "
                "missing, or, if they are gone for good, run 'raftfleet-node remove-dead-node NODE' for each"
            )
        elif not short:
            sentences.append(
                "every node that is known answers, so there may be one soon; if not, see 'raftfleet-node status' on "
                "each of them: a disk that is full, or hangs, keeps its node from voting; and 'raftfleet-node repair "
                "--dry-run', which names members whose records are damaged"
            )
        return "; ".join(sentences)

    def _all_here(self) -> set[int] | None:
        """Instances of those in this fleet, if everyone who could be in it answers; None if someone is silent."""
        here = {self.instances[0]}
        memory = self.founding.memory.fleet
        nodes = memory.nodes if memory is not None else ()
        for address in {*self.founding.peers, *((host, port) for _, host, port in nodes)} - {self.founding.address}:
            seen = self._seen.get(address)
            if seen is None or self._now_us - seen[2] > 2 * SECOND:
                return None
            if seen[1] == self.fleet:
                here.add(seen[0].instances[0])
        return here

    def _provably_gone(self) -> set[int]:
        """Instances of nodes at whose address another instance has answered since, and those declared dead."""
        gone = set(self._declared)
        if self.state is not None:
            gone.update(self.state.gone)
        for node in self._known_nodes():
            seen = self._seen.get((node.host, node.port))
            if seen is not None and seen[0].instances[0] != node.instances[0]:
                gone.add(node.instances[0])
            if self.settings.name == node.name and node.instances[0] != self.instances[0]:
                gone.add(node.instances[0])
        return gone

    # -- an operator's word -----------------------------------------------------------------------------------------

    def _call_remove_dead_node(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        name = args["node"]
        if not self.fleet:
            self._declare_dead_while_founding(name, answer)
            return
        nodes = [node for node in self._known_nodes() if node.name == name]
        if not nodes:
            answer(REFUSED, f"the fleet has no node {name!r:.100}")
            return
        node = nodes[0]
        if self._answers(node) or name == self.settings.name:
            self._declare_former_lost(name, timeout_us, answer)
            return
        instances = list(node.instances)
        self._log("warning", f"the operator declared node {name} dead: instances {instances}")
        self._gather(SECOND, lambda rows: self._begin_removal(name, instances, rows, timeout_us, answer))

    def _answers(self, node: Node | NodeRecord) -> bool:
        """Whether that node answered lately, with the instances that the fleet knows."""
        seen = self._seen.get((node.host, node.port))
        lately_us = 3 * self._ping_interval_us()
        return seen is not None and self._now_us - seen[2] < lately_us and seen[0].instances == tuple(node.instances)

    def _begin_removal(
        self, name: str, instances: list[int], rows: dict[str, Any], timeout_us: int, answer: Answer
    ) -> None:
        before = set(self._leaderless(rows))
        self._removals[name] = instances
        self._tell_shards_dead(instances)
        for address in self._reachable():
            self._rpc(address, "declare_dead", {"instances": instances}, 2 * SECOND, ignore_answer)
        # Where more nodes are dead, nothing recovers before they are declared too: the operator is told so soon.
        deadline_us = self._now_us + min(timeout_us * 3 // 4, 2 * RECOVERY_WAIT_US)

        def is_removed() -> bool:
            return name not in self._removals

        def finished(done: bool) -> None:
            if done:
                self._await_recovery(f"{name} was removed from the fleet", before, deadline_us, timeout_us, answer)
                return
            answer(
                OK,
                {
                    "recovered": [],
                    "waiting": sorted(before),
                    "message": f"{name} is declared dead, but the fleet group still has no leader: declare the "
                    "other dead nodes too, or start them again",
                },
            )

        self._wait_for(min(timeout_us // 2, RECOVERY_WAIT_US), is_removed, finished)

    def _declare_former_lost(self, name: str, timeout_us: int, answer: Answer) -> None:
        """The node runs (again): the word can only be about the memory that it had before."""
        state = self.state
        former = [] if state is None else [i for i, n in state.former.items() if n == name]
        if state is None or all(state.gone[i] == "operator" for i in former):
            answer(REFUSED, f"node {name} is not dead: it answers, and nothing is known that it had and lost")
            return
        self._log("warning", f"the operator declared lost what node {name} held before it was started again")
        deadline_us = self._now_us + min(timeout_us * 3 // 4, 2 * RECOVERY_WAIT_US)

        def declared(rows: dict[str, Any], code: int, body: Any) -> None:
            if code == OK:
                message = f"node {name} runs; what it held before it was started again is declared lost"
                self._await_recovery(message, set(self._leaderless(rows)), deadline_us, timeout_us, answer)
            else:
                answer(code, body)

        self._gather(
            SECOND, lambda rows: self._propose(["declare_lost", name], lambda code, body: declared(rows, code, body))
        )

    def _await_recovery(
        self, message: str, before: set[str], deadline_us: int, timeout_us: int, answer: Answer
    ) -> None:
        """Answer when the groups in ``before`` have leaders again, or at the deadline with those that have none."""

        def check() -> None:
            self._gather(SECOND, checked)

        def checked(now: dict[str, Any]) -> None:
            waiting = set(self._leaderless(now)) & before
            if waiting and self._now_us + 300 * MS < deadline_us:
                again_us = self._now_us + 300 * MS
                self._wait_for(timeout_us, lambda: self._now_us >= again_us, lambda _: check())
                return
            said = self._leaderless(now)
            empty = sorted(group for group in waiting if _is_all_damaged(said[group]))
            text = message
            if len(waiting) > len(empty):
                text += (
                    f"; {len(waiting) - len(empty)} groups have no leader yet: if more nodes are dead, declare them too"
                )
            if empty:
                text += (
                    f"; of {', '.join(empty)} no reachable node has a member: unless a node that has one comes back, "
                    "its state is lost, and it can only be removed and added again"
                )
            recovered = before - waiting
            answer(
                OK,
                {
                    "recovered": sorted(recovered),
                    "waiting": sorted(waiting),
                    "terms": {name: term for name, term in _led_terms(now).items() if name in recovered},
                    "message": text,
                },
            )

        check()

    def _declare_dead_while_founding(self, name: str, answer: Answer) -> None:
        memory = self.founding.memory
        nodes = list(memory.fleet.nodes) if memory.fleet is not None else []
        if memory.accepted is not None:
            nodes.extend((voter.name, voter.host, voter.port) for voter in memory.accepted.voters)
        found = [(host, port) for node, host, port in nodes if node == name]
        if not found:
            answer(NOT_ACTIVE, self._why_not_active())
            return
        self.founding.declared_dead.update(found)
        self._log("warning", f"the operator declared node {name} dead: founding does not wait for it any longer")
        answer(OK, {"recovered": [], "waiting": [], "message": f"founding does not wait for {name} any longer"})

    def _leaderless(self, rows: dict[str, list[list[Any]]]) -> dict[str, dict[str, Any]]:
        """Groups that no reachable member knows a reachable leader of, with what each of them says."""
        return {name: members for _, name, members in self._leaderless_rows(rows)}

    def _leaderless_rows(self, rows: dict[str, list[list[Any]]]) -> list[tuple[int, str, dict[str, Any]]]:
        """As :meth:`_leaderless`: (uid, name, node -> what its member says)."""
        led: set[int] = set()
        said: dict[int, dict[str, Any]] = {}
        names: dict[int, str] = {FLEET_UID: FLEET_GROUP}
        for node in sorted(rows):
            for name, uid, role, leader, term, last_index, *_ in rows[node]:
                if name:  # a damaged member may not know it
                    names[uid] = name
                home = self.state.instance_home(leader) if leader and self.state is not None else None
                if role == "leader":
                    led.add(uid)
                said.setdefault(uid, {})[node] = {
                    "role": role,
                    "term": term,
                    "last_index": last_index,
                    "leader": home[0] if home else None,
                }
        result = [
            (uid, names.get(uid, f"uid {uid}"), members) for uid, members in sorted(said.items()) if uid not in led
        ]
        if self.state is not None:
            # A damaged member of a group that is no more is nobody's trouble.
            groups = {FLEET_UID, *self.state.groups}
            result = [row for row in result if row[0] in groups or not _is_all_damaged(row[2])]
            result += [(group.uid, group.name, {}) for group in self.state.groups.values() if group.uid not in said]
        return result


def _is_all_damaged(said: dict[str, Any]) -> bool:
    """Whether of all members that are reported nothing is left, or there is none."""
    return all(member["role"] == DAMAGED for member in said.values())


def _led_terms(rows: dict[str, list[list[Any]]]) -> dict[str, int]:
    """Group -> the term of its leader, for those whose leader reported."""
    return {row[0]: row[4] for its_rows in rows.values() for row in its_rows if row[2] == "leader"}

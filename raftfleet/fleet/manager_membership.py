"""Tending this node's own membership: what the fleet has of it is made what it is.

What this node wants (to be in the fleet, in its zone, with its present instances; or to be out of it) is compared with
the fleet's state on every tick and proposed until the two agree; nothing depends on a message that arrives once.

* A fleet that says that one of these instances has left or was removed is right: the node leaves, and joins as new if
  it is still wanted there.
* Deactivating takes two steps: the fleet is told to plan without this node, and when no member and no vote is left
  here, the node leaves.
* A node whose instances the fleet does not know gets no feed of its state. Then it asks another node to let it in.
"""

from __future__ import annotations

from typing import Any

from raftfleet.core.codes import OK, REFUSED
from raftfleet.core.manager_messages import NodeRecord
from raftfleet.core.names import FLEET_GROUP
from raftfleet.core.roles import DAMAGED
from raftfleet.fleet.machine import FleetState, Node
from raftfleet.fleet.manager_outputs import MS, SECOND, Answer
from raftfleet.fleet.manager_resharding import ManagerResharding
from raftfleet.fleet.manager_state import RPC_TIMEOUT_US, TRY_ELSEWHERE, ignore_answer, node_fields, text_of


class ManagerMembership(ManagerResharding):
    """This node in its fleet: join, present instances, zone, deactivation."""

    def _tend_membership(self, state: FleetState) -> None:
        mine = state.nodes.get(self.settings.name)
        gone = [instance for instance in self.instances[: self.settings.placing] if instance in state.gone]
        if gone:
            reason = state.gone[gone[0]]
            if reason == "left":
                self.zone = None
            self._leave("left" if reason == "left" else f"this node was removed from it ({reason}); it joins as new")
            return
        if self._tend_resharding(state, mine):
            return
        if mine is None or (mine.host, mine.port) != (self.settings.host, self.settings.port):
            if self.zone is not None and self._due("join", SECOND):
                self._propose_join()
            return
        if mine.instances != self.instances:
            if self._due("instances", SECOND):
                self._propose(["instances", mine.name, list(self.instances), list(mine.instances)], self._replaced)
            return
        if self._deactivating:
            self._tend_deactivation(state, mine)
        elif self.zone is None and mine.active:
            self.zone = mine.zone  # the manager was restarted after an activate
        elif self.zone is None:
            self._deactivating = True
        elif (not mine.active or mine.zone != self.zone) and self._due("join", SECOND):
            self._propose_join()

    def _replaced(self, code: int, body: Any) -> None:
        """Answer to "these are my instances now". Refused: the state here is older than the fleet's, and as long as
        the fleet does not know this node's worker 0 no feed will mend it. Another node knows what is to be replaced."""
        if code == REFUSED:
            self._join_through_another()

    def _propose_join(self) -> None:
        """Ask to be in the fleet, through shard 0 or, if it finds no leader, through another node."""

        def answered(code: int, body: Any) -> None:
            if code in TRY_ELSEWHERE:
                self._join_through_another()
            elif code != OK:
                self._status = f"the fleet refused the join: {text_of(body)}"

        args = {"command": ["join", self._join_fields(self.record)], "timeout_ms": 1000}
        self._call_shard(0, "fleet_command", args, 1500 * MS, answered)

    def _join_through_another(self) -> None:
        others = self._reachable()
        if others and self.fleet:
            address = others[self._rng.randrange(len(others))]
            self._rpc(address, "join", {"fleet": self.fleet}, RPC_TIMEOUT_US, ignore_answer)

    def _is_first_voter(self) -> bool:
        """Whether this node's shard 0 is one of those that founded the fleet, and so its feed will come."""
        value = self._value
        return (
            value is not None
            and value.fleet == self.fleet
            and any(voter.instances == self.instances for voter in value.voters)
        )

    def _join_fields(self, record: NodeRecord) -> dict[str, Any]:
        known = [node for node in self._known_nodes() if node.name == record.name]
        return node_fields(record) | {"replaces": list(known[0].instances) if known else []}

    def _tend_deactivation(self, state: FleetState, mine: Node) -> None:
        if mine.active:
            if self._due("deactivate", SECOND):
                self._propose(["deactivate", mine.name])
            return
        if not self._due("drained", 400 * MS):
            return
        rows: list[list[Any]] = []
        waiting = set(range(len(self.shards)))

        def collected(index: int) -> Answer:
            def answered(code: int, body: Any) -> None:
                if code != OK:
                    return
                waiting.discard(index)
                rows.extend(body)
                if not waiting and not any(row[1] != 0 and row[2] != DAMAGED for row in rows):
                    self._leave_if_no_voter(state, mine)

            return answered

        for index in range(len(self.shards)):
            self._call_shard(index, "local_groups", {}, SECOND, collected(index))

    def _leave_if_no_voter(self, state: FleetState, mine: Node) -> None:
        def left(code: int, body: Any) -> None:
            if self.fleet and (code == OK or "has no node" in text_of(body)):
                self.zone = None
                self._leave("left")

        def answered(code: int, body: Any) -> None:
            members = body.get("members", []) if code == OK and isinstance(body, dict) else None
            if members is None and len(state.nodes) > 1:
                return
            if len(state.nodes) > 1 and any(
                member.get("instance") == mine.instances[0] and member.get("role") != "learner"
                for member in members or ()
            ):
                return
            self._propose(["leave", mine.name], left)

        self._call_shard(0, "group_status", {"name": FLEET_GROUP}, SECOND, answered)

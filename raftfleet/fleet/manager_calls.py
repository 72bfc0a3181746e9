"""What clients and the command line ask of a manager, through its control socket.

A call has a method, arguments and a time, and gets one :class:`~raftfleet.fleet.manager_outputs.Reply`. What changes a
group, and what must be true now, is passed to the shard whose business it is; what a person wants to see (nodes,
members, status) is answered from the copy of the fleet's state, completed by what shards and managers that answer in
time have to say.

No answer to a call that only reads leaves no doubt: it becomes UNANSWERED. To one that changes something it is
OUTCOME_UNKNOWN, and stays so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raftfleet.core.codes import BAD_REQUEST, GROUP_NOT_FOUND, NOT_ACTIVE, OK, OUTCOME_UNKNOWN, REFUSED, UNANSWERED
from raftfleet.core.names import shard_of
from raftfleet.core.roles import DAMAGED
from raftfleet.fleet.manager_outputs import MS, SECOND, Answer, Reply, StopNode
from raftfleet.fleet.manager_repair import ManagerRepair

READS = frozenset(("group_status", "copy_begin", "copy_read", "copy_end"))


class ManagerCalls(ManagerRepair):
    """The methods of the control socket."""

    def call(self, now_us: int, token: object, method: str, args: dict[str, Any], timeout_us: int) -> None:
        """A call from the control socket; answered once with a :class:`Reply` of the same token."""
        self._now_us = now_us

        def answer(code: int, body: Any) -> None:
            self._outputs.append(Reply(token, code, body))

        handler = _CALLS.get(method)
        if handler is None:
            answer(BAD_REQUEST, f"there is no method {method!r:.100}")
            return
        try:
            handler(self, args, max(timeout_us, 100 * MS), answer)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            answer(BAD_REQUEST, f"{method}: bad arguments: {error!r:.200}")

    # -- the node in its fleet --------------------------------------------------------------------------------------

    def _call_activate(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        zone = args["zone"]
        if not isinstance(zone, str) or not 1 <= len(zone.encode()) <= 255 or "\0" in zone:
            answer(BAD_REQUEST, "a zone is a str of 1 to 255 bytes of UTF-8")
            return
        if self._leaving:
            answer(REFUSED, "this node is leaving its fleet: wait until it is inactive")
            return
        self.zone = zone
        self._deactivating = False

        def is_active() -> bool:
            mine = self.state.nodes.get(self.settings.name) if self.state is not None else None
            return self.node_state == "active" and mine is not None and mine.zone == zone

        def finished(done: bool) -> None:
            answer(OK if done else NOT_ACTIVE, {} if done else f"still activating: {self.status_text}")

        self._wait_for(timeout_us, is_active, finished)

    def _call_deactivate(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        if not self.fleet:
            self.zone = None
            self.founding.stop(self._now_us)
            answer(OK, {})
            return

        def answered(code: int, body: Any) -> None:
            if code != OK:
                answer(code, body)
            else:
                self._deactivating = True
                if args.get("wait"):
                    self._wait_for(timeout_us, lambda: self.node_state == "inactive", finished)
                else:
                    answer(OK, {})

        def finished(done: bool) -> None:
            answer(OK if done else UNANSWERED, {} if done else "members are still moving away: it goes on")

        self._propose(["deactivate", self.settings.name], answered)

    def _call_active_nodes(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        answer(OK, self.state.active_nodes() if self.state is not None else {})

    def _call_unreachable(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        answer(OK, dict(self.unreachable))

    def _call_status(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        """The figures of shards that answer at once are fresh, those of others as they were last told."""
        waiting = {index for index, shard in enumerate(self.shards) if shard.instance}
        if not waiting:
            answer(OK, self.status())

        def came(index: int) -> Answer:
            def answered(code: int, body: Any) -> None:
                if code == OK:
                    self._take_shard_info(self.shards[index], body)
                waiting.discard(index)
                if not waiting:
                    answer(OK, self.status())

            return answered

        for index in sorted(waiting):
            self._call_shard(index, "shard_info", {}, min(timeout_us // 2, 300 * MS), came(index))

    def status(self) -> dict[str, Any]:
        """``status --json`` but for the processes' figures, which the driver adds to each of ``workers``."""
        state = self.state
        return {
            "node": self.settings.name,
            "instance": self.shards[0].instance,
            "zone": self.zone,
            "state": self.node_state,
            "waiting": self.status_text,
            "fleet": self.fleet.hex() or None,
            "endpoint": f"tcp://{self.settings.host}:{self.settings.port}",
            "durable": self.settings.durable,
            "nodes": state.active_nodes() if state is not None else {},
            "unreachable": dict(self.unreachable),
            "groups": len(state.groups) if state is not None else 0,
            "workers": [
                {
                    "index": index,
                    "instance": shard.instance,
                    "members": shard.info.get("members", 0),
                    "leaders": shard.info.get("leaders", 0),
                    "surplus": index >= self.settings.placing,
                    "disk": shard.info.get("disk"),
                    "divergences": shard.info.get("counters", {}).get("divergences", 0),
                }
                for index, shard in enumerate(self.shards)
            ],
            "divergent": sorted({name for shard in self.shards for name in shard.info.get("divergent", ())}),
        }

    def _call_stop(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        answer(OK, {})
        if not args.get("drain"):
            self._outputs.append(StopNode())
            return
        waiting = set(range(len(self.shards)))

        def drained(index: int) -> Answer:
            def answered(code: int, body: Any) -> None:
                waiting.discard(index)
                if not waiting:
                    self._outputs.append(StopNode())

            return answered

        for index in range(len(self.shards)):
            self._call_shard(index, "drain", {}, min(timeout_us, 5 * SECOND), drained(index))

    # -- groups -----------------------------------------------------------------------------------------------------

    def _pass_to_shard(
        self, index: int, method: str, args: dict[str, Any], timeout_us: int, answer: Answer, *, reads: bool = False
    ) -> None:
        """Have a shard answer. ``reads``: the call changes nothing, so that no answer leaves no doubt."""

        def answered(code: int, body: Any) -> None:
            answer(UNANSWERED if reads and code == OUTCOME_UNKNOWN else code, body)

        if not self.fleet or not self.is_ready:
            answer(NOT_ACTIVE, self._why_not_active())
            return
        # A little less time than the caller has, so that the shard's own answer is the one that arrives.
        self._call_shard(index, method, args, max(timeout_us - 50 * MS, timeout_us // 2), answered)

    def _call_group_change(self, method: str, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        self._pass_to_shard(0, method, args, timeout_us, answer)

    def _call_of_group(self, method: str, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        index = shard_of(args["name"], self.settings.placing)
        self._pass_to_shard(index, method, args, timeout_us, answer, reads=method in READS)

    def _call_groups(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        self._pass_to_shard(0, "fleet_query", {"query": ["groups"]}, timeout_us, answer, reads=True)

    def _call_members(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        name = args["name"]
        state = self.state
        group = state.by_name.get(name) if state is not None else None
        if state is None or group is None:
            code = NOT_ACTIVE if state is None else GROUP_NOT_FOUND
            answer(code, self._why_not_active() if state is None else f"there is no group {name!r}")
            return

        def answered(code: int, body: Any) -> None:
            known = body if code == OK and isinstance(body, dict) else {}
            roles = {m["node"]: m["role"] + ", differs" * m["diverged"] for m in known.get("members", ())}
            order = [
                row._asdict() | {"role": roles.pop(row.node, "-")}
                for row in state.explain(group)  # nodes that are not active any more come last
            ]
            for node, role in roles.items():
                zone = state.nodes[node].zone if node in state.nodes else "-"
                order.append({"node": node, "zone": zone, "rank": -1, "hash": 0, "desired": False, "role": role})
            answer(
                OK,
                {
                    "name": name,
                    "uid": group.uid,
                    "replicas": group.replicas,
                    "leader": known.get("leader"),
                    "term": known.get("term"),
                    "order": order,
                },
            )

        index = shard_of(name, self.settings.placing)
        self._call_shard(index, "group_status", {"name": name}, min(timeout_us, 2 * SECOND), answered)

    def _call_groups_detail(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        state = self.state
        if state is None:
            answer(NOT_ACTIVE, self._why_not_active())
            return

        def gathered(rows: dict[str, list[list[Any]]]) -> None:
            found: dict[int, dict[str, Any]] = {
                group.uid: {
                    "replicas": group.replicas,
                    "uid": group.uid,
                    "leader": None,
                    "term": 0,
                    "members": [],
                    "desired": [node for node, _ in state.desired(group)],
                    "commit": 0,
                }
                for group in state.groups.values()
            }
            for node in sorted(rows):
                for _name, uid, role, leader, term, _last, commit, *_ in rows[node]:
                    group = found.get(uid)
                    if group is None or role == DAMAGED:
                        continue
                    if role != "learner":
                        group["members"].append(node)
                    group["commit"] = max(group["commit"], commit)
                    home = state.instance_home(leader) if leader else None
                    if home is not None and term >= group["term"]:
                        group["leader"], group["term"] = home[0], term
            answer(OK, {group.name: found[group.uid] for group in state.groups.values() if group.uid in found})

        self._gather(min(timeout_us, 2 * SECOND), gathered)

    def _call_leaderless(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        if not self.fleet:
            answer(NOT_ACTIVE, self._why_not_active())
            return
        self._gather(min(timeout_us, 2 * SECOND), lambda rows: answer(OK, self._leaderless(rows)))


def _group_change(method: str) -> Callable[..., None]:
    def call(self: ManagerCalls, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        self._call_group_change(method, args, timeout_us, answer)

    return call


def _of_group(method: str) -> Callable[..., None]:
    def call(self: ManagerCalls, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        self._call_of_group(method, args, timeout_us, answer)

    return call


_CALLS: dict[str, Callable[..., None]] = {
    "activate": ManagerCalls._call_activate,
    "deactivate": ManagerCalls._call_deactivate,
    "active_nodes": ManagerCalls._call_active_nodes,
    "add_group": _group_change("add_group"),
    "add_groups": _group_change("add_groups"),
    "remove_group": _group_change("remove_group"),
    "change_config": _group_change("change_config"),
    "groups": ManagerCalls._call_groups,
    "groups_detail": ManagerCalls._call_groups_detail,
    "members": ManagerCalls._call_members,
    "copy_begin": _of_group("copy_begin"),
    "copy_read": _of_group("copy_read"),
    "copy_end": _of_group("copy_end"),
    "restore_piece": _of_group("restore_piece"),
    "group_status": _of_group("group_status"),
    "replace_leader": _of_group("replace_leader"),
    "unreachable_nodes": ManagerCalls._call_unreachable,
    "leaderless_groups": ManagerCalls._call_leaderless,
    "remove_dead_node": ManagerCalls._call_remove_dead_node,
    "repair_plan": ManagerCalls._call_repair_plan,
    "repair": ManagerCalls._call_repair,
    "status": ManagerCalls._call_status,
    "stop": ManagerCalls._call_stop,
}

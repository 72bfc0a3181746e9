"""The calls that a worker answers on its local socket: those of the node's manager, of sibling workers, of clients.

This module does not know about connections beyond their number. ``_CALLS`` at its end is the table of all calls; each
handler takes ``(connection, args, timeout_us, answer)`` and calls ``answer(code, body)`` once, now or later. Rules:

* A wrong argument is answered with BAD_REQUEST, whatever the handler had begun with it.
* What only a group's leader knows or does is asked of it, wherever it is, again and again until the time is over.
* A group that is not known here may be known to the fleet: that is asked first (:mod:`raftfleet.fleet.host_asking`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack

from raftfleet.core import repair
from raftfleet.core.codes import BAD_REQUEST, GROUP_NOT_FOUND, NO_LEADER, NOT_LEADER, OK, REFUSED
from raftfleet.core.host_messages import OP_QUERY
from raftfleet.core.names import FLEET_GROUP, FLEET_UID
from raftfleet.core.roles import DAMAGED
from raftfleet.fleet.host_changing import ChangingLayer
from raftfleet.fleet.host_copying import COPY_US, PIECE_US
from raftfleet.fleet.host_state import RETRY_PARKED_US
from raftfleet.fleet.machine import Group

CENSUS_US_PER_MEMBER = 100
DIVERGENT_SHOWN_MAX = 100
"""Groups named in a worker's figures: enough for a person; ``divergences`` counts them all."""
ASK_ANY_US = 5_000_000


class CallLayer(ChangingLayer):
    """Answers the node's manager, siblings and clients. See the module's text."""

    def _on_call(self, connection: int, request_id: int, method: str, args: dict[str, Any], timeout_ms: int) -> None:
        def answer(code: int, body: Any) -> None:
            self._reply(connection, request_id, code, body)

        handler = _CALLS.get(method)
        if handler is None:
            answer(BAD_REQUEST, f"a worker has no call {method!r:.100}")
            return
        try:
            handler(self, connection, args, timeout_ms * 1000, answer)
        except (KeyError, ValueError, TypeError) as error:
            answer(BAD_REQUEST, f"{method}: {type(error).__name__}: {error}")

    # ------------------------------------------------------------------ this worker, and the fleet that it is in

    def _call_shard_info(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        members = self.shard.members
        known = self.leaders.get(FLEET_UID)
        fleet_member = members.get(FLEET_UID)
        leader_count, divergent = self._census()
        answer(
            OK,
            {
                "index": self.settings.index,
                "instance": self.instance,
                "endpoint": self.settings.endpoint,
                "members": len(members) - (FLEET_UID in members),
                "leaders": leader_count,
                "fleet": self.fleet_id or None,
                "fleet_index": self.fleet_index,
                "fleet_leader": (fleet_member.leader if fleet_member is not None else 0) or (known[1] if known else 0),
                "fleet_leads": bool(fleet_member is not None and fleet_member.is_established),
                "fleet_known": self.fleet_known,
                "fleet_voters": list(fleet_member.voters) if fleet_member is not None else [],
                "counters": dict(self.counters),
                "resting": len(self._resting),
                "disk": self.disk.status() if self.disk is not None else None,
                "divergent": divergent,
            },
        )

    def _census(self) -> tuple[int, list[str]]:
        """How many groups are led here, and which members differ from their groups.

        The manager asks every second. Who has many members counts them more rarely, in a thousandth of its time.
        """
        members = self.shard.members
        if self._counted is None or self.now_us - self._counted_us > len(members) * CENSUS_US_PER_MEMBER:
            leaders = sum(uid != FLEET_UID and member.lead is not None for uid, member in members.items())
            divergent = [m.name for m in members.values() if m.audit is not None and m.audit.differing]
            self._counted = leaders, divergent[:DIVERGENT_SHOWN_MAX]
            self._counted_us = self.now_us
        return self._counted

    def _call_set_fleet(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        fleet_id = args["fleet"]
        if type(fleet_id) is not bytes or len(fleet_id) != 16:
            raise ValueError("a fleet id has 16 bytes")
        if self.fleet_id and self.fleet_id != fleet_id:
            answer(REFUSED, f"this worker is in fleet {self.fleet_id.hex()}")
            return
        self.set_fleet(fleet_id)
        for instance, endpoint, public_key, _ in args.get("addresses", ()):
            self._set_address(instance, endpoint, public_key)
        answer(OK, {})

    def _call_start_fleet(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        if not self.fleet_id or self.settings.index != 0:
            answer(REFUSED, "set_fleet comes first, and only worker 0 holds the fleet group")
            return
        voters = tuple(int(voter) for voter in args["voters"])
        if self.instance not in voters:
            raise ValueError("this worker is not among the voters")
        commands = msgpack.unpackb(args["state"], raw=False, strict_map_key=False) if args.get("state") else []
        self.start_fleet(voters, commands, campaign=bool(args.get("campaign")))
        answer(OK, {})

    def _call_leave_fleet(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        answer(OK, {})
        self._out.exit_fresh = True

    def _call_retire(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        """This worker is surplus: the fleet knows its instance to be gone. Not while it holds anything."""
        held = len(self.shard.members) + len(self._resting)
        if held or self.fleet.gone.get(self.instance) is None:
            answer(REFUSED, f"worker {self.settings.index} holds {held} members, or is not given up by the fleet")
            return
        answer(OK, {})
        self._out.exit_retired = True

    def _call_watch_fleet(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        self._watchers[connection] = None
        answer(OK, {"index": self.fleet_index, "state": self.fleet.dump() if self.fleet_known else None})

    def _call_fleet_command(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        self._fleet_command(args["command"], int(args.get("timeout_ms", 0)) * 1000 or timeout_us, answer)

    def _call_fleet_query(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        timeout_us = int(args.get("timeout_ms", 0)) * 1000 or timeout_us
        body = msgpack.packb(args["query"], use_bin_type=True)
        self._fleet_request(OP_QUERY, body, timeout_us, answer, stale=bool(args.get("stale")))

    def _call_local_groups(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        rows = []
        for uid, member in self.shard.members.items():
            role = "leader" if member.lead is not None else ("learner" if member.is_learner else member.role)
            rows.append(
                [
                    *(member.name, uid, role, member.leader, member.term),
                    *(member.last_index, member.commit, member.applied),
                    *(self.instance, list(member.voters), list(member.learners)),
                ]
            )
        if self.disk is not None:
            rows.extend(self._damaged_row(uid) for uid, buried in self.shard.tombstones.items() if buried.is_lost)
        answer(OK, rows)

    def _damaged_row(self, uid: int) -> list[Any]:
        """Of a member whose records are damaged: with the newest snapshot that it left in the archive, if any."""
        assert self.disk is not None
        group = self.fleet.groups.get(uid)
        name = FLEET_GROUP if uid == FLEET_UID else (group.name if group is not None else "")
        return [name, uid, DAMAGED, 0, 0, 0, 0, 0, self.instance, [], [], *self.disk.archived_snapshot(uid)]

    def _call_declare_lost(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        """The operator gives up what these members lost: ``[[uid, [instance, ...]], ...]``."""
        for uid, instances in args["losses"]:
            member = self.shard.members.get(int(uid))
            if member is not None:
                repair.declare_lost(member, [int(instance) for instance in instances])
        answer(OK, {})

    def _call_declare_dead(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        for instance in args["instances"]:
            if int(instance) != self.instance:
                self.shard.gone[int(instance)] = "operator"
        answer(OK, {})

    def _call_drain(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        self.drain()
        answer(OK, {})

    # ------------------------------------------------------------------ groups, wherever they are led

    def _group_named(self, name: object) -> Group | None:
        return self.fleet.by_name.get(name) if isinstance(name, str) else None

    def _call_group_status(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        if args["name"] == FLEET_GROUP:
            uid = FLEET_UID
        else:
            group = self._group_named(args["name"])
            if group is None:
                self._group_missing(
                    args["name"], answer, lambda left_us: self._call_group_status(0, args, left_us, answer), timeout_us
                )
                return
            uid = group.uid
        self._ask_leader(uid, "group_status", {"uid": uid}, timeout_us, answer)

    def _call_replace_leader(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        group = self._group_named(args["name"])
        if group is None:
            self._group_missing(
                args["name"], answer, lambda left_us: self._call_replace_leader(0, args, left_us, answer), timeout_us
            )
            return
        node = self.fleet.nodes.get(args["node"])
        if node is None:
            answer(REFUSED, f"there is no node {args['node']!r:.100}: see 'raftfleet-node nodes'")
            return
        uid = group.uid
        instance = node.instance_for(group.name)

        def pinned(code: int, body: Any) -> None:
            self._ask_leader(uid, "transfer", {"uid": uid, "instance": instance}, timeout_us, answer)

        self.rpc(instance, "pin", {"uid": uid}, pinned, 500_000)

    def _group_missing(self, name: object, answer: Any, again: Callable[[int], None], timeout_us: int) -> None:
        """Not known here: ask the fleet, and once the feed is there, go on with the time that is left."""
        deadline_us = self.now_us + timeout_us
        if not isinstance(name, str):
            raise ValueError("a group name is a str")

        def checked(code: int, body: Any) -> None:
            if code != OK:
                answer(code, body if code != GROUP_NOT_FOUND else f"there is no consensus group {name!r}")
            elif self._group_named(name) is not None:
                again(deadline_us - self.now_us)
            elif self.now_us + RETRY_PARKED_US >= deadline_us:
                answer(NO_LEADER, f"node {self.settings.node} has not heard of group {name!r} from the fleet yet")
            else:
                left_us = deadline_us - self.now_us - RETRY_PARKED_US
                self._delayed.append((self.now_us + RETRY_PARKED_US, lambda: again(left_us)))

        self.ask_fleet(["group", name], checked)

    def _call_copy_begin(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        """A copy of a group's state, held by the shard that the answer names."""
        group = self._group_named(args["name"])
        if group is None:
            self._group_missing(
                args["name"], answer, lambda left_us: self._call_copy_begin(0, args, left_us, answer), timeout_us
            )
            return
        stale = bool(args["stale"])
        config, replicas = dict(group.config), group.replicas

        def answered(code: int, body: Any) -> None:
            answer(code, {**body, "config": config, "replicas": replicas} if code == OK else body)

        wanted = {"uid": group.uid, "stale": stale}
        if not stale:
            self._ask_leader(group.uid, "copy_begin", wanted, timeout_us, answered, attempt_us=COPY_US)
            return
        places = dict.fromkeys([self.instance, *(i for _, i in (*self.fleet.desired(group), *group.members))])
        self._ask_any([i for i in places if i not in self.fleet.gone], "copy_begin", wanted, answered)

    def _ask_any(self, instances: list[int], method: str, args: dict[str, Any], answer: Any) -> None:
        """Call one after the other until one has an answer."""

        def answered(code: int, body: Any) -> None:
            if code in (NOT_LEADER, NO_LEADER) and len(instances) > 1:
                self._ask_any(instances[1:], method, args, answer)
            else:
                answer(code, body if code != NOT_LEADER else "no member that answers has anything")

        self.rpc(instances[0], method, args, answered, ASK_ANY_US)

    def _call_copy_read(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        self.rpc(int(args["instance"]), "copy_read", args, answer, min(timeout_us, ASK_ANY_US))

    def _call_copy_end(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        self.rpc(int(args["instance"]), "copy_end", args, answer, min(timeout_us, ASK_ANY_US))

    def _call_restore_piece(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        group = self._group_named(args["name"])
        if group is None or group.uid != args["uid"]:
            self._group_missing(
                args["name"], answer, lambda left_us: self._call_restore_piece(0, args, left_us, answer), timeout_us
            ) if group is None else answer(GROUP_NOT_FOUND, f"group {group.name!r} is not the one that it was")
            return
        self._ask_leader(group.uid, "restore_piece", args, timeout_us, answer, attempt_us=PIECE_US)

    def _ask_leader(
        self,
        uid: int,
        method: str,
        args: dict[str, Any],
        timeout_us: int,
        answer: Any,
        *,
        attempt_us: int = 1_000_000,
    ) -> None:
        """Call the group's leader, wherever it is; tries again until ``timeout_us`` is over."""
        deadline_us = self.now_us + timeout_us
        attempts = 0

        def ask(instance: int) -> None:
            if instance:
                self.rpc(instance, method, args, answered, min(attempt_us, timeout_us))
            else:
                answered(NOT_LEADER, [0, 0])

        def answered(code: int, body: Any) -> None:
            nonlocal attempts
            attempts += 1
            if code not in (NOT_LEADER, NO_LEADER):
                answer(code, body)
            elif self.now_us + RETRY_PARKED_US >= deadline_us:
                answer(NO_LEADER, "no leader answered before the deadline")
            elif code == NOT_LEADER and body and body[0] and attempts % 3:
                ask(body[0])
            else:
                self._delayed.append((self.now_us + RETRY_PARKED_US, lambda: ask(self._some_member(uid, attempts))))

        ask(self._some_member(uid, 0))

    def _some_member(self, uid: int, attempt: int) -> int:
        member = self.shard.members.get(uid)
        if member is not None and member.leader and attempt % 2 == 0:
            return member.leader
        known = self.leaders.get(uid)
        if known is not None and attempt % 2 == 0:
            return known[1]
        return self._guess(uid)


_CALLS: dict[str, Callable[[CallLayer, int, dict[str, Any], int, Any], None]] = {
    "shard_info": CallLayer._call_shard_info,
    "set_fleet": CallLayer._call_set_fleet,
    "start_fleet": CallLayer._call_start_fleet,
    "leave_fleet": CallLayer._call_leave_fleet,
    "retire": CallLayer._call_retire,
    "watch_fleet": CallLayer._call_watch_fleet,
    "fleet_command": CallLayer._call_fleet_command,
    "fleet_query": CallLayer._call_fleet_query,
    "local_groups": CallLayer._call_local_groups,
    "declare_dead": CallLayer._call_declare_dead,
    "declare_lost": CallLayer._call_declare_lost,
    "drain": CallLayer._call_drain,
    "group_status": CallLayer._call_group_status,
    "replace_leader": CallLayer._call_replace_leader,
    "add_group": CallLayer._call_add_group,
    "copy_begin": CallLayer._call_copy_begin,
    "copy_read": CallLayer._call_copy_read,
    "copy_end": CallLayer._call_copy_end,
    "restore_piece": CallLayer._call_restore_piece,
    "add_groups": CallLayer._call_add_groups,
    "remove_group": CallLayer._call_remove_group,
    "change_config": CallLayer._call_change_config,
}

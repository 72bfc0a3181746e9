"""Calls between shards: one shard asks another for something that is not Raft and not a client's request.

This module does not know about links or sockets: a call leaves as a message and its answer comes back as one. Rules:

* ``answer(code, body)`` comes exactly once: from the other side, or from the deadline. A call that was lost is not sent
  again here: who needs it asks again.
* A call to this very shard takes the same way, without a message.
* What another shard sends is untrusted input: a wrong argument is answered with BAD_REQUEST.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raftfleet.core.change import ConfigChangeRefused
from raftfleet.core.codes import BAD_REQUEST, GONE_UID, NOT_ACTIVE, NOT_IMPORTABLE, NOT_LEADER, OK, REFUSED
from raftfleet.core.config import GroupConfig
from raftfleet.core.failures import describe
from raftfleet.core.host_messages import RPC, RPC_ANSWER, Rpc, RpcAnswer
from raftfleet.core.names import FLEET_UID
from raftfleet.fleet.host_state import HostState


class RpcLayer(HostState):
    """Asks other shards, and answers them. See the module's text."""

    def rpc(
        self, instance: int, method: str, args: dict[str, Any], answer: Callable[[int, Any], None], timeout_us: int
    ) -> None:
        """Call another shard (or this one); ``answer(code, body)`` comes once."""
        if instance == self.instance:
            self._run_rpc(method, args, answer)
            return
        request_id = self._next_id
        self._next_id += 1
        self._rpcs[request_id] = (self.now_us + timeout_us, answer)
        self._send(instance, Rpc(RPC, request_id, method, args))

    def _on_rpc(self, sender: int, message: Rpc) -> None:
        request_id = message.request_id
        self._run_rpc(
            message.method,
            message.args,
            lambda code, body: self._send(sender, RpcAnswer(RPC_ANSWER, request_id, code, body)),
        )

    def _run_rpc(self, method: str, args: dict[str, Any], answer: Callable[[int, Any], None]) -> None:
        try:
            if method == "import_check":
                answer(*self._rpc_import_check(args))
            elif method == "drop_group":
                uid = int(args["uid"])
                if uid == FLEET_UID:
                    raise ValueError("the fleet group is not dropped")
                if not self.fleet.is_dead_uid(uid):
                    self._dead_early.add(uid)
                    self._remember_removed([uid])
                self.shard.remove_group(uid)
                answer(OK, {})
            elif method == "who_leads":
                answer(*self._rpc_who_leads(int(args["uid"])))
            elif method == "announce":
                answer(OK if self._announce_all_to(int(args["to"])) else NOT_ACTIVE, {})
            elif method == "machine_version":
                member = self.shard.members.get(int(args["uid"]))
                answer(OK, member.machine.version if member is not None else 0)
            elif method == "group_status":
                answer(*self._rpc_group_status(int(args["uid"])))
            elif method == "transfer":
                answer(*self._rpc_transfer(int(args["uid"]), int(args["instance"])))
            elif method == "pin":
                self._pinned[int(args["uid"])] = self.now_us
                answer(OK, {})
            else:
                answer(BAD_REQUEST, f"there is no call {method!r:.100}")
        except (KeyError, ValueError, TypeError) as error:
            answer(BAD_REQUEST, f"{method}: {type(error).__name__}: {error}")

    def _rpc_import_check(self, args: dict[str, Any]) -> tuple[int, Any]:
        config = GroupConfig.from_dict(args["config"])
        try:
            machine, _ = self.make_machine(config)
            if (config.machine_version or 1) > machine.version:
                raise ValueError(
                    f"version {config.machine_version} is asked for; the code here knows {machine.version}"
                )
            machine.context.version = config.machine_version or machine.version
            machine.dump(machine.new())
        except BaseException as error:
            return NOT_IMPORTABLE, [self.settings.node, ": ".join(describe(error))]
        return OK, {"version": machine.version}

    def _rpc_who_leads(self, uid: int) -> tuple[int, Any]:
        if self._is_dead(uid):
            return GONE_UID, None
        member = self.shard.members.get(uid)
        return OK, [member.leader, member.term] if member is not None else [0, 0]

    def _rpc_group_status(self, uid: int) -> tuple[int, Any]:
        member = self.shard.members.get(uid)
        if member is None or member.lead is None:
            known = self.leaders.get(uid)
            hint = member.leader if member is not None else (known[1] if known else 0)
            return NOT_LEADER, [hint, member.term if member is not None else 0]
        lead = member.lead
        live = member.live_members()
        audit = member.audit
        rows = []
        for instance in member.membership.lives:
            progress = lead.progress.get(instance)
            rows.append(
                {
                    "node": self.settings.node if instance == self.instance else self._node_of(instance),
                    "instance": instance,
                    "role": "voter" if instance in member.voters else "learner",
                    "match": member.last_index if progress is None else progress.match,
                    "unresponsive": instance not in live,
                    "diverged": audit is not None and instance in audit.differing,
                }
            )
        return OK, {
            "name": member.name,
            "uid": uid,
            "leader": self.settings.node,
            "term": member.term,
            "commit": member.commit,
            "applied": member.applied,
            "last_index": member.last_index,
            "members": rows,
            "unresponsive": [row["node"] for row in rows if row["unresponsive"]],
            "machine_version": member.active_version,
            "sessions": len(member.session_table.by_client),
            "audit": member.membership.audit,
            "checked_index": audit.own.index if audit is not None and audit.own is not None else 0,
            "diverged": [row["node"] for row in rows if row["diverged"]],
            "divergences": audit.difference_count if audit is not None else 0,
            "restoring": list(member.config.restore or ()) if member.restoring is not None else None,
            "restored_bytes": len(member.restoring.received) if member.restoring is not None else None,
        }

    def _rpc_transfer(self, uid: int, instance: int) -> tuple[int, Any]:
        member = self.shard.members.get(uid)
        if member is None or member.lead is None:
            return NOT_LEADER, [member.leader if member is not None else 0, 0]
        try:
            member.transfer(instance)
        except ConfigChangeRefused as refusal:
            return REFUSED, str(refusal)
        return OK, {}

"""Asking the fleet group: what a name that is not known here means, and commands to it, exactly once.

This module does not know who leads the fleet group: what it asks is a request like a client's. Worker 0 holds the fleet
group's member and asks itself; the other workers ask worker 0 of their node (an upcall). Rules:

* A node may lag behind the fleet's log, so a name that it does not know is asked for before a client is told that there
  is no such group; requests for one name share the question. If the group exists, they wait for the log to come here.
* A request that was meant for a group that is no more is never carried on to the next group of the same name, if it may
  have been done, or if its client had met the old one.
* A command to the fleet carries this host's own session, like a client's: sent twice, it takes effect once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack

from raftfleet.core.codes import GROUP_CHANGED, GROUP_NOT_FOUND, OK, OUTCOME_UNKNOWN, REFUSED
from raftfleet.core.host_messages import OP_COMMAND, OP_QUERY
from raftfleet.core.names import FLEET_GROUP
from raftfleet.fleet.host_requests import OpenRequestLayer
from raftfleet.fleet.requests import FROM_HOST, Request


class AskingLayer(OpenRequestLayer):
    """Asks the fleet group, and settles names that are not known here. See the module's text."""

    def _check_name(self, request: Request) -> None:
        """This node has not heard of the group: maybe the fleet has."""
        if request.uid and self._is_dead(request.uid):
            if request.given_uid or (request.maybe and request.op == OP_COMMAND):
                self._group_changed(request)
                return
            request.uid = 0
        waiting = self._checking.get(request.name)
        if waiting is not None:
            waiting.append(request)
            return
        self._checking[request.name] = [request]
        name = request.name
        self.ask_fleet(["group", name], lambda code, body: self._name_checked(name, code, body))

    def _group_changed(self, request: Request) -> None:
        """The group that was meant is no more. Never done on to its successor of the same name by this node."""
        if request.maybe and request.op == OP_COMMAND:
            self._finish_request(
                request, OUTCOME_UNKNOWN, f"group {request.name} was removed while this command was under way"
            )
        else:
            self._finish_request(request, GROUP_CHANGED, f"group {request.name} is not the one that it was")

    def _dead_uid_met(self, request: Request) -> None:
        """The group that this node believes in was removed: ask the fleet's leader what the name means now."""
        if request.uid in self.fleet.groups:
            self._dead_early.add(request.uid)
        self._check_name(request)

    def _name_checked(self, name: str, code: int, body: Any) -> None:
        requests = self._checking.pop(name, [])
        if code == OK:
            uid = body.get("uid") if isinstance(body, dict) else None
            group = self.fleet.by_name.get(name)
            here = group is not None and group.uid == uid
            for request in requests:
                if request.done:
                    continue
                if here:
                    self._route(request)
                else:
                    self._awaiting_feed.setdefault(name, []).append(request)
            return
        for request in requests:
            if code == GROUP_NOT_FOUND:
                self._finish_request(request, GROUP_NOT_FOUND, f"there is no consensus group {name!r}")
            else:
                self._finish_request(request, request.overdue_code(), f"the fleet group gave no answer: {body}")

    def ask_fleet(self, query: list[Any], answer: Callable[[int, Any], None], *, timeout_us: int = 2_000_000) -> None:
        """A linearizable query to the fleet group; ``answer(code, value)``."""
        if self.settings.index != 0:
            token = self._next_id
            self._next_id += 1
            self._upcalls[token] = answer
            args = {"query": query, "stale": False, "timeout_ms": timeout_us // 1000}
            self._out.upcalls.append((token, "fleet_query", args))
            return
        self._fleet_request(OP_QUERY, msgpack.packb(query), timeout_us, answer)

    def on_upcall_answer(self, token: int, code: int, body: Any) -> None:
        """Worker 0's answer to one of :attr:`Outputs.upcalls`."""
        answer = self._upcalls.pop(token, None)
        if answer is not None:
            answer(code, body)

    def _fleet_request(
        self, op: int, body: bytes, timeout_us: int, answer: Callable[[int, Any], None], *, stale: bool = False
    ) -> None:
        """A request to the fleet group from this worker (0) itself."""

        def answered(code: int, packed: Any) -> None:
            if code == OK:
                answer(OK, msgpack.unpackb(packed, raw=False, strict_map_key=False))
            elif isinstance(packed, list) and len(packed) == 2 and packed[0] == "FleetRefused":
                number, _, message = str(packed[1]).partition(":")
                answer(int(number) if number.isdigit() else REFUSED, message)
            else:
                answer(code, packed)

        deadline_us = self.now_us + timeout_us
        self._accept(Request(FROM_HOST, 0, 0, op, FLEET_GROUP, 0, deadline_us, int(stale), body, answered))

    def _fleet_command(self, command: Any, timeout_us: int, answer: Callable[[int, Any], None]) -> None:
        """A command to the fleet group, exactly once."""
        self._seq += 1
        seq = self._seq
        arg = msgpack.packb(command, use_bin_type=True)
        body = msgpack.packb([self.client_id, seq, self._acked, self.shard.wall_us, arg])

        def answered(code: int, value: Any) -> None:
            self._acked_ahead.add(seq)
            while self._acked + 1 in self._acked_ahead:
                self._acked += 1
                self._acked_ahead.discard(self._acked)
            answer(code, value)

        self._fleet_request(OP_COMMAND, body, timeout_us, answered)

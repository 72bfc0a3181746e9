"""Routing: a client's request comes to the worker that owns the group's name, and goes to whoever leads the group.

This module does not know about clients' frames or links. Rules:

* If the leader is here, the request is proposed; if it is elsewhere, it is forwarded, many in one message; if none is
  known, it is parked, and tried again when one is announced or after a while.
* A wrong guess goes round inside the node, never through the client.
* ``Request.maybe`` is kept exact at every step: set when a request is handed to a member that may lead, cleared only by
  an answer that says that nothing happened. From it comes what the client is told at the end.
* A stale read may go to any member that has applied something.

This is the hot path: a call or a lookup that is added to the way of a command costs throughput.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack

from raftfleet.core.codes import BAD_REQUEST, DROPPED, GONE_UID, NOT_LEADER, OK, OUTCOME_UNKNOWN, OVERLOADED, TOO_LARGE
from raftfleet.core.host_messages import OP_COMMAND, OP_QUERY, ForwardReply, ForwardRequest
from raftfleet.core.names import FLEET_GROUP, FLEET_UID
from raftfleet.core.sessions import check_arguments, size_refusal
from raftfleet.fleet.host_leaders import LeaderLayer
from raftfleet.fleet.host_requests import OPEN_BYTES_MAX, OPEN_REQUESTS_MAX, in_doubt, is_run_part
from raftfleet.fleet.requests import FROM_PEER, FROM_RPC, IN_A_LOG, ON_ITS_WAY, Request

if TYPE_CHECKING:
    from raftfleet.core.member import Member


class RoutingLayer(LeaderLayer):
    """Brings requests to leaders, here or elsewhere. See the module's text."""

    def _route(self, request: Request, *, guess: bool = False) -> None:
        """Bring a request one step further: to a member here, over a link, or into a waiting room."""
        name = request.name
        if name == FLEET_GROUP:
            uid = FLEET_UID
        else:
            group = self.fleet.by_name.get(name)
            if group is None or group.uid in self._dead_early:
                self._check_name(request)
                return
            uid = group.uid
            if request.uid != uid:
                if request.uid:
                    self._group_changed(request)
                    return
                request.uid = uid
            if request.op == OP_COMMAND:
                limit = group.config["command_bytes_max"]
                if len(request.body) > limit:
                    refusal = size_refusal(name, request.body, limit)
                    if refusal is not None:
                        self._finish_request(request, TOO_LARGE, refusal)
                        return
        member = self.shard.members.get(uid)
        if member is not None:
            if member.lead is not None:
                if request.op == OP_COMMAND:
                    request.maybe |= ON_ITS_WAY
                    member.propose(request.body, request)
                    return
                if not request.consistency:
                    self._read(member, request)
                    return
            if request.consistency and request.op == OP_QUERY and member.is_readable:
                self._evaluate(member, request)
                return
        leader = 0
        if member is not None and member.leader != self.instance:
            leader = member.leader
        if not leader:
            known = self.leaders.get(uid)
            if known is not None and known[1] != self.instance:
                leader = known[1]
        request.attempts += guess
        if request.consistency and request.op == OP_QUERY:
            if not leader or request.attempts % 2:
                leader = self._guess(uid)  # any member will do
        elif (not leader and (member is None or request.attempts > 4)) or (guess and request.attempts % 2 == 0):
            self._ask_who_leads(uid)
        if leader:
            self._forward(request, leader)
        else:
            self._parked.setdefault(uid, []).append(request)

    def _read(self, member: Member, request: Request) -> None:
        """A linearizable query, or a run of them, to the leader, which is here."""
        try:
            arg = _arguments(request)
        except ValueError as error:
            self._finish_request(request, BAD_REQUEST, str(error))
            return
        request.maybe |= ON_ITS_WAY
        member.read(arg, request)

    def _evaluate(self, member: Member, request: Request) -> None:
        """A stale query, or a run of them, to the member that is here."""
        try:
            arg = _arguments(request)
        except ValueError as error:
            self._finish_request(request, BAD_REQUEST, str(error))
            return
        self._finish_with(request, *member.evaluate(arg))

    def _forward(self, request: Request, instance: int) -> None:
        request_id = self._next_id
        self._next_id += 1
        self._forwarded[request_id] = request
        request.forward_id = request_id
        request.sent_to = instance
        timeout_ms = max(1, (request.deadline_us - self.now_us) // 1000)
        item = ForwardRequest(
            request_id, request.op, request.uid, timeout_ms, request.consistency, request.count, request.body
        )
        queue = self._forwards.get(instance)
        if queue is None:
            self._forwards[instance] = [item]
        else:
            queue.append(item)
        request.maybe |= ON_ITS_WAY

    def _on_forward(self, sender: int, requests: list[ForwardRequest]) -> None:
        members = self.shard.members
        now_us = self.now_us
        # A request is taken once: should a network bring one again, later, it may find a leader where the first found
        # none, and the client was told by then that nothing happened. Ids of one sender rise.
        newest_id = self._newest_forward.get(sender, 0)
        for request_id, op, uid, timeout_ms, consistency, count, body in requests:
            if request_id <= newest_id:
                self.count("forwards_repeated")
                continue
            self._newest_forward[sender] = newest_id = request_id
            member = members.get(uid)
            if member is None:
                answer = (GONE_UID, None) if self._is_dead(uid) else (NOT_LEADER, [0, 0])
                self._answers.setdefault(sender, []).append(ForwardReply(request_id, *answer))
                continue
            deadline_us = now_us + timeout_ms * 1000
            request = Request(
                *(FROM_PEER, sender, request_id, op, member.name, uid, deadline_us, consistency, body), count=count
            )
            if member.lead is None:
                if consistency and op == OP_QUERY and member.is_readable:
                    self._evaluate(member, request)
                else:
                    self._answer(request, NOT_LEADER, [member.leader, member.term])
                continue
            if self._open_count + (count or 1) > OPEN_REQUESTS_MAX or self._open_bytes >= OPEN_BYTES_MAX:
                self.count("overloaded")
                self._answer(request, OVERLOADED, f"the leader's worker on node {self.settings.node} is full")
                continue
            self._take_in(request)
            request.maybe = ON_ITS_WAY  # should its deadline pass here: the sender is told no more than is known
            if op == OP_COMMAND:
                member.propose(body, request)
            else:
                self._read(member, request)

    def _on_forward_answer(self, sender: int, replies: list[ForwardReply]) -> None:
        for request_id, code, body in replies:
            request = self._forwarded.get(request_id)
            if request is None:
                continue
            if request.count and code == OK:
                self._on_run_part(request, body)
                continue
            del self._forwarded[request_id]
            request.forward_id = 0
            if code == NOT_LEADER:
                request.maybe &= ~ON_ITS_WAY
                self._on_wrong_guess(request, sender, body)
            elif code == DROPPED:
                request.maybe |= IN_A_LOG
                self._parked.setdefault(request.uid, []).append(request)
            elif code == GONE_UID:
                request.maybe &= ~ON_ITS_WAY
                self._dead_uid_met(request)
            else:
                self._finish_request(request, code, body)

    def _on_run_part(self, request: Request, body: Any) -> None:
        """A part of a run's results; with the last the run is done. What is lost of it is unknown to the client."""
        if not is_run_part(body):
            self.count("bad_run_parts")
            return
        if request.maybe & IN_A_LOG:
            try:
                body[2] = msgpack.packb(in_doubt(msgpack.unpackb(body[2], strict_map_key=False)))
            except (ValueError, TypeError, LookupError, msgpack.UnpackException):
                self._finish_request(request, OUTCOME_UNKNOWN, "the answer to a run was not understood")
                return
        if body[1]:
            self._answer(request, OK, body)
        else:
            self._finish_request(request, OK, body)

    def _on_wrong_guess(self, request: Request, sender: int, body: Any) -> None:
        uid = request.uid
        known = self.leaders.get(uid)
        if known is not None and known[1] == sender:
            del self.leaders[uid]
        leader = body[0] if isinstance(body, (list, tuple)) and len(body) == 2 and type(body[0]) is int else 0
        if leader and leader not in (sender, self.instance) and request.attempts < 8:
            request.attempts += 2
            if type(body[1]) is int:
                self._learn_leader(uid, body[1], leader)
            self._forward(request, leader)
        else:
            self._parked.setdefault(uid, []).append(request)

    def _on_reply(self, request: Request, code: int, body: Any) -> None:
        """The shard's answer to something that was proposed or read here."""
        if request.done:
            return
        if request.origin == FROM_PEER:
            if code in (NOT_LEADER, DROPPED) and isinstance(body, tuple):
                body = list(body)
            self._finish_with(request, code, body)
        elif code in (NOT_LEADER, DROPPED):
            if request.origin == FROM_RPC:
                self._finish_request(request, code, body)
                return
            if code == NOT_LEADER:
                request.maybe &= ~ON_ITS_WAY  # it never entered a log
            else:
                request.maybe |= IN_A_LOG
            self._parked.setdefault(request.uid, []).append(request)
        elif code == GONE_UID and request.origin != FROM_RPC:
            request.maybe &= ~ON_ITS_WAY  # it waited in front of the log
            self._check_name(request)
        else:
            self._finish_with(request, code, body)


def _arguments(request: Request) -> bytes | list[bytes]:
    """The argument of a query, or those of a run.

    Raises:
        ValueError: they cannot be taken apart.
    """
    if not request.count:
        return request.body
    try:
        return check_arguments(msgpack.unpackb(request.body))
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"a run of queries is a packed list of packed arguments: {error}") from error

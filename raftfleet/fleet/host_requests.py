"""The requests that are open in a worker: taken in, counted, and answered once each, at their deadline at the latest.

This module does not know where a request goes; :mod:`raftfleet.fleet.host_routing` does. Rules:

* Limits come first: a worker that is full answers OVERLOADED at once, so that memory has a bound whatever is offered.
* A request is answered once, to whoever asked: a client's connection, another shard, or this host itself.
* An answer says no more than is known. A command that may be in some leader's log is never said not to be applied.
* Nothing waits beyond its deadline, whatever it waits for: an answer, a call's answer, the fleet's log.
"""

from __future__ import annotations

from typing import Any

import msgpack

from raftfleet.core.codes import NO_LEADER, NOT_ACTIVE, OK, OUTCOME_UNKNOWN, OVERLOADED, RESTORING
from raftfleet.core.host_messages import OP_COMMAND, ForwardReply
from raftfleet.core.names import FLEET_GROUP
from raftfleet.fleet.host_copying import CopyingLayer
from raftfleet.fleet.requests import FROM_CLIENT, FROM_PEER, IN_A_LOG, Request

OPEN_REQUESTS_MAX = 16_384
"""Commands and queries: those of a run count each."""
OPEN_BYTES_MAX = 64 << 20
RUN_PART_BYTES_MAX = 1 << 20
"""A part of a run's results has at most so many bytes, or is a single larger one."""

_pack = msgpack.Packer(use_bin_type=True).pack


def run_parts(outcomes: list[Any]) -> list[list[Any]]:
    """The results of a run as bodies of answers ``[offset, left, results]``, of which ``left`` come after this part.

    ``results`` is packed once and then only handed on: a list with a packed result (bin), or ``[code, body]``, of each.
    """
    sizes = list(map(len, outcomes))
    if sum(sizes) <= RUN_PART_BYTES_MAX:
        return [[0, 0, _pack(outcomes)]]
    parts: list[list[Any]] = []
    start, size_bytes = 0, 0
    for position, one_bytes in enumerate(sizes):
        if position > start and size_bytes + one_bytes > RUN_PART_BYTES_MAX:
            parts.append([start, len(outcomes) - position, _pack(outcomes[start:position])])
            start, size_bytes = position, 0
        size_bytes += one_bytes
    parts.append([start, 0, _pack(outcomes[start:])])
    return parts


def is_run_part(body: object) -> bool:
    """Whether another host's answer to a run looks like a part of its results."""
    return type(body) is list and len(body) == 3 and int is type(body[0]) is type(body[1]) and type(body[2]) is bytes


def in_doubt(outcomes: list[Any]) -> list[Any]:
    """Results of a run of which an earlier try was in a log: none of them may say that it was not applied."""
    return [
        list(_unknown(one[1])) if type(one) is list and NO_LEADER <= one[0] <= RESTORING else one for one in outcomes
    ]


def _unknown(body: Any) -> tuple[int, str]:
    # What became of the last try is known, but an earlier one was in a log.
    return OUTCOME_UNKNOWN, f"it was in the log of a leader that was deposed; then: {body}"


class OpenRequestLayer(CopyingLayer):
    """Takes requests in and answers them. See the module's text."""

    def _accept(self, request: Request) -> None:
        if not self.fleet_known and request.name != FLEET_GROUP:
            self._reply(
                request.source,
                request.request_id,
                NOT_ACTIVE,
                f"node {self.settings.node} is not in a fleet yet: see 'raftfleet-node status'",
            )
            return
        if self._open_count + (request.count or 1) > OPEN_REQUESTS_MAX or self._open_bytes >= OPEN_BYTES_MAX:
            self.count("overloaded")
            self._answer(
                request,
                OVERLOADED,
                f"{self._open_count} requests of {self._open_bytes} bytes are open in this worker (limits: "
                f"{OPEN_REQUESTS_MAX} and {OPEN_BYTES_MAX}); start the node with more --workers, or offer less load",
            )
            return
        self._take_in(request)
        self._route(request)

    def _take_in(self, request: Request) -> None:
        self._open[request] = None
        self._open_count += request.count or 1
        self._open_bytes += len(request.body)

    def _finish_with(self, request: Request, code: int, body: Any) -> None:
        """What a member here said: as :meth:`_finish_request`, but that the results of a run are a list."""
        if not request.count or code != OK or request.done:
            self._finish_request(request, code, body)
            return
        if request.maybe & IN_A_LOG:
            body = in_doubt(body)
        *parts, last = run_parts(body)
        for part in parts:
            self._answer(request, OK, part)
        self._finish_request(request, OK, last)

    def _finish_request(self, request: Request, code: int, body: Any) -> None:
        if request.done:
            return
        request.done = True
        if request.maybe & IN_A_LOG and NO_LEADER <= code <= RESTORING and request.op == OP_COMMAND:
            code, body = _unknown(body)
        if request in self._open:
            del self._open[request]
            self._open_count -= request.count or 1
            self._open_bytes -= len(request.body)
        if request.forward_id:
            self._forwarded.pop(request.forward_id, None)
            request.forward_id = 0
        self._answer(request, code, body)

    def _answer(self, request: Request, code: int, body: Any) -> None:
        if request.origin == FROM_CLIENT:
            self._reply(request.source, request.request_id, code, body)
        elif request.origin == FROM_PEER:
            self._answers.setdefault(request.source, []).append(ForwardReply(request.request_id, code, body))
        elif request.answer is not None:
            request.answer(code, body)

    def _reply(self, connection: int, request_id: int, code: int, body: Any) -> None:
        replies = self._out.replies.get(connection)
        if replies is None:
            self._out.replies[connection] = [[request_id, code, body]]
        else:
            replies.append([request_id, code, body])

    def _expire(self, now_us: int) -> None:
        for request in [request for request in self._open if request.deadline_us <= now_us]:
            if request.forward_id:
                # Its leader may be dead without our knowing: the next request asks around.
                known = self.leaders.get(request.uid)
                if known is not None and known[1] == request.sent_to:
                    del self.leaders[request.uid]
            self._finish_request(request, request.overdue_code(), "no answer before the deadline")
        for request_id, (deadline_us, answer) in list(self._rpcs.items()):
            if deadline_us <= now_us:
                del self._rpcs[request_id]
                answer(NO_LEADER, "no answer before the deadline")
        for name, requests in list(self._awaiting_feed.items()):
            requests[:] = [request for request in requests if not request.done]
            if not requests:
                del self._awaiting_feed[name]
        due = [row for row in self._delayed if row[0] <= now_us]
        if due:
            self._delayed = [row for row in self._delayed if row[0] > now_us]
            for _, action in due:
                action()

    def open_counts(self) -> dict[str, int]:
        """How much waits, by where: all zero in a worker from which nobody wants anything."""
        return {
            "open": self._open_count,
            "open_bytes": self._open_bytes,
            "parked": sum(len(requests) for requests in self._parked.values()),
            "checking": sum(len(requests) for requests in self._checking.values()),
            "awaiting_feed": sum(len(requests) for requests in self._awaiting_feed.values()),
            "forwarded": len(self._forwarded),
            "rpcs": len(self._rpcs),
            "upcalls": len(self._upcalls),
            "delayed": len(self._delayed),
        }

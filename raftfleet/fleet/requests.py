"""One request on its way through a node: who asked, what, until when, and whether it may have taken effect.

This module is pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raftfleet.core.codes import NO_LEADER, OUTCOME_UNKNOWN, UNANSWERED
from raftfleet.core.host_messages import OP_COMMAND, OP_QUERY

FROM_CLIENT = 0
FROM_PEER = 1
FROM_HOST = 2
FROM_RPC = 3
"""Another shard's call, which is answered with whatever the member here says: its asker knows what to make of it."""

ON_ITS_WAY = 1
"""It was handed to a member that may lead, and that has not answered."""
IN_A_LOG = 2
"""It was in the log of a leader that was deposed: whether it was committed is not known."""


class Request:
    """A command or query, or a run of them.

    Attributes:
        source: connection, instance or None.
        answer: only for the host's own requests, and other shards' calls.
        count: of the commands or queries of a run, as its sender said; 0: one, which is no run. A run goes its way as
            one request; only its answers may come in parts (:meth:`raftfleet.fleet.host_requests.run_parts`).
    """

    __slots__ = (
        "answer",
        "attempts",
        "body",
        "consistency",
        "count",
        "deadline_us",
        "done",
        "forward_id",
        "given_uid",
        "maybe",
        "name",
        "op",
        "origin",
        "request_id",
        "sent_to",
        "source",
        "uid",
    )

    def __init__(
        self,
        origin: int,
        source: int,
        request_id: int,
        op: int,
        name: str,
        uid: int,
        deadline_us: int,
        consistency: int,
        body: bytes,
        answer: Callable[[int, Any], None] | None = None,
        count: int = 0,
    ) -> None:
        self.origin = origin
        self.source = source
        self.request_id = request_id
        self.op = op
        self.name = name
        self.uid = uid
        self.given_uid = uid  # as the client knew it at its first attempt; 0: it did not
        self.deadline_us = deadline_us
        self.consistency = consistency
        self.body = body
        self.answer = answer
        self.count = count
        self.maybe = 0  # bits ON_ITS_WAY, IN_A_LOG: whether it may have reached a leader's log
        self.attempts = 0
        self.forward_id = 0  # of the one FORWARD of it that is under way; 0: none
        self.sent_to = 0  # the instance that it was last forwarded to
        self.done = False

    def overdue_code(self) -> int:
        """What a request that got no answer by its deadline is told: never more than is known."""
        if self.op == OP_QUERY:
            return UNANSWERED if self.maybe else NO_LEADER
        assert self.op == OP_COMMAND
        return OUTCOME_UNKNOWN if self.maybe else NO_LEADER

"""What the hosts of shards say to each other beside Raft itself: leader notices, forwarded requests, calls.

This module knows nothing of sockets or clocks. Like :mod:`raftfleet.core.messages`, every message is a NamedTuple whose
first field is its kind. Kinds 64 to 95; those of the managers begin at 96.
"""

from __future__ import annotations

from typing import Any, NamedTuple

INTRODUCE = 64
LEADERS = 65
FORWARD = 66
FORWARD_ANSWER = 67
RPC = 68
RPC_ANSWER = 69

OP_COMMAND = 1
"""``ForwardRequest.op``: the body is a packed command."""
OP_QUERY = 2
"""``ForwardRequest.op``: the body is a packed argument."""


class Introduce(NamedTuple):
    """The first message on a new link: how to reach the sender. ``endpoint``: ``tcp://host:port``."""

    kind: int
    node: str
    endpoint: str
    public_key: str


class Leadership(NamedTuple):
    """One leader notice. ``instance`` 0: the group has no leader that the sender knows of."""

    uid: int
    term: int
    instance: int


class Leaders(NamedTuple):
    """Leaders that have committed an entry in their own term, batched."""

    kind: int
    leaders: list[Leadership]


class ForwardRequest(NamedTuple):
    """One client's request on its way to the leader's shard. ``consistency``: 0 linearizable, 1 stale.

    ``count`` is above 0 where ``body`` is a run of so many commands, or a packed list of so many queries' arguments.
    """

    request_id: int
    op: int
    uid: int
    timeout_ms: int
    consistency: int
    count: int  # type: ignore[assignment]
    body: bytes


class Forward(NamedTuple):
    """Requests of many clients in one message, so that a leader sees few large frames."""

    kind: int
    requests: list[ForwardRequest]


class ForwardReply(NamedTuple):
    """``code`` and ``body`` as in the client protocol, or one that only hosts say (:mod:`raftfleet.core.codes`).

    A run may be answered in parts: OK with ``[offset, left, results]``, the last of them with ``left`` 0.
    """

    request_id: int
    code: int
    body: Any


class ForwardAnswer(NamedTuple):
    """Answers to forwarded requests, batched."""

    kind: int
    replies: list[ForwardReply]


class Rpc(NamedTuple):
    """A call from shard to shard that is none of the above."""

    kind: int
    request_id: int
    method: str
    args: dict[str, Any]


class RpcAnswer(NamedTuple):
    """The answer to an :class:`Rpc` of the same ``request_id``."""

    kind: int
    request_id: int
    code: int
    body: Any


MESSAGE_TYPES: dict[int, type] = {
    INTRODUCE: Introduce,
    LEADERS: Leaders,
    FORWARD: Forward,
    FORWARD_ANSWER: ForwardAnswer,
    RPC: Rpc,
    RPC_ANSWER: RpcAnswer,
}

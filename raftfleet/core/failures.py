"""What user code raised, as something that can be stored, replicated and told to a client.

This module knows nothing of Raft. Whatever a user's exception looks like, what comes out is equal on every replica and
can be packed.
"""

from __future__ import annotations

from typing import Any

import msgpack

from raftfleet.core.codes import COMMAND_FAILED, OVERLOADED
from raftfleet.core.sessions import NIL

RESULT_BYTES_MAX = 8 << 20
"""Largest packed result of a command or query: half of what a frame to a client may have, and every replica keeps the
results of commands until the client has acknowledged them."""

_pack = msgpack.Packer(use_bin_type=True).pack


class ResultTooLarge(Exception):
    """What user code returned is larger than :data:`RESULT_BYTES_MAX`."""


def pack_result(result: Any) -> bytes:
    """Pack what user code returned.

    Raises:
        ResultTooLarge: equal on every replica, so that a command with such a result changes no state anywhere.
        Exception: msgpack cannot carry it.
    """
    packed: bytes = _pack(result)
    if len(packed) > RESULT_BYTES_MAX:
        raise ResultTooLarge(f"the result has {len(packed)} bytes; a result has at most {RESULT_BYTES_MAX}")
    return packed


def describe(error: BaseException) -> list[str]:
    """``[type, message]`` of what user code raised, as text that always packs (its ``__str__`` may raise too)."""
    try:
        message = str(error)[:1000]
    except BaseException:
        message = "(its message cannot be read)"
    return [type(error).__name__, message.encode("utf-8", "backslashreplace").decode("utf-8")]


def failure_body(code: int, body: Any) -> Any:
    """What the client is told with a code other than OK; stored results are packed."""
    if code == COMMAND_FAILED:
        return msgpack.unpackb(body)
    if body is not NIL:
        return body
    if code == OVERLOADED:
        return "the group remembers session_count_max clients, or too many results of this one"
    return "the retry came too late to tell whether the first attempt was applied"

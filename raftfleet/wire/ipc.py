"""What a client and its node say to each other on a Unix stream socket: frames, requests, replies, codes.

This module knows nothing of sockets or clocks. A frame is

    ``u32 length, big-endian (of what follows) || msgpack array``

and the array holds requests (client to node) or replies (node to client), so that everything that is ready at one
moment goes out in one write. Requests, by kind::

    HELLO    [0, 0, protocol: int, client_id: bin 16]                       first on every connection
    COMMAND  [id, 1, name: str, uid: int, timeout_ms: int, command: bin]
    QUERY    [id, 2, name: str, uid: int, timeout_ms: int, consistency: int, arg: bin]
    CALL     [id, 3, method: str, args: map, timeout_ms: int]
    COMMAND_RUN  [id, 4, name: str, uid: int, timeout_ms: int, count: int, run: bin]
    QUERY_RUN    [id, 5, name: str, uid: int, timeout_ms: int, consistency: int, count: int, args: bin]

``command`` is msgpack ``[client_id: bin 16, seq, acked, issued_us, arg: bin]`` (:mod:`raftfleet.core.sessions`), and
``arg`` the user's argument, packed. ``uid``: the group's, as the client knew it at its first attempt; 0 if it did not.
``id`` is chosen by the client, above 0, and names the reply. A run is ``count`` commands or queries as one request: it
has ids from ``id`` on; ``run`` is a command whose argument is a list of arguments, ``args`` is msgpack
``[arg: bin, ...]``. It is answered as one, or, where its results are many bytes, in parts.

Replies are ``[id, code, body]``:

* OK: ``body`` is the packed result (bin) of a command or query, any value for a call, a map for HELLO.
* OK to a run: ``body = [offset, left, results: bin]``. ``results`` is msgpack: a list with, for each command or query
  from the one at ``offset`` on, its packed result (bin) or ``[code, body]``. ``left`` are still to come, in other
  replies with the same id.
* An error: a message (str), or what the code's comment in :mod:`raftfleet.core.codes` says.
* PUSH, with id 0: ``body = [topic, ...]``, only after a call that asked for it.

:func:`error_of` and :func:`code_of` turn codes into the exceptions of :mod:`raftfleet.errors` and back.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgpack

from raftfleet import errors

# The codes of replies belong to this protocol: its users say ipc.OK.
from raftfleet.core.codes import ALREADY_ADDED as ALREADY_ADDED
from raftfleet.core.codes import BAD_REQUEST as BAD_REQUEST
from raftfleet.core.codes import COMMAND_FAILED as COMMAND_FAILED
from raftfleet.core.codes import DISK_FULL as DISK_FULL
from raftfleet.core.codes import GROUP_CHANGED as GROUP_CHANGED
from raftfleet.core.codes import GROUP_NOT_FOUND as GROUP_NOT_FOUND
from raftfleet.core.codes import NO_ACTIVE_NODE as NO_ACTIVE_NODE
from raftfleet.core.codes import NO_LEADER as NO_LEADER
from raftfleet.core.codes import NOT_ACTIVE as NOT_ACTIVE
from raftfleet.core.codes import NOT_IMPORTABLE as NOT_IMPORTABLE
from raftfleet.core.codes import OK as OK
from raftfleet.core.codes import OUTCOME_UNKNOWN as OUTCOME_UNKNOWN
from raftfleet.core.codes import OVERLOADED as OVERLOADED
from raftfleet.core.codes import PUSH as PUSH
from raftfleet.core.codes import QUERY_FAILED as QUERY_FAILED
from raftfleet.core.codes import REFUSED as REFUSED
from raftfleet.core.codes import RESTORING as RESTORING
from raftfleet.core.codes import SESSION_EXPIRED as SESSION_EXPIRED
from raftfleet.core.codes import TOO_LARGE as TOO_LARGE
from raftfleet.core.codes import UNANSWERED as UNANSWERED
from raftfleet.core.sessions import RUN_COMMANDS_MAX
from raftfleet.wire.errors import WireError

PROTOCOL = 1
"""Version of this module's formats. A node refuses a client of another one at HELLO."""

CLIENT_ID_BYTES = 16

FRAME_BYTES_MAX = 16 << 20
"""Larger frames are refused before they are read. A single argument is limited further by its group's config."""

RECEIVE_BYTES = 64 << 10
"""Size of a receive buffer. Measured: 256 KiB doubles the latency (such blocks go back to the system each time)."""

ITEMS_MAX = 1 << 20
"""Longest array or map anywhere in a frame: msgpack reserves room for as many items as a header announces."""

# Kinds of requests.
HELLO = 0
COMMAND = 1
QUERY = 2
CALL = 3
COMMAND_RUN = 4
QUERY_RUN = 5

# Values of a query's ``consistency``.
LINEARIZABLE = 0
STALE = 1

EXCEPTIONS: dict[int, type[errors.RaftFleetError]] = {
    COMMAND_FAILED: errors.CommandFailed,
    QUERY_FAILED: errors.QueryFailed,
    NO_LEADER: errors.NoLeader,
    OVERLOADED: errors.Overloaded,
    GROUP_NOT_FOUND: errors.GroupNotFound,
    TOO_LARGE: errors.CommandTooLarge,
    ALREADY_ADDED: errors.AlreadyAdded,
    NO_ACTIVE_NODE: errors.NoActiveNode,
    NOT_IMPORTABLE: errors.StateMachineNotImportable,
    BAD_REQUEST: errors.Refused,
    NOT_ACTIVE: errors.NotActive,
    REFUSED: errors.Refused,
    UNANSWERED: errors.Unanswered,
    DISK_FULL: errors.DiskFull,
    RESTORING: errors.BeingRestored,
    OUTCOME_UNKNOWN: errors.OutcomeUnknown,
    SESSION_EXPIRED: errors.SessionExpired,
    GROUP_CHANGED: errors.OutcomeUnknown,
}
"""Code of a reply -> what the client raises."""

# The other way: the first code of a class stands for it, but for the two that share a class with a plainer one.
_CODES: dict[type[BaseException], int] = {
    **{exception: code for code, exception in reversed(EXCEPTIONS.items())},
    errors.Refused: REFUSED,
    errors.OutcomeUnknown: OUTCOME_UNKNOWN,
}

_LENGTH = struct.Struct(">I")
_HEADER_BYTES = _LENGTH.size
_PAIRS = (COMMAND_FAILED, QUERY_FAILED, NOT_IMPORTABLE)


def pack_frame(items: list[Any]) -> bytes:
    """One frame with these requests or replies.

    Raises:
        TypeError, ValueError: an item holds something that msgpack cannot carry.
        WireError: the frame would be larger than :data:`FRAME_BYTES_MAX`, so the other side would refuse it.
    """
    try:
        body: bytes = msgpack.packb(items)
    except OverflowError as error:
        raise ValueError(f"msgpack carries integers of 64 bits: {error}") from error
    if len(body) > FRAME_BYTES_MAX:
        raise WireError("oversize", f"a frame of {len(body)} bytes; the limit is {FRAME_BYTES_MAX}")
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Bytes in, as they come from the stream; whole frames out, each one a list of requests or replies.

    Every item of a frame is checked to be a non-empty list; its fields are the caller's to check
    (:func:`check_request`, :func:`check_reply`). After a WireError the stream has lost its place: close the connection.

    Args:
        frame_bytes_max: longer frames are refused as soon as their length is known.
    """

    __slots__ = ("_frame_bytes_max", "_needed_bytes", "_pending")

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._pending = bytearray()
        self._needed_bytes = 0  # how much `pending` must hold before there is anything to do

    @property
    def pending_bytes(self) -> int:
        """Bytes of an unfinished frame that are held back."""
        return len(self._pending)

    def feed(self, data: bytes | bytearray | memoryview) -> list[list[Any]]:
        """Take more bytes of the stream and return the frames that they complete, oldest first.

        ``data`` is not kept: a receive buffer can be used again at once.

        Raises:
            WireError: with reason ``oversize`` or ``garbage``, and no other exception, whatever the bytes.
        """
        pending = self._pending
        if pending:
            pending += data
            if len(pending) < self._needed_bytes:
                return []
            data = pending
        frames: list[list[Any]] = []
        start, end = 0, len(data)
        needed_bytes = _HEADER_BYTES
        while end - start >= _HEADER_BYTES:
            (length,) = _LENGTH.unpack_from(data, start)
            if length > self._frame_bytes_max:
                raise WireError("oversize", f"a frame of {length} bytes; the limit is {self._frame_bytes_max}")
            stop = start + _HEADER_BYTES + length
            if stop > end:
                needed_bytes = stop - start
                break
            frames.append(_decode(bytes(data[start + _HEADER_BYTES : stop])))
            start = stop
        self._needed_bytes = needed_bytes
        if start < end:
            self._pending = bytearray(data[start:])
        elif pending:
            self._pending = bytearray()
        return frames


def _decode(body: bytes) -> list[Any]:
    try:
        if len(body) <= ITEMS_MAX:  # then msgpack's own limit, the length of the frame, is the lower one
            frame = msgpack.unpackb(body)
        else:
            frame = msgpack.unpackb(body, max_array_len=ITEMS_MAX, max_map_len=ITEMS_MAX)
    # Everything that msgpack is known to raise on bad input: its own tree (which is partly ValueError), bad UTF-8
    # (ValueError), a timestamp out of range (ValueError, OverflowError), unhashable keys (TypeError), too deep or too
    # large announcements (RecursionError, MemoryError).
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError, msgpack.UnpackException) as error:
        raise WireError("garbage", f"not a msgpack frame: {type(error).__name__}") from error
    if type(frame) is not list:
        raise WireError("garbage", f"a frame is an array, not {type(frame).__name__}")
    for item in frame:
        if type(item) is not list or not item:
            raise WireError("garbage", "an item of a frame is a non-empty array")
    return frame


# Type of each field after the kind.
_REQUEST_FIELDS: dict[int, tuple[type, ...]] = {
    HELLO: (int, bytes),
    COMMAND: (str, int, int, bytes),
    QUERY: (str, int, int, int, bytes),
    CALL: (str, dict, int),
    COMMAND_RUN: (str, int, int, int, bytes),
    QUERY_RUN: (str, int, int, int, int, bytes),
}
_INT_MAX = (1 << 63) - 1
_TIMEOUT_MS_MAX = 1 << 40  # some thirty years: a caller's "for ever"


def check_request(item: list[Any]) -> list[Any]:
    """Return ``item``, an element of a frame, if it is a request whose fields have the right number, types and ranges.

    Raises:
        WireError: with reason ``request``; the message says what is wrong with which field.
    """
    # What comes most, by the shortest way.
    if len(item) == 7 and type(item[1]) is int and item[1] == COMMAND_RUN:
        request_id, _, name, uid, timeout_ms, count, run = item
        if (
            int is type(request_id) is type(uid) is type(timeout_ms) is type(count)
            and type(name) is str
            and type(run) is bytes
            and 0 < request_id
            and 0 <= timeout_ms <= _TIMEOUT_MS_MAX
            and 0 < count <= RUN_COMMANDS_MAX
            and not (request_id | uid) >> 63
        ):
            return item
    elif len(item) == 6 and type(item[1]) is int and item[1] == COMMAND:
        request_id, _, name, uid, timeout_ms, command = item
        if (
            int is type(request_id) is type(uid) is type(timeout_ms)
            and type(name) is str
            and type(command) is bytes
            and 0 < request_id
            and 0 <= timeout_ms <= _TIMEOUT_MS_MAX
            and not (request_id | uid) >> 63
        ):
            return item
    fields = len(item) >= 2 and type(item[0]) is int and type(item[1]) is int and _REQUEST_FIELDS.get(item[1])
    if not fields:
        raise WireError("request", "a request begins with an id and a known kind")
    if len(item) != len(fields) + 2:
        raise WireError("request", f"kind {item[1]} has {len(fields)} fields, not {len(item) - 2}")
    if not 0 <= item[0] <= _INT_MAX or (item[0] == 0) is not (item[1] == HELLO):
        raise WireError("request", f"id {item[0]} of a request of kind {item[1]}")
    for position, (value, kind) in enumerate(zip(item[2:], fields, strict=True)):
        if type(value) is not kind:
            raise WireError("request", f"field {position} of kind {item[1]} is {kind.__name__}")
        if type(value) is int and not 0 <= value <= _INT_MAX:
            raise WireError("request", f"field {position} of kind {item[1]} is out of range")
    kind_number = item[1]
    if kind_number == HELLO:
        if len(item[3]) != CLIENT_ID_BYTES:
            raise WireError("request", f"a client id has {CLIENT_ID_BYTES} bytes")
        return item
    if kind_number in (COMMAND_RUN, QUERY_RUN) and not 0 < item[-2] <= RUN_COMMANDS_MAX:
        raise WireError("request", f"a run of {item[-2]}; it has 1 to {RUN_COMMANDS_MAX} commands or queries")
    if kind_number in (QUERY, QUERY_RUN) and item[5] not in (LINEARIZABLE, STALE):
        raise WireError("request", f"unknown consistency {item[5]}")
    if kind_number == CALL and not all(type(key) is str for key in item[3]):
        raise WireError("request", "names of arguments are str")
    if item[4] > _TIMEOUT_MS_MAX:
        raise WireError("request", f"a timeout of {item[4]} ms")
    return item


def check_reply(item: list[Any]) -> list[Any]:
    """Return ``item``, an element of a frame, if it is ``[id, code, body]``.

    Raises:
        WireError: with reason ``reply``.
    """
    if len(item) != 3 or type(item[0]) is not int or type(item[1]) is not int:
        raise WireError("reply", "a reply is [id, code, body]")
    return item


def error_of(code: int, body: object) -> errors.RaftFleetError:
    """The exception that a reply with this code (not OK, not PUSH) stands for.

    ``body`` may be what the code demands, or the same packed (results travel so), or missing: a body that makes no
    sense still gives an exception of the code's class.
    """
    if type(body) is bytes:
        try:
            body = msgpack.unpackb(body)
        except (ValueError, TypeError, OverflowError, RecursionError, MemoryError, msgpack.UnpackException):
            body = repr(body)
    exception = EXCEPTIONS.get(code)
    if exception is None:
        return errors.ProtocolError(f"a reply with the unknown code {code}: {body!r}")
    if code in _PAIRS:
        first, second = body if isinstance(body, list | tuple) and len(body) == 2 else ("", body)
        pair: Callable[[str, str], errors.RaftFleetError] = exception
        return pair(str(first), str(second or ""))
    return exception(None if body is None else str(body))


def code_of(error: errors.RaftFleetError) -> tuple[int, Any]:
    """The ``(code, body)`` that tells a client of ``error``: the inverse of :func:`error_of`.

    A class without a code of its own goes as the nearest class above it that has one, others as REFUSED if they are
    :class:`~raftfleet.errors.NotApplied` and as OUTCOME_UNKNOWN if not.
    """
    if isinstance(error, errors.UserCodeFailed):
        code = QUERY_FAILED if isinstance(error, errors.QueryFailed) else COMMAND_FAILED
        return code, [error.exception_type, error.exception_message]
    if isinstance(error, errors.StateMachineNotImportable):
        return NOT_IMPORTABLE, [error.node, error.reason]
    for exception in type(error).__mro__:
        known = _CODES.get(exception)
        if known is not None:
            return known, str(error)
    return (REFUSED if isinstance(error, errors.NotApplied) else OUTCOME_UNKNOWN), str(error)

"""A stream of bytes between two nodes: a greeting, then frames with their lengths before them.

This module knows nothing of sockets or clocks. Each side of a connection sends::

    greeting   01 00 22 00 || "raftfleet-tcp " || version: two digits || " " || instance: 16 hex digits
    frame      u32 length, big-endian (of what follows) || a frame of :mod:`raftfleet.wire.codec`

The side that connected greets first, the other one answers with its own greeting when it has understood, and nothing
else is sent before both have come. So neither sends frames to somebody who is no node.

The first four bytes make the greeting a message of ZMTP/1.0: an empty identity, and a frame of 34 bytes with one flag
byte. ZeroMQ without keys hands such a message to a node that speaks ZeroMQ at that port, and it can say what is wrong.
In the other direction ZMTP begins with ``FF``, which no greeting of ours does.
"""

from __future__ import annotations

import struct

from raftfleet.wire.errors import WireError

STREAM_PROTOCOL = 1
"""Version of this module's formats. Those of the frames' contents have a version of their own."""

LENGTH_BYTES = 4
GREETING_TEXT = b"raftfleet-tcp "
"""What a greeting is known by, from its fifth byte on."""

_MAGIC = b"\x01\x00\x22\x00" + GREETING_TEXT
GREETING_BYTES = len(_MAGIC) + 2 + 1 + 16
_ZMTP = 0xFF

_length = struct.Struct(">I")
pack_length = _length.pack
"""``length -> 4 bytes``."""


def pack_greeting(instance: int) -> bytes:
    """The greeting of ``instance``."""
    return _MAGIC + b"%02d %016x" % (STREAM_PROTOCOL, instance)


def read_greeting(data: bytes | bytearray | memoryview) -> int | None:
    """The instance that greets at the beginning of ``data``; None while too little has come.

    Raises:
        WireError: it is no greeting, and that is seen at the first byte that is wrong. The ``reason`` is ``"other
            transport"`` for ZeroMQ's, ``"other protocol"`` for a version that is not ours, else ``"not a node"``.
    """
    head = bytes(data[:GREETING_BYTES])
    if head[:1] == bytes([_ZMTP]):
        raise WireError("other transport", "it began as ZeroMQ does")
    magic = head[: len(_MAGIC)]
    if magic != _MAGIC[: len(magic)]:
        raise WireError("not a node", f"it began with {head[:16]!r}")
    if len(head) < GREETING_BYTES:
        return None
    version, _, instance = head[len(_MAGIC) :].partition(b" ")
    if version != b"%02d" % STREAM_PROTOCOL:
        raise WireError("other protocol", f"version {version!r} of the TCP stream; this is {STREAM_PROTOCOL}")
    if len(instance) != 16 or not set(instance) <= set(b"0123456789abcdef") or int(instance, 16) >> 63:
        raise WireError("not a node", f"it began with {head!r}")
    return int(instance, 16)


class StreamDecoder:
    """Cuts what comes after the greeting into frames.

    What lies here unfinished is never more than has come, whatever lengths are announced.

    Attributes:
        error: why nothing more can be read from this stream: ``"frame too large"``, as soon as its length has come.
    """

    __slots__ = ("_limit", "_needed_bytes", "_pending", "error")

    def __init__(self, frame_bytes_max: int) -> None:
        self.error: WireError | None = None
        self._limit = frame_bytes_max
        self._pending = bytearray()
        self._needed_bytes = LENGTH_BYTES  # 0 <= len(_pending) < _needed_bytes between two calls

    @property
    def pending_bytes(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return len(self._pending)

    def feed(self, data: memoryview) -> list[memoryview]:
        """The frames that ``data`` completes, in order. They are good until ``data`` is changed. Then see ``error``."""
        if self._pending:
            self._pending += data
            if len(self._pending) < self._needed_bytes:
                return []
            data = memoryview(self._pending)
            self._pending = bytearray()
        size_bytes = len(data)
        if size_bytes >= LENGTH_BYTES and _length.unpack_from(data)[0] == size_bytes - LENGTH_BYTES <= self._limit:
            return [data[LENGTH_BYTES:]]  # one frame, as nearly always
        frames: list[memoryview] = []
        start = 0
        while True:
            needed_bytes = LENGTH_BYTES
            if size_bytes - start >= LENGTH_BYTES:
                (length,) = _length.unpack_from(data, start)
                if length > self._limit:
                    self.error = WireError("frame too large", f"{length} bytes; the limit is {self._limit}")
                    return frames
                needed_bytes += length
            if size_bytes - start < needed_bytes:
                break
            frames.append(data[start + LENGTH_BYTES : start + needed_bytes])
            start += needed_bytes
            if start == size_bytes:
                return frames
        self._pending += data[start:]
        self._needed_bytes = needed_bytes
        return frames

"""A snapshot that arrives: what has come of it, and where that is kept.

This module knows nothing of messages. Rules:

* It is known again by index, term, size and CRC: chunks of anything else are never put together with it. Whoever sends
  the same bytes goes on where another stopped, be it another leader or the same one in another life.
* It counts only if the CRC of what came is the one that was promised.
* What is small stays in memory. With a disk, what is large goes into a file as it comes (``Shard.arrival``), and the
  buffer here holds only what is not written yet: no more than the sender's window.
* One that came to nothing (no room, a ``load`` that raises) is not begun again before ``RETRY_US``.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from raftfleet.core.member import Member


class Arrival(Protocol):
    """A file that a large snapshot is written to while it arrives. A crash leaves nothing of it."""

    size_bytes: int
    """Written so far."""

    def read(self) -> bytes:
        """All that was written.

        Raises:
            OSError: it cannot be read.
        """

    def discard(self) -> None:
        """It is not wanted any more. Safe to call twice, and after it became a snapshot: then it does nothing."""


class Key(NamedTuple):
    """What tells one snapshot from another."""

    index: int  # type: ignore[assignment]
    term: int
    size_bytes: int
    crc: int


class Incoming:
    """A snapshot as far as it has come.

    Attributes:
        received: bytes without a gap.
        buffer: those of them that are not in ``file``: all, if there is none.
        failed_us: when it came to nothing; 0: it goes on.
    """

    __slots__ = ("buffer", "crc", "failed_us", "file", "index", "key", "received")

    def __init__(self, key: Key, file: Arrival | None) -> None:
        self.key = key
        self.index = key.index
        self.file = file
        self.received = 0
        self.crc = 0
        self.buffer = bytearray()
        self.failed_us = 0

    @property
    def is_complete(self) -> bool:
        """Whether all of it is here."""
        return self.received == self.key.size_bytes

    @property
    def is_whole(self) -> bool:
        """Whether all of it is here and is what was sent."""
        return self.is_complete and self.crc == self.key.crc

    def take(self, data: bytes) -> None:
        """The next bytes."""
        self.buffer += data
        self.received += len(data)
        self.crc = zlib.crc32(data, self.crc)

    def take_buffer(self) -> bytes:
        """What is to be written next; it is the caller's now."""
        data = bytes(self.buffer)
        self.buffer = bytearray()
        return data

    def data_unwritten(self) -> bytes:
        """What is not in the file, to be written until that succeeds."""
        return bytes(self.buffer)

    def data(self) -> bytes:
        """All that has come.

        Raises:
            OSError: the file cannot be read.
        """
        if self.file is None or not self.file.size_bytes:
            return bytes(self.buffer)
        return self.file.read() + self.buffer

    def fail(self, now_us: int) -> None:
        """It came to nothing: only that is remembered of it."""
        self.discard()
        self.failed_us = now_us
        self.buffer = bytearray()
        self.received = self.crc = 0

    def discard(self) -> None:
        """It is not wanted any more."""
        if self.file is not None:
            self.file.discard()
            self.file = None


def drop_incoming(member: Member) -> None:
    """Whatever of a snapshot has come to ``member`` is not wanted any more."""
    if member.incoming is not None:
        member.incoming.discard()
        member.incoming = None

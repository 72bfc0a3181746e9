"""What a leader knows of one other member.

This module knows nothing of messages. Always ``0 <= match < next``; ``match`` is proven, ``next`` is hoped for.

* PROBE: one append at a time, until the point where the logs agree is found.
* REPLICATE: appends go out as entries come, up to a window; ``next`` runs ahead of ``match``.
* SNAPSHOT: what the member needs is compacted away; chunks go out instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raftfleet.core.sending import Source

PROBE = 0
REPLICATE = 1
SNAPSHOT = 2

APPENDS_IN_FLIGHT_MAX = 64
APPEND_BYTES_MAX = 1 << 20
"""Entries of one append stop at this size (but one entry always goes)."""

CHUNK_BYTES = 256 << 10
CHUNKS_IN_FLIGHT_MAX = 4


class Transfer:
    """A snapshot on its way to one member: ``acked <= sent <= source.size_bytes``."""

    __slots__ = ("acked", "acked_stamp", "crc", "crc_bytes", "index", "is_probing", "sent", "source", "term")

    def __init__(self, source: Source) -> None:
        self.source = source
        self.index = source.index
        self.term = source.term
        self.acked = 0
        self.acked_stamp = 0  # of the chunk whose answer moved ``acked``
        self.sent = 0
        self.is_probing = False  # what was sent is lost, or its receiver is busy: one chunk at a time
        self.crc = 0  # of the first ``crc_bytes``, as they were read
        self.crc_bytes = 0


class Progress:
    """The leader's view of one voter or learner."""

    __slots__ = (
        "ack_stamp",
        "caught_up",
        "in_flight",
        "is_lost",
        "known_commit",
        "led",
        "led_seq",
        "life",
        "match",
        "next",
        "paused",
        "sent_stamp",
        "state",
        "told_commit",
        "told_stamp",
        "transfer",
    )

    def __init__(self, next_index: int, life: int) -> None:
        self.match = 0
        self.next = next_index
        self.state = PROBE
        self.life = life
        self.paused = False  # PROBE: an append is out
        self.in_flight = 0  # REPLICATE: appends out
        self.sent_stamp = 0  # of the newest append or chunk
        self.ack_stamp = 0  # of the newest append that was answered in this term
        self.told_commit = 0  # newest commit index sent
        self.told_stamp = 0  # of the first append that carried it
        self.known_commit = 0  # newest commit index that an answered append carried
        self.led = False  # counted in the link's digest
        self.led_seq = 0
        self.is_lost = False  # its disk lost what this life knew: it is to be removed
        self.caught_up = False  # a learner was reported as ready to be promoted
        self.transfer: Transfer | None = None

    def to_probe(self) -> None:
        """Start again from what is proven."""
        self.state = PROBE
        self.next = self.match + 1
        self.paused = False
        self.in_flight = 0
        self.transfer = None

    def to_replicate(self) -> None:
        """The logs agree up to ``match``."""
        self.state = REPLICATE
        self.next = self.match + 1
        self.in_flight = 0
        self.paused = False
        self.transfer = None

    def to_snapshot(self, transfer: Transfer) -> None:
        """Send chunks until the member has the snapshot."""
        self.state = SNAPSHOT
        self.transfer = transfer
        self.paused = False
        self.in_flight = 0

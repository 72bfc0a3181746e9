"""The leader's side of a snapshot on its way to a member that lacks the log.

This module knows nothing of files or processes: the bytes come from a :class:`Source`, which the shard finds
(``Shard.snapshot_source``), read a chunk at a time.

Rules:

* What is small is dumped here and now. What may be large is made elsewhere (a forked child) or lies on the disk; until
  it is there, whoever needs it is asked once per beat whether it follows, by an append that brings nothing. So it goes
  on counting for this leader's quorum, and everything else is served.
* A snapshot is fit while the log goes on from it. For its sake the log is kept from the moment when it is asked for,
  within ``LOG_BYTES_HELD_MAX`` and ``HOLD_US`` (:mod:`raftfleet.core.apply`): else a busy group's transfer would never
  be of use.
* Chunks go out as the window allows. An answered beat proves what was sent before it to be lost, or its receiver to be
  busy: then one chunk at a time, until an answer tells where the receiver stands.
* The receiver's word counts, backwards too: it may have lost what it had, and it may have more of it than this leader
  ever sent (a former leader did, and the bytes are the same).
* The bytes are checked against the snapshot's CRC as they are read. The last chunk of what does not agree never leaves.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Protocol

from raftfleet.core.failures import describe
from raftfleet.core.messages import APPEND, SNAPSHOT, Append, Snapshot
from raftfleet.core.progress import CHUNKS_IN_FLIGHT_MAX, Transfer
from raftfleet.core.progress import SNAPSHOT as SENDING_SNAPSHOT

if TYPE_CHECKING:
    from raftfleet.core.leading import Leading
    from raftfleet.core.member import Member
    from raftfleet.core.progress import Progress

INLINE_BYTES_MAX = 256 << 10
"""States that are likely to be at most this are dumped, written and taken in by the loop: about a millisecond."""
HOLD_US = 30_000_000
"""How long the log is kept for a receiver that says nothing: it may be busy taking the state over."""
RETRY_US = 10_000_000
"""A snapshot that came to nothing, here or there, is tried again after this: it costs seconds of somebody's work."""


class Source(Protocol):
    """A snapshot's bytes, which do not change. Whoever holds it can read it, whatever becomes of its file's name.

    Attributes:
        index, term: of the last entry that it contains.
        crc: CRC-32 of all of it.
    """

    index: int
    term: int
    size_bytes: int
    crc: int

    def read(self, offset: int, count: int) -> bytes:
        """Exactly ``count`` bytes.

        Raises:
            OSError: they are not there any more.
        """


class BytesSource:
    """A small one, in memory."""

    def __init__(self, index: int, term: int, data: bytes) -> None:
        self.index = index
        self.term = term
        self.size_bytes = len(data)
        self.crc = zlib.crc32(data)
        self._data = data

    def read(self, offset: int, count: int) -> bytes:
        """See :class:`Source`."""
        return self._data[offset : offset + count]


def start_snapshot(member: Member, peer: int, progress: Progress) -> None:
    """``peer`` needs what is compacted away: send it a snapshot, as soon as there is a fit one."""
    lead = member.lead
    assert lead is not None
    source = lead.snapshot
    if source is None or source.index < member.log.snapshot_index:
        _hold_log(member, lead, member.applied)
        source = lead.snapshot = member.shard.snapshot_source(member)
    if source is None:
        _wait_for_snapshot(member, peer, progress)
        return
    _hold_log(member, lead, source.index)
    progress.to_snapshot(Transfer(source))
    send_chunks(member, peer, progress)


def _hold_log(member: Member, lead: Leading, index: int) -> None:
    """Keep the log after ``index``, or after what it is kept from already for somebody who waits."""
    now_us = member.shard.now_us
    is_held = lead.hold_index and now_us < lead.hold_until_us
    lead.hold_index = min(index, lead.hold_index) if is_held else index
    lead.hold_until_us = now_us + HOLD_US


def _wait_for_snapshot(member: Member, peer: int, progress: Progress) -> None:
    """Nothing can be sent to ``peer`` yet but the question whether it follows, again with every beat."""
    log = member.log
    shard = member.shard
    progress.to_probe()
    prev, prev_term = log.snapshot_index, log.snapshot_term
    shard.send(
        peer, Append(APPEND, member.uid, member.term, prev, prev_term, member.commit, shard.stamp, progress.life, [])
    )
    progress.paused = True
    progress.sent_stamp = shard.stamp


def send_chunks(member: Member, peer: int, progress: Progress) -> None:
    """Send ``peer`` the next chunks, as far as the window allows."""
    transfer = progress.transfer
    assert transfer is not None
    lead = member.lead
    assert lead is not None
    lead.hold_until_us = member.shard.now_us + HOLD_US
    stamp = member.shard.stamp
    source = transfer.source
    total = source.size_bytes
    chunk_bytes = member.shard.settings.chunk_bytes
    window = chunk_bytes if transfer.is_probing else CHUNKS_IN_FLIGHT_MAX * chunk_bytes
    while transfer.sent < total and transfer.sent - transfer.acked < window:
        try:
            data = _read(transfer, min(chunk_bytes, total - transfer.sent))
        except OSError as error:
            _give_up(member, peer, progress, error)
            return
        member.shard.send(
            peer,
            Snapshot(
                SNAPSHOT,
                member.uid,
                member.term,
                transfer.index,
                transfer.term,
                transfer.sent,
                total,
                stamp,
                progress.life,
                data,
                source.crc,
            ),
        )
        transfer.sent += len(data)
        progress.sent_stamp = stamp


def _read(transfer: Transfer, count: int) -> bytes:
    """The next chunk. What was skipped, because the receiver has it already, is not checked again."""
    source = transfer.source
    data = source.read(transfer.sent, count)
    if len(data) != count:
        raise OSError(f"it ends at {transfer.sent + len(data)}, not at {source.size_bytes}")
    if transfer.sent == transfer.crc_bytes:
        transfer.crc = zlib.crc32(data, transfer.crc)
        transfer.crc_bytes += count
        if transfer.crc_bytes == source.size_bytes and transfer.crc != source.crc:
            raise OSError(f"its CRC is {transfer.crc:08x}, not {source.crc:08x}")
    return data


def _give_up(member: Member, peer: int, progress: Progress, error: OSError) -> None:
    """The snapshot is damaged: nobody gets the end of it, and another is looked for with the next beat."""
    lead = member.lead
    transfer = progress.transfer
    assert lead is not None and transfer is not None
    member.shard.event("snapshot_failed", member.uid, ": ".join(describe(error)))
    if lead.snapshot is transfer.source:
        lead.snapshot = None
    member.shard.source_failed(member, transfer.source)
    _wait_for_snapshot(member, peer, progress)


def on_progress(member: Member, peer: int, progress: Progress, next_offset: int, stamp: int) -> None:
    """The receiver of a transfer says how far it has come, of what was sent at ``stamp``."""
    transfer = progress.transfer
    assert transfer is not None
    if next_offset > transfer.acked:
        transfer.acked = min(next_offset, transfer.source.size_bytes)
        transfer.sent = max(transfer.sent, transfer.acked)
        transfer.acked_stamp = max(stamp, transfer.acked_stamp)
        transfer.is_probing = False
    elif next_offset < transfer.acked and stamp > transfer.acked_stamp:
        transfer.acked = transfer.sent = next_offset
        transfer.acked_stamp = stamp
    send_chunks(member, peer, progress)


def on_lost(member: Member, peer: int, progress: Progress) -> None:
    """A beat that left after the last chunk is answered, and that chunk is not."""
    transfer = progress.transfer
    assert transfer is not None
    transfer.sent = transfer.acked
    transfer.is_probing = True
    send_chunks(member, peer, progress)


def release(member: Member, lead: Leading) -> None:
    """Let go of a snapshot, and of the log behind it, that nobody needs, or nobody has asked for in ``HOLD_US``."""
    compacted = member.log.snapshot_index
    if member.shard.now_us >= lead.hold_until_us:
        for progress in lead.progress.values():
            if progress.state == SENDING_SNAPSHOT:
                progress.to_probe()
    elif any(p.state == SENDING_SNAPSHOT or p.next <= compacted for p in lead.progress.values()):
        return
    lead.snapshot = None
    lead.hold_index = 0

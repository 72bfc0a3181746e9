"""The writing half of the write-ahead log: segments, batches, one pwrite and one fdatasync per sync.

The bytes are described in :mod:`raftfleet.storage.records`. This module knows segments and batches, not what the
records mean.

Rules that recovery relies on:

* Batch n is written only after the fdatasync of batch n - 1 has returned.
* A segment's name and its preallocated zeros are durable before its first batch is written; the header goes with that
  batch, in the same write. So rolling over costs no extra fsync as long as a spare segment was prepared beforehand.
* Segments are removed oldest first, each removal durable before the next, so that what is left has no holes.
* After ENOSPC the same batch, perhaps longer, is written again at the same place or in the next segment.
* After any other failure of a write, and any failure of an fsync, nothing is written any more (DESIGN 5.14).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from raftfleet.storage.base import DiskState, StorageFull, StoragePoisoned
from raftfleet.storage.files import Files
from raftfleet.storage.records import DATA_START, FORMAT, SegmentHeader, mark_length, pack_header, pack_mark

SEGMENT_BYTES = 64 << 20
"""Large enough that making one is rare (a few per second at full disk speed), small enough to free space in steps."""
BATCH_BYTES_MAX = 1 << 30
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Segment:
    """A segment in use. Batches ``[first_batch, last_batch]``; ``end``: where the next would go.

    ``pins``: uid of each group with a record here -> the highest index of its entries here (0: none).
    """

    sequence: int
    first_batch: int
    last_batch: int
    size_bytes: int
    end: int
    pins: dict[int, int]


def segment_name(sequence: int) -> str:
    """File name of a segment."""
    return f"{sequence:016x}.wal"


def segment_sequence(name: str) -> int | None:
    """The inverse of :func:`segment_name`; None for any other name."""
    stem, dot, suffix = name.partition(".")
    if suffix != "wal" or len(stem) != 16:
        return None
    try:
        return int(stem, 16)
    except ValueError:
        return None


class Wal:
    """Appends batches. ``segments`` are those in use, oldest first; the last takes the next batch if it fits."""

    def __init__(
        self, files: Files, path: str, *, instance: int, node: bytes, fleet: bytes, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self.files = files
        self.path = path
        self.instance = instance
        self.node = node
        self.fleet = fleet
        self.segment_bytes = segment_bytes
        self.segments: list[Segment] = []
        self.next_batch = 1
        self.last_sequence = 0
        self.state = DiskState.OK
        self.why = ""
        self.pending: list[bytes] = []
        self.pending_bytes = 0
        self.pending_pins: dict[int, int] = {}
        self._handle = -1  # of the segment in use
        self._spare: tuple[int, int, int] | None = None  # handle, sequence, size of a segment that waits to be used

    # ------------------------------------------------------------------ what recovery found

    def adopt(self, segments: list[Segment], next_batch: int, spares: list[int]) -> int:
        """Go on after recovery: these segments, the last of them in use. ``spares``: empty segments after them.

        Returns how many bytes were blanked of a first write into a spare that was torn.
        """
        self.segments = segments
        self.next_batch = next_batch
        self.last_sequence = segments[-1].sequence if segments else 0
        if segments:
            self._handle = self.guard(self.files.open, self._path_of(segments[-1].sequence))
        if spares:
            for sequence in spares[1:]:
                self.guard(self.files.unlink, self._path_of(sequence))
            return self._adopt_spare(spares[0])
        return 0

    def _adopt_spare(self, sequence: int) -> int:
        """A segment with no batch in it: blank whatever a torn write left there."""
        handle = self.guard(self.files.open, self._path_of(sequence))
        size = self.files.size(handle)
        torn_bytes = len(self.guard(self.files.pread, handle, size, 0).rstrip(b"\0"))
        self.blank(handle, 0, torn_bytes)
        self.last_sequence = max(self.last_sequence, sequence)
        self._spare = (handle, sequence, size)
        return torn_bytes

    def cut(self, end: int) -> None:
        """Blank everything between the end of the log and ``end`` in the segment in use: a torn tail."""
        self.blank(self._handle, self.segments[-1].end, end)

    def blank(self, handle: int, start: int, end: int) -> None:
        """Overwrite ``[start, end)`` with zeros, durably. The space is allocated, so this needs none."""
        step = 1 << 20
        if start >= end:
            return
        for offset in range(start, end, step):
            self.write(handle, bytes(min(step, end - offset)), offset)
        self.guard(self.files.fdatasync, handle)

    def rewrite(self, start: int, end: int) -> None:
        """Write ``[start, end)`` of the segment in use again as it is, durably.

        After a failed fsync the kernel may show pages that never reached the disk, and count them as clean. The last
        batch read back may be of that kind; only writing it again makes it what it seems to be.
        """
        if start < end:
            data = self.guard(self.files.pread, self._handle, end - start, start)
            self.write(self._handle, data, start)
            self.guard(self.files.fdatasync, self._handle)

    # ------------------------------------------------------------------ batches

    def add(self, record: bytes) -> None:
        """Collect a record for the next batch."""
        self.pending.append(record)
        self.pending_bytes += len(record)

    def sync(self) -> None:
        """Write what was collected as one batch, even if it is nothing (a mark alone proves the batch before it).

        Raises:
            StorageFull: no space; the batch stays collected.
            StoragePoisoned: final.
        """
        if self.state is DiskState.POISONED:
            raise StoragePoisoned(self.why)
        pending = self.pending
        total = self.pending_bytes + mark_length(len(pending))
        if total > BATCH_BYTES_MAX:
            self.poison(f"a batch of {total} bytes is more than the {BATCH_BYTES_MAX} that fit a segment")
            raise StoragePoisoned(self.why)
        try:
            current = self.segments[-1] if self.segments else None
            if current is None or current.end + total > current.size_bytes:
                self._roll(total)
            else:
                self._write_batch(self._handle, current.sequence, current.end, b"")
                current.end += total
                current.last_batch = self.next_batch
        except StorageFull:
            self.state = DiskState.FULL
            raise
        if self.state is DiskState.FULL:
            self.state = DiskState.LOW
        pins = self.segments[-1].pins
        for uid, index in self.pending_pins.items():
            if index >= pins.get(uid, 0):
                pins[uid] = index
        self.pending = []
        self.pending_bytes = 0
        self.pending_pins = {}
        self.next_batch += 1

    def _write_batch(self, handle: int, sequence: int, start: int, header: bytes) -> None:
        pending = self.pending
        mark_at = start + self.pending_bytes
        mark = pack_mark(self.next_batch, sequence, self.instance, start, mark_at, pending)
        self.write(handle, b"".join([header, *pending, mark]), start - len(header))
        try:
            self.files.fdatasync(handle)
        except OSError as error:
            self.poison(f"fdatasync of segment {segment_name(sequence)} failed: {error}")
            raise StoragePoisoned(self.why) from error

    def _roll(self, total: int) -> None:
        """Begin the next segment with this batch."""
        self.prepare(DATA_START + total)
        assert self._spare is not None
        handle, sequence, size = self._spare
        header = SegmentHeader(FORMAT, self.instance, sequence, self.next_batch, self.fleet, self.node)
        self._write_batch(handle, sequence, DATA_START, pack_header(header))
        if self._handle >= 0:
            self.files.close(self._handle)
        self._handle = handle
        self._spare = None
        end = DATA_START + total
        self.segments.append(Segment(sequence, self.next_batch, self.next_batch, size, end, {}))

    # ------------------------------------------------------------------ segments

    @property
    def wants_spare(self) -> bool:
        """Whether the segment in use is half full and there is none to follow it."""
        if self._spare is not None or not self.segments:
            return False
        current = self.segments[-1]
        return current.end * 2 > current.size_bytes

    def prepare(self, size_min: int = 0) -> None:
        """Make sure that there is a spare segment of at least ``size_min`` bytes, with its name durable.

        Raises:
            StorageFull: there is no room for it.
            StoragePoisoned: final.
        """
        size = max(self.segment_bytes, size_min)
        spare = self._spare
        if spare is not None and spare[2] >= size_min:
            return
        if spare is not None:
            self.guard(self.files.fallocate, spare[0], size)
            self.guard(self.files.fdatasync, spare[0])
            self._spare = (spare[0], spare[1], size)
            return
        sequence = self.last_sequence + 1
        path = self._path_of(sequence)
        handle = self.guard(self.files.open, path, create=True)
        try:
            self.guard(self.files.fallocate, handle, size)
        except StorageFull:
            self.files.close(handle)
            self.guard(self.files.unlink, path)
            raise
        self.guard(self.files.fdatasync, handle)
        self.guard(self.files.sync_dir, self.path)
        self.last_sequence = sequence
        self._spare = (handle, sequence, size)

    def try_space(self) -> None:
        """After FULL: see whether a segment can be had again; if so the next sync may be tried.

        Raises:
            StorageFull: still not.
        """
        if self.state is DiskState.FULL:
            self.prepare(DATA_START + self.pending_bytes + mark_length(len(self.pending)))
            self.state = DiskState.OK

    def drop_oldest(self) -> None:
        """Remove the oldest segment, durably."""
        oldest = self.segments[0]
        assert len(self.segments) > 1, "the segment in use stays"
        self.guard(self.files.unlink, self._path_of(oldest.sequence))
        self.guard(self.files.sync_dir, self.path)
        del self.segments[0]

    def read(self, segment: Segment, offset: int, count: int) -> bytes:
        """Bytes of a segment that is in use."""
        handle = self.guard(self.files.open, self._path_of(segment.sequence), write=False)
        try:
            return self.guard(self.files.pread, handle, min(count, segment.end - offset), offset)
        finally:
            self.files.close(handle)

    def close(self) -> None:
        """Close the files."""
        if self._handle >= 0:
            self.files.close(self._handle)
            self._handle = -1
        if self._spare is not None:
            self.files.close(self._spare[0])
            self._spare = None

    def _path_of(self, sequence: int) -> str:
        return f"{self.path}/{segment_name(sequence)}"

    # ------------------------------------------------------------------ failures

    def poison(self, why: str) -> None:
        """From now on nothing is written. The first reason stays."""
        if self.state is not DiskState.POISONED:
            self.state = DiskState.POISONED
            self.why = why

    def write(self, handle: int, data: bytes, offset: int) -> None:
        """All of ``data``; a short write goes on until it is done or the kernel says why not."""
        view = memoryview(data)
        while view:
            done = self.guard(self.files.pwrite, handle, view, offset)
            if done == len(view):
                return
            if done <= 0:
                self.poison(f"a write of {len(view)} bytes took {done}")
                raise StoragePoisoned(self.why)
            view = view[done:]
            offset += done

    def guard(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """A file call whose failure is StorageFull (space, and not from an fsync) or else final."""
        if self.state is DiskState.POISONED:
            raise StoragePoisoned(self.why)
        try:
            return call(*args, **options)
        except OSError as error:
            if error.errno in NO_SPACE and call not in (self.files.fdatasync, self.files.sync_dir):
                raise StorageFull(f"no space left in {self.path}: {error}") from error
            self.poison(f"{getattr(call, '__name__', 'call')} in {self.path} failed: {error}")
            raise StoragePoisoned(self.why) from error

"""From what lies in a directory to members: replays the log's batches and judges what cannot be read.

Judgement (the reasons are in :mod:`raftfleet.storage.records`): a bad record of the very last batch belongs to a sync
that never returned, so that batch is cut. Anything bad below is damage, charged to the group that owns it where that is
known, and to every group that existed by then where it is not. Nothing here writes.

Replay rules. ENTRIES at index i replace what is there from i on, copies included. FORWARD only fills in below what is
there: it is a copy of entries that were in force when it was made, and stands after entries that follow them. RESET
empties the log. FORGET and TOMBSTONE end the member. A group may have records before its GROUP record is seen, when the
segment with the first such record was freed after the record was written forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raftfleet.core.messages import Entry
from raftfleet.storage.base import Damage, RecoveredGroup, SnapshotInfo, StorageTooNew, Tombstone
from raftfleet.storage.records import (
    ENTRIES,
    FORGET,
    FORWARD,
    GROUP,
    KIND_NAMES,
    NOTE,
    RESET,
    SHARD_UID,
    TOMBSTONE,
    VOTE,
    Record,
    unpack_entries,
    unpack_facts,
    unpack_group,
    unpack_life,
    unpack_note,
)
from raftfleet.storage.scan import Batch, Lost, Tail, scan_segment
from raftfleet.storage.wal import Segment, segment_name


@dataclass
class Replayed:
    """One group while its records are read. Batch numbers say where the newest record of a kind is."""

    uid: int
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    first_voters: tuple[int, ...] | None = None
    facts: Any = None
    generation_min: int = 0
    record_batch: int = 0
    vote_batch: int = 0
    began: tuple[int, int] = (0, 0)
    life: int = -1
    term: int = 0
    vote: int = 0
    base: int = 0  # index of the first entry, 0 while there was none
    entries: list[Entry] = field(default_factory=list)
    early: dict[int, Entry] = field(default_factory=dict)
    doubts: list[tuple[str, str]] = field(default_factory=list)
    gap: tuple[str, str] | None = None
    truncations: list[tuple[int, int, int]] = field(default_factory=list)  # (batch, ordinal, first index replaced)

    def append(self, first: int, entries: list[Entry], where: str, place: tuple[int, int]) -> None:
        """ENTRIES."""
        if not self.base:
            self.base = first
        end = self.base + len(self.entries)
        if first < end or (self.early and first <= max(self.early)):
            self.truncations.append((*place, first))
        if first > end:
            self.gap = (where, f"entries {end} to {first - 1} are missing before it")
            self.base = first
            self.entries = list(entries)
            return
        if first < self.base:
            self.base = first
            self.entries = list(entries)
        else:
            self.entries[first - self.base :] = entries
        if self.early:
            self.early = {index: entry for index, entry in self.early.items() if index < first}

    def forward(self, first: int, entries: list[Entry]) -> None:
        """FORWARD."""
        stop = self.base or first + len(entries)
        early = self.early
        for offset, entry in enumerate(entries):
            if first + offset < stop:
                early[first + offset] = entry

    def reset(self, index: int) -> None:
        """RESET."""
        self.base = index + 1
        self.entries = []
        self.early = {}
        self.truncations = []
        self.gap = None

    def settle(self) -> None:
        """Join what was copied forward to what follows it."""
        early = self.early
        if early and not self.base:
            self.base = max(early) + 1
        while self.base - 1 in early:
            first = self.base - 1
            run = []
            while first in early:
                run.append(early.pop(first))
                first -= 1
            run.reverse()
            self.entries[:0] = run
            self.base = first + 1
        self.early = {}
        if not self.base:
            self.base = 1


class Replay:
    """Takes segments in order, then snapshots; gives groups, tombstones, notes and what is damaged.

    ``keep_data`` False: entries are checked but come back without kind and data, for whoever only judges.
    """

    def __init__(self, instance: int, *, keep_data: bool = True) -> None:
        self.instance = instance
        self._unpack = unpack_entries if keep_data else _bare_entries
        self.groups: dict[int, Replayed] = {}
        self.tombstones: dict[int, tuple[Tombstone, int]] = {}
        self.notes: dict[str, tuple[bytes, int]] = {}
        self.segments: list[Segment] = []
        self.damaged: list[Damage] = []
        self.next_batch = 0
        self.last_batch: tuple[int, int] = (0, 0)  # start and end of the last whole batch in the last segment
        self.cut_end = 0
        self.cut_bytes = 0
        self._held: tuple[str, Batch] | None = None  # the newest batch, not judged yet
        self._tail: tuple[str, Tail] | None = None

    # ------------------------------------------------------------------ segments

    def take_segment(self, data: bytes, sequence: int, first_batch: int, *, header_whole: bool = True) -> None:
        """Read a segment. ``first_batch`` 0: its header is lost. An unused segment is not to be given here."""
        name = segment_name(sequence)
        if not header_whole:
            self._harmless(f"{name} at 0", "the segment's header is damaged")
        if first_batch:
            self._prove(name, first_batch, rolled=True)
        elif self.next_batch:
            first_batch = self.next_batch
        segment = Segment(sequence, first_batch, first_batch - 1, len(data), 0, {})
        self.segments.append(segment)
        for item in scan_segment(data, sequence, self.instance, first_batch):
            if isinstance(item, Batch):
                self._prove(name, item.number)
                self._held = (name, item)
                self.next_batch = item.number + 1
                segment.first_batch = segment.first_batch or item.number
                segment.last_batch = item.number
                self.last_batch = (item.start, item.end)
                segment.end = item.end
            elif isinstance(item, Lost):
                self._prove(name, item.stop)
                self._lost(f"{name} at {item.start}", item)
                self.next_batch = item.stop
                segment.end = item.end
            else:
                segment.end = item.start
                if not self.next_batch:
                    self.next_batch = item.number
                if segment.last_batch < segment.first_batch:
                    self.last_batch = (item.start, item.start)
                self._tail = (name, item)

    def _prove(self, name: str, number: int, *, rolled: bool = False) -> None:
        """Something numbered ``number`` was found: all batches below it were durable."""
        if self._held is not None and self._held[1].number < number:
            where, batch = self._held
            self._held = None
            self._apply(where, batch)
        tail = self._tail
        self._tail = None
        if tail is None or not self.next_batch:
            self.next_batch = self.next_batch or number
            return
        where, item = tail
        if number <= item.number:
            if item.end > item.start and rolled:
                self._harmless(f"{where} at {item.start}", "bytes after the end of the segment")
            return
        if item.batch is not None and number == item.number + 1:
            self._apply(where, item.batch)
        else:
            self._lost(f"{where} at {item.start}", Lost(item.number, number, item.start, item.end))
        self.next_batch = number

    def finish(self) -> None:
        """There are no more segments: the newest batch counts if it is whole; what is torn is to be cut."""
        if self._held is not None:
            where, batch = self._held
            self._held = None
            # A lost mark can be told only from a later batch, which would have proved this one.
            if batch.bad:
                self.next_batch = batch.number
                segment = self.segments[-1]
                segment.end = batch.start
                segment.last_batch = batch.number - 1
                self.last_batch = (batch.start, batch.start)
                self.cut_bytes += batch.end - batch.start
                self.cut_end = batch.end
            else:
                self._apply(where, batch)
        if self._tail is not None:
            _, item = self._tail
            self._tail = None
            self.cut_bytes += item.end - item.start
            self.cut_end = max(self.cut_end, item.end)
        for group in self.groups.values():
            group.settle()

    # ------------------------------------------------------------------ records

    def _apply(self, where: str, batch: Batch) -> None:
        if batch.mark_lost:
            self._harmless(f"{where} at {batch.end}", f"the mark of batch {batch.number} is damaged")
        bad = list(batch.bad)
        for ordinal, offset, record in batch.records:
            while bad and bad[0].offset < offset:
                self._bad(where, bad.pop(0))
            self._replay(batch.number, ordinal, f"{where} at {offset}", record)
        for row in bad:
            self._bad(where, row)
        pins = self.segments[-1].pins if self.segments else {}
        for segment in reversed(self.segments):
            if segment.first_batch <= batch.number:
                pins = segment.pins
                break
        for _, _, record in batch.records:
            if record.uid != SHARD_UID:
                last = record.index + record.count - 1 if record.kind in (ENTRIES, FORWARD) else 0
                pins[record.uid] = max(last, pins.get(record.uid, 0))

    def _bad(self, where: str, row: tuple[int, int, int]) -> None:
        offset, uid, length = row
        if uid == SHARD_UID:
            self._harmless(f"{where} at {offset}", "a note of the shard is damaged: what it said may be out of date")
            return
        self._group(uid).doubts.append((f"{where} at {offset}", f"a record of {length} bytes is damaged"))

    def _lost(self, where: str, lost: Lost) -> None:
        what = f"batches {lost.first} to {lost.stop - 1} are damaged beyond telling whose they were"
        cost = "the groups of which something may be lost with them are refused, and named besides"
        self.damaged.append(Damage(None, where, what, cost=cost))
        for group in self.groups.values():
            group.doubts.append((where, what))

    def _harmless(self, where: str, what: str) -> None:
        self.damaged.append(Damage(None, where, what))

    def _group(self, uid: int) -> Replayed:
        group = self.groups.get(uid)
        if group is None:
            group = self.groups[uid] = Replayed(uid)
        return group

    def _replay(self, batch: int, ordinal: int, where: str, record: Record) -> None:
        kind, uid = record.kind, record.uid
        try:
            if kind == ENTRIES:
                self._group(uid).append(record.index, self._unpack(record), where, (batch, ordinal))
            elif kind == FORWARD:
                self._group(uid).forward(record.index, self._unpack(record))
            elif kind == VOTE:
                group = self._group(uid)
                group.term, group.vote, group.vote_batch = record.term, record.index, batch
                group.life = max(group.life, unpack_life(record))
            elif kind == GROUP:
                self._take_group(batch, ordinal, record)
            elif kind == RESET:
                group = self._group(uid)
                group.reset(record.index)
                group.began = (batch, ordinal)
            elif kind in (FORGET, TOMBSTONE):
                gone = self.groups.pop(uid, None)
                for doubt, what in gone.doubts if gone is not None else ():
                    self._harmless(doubt, f"{what}, of a group that was removed later")
                self.tombstones.pop(uid, None)
                if kind == TOMBSTONE:
                    stone = Tombstone(record.term, record.index, unpack_life(record), unpack_facts(record))
                    self.tombstones[uid] = (stone, batch)
            elif kind == NOTE:
                key, value = unpack_note(record.body)
                self.notes.pop(key, None)
                if value:
                    self.notes[key] = (value, batch)
            else:
                raise StorageTooNew(f"{where}: a record of the unknown kind {kind}")
        except ValueError as error:
            what = f"a {KIND_NAMES.get(kind, kind)} record of this version cannot be understood: {error}"
            self._group(uid).doubts.append((where, what))

    def _take_group(self, batch: int, ordinal: int, record: Record) -> None:
        name, config, voters, generation_min, facts = unpack_group(record.body)
        group = self._group(record.uid)
        self.tombstones.pop(record.uid, None)
        if record.count:
            group.began = (batch, ordinal)
        group.name, group.config, group.generation_min = name, config, generation_min
        group.first_voters, group.facts = voters, facts
        group.life = record.index
        group.record_batch = batch

    # ------------------------------------------------------------------ members

    def member(
        self, group: Replayed, snapshots: list[SnapshotInfo], problems: list[str]
    ) -> tuple[RecoveredGroup | None, bool]:
        """The member as it was, None if it must be refused (said in ``damaged``); and whether its log must be reset.

        ``snapshots``: its whole ones, newest first; ``problems``: what was wrong with others of them.
        """
        doubts = group.doubts
        if group.gap is not None:
            doubts.append(group.gap)
        if not group.record_batch:
            doubts.append(("", "the record that says what group this is cannot be found"))
        fits = next((info for info in snapshots if info.index >= group.base - 1), None)
        if fits is None and group.base > 1:
            doubts.append(("", "; ".join(problems) or f"entries before {group.base} and their snapshot are missing"))
        if doubts:
            where, what = doubts[0]
            where = where or f"group {group.name!r}" * bool(group.name) or f"group {group.uid:#x}"
            if len(doubts) > 1:
                what += f" (and {len(doubts) - 1} more)"
            self.damaged.append(Damage(group.uid, where, what, group.term, group.vote, group.life))
            return None, False
        for problem in problems:
            self._harmless(f"group {group.name!r}", f"{problem}; an older snapshot or the log has it all")
        entries, first = group.entries, group.base
        needs_reset = False
        if fits is not None:
            last = first + len(entries) - 1
            if fits.index > last or (fits.index >= first and entries[fits.index - first].term != fits.term):
                entries, needs_reset = [], True
            else:
                entries = entries[fits.index + 1 - first :]
            first = fits.index + 1
        term, vote = group.term, group.vote
        last_term = entries[-1].term if entries else fits.term if fits is not None else 0
        if last_term > term:
            term, vote = last_term, 0
        found = RecoveredGroup(
            uid=group.uid,
            name=group.name,
            config=group.config,
            first_voters=group.first_voters,
            life=group.life,
            term=term,
            vote=vote,
            snapshot=fits,
            first_index=first,
            entries=entries,
            facts=group.facts,
        )
        return found, needs_reset


def _bare_entries(record: Record) -> list[Entry]:
    return [Entry(record.term, 0, b"")] * len(unpack_entries(record))

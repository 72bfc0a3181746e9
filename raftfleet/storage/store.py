"""A shard's data directory: one write-ahead log for all groups, snapshots, an archive.

::

    DIR/LOCK                a lock, for as long as a process has the directory open
    DIR/wal/*.wal           segments (raftfleet.storage.records)
    DIR/snapshots/*.snap    the last two of each group (raftfleet.storage.snapshots)
    DIR/archive/*.snap      the last one of each removed group

A segment is kept for entries above a group's *floor*, and for the newest group, vote, tombstone and note records. The
floor is the index of the **older** of the two kept snapshots, so that one damaged snapshot costs nothing. Segments go
strictly oldest first. When more than ``segments_max`` are in use and the oldest is still needed, ``work()`` copies what
is needed of it to the end of the log, a bounded piece at a time, paid by what was appended since: so the log holds at
most what is live, ``segments_max`` segments, one being filled and one spare, and copying never costs more writes than
the appends themselves did.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from raftfleet.core.incoming import Key
from raftfleet.core.messages import Entry
from raftfleet.storage import recovery as recovery_rules
from raftfleet.storage.arrival import ArrivalFile, StoredSource, open_source
from raftfleet.storage.base import (
    NO_FLEET,
    Damage,
    DiskState,
    ForeignStorage,
    RecoveredShard,
    SnapshotInfo,
    StorageDamaged,
    StorageError,
    StorageFull,
    StoragePoisoned,
    Tombstone,
)
from raftfleet.storage.directory import claim, collector_paused, failures_named, read_all
from raftfleet.storage.files import Files, OsFiles
from raftfleet.storage.records import (
    DATA_START,
    ENTRIES,
    FORGET,
    FORMAT,
    FORWARD,
    MARK,
    RESET,
    SHARD_UID,
    TOMBSTONE,
    VOTE,
    SegmentHeader,
    find_mark,
    node_hash,
    pack_entries,
    pack_group,
    pack_header,
    pack_life,
    pack_note,
    pack_record,
    read_header,
    read_record,
    unpack_entries,
)
from raftfleet.storage.snapshots import TEMPORARY, parse_name, read_data, read_info, snapshot_name, write_snapshot
from raftfleet.storage.wal import NO_SPACE, SEGMENT_BYTES, Segment, Wal, segment_name, segment_sequence

SEGMENTS_MAX = 4
ARCHIVE_FILES_MAX = 1000
"""Removed groups whose last snapshot is kept, per shard: the oldest make way."""
DAMAGED_FILES_MAX = 16
"""Damaged snapshots that are kept to be looked at, per shard: any others make way."""
DAMAGED = ".damaged"
FORWARD_PART_BYTES = 64 << 10


SHARD_NOTE = "shard"
"""Which of its node's shards a directory belongs to, in decimal. Those of before it was noted get it when opened."""


def noted_shard(replay: recovery_rules.Replay) -> int | None:
    """The shard whose directory it is, by its own word; None if it does not say."""
    value, _ = replay.notes.get(SHARD_NOTE, (b"", 0))
    return int(value) if value.isdigit() else None


class Group:
    """What the store itself must know of a member. Batch numbers say in which batch the newest record of a kind is."""

    __slots__ = (
        "base",
        "began",
        "first_voters",
        "generation_min",
        "last",
        "life",
        "log_bytes",
        "name",
        "record",
        "record_batch",
        "snapshots",
        "term",
        "vote",
        "vote_batch",
    )

    def __init__(self, name: str, life: int, generation_min: int, began: tuple[int, int]) -> None:
        self.name = name
        self.life = life
        self.generation_min = generation_min
        self.began = began  # (batch, ordinal): entries before this place are of an earlier log
        self.first_voters: tuple[int, ...] | None = None
        self.record = b""
        self.record_batch = 0
        self.vote_batch = 0
        self.term = 0
        self.vote = 0
        self.base = 1  # index of the first entry since it began
        self.last = 0
        self.log_bytes = 0  # appended since the newest snapshot
        self.snapshots: list[SnapshotInfo] = []  # oldest first, at most two

    @property
    def floor(self) -> int:
        """Entries up to this index are not needed from the log."""
        older = self.snapshots[0].index if len(self.snapshots) == 2 else 0
        return max(older, self.base - 1)


class ShardStore:
    """See :class:`raftfleet.storage.base.Storage`, which this satisfies. Made by :meth:`open`."""

    def __init__(self, files: Files, path: str, wal: Wal, lock: int, low_bytes: int, segments_max: int) -> None:
        self.files = files
        self.path = path
        self.groups: dict[int, Group] = {}
        self.refused: dict[int, Damage] = {}
        self.problems: list[str] = []
        """What went wrong in housekeeping, for the log."""
        self._wal = wal
        self._lock = lock
        self._low_bytes = low_bytes
        self._segments_max = segments_max
        self._low = False
        self._was_refused = False  # space was asked for and not given, whatever the file system says is free
        self._tombstones: dict[int, tuple[Tombstone, int]] = {}
        self._notes: dict[str, tuple[bytes, int]] = {}
        self._votes: dict[int, Group] = {}  # term or vote changed since the last sync
        self._next_generation = 1
        self._to_archive: list[int] = []
        self._copy: Iterator[int] | None = None  # the copying of the oldest segment that is under way
        self._copied_batch = 0  # when a batch above this is next, the oldest segment's copy is durable
        self._copy_blocked = False
        self._credit = 2 * wal.segment_bytes
        # Conflicts: where (batch, ordinal) a group's log was replaced, and from which index on. Rare, and kept only
        # while entries before that place may have to be told apart from those in force.
        self._truncations: dict[int, list[tuple[int, int, int]]] = {}
        self._closed = False
        self._arrival_count = 0
        self._litter: list[str] = []  # files of snapshots that never came to an end

    # ------------------------------------------------------------------ opening

    @classmethod
    def open(
        cls,
        path: str,
        *,
        node: str,
        new_instance: int,
        fleet: bytes = NO_FLEET,
        shard: int | None = None,
        files: Files | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        segments_max: int = SEGMENTS_MAX,
        low_bytes: int | None = None,
    ) -> tuple[ShardStore, RecoveredShard]:
        """Open a shard's directory, or make it; returns the store and what it held.

        Args:
            path: the directory; its parent exists.
            node: this node's name; the directory must not be another's.
            new_instance: the shard's instance if the directory is new. An existing one keeps its own.
            fleet: the fleet this node belongs to, if it is known already.
            shard: which of the node's shards this is. It is noted there; a directory of another one is refused.
            low_bytes: free space below which the state is LOW; twice a segment if None.

        Raises:
            StorageLocked: another process has it open.
            ForeignStorage: it is another fleet's, node's or shard's, or something else altogether. Nothing was changed.
            StorageTooNew: a newer version wrote it. Nothing was changed.
            StorageDamaged: not even whose it is can be read. Nothing was changed.
            StorageFull: there is no room for a first segment.
            StoragePoisoned: the disk fails.
        """
        files = files or OsFiles()
        with failures_named(path):
            lock, header = claim(files, path, node, fleet)
        try:
            with failures_named(path), collector_paused():
                instance = header.instance if header is not None else new_instance
                known_fleet = fleet if fleet != NO_FLEET else header.fleet if header is not None else NO_FLEET
                wal = Wal(
                    files,
                    f"{path}/wal",
                    instance=instance,
                    node=node_hash(node),
                    fleet=known_fleet,
                    segment_bytes=segment_bytes,
                )
                low = 2 * segment_bytes if low_bytes is None else low_bytes
                store = cls(files, path, wal, lock, low, segments_max)
                found = RecoveredShard(instance, header is None, known_fleet)
                store._recover(found, header, shard)
            return store, found
        except BaseException:
            files.close(lock)
            raise

    def _recover(self, found: RecoveredShard, header: SegmentHeader | None, shard: int | None) -> None:
        files, wal = self.files, self._wal
        for folder in ("wal", "snapshots", "archive"):
            files.mkdir(f"{self.path}/{folder}")
        files.sync_dir(self.path)
        replay, spares, headers = self._replay(header)
        noted = noted_shard(replay)
        if shard is not None and noted is not None and noted != shard:
            raise ForeignStorage(
                f"{self.path} is that of shard {noted}, not of shard {shard}: directories were exchanged or renamed; "
                "give them back their names"
            )
        resets = self._take_members(replay, found)
        # A snapshot whose name was never synced (the process died, or failed, right after the rename) is relied on now:
        # the log of its member begins behind it.
        files.sync_dir(f"{self.path}/snapshots")
        found.cut_bytes = replay.cut_bytes + wal.adopt(replay.segments, max(replay.next_batch, 1), spares)
        files.sync_dir(wal.path)
        if replay.segments:
            wal.cut(replay.cut_end)
            current = replay.segments[-1]
            wal.write(wal._handle, pack_header(headers[current.sequence]), 0)
            wal.rewrite(*replay.last_batch)
        for uid, index, term in resets:
            self.reset(uid, index, term)
        self._add_votes()
        self._look_anew()
        try:
            wal.sync()  # the mark of an empty batch proves the one before, and that the disk takes writes
        except StorageFull:
            if found.created:
                raise
        else:
            self._synced()
        if shard is not None and noted is None:
            self.save_note(SHARD_NOTE, b"%d" % shard)  # with the next sync: until then nothing relies on it

    def _replay(
        self, header: SegmentHeader | None
    ) -> tuple[recovery_rules.Replay, list[int], dict[int, SegmentHeader]]:
        """Read all segments: the replay, the sequences of unused segments after them, headers as they should be."""
        files, wal = self.files, self._wal
        replay = recovery_rules.Replay(wal.instance)
        spares: list[int] = []
        headers: dict[int, SegmentHeader] = {}
        for name in files.listdir(wal.path):
            sequence = segment_sequence(name)
            if sequence is None:
                continue
            data = read_all(files, f"{wal.path}/{name}")
            its_header, whole = read_header(data)
            first_batch = its_header.first_batch if its_header is not None else 0
            if its_header is None and find_mark(data, DATA_START, sequence, wal.instance) is None:
                spares.append(sequence)
                continue
            for unused in spares:
                # Something follows it, so it was in use: all of it is lost, which the batch numbers will tell.
                wal.last_sequence = max(wal.last_sequence, unused)
            spares.clear()
            replay.take_segment(data, sequence, first_batch, header_whole=whole)
            own = SegmentHeader(FORMAT, wal.instance, sequence, replay.segments[-1].first_batch, wal.fleet, wal.node)
            headers[sequence] = own
        replay.finish()
        return replay, spares, headers

    def _take_members(self, replay: recovery_rules.Replay, found: RecoveredShard) -> list[tuple[int, int, int]]:
        """Fill in groups and ``found``; returns ``(uid, index, term)`` of logs that a snapshot replaced."""
        snapshots, problems, strangers, chores = self._read_snapshots(replay)
        resets = []
        for uid, replayed in replay.groups.items():
            whole = snapshots.get(uid, [])
            member, needs_reset = replay.member(replayed, whole[::-1], problems.get(uid, []))
            if member is None:
                self.refused[uid] = replay.damaged[-1]
                continue
            group = self.groups[uid] = Group(replayed.name, replayed.life, replayed.generation_min, replayed.began)
            voters = replayed.first_voters
            group.first_voters = voters
            group.record = pack_group(
                uid, group.name, replayed.config, voters, group.life, group.generation_min, replayed.facts, first=False
            )
            group.record_batch, group.vote_batch = replayed.record_batch, replayed.vote_batch
            group.term, group.vote = member.term, member.vote
            if member.term != replayed.term:
                self._votes[uid] = group  # the log proves a higher one: from now on it stands by itself
            group.base, group.last = replayed.base, member.last_index
            group.log_bytes = sum(len(entry.data) for entry in member.entries)
            group.snapshots = whole[-2:]
            if replayed.truncations:
                self._truncations[uid] = replayed.truncations
            found.groups.append(member)
            if needs_reset:
                resets.append((uid, member.last_index, member.snapshot.term if member.snapshot else 0))
        # Everything that could refuse the directory has been read: from here on things may change.
        for path in strangers:
            self._archive_file(path)
        for uid, path in chores:
            if uid < 0:
                self.files.unlink(path)
            elif uid in self.groups:
                self._set_apart(path)
        for uid in self.groups:
            for info in snapshots.get(uid, [])[:-2]:
                self.files.unlink(info.path)
        self._tombstones = replay.tombstones
        self._notes = replay.notes
        found.tombstones = {uid: stone for uid, (stone, _) in replay.tombstones.items()}
        found.notes = {key: value for key, (value, _) in replay.notes.items()}
        found.damaged = replay.damaged
        return resets

    def _read_snapshots(
        self, replay: recovery_rules.Replay
    ) -> tuple[dict[int, list[SnapshotInfo]], dict[int, list[str]], list[str], list[tuple[int, str]]]:
        """Whole snapshots by uid, oldest first; what is wrong with others; files that belong to no member.

        Last: files to be put away, as (uid whose damaged snapshot it is, path), or (-1, path) of a temporary file.
        """
        files = self.files
        whole: dict[int, list[SnapshotInfo]] = {}
        problems: dict[int, list[str]] = {}
        strangers = []
        chores: list[tuple[int, str]] = []
        folder = f"{self.path}/snapshots"
        for name in files.listdir(folder):
            path = f"{folder}/{name}"
            named = parse_name(name)
            if named is None:
                if name.endswith(TEMPORARY):
                    chores.append((-1, path))
                continue
            uid, generation = named
            self._next_generation = max(self._next_generation, generation + 1)
            group = replay.groups.get(uid)
            if group is None or generation < group.generation_min:
                strangers.append(path)
                continue
            try:
                info, _ = read_info(files, path)
                if (info.uid, info.generation) != named:
                    raise StorageDamaged(f"{path} says that it is {info.uid:#x}-{info.generation:#x}")
                whole.setdefault(uid, []).append(info)
            except StorageDamaged as error:
                problems.setdefault(uid, []).append(str(error))
                chores.append((uid, path))
        for name in files.listdir(f"{self.path}/archive"):
            named = parse_name(name)
            if named is not None:
                self._next_generation = max(self._next_generation, named[1] + 1)
        for group in replay.groups.values():
            self._next_generation = max(self._next_generation, group.generation_min + 1)
        return whole, problems, strangers, chores

    # ------------------------------------------------------------------ collecting

    @property
    def instance(self) -> int:
        """The shard's identity."""
        return self._wal.instance

    @property
    def state(self) -> DiskState:
        """How the disk is."""
        if self._wal.state is DiskState.OK and self._low:
            return DiskState.LOW
        return self._wal.state

    @property
    def why(self) -> str:
        """Why the storage is poisoned; empty otherwise."""
        return self._wal.why

    @property
    def segment_count(self) -> int:
        """Segments in use."""
        return len(self._wal.segments)

    def set_fleet(self, fleet: bytes) -> None:
        """The node joined a fleet: stands in every segment from the next on, and at once in the one in use.

        Raises:
            ForeignStorage: the directory belongs to another one already.
        """
        wal = self._wal
        if wal.fleet == fleet:
            return
        if wal.fleet != NO_FLEET:
            raise ForeignStorage(f"{self.path} belongs to fleet {wal.fleet.hex()}, not {fleet.hex()}")
        current = wal.segments[-1]
        header = SegmentHeader(FORMAT, wal.instance, current.sequence, current.first_batch, fleet, wal.node)
        data = pack_header(header)
        half = len(data) // 2
        for offset in (0, half):  # one copy is whole at every moment
            wal.write(wal._handle, data[offset : offset + half], offset)
            wal.guard(self.files.fdatasync, wal._handle)
        wal.fleet = fleet

    def save_group(
        self,
        uid: int,
        name: str,
        config: dict[str, Any],
        first_voters: Sequence[int] | None,
        life: int,
        facts: Any = None,
    ) -> None:
        """See :class:`~raftfleet.storage.base.Storage`."""
        assert uid not in self.refused, f"{uid:#x} is damaged: bury it first"
        wal = self._wal
        group = self.groups.get(uid)
        first = group is None
        if group is None:
            group = Group(name, life, self._next_generation, (wal.next_batch, len(wal.pending)))
            self._next_generation += 1
            group.first_voters = None if first_voters is None else tuple(first_voters)
            self.groups[uid] = group
            self._tombstones.pop(uid, None)
        group.name, group.life = name, life
        voters = group.first_voters
        group.record = pack_group(uid, name, config, voters, life, group.generation_min, facts, first=False)
        record = group.record
        if first:
            record = pack_group(uid, name, config, voters, life, group.generation_min, facts, first=True)
        group.record_batch = wal.next_batch
        self._add(uid, record, 0)

    def save_vote(self, uid: int, term: int, vote: int) -> None:
        """See :class:`~raftfleet.storage.base.Storage`. Written once per batch, after everything else."""
        group = self.groups[uid]
        group.term, group.vote = term, vote
        self._votes[uid] = group

    def append(self, uid: int, first: int, entries: Sequence[Entry]) -> None:
        """See :class:`~raftfleet.storage.base.Storage`."""
        group = self.groups[uid]
        assert group.base <= first <= group.last + 1, (group.base, first, group.last)
        count = len(entries)
        if first <= group.last:
            wal = self._wal
            self._truncations.setdefault(uid, []).append((wal.next_batch, len(wal.pending), first))
        if count and entries[0][0] != entries[-1][0]:
            # Terms never fall along a log, so equal ends mean one term; a record holds one.
            start = 0
            for at in range(1, count + 1):
                if at == count or entries[at][0] != entries[start][0]:
                    self._append_run(group, uid, first + start, entries[start:at])
                    start = at
        else:
            self._append_run(group, uid, first, entries)

    def _append_run(self, group: Group, uid: int, first: int, entries: Sequence[Entry]) -> None:
        record = pack_entries(uid, first, entries)
        group.last = last = first + len(entries) - 1
        group.log_bytes += len(record)
        self._add(uid, record, last)

    def reset(self, uid: int, index: int, term: int) -> None:
        """See :class:`~raftfleet.storage.base.Storage`."""
        group = self.groups[uid]
        wal = self._wal
        group.began = (wal.next_batch, len(wal.pending))
        group.base = index + 1
        group.last = index
        group.log_bytes = 0
        self._truncations.pop(uid, None)
        self._add(uid, pack_record(RESET, uid, term, index, 0, b""), 0)

    def forget_group(self, uid: int) -> None:
        """See :class:`~raftfleet.storage.base.Storage`."""
        if self._drop(uid):
            self._add(uid, pack_record(FORGET, uid, 0, 0, 0, b""), 0)

    def bury(self, uid: int, term: int, vote: int, life: int, facts: Any = None) -> None:
        """See :class:`~raftfleet.storage.base.Storage`."""
        self._drop(uid)
        self._tombstones[uid] = (Tombstone(term, vote, life, facts), self._wal.next_batch)
        self._add(uid, pack_life(TOMBSTONE, uid, term, vote, life, facts), 0)

    def _drop(self, uid: int) -> bool:
        known = self.groups.pop(uid, None) is not None
        known = self.refused.pop(uid, None) is not None or known
        known = self._tombstones.pop(uid, None) is not None or known
        self._votes.pop(uid, None)
        self._truncations.pop(uid, None)
        if known:
            self._to_archive.append(uid)
        return known

    def save_note(self, key: str, value: bytes) -> None:
        """See :class:`~raftfleet.storage.base.Storage`."""
        self._notes.pop(key, None)
        if value:
            self._notes[key] = (value, self._wal.next_batch)
        self._wal.add(pack_note(key, value))
        self._wal.pending_pins[SHARD_UID] = 0

    def _add(self, uid: int, record: bytes, last: int) -> None:
        wal = self._wal
        wal.add(record)
        self._credit += len(record)
        pins = wal.pending_pins
        if last >= pins.get(uid, 0):
            pins[uid] = last

    @property
    def is_dirty(self) -> bool:
        """Whether something waits for :meth:`sync`."""
        return bool(self._wal.pending or self._votes)

    # ------------------------------------------------------------------ durable

    def sync(self) -> None:
        """See :class:`~raftfleet.storage.base.Storage`."""
        wal = self._wal
        self._add_votes()
        if not wal.pending:
            if wal.state is DiskState.POISONED:
                raise StoragePoisoned(wal.why)
            return
        batch = wal.next_batch
        wal.sync()
        if self._to_archive:
            self._synced()
        assert wal.next_batch == batch + 1

    def _add_votes(self) -> None:
        for uid, group in self._votes.items():
            group.vote_batch = self._wal.next_batch
            self._add(uid, pack_life(VOTE, uid, group.term, group.vote, max(group.life, 0)), 0)
        self._votes = {}

    def _synced(self) -> None:
        """After a sync: what was forgotten durably leaves the folder of snapshots."""
        gone = self._to_archive
        self._to_archive = []
        kept = {info.path for uid in gone if uid in self.groups for info in self.groups[uid].snapshots}
        folder = f"{self.path}/snapshots"
        try:
            for name in self.files.listdir(folder) if gone else ():
                named = parse_name(name)
                if named is not None and named[0] in gone and f"{folder}/{name}" not in kept:
                    self._archive_file(f"{folder}/{name}")
        except OSError as error:
            # Harmless: the next start does it again.
            self.problems.append(f"cannot move a removed group's snapshot to {self.path}/archive: {error}")

    def _archive_file(self, path: str) -> None:
        """Move a snapshot to the archive; only a removed group's newest stays there."""
        files = self.files
        name = os.path.basename(path)
        named = parse_name(name)
        assert named is not None
        archive = f"{self.path}/archive"
        files.rename(path, f"{archive}/{name}")
        files.sync_dir(archive)
        kept: list[tuple[int, str]] = []
        for other in files.listdir(archive):
            its = parse_name(other)
            if its is None:
                continue
            if its[0] == named[0] and its[1] < named[1]:
                files.unlink(f"{archive}/{other}")
            else:
                kept.append((its[1], other))
        for _, oldest in sorted(kept)[:-ARCHIVE_FILES_MAX]:
            files.unlink(f"{archive}/{oldest}")

    def _set_apart(self, path: str) -> None:
        """Keep a damaged snapshot where nothing looks for one, and few of them: each may be of any size."""
        archive, name = f"{self.path}/archive", os.path.basename(path) + DAMAGED
        others = [other for other in self.files.listdir(archive) if other.endswith(DAMAGED) and other != name]
        self.files.rename(path, f"{archive}/{name}")
        for other in sorted(others, reverse=True)[DAMAGED_FILES_MAX - 1 :]:
            self.files.unlink(f"{archive}/{other}")

    def archive(self, info: SnapshotInfo) -> None:
        """The last state of a group that is gone, which was written elsewhere, is durable: it is what is kept of it."""
        try:
            self._archive_file(info.path)
        except OSError as error:
            self.problems.append(f"cannot move a removed group's snapshot to {self.path}/archive: {error}")

    def archived_snapshot(self, uid: int) -> tuple[str, int]:
        """Path and index of the snapshot that a removed or damaged member left in the archive; ``("", 0)``: none."""
        archive = f"{self.path}/archive"
        try:
            found = [(*named, name) for name in self.files.listdir(archive) if (named := parse_name(name)) is not None]
        except OSError:
            return "", 0
        own = sorted(row for row in found if row[0] == uid)
        if not own:
            return "", 0
        path = f"{archive}/{own[-1][-1]}"
        try:
            info, _ = read_info(self.files, path, check=False)
        except (OSError, StorageError):
            return "", 0
        return path, info.index

    def save_snapshot(self, uid: int, index: int, term: int, data: bytes) -> None:
        """See :class:`~raftfleet.storage.base.Storage`."""
        generation = self.reserve_generation()
        meta = {"name": self.groups[uid].name}
        try:
            info = write_snapshot(self.files, f"{self.path}/snapshots", uid, index, term, generation, meta, data)
        except OSError as error:
            raise self._snapshot_failed(uid, generation, error) from error
        self.adopt_snapshot(info)

    def open_source(self, uid: int, index_min: int) -> StoredSource | None:
        """The newest stored snapshot of a member, to be sent; None unless it is of ``index_min`` or later."""
        group = self.groups.get(uid)
        if group is None or not group.snapshots or group.snapshots[-1].index < index_min:
            return None
        info = group.snapshots[-1]
        try:
            return open_source(self.files, info)
        except (FileNotFoundError, StorageError) as error:
            self.put_aside(info, str(error))
        except OSError as error:
            self.problems.append(f"{info.path} cannot be opened to be sent: {error}")
        return None

    def put_aside(self, info: SnapshotInfo, why: str) -> None:
        """A stored snapshot is damaged: it does not count any more. The older one and the log have it all."""
        self.groups[info.uid].snapshots.remove(info)
        self.problems.append(f"{info.path} is damaged ({why}); it was put aside, and another is made")
        folder, name = os.path.split(info.path)
        if name in self.files.listdir(folder):
            with contextlib.suppress(StorageFull):  # it stays where it is, and does not count
                self._wal.guard(self._set_apart, info.path)

    def arrival(self, uid: int, key: Key) -> ArrivalFile:
        """A file for a large snapshot that is about to arrive; nothing is written yet."""
        self._arrival_count += 1
        path = f"{self.path}/snapshots/incoming-{uid:016x}-{self._arrival_count}{TEMPORARY}"
        meta = {"name": self.groups[uid].name, "crc": key.crc}
        return ArrivalFile(self.files, path, key, meta, self._litter.append)

    def write_arrival(self, file: ArrivalFile, data: bytes) -> None:
        """Write what came next of it.

        Raises:
            StorageFull: there is no room for it, or would not be for all of it.
            StoragePoisoned: final.
        """
        if not file.is_begun and self.free_bytes() < file.key.size_bytes + self._low_bytes:
            raise StorageFull(f"{self.path} has no room for a snapshot of {file.key.size_bytes} bytes")
        try:
            file.write(data)
        except OSError as error:
            raise self._arrival_failed(file, error, is_needed=False) from error

    def finish_arrival(self, file: ArrivalFile, data: bytes, uid: int, index: int, term: int) -> None:
        """Write the last of it and count it as a snapshot, durable when this returns. Errors as above."""
        try:
            if file.size_bytes < file.key.size_bytes:
                file.write(data)
            info = file.finish(f"{self.path}/snapshots", uid, index, term, self.reserve_generation())
        except OSError as error:
            raise self._arrival_failed(file, error, is_needed=True) from error
        self.adopt_snapshot(info)

    def _arrival_failed(self, file: ArrivalFile, error: OSError, *, is_needed: bool) -> StorageError:
        what = f"writing {file.path} failed: {error}"
        if error.errno not in NO_SPACE or (file.is_spoilt and is_needed):
            self._wal.poison(what)
            return StoragePoisoned(self._wal.why)
        return StorageFull(what)

    def free_bytes(self) -> int:
        """Space on the file system, as far as it tells."""
        try:
            return self.files.free_bytes(self.path)
        except OSError:
            return 1 << 62

    def _remove_litter(self) -> None:
        litter, self._litter[:] = list(self._litter), []
        for path in litter:
            try:
                self.files.unlink(path)
            except OSError as error:
                self.problems.append(f"cannot remove {path}, which the next start does: {error}")

    @property
    def segments(self) -> list[Segment]:
        """Segments in use, oldest first."""
        return self._wal.segments

    def reserve_generation(self) -> int:
        """A generation for a snapshot that is written elsewhere (a forked child), then :meth:`adopt_if_newer`."""
        if self._wal.state is DiskState.POISONED:
            raise StoragePoisoned(self._wal.why)
        self._next_generation += 1
        return self._next_generation - 1

    def adopt_snapshot(self, info: SnapshotInfo) -> None:
        """Count a snapshot that is durable already; older ones than the last two are removed."""
        group = self.groups[info.uid]
        group.snapshots.append(info)
        group.log_bytes = 0
        self._was_refused = False
        wal = self._wal
        while len(group.snapshots) > 2:
            wal.guard(self.files.unlink, group.snapshots.pop(0).path)

    def adopt_if_newer(self, info: SnapshotInfo) -> bool:
        """Count a snapshot that was written elsewhere; False if by now it is of no use, and it was removed."""
        group = self.groups.get(info.uid)
        newest = group.snapshots[-1].index if group is not None and group.snapshots else 0
        if group is None or info.generation < group.generation_min or info.index <= max(newest, group.base - 1):
            if os.path.basename(info.path) in self.files.listdir(os.path.dirname(info.path)):
                self._wal.guard(self.files.unlink, info.path)  # else it went to the archive with its group
            return False
        self.adopt_snapshot(info)
        return True

    def _snapshot_failed(self, uid: int, generation: int, error: OSError) -> StorageError:
        wal = self._wal
        what = f"writing snapshot {generation} of {uid:#x} in {self.path} failed: {error}"
        if error.errno not in NO_SPACE:
            wal.poison(what)
            return StoragePoisoned(wal.why)
        self._low = self._was_refused = True
        with contextlib.suppress(OSError):
            self.files.unlink(f"{self.path}/snapshots/{snapshot_name(uid, generation)}{TEMPORARY}")
        return StorageFull(what)

    def load_snapshot(self, info: SnapshotInfo) -> bytes:
        """See :class:`~raftfleet.storage.base.Storage`."""
        try:
            return read_data(self.files, info.path)
        except OSError as error:
            raise StorageDamaged(f"{info.path} cannot be read: {error}") from error

    def snapshot_of(self, uid: int) -> SnapshotInfo | None:
        """The newest stored snapshot of a member."""
        kept = self.groups[uid].snapshots
        return kept[-1] if kept else None

    def log_bytes(self, uid: int) -> int:
        """Bytes appended for a member since its newest snapshot: the owner's measure for when to make the next."""
        return self.groups[uid].log_bytes

    def mark(self) -> None:
        """Write a mark that proves the last batch durable, without waiting for it.

        For a moment when nothing is to do: until something follows the last batch, damage to it looks like a torn
        tail. Not an fsync: it costs a write of some 80 bytes into the page cache.
        """
        if not self.is_dirty and self._wal.state is DiskState.OK:
            self._wal.sync()

    # ------------------------------------------------------------------ housekeeping

    def work(self, bytes_max: int = 256 << 10) -> bool:
        """See :class:`~raftfleet.storage.base.Storage`."""
        wal = self._wal
        if wal.state is DiskState.POISONED:
            raise StoragePoisoned(wal.why)
        if self._litter:
            self._remove_litter()
        try:
            if wal.state is DiskState.FULL:
                wal.try_space()
                self._look_anew()
            if wal.wants_spare:
                self._look_anew()
                wal.prepare()
                return True
            segments = wal.segments
            if len(segments) < 2:
                return False
            oldest = segments[0]
            if self._copied_batch and wal.next_batch > self._copied_batch:
                oldest.pins = {}
                self._copied_batch = 0
            if not self._needs(oldest):
                self._copy = None
                self._copied_batch = 0
                wal.drop_oldest()
                self._forget_truncations(oldest.last_batch)
                self._look_anew()
                return True
            if self._copied_batch:
                return False  # waits for the sync
            if self._copy is None:
                if len(segments) <= self._segments_max or self._credit <= 0 or self._copy_blocked:
                    return False
                self._copy = self._copy_forward(oldest)
            return self._go_on_copying(bytes_max)
        except StorageFull as error:
            self._low = self._was_refused = True
            self.problems.append(str(error))
            return False

    def wants_snapshot(self) -> list[int]:
        """See :class:`~raftfleet.storage.base.Storage`."""
        segments = self._wal.segments
        if len(segments) * 2 <= self._segments_max and self.state is DiskState.OK:
            return []
        pinning = [
            (group.log_bytes, uid)
            for uid, index in segments[0].pins.items()
            if (group := self.groups.get(uid)) is not None and index > group.floor
        ]
        return [uid for _, uid in sorted(pinning, reverse=True)]

    def _forget_truncations(self, last_batch: int) -> None:
        for uid, rows in list(self._truncations.items()):
            self._truncations[uid] = rows = [row for row in rows if row[0] > last_batch]
            if not rows:
                del self._truncations[uid]

    def _look_anew(self) -> None:
        self._was_refused = False
        self.look_at_space()

    def look_at_space(self) -> None:
        """See whether space runs out: one ``statvfs``. Done besides with whatever gains or gives back a segment."""
        try:
            self._low = self._was_refused or self.files.free_bytes(self.path) < self._low_bytes
        except OSError:
            self._low = True

    def _needs(self, segment: Segment) -> bool:
        """Whether the oldest segment holds something that is nowhere else, durably.

        What was collected and not synced yet may already have moved a group's newest record, floor or very existence
        in memory: until it is durable, what it will replace is needed.
        """
        last = segment.last_batch
        groups = self.groups
        pending = self._wal.pending_pins
        if SHARD_UID in pending or (pending and not pending.keys().isdisjoint(segment.pins)):
            return True
        if self._copied_batch == 0 and any(uid in self.refused for uid in segment.pins):
            return True
        for uid, index in segment.pins.items():
            group = groups.get(uid)
            if group is not None:
                if index > group.floor or group.record_batch <= last or 0 < group.vote_batch <= last:
                    return True
            elif uid in self._tombstones and self._tombstones[uid][1] <= last:
                return True
        return any(batch <= last for _, batch in self._notes.values())

    def _go_on_copying(self, bytes_max: int) -> bool:
        assert self._copy is not None
        done = 0
        try:
            for size_bytes in self._copy:
                done += size_bytes
                self._credit -= size_bytes
                if done >= bytes_max:
                    return True
        except BaseException:
            # A generator that raised looks like one that has finished: what it had not copied would be dropped.
            self._copy = None
            raise
        self._copy = None
        if not self._copy_blocked:
            self._copied_batch = self._wal.next_batch
            if not self.is_dirty:
                self._copied_batch -= 1  # nothing was worth copying: nothing to wait for
        return True

    def _copy_forward(self, segment: Segment) -> Iterator[int]:
        """Collect copies of what is needed of the oldest segment; yields how many bytes each step was.

        First the small records, from memory, then those entries that are still in force.
        """
        wal, groups, last = self._wal, self.groups, segment.last_batch
        for uid in list(segment.pins):
            group = groups.get(uid)
            if uid in self.refused:
                self._copy_blocked = True
                self.problems.append(f"{segment_name(segment.sequence)} is kept for the refused group {uid:#x}")
                return
            if group is not None and group.record_batch <= last:
                group.record_batch = wal.next_batch
                self._add(uid, group.record, 0)
                yield len(group.record)
            group = groups.get(uid)
            if group is not None and 0 < group.vote_batch <= last:
                self._votes[uid] = group
                yield 100
            if uid in self._tombstones and self._tombstones[uid][1] <= last:
                stone = self._tombstones[uid][0]
                self._tombstones[uid] = (stone, wal.next_batch)
                self._add(uid, pack_life(TOMBSTONE, uid, stone.term, stone.vote, stone.life, stone.facts), 0)
                yield 100
        for key, (value, batch) in list(self._notes.items()):
            if batch <= last:
                self.save_note(key, value)
                yield len(value)
        yield from self._copy_entries(segment)

    def _copy_entries(self, segment: Segment) -> Iterator[int]:
        offset = DATA_START
        batch = segment.first_batch
        ordinal = 0
        data = b""
        start = 0
        while offset < segment.end:
            record = read_record(data, offset - start)
            if record is None:
                length = int.from_bytes(self._wal.read(segment, offset, 4), "little")
                data = self._wal.read(segment, offset, max(length, FORWARD_PART_BYTES))
                start = offset
                record = read_record(data, 0)
                if record is None:
                    self._copy_blocked = True
                    self.problems.append(
                        f"{segment_name(segment.sequence)} at {offset}: damaged, found while copying; "
                        "the segment is kept until snapshots make it superfluous"
                    )
                    return
                yield len(data) // 8  # reading is work too
            offset += record.length
            if record.kind == MARK:
                batch = record.term + 1
                ordinal = 0
                continue
            group = self.groups.get(record.uid)
            if record.kind in (ENTRIES, FORWARD) and group is not None and (batch, ordinal) > group.began:
                first = max(record.index, group.floor + 1)
                stop = record.index + record.count
                for at_batch, at_ordinal, replaced in self._truncations.get(record.uid, ()):
                    if (at_batch, at_ordinal) > (batch, ordinal):
                        stop = min(stop, replaced)
                if first < stop:
                    entries = unpack_entries(record)[first - record.index : stop - record.index]
                    copy = pack_entries(record.uid, first, entries, FORWARD)
                    self._add(record.uid, copy, stop - 1)
                    yield len(copy)
            ordinal += 1

    def close(self) -> None:
        """See :class:`~raftfleet.storage.base.Storage`."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._wal.state is not DiskState.POISONED:
                with contextlib.suppress(StorageError):
                    self.sync()
                    self._wal.sync()
        finally:
            self._wal.close()
            self.files.close(self._lock)

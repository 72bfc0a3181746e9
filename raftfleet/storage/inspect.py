"""Looks at a shard's directory, or a copy of one, without changing, locking or even owning it.

For ``raftfleet-node wal ls|dump|verify DIR``. Rows are plain dicts that JSON can carry; a segment is read at a time and
rows are made one by one, so a log of any size can be looked at: ``verify``, which judges as a start would, remembers of
an entry only its term (8 bytes; some 100 where the entry was written forward).

A directory that a node is using may be looked at too. What vanishes meanwhile (a segment that was freed, a snapshot
that was replaced) is passed over, and what is being written looks like a torn tail; but a group may seem damaged
because its parts were read at different moments. Only of a directory at rest, or a copy of one, is the verdict final.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from typing import Any

from raftfleet.storage.base import ForeignStorage, SnapshotInfo, StorageDamaged, StorageTooNew
from raftfleet.storage.files import Files, OsFiles
from raftfleet.storage.records import (
    DATA_START,
    ENTRIES,
    FORMAT,
    FORWARD,
    GROUP,
    KIND_NAMES,
    NOTE,
    SHARD_UID,
    TOMBSTONE,
    VOTE,
    Record,
    SegmentHeader,
    find_mark,
    read_header,
    unpack_entries,
    unpack_group,
    unpack_life,
    unpack_note,
)
from raftfleet.storage.recovery import Replay, Replayed
from raftfleet.storage.scan import BadRecord, Batch, Lost, scan_segment
from raftfleet.storage.snapshots import parse_name, read_info
from raftfleet.storage.store import noted_shard
from raftfleet.storage.wal import segment_sequence

_SHARD_NAME = re.compile(r"shard-(\d+)")


def shard_directories(path: str) -> list[tuple[str, str]]:
    """``(name, path)`` of each shard's directory: ``path`` itself, named ``.``, or those in a node's data directory.

    Links are not followed. Empty: ``path`` holds nothing of a shard.
    """
    if os.path.isdir(f"{path}/wal"):
        return [(".", path)]
    found = []
    for folder in _folders(path):
        if os.path.isdir(f"{path}/{folder}/wal"):
            found.append((folder, f"{path}/{folder}"))
            continue
        for inner in _folders(f"{path}/{folder}"):
            if os.path.isdir(f"{path}/{folder}/{inner}/wal"):
                found.append((f"{folder}/{inner}", f"{path}/{folder}/{inner}"))
    return found


def _folders(path: str) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))


def list_directory(path: str, files: Files | None = None) -> Iterator[dict[str, Any]]:
    """One row per segment and snapshot: what its header says."""
    files = files or OsFiles()
    for name, _sequence, data in _segments(files, path):
        header, whole = read_header(data)
        yield {"file": f"wal/{name}", "type": "segment", "size_bytes": len(data), **_header_row(header, whole)}
    for folder in ("snapshots", "archive"):
        for name in files.listdir(f"{path}/{folder}"):
            row = _snapshot_row(files, f"{path}/{folder}/{name}")
            if row is not None:
                yield {"file": f"{folder}/{name}", "type": "snapshot", **row}


def names(path: str, files: Files | None = None) -> dict[int, str]:
    """The name of every group of which a record or snapshot tells it, removed ones included."""
    found = {row["uid"]: row["name"] for row in list_directory(path, files) if "name" in row}
    found.update({row["uid"]: row["name"] for row in dump(path, files=files) if row["kind"] == "group"})
    return found


def dump(
    path: str, *, uid: int | None = None, data: bool = False, files: Files | None = None
) -> Iterator[dict[str, Any]]:
    """One row per record, in order; ``uid``: only this group's; ``data``: with the entries' bytes, in base64.

    What belongs to no known group (lost batches, a torn tail) is always told.

    Raises:
        StorageDamaged: not one segment says whose directory this is.
        StorageTooNew: a segment has a later format.
    """
    files = files or OsFiles()
    instance = _instance(files, path)
    for name, sequence, content in _segments(files, path):
        header = _known_header(path, name, content)
        for item in scan_segment(content, sequence, instance, header.first_batch if header is not None else 0):
            if isinstance(item, Batch):
                yield from _batch_rows(name, item, uid, data)
            elif isinstance(item, Lost):
                row = {"kind": "lost", "batches": [item.first, item.stop - 1], "length": item.end - item.start}
                yield {"segment": name, "offset": item.start, **row}
            elif item.end > item.start:
                row = {"kind": "tail", "batch": item.number, "length": item.end - item.start}
                yield {"segment": name, "offset": item.start, **row}


def _batch_rows(name: str, batch: Batch, uid: int | None, data: bool) -> Iterator[dict[str, Any]]:
    bad = [row for row in batch.bad if uid is None or row.uid == uid]
    for _, offset, record in batch.records:
        while bad and bad[0].offset < offset:
            yield _bad_row(name, batch, bad.pop(0))
        if uid is None or record.uid == uid:
            yield {"segment": name, "offset": offset, "batch": batch.number, **_record_row(record, data)}
    for row in bad:
        yield _bad_row(name, batch, row)
    if batch.mark_lost:
        yield {"segment": name, "offset": batch.end, "batch": batch.number, "kind": "damaged", "what": "the mark"}


def _bad_row(name: str, batch: Batch, bad: BadRecord) -> dict[str, Any]:
    row = {"segment": name, "offset": bad.offset, "batch": batch.number, "kind": "damaged", "length": bad.length}
    if bad.uid != SHARD_UID:
        row["uid"] = bad.uid
    return row


def verify(path: str, files: Files | None = None) -> dict[str, Any]:
    """Read everything as a start would and say what would be found: ``ok`` if nothing is damaged.

    Raises:
        StorageDamaged: not one segment says whose directory this is.
        StorageTooNew: it is of a later format.
        ForeignStorage: segments of two shards are mixed.
    """
    files = files or OsFiles()
    replay = Replay(_instance(files, path), keep_data=False)
    spare_bytes = 0
    for name, sequence, data in _segments(files, path):
        header = _known_header(path, name, data)
        if header is None and find_mark(data, DATA_START, sequence, replay.instance) is None:
            spare_bytes += len(data.rstrip(b"\0"))  # of a first write that was torn: a start blanks it
            continue
        if header is not None and header.instance != replay.instance:
            raise ForeignStorage(f"{path}/wal holds segments of two shards: {replay.instance} and {header.instance}")
        spare_bytes = 0
        first_batch = header.first_batch if header is not None else 0
        replay.take_segment(data, sequence, first_batch, header_whole=read_header(data)[1])
    replay.finish()
    infos, problems, archive_problems = _read_snapshots(files, path, replay)
    noted, named = noted_shard(replay), _SHARD_NAME.fullmatch(os.path.basename(os.path.abspath(path)))
    misplaced = []
    if noted is not None and named and int(named[1]) != noted:
        misplaced = [f"{path} is that of shard {noted}: directories were exchanged or renamed, and a start refuses it"]
    rows = []
    for uid, group in sorted(replay.groups.items()):
        row = _member_row(replay, group, infos.get(uid, []), problems.get(uid, []))
        if row is not None:
            rows.append(row)
    damaged = [{"uid": damage.uid, "what": str(damage)} for damage in replay.damaged]
    damaged += [{"uid": None, "what": problem} for problem in [*misplaced, *archive_problems]]
    return {
        "ok": not damaged,
        "instance": replay.instance,
        "groups": rows,
        "tombstones": sorted(replay.tombstones),
        "damaged": damaged,
        "torn_tail_bytes": replay.cut_bytes + spare_bytes,
    }


def _read_snapshots(
    files: Files, path: str, replay: Replay
) -> tuple[dict[int, list[SnapshotInfo]], dict[int, list[str]], list[str]]:
    """Whole snapshots by uid, what is wrong with others of members, and with those in the archive."""
    infos: dict[int, list[SnapshotInfo]] = {}
    problems: dict[int, list[str]] = {}
    archive_problems = []
    for folder in ("snapshots", "archive"):
        for name in files.listdir(f"{path}/{folder}"):
            named = parse_name(name)
            if named is None:
                continue
            uid, generation = named
            group = replay.groups.get(uid)
            is_members = folder == "snapshots" and group is not None and generation >= group.generation_min
            try:
                info, _ = read_info(files, f"{path}/{folder}/{name}")
                if (info.uid, info.generation) != named:
                    raise StorageDamaged(f"{info.path} says that it is {info.uid:#x}-{info.generation:#x}")
                if is_members:
                    infos.setdefault(uid, []).append(info)
            except FileNotFoundError:
                continue
            except StorageDamaged as error:
                if is_members:
                    problems.setdefault(uid, []).append(str(error))
                else:
                    archive_problems.append(f"{error}; it is of a group that was removed")
    return infos, problems, archive_problems


def _member_row(
    replay: Replay, group: Replayed, snapshots: list[SnapshotInfo], problems: list[str]
) -> dict[str, Any] | None:
    newest_first = sorted(snapshots, key=lambda info: info.generation, reverse=True)
    member, _ = replay.member(group, newest_first, problems)
    if member is None:
        return None
    return {
        "uid": group.uid,
        "name": member.name,
        "life": member.life,
        "term": member.term,
        "vote": member.vote,
        "first_index": member.first_index,
        "last_index": member.last_index,
        "snapshot_index": member.snapshot.index if member.snapshot is not None else 0,
    }


def _segments(files: Files, path: str) -> Iterator[tuple[str, int, bytes]]:
    for name in files.listdir(f"{path}/wal"):
        sequence = segment_sequence(name)
        if sequence is not None:
            try:
                handle = files.open(f"{path}/wal/{name}", write=False)
            except FileNotFoundError:
                continue
            try:
                data = files.pread(handle, files.size(handle), 0)
            finally:
                files.close(handle)
            yield name, sequence, data


def _known_header(path: str, name: str, data: bytes) -> SegmentHeader | None:
    header, _ = read_header(data)
    if header is not None and header.format > FORMAT:
        raise StorageTooNew(
            f"{path}/wal/{name} has format {header.format}; this version reads up to {FORMAT}: use the newer raftfleet"
            " that wrote it"
        )
    return header


def _instance(files: Files, path: str) -> int:
    for name in files.listdir(f"{path}/wal"):
        if segment_sequence(name) is not None:
            try:
                handle = files.open(f"{path}/wal/{name}", write=False)
            except FileNotFoundError:
                continue
            try:
                header, _ = read_header(files.pread(handle, DATA_START, 0))
            finally:
                files.close(handle)
            if header is not None:
                return header.instance
    raise StorageDamaged(f"{path}/wal holds no segment whose header can be read")


def _header_row(header: SegmentHeader | None, whole: bool) -> dict[str, Any]:
    if header is None:
        return {"state": "unused"}
    return {
        "state": "in use" if whole else "header damaged",
        "format": header.format,
        "readable": header.format <= FORMAT,
        "instance": header.instance,
        "sequence": header.sequence,
        "first_batch": header.first_batch,
        "fleet": header.fleet.hex(),
    }


def _snapshot_row(files: Files, path: str) -> dict[str, Any] | None:
    try:
        if parse_name(os.path.basename(path)) is None:
            handle = files.open(path, write=False)
            try:
                return {"state": "put aside or temporary", "size_bytes": files.size(handle)}
            finally:
                files.close(handle)
        info, meta = read_info(files, path)
    except FileNotFoundError:
        return None
    except StorageDamaged as error:
        return {"state": "damaged", "why": str(error)}
    row = {"uid": info.uid, "index": info.index, "term": info.term, "generation": info.generation}
    return {"state": "whole", **row, "size_bytes": info.size_bytes, **meta}


def _record_row(record: Record, data: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": KIND_NAMES.get(record.kind, str(record.kind)), "length": record.length}
    if record.uid != SHARD_UID:
        row["uid"] = record.uid
    try:
        _take_apart(row, record, data)
    except ValueError as error:
        row["problem"] = f"cannot be understood: {error}"
    return row


def _take_apart(row: dict[str, Any], record: Record, data: bool) -> None:
    """Add what the record says. Raises ValueError if that cannot be told."""
    kind = record.kind
    if kind in (ENTRIES, FORWARD):
        row.update(term=record.term, first_index=record.index, count=record.count)
        if data:
            row["entries"] = [[e.kind, base64.b64encode(e.data).decode()] for e in unpack_entries(record)]
    elif kind in (VOTE, TOMBSTONE):
        row.update(term=record.term, vote=record.index, life=unpack_life(record))
    elif kind == GROUP:
        name, config, voters, generation, facts = unpack_group(record.body)
        row.update(name=name, config=config, first_voters=voters, life=record.index, generation=generation, facts=facts)
    elif kind == NOTE:
        key, value = unpack_note(record.body)
        row.update(key=key, value=base64.b64encode(value).decode())
    else:
        row.update(term=record.term, index=record.index)

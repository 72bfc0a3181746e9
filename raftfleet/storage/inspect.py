"""Looks at a shard's directory, or a copy of one, without changing, locking or even owning it.

For ``raftfleet-node wal ls|dump|verify DIR``. Rows are plain dicts that JSON can carry; a segment is read at a time and
rows are made one by one, so a log of any size can be looked at. ``verify`` judges as a start would.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import msgpack

from raftfleet.storage.base import StorageDamaged
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
    read_header,
    unpack_entries,
    unpack_life,
)
from raftfleet.storage.recovery import Replay
from raftfleet.storage.scan import Batch, Lost, scan_segment
from raftfleet.storage.snapshots import read_info
from raftfleet.storage.wal import segment_sequence


def list_directory(path: str, files: Files | None = None) -> Iterator[dict[str, Any]]:
    """One row per segment and snapshot: what its header says."""
    files = files or OsFiles()
    for name, _sequence, data in _segments(files, path):
        header, whole = read_header(data)
        yield {"file": f"wal/{name}", "type": "segment", "size_bytes": len(data), **_header_row(header, whole)}
    for folder in ("snapshots", "archive"):
        for name in files.listdir(f"{path}/{folder}"):
            yield {"file": f"{folder}/{name}", "type": "snapshot", **_snapshot_row(files, f"{path}/{folder}/{name}")}


def dump(
    path: str, *, uid: int | None = None, data: bool = False, files: Files | None = None
) -> Iterator[dict[str, Any]]:
    """One row per record, in order; ``uid``: only this group's; ``data``: with the entries' bytes, in base64."""
    files = files or OsFiles()
    instance = _instance(files, path)
    for name, sequence, content in _segments(files, path):
        header, _ = read_header(content)
        for item in scan_segment(content, sequence, instance, header.first_batch if header is not None else 0):
            if isinstance(item, Batch):
                for _, offset, record in item.records:
                    if uid is None or record.uid == uid:
                        yield {"segment": name, "offset": offset, "batch": item.number, **_record_row(record, data)}
                for bad in item.bad:
                    if uid is None or bad.uid == uid:
                        row = {"kind": "damaged", "uid": bad.uid, "length": bad.length}
                        yield {"segment": name, "offset": bad.offset, "batch": item.number, **row}
            elif isinstance(item, Lost):
                row = {"kind": "lost", "batches": [item.first, item.stop - 1], "bytes": item.end - item.start}
                yield {"segment": name, "offset": item.start, **row}
            elif item.end > item.start:
                yield {"segment": name, "offset": item.start, "kind": "tail", "bytes": item.end - item.start}


def verify(path: str, files: Files | None = None) -> dict[str, Any]:
    """Read everything as a start would and say what would be found: ``ok`` if nothing is damaged."""
    files = files or OsFiles()
    replay = Replay(_instance(files, path))
    for _name, sequence, data in _segments(files, path):
        header, whole = read_header(data)
        if header is not None or data.strip(b"\0"):
            first_batch = header.first_batch if header is not None else 0
            replay.take_segment(data, sequence, first_batch, header_whole=whole)
    replay.finish()
    infos: dict[int, list[Any]] = {}
    problems: dict[int, list[str]] = {}
    for name in files.listdir(f"{path}/snapshots"):
        if name.endswith(".snap"):
            try:
                info, _ = read_info(files, f"{path}/snapshots/{name}")
                infos.setdefault(info.uid, []).append(info)
            except StorageDamaged as error:
                problems.setdefault(int(name[:16], 16), []).append(str(error))
    rows = []
    for uid, group in sorted(replay.groups.items()):
        snapshots = sorted(infos.get(uid, []), key=lambda info: info.generation, reverse=True)
        member, _ = replay.member(group, snapshots, problems.get(uid, []))
        if member is not None:
            rows.append(
                {
                    "uid": uid,
                    "name": member.name,
                    "life": member.life,
                    "term": member.term,
                    "vote": member.vote,
                    "first_index": member.first_index,
                    "last_index": member.last_index,
                    "snapshot_index": member.snapshot.index if member.snapshot is not None else 0,
                }
            )
    return {
        "ok": not replay.damaged,
        "instance": replay.instance,
        "groups": rows,
        "tombstones": sorted(replay.tombstones),
        "damaged": [str(damage) for damage in replay.damaged],
        "torn_tail_bytes": replay.cut_bytes,
    }


def _segments(files: Files, path: str) -> Iterator[tuple[str, int, bytes]]:
    for name in files.listdir(f"{path}/wal"):
        sequence = segment_sequence(name)
        if sequence is not None:
            handle = files.open(f"{path}/wal/{name}", write=False)
            try:
                yield name, sequence, files.pread(handle, files.size(handle), 0)
            finally:
                files.close(handle)


def _instance(files: Files, path: str) -> int:
    for name in files.listdir(f"{path}/wal"):
        if segment_sequence(name) is not None:
            handle = files.open(f"{path}/wal/{name}", write=False)
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


def _snapshot_row(files: Files, path: str) -> dict[str, Any]:
    try:
        info, meta = read_info(files, path)
    except StorageDamaged as error:
        return {"state": "damaged", "why": str(error)}
    row = {"uid": info.uid, "index": info.index, "term": info.term, "generation": info.generation}
    return {"state": "whole", **row, "size_bytes": info.size_bytes, **meta}


def _record_row(record: Record, data: bool) -> dict[str, Any]:
    kind = record.kind
    row: dict[str, Any] = {"kind": KIND_NAMES.get(kind, str(kind)), "length": record.length}
    if record.uid != SHARD_UID:
        row["uid"] = record.uid
    if kind in (ENTRIES, FORWARD):
        row.update(term=record.term, first_index=record.index, count=record.count)
        if data:
            row["entries"] = [[e.kind, base64.b64encode(e.data).decode()] for e in unpack_entries(record)]
    elif kind in (VOTE, TOMBSTONE):
        row.update(term=record.term, vote=record.index, life=unpack_life(record))
    elif kind == GROUP:
        name, config, voters, generation = msgpack.unpackb(record.body, strict_map_key=False)
        row.update(name=name, config=config, first_voters=voters, life=record.index, generation=generation)
    elif kind == NOTE:
        key, value = msgpack.unpackb(record.body)
        row.update(key=key, value=base64.b64encode(value).decode())
    else:
        row.update(term=record.term, index=record.index)
    return row

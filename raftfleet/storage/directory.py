"""Whose directory is this? Answers before anything in it is changed, and takes the lock.

A directory belongs to a node and a shard instance, and from the moment that it is known to a fleet. All three stand in
the header of every segment, so there is no other file to lose.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

from raftfleet.storage.base import (
    NO_FLEET,
    ForeignStorage,
    StorageDamaged,
    StorageFull,
    StorageLocked,
    StoragePoisoned,
    StorageTooNew,
)
from raftfleet.storage.files import Files
from raftfleet.storage.records import DATA_START, FORMAT, MARK_MAGIC, SegmentHeader, node_hash, read_header
from raftfleet.storage.wal import NO_SPACE, segment_sequence


@contextlib.contextmanager
def failures_named(path: str) -> Iterator[None]:
    """OSErrors as storage errors that name the directory."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise StorageFull(f"no space left in {path}: {error}") from error
        raise StoragePoisoned(f"{path} cannot be used: {error}") from error


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Recovery makes millions of tuples and no cycles: with the collector at work it takes 2.8 times as long."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_all(files: Files, path: str) -> bytes:
    """A whole file."""
    handle = files.open(path, write=False)
    try:
        return files.pread(handle, files.size(handle), 0)
    finally:
        files.close(handle)


def claim(files: Files, path: str, node: str, fleet: bytes) -> tuple[int, SegmentHeader | None]:
    """Lock the directory, make sure that it is ours; returns the lock and the newest segment's header (None: new)."""
    names = files.listdir(path)
    strange = sorted(set(names) - {"LOCK", "wal", "snapshots", "archive"})
    if strange:
        raise ForeignStorage(f"{path} is not a data directory of raftfleet: it holds {', '.join(strange[:3])}")
    files.mkdir(path)
    if not names:
        files.sync_dir(os.path.dirname(path) or ".")
    lock = files.open(f"{path}/LOCK", create=True)
    try:
        if not files.lock(lock):
            raise StorageLocked(f"another process uses {path}")
        return lock, _identity(files, path, node, fleet)
    except BaseException:
        files.close(lock)
        raise


def check_owner(files: Files, path: str, node: str) -> None:
    """Refuse a shard's directory that :func:`claim` would refuse, without a lock and without touching anything.

    Raises:
        ForeignStorage, StorageTooNew, StorageDamaged: as :func:`claim`.
    """
    _identity(files, path, node, NO_FLEET)


def _identity(files: Files, path: str, node: str, fleet: bytes) -> SegmentHeader | None:
    newest = None
    used = []
    for name in files.listdir(f"{path}/wal"):
        if segment_sequence(name) is None:
            continue
        handle = files.open(f"{path}/wal/{name}", write=False)
        try:
            head = files.pread(handle, DATA_START, 0)
        finally:
            files.close(handle)
        header, _ = read_header(head)
        if header is None:
            if head.strip(b"\0"):
                used.append(name)
            continue
        if header.format > FORMAT:
            raise StorageTooNew(
                f"{path} was written by a newer raftfleet (format {header.format}); this version reads up to {FORMAT}:"
                " install the newer one again, or choose another --data-dir"
            )
        if header.node_hash != node_hash(node):
            raise ForeignStorage(
                f"{path} belongs to another node than {node!r} (was the node renamed, or the disk moved?): give the"
                " node its former --name, or choose another --data-dir"
            )
        if fleet != NO_FLEET and header.fleet not in (NO_FLEET, fleet):
            raise ForeignStorage(
                f"{path} belongs to fleet {header.fleet.hex()}, this node to fleet {fleet.hex()}: put back the"
                " directory that belongs here, or choose another --data-dir"
            )
        if newest is not None and newest.instance != header.instance:
            raise ForeignStorage(
                f"{path}/wal holds segments of two shards, {newest.instance} and {header.instance}: files of another"
                " directory were put there; take out what does not belong"
            )
        newest = header
    if newest is None:
        rest = [*used, *files.listdir(f"{path}/snapshots")]
        if rest and not _is_unborn(files, path, used):
            raise StorageDamaged(
                f"{path} holds {rest[0]}, but no segment's header says whose it is: put a copy of the directory"
                " back, or move it away: the shard begins as a new one then, and its groups come back from other nodes"
            )
    return newest


def _is_unborn(files: Files, path: str, used: list[str]) -> bool:
    """Whether all there is are the remains of the very first sync, which never returned: nobody relies on them."""
    if files.listdir(f"{path}/snapshots") or len(used) != 1 or segment_sequence(used[0]) != 1:
        return False
    # The first batch is always empty: whatever anybody relies on came with a second mark.
    return read_all(files, f"{path}/wal/{used[0]}").count(MARK_MAGIC) <= 1

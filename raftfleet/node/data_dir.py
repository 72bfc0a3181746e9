"""A node's data directory: whose it is, that only one node uses it, and where each process finds its part.

::

    DIR/LOCK                 flock, held by the supervisor and, through it, by each of its children
    DIR/layout               what the directory is (JSON): its format, the node's name, its number of workers, and of
                             the shards that had a directory when that number was given
    DIR/founding             what the manager must remember (raftfleet.workers.manager)
    DIR/shard-0 ...          one per shard (raftfleet.storage.store)
    DIR/former/shard-I-N     what instance N of shard I held when the node left its fleet; only the newest per shard

Everything is checked before the first child starts, and nothing is changed in a directory that is refused. A shard's
own directory says besides which node, fleet and shard it belongs to: one that was swapped with another is refused when
the shard opens it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import time
from pathlib import Path
from typing import Any

from raftfleet.errors import NodeError
from raftfleet.storage.base import StorageError
from raftfleet.storage.directory import check_owner
from raftfleet.storage.files import OsFiles

FORMAT = 1
LAYOUT_NAME = "layout"
LOCK_NAME = "LOCK"
FORMER_NAME = "former"
LOCK_WAIT_S = 5.0
_KNOWN_NAMES = {LAYOUT_NAME, LAYOUT_NAME + ".new", LOCK_NAME, FORMER_NAME, "founding", "founding.new", "lost+found"}
_SHARD = re.compile(r"shard-(0|[1-9]\d*)")


class DataDirRefused(NodeError):
    """The data directory is not this node's, or is in use. It was left as it is."""


def shard_dir(data_dir: Path, index: int) -> Path:
    """The directory of shard ``index``."""
    return data_dir / f"shard-{index}"


class DataDir:
    """A data directory that this process has locked.

    Attributes:
        shard_count: shards that must run: as many as there are to be workers, or as have a directory, if that is more
            (:mod:`raftfleet.fleet.manager_resharding`).
        workers_before: with how many workers the node last ran; 0: never.
    """

    def __init__(self, path: Path, lock_fd: int, shard_count: int, workers_before: int) -> None:
        self.path = path
        self.shard_count = shard_count
        self.workers_before = workers_before
        self._lock_fd = lock_fd

    @classmethod
    def acquire(cls, path: Path, *, node: str, workers: int, wait_s: float = LOCK_WAIT_S) -> DataDir:
        """Create the directory if need be, lock it, and make sure that it is this node's.

        Args:
            wait_s: how long to wait for the processes of a node that is ending.

        Raises:
            DataDirRefused: another node's, or in use, or of another shape. Nothing was changed.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_owner(path)
            strange = sorted(
                name for name in os.listdir(path) if name not in _KNOWN_NAMES and not _SHARD.fullmatch(name)
            )
            if strange:
                raise DataDirRefused(
                    f"{path} is not a data directory of raftfleet: it holds {', '.join(strange[:3])}; "
                    "name an empty one, or one of its own"
                )
            lock_fd = _lock(path, wait_s)
            try:
                _check_shards(path, node)
                workers_before = _check_layout(path, node, workers)
            except BaseException:
                os.close(lock_fd)
                raise
        except OSError as error:
            raise DataDirRefused(
                f"{path} cannot be used: {error.strerror}: make it a directory of this user's, or name another"
                " --data-dir"
            ) from error
        shards = shard_indexes(path)
        return cls(path, lock_fd, max(workers, shards[-1] + 1 if shards else 0), workers_before)

    def release(self) -> None:
        """Let others use it, once the children are gone too."""
        os.close(self._lock_fd)


def _check_shards(path: Path, node: str) -> None:
    """A shard's directory that its process would refuse keeps the whole node from starting and changing anything."""
    for index in shard_indexes(path):
        try:
            check_owner(OsFiles(), str(shard_dir(path, index)), node)
        except StorageError as error:
            raise DataDirRefused(str(error)) from error


def _check_owner(path: Path) -> None:
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise DataDirRefused(f"{path} belongs to user {status.st_uid}, this process is user {os.geteuid()}")
    if status.st_mode & 0o022:
        raise DataDirRefused(
            f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):o}): chmod 700 it, or use another"
        )


def _lock(path: Path, wait_s: float) -> int:
    lock_fd = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock_fd
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK or time.monotonic() >= deadline:
                os.close(lock_fd)
                raise DataDirRefused(f"another node uses {path}: stop it, or choose another --data-dir") from error
        time.sleep(0.02)


# -------------------------------------------------------------------- layout


def shard_indexes(path: Path) -> list[int]:
    """Indexes of the shards that have a directory."""
    return sorted(int(found[1]) for name in os.listdir(path) if (found := _SHARD.fullmatch(name)))


def read_layout(path: Path) -> dict[str, Any] | None:
    """What the directory says of itself; None if it is new.

    Raises:
        DataDirRefused: it cannot be read, or a newer version wrote it.
    """
    try:
        data = (path / LAYOUT_NAME).read_bytes()
    except FileNotFoundError:
        return None
    try:
        layout = json.loads(data.decode())
        form, node, workers = layout["format"], layout["node"], layout["workers"]
        shards = layout.get("shards", workers)
        if not (type(form) is int and type(node) is str and type(workers) is int and type(shards) is int):
            raise ValueError("a wrong type")
    except (ValueError, KeyError, TypeError) as error:
        raise DataDirRefused(
            f"{path / LAYOUT_NAME} is damaged ({error}): remove it, and it is made again from what else is there"
        ) from error
    if form > FORMAT:
        raise DataDirRefused(
            f"{path} was written by a newer raftfleet (format {form}); this version reads up to {FORMAT}: install the"
            " newer one again, or choose another --data-dir"
        )
    return {"format": form, "node": node, "workers": workers, "shards": shards}


def write_layout(path: Path, *, node: str, workers: int, shards: int) -> None:
    """Replace what the directory says of itself; durable when this returns."""
    temporary = path / (LAYOUT_NAME + ".new")
    with open(temporary, "w", opener=_open_private) as file:
        json.dump({"format": FORMAT, "node": node, "workers": workers, "shards": shards}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path / LAYOUT_NAME)
    sync_directory(path)


def _check_layout(path: Path, node: str, workers: int) -> int:
    """Refuse another node's directory, note the number of workers; returns the number that it was before, 0 if new.

    ``shards`` in the layout tells a shard that is new, since there are more workers, from one whose directory was lost:
    so many had a directory when the number of workers last changed, or at a later start.
    """
    layout = read_layout(path)
    there = shard_indexes(path)
    shards = there[-1] + 1 if there else 0
    if layout is None:
        layout = {"node": node, "workers": 0, "shards": 0}
    if layout["node"] != node:
        raise DataDirRefused(
            f"{path} belongs to node {layout['node']!r}, this is {node!r}: give --name {layout['node']}, or another "
            "--data-dir"
        )
    before: int = layout["workers"]
    if before == workers:
        shards = max(shards, min(layout["shards"], workers))
        if not layout["shards"] and (path / "founding").exists():
            shards = max(shards, workers)  # at the first start there was none, but all of them came up then
    if (before, layout["shards"]) != (workers, shards):
        write_layout(path, node=node, workers=workers, shards=shards)
    return before


def was_there(data_dir: Path, index: int) -> bool:
    """Whether shard ``index`` had a directory before this start of the node, as far as the layout tells."""
    layout = read_layout(data_dir)
    return layout is not None and index < layout["shards"]


# -------------------------------------------------------------------- leaving a fleet


def retire_shard(data_dir: Path, index: int, instance: int) -> Path:
    """Put a shard's directory aside: its instance has left its fleet and must never come back. Durable on return."""
    former = data_dir / FORMER_NAME
    former.mkdir(mode=0o700, exist_ok=True)
    target = former / f"shard-{index}-{instance:016x}"
    for older in former.glob(f"shard-{index}-*"):
        shutil.rmtree(older, ignore_errors=True)
    os.rename(shard_dir(data_dir, index), target)
    sync_directory(former)
    sync_directory(data_dir)
    return target


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)

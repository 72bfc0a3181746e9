"""A disk in memory with the faults of real ones, for storage that goes through ``raftfleet.storage.files.Files``.

What is written is seen at once by whoever reads, as in the kernel's page cache, but survives :meth:`FakeFiles.crash`
only if an fsync returned, or by luck: every 512-byte sector of un-synced writes, every un-synced change of size and
every un-synced change of a name survives or not on its own, so writes come back lost, torn and out of order. A failed
fsync leaves what it should have written looking clean: a later fsync returns at once without writing it.

Every call is counted (``calls``); :attr:`FakeFiles.plan` is asked before each and may answer with a fault::

    disk.plan = lambda number, name: EIO if number == 17 else None

Faults: an errno to raise (nothing was done), ``TEAR`` (a write takes only half of the bytes, then the disk is full),
``CRASH`` (the power goes: :class:`PowerLoss` is raised out of this call and every later one until :meth:`crash`).
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable

SECTOR_BYTES = 512
EIO = errno.EIO
ENOSPC = errno.ENOSPC
CRASH = -1
TEAR = -2


class PowerLoss(BaseException):
    """The simulated machine lost power: not an Exception, so that no handler of the code under test takes it."""


class _File:
    """Contents now, contents on the platter, and the un-synced difference as a list of (offset, bytes) and sizes."""

    def __init__(self) -> None:
        self.now = bytearray()
        self.durable = bytearray()
        self.unsynced: list[tuple[int, bytes]] = []  # (-size - 1, b"") stands for a change of size

    def apply(self, target: bytearray, offset: int, data: bytes) -> None:
        if offset < 0:
            size = -offset - 1
            if len(target) < size:
                target.extend(bytes(size - len(target)))
            return
        if len(target) < offset + len(data):
            target.extend(bytes(offset + len(data) - len(target)))
        target[offset : offset + len(data)] = data


class FakeFiles:
    """One machine's disk. Satisfies :class:`raftfleet.storage.files.Files`."""

    def __init__(self, *, capacity_bytes: int = 1 << 40) -> None:
        self.capacity_bytes = capacity_bytes
        self.calls = 0
        self.log: list[str] = []
        self.plan: Callable[[int, str], int | None] = lambda number, name: None
        self.names: dict[str, _File | None] = {"/": None}  # None: a directory
        self.durable_names: dict[str, _File | None] = {"/": None}
        self.name_changes: list[tuple[str, str, str]] = []  # ("link"|"unlink"|"rename", path, other path)
        self._linked: dict[tuple[str, str], _File | None] = {}
        self.handles: dict[int, tuple[str, _File]] = {}
        self.locks: dict[int, str] = {}
        self.next_handle = 3
        self.is_off = False

    # ------------------------------------------------------------------ faults

    def _call(self, name: str, path: str) -> int | None:
        if self.is_off:
            raise PowerLoss
        self.calls += 1
        self.log.append(f"{name} {path}")
        fault = self.plan(self.calls, name)
        if fault == CRASH:
            self.is_off = True
            raise PowerLoss
        if fault is not None and fault > 0:
            raise OSError(fault, f"injected in {name}", path)
        return fault

    def crash(self, rng: random.Random | None = None, *, keep: float = 0.5) -> None:
        """Lose power and come back: each un-synced piece survives with probability ``keep`` (0 and 1 are certain)."""
        dice = (rng or random.Random(0)).random
        self.is_off = False
        self.handles = {}
        self.locks = {}
        names = dict(self.durable_names)
        for change, path, other in self.name_changes:
            if dice() < keep:
                if change == "unlink":
                    names.pop(path, None)
                elif change == "link":
                    names.setdefault(path, self._linked[path, other])
                else:
                    names.pop(path, None)
                    names[other] = self._linked[path, other]
        while True:  # what lies in a directory whose own name did not survive is out of reach
            lost = [name for name in names if name != "/" and os.path.dirname(name) not in names]
            if not lost:
                break
            for name in lost:
                del names[name]
        self.names = names
        self.durable_names = dict(names)
        self.name_changes = []
        self._linked = {}
        for file in names.values():
            if file is None:
                continue
            for offset, data in file.unsynced:
                if offset < 0:
                    if dice() < keep:
                        file.apply(file.durable, offset, data)
                    continue
                at = offset
                while at < offset + len(data):
                    stop = min((at // SECTOR_BYTES + 1) * SECTOR_BYTES, offset + len(data))
                    if dice() < keep:
                        file.apply(file.durable, at, data[at - offset : stop - offset])
                    at = stop
            file.unsynced = []
            file.now = bytearray(file.durable)

    def kill(self) -> None:
        """The process dies, the machine lives on: handles and locks go, the page cache stays."""
        self.is_off = False
        self.handles = {}
        self.locks = {}

    def used_bytes(self) -> int:
        """Space taken by all files."""
        return sum(len(file.now) for file in self.names.values() if file is not None)

    # ------------------------------------------------------------------ Files

    def open(self, path: str, *, create: bool = False, write: bool = True) -> int:
        """See Files."""
        self._call("open", path)
        file = self.names.get(path)
        if file is None:
            if path in self.names or not create:
                raise FileNotFoundError(errno.ENOENT, "no such file", path)
            file = _File()
            self._link(path, file)
        self.next_handle += 1
        self.handles[self.next_handle] = (path, file)
        return self.next_handle

    def _link(self, path: str, file: _File | None) -> None:
        if os.path.dirname(path) not in self.names:
            raise FileNotFoundError(errno.ENOENT, "no such directory", path)
        self.names[path] = file
        self.name_changes.append(("link", path, ""))
        self._linked[path, ""] = file

    def close(self, handle: int) -> None:
        """See Files. Never fails: the kernel's close loses nothing that fsync had not lost before."""
        self.handles.pop(handle, None)
        self.locks.pop(handle, None)

    def size(self, handle: int) -> int:
        """See Files."""
        return len(self.handles[handle][1].now)

    def pread(self, handle: int, count: int, offset: int) -> bytes:
        """See Files."""
        path, file = self.handles[handle]
        self._call("pread", path)
        return bytes(file.now[offset : offset + count])

    def pwrite(self, handle: int, data: bytes | memoryview, offset: int) -> int:
        """See Files."""
        path, file = self.handles[handle]
        fault = self._call("pwrite", path)
        data = bytes(data)
        if fault == TEAR:
            if len(data) < 2:
                raise OSError(ENOSPC, "injected in pwrite", path)
            data = data[: len(data) // 2]
        grown = offset + len(data) - len(file.now)
        if grown > 0 and self.used_bytes() + grown > self.capacity_bytes:
            raise OSError(ENOSPC, "no space left", path)
        file.apply(file.now, offset, data)
        file.unsynced.append((offset, data))
        return len(data)

    def fallocate(self, handle: int, size_bytes: int) -> None:
        """See Files."""
        path, file = self.handles[handle]
        self._call("fallocate", path)
        if self.used_bytes() + max(size_bytes - len(file.now), 0) > self.capacity_bytes:
            raise OSError(ENOSPC, "no space left", path)
        file.apply(file.now, -size_bytes - 1, b"")
        file.unsynced.append((-size_bytes - 1, b""))

    def fdatasync(self, handle: int) -> None:
        """See Files."""
        path, file = self.handles[handle]
        try:
            self._call("fdatasync", path)
        except OSError:
            file.unsynced = []  # Linux marks the pages clean: they are read back, and never written
            raise
        # Only what is still known as un-synced reaches the platter: pages of a failed fsync do not.
        for offset, data in file.unsynced:
            file.apply(file.durable, offset, data)
        file.unsynced = []

    def sync_dir(self, path: str) -> None:
        """See Files."""
        self._call("sync_dir", path)
        rest = []
        for change, name, other in self.name_changes:
            if path not in (os.path.dirname(name), os.path.dirname(other)):
                rest.append((change, name, other))
            elif change == "unlink":
                self.durable_names.pop(name, None)
            elif change == "link":
                self.durable_names[name] = self._linked[name, other]
            else:
                self.durable_names.pop(name, None)
                self.durable_names[other] = self._linked[name, other]
        self.name_changes = rest

    def rename(self, old: str, new: str) -> None:
        """See Files."""
        self._call("rename", old)
        if old not in self.names:
            raise FileNotFoundError(errno.ENOENT, "no such file", old)
        file = self.names[new] = self.names.pop(old)
        self.name_changes.append(("rename", old, new))
        self._linked[old, new] = file

    def unlink(self, path: str) -> None:
        """See Files."""
        self._call("unlink", path)
        if path not in self.names:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        del self.names[path]
        self.name_changes.append(("unlink", path, ""))

    def mkdir(self, path: str) -> None:
        """See Files."""
        self._call("mkdir", path)
        if path not in self.names:
            self._link(path, None)

    def listdir(self, path: str) -> list[str]:
        """See Files."""
        self._call("listdir", path)
        return sorted(os.path.basename(name) for name in self.names if os.path.dirname(name) == path and name != "/")

    def lock(self, handle: int) -> bool:
        """See Files."""
        path = self.handles[handle][0]
        self._call("lock", path)
        if path in self.locks.values():
            return False
        self.locks[handle] = path
        return True

    def free_bytes(self, path: str) -> int:
        """See Files."""
        self._call("free_bytes", path)
        return self.capacity_bytes - self.used_bytes()

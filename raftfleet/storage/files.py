"""The few file calls that storage makes, one method each, so that tests can fail, tear or crash every single one.

``OsFiles`` is the real thing; :class:`raftfleet.testing.disk.FakeFiles` the one with faults. Everything raises
``OSError`` as the kernel does. Paths are str; a handle is an int that only its own layer understands.
"""

from __future__ import annotations

import fcntl
import os
from typing import Protocol


class Files(Protocol):
    """File calls as storage needs them."""

    def open(self, path: str, *, create: bool = False, write: bool = True) -> int:
        """Open, or create an empty file if there is none and ``create`` is set. Not truncated."""

    def close(self, handle: int) -> None:
        """Close. Gives up a lock taken with :meth:`lock`."""

    def size(self, handle: int) -> int:
        """Bytes in the file."""

    def pread(self, handle: int, count: int, offset: int) -> bytes:
        """Up to ``count`` bytes; fewer only at the end of the file."""

    def pwrite(self, handle: int, data: bytes | memoryview, offset: int) -> int:
        """Write; returns how many bytes were taken, which may be fewer (a disk that fills up)."""

    def fallocate(self, handle: int, size_bytes: int) -> None:
        """Reserve and zero-extend the file to ``size_bytes``."""

    def fdatasync(self, handle: int) -> None:
        """Make the file's data, and the metadata needed to read it, durable."""

    def sync_dir(self, path: str) -> None:
        """Make the names in a directory durable."""

    def rename(self, old: str, new: str) -> None:
        """Rename, atomically, over whatever ``new`` was."""

    def unlink(self, path: str) -> None:
        """Remove a name."""

    def mkdir(self, path: str) -> None:
        """Make a directory for its owner only; one that is there already is fine."""

    def listdir(self, path: str) -> list[str]:
        """Names in a directory, sorted; none if the directory does not exist."""

    def lock(self, handle: int) -> bool:
        """Take an exclusive lock that lives as long as the open file; False if another holds it."""

    def free_bytes(self, path: str) -> int:
        """Space left for an unprivileged process."""


class OsFiles:
    """The kernel's."""

    def open(self, path: str, *, create: bool = False, write: bool = True) -> int:
        """See :class:`Files`."""
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        return os.open(path, flags, 0o600)

    def close(self, handle: int) -> None:
        """See :class:`Files`."""
        os.close(handle)

    def size(self, handle: int) -> int:
        """See :class:`Files`."""
        return os.fstat(handle).st_size

    def pread(self, handle: int, count: int, offset: int) -> bytes:
        """See :class:`Files`."""
        data = os.pread(handle, count, offset)
        if len(data) in (0, count):
            return data
        parts = [data]
        got = len(data)
        while got < count:  # one call gives at most 2 GiB
            data = os.pread(handle, count - got, offset + got)
            if not data:
                break
            parts.append(data)
            got += len(data)
        return b"".join(parts)

    def pwrite(self, handle: int, data: bytes | memoryview, offset: int) -> int:
        """See :class:`Files`."""
        return os.pwrite(handle, data, offset)

    def fallocate(self, handle: int, size_bytes: int) -> None:
        """See :class:`Files`."""
        os.posix_fallocate(handle, 0, size_bytes)

    def fdatasync(self, handle: int) -> None:
        """See :class:`Files`."""
        os.fdatasync(handle)

    def sync_dir(self, path: str) -> None:
        """See :class:`Files`."""
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, old: str, new: str) -> None:
        """See :class:`Files`."""
        os.rename(old, new)

    def unlink(self, path: str) -> None:
        """See :class:`Files`."""
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        """See :class:`Files`."""
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not os.path.isdir(path):
                raise

    def listdir(self, path: str) -> list[str]:
        """See :class:`Files`."""
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []

    def lock(self, handle: int) -> bool:
        """See :class:`Files`."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def free_bytes(self, path: str) -> int:
        """See :class:`Files`."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

"""A large snapshot on its way in, written as it comes; and one on its way out, read as it goes.

The file of an arrival has the layout of a snapshot (:mod:`raftfleet.storage.snapshots`), under the name
``incoming-UID-NUMBER.tmp`` until all of it is there: then it gets its header, is made durable and renamed. What a crash
leaves of it is removed by the next start.

Rules:

* The loop writes it, so no single call may take long: what was written is made durable every ``SYNC_BYTES``, and the
  last sync has no more than that to do.
* Only ``finish`` makes a snapshot of it, and it gets its generation then: a higher one than any of an earlier index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack

from raftfleet.core.incoming import Key
from raftfleet.storage.base import SnapshotInfo
from raftfleet.storage.files import Files
from raftfleet.storage.records import crc_extend
from raftfleet.storage.snapshots import HEADER_BYTES, pack_header, read_info, snapshot_name, write_all

SYNC_BYTES = 1 << 20
"""A few milliseconds of a disk's time."""


class ArrivalFile:
    """Satisfies :class:`raftfleet.core.incoming.Arrival`.

    Args:
        path: where it is written. Nothing is there yet, and nothing is done before the first :meth:`write`.
        on_discard: called once with the path of a file that is not wanted any more, to remove it later.

    Attributes:
        is_spoilt: a sync of it failed: nobody knows what of it is durable, and no later sync would tell (DESIGN 5.14).
    """

    def __init__(
        self, files: Files, path: str, key: Key, meta: dict[str, Any], on_discard: Callable[[str], None]
    ) -> None:
        self.key = key
        self.path = path
        self.size_bytes = 0
        self._files = files
        self._meta: bytes = msgpack.packb(meta)
        self._start = HEADER_BYTES + len(self._meta)
        self._crc = crc_extend(0, self._meta)
        self.is_spoilt = False
        self._handle = -1
        self._synced_bytes = 0
        self._on_discard = on_discard

    @property
    def is_begun(self) -> bool:
        """Whether there is a file."""
        return self._handle != -1

    def write(self, data: bytes) -> None:
        """Write what came next. After an error of no room it may be called again with the same.

        Raises:
            OSError: of the disk.
        """
        if not self.is_begun:
            self._handle = self._files.open(self.path, create=True)
        write_all(self._files, self._handle, data, self._start + self.size_bytes)
        self.size_bytes += len(data)
        self._crc = crc_extend(self._crc, data)
        if self.size_bytes - self._synced_bytes >= SYNC_BYTES:
            self._sync()

    def _sync(self) -> None:
        self.is_spoilt = True
        self._files.fdatasync(self._handle)
        self.is_spoilt = False
        self._synced_bytes = self.size_bytes

    def read(self) -> bytes:
        """See :class:`raftfleet.core.incoming.Arrival`."""
        return self._files.pread(self._handle, self.size_bytes, self._start)

    def finish(self, folder: str, uid: int, index: int, term: int, generation: int) -> SnapshotInfo:
        """Make a snapshot of it, durable when this returns.

        Raises:
            OSError: of the disk. Unless it :attr:`is_spoilt`, it may be called again.
        """
        assert self.size_bytes == self.key.size_bytes, (self.size_bytes, self.key)
        files = self._files
        header = pack_header(uid, index, term, generation, self._meta, self.size_bytes, self._crc)
        write_all(files, self._handle, header + self._meta, 0)
        self._sync()
        path = f"{folder}/{snapshot_name(uid, generation)}"
        files.rename(self.path, path)
        self._close()
        self.is_spoilt = True  # until its name is durable too
        files.sync_dir(folder)
        self.is_spoilt = False
        return SnapshotInfo(uid, index, term, generation, self.size_bytes, path)

    def discard(self) -> None:
        """See :class:`raftfleet.core.incoming.Arrival`."""
        if self.is_begun:
            self._close()
            self._on_discard(self.path)

    def _close(self) -> None:
        self._files.close(self._handle)
        self._handle = -1


class StoredSource:
    """A stored snapshot that is sent. Satisfies :class:`raftfleet.core.sending.Source`.

    It holds the file open, so that it can be read to its end although the store may remove its name meanwhile. Like a
    file object it closes it when the last transfer that reads it lets go.
    """

    def __init__(self, files: Files, info: SnapshotInfo, crc: int) -> None:
        self.index = info.index
        self.term = info.term
        self.size_bytes = info.size_bytes
        self.crc = crc
        self._files = files
        self._handle = files.open(info.path, write=False)
        self._start = files.size(self._handle) - info.size_bytes

    def read(self, offset: int, count: int) -> bytes:
        """See :class:`raftfleet.core.sending.Source`."""
        return self._files.pread(self._handle, count, self._start + offset)

    def __del__(self) -> None:
        handle = getattr(self, "_handle", -1)
        if handle != -1:
            self._files.close(handle)


def open_source(files: Files, info: SnapshotInfo) -> StoredSource | None:
    """A stored snapshot to be sent; None if it was written before snapshots noted the CRC of their data.

    Raises:
        OSError, StorageDamaged: it cannot be read.
    """
    _, meta = read_info(files, info.path, check=False)
    crc = meta.get("crc")
    return StoredSource(files, info, crc) if isinstance(crc, int) else None

"""Snapshot files: one state of one group each, whole or absent.

``snapshots/<uid: 16 hex digits>-<generation: 16 hex digits>.snap``, little-endian::

    0    8   magic "RFLTSNAP"
    8    4   format (1)
    12   4   CRC32C of bytes 16..80, with the format as initial value
    16   8   uid
    24   8   index of the last entry that the snapshot contains
    32   8   its term
    40   8   generation: rises with every snapshot of the shard
    48   8   size of the meta data
    56   8   size of the data
    64   4   CRC32C of meta and data
    68   12  zeros (covered by the header's CRC)
    80   ..  meta: msgpack {"name", "crc"}: so that an archived file says what it is; CRC-32 (zlib's) of the data, by
             which members that send it to each other know it again
    ..   ..  data: what Member.make_snapshot gave

It is written under ``<name>.tmp``, made durable, renamed, and the rename made durable; only then do older ones go. Two
are kept per group: if the newer turns out damaged, the older and a longer piece of log give the same member. A removed
group's newest is moved to ``archive/`` under the same name.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import msgpack

from raftfleet.storage.base import SnapshotInfo, StorageDamaged, StorageTooNew
from raftfleet.storage.files import Files
from raftfleet.storage.records import crc_extend

FORMAT = 1
MAGIC = b"RFLTSNAP"
TEMPORARY = ".tmp"
_HEAD = struct.Struct("<8sII")
_FIELDS = struct.Struct("<QQQQQQI12x")
HEADER_BYTES = _HEAD.size + _FIELDS.size
READ_BYTES = 4 << 20
SYNC_BYTES = 4 << 20
"""Synced in such pieces, the log of the same disk gets its turns between them."""


def snapshot_name(uid: int, generation: int) -> str:
    """File name of a snapshot."""
    return f"{uid:016x}-{generation:016x}.snap"


def parse_name(name: str) -> tuple[int, int] | None:
    """``(uid, generation)`` of a snapshot's file name, None for any other name."""
    stem, _, suffix = name.partition(".")
    uid, _, generation = stem.partition("-")
    if suffix != "snap" or len(uid) != 16 or len(generation) != 16:
        return None
    try:
        return int(uid, 16), int(generation, 16)
    except ValueError:
        return None


def pack_header(uid: int, index: int, term: int, generation: int, meta: bytes, size_bytes: int, crc: int) -> bytes:
    """The header. ``crc``: CRC32C of meta and data."""
    fields = _FIELDS.pack(uid, index, term, generation, len(meta), size_bytes, crc)
    return _HEAD.pack(MAGIC, FORMAT, crc_extend(FORMAT, fields)) + fields


def write_all(files: Files, handle: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of it, however little a call takes."""
    view = memoryview(data)
    while view:
        done = files.pwrite(handle, view, offset)
        if done <= 0:
            raise OSError(f"a write of {len(view)} bytes took {done}")
        offset += done
        view = view[done:]


def write_snapshot(
    files: Files, folder: str, uid: int, index: int, term: int, generation: int, meta: dict[str, Any], data: bytes
) -> SnapshotInfo:
    """Write a snapshot, durable when this returns. Needs nothing but ``files``: a forked child may call it.

    Raises:
        OSError: it failed; a temporary file may be left, which the next start removes.
    """
    packed = bytes(msgpack.packb({**meta, "crc": zlib.crc32(data)}))
    crc = crc_extend(crc_extend(0, packed), data)
    head = pack_header(uid, index, term, generation, packed, len(data), crc) + packed
    path = f"{folder}/{snapshot_name(uid, generation)}"
    handle = files.open(path + TEMPORARY, create=True)
    try:
        write_all(files, handle, head, 0)
        view = memoryview(data)
        offset = len(head)
        while view:
            write_all(files, handle, view[:SYNC_BYTES], offset)
            offset += len(view[:SYNC_BYTES])
            view = view[SYNC_BYTES:]
            files.fdatasync(handle)
    finally:
        files.close(handle)
    files.rename(path + TEMPORARY, path)
    files.sync_dir(folder)
    return SnapshotInfo(uid, index, term, generation, len(data), path)


def read_info(files: Files, path: str, *, check: bool = True) -> tuple[SnapshotInfo, dict[str, Any]]:
    """Header and meta of a snapshot file; with ``check`` the data is read through too, a piece at a time.

    Raises:
        StorageDamaged: it is not what was written.
        StorageTooNew: a later format.
    """
    handle = files.open(path, write=False)
    try:
        head = files.pread(handle, HEADER_BYTES, 0)
        if len(head) < HEADER_BYTES:
            raise StorageDamaged(f"{path} ends within its header")
        magic, form, crc = _HEAD.unpack_from(head)
        if magic != MAGIC or crc_extend(form, head[_HEAD.size :]) != crc:
            raise StorageDamaged(f"{path} has a damaged header")
        if form > FORMAT:
            raise StorageTooNew(
                f"{path} has format {form}; this version of raftfleet reads up to {FORMAT}:"
                " use the newer one that wrote it"
            )
        uid, index, term, generation, meta_size, size, data_crc = _FIELDS.unpack_from(head, _HEAD.size)
        if files.size(handle) != HEADER_BYTES + meta_size + size:
            raise StorageDamaged(f"{path} has {files.size(handle)} bytes, not {HEADER_BYTES + meta_size + size}")
        packed = files.pread(handle, meta_size, HEADER_BYTES)
        if check:
            found = crc_extend(0, packed)
            offset = HEADER_BYTES + meta_size
            while piece := files.pread(handle, READ_BYTES, offset):
                found = crc_extend(found, piece)
                offset += len(piece)
            if found != data_crc:
                raise StorageDamaged(f"{path} has damaged data: its CRC is {found:08x}, not {data_crc:08x}")
        try:
            meta = msgpack.unpackb(packed)
        except (ValueError, msgpack.UnpackException) as error:
            raise StorageDamaged(f"{path} has damaged meta data") from error
        return SnapshotInfo(uid, index, term, generation, size, path), meta
    finally:
        files.close(handle)


def read_data(files: Files, path: str) -> bytes:
    """The data, checked.

    Raises:
        StorageDamaged: it is not what was written.
    """
    info, _ = read_info(files, path)
    handle = files.open(path, write=False)
    try:
        return files.pread(handle, info.size_bytes, files.size(handle) - info.size_bytes)
    finally:
        files.close(handle)

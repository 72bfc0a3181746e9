"""One group's state as bytes that outlive the group: what ``export`` writes and ``restore`` reads.

This module knows nothing of files or sockets. All integers are little-endian::

    0    8   magic "RFLTEXPT"
    8    4   format (1)
    12   4   CRC32 of bytes 16..40, with the format as initial value
    16   8   size of the meta data
    24   8   size of the state
    32   4   CRC32 of the meta data
    36   4   CRC32 of the state
    40   ..  meta: msgpack map, see :class:`ExportedState`
    ..   ..  the state, as the machine's ``dump`` gave it

A snapshot file of a data directory (``archive/``, :mod:`raftfleet.storage.snapshots`) is understood as well: that is
how a removed group comes back. It does not say which machine it is of.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import msgpack

FORMAT = 1
MAGIC = b"RFLTEXPT"
SNAPSHOT_MAGIC = b"RFLTSNAP"
SNAPSHOT_HEADER_BYTES = 80
_HEAD = struct.Struct("<8sII")
_FIELDS = struct.Struct("<QQII")
HEADER_BYTES = _HEAD.size + _FIELDS.size


@dataclass(frozen=True, kw_only=True)
class ExportedState:
    """A state, and where it comes from.

    Attributes:
        name: of the group it was of.
        state: what the machine's ``dump`` gave.
        machine_version: by which it was dumped, and by which it must be loaded.
        replicas: of that group; 0: not known.
        config: of that group, as :meth:`raftfleet.GroupConfig.to_dict` gives it; empty: not known.
        uid, index, term: of that group, and of the last entry that the state contains.
        wall_us: when it was exported, Unix microseconds; 0: not known.
        is_linearizable: whether it contains all that had been acknowledged by then.
        node: that gave it.
    """

    name: str
    state: bytes
    machine_version: int
    replicas: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    uid: int = 0
    index: int = 0
    term: int = 0
    wall_us: int = 0
    is_linearizable: bool = False
    node: str = ""

    @property
    def crc(self) -> int:
        """CRC32 of the state."""
        return zlib.crc32(self.state)

    def pack(self) -> bytes:
        """The bytes described above: write them to a file, keep them as long as you like."""
        fields = {key: value for key, value in vars(self).items() if key != "state"}
        meta = bytes(msgpack.packb(fields))
        sizes = _FIELDS.pack(len(meta), len(self.state), zlib.crc32(meta), self.crc)
        return _HEAD.pack(MAGIC, FORMAT, zlib.crc32(sizes, FORMAT)) + sizes + meta + self.state

    @classmethod
    def unpack(cls, data: bytes) -> ExportedState:
        """The inverse of :meth:`pack`; takes an archived snapshot's bytes as well.

        Raises:
            ValueError: the bytes are something else, of a later format, or not what was written.
        """
        if data[:8] == SNAPSHOT_MAGIC:
            return _from_snapshot(data)
        if len(data) < HEADER_BYTES or data[:8] != MAGIC:
            raise ValueError("this is neither an exported state nor a snapshot of raftfleet")
        _, form, crc = _HEAD.unpack_from(data)
        if form > FORMAT:
            raise ValueError(f"format {form} is of a later version of raftfleet; this one reads up to {FORMAT}")
        if zlib.crc32(data[_HEAD.size : HEADER_BYTES], form) != crc:
            raise ValueError("its header is damaged: the CRC is wrong")
        meta_size, size, meta_crc, state_crc = _FIELDS.unpack_from(data, _HEAD.size)
        if len(data) != HEADER_BYTES + meta_size + size:
            raise ValueError(f"it has {len(data)} bytes, not {HEADER_BYTES + meta_size + size}: it was cut short")
        meta = data[HEADER_BYTES : HEADER_BYTES + meta_size]
        state = data[HEADER_BYTES + meta_size :]
        if zlib.crc32(meta) != meta_crc or zlib.crc32(state) != state_crc:
            raise ValueError("it is damaged: the CRC is wrong")
        try:
            return cls(**msgpack.unpackb(meta, strict_map_key=False), state=state)
        except (TypeError, ValueError, msgpack.UnpackException) as error:
            raise ValueError(f"its description cannot be understood: {error}") from error


def _from_snapshot(data: bytes) -> ExportedState:
    """An archived snapshot. Whoever read the file has checked its CRC (:mod:`raftfleet.storage.snapshots`)."""
    try:
        uid, index, term, _generation, meta_size, size = struct.unpack_from("<QQQQQQ", data, 16)
        body = data[SNAPSHOT_HEADER_BYTES + meta_size :]
        if len(body) != size:
            raise ValueError("it was cut short")
        meta = msgpack.unpackb(data[SNAPSHOT_HEADER_BYTES : SNAPSHOT_HEADER_BYTES + meta_size])
        form, _at, _membership, time_us, _sessions, version, state, *waits = msgpack.unpackb(
            body, raw=False, strict_map_key=False
        )
        if form != 1 or waits or type(state) is not bytes:
            raise ValueError("it holds no whole state")
        return ExportedState(
            name=meta["name"], state=state, machine_version=version, uid=uid, index=index, term=term, wall_us=time_us
        )
    except (KeyError, TypeError, ValueError, struct.error, msgpack.UnpackException) as error:
        raise ValueError(f"this snapshot cannot be restored from: {error}") from error

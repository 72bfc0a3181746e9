"""The write-ahead log's bytes: segment headers, records, marks. No files here. All integers are little-endian.

A **segment** is a file ``wal/<sequence: 16 hex digits>.wal``, preallocated with zeros::

    0      4096   header, twice: at 0 and at 2048, so that one flipped bit costs nothing
    4096   ...    batches, back to back, until the first record whose length is 0

Segment header (120 bytes, the rest of each half is zeros; all zeros: the segment is not in use yet)::

    0   8   magic "RFLTWAL\\0"
    8   4   format (1)
    12  4   CRC32C of bytes 0..8 and 16..120 with the format as initial value
    16  8   instance of the shard
    24  8   sequence number of the segment (that of its name)
    32  8   number of its first batch
    40  16  fleet id (zeros: in no fleet yet)
    56  64  BLAKE2b (64 bytes) of the node's name: its identity without a length

A **batch** is what one sync wrote: records, then a mark. It counts only with its mark.

Record::

    0   4   length of the whole record, this field included; 0: the end
    4   4   CRC32C of bytes 8..length, with the length as initial value
    8   8   uid of the group; all ones for records of the shard itself
    16  8   term
    24  8   index
    32  4   count
    36  1   kind
    37  3   zeros
    40  ..  body

kind      uid  term         index              count    body
ENTRIES   uid  of all       of the first       entries  count x u32 length, count x u8 entry kind, then the data
FORWARD   the same; copied from a segment that is to be freed: never truncates, only fills in below
VOTE      uid  term         vote (instance)    0        u64 life
GROUP     uid  0            life               1: first msgpack [name, config, first voters or nil, generation];
                                               0: again snapshots of a lower generation are not this member's
RESET     uid  snapshot's   snapshot's         0        -   the log is empty and begins at index + 1
FORGET    uid  0            0                  0        -
TOMBSTONE uid  term         vote               0        u64 life; ends the member like FORGET
NOTE      ones 0            0                  0        msgpack [key, value]; an empty value forgets the key
MARK      ones batch number segment sequence   records  u64 instance, u32 offset of the batch, u32 offset of the
                                                        mark, 8 bytes "RFLTMARK", then count x (u64 uid, u32 length)

**The mark is the durable mark**: batch n is begun only when the fdatasync of batch n - 1 has returned, so a mark that
is numbered n, or a segment header whose first batch is n, proves that everything below n was durable. Hence a bad
record of batch b is *damage* if anything numbered above b can be read, else it is the *torn tail* of a sync that never
returned. The mark repeats uid and length of each record of its batch, so that a record whose own header is damaged
still has an owner; it names its own place, so that a copy of it inside somebody's command is not taken for one.

CRC32C comes from google-crc32c: hardware instructions, wheels for all Pythons and Linuxes that we support; five times
faster than zlib.crc32 at batch size (0.4 against 2.3 us for 9.6 KB, 48 against 223 us for 1 MiB), and the polynomial
that storage hardware and other tools know.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import google_crc32c
import msgpack

from raftfleet.core.messages import Entry

FORMAT = 1
SEGMENT_MAGIC = b"RFLTWAL\0"
MARK_MAGIC = b"RFLTMARK"
DATA_START = 4096
HEADER_COPY = 2048

ENTRIES = 1
FORWARD = 2
VOTE = 3
GROUP = 4
RESET = 5
FORGET = 6
TOMBSTONE = 7
NOTE = 8
MARK = 9
KIND_NAMES = {
    ENTRIES: "entries",
    FORWARD: "forward",
    VOTE: "vote",
    GROUP: "group",
    RESET: "reset",
    FORGET: "forget",
    TOMBSTONE: "tombstone",
    NOTE: "note",
    MARK: "mark",
}

SHARD_UID = (1 << 64) - 1
"""Stands where a uid would in records that belong to no group."""
RECORD_BYTES_MAX = 1 << 30
"""More than the largest log entry there can be; a length above it is damage."""

_HEADER = struct.Struct("<8sIIQQQ16s64s")
_LENGTH_CRC = struct.Struct("<II")
_REST = struct.Struct("<QQQIBxxx")
_RECORD = struct.Struct("<IIQQQIBxxx")
_MARK = struct.Struct("<QII8s")
_U64 = struct.Struct("<Q")
RECORD_HEADER = _RECORD.size
_MARK_MAGIC_AT = RECORD_HEADER + 16
crc_extend = google_crc32c.extend


class SegmentHeader(NamedTuple):
    """What a segment says of itself."""

    format: int
    instance: int
    sequence: int
    first_batch: int
    fleet: bytes
    node_hash: bytes


class Record(NamedTuple):
    """A record whose CRC is right."""

    length: int
    uid: int
    term: int
    index: int  # type: ignore[assignment]
    count: int  # type: ignore[assignment]
    kind: int
    body: bytes


class Mark(NamedTuple):
    """A mark whose CRC and place are right. ``records``: (uid, length) of each record of the batch, in order."""

    batch: int
    start: int
    offset: int
    end: int
    records: list[tuple[int, int]]


def node_hash(node: str) -> bytes:
    """How a node's name stands in segment headers."""
    return hashlib.blake2b(node.encode("utf-8")).digest()


def pack_header(header: SegmentHeader) -> bytes:
    """The first ``DATA_START`` bytes of a segment."""
    form, instance, sequence, first_batch, fleet, name = header
    data = _HEADER.pack(SEGMENT_MAGIC, form, 0, instance, sequence, first_batch, fleet, name)
    crc = crc_extend(form, data[:8] + data[16:])
    data = data[:12] + crc.to_bytes(4, "little") + data[16:]
    half = data.ljust(HEADER_COPY, b"\0")
    header_block: bytes = half + half
    return header_block


def unpack_header(data: bytes) -> SegmentHeader | None:
    """One copy of a header, None if it is not a whole one. The format is not judged."""
    if len(data) < _HEADER.size:
        return None
    magic, form, crc, instance, sequence, first_batch, fleet, name = _HEADER.unpack_from(data)
    if magic != SEGMENT_MAGIC or crc_extend(form, data[:8] + data[16 : _HEADER.size]) != crc:
        return None
    return SegmentHeader(form, instance, sequence, first_batch, fleet, name)


def read_header(data: bytes) -> tuple[SegmentHeader | None, bool]:
    """The header in the first ``DATA_START`` bytes of a segment, and whether both copies and the padding are whole."""
    first = unpack_header(data[:HEADER_COPY])
    second = unpack_header(data[HEADER_COPY:DATA_START])
    header = first or second
    return header, header is not None and pack_header(header) == data[:DATA_START]


def pack_record(kind: int, uid: int, term: int, index: int, count: int, body: bytes) -> bytes:
    """One record."""
    length = RECORD_HEADER + len(body)
    rest = _REST.pack(uid, term, index, count, kind) + body
    packed: bytes = _LENGTH_CRC.pack(length, crc_extend(length, rest)) + rest
    return packed


def pack_entries(uid: int, first: int, entries: Sequence[Entry], kind: int = ENTRIES) -> bytes:
    """A run of entries that all have one term."""
    count = len(entries)
    datas = [entry[2] for entry in entries]
    body = b"".join((struct.pack(f"<{count}I", *map(len, datas)), bytes([entry[1] for entry in entries]), *datas))
    term = entries[0][0] if count else 0
    return pack_record(kind, uid, term, first, count, body)


def unpack_entries(record: Record) -> list[Entry]:
    """The entries of an ENTRIES or FORWARD record.

    Raises:
        ValueError: the body does not hold what the header says (its CRC is right: a bug, not damage).
    """
    count, body, term = record.count, record.body, record.term
    offset = 5 * count
    if offset > len(body):
        raise ValueError(f"{count} entries do not fit into {len(body)} bytes")
    lengths = struct.unpack_from(f"<{count}I", body)
    entries = []
    for kind, length in zip(body[4 * count : offset], lengths, strict=True):
        entries.append(Entry(term, kind, body[offset : offset + length]))
        offset += length
    if offset != len(body):
        raise ValueError(f"{count} entries of {offset} bytes in a body of {len(body)}")
    return entries


def pack_group(
    uid: int,
    name: str,
    config: object,
    first_voters: Sequence[int] | None,
    life: int,
    generation_min: int,
    facts: object = None,
    *,
    first: bool,
) -> bytes:
    """A GROUP record; ``first``: the member begins with it."""
    voters = None if first_voters is None else list(first_voters)
    body = bytes(msgpack.packb([name, config, voters, generation_min, facts]))
    return pack_record(GROUP, uid, 0, life, 1 if first else 0, body)


def unpack_group(body: bytes) -> tuple[str, dict[str, Any], tuple[int, ...] | None, int, Any]:
    """Name, config, first voters, lowest generation and facts of a GROUP record.

    Raises:
        ValueError: the body is none of a GROUP record.
    """
    fields = _unpacked(body)
    if type(fields) is not list or len(fields) != 5:
        raise ValueError("a group is five fields")
    name, config, voters, generation_min, facts = fields
    if type(name) is not str or type(config) is not dict or type(generation_min) is not int:
        raise ValueError("a group has a name, a config and a generation")
    if voters is not None and (type(voters) is not list or any(type(voter) is not int for voter in voters)):
        raise ValueError("first voters are numbers")
    return name, config, None if voters is None else tuple(voters), generation_min, facts


def pack_life(kind: int, uid: int, term: int, vote: int, life: int, facts: object = None) -> bytes:
    """A VOTE or TOMBSTONE record; only the latter has ``facts``."""
    rest = b"" if facts is None else bytes(msgpack.packb(facts))
    return pack_record(kind, uid, term, vote, 0, _U64.pack(life) + rest)


def unpack_life(record: Record) -> int:
    """The life in a VOTE or TOMBSTONE record. Raises ValueError if there is none."""
    if len(record.body) < _U64.size:
        raise ValueError(f"a life has {_U64.size} bytes; these are {len(record.body)}")
    return int(_U64.unpack_from(record.body)[0])


def unpack_facts(record: Record) -> Any:
    """The facts of a TOMBSTONE record; None if there are none. Raises ValueError if they cannot be read."""
    rest = record.body[_U64.size :]
    return _unpacked(rest) if rest else None


def _unpacked(data: bytes) -> Any:
    try:
        return msgpack.unpackb(data, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"not msgpack: {error}") from error


def pack_note(key: str, value: bytes) -> bytes:
    """A NOTE record."""
    return pack_record(NOTE, SHARD_UID, 0, 0, 0, bytes(msgpack.packb([key, value])))


def unpack_note(body: bytes) -> tuple[str, bytes]:
    """Key and value of a NOTE record. Raises ValueError if it has none."""
    fields = _unpacked(body)
    if type(fields) is not list or list(map(type, fields)) != [str, bytes]:
        raise ValueError("a note is a key and a value")
    return fields[0], fields[1]


def mark_length(count: int) -> int:
    """Size of the mark of a batch of ``count`` records."""
    return RECORD_HEADER + _MARK.size + 12 * count


def pack_mark(batch: int, sequence: int, instance: int, start: int, offset: int, records: Sequence[bytes]) -> bytes:
    """The mark that ends a batch of ``records``, which begins at ``start`` of segment ``sequence``."""
    count = len(records)
    flat = [0] * (2 * count)
    # Each record begins with its length and has its uid at 8: taken from the bytes, so the two cannot differ.
    for at, record in enumerate(records):
        flat[2 * at] = int.from_bytes(record[8:16], "little")
        flat[2 * at + 1] = len(record)
    body = _MARK.pack(instance, start, offset, MARK_MAGIC) + struct.pack("<" + "QI" * count, *flat)
    return pack_record(MARK, SHARD_UID, batch, sequence, count, body)


def read_record(data: bytes, offset: int) -> Record | None:
    """The record at ``offset``, None if what is there is not a whole one."""
    if offset + RECORD_HEADER > len(data):
        return None
    length, crc, uid, term, index, count, kind = _RECORD.unpack_from(data, offset)
    if not RECORD_HEADER <= length <= RECORD_BYTES_MAX or offset + length > len(data):
        return None
    if crc_extend(length, data[offset + 8 : offset + length]) != crc:
        return None
    return Record(length, uid, term, index, count, kind, data[offset + RECORD_HEADER : offset + length])


def as_mark(record: Record, offset: int, sequence: int, instance: int) -> Mark | None:
    """The record at ``offset`` as a mark of this very place, None if it is none."""
    if record.kind != MARK or len(record.body) < _MARK.size:
        return None
    its_instance, start, its_offset, magic = _MARK.unpack_from(record.body)
    if (its_instance, its_offset, record.index, magic) != (instance, offset, sequence, MARK_MAGIC):
        return None
    if record.length != mark_length(record.count):
        return None
    pairs = struct.iter_unpack("<QI", record.body[_MARK.size :])
    return Mark(record.term, start, offset, offset + record.length, list(pairs))


def find_mark(data: bytes, offset: int, sequence: int, instance: int) -> Mark | None:
    """The first mark of this segment that begins at or after ``offset``."""
    at = offset + _MARK_MAGIC_AT
    while True:
        at = data.find(MARK_MAGIC, at)
        if at < 0:
            return None
        start = at - _MARK_MAGIC_AT
        record = read_record(data, start)
        if record is not None:
            mark = as_mark(record, start, sequence, instance)
            if mark is not None:
                return mark
        at += 1

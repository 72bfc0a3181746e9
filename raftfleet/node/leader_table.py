"""Who leads which group, in shared memory: any local process finds a leader without I/O (DESIGN 8).

One file in ``/dev/shm`` per node, mapped by everybody who is interested. The supervisor makes it
(:func:`create_table`), shard *i* alone writes region *i* (:class:`RegionWriter`), clients map it read-only
(:class:`LeaderTableReader`). Nobody locks anything. What a reader finds is a hint: the shard that is asked checks uid
and term itself.

The file is mapped with ``mmap``, not ``multiprocessing.shared_memory``, whose resource tracker unlinks an attached
segment when any process that attached it exits (before Python 3.13).

Rules:

1. **One writer per word.** The header belongs to the supervisor, a region to its shard.
2. **A slot is a seqlock.** Its writer makes the sequence odd, writes the rest, makes it even. A reader takes what it
   read only if the sequence was the same even number before and after, and if the CRC (seeded with the sequence) fits,
   which also holds where stores may be seen out of order. A sequence never goes back, and a slot is never given to
   another name under the same one: whoever keeps ``(slot, sequence)`` sees by one load whether its knowledge is fresh.
3. **A writer may die anywhere.** Its successor clears the region, which ends every half-written slot. Readers that
   find an odd sequence give up after some tries and know nothing, which is always allowed.
4. **A file never changes its size**, and all of it is allocated at once: touching a page can never be a SIGBUS.
   Growth is a new file, the next *generation*. The supervisor makes it, points the link ``RUN_DIR/leader_table`` to it,
   and then retires the old one; each shard fills its region of the new one and says so (``ready``); until then readers
   use that region of the old one.

Layout, all words u64 in the machine's own byte order (the file never leaves the machine)::

    0       magic, version, generation, workers, slots per region, endpoints per region,
            supervisor's pid, its start time (clock ticks after boot: tells a reused pid apart),
            retired (0: current, 1: node stopped, 2: superseded), bytes of the node's name, CRC of all but retired
    128     the node's name, UTF-8
    4096    region 0, region 1, ..., each a multiple of 4096 bytes:
        0       ready, endpoint count, used slots, wants growth
        64      endpoints, 272 bytes each: length u16, 0 u16, CRC u32, name. Append-only.
        then    slots, 64 bytes each (one cache line), from a multiple of 64:
            sequence u64, hash of the group's name 16 bytes, uid u64, term u64,
            endpoint u32 (number from 1; 0: no leader), state u32 (0 empty, 1 used, 2 removed), instance u64,
            CRC u32, 0 u32

Slots are found by open addressing with linear probing; the number of slots is a power of two.

Measured (Python 3.11, ``python -m raftfleet.node.leader_table`` in a checkout repeats it): a look-up of a name that was
looked up before takes 0.1 µs while its slot is unchanged, one of a changed or new name 3.3 µs, an update 1.4 µs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from raftfleet.core.names import name_hash128, shard_of
from raftfleet.errors import NodeError, NodeNotRunning

LINK_NAME = "leader_table"
SHM_DIR = Path("/dev/shm")

SLOTS_PER_REGION = 4096
"""256 KiB of a first generation's region: some 2,900 groups per worker before the table grows."""

ENDPOINTS_PER_REGION = 512
"""Names of nodes that a region can hold, dead ones included; when they are used up the table grows."""

FILL_MAX = 0.7
"""Part of the slots in use (or removed, not yet reclaimed) above which a region wants to grow: then probing is slow."""

NODE_NAME_BYTES_MAX = 255

_MAGIC = int.from_bytes(b"RFLEADER", "big")
_VERSION = 1

# Words of the header.
_GENERATION, _WORKERS, _SLOTS, _ENDPOINTS, _PID, _STARTED, _RETIRED, _NAME_BYTES, _HEADER_CRC = range(2, 11)
_NAME_OFFSET = 128
_HEADER_BYTES = 4096
# Values of `retired`.
_STOPPED, _SUPERSEDED = 1, 2

# Words of a region's header.
_READY, _ENDPOINT_COUNT, _USED_COUNT, _WANTS_GROWTH = range(4)
_REGION_HEADER_BYTES = 64
_ENDPOINT_HEADER = struct.Struct("=HHI")
_ENDPOINT_BYTES = 272

_SLOT = struct.Struct("=16sQQIIQ")
_SLOT_BYTES = 64
_SLOT_WORDS = _SLOT_BYTES // 8
_CRC = struct.Struct("=II")
_BODY_BYTES = _SLOT.size
_EMPTY, _USED, _REMOVED = range(3)
_STATE_WORD = 5
"""The word with endpoint and state: 0 if and only if the slot is empty."""

_READ_TRIES = 200
"""About 50 µs. A living writer is done in two; one that was preempted half-way is not worth waiting for."""


class LeaderSlot(NamedTuple):
    """What the table says of a group.

    Attributes:
        uid: the group's uid. Another group of the same name, made later, has another.
        term: in which the leader was elected, or, without leader, the last term known.
        node: name of the leader's node, or None: the group has no leader that this node knows of.
        instance: of the leader's shard; 0 without leader.
    """

    uid: int
    term: int
    node: str | None
    instance: int


def process_start_time(pid: int) -> int | None:
    """When process ``pid`` started, in clock ticks after boot, or None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _align(size_bytes: int, unit: int) -> int:
    return -(-size_bytes // unit) * unit


class _Segment:
    """One generation's file, mapped. Knows the layout and nothing of who may write what."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        flags = os.O_RDWR if writable else os.O_RDONLY
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size < _HEADER_BYTES or status.st_size % 4096:
                raise NodeError(f"{path} is not a leader table")
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self.map = mmap.mmap(descriptor, status.st_size, access=access)
        finally:
            os.close(descriptor)
        self.path = path
        self.owner = status.st_uid
        self.identity = (status.st_dev, status.st_ino)
        self.bytes = memoryview(self.map)
        self.words = self.bytes.cast("Q")
        words = self.words
        if words[0] != _MAGIC or words[1] != _VERSION or words[_HEADER_CRC] != _header_crc(self.bytes):
            self.close()
            raise NodeError(f"{path} is not a leader table of this version of raftfleet")
        self.generation = words[_GENERATION]
        self.workers = words[_WORKERS]
        self.slots = words[_SLOTS]
        self.endpoints = words[_ENDPOINTS]
        self.node = bytes(self.bytes[_NAME_OFFSET : _NAME_OFFSET + words[_NAME_BYTES]]).decode()
        self.names: dict[tuple[int, int], str] = {}  # (region, endpoint number) -> node; numbers are never reused
        if _file_bytes(self.workers, self.slots, self.endpoints) != status.st_size:
            self.close()
            raise NodeError(f"{path} does not have the size that its header says")

    def region_offset(self, region: int) -> int:
        """Byte offset of a region's header."""
        return _HEADER_BYTES + region * _region_bytes(self.slots, self.endpoints)

    def slots_offset(self, region: int) -> int:
        """Byte offset of a region's first slot."""
        return self.region_offset(region) + _slots_start(self.endpoints)

    def is_ready(self, region: int) -> bool:
        """Whether the region has been filled by its shard since this generation began."""
        return self.words[self.region_offset(region) // 8 + _READY] != 0

    def endpoint(self, region: int, number: int) -> str | None:
        """Name of the node with this endpoint number, or None if there is no such entry (yet)."""
        name = self.names.get((region, number))
        if name is None and 1 <= number <= self.endpoints:
            offset = self.region_offset(region) + _REGION_HEADER_BYTES + (number - 1) * _ENDPOINT_BYTES
            entry = bytes(self.bytes[offset : offset + _ENDPOINT_BYTES])
            length, _zero, crc = _ENDPOINT_HEADER.unpack_from(entry)
            body = entry[_ENDPOINT_HEADER.size : _ENDPOINT_HEADER.size + length]
            if length and zlib.crc32(body) == crc:
                name = self.names[region, number] = body.decode()
        return name

    def read_slot(self, word: int) -> tuple[int, bytes, int, int, int, int, int] | None:
        """``(sequence, hash, uid, term, endpoint, state, instance)``, or None if no untorn read was possible."""
        words, data = self.words, self.bytes
        start = word * 8 + 8
        for _ in range(_READ_TRIES):
            sequence = words[word]
            if sequence & 1:
                continue
            body = bytes(data[start : start + _SLOT_BYTES - 8])
            if words[word] != sequence:
                continue
            if sequence == 0 or zlib.crc32(body[:_BODY_BYTES], sequence & 0xFFFFFFFF) == _CRC.unpack_from(body, 48)[0]:
                return (sequence, *_SLOT.unpack_from(body))
        return None

    def write_slot(
        self, word: int, name_hash: bytes, uid: int, term: int, endpoint: int, state: int, instance: int
    ) -> None:
        """Write a slot as its region's only writer. An odd sequence that a dead writer left is taken over."""
        words = self.words
        odd = words[word] | 1
        body = _SLOT.pack(name_hash, uid, term, endpoint, state, instance)
        body += _CRC.pack(zlib.crc32(body, (odd + 1) & 0xFFFFFFFF), 0)
        words[word] = odd
        self.bytes[word * 8 + 8 : word * 8 + _SLOT_BYTES] = body
        words[word] = odd + 1

    @property
    def is_retired(self) -> bool:
        """Whether the node stopped or a newer generation took over."""
        return self.words[_RETIRED] != 0

    @property
    def supervisor_lives(self) -> bool:
        """Whether the process that made this table still runs."""
        return process_start_time(self.words[_PID]) == self.words[_STARTED]

    def close(self) -> None:
        """Unmap. Views that were handed out become unusable."""
        self.words.release()
        self.bytes.release()
        self.map.close()


def _header_crc(data: memoryview) -> int:
    fixed = bytes(data[: _RETIRED * 8]) + bytes(data[_NAME_BYTES * 8 : _NAME_BYTES * 8 + 8])
    return zlib.crc32(fixed + bytes(data[_NAME_OFFSET : _NAME_OFFSET + NODE_NAME_BYTES_MAX]))


def _slots_start(endpoints: int) -> int:
    return _align(_REGION_HEADER_BYTES + endpoints * _ENDPOINT_BYTES, 64)


def _region_bytes(slots: int, endpoints: int) -> int:
    return _align(_slots_start(endpoints) + slots * _SLOT_BYTES, 4096)


def _file_bytes(workers: int, slots: int, endpoints: int) -> int:
    return _HEADER_BYTES + workers * _region_bytes(slots, endpoints)


def _segment_prefix(run_dir: Path) -> str:
    digest = hashlib.blake2b(os.fsencode(os.path.realpath(run_dir)), digest_size=8).hexdigest()
    return f"raftfleet-{os.getuid()}-{digest}-g"


def _open_current(run_dir: Path, *, writable: bool) -> _Segment:
    """Map the table that the run directory's link points to.

    Raises:
        NodeNotRunning: there is none.
        NodeError: there is something else, or it may not be read.
    """
    link = run_dir / LINK_NAME
    for _ in range(10):  # between reading the link and opening the file, a new generation may take over
        try:
            segment = _Segment(Path(os.readlink(link)), writable=writable)
        except FileNotFoundError:
            if not os.path.lexists(link):
                break
            continue
        except PermissionError as error:
            raise NodeError(f"the node's leader table {link} may not be read by this user: {error}") from error
        except OSError as error:
            raise NodeError(f"the node's leader table {link} cannot be opened: {error}") from error
        if segment.owner not in (os.stat(run_dir).st_uid, os.getuid()):
            segment.close()
            raise NodeError(f"{link} points to a file of user {segment.owner}, who is not the run directory's owner")
        return segment
    raise NodeNotRunning(f"no node runs in {run_dir}: start one with `raftfleet-node start --run-dir {run_dir}`")


def create_table(
    run_dir: str | os.PathLike[str],
    node: str,
    workers: int,
    *,
    slots_per_region: int = SLOTS_PER_REGION,
    endpoints_per_region: int = ENDPOINTS_PER_REGION,
    mode: int = 0o600,
    gid: int | None = None,
) -> LeaderTable:
    """Make a node's leader table; the caller, its supervisor, holds the run directory's lock.

    A table that a crashed node left behind is retired, so that its readers come over, and its file removed.

    Args:
        run_dir: the node's run directory; it gets a link ``leader_table``.
        node: the node's name.
        workers: number of shard workers, one region each.
        slots_per_region: a power of two.
        endpoints_per_region: names of nodes per region.
        mode: of the file: 0o640 to let a group of users read it.
        gid: that group, or None to leave the process's own.

    Raises:
        NodeError: the supervisor of the table that is there still runs, or there is no room in /dev/shm.
        ValueError: an argument is of no use.
    """
    if not 1 <= len(node.encode()) <= NODE_NAME_BYTES_MAX:
        raise ValueError(f"a node name has 1 to {NODE_NAME_BYTES_MAX} bytes of UTF-8, not {len(node.encode())}")
    if workers < 1:
        raise ValueError(f"workers is at least 1, not {workers}")
    if slots_per_region < 2 or slots_per_region & (slots_per_region - 1):
        raise ValueError(f"slots_per_region is a power of two, not {slots_per_region}")
    run_path = Path(run_dir)
    old: _Segment | None = None
    with contextlib.suppress(NodeError):
        old = _open_current(run_path, writable=True)
    if old is not None and not old.is_retired and old.supervisor_lives and old.words[_PID] != os.getpid():
        pid = old.words[_PID]
        old.close()
        raise NodeError(f"a node runs in {run_path} already: its supervisor is process {pid}")
    generation = 1 + max([old.generation if old else 0, *(number for number, _path in _leftovers(run_path))])
    table = LeaderTable(run_path, mode, gid)
    table._begin(node, workers, generation, slots_per_region, endpoints_per_region)
    if old is not None:
        old.words[_RETIRED] = _SUPERSEDED
        old.close()
    for number, path in _leftovers(run_path):
        if number != generation:
            path.unlink(missing_ok=True)
    return table


def _leftovers(run_dir: Path) -> Iterator[tuple[int, Path]]:
    prefix = _segment_prefix(run_dir)
    for path in list(SHM_DIR.glob(prefix + "*")):
        if path.name[len(prefix) :].isdigit():
            yield int(path.name[len(prefix) :]), path


class LeaderTable:
    """The supervisor's hold on the table: makes new generations and takes everything away at the end.

    Made by :func:`create_table`. Children that are forked later need nothing of it; they open it by the run directory.
    """

    def __init__(self, run_dir: Path, mode: int, gid: int | None) -> None:
        self.run_dir = run_dir
        self._mode = mode
        self._gid = gid
        self._segment: _Segment | None = None

    @property
    def path(self) -> Path:
        """The current generation's file."""
        assert self._segment is not None, "the table is closed"
        return self._segment.path

    @property
    def generation(self) -> int:
        """Number of the current generation, from 1."""
        assert self._segment is not None, "the table is closed"
        return self._segment.generation

    @property
    def wants_growth(self) -> bool:
        """Whether any region is too full: then :meth:`grow`."""
        segment = self._segment
        return segment is not None and any(
            segment.words[segment.region_offset(region) // 8 + _WANTS_GROWTH] for region in range(segment.workers)
        )

    def grow(self) -> None:
        """Begin a new generation with room for what there is, and retire the present one.

        Shards move their regions when they next write or call :meth:`RegionWriter.follow`.

        Raises:
            NodeError: /dev/shm has no room; the present generation stays.
        """
        old = self._segment
        assert old is not None, "the table is closed"
        headers = [old.region_offset(region) // 8 for region in range(old.workers)]
        used = max(old.words[header + _USED_COUNT] for header in headers)
        known = max(old.words[header + _ENDPOINT_COUNT] for header in headers)
        slots = old.slots
        while used * 2 > slots * FILL_MAX:
            slots *= 2
        endpoints = old.endpoints * 2 if known >= old.endpoints else old.endpoints
        self._begin(old.node, old.workers, old.generation + 1, slots, endpoints)
        old.words[_RETIRED] = _SUPERSEDED
        old.path.unlink(missing_ok=True)
        old.close()

    def close(self) -> None:
        """The node has stopped: tell readers, remove link and file. A second call does nothing."""
        segment, self._segment = self._segment, None
        if segment is None:
            return
        segment.words[_RETIRED] = _STOPPED
        link = self.run_dir / LINK_NAME
        with contextlib.suppress(OSError):
            if os.readlink(link) == str(segment.path):
                link.unlink()
        segment.path.unlink(missing_ok=True)
        segment.close()

    def _begin(self, node: str, workers: int, generation: int, slots: int, endpoints: int) -> None:
        """Make the file of a generation and point the link to it."""
        path = SHM_DIR / f"{_segment_prefix(self.run_dir)}{generation}"
        path.unlink(missing_ok=True)  # only a crashed supervisor of this very directory can have left it
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            size_bytes = _file_bytes(workers, slots, endpoints)
            os.posix_fallocate(descriptor, 0, size_bytes)
            header = bytearray(_HEADER_BYTES)
            words = memoryview(header).cast("Q")
            words[0], words[1] = _MAGIC, _VERSION
            words[_GENERATION], words[_WORKERS] = generation, workers
            words[_SLOTS], words[_ENDPOINTS] = slots, endpoints
            words[_PID], words[_STARTED] = os.getpid(), process_start_time(os.getpid()) or 0
            name = node.encode()
            words[_NAME_BYTES] = len(name)
            header[_NAME_OFFSET : _NAME_OFFSET + len(name)] = name
            words[_HEADER_CRC] = _header_crc(memoryview(header))
            os.pwrite(descriptor, header, 0)
            if self._gid is not None:
                os.fchown(descriptor, -1, self._gid)
            os.fchmod(descriptor, self._mode)
            self._segment = _Segment(path, writable=True)
        except OSError as error:
            path.unlink(missing_ok=True)
            if error.errno == errno.ENOSPC:
                raise NodeError(f"{SHM_DIR} has no room for a leader table of {size_bytes} bytes") from error
            raise NodeError(f"the leader table {path} cannot be made: {error}") from error
        finally:
            os.close(descriptor)
        temporary = self.run_dir / f"{LINK_NAME}.new"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(path)
        temporary.replace(self.run_dir / LINK_NAME)


class _Row:
    """What a region's writer knows of a group; ``word``: its slot, or -1 while there is no room for it."""

    __slots__ = ("instance", "node", "term", "uid", "word")

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.term = 0
        self.node: str | None = None
        self.instance = 0
        self.word = -1


class RegionWriter:
    """Shard ``index``'s pen. To be made once by each process of that shard; making it clears the region.

    Nothing here raises because the table is full or the node is stopping: a row without a slot is kept and written
    when the table has grown.

    Args:
        run_dir: the node's run directory.
        index: the shard's.

    Raises:
        NodeNotRunning, NodeError: there is no table in this run directory.
        ValueError: the table has no region ``index``.
    """

    def __init__(self, run_dir: str | os.PathLike[str], index: int) -> None:
        self._run_dir = Path(run_dir)
        self._index = index
        self._rows: dict[str, _Row] = {}
        self._open()
        self._segment.words[self._header + _READY] = 1

    def _open(self) -> None:
        segment = _open_current(self._run_dir, writable=True)
        if not 0 <= self._index < segment.workers:
            segment.close()
            raise ValueError(f"a table for {segment.workers} workers has no region {self._index}")
        self._segment = segment
        self._header = segment.region_offset(self._index) // 8
        self._first = segment.slots_offset(self._index) // 8
        self._end = self._first + segment.slots * _SLOT_WORDS
        self._owned: set[int] = set()  # words of the slots in use
        self._removed_count = 0
        self._is_short = False  # of slots or of endpoint numbers
        self._clear()

    def _clear(self) -> None:
        """Empty every slot that is not, and learn the endpoint numbers that a former writer gave out."""
        segment, words = self._segment, self._segment.words
        for word in range(self._first, self._end, _SLOT_WORDS):
            if words[word] and (words[word] & 1 or words[word + _STATE_WORD]):
                segment.write_slot(word, bytes(16), 0, 0, 0, _EMPTY, 0)
        self._endpoints: dict[str, int] = {}
        count = min(words[self._header + _ENDPOINT_COUNT], segment.endpoints)
        for number in range(1, count + 1):
            name = segment.endpoint(self._index, number)
            if name is not None:
                self._endpoints[name] = number
        words[self._header + _USED_COUNT] = 0
        words[self._header + _WANTS_GROWTH] = 0

    @property
    def needs_growth(self) -> bool:
        """Whether the region is too full: ask the supervisor for a new generation."""
        filled = len(self._owned) + self._removed_count
        return self._is_short or filled > self._segment.slots * FILL_MAX

    @property
    def generation(self) -> int:
        """Of the table that is being written."""
        return self._segment.generation

    def set_leader(self, name: str, uid: int, term: int, node: str, instance: int) -> None:
        """Group ``name`` is led by the shard ``instance`` on ``node``.

        Older news than what is known (a lower uid, or a lower term of the same uid) is passed over: notices may
        overtake each other on their way.
        """
        self._set(name, uid, term, node, instance)

    def set_leaderless(self, name: str, uid: int, term: int = 0) -> None:
        """The group exists and has no leader that this node knows of; ``term`` as far as it is known.

        Passed over if a leader of a higher term, or a later group of that name, is known. ``term`` 0 speaks of
        whatever term is known.
        """
        row = self._rows.get(name)
        if term == 0 and row is not None and row.uid == uid:
            term = row.term
        self._set(name, uid, term, None, 0)

    def remove(self, name: str, uid: int | None = None) -> None:
        """The group is no more. With ``uid``: only if that is the one that is known."""
        self.follow()
        row = self._rows.get(name)
        if row is None or (uid is not None and row.uid != uid):
            return
        del self._rows[name]
        if row.word >= 0:
            self._vacate(name, row)

    def replace_all(self, rows: list[tuple[str, int, int, str | None, int]]) -> None:
        """Make the region say this and nothing else, be it older or newer than what it said.

        Args:
            rows: ``(name, uid, term, node or None, instance)`` of each group.
        """
        names = {row[0] for row in rows}
        for name in [name for name in self._rows if name not in names]:
            self.remove(name)
        for name, uid, term, node, instance in rows:
            row = self._rows.get(name)
            if row is not None and (uid, term) < (row.uid, row.term):
                row.uid, row.term = uid, term - 1  # so that what follows is news
            self._set(name, uid, term, node, instance)

    def known(self) -> dict[str, LeaderSlot]:
        """All groups of the region as this writer knows them, those without a slot included."""
        return {name: LeaderSlot(row.uid, row.term, row.node, row.instance) for name, row in self._rows.items()}

    def follow(self) -> bool:
        """If a new generation has begun, move there; say whether that was so.

        Every change calls this; a shard that has nothing to change calls it now and then (it costs one load).
        """
        if self._segment.words[_RETIRED] != _SUPERSEDED:
            return False
        old = self._segment
        try:
            self._open()
        except NodeNotRunning:  # the node stops at this moment: there is nobody to tell any more
            return False
        old.close()
        # Not ready before it is filled: until then readers look into the old one, which stays as it is.
        for row in self._rows.values():
            row.word = -1
        for name, row in self._rows.items():
            self._write(name, row)
        self._segment.words[self._header + _READY] = 1
        return True

    def close(self) -> None:
        """Unmap the table. The region stays as it is."""
        self._segment.close()

    def _set(self, name: str, uid: int, term: int, node: str | None, instance: int) -> None:
        self.follow()
        row = self._rows.get(name)
        if row is None:
            row = self._rows[name] = _Row(uid)
        elif uid < row.uid or (uid == row.uid and term < row.term):
            return
        elif row.uid == uid and row.term == term and row.node == node and row.instance == instance:
            return
        row.uid, row.term, row.node, row.instance = uid, term, node, instance
        self._write(name, row)

    def _write(self, name: str, row: _Row) -> None:
        endpoint = self._endpoint_number(row.node) if row.node is not None else 0
        name_hash = name_hash128(name)
        if row.word < 0:
            row.word = self._free_slot(name_hash)
            if row.word < 0:
                self._publish_counts()
                return
            if self._segment.words[row.word + _STATE_WORD]:
                self._removed_count -= 1
            self._owned.add(row.word)
            self._publish_counts()
        self._segment.write_slot(row.word, name_hash, row.uid, row.term, endpoint, _USED, row.instance)

    def _endpoint_number(self, node: str) -> int:
        """The number of a node's name, given out now if need be; 0 (as if without leader) if there is no room."""
        number = self._endpoints.get(node)
        if number is not None:
            return number
        segment = self._segment
        body = node.encode()
        count = segment.words[self._header + _ENDPOINT_COUNT]
        if count >= segment.endpoints or not 1 <= len(body) <= NODE_NAME_BYTES_MAX:
            self._is_short = self._is_short or count >= segment.endpoints
            self._publish_counts()
            return 0
        offset = segment.region_offset(self._index) + _REGION_HEADER_BYTES + count * _ENDPOINT_BYTES
        entry = _ENDPOINT_HEADER.pack(len(body), 0, zlib.crc32(body)) + body
        segment.bytes[offset : offset + len(entry)] = entry
        segment.words[self._header + _ENDPOINT_COUNT] = count + 1
        self._endpoints[node] = count + 1
        return int(count + 1)

    def _free_slot(self, name_hash: bytes) -> int:
        """Word of the first slot on the name's path that is not in use, or -1."""
        if len(self._owned) >= self._segment.slots - 1:  # one stays empty, so that every search ends
            self._is_short = True
            return -1
        slot = _first_slot(name_hash, self._segment.slots)
        for _ in range(self._segment.slots):
            word = self._first + slot * _SLOT_WORDS
            if word not in self._owned:
                return word
            slot = (slot + 1) & (self._segment.slots - 1)
        raise AssertionError("a slot is free and was not found")

    def _vacate(self, name: str, row: _Row) -> None:
        """Mark a slot as removed; where the next one is empty, no path leads through it and it becomes empty itself."""
        segment, words = self._segment, self._segment.words
        self._owned.discard(row.word)
        following = row.word + _SLOT_WORDS
        if words[(following if following < self._end else self._first) + _STATE_WORD]:
            segment.write_slot(row.word, name_hash128(name), row.uid, 0, 0, _REMOVED, 0)
            self._removed_count += 1
        else:
            segment.write_slot(row.word, bytes(16), 0, 0, 0, _EMPTY, 0)
            word = (row.word if row.word > self._first else self._end) - _SLOT_WORDS
            while words[word + _STATE_WORD] and word not in self._owned:
                segment.write_slot(word, bytes(16), 0, 0, 0, _EMPTY, 0)
                self._removed_count -= 1
                word = (word if word > self._first else self._end) - _SLOT_WORDS
        self._publish_counts()

    def _publish_counts(self) -> None:
        words = self._segment.words
        words[self._header + _USED_COUNT] = len(self._rows)
        words[self._header + _WANTS_GROWTH] = int(self.needs_growth)


def _first_slot(name_hash: bytes, slots: int) -> int:
    return int.from_bytes(name_hash[:8], "big") & (slots - 1)


class _ClosedSegment:
    """What a closed reader still says of its segment, which is unmapped."""

    def __init__(self, segment: _Segment | _ClosedSegment) -> None:
        self.node: str = segment.node
        self.workers: int = segment.workers
        self.generation: int = segment.generation
        self.identity: object = segment.identity
        self.words: Any = {_PID: int(segment.words[_PID]), _RETIRED: _STOPPED}
        self.is_retired = True
        self.supervisor_lives = False


_KEPT_MAX = 1 << 17
"""Names whose slots a reader remembers; a process that asks for more starts afresh (some 40 MB by then)."""


class LeaderTableReader:
    """Finds leaders. Read-only, without I/O as long as the node runs; safe to share between threads.

    Follows new generations by itself, and a node that is started again in the same directory. A table whose node has
    stopped knows no leader.

    Args:
        run_dir: the node's run directory.

    Raises:
        NodeNotRunning: there is no table.
        NodeError: it cannot be read.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self._run_dir = Path(run_dir)
        self._kept: dict[str, tuple[memoryview, int, int, LeaderSlot]] = {}
        newest = _open_current(self._run_dir, writable=False)
        self._newest: _Segment | _ClosedSegment = newest
        self._regions = [newest] * newest.workers
        self._is_closed = False

    @property
    def node(self) -> str:
        """Name of the node."""
        return self._newest.node

    @property
    def workers(self) -> int:
        """Number of the node's shard workers."""
        return self._newest.workers

    @property
    def generation(self) -> int:
        """Of the table that is being read."""
        return self._newest.generation

    @property
    def is_alive(self) -> bool:
        """Whether the table is current and the supervisor that made it runs. Looks into /proc."""
        return not self._is_closed and not self._newest.is_retired and self._newest.supervisor_lives

    @property
    def supervisor_pid(self) -> int:
        """The process that made the table."""
        return int(self._newest.words[_PID])

    def lookup(self, name: str) -> LeaderSlot | None:
        """What the table says of group ``name``; None if it says nothing."""
        kept = self._kept.get(name)
        if kept is not None:
            words, word, sequence, slot = kept
            if words[word] == sequence and not words[_RETIRED]:
                return slot
        return self._look(name)

    def refresh(self) -> bool:
        """Look at the run directory again and say whether there was a new table.

        Needed only where the old one could not be retired, because somebody removed the link of a crashed node: a
        client calls it whenever it has to connect anew.
        """
        if self._is_closed:
            return False
        try:
            newest = _open_current(self._run_dir, writable=False)
        except NodeError:
            return False
        if newest.identity == self._newest.identity:
            newest.close()
            return False
        self._adopt(newest)
        return True

    def close(self) -> None:
        """Forget everything; unmapped as soon as no other thread is reading. Look-ups then find nothing."""
        self._is_closed = True
        self._kept = {}
        self._regions = []
        self._newest = _ClosedSegment(self._newest)

    def _adopt(self, newest: _Segment) -> None:
        # Old segments are left to the garbage collector: another thread may be in the middle of one.
        same_node = newest.node == self._newest.node and newest.workers == self._newest.workers
        superseded = self._newest.words[_RETIRED] == _SUPERSEDED and newest.generation > self._newest.generation
        if not (same_node and superseded and newest.words[_PID] == self._newest.words[_PID]):
            self._regions = [newest] * newest.workers  # another life of the node: what the old one said is void
        self._newest = newest
        self._kept = {}

    def _look(self, name: str) -> LeaderSlot | None:
        if self._is_closed:
            return None
        if self._newest.is_retired:
            self.refresh()
            if self._newest.words[_RETIRED] == _STOPPED:
                return None
        newest, regions = self._newest, self._regions
        if isinstance(newest, _ClosedSegment):  # by another thread just now
            return None
        region = shard_of(name, newest.workers)
        if region >= len(regions):  # closed, or adopted, by another thread just now
            return None
        segment = regions[region]
        if segment is not newest and newest.is_ready(region):
            segment = regions[region] = newest
        return self._search(segment, region, name)

    def _search(self, segment: _Segment, region: int, name: str) -> LeaderSlot | None:
        words, slots = segment.words, segment.slots
        name_hash = name_hash128(name)
        high, low = _HASH_WORDS.unpack(name_hash)
        first = segment.slots_offset(region) // 8
        slot = _first_slot(name_hash, slots)
        for _ in range(slots):
            word = first + slot * _SLOT_WORDS
            if words[word + 1] == high and words[word + 2] == low:
                found = segment.read_slot(word)
                if found is None:
                    return None
                sequence, found_hash, uid, term, endpoint, state, instance = found
                if state == _USED and found_hash == name_hash:
                    node = segment.endpoint(region, endpoint) if endpoint else None
                    result = LeaderSlot(uid, term, node, instance if node is not None else 0)
                    if len(self._kept) >= _KEPT_MAX:
                        self._kept = {}
                    self._kept[name] = (words, word, sequence, result)
                    return result
            elif not words[word + _STATE_WORD]:
                return None
            slot = (slot + 1) & (slots - 1)
        return None


_HASH_WORDS = struct.Struct("=QQ")


def _benchmark() -> None:
    """Print what one operation costs."""
    import tempfile
    import timeit

    with tempfile.TemporaryDirectory() as folder:
        table = create_table(folder, "n1", 2)
        writers = [RegionWriter(folder, index) for index in range(2)]
        names = [f"group {number}" for number in range(2000)]
        for name in names:
            writers[shard_of(name, 2)].set_leader(name, 7, 1, "n2", 99)
        reader = LeaderTableReader(folder)
        term = 1

        def update() -> None:
            nonlocal term
            term += 1
            writers[shard_of(names[0], 2)].set_leader(names[0], 7, term, "n2", 99)

        def cost_us(call: object, number: int) -> float:
            return min(timeit.repeat(call, number=number, repeat=5)) / number * 1e6  # type: ignore[arg-type]

        print(f"look-up of a kept name   {cost_us(lambda: reader.lookup('group 0'), 100_000):6.2f} µs")
        print(f"look-up of another name  {cost_us(lambda: reader._look('group 1'), 20_000):6.2f} µs")
        print(f"look-up of no name       {cost_us(lambda: reader.lookup('none'), 20_000):6.2f} µs")
        print(f"update                   {cost_us(update, 20_000):6.2f} µs")
        reader.close()
        for writer in writers:
            writer.close()
        table.close()


if __name__ == "__main__":
    _benchmark()

"""A data directory that something else has written: every start ends in members, or in the one tree of StorageError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fuzz.garbage import changed, fuzzed, pack, values
from hypothesis import given
from hypothesis import strategies as st
from storage.test_crashes import SETTINGS, WORKLOAD
from storage.test_damage import reopen, snapshot_of, type_of_file, written

from raftfleet.core.messages import Entry
from raftfleet.storage import inspect, records
from raftfleet.storage.base import StorageError
from raftfleet.storage.wal import segment_name
from raftfleet.testing.disk import FakeFiles

DISK, _ = written(WORKLOAD, **SETTINGS)
CONTENTS = snapshot_of(DISK)
FILES = sorted(name for name, data in CONTENTS.items() if data)
INSTANCE, SEQUENCE = 77, 1

numbers = st.one_of(st.integers(0, 40), st.sampled_from([2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]))
small = st.integers(0, 2**32 - 1) | st.integers(0, 5)


def start(contents: dict[str, bytes | None]) -> None:
    """As a worker does; what is found must be good for something."""
    try:
        store, found = reopen(contents)
    except StorageError:
        return
    for group in found.groups:
        assert group.uid >= 0 and group.life >= 0
    store.close()


def disk_of(contents: dict[str, bytes | None]) -> FakeFiles:
    disk = FakeFiles()
    for name, data in contents.items():
        disk.names[name] = None
        if data is not None:
            disk.names[name] = file = type_of_file()
            file.now = bytearray(data)
            file.durable = bytearray(data)
    return disk


def look(contents: dict[str, bytes | None]) -> None:
    """As ``raftfleet-node wal`` does."""
    for read in (inspect.verify, lambda path, files: list(inspect.dump(path, files=files))):
        try:
            read("/d", files=disk_of(contents))
        except StorageError:
            pass


@st.composite
def damaged_contents(draw: Callable[..., Any]) -> dict[str, bytes | None]:
    """One or two files cut, flipped, exchanged or gone."""
    contents = dict(CONTENTS)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(FILES))
        data = bytearray(contents.get(name) or b"")
        kind = draw(st.integers(0, 4))
        if kind == 0:
            contents.pop(name, None)
            continue
        if kind == 1:
            data = data[: draw(st.integers(0, len(data)))]
        elif kind == 2:
            for _ in range(draw(st.integers(1, 40))):
                if data:
                    data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        elif kind == 3:
            data = bytearray(contents.get(draw(st.sampled_from(FILES))) or b"")
        else:
            at = draw(st.integers(0, len(data)))
            data[at:at] = draw(st.binary(max_size=64))
        contents[name] = bytes(data)
    return contents


@fuzzed
@given(damaged_contents())
def test_damaged_files_end_in_members_or_in_a_storage_error(contents: dict[str, bytes | None]) -> None:
    start(contents)
    look(contents)


@st.composite
def a_record(draw: Callable[..., Any]) -> bytes:
    """A record with a right checksum and anything in it, often nearly right."""
    uid = draw(st.integers(1, 3) | st.just(records.SHARD_UID))
    kind = draw(st.integers(0, 9))
    what = draw(st.integers(0, 3))
    if what == 0:
        body = draw(st.binary(max_size=40))
    elif what == 1:
        body = pack(draw(values))
    elif kind in (records.ENTRIES, records.FORWARD):
        return records.pack_entries(uid, draw(numbers), [Entry(3, draw(st.integers(0, 255)), b"x")] * 2, kind)
    else:
        tree = ["name", {"machine": "a:B"}, [1, 2], 0, None] if kind == records.GROUP else ["key", b"value"]
        body = pack(draw(changed(tree)))
    return records.pack_record(kind, uid, draw(numbers), draw(numbers), draw(small), body)


@fuzzed
@given(st.lists(st.lists(a_record(), min_size=1, max_size=4), min_size=1, max_size=4))
def test_records_with_a_right_checksum_and_a_wrong_meaning_are_damage(batches: list[list[bytes]]) -> None:
    header = records.SegmentHeader(records.FORMAT, INSTANCE, SEQUENCE, 1, bytes(16), records.node_hash("n1"))
    data = bytearray(records.pack_header(header))
    for number, rows in enumerate(batches, 1):
        begin = len(data)
        data += b"".join(rows)
        data += records.pack_mark(number, SEQUENCE, INSTANCE, begin, len(data), rows)
    contents: dict[str, bytes | None] = {path: None for path, what in CONTENTS.items() if what is None}
    contents[f"/d/wal/{segment_name(SEQUENCE)}"] = bytes(data) + bytes(4096)
    start(contents)
    look(contents)

"""Flipped bits, missing and foreign pieces: each is noticed, and costs as little as it must."""

from __future__ import annotations

from dataclasses import replace

import pytest
from storage.model import Driver, check
from storage.test_crashes import SETTINGS, WORKLOAD, start

from raftfleet.core.messages import Entry
from raftfleet.storage.base import RecoveredShard, StorageDamaged, StorageError
from raftfleet.storage.records import pack_mark, pack_note
from raftfleet.storage.scan import Batch, Tail, scan_segment
from raftfleet.storage.store import DAMAGED, DAMAGED_FILES_MAX, ShardStore
from raftfleet.testing.disk import FakeFiles

SMALL: list[tuple[object, ...]] = [
    ("group", 1),
    ("group", 2),
    ("group", 3, 5, None),
    ("sync",),
    ("append", 1, 0, 2, 1),
    ("append", 2, 0, 1, 1),
    ("vote", 3, 2, 9),
    ("sync",),
    ("append", 1, 1, 2, 2),
    ("sync",),
    ("vote", 1, 2, 3),
    ("append", 2, 0, 1, 1),
    ("sync",),
    ("mark",),
]


def written(steps: list[tuple[object, ...]], **settings: int) -> tuple[FakeFiles, Driver]:
    disk, driver = FakeFiles(), Driver()
    store, found = ShardStore.open("/d", node="n1", new_instance=77, files=disk, **settings)
    driver.settle(store, found)
    for step in steps:
        driver.step(store, step)
    disk.crash(keep=1.0)
    return disk, driver


def snapshot_of(disk: FakeFiles) -> dict[str, bytes | None]:
    return {name: None if file is None else bytes(file.now) for name, file in disk.names.items()}


def reopen(contents: dict[str, bytes | None]) -> tuple[ShardStore, RecoveredShard]:
    disk = FakeFiles()
    for name, data in contents.items():
        disk.names[name] = None
        if data is not None:
            disk.names[name] = file = type_of_file()
            file.now = bytearray(data)
            file.durable = bytearray(data)
    return ShardStore.open("/d", node="n1", new_instance=99, files=disk, **SETTINGS)


def type_of_file():  # type: ignore[no-untyped-def]
    disk = FakeFiles()
    disk.open("/x", create=True)
    return disk.names["/x"]


def healthy_groups(found: RecoveredShard, driver: Driver, store: ShardStore) -> None:
    """The groups that were given back are exactly as acknowledged."""
    found_uids = {group.uid for group in found.groups}
    damaged = {damage.uid for damage in found.damaged if damage.uid is not None}
    model = driver.acked
    if any("note" in damage.what for damage in found.damaged):
        model = replace(model, notes=found.notes)  # said to be out of date
    assert found_uids | damaged >= set(model.groups), "a group vanished in silence"
    stones = {uid: stone for uid, stone in model.tombstones.items() if uid not in damaged}
    part = type(model)({uid: model.groups[uid] for uid in found_uids}, stones, model.notes)
    quiet = RecoveredShard(found.instance, False, found.fleet, found.groups, found.tombstones, found.notes, damaged=[])
    check(store, quiet, part)


@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_at_every_byte_of_a_small_log_is_noticed(bit: int) -> None:
    disk, driver = written(SMALL, segment_bytes=4096 + 1600)
    contents = snapshot_of(disk)
    (name,) = [name for name in contents if name.endswith(".wal")]
    clean = contents[name]
    assert clean is not None
    end = len(clean.rstrip(b"\0"))
    counts = {"harmless": 0, "one group": 0, "cut": 0}
    for at in range(len(clean)):
        flipped = bytearray(clean)
        flipped[at] ^= 1 << bit
        try:
            store, found = reopen({**contents, name: bytes(flipped)})
        except StorageError as error:
            raise AssertionError(f"byte {at}: refused the whole directory: {error}") from error
        assert found.instance == 77
        damaged = {damage.uid for damage in found.damaged}
        try:
            healthy_groups(found, driver, store)
        except AssertionError as error:
            raise AssertionError(f"byte {at} of {end}: {error}; {list(map(str, found.damaged))}") from error
        assert damaged or found.cut_bytes, f"byte {at} of {end}: nobody noticed"
        assert len(damaged - {None}) <= 1, f"byte {at}: one flipped bit cost groups {damaged}"
        if damaged - {None}:
            counts["one group"] += 1
        elif damaged:
            counts["harmless"] += 1
        else:
            counts["cut"] += 1
    print(f"bit {bit} of {len(clean)} bytes: {counts}")
    assert counts["one group"] > 300


def test_a_flipped_bit_in_a_log_of_many_segments_is_noticed() -> None:
    disk, driver = FakeFiles(), Driver()
    store = start(disk, driver)
    for step in WORKLOAD[:30]:
        driver.step(store, step)
    driver.sync(store)
    store.mark()
    disk.crash(keep=1.0)
    contents = snapshot_of(disk)
    tried = refused = 0
    for name, clean in contents.items():
        if clean is None or "/archive/" in name or not name.endswith((".wal", ".snap")):
            continue
        for at in range(0, len(clean), 3):
            flipped = bytearray(clean)
            flipped[at] ^= 16
            again, found = reopen({**contents, name: bytes(flipped)})
            try:
                healthy_groups(found, driver, again)
                assert found.damaged or found.cut_bytes, "nobody noticed"
                lost = {damage.uid for damage in found.damaged} - {None}
                assert len(lost) <= 1, lost
            except AssertionError as error:
                raise AssertionError(f"byte {at} of {name}: {error}; {list(map(str, found.damaged))}") from error
            tried += 1
            refused += bool(lost)
    print(f"{tried} flipped bits in segments and snapshots, {refused} cost one group")


def test_a_disk_that_damages_every_snapshot_does_not_fill_the_archive() -> None:
    disk, driver = written([("group", 1), ("append", 1, 0, 40, 1), ("sync",), ("mark",)])
    for behind in range(30, 0, -1):
        store = start(disk, driver)
        driver.step(store, ("snapshot", 1, behind))
        store.close()
        (newest,) = [name for name in sorted(disk.names) if name.startswith("/d/snapshots/")]
        file = disk.names[newest]
        assert file is not None
        file.now[-1] ^= 1
        file.durable[-1] ^= 1
    start(disk, driver).close()
    kept = [name for name in disk.names if name.endswith(DAMAGED)]
    assert len(kept) == DAMAGED_FILES_MAX


def test_a_batch_without_a_later_mark_is_a_torn_tail_and_one_with_is_damage() -> None:
    for mark in (False, True):
        disk, _driver = written(SMALL[:-1] if not mark else SMALL, segment_bytes=4096 + 1600)
        contents = snapshot_of(disk)
        (name,) = [name for name in contents if name.endswith(".wal")]
        data = bytearray(contents[name] or b"")
        at = data.rfind(b"2-2-1 ")  # in the last entry of group 2, in the last batch
        data[at] ^= 1
        _store, found = reopen({**contents, name: bytes(data)})
        if mark:
            assert [damage.uid for damage in found.damaged] == [2]
            assert "a record of" in found.damaged[0].what
            assert name.rpartition("/")[2] in found.damaged[0].where
        else:
            assert not found.damaged
            assert found.cut_bytes


def test_a_sector_of_zeros_in_the_middle_refuses_every_group_of_that_time_and_no_later_one() -> None:
    more = [("group", 4), ("append", 4, 0, 2, 2), ("sync",), ("mark",)]
    disk, _driver = written(SMALL + more, segment_bytes=4096 + 3000)
    contents = snapshot_of(disk)
    (name,) = [name for name in contents if name.endswith(".wal")]
    data = bytearray(contents[name] or b"")
    marks = [at - 56 for at in range(len(data)) if data[at : at + 8] == b"RFLTMARK"]
    data[marks[2] + 10 : marks[3] + 20] = bytes(marks[3] - marks[2] + 10)
    _store, found = reopen({**contents, name: bytes(data)})
    assert {damage.uid for damage in found.damaged} == {None, 1, 2, 3}
    assert [group.uid for group in found.groups] == [4]


def test_a_missing_segment_is_noticed() -> None:
    steps = [("group", 1), ("sync",)]
    for _ in range(12):
        steps += [("append", 1, 0, 6, 1, 60), ("sync",)]  # type: ignore[list-item]
    disk, _driver = written(steps, segment_bytes=4096 + 1500)
    contents = snapshot_of(disk)
    names = sorted(name for name in contents if name.endswith(".wal"))
    assert len(names) > 3
    for victim in names[:-1]:
        _store, found = reopen({name: data for name, data in contents.items() if name != victim})
        if contents[victim] is not None and (contents[victim] or b"").strip(b"\0"):
            assert 1 in {damage.uid for damage in found.damaged}, victim


def test_a_damaged_group_stays_refused_until_it_is_buried() -> None:
    disk, driver = written(SMALL, segment_bytes=4096 + 1600)
    contents = snapshot_of(disk)
    (name,) = [name for name in contents if name.endswith(".wal")]
    data = bytearray(contents[name] or b"")
    data[data.find(b"1-1-1 ")] ^= 1
    store, found = reopen({**contents, name: bytes(data)})
    disk = store.files  # type: ignore[assignment]
    (damage,) = found.damaged
    assert (damage.uid, damage.term, damage.vote, damage.life) == (1, 2, 3, 0)
    store.close()
    store, found = ShardStore.open("/d", node="n1", new_instance=1, files=disk, **SETTINGS)
    assert [damage.uid for damage in found.damaged] == [1]
    store.bury(1, damage.term, damage.vote, damage.life)
    store.sync()
    store.save_group(1, "g1", {}, None, 12)
    store.append(1, 1, [Entry(3, 0, b"")])
    store.sync()
    store.close()
    store, found = ShardStore.open("/d", node="n1", new_instance=1, files=disk, **SETTINGS)
    assert [damage.uid for damage in found.damaged] == [None]  # still there to be seen, of no consequence
    assert sorted(group.uid for group in found.groups) == [1, 2, 3]
    assert driver.acked.groups.keys() == {1, 2, 3}


def test_the_older_snapshot_and_the_log_replace_a_damaged_newer_one() -> None:
    steps: list[tuple[object, ...]] = [("group", 1), ("sync",)]
    for _ in range(3):
        steps += [("append", 1, 0, 4, 1), ("sync",), ("snapshot", 1)]
    disk, driver = written(steps, segment_bytes=1 << 16)
    contents = snapshot_of(disk)
    newest = sorted(name for name in contents if name.endswith(".snap"))[-1]
    data = bytearray(contents[newest] or b"")
    data[-1] ^= 1
    store, found = reopen({**contents, newest: bytes(data)})
    healthy_groups(found, driver, store)
    (group,) = found.groups
    assert group.snapshot is not None
    assert (group.snapshot.index, group.last_index) == (8, 12)
    assert [damage.uid for damage in found.damaged] == [None]
    assert "damaged data" in found.damaged[0].what


def test_a_copy_of_the_log_inside_a_command_is_not_taken_for_the_log() -> None:
    """After damage the scan looks for marks; the bytes of a mark inside an entry name another place."""
    foreign = pack_note("k", b"v") + pack_mark(9, 1, 77, 4096, 5000, [pack_note("k", b"v")])
    disk = FakeFiles()
    store, _found = ShardStore.open("/d", node="n1", new_instance=77, files=disk, segment_bytes=1 << 16)
    store.save_group(1, "g", {}, (1,), 0)
    store.append(1, 1, [Entry(1, 1, b"x" * 50), Entry(1, 1, foreign)])
    store.sync()
    store.mark()
    disk.crash(keep=1.0)
    contents = snapshot_of(disk)
    (name,) = [name for name in contents if name.endswith(".wal")]
    data = bytearray(contents[name] or b"")
    data[data.find(b"xxxx")] ^= 1
    items = list(scan_segment(bytes(data), 1, 77, 1))
    assert [type(item) for item in items] == [Batch, Batch, Batch, Tail]
    assert [item.number for item in items if isinstance(item, Batch)] == [1, 2, 3]
    _store, found = reopen({**contents, name: bytes(data)})
    assert [damage.uid for damage in found.damaged] == [1]


def test_a_directory_whose_headers_are_all_gone_is_refused_untouched() -> None:
    disk, _driver = written(SMALL, segment_bytes=4096 + 1600)
    contents = snapshot_of(disk)
    (name,) = [name for name in contents if name.endswith(".wal")]
    broken = {**contents, name: bytes(4096) + (contents[name] or b"")[4096:]}
    with pytest.raises(StorageDamaged, match="no segment's header"):
        broken[name] = b"x" + (broken[name] or b"")[1:]
        reopen(broken)

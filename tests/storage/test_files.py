"""The store on real files: who may open a directory, what is left as it is, what a killed process leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from storage.model import Driver
from storage.test_crashes import WORKLOAD
from storage.test_damage import SMALL

from raftfleet.core.messages import Entry
from raftfleet.storage import inspect
from raftfleet.storage.base import (
    DiskState,
    ForeignStorage,
    RecoveredShard,
    StorageError,
    StorageLocked,
    StoragePoisoned,
    StorageTooNew,
)
from raftfleet.storage.files import OsFiles
from raftfleet.storage.records import SegmentHeader, node_hash, pack_header
from raftfleet.storage.store import ShardStore

FLEET = bytes(range(16))


def open_store(path: Path, **options: Any) -> tuple[ShardStore, RecoveredShard]:
    settings: dict[str, Any] = {"node": "n1", "new_instance": 77, "segment_bytes": 4096 + 1500, "segments_max": 2}
    return ShardStore.open(str(path), **{**settings, **options})


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_store_on_real_files_comes_back_as_it_was(tmp_path: Path) -> None:
    driver = Driver()
    store, found = open_store(tmp_path / "s")
    assert found.created
    assert found.instance == 77
    driver.settle(store, found)
    for step in WORKLOAD:
        driver.step(store, step)
        if step[0] == "sync":
            store.close()
            driver.acked = driver.now
            store, found = open_store(tmp_path / "s", new_instance=5)
            assert not found.created
            assert found.instance == 77
            assert not found.damaged
            driver.settle(store, found)
    store.close()


def test_two_processes_cannot_open_one_directory(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path / "s")
    with pytest.raises(StorageLocked, match="another process"):
        open_store(tmp_path / "s")
    store.close()
    open_store(tmp_path / "s")[0].close()


def test_the_lock_goes_with_the_process(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom raftfleet.storage.store import ShardStore\n"
        f"store, _ = ShardStore.open({str(tmp_path / 's')!r}, node='n1', new_instance=77)\n"
        "store.save_group(1, 'g', {}, (1,), 0)\nstore.sync()\nprint('ready', flush=True)\ntime.sleep(600)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child, child.stdout:
        assert child.stdout.readline() == b"ready\n"
        with pytest.raises(StorageLocked):
            open_store(tmp_path / "s")
        child.send_signal(signal.SIGKILL)
        child.wait()
    store, found = open_store(tmp_path / "s")
    assert [group.uid for group in found.groups] == [1]
    store.close()


@pytest.mark.parametrize("other", [{"node": "n2"}, {"fleet": bytes(reversed(FLEET))}])
def test_a_directory_of_another_node_or_fleet_is_refused_and_untouched(tmp_path: Path, other: dict[str, Any]) -> None:
    open_store(tmp_path / "s", fleet=FLEET)[0].close()
    before = contents(tmp_path)
    with pytest.raises(ForeignStorage, match="belongs to"):
        open_store(tmp_path / "s", **other)
    assert contents(tmp_path) == before
    open_store(tmp_path / "s", fleet=FLEET)[0].close()


def test_a_directory_of_a_newer_version_is_refused_and_untouched(tmp_path: Path) -> None:
    open_store(tmp_path / "s")[0].close()
    (segment,) = [path for path in (tmp_path / "s/wal").iterdir() if path.read_bytes().strip(b"\0")]
    data = segment.read_bytes()
    segment.write_bytes(pack_header(SegmentHeader(2, 77, 1, 1, bytes(16), node_hash("n1"))) + data[4096:])
    before = contents(tmp_path)
    with pytest.raises(StorageTooNew, match="format 2"):
        open_store(tmp_path / "s")
    assert contents(tmp_path) == before


def test_a_directory_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ForeignStorage, match=r"thesis\.tex"):
        open_store(tmp_path)
    assert list(contents(tmp_path)) == ["thesis.tex"]


def test_a_fleet_joined_later_is_remembered_and_another_refused(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path / "s")
    store.set_fleet(FLEET)
    with pytest.raises(ForeignStorage):
        store.set_fleet(bytes(reversed(FLEET)))
    store.close()
    store, found = open_store(tmp_path / "s")
    assert found.fleet == FLEET
    store.close()


def test_a_failed_fdatasync_is_final(tmp_path: Path) -> None:
    class Failing(OsFiles):
        broken = False

        def fdatasync(self, handle: int) -> None:
            if self.broken:
                raise OSError(5, "injected")
            super().fdatasync(handle)

    files = Failing()
    store, _ = open_store(tmp_path / "s", files=files)
    store.save_group(1, "g", {}, (1,), 0)
    files.broken = True
    with pytest.raises(StoragePoisoned, match="fdatasync"):
        store.sync()
    files.broken = False
    assert store.state is DiskState.POISONED
    for call in (store.sync, store.work, lambda: store.save_snapshot(1, 1, 1, b"")):
        with pytest.raises(StoragePoisoned):
            call()
    store.close()
    store, found = open_store(tmp_path / "s")
    assert len(found.groups) <= 1
    store.close()


def test_the_log_stays_bounded_while_one_group_is_idle_and_another_busy(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path / "s", segment_bytes=1 << 16, segments_max=3)
    store.save_group(1, "idle", {}, (1,), 0)
    store.append(1, 1, [Entry(1, 1, b"idle entry %d" % i) for i in range(20)])
    store.save_group(2, "busy", {}, (1,), 0)
    last = 0
    most = 0
    for round_number in range(1000):
        store.append(2, last + 1, [Entry(1, 1, b"x" * 100) for _ in range(8)])
        last += 8
        store.sync()
        if round_number % 100 == 99:
            store.save_snapshot(2, last, 1, b"state")
        store.work(8192)
        most = max(most, store.segment_count)
    assert most <= 6, most
    store.close()
    store, found = open_store(tmp_path / "s")
    groups = {group.uid: group for group in found.groups}
    assert not found.damaged
    assert groups[1].last_index == 20
    assert groups[1].entries[3].data == b"idle entry 3"
    assert groups[2].last_index == last
    store.close()


def test_entries_that_a_conflict_removed_do_not_come_back_with_a_copy(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path / "s", segment_bytes=1 << 14, segments_max=1)
    store.save_group(1, "idle", {}, (1,), 0)
    store.append(1, 1, [Entry(1, 1, b"old %d" % i) for i in range(10)])
    store.sync()
    store.append(1, 8, [Entry(2, 1, b"new")])
    store.save_group(2, "busy", {}, (1,), 0)
    for last in range(200):
        store.append(2, last + 1, [Entry(2, 1, b"x" * 500)])
        store.sync()
        if last % 20 == 19:
            store.save_snapshot(2, last + 1, 2, b"state")
        store.work(1 << 20)
    assert not (tmp_path / "s/wal/0000000000000001.wal").exists()
    store.close()
    store, found = open_store(tmp_path / "s", segment_bytes=1 << 14)
    assert not found.damaged
    (idle,) = [group for group in found.groups if group.uid == 1]
    assert [entry.data for entry in idle.entries[6:]] == [b"old 6", b"new"]
    store.close()


def test_a_live_log_larger_than_the_bound_is_not_copied_round_and_round(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path / "s", segment_bytes=1 << 16, segments_max=2)
    store.save_group(1, "g", {}, (1,), 0)
    last = 0
    for _ in range(600):
        store.append(1, last + 1, [Entry(1, 1, b"x" * 1000)])
        last += 1
        store.sync()
        store.work()
    rounds = 0
    while store.work() or store.is_dirty:
        store.sync()
        rounds += 1
        assert rounds < 200, "idle, and still copying"
    assert store.wants_snapshot() == [1]
    assert store.segment_count * (1 << 16) < 3 * 600 * 1000
    store.close()
    store, found = open_store(tmp_path / "s", segment_bytes=1 << 16)
    assert not found.damaged, found.damaged
    assert (found.groups[0].first_index, found.groups[0].last_index) == (1, last)
    store.close()


def test_inspect_shows_what_is_there_and_changes_nothing(tmp_path: Path) -> None:
    driver = Driver()
    store, found = open_store(tmp_path / "s", segment_bytes=1 << 14)
    driver.settle(store, found)
    for step in SMALL:
        driver.step(store, step)
    driver.snapshot(store, 1)
    before = contents(tmp_path)
    path = str(tmp_path / "s")
    listed = list(inspect.list_directory(path))
    assert {row["type"] for row in listed} == {"segment", "snapshot"}
    records = list(inspect.dump(path, data=True))
    assert {"group", "entries", "vote"} <= {row["kind"] for row in records}
    assert {row["uid"] for row in inspect.dump(path, uid=2)} == {2}
    report = inspect.verify(path)
    assert report["ok"]
    assert {row["uid"]: row["last_index"] for row in report["groups"]} == {
        uid: group.last for uid, group in driver.acked.groups.items()
    }
    json.dumps([listed, records, report])
    assert contents(tmp_path) == before
    (segment,) = [row["file"] for row in listed if row["type"] == "segment" and row["state"] == "in use"]
    damaged = bytearray((tmp_path / "s" / segment).read_bytes())
    damaged[damaged.find(b"1-1-1 ")] ^= 1
    store.close()
    copy = tmp_path / "copy" / "wal"
    copy.mkdir(parents=True)
    (copy / os.path.basename(segment)).write_bytes(damaged)
    report = inspect.verify(str(copy.parent))
    assert not report["ok"]
    assert "group 0x1 is refused" in report["damaged"][0]["what"]
    assert any(row["kind"] == "damaged" and row["uid"] == 1 for row in inspect.dump(str(copy.parent)))


def test_a_wiped_directory_is_a_new_instance_and_says_so(tmp_path: Path) -> None:
    open_store(tmp_path / "s")[0].close()
    store, found = open_store(tmp_path / "s2", new_instance=78)
    assert (found.created, found.instance) == (True, 78)
    store.close()


def test_a_removed_groups_last_snapshot_lies_in_the_archive(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path / "s")
    store.save_group(1, "g", {}, (1,), 0)
    store.append(1, 1, [Entry(1, 1, b"x")])
    store.sync()
    for _ in range(2):
        store.save_snapshot(1, 1, 1, b"the state")
    store.forget_group(1)
    store.sync()
    (archived,) = (tmp_path / "s/archive").iterdir()
    assert not list((tmp_path / "s/snapshots").iterdir())
    (row,) = [row for row in inspect.list_directory(str(tmp_path / "s")) if row["type"] == "snapshot"]
    assert (row["name"], row["index"], row["state"]) == ("g", 1, "whole")
    assert archived.read_bytes().endswith(b"the state")
    store.close()


def test_no_directory_at_all_raises_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        open_store(tmp_path / "not" / "there")

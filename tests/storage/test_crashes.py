"""Every file call of a scripted workload fails, is torn, or is where the power goes; then the store is opened again.

After each: what was acknowledged is there; what was not is there as the whole batch or not at all; no group is called
damaged; and the reopened store takes new work that survives a second loss of power.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from storage.model import Driver

from raftfleet.storage.base import DiskState, StorageError, StorageFull
from raftfleet.storage.store import ShardStore
from raftfleet.testing.disk import CRASH, EIO, ENOSPC, TEAR, FakeFiles, PowerLoss

SEGMENT_BYTES = 4096 + 1500
SETTINGS = {"segment_bytes": SEGMENT_BYTES, "segments_max": 2}

WORKLOAD: list[tuple[object, ...]] = [
    ("group", 0),
    ("group", 7),
    ("vote", 7, 1, 2),
    ("sync",),
    ("append", 7, 0, 3, 1),
    ("append", 0, 0, 1, 1),
    ("sync",),
    ("append", 7, 0, 5, 1),
    ("note", "fleet", b"abc"),
    ("sync",),
    ("vote", 7, 2, 3),
    ("append", 7, 2, 4, 2),  # a conflict: two entries replaced
    ("sync",),
    ("group", 9, 4, None),
    ("install", 9, 20, 2),
    ("sync",),
    ("append", 9, 0, 2, 2),
    ("sync",),
    ("snapshot", 7),
    ("work", 3),
    ("append", 7, 0, 10, 2),
    ("append", 9, 0, 10, 2),
    ("sync",),
    ("work", 3),
    ("append", 7, 3, 2, 3),
    ("vote", 7, 3, 1),
    ("sync",),
    ("snapshot", 7, 1),
    ("work", 3),
    ("bury", 9, 4),
    ("note", "fleet", b"abcd"),
    ("sync",),
    ("append", 7, 0, 12, 3, 60),
    ("sync",),
    ("work", 4),
    ("append", 7, 0, 12, 3, 60),
    ("sync",),
    ("work", 4),
    ("append", 7, 0, 2, 3),
    ("sync",),
    ("group", 9, 30, None),
    ("install", 9, 7, 3),
    ("sync",),
    ("work", 6),
    ("mark",),
    ("append", 7, 0, 12, 3, 60),
    ("sync",),
    ("work", 6),
    ("install", 9, 5, 3),  # ahead of a log that is durable
    ("sync",),
    ("forget", 9),
    ("sync",),
    ("snapshot", 7),
    ("append", 7, 0, 30, 3, 60),  # more than a segment holds
    ("sync",),
    ("work", 6),
    ("sync",),
    ("work", 6),
]

AFTERWARDS: list[tuple[object, ...]] = [
    ("group", 20),
    ("append", 20, 0, 3, 4),
    ("vote", 20, 4, 4),
    ("sync",),
    ("append", 20, 1, 8, 5, 60),
    ("sync",),
    ("work", 4),
    ("append", 20, 0, 8, 5, 60),
    ("sync",),
    ("work", 4),
]


def start(disk: FakeFiles, driver: Driver) -> ShardStore:
    store, found = ShardStore.open("/d", node="n1", new_instance=77, files=disk, **SETTINGS)
    try:
        assert found.instance == 77
        driver.settle(store, found)
    except BaseException:
        store.close()
        raise
    return store


def run(disk: FakeFiles, driver: Driver, plan: Callable[[int, str], int | None]) -> None:
    """The workload, until it ends or the fault ends it."""
    disk.plan = plan
    try:
        store = start(disk, driver)
        for step in WORKLOAD:
            driver.step(store, step)
        store.close()
    except (StorageError, PowerLoss):
        pass
    finally:
        disk.plan = lambda number, name: None


def go_on(disk: FakeFiles, driver: Driver, context: str) -> None:
    """Reopen, check, work on, lose all that is not synced, reopen, check."""
    try:
        store = start(disk, driver)
        for step in AFTERWARDS:
            driver.step(store, step)
        disk.crash(keep=0.0)
        store = start(disk, driver)
        store.close()
    except Exception as error:
        raise AssertionError(f"{context}; calls before: {disk.log[-12:]}") from error


def count_calls() -> int:
    disk, driver = FakeFiles(), Driver()
    run(disk, driver, lambda number, name: None)
    return disk.calls


def test_the_workload_itself_uses_all_of_the_store() -> None:
    disk, driver = FakeFiles(), Driver()
    run(disk, driver, lambda number, name: None)
    called = {line.split()[0] for line in disk.log}
    assert called >= {"pwrite", "fdatasync", "fallocate", "rename", "unlink", "sync_dir", "mkdir", "lock", "pread"}
    removed = {line for line in disk.log if line.startswith("unlink /d/wal/")}
    assert len(removed) >= 3, "no segment was freed"
    assert any("archive" in name for name in disk.names), "nothing was archived"


@pytest.mark.parametrize("keep", [0.0, 1.0, 0.5, 0.1, 0.9])
def test_nothing_acknowledged_is_lost_when_the_power_goes(keep: float) -> None:
    points = 0
    for point in range(1, count_calls() + 1):
        for seed in range(1 if keep in (0.0, 1.0) else 4):
            disk, driver = FakeFiles(), Driver()
            run(disk, driver, lambda number, name, point=point: CRASH if number == point else None)
            disk.crash(random.Random(f"{point}/{seed}"), keep=keep)
            go_on(disk, driver, f"power lost at call {point}, keep={keep}, seed={seed}")
            points += 1
    print(f"power lost at {points} points (keep={keep})")


@pytest.mark.parametrize("fault", [EIO, ENOSPC, TEAR])
@pytest.mark.parametrize("power", [False, True])
def test_nothing_acknowledged_is_lost_when_a_call_fails(fault: int, power: bool) -> None:
    """``power``: the machine goes down right after; else only the process, and the page cache lies as after a failed
    fsync."""
    points = 0
    for point in range(1, count_calls() + 1):
        disk, driver = FakeFiles(), Driver()
        run(disk, driver, lambda number, name, point=point: fault if number == point else None)
        if power:
            disk.crash(random.Random(point), keep=0.5)
        else:
            disk.kill()
        go_on(disk, driver, f"{fault} at call {point}, power={power}")
        points += 1
    print(f"fault {fault} at {points} points (power={power})")


def test_a_crash_within_recovery_is_survived() -> None:
    """The power goes at some call of the workload, and again at every call of the start that follows."""
    points = 0
    calls = count_calls()
    for first in range(3, calls, max(calls // 25, 1)):
        second = 0
        while True:
            second += 1
            disk, driver = FakeFiles(), Driver()
            run(disk, driver, lambda number, name, first=first: CRASH if number == first else None)
            disk.crash(random.Random(first), keep=0.6)
            at = disk.calls + second
            disk.plan = lambda number, name, at=at: CRASH if number == at else None
            try:
                store = start(disk, driver)
            except PowerLoss:
                disk.plan = lambda number, name: None
                disk.crash(random.Random(second), keep=0.5)
                go_on(disk, driver, f"power lost at call {first} and at call {second} of the start")
                points += 1
                continue
            disk.plan = lambda number, name: None
            store.close()
            break
    print(f"power lost at {points} points of recovery")
    assert points > 100


def test_a_full_disk_keeps_the_batch_and_goes_on_when_there_is_space() -> None:
    disk, driver = FakeFiles(), Driver()
    store = start(disk, driver)
    driver.step(store, ("group", 1))
    driver.step(store, ("sync",))
    disk.capacity_bytes = disk.used_bytes()
    full = 0
    for _ in range(60):
        driver.append(store, 1, 0, 3, 1, 60)
        try:
            store.sync()
        except StorageFull:
            full += 1
            assert store.state is DiskState.FULL
            break
        driver.sync(store)
    assert full
    assert not store.work()
    assert store.state is DiskState.FULL
    disk.capacity_bytes = 1 << 30
    store.work()
    assert store.state is DiskState.OK
    driver.sync(store)
    disk.crash(keep=0.0)
    go_on(disk, driver, "after the disk was full")

"""Snapshots of real nodes with data directories: written by a forked child, and found again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import msgpack
import psutil
import pytest
from e2e.conftest import APPS

import raftfleet
from raftfleet.testing import LocalFleet
from raftfleet.wire.exported import ExportedState

SHELF = raftfleet.GroupConfig("shelf:Shelf")
CHUNK = b"x" * 400_000


@pytest.fixture
def durable() -> Iterator[LocalFleet]:
    with LocalFleet(app_dirs=[APPS], durable=True) as fleet:
        yield fleet


def shelf_on(fleet: LocalFleet) -> raftfleet.Fleet:
    fleet.start_node("n1", "z1")
    client = fleet.connect("n1")
    client.add_consensus_group("shelf", 1, SHELF)
    return client


def put(client: raftfleet.Fleet, count: int) -> None:
    """Put chunks on the shelf, over and over in the same fifty places."""
    for number in range(count):
        client.command("shelf", ["put", number % 50, CHUNK], timeout=20.0, retry=10)


def snapshots(fleet: LocalFleet) -> list[Path]:
    return sorted((fleet.nodes["n1"].options["data_dir"] / "shard-0" / "snapshots").glob("*.snap"))


def writers(fleet: LocalFleet) -> list[psutil.Process]:
    """Children of the shard: those that write a snapshot."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(fleet.worker_pid("n1", 0)).children()
    return []


def test_a_large_state_is_written_by_a_child_and_found_again(durable: LocalFleet) -> None:
    client = shelf_on(durable)
    put(client, 150)
    durable.wait_until(lambda: snapshots(durable) and not writers(durable), 60.0, "a snapshot")
    disk = durable.status("n1")["workers"][0]["disk"]
    assert disk["snapshots_made"] >= 1
    assert disk["fork_us_max"] > 0, "a child wrote it"
    durable.kill_node("n1")
    durable.restart_node("n1")
    client = durable.connect("n1")
    assert client.query("shelf", "count", timeout=20.0, retry=20) == 50


def test_a_child_that_dies_costs_nothing_and_another_is_made(durable: LocalFleet) -> None:
    client = shelf_on(durable)
    client.command("shelf", ["dump", "slowly"])
    put(client, 20)
    (writer,) = durable.wait_until(lambda: writers(durable), 60.0, "a child that writes")
    writer.kill()
    durable.wait_until(lambda: "no snapshot could be made" in durable.nodes["n1"].log(), 60.0, "its death to be told")
    assert not list((durable.nodes["n1"].options["data_dir"] / "shard-0" / "snapshots").glob("*.tmp"))
    assert snapshots(durable) == []
    client.command("shelf", ["dump", ""])
    durable.wait_until(lambda: snapshots(durable), 60.0, "a snapshot at last")
    assert client.query("shelf", "count") == 20


def test_a_worker_that_ends_takes_its_child_along(durable: LocalFleet) -> None:
    client = shelf_on(durable)
    client.command("shelf", ["dump", "slowly"])
    put(client, 20)
    (writer,) = durable.wait_until(lambda: writers(durable), 60.0, "a child that writes")
    durable.kill_worker("n1", 0)
    durable.wait_until(lambda: not writer.is_running() or writer.status() == psutil.STATUS_ZOMBIE, 20.0, "its end")
    assert durable.connect("n1").query("shelf", "count", timeout=20.0, retry=20) == 20


def test_the_older_snapshot_does_where_the_newer_is_damaged(durable: LocalFleet) -> None:
    client = shelf_on(durable)
    for _ in range(40):  # how much log there is when the first child is done depends on how fast it was
        put(client, 50)
        durable.wait_until(lambda: not writers(durable), 60.0, "the child that writes to end")
        if len(snapshots(durable)) == 2:
            break
    assert len(snapshots(durable)) == 2
    durable.kill_node("n1")
    newer = max(snapshots(durable))
    data = bytearray(newer.read_bytes())
    data[len(data) // 2] ^= 1
    newer.write_bytes(data)
    durable.restart_node("n1")
    assert durable.connect("n1").query("shelf", "count", timeout=20.0, retry=20) == 50
    assert "damaged" in durable.nodes["n1"].log()
    assert (durable.nodes["n1"].options["data_dir"] / "shard-0" / "archive" / f"{newer.name}.damaged").exists()


def test_the_large_last_state_of_a_removed_group_is_put_into_the_archive(durable: LocalFleet) -> None:
    client = shelf_on(durable)
    put(client, 20)
    client.remove_consensus_group("shelf")
    archive = durable.nodes["n1"].options["data_dir"] / "shard-0" / "archive"

    def last_state() -> bool:
        files = [ExportedState.unpack(path.read_bytes()) for path in archive.glob("*.snap")]
        return [len(msgpack.unpackb(file.state, strict_map_key=False)) for file in files] == [21]

    durable.wait_until(lambda: not writers(durable) and last_state(), 60.0, "the last state in the archive")
    assert snapshots(durable) == []

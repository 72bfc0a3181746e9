"""Real nodes whose disks fill up and fail."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from e2e.conftest import APPS
from e2e.load import JUST_AN_INT, THREE_NODES_IN_THREE_ZONES, Load, add_groups, assert_at_rest, instances

import raftfleet
from raftfleet import errors
from raftfleet.testing import LocalFleet

FILLER = raftfleet.GroupConfig("filler:Filler")
CHUNK = b"x" * 1_000_000
MIB = 1 << 20
SEGMENT = 64 * MIB


@pytest.fixture
def durable() -> Iterator[LocalFleet]:
    with LocalFleet(app_dirs=[APPS], durable=True) as fleet:
        yield fleet


class SmallDisk:
    """A file system with room for one log segment; most of it is taken by a file that :meth:`free` removes."""

    def __init__(self, path: Path) -> None:
        self.data_dir = path / "data"
        self._ballast = path / "ballast"
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 2 * SEGMENT)

    def free(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def small_disk(durable: LocalFleet) -> Iterator[SmallDisk]:
    path = durable.folder / "disk"
    path.mkdir()
    size = 3 * SEGMENT + 16 * MIB
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "raftfleet-test", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield SmallDisk(path)
    finally:
        durable.close()  # its nodes hold files there
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def small_disks(durable: LocalFleet) -> Iterator[dict[str, Path]]:
    """A file system for each of three nodes, with room for one log segment; :func:`enlarge` makes more."""
    mounted: dict[str, Path] = {}
    try:
        for name in THREE_NODES_IN_THREE_ZONES:
            path = durable.folder / f"disk-{name}"
            path.mkdir()
            options = f"size={SEGMENT + 16 * MIB},mode=700"
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "raftfleet-test", str(path)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
            mounted[name] = path
        yield mounted
    finally:
        durable.close()  # its nodes hold files there
        for path in mounted.values():
            subprocess.run(["umount", "--lazy", str(path)], check=True)


def enlarge(path: Path) -> None:
    """The file system gets room for three more segments."""
    subprocess.run(["mount", "-o", f"remount,size={4 * SEGMENT + 16 * MIB}", str(path)], check=True)


def fill(client: raftfleet.Fleet, name: str, chunks: int = 200) -> tuple[int, int]:
    """Send large commands until one is refused; returns how many bytes were acknowledged, and how many are in doubt."""
    acknowledged = doubtful = 0
    for _ in range(chunks):
        try:
            client.command(name, CHUNK, timeout=5.0, retry=0)
            acknowledged += len(CHUNK)
        except errors.OutcomeUnknown:  # the one that met the end of the space: it is in the log, and not saved
            doubtful += len(CHUNK)
        except errors.DiskFull:
            return acknowledged, doubtful
    raise AssertionError("the disk did not fill up")


def disk_state(fleet: LocalFleet, name: str) -> str:
    return str(fleet.status(name)["workers"][0]["disk"]["state"])


def test_a_node_without_room_refuses_commands_answers_queries_and_goes_on_by_itself(
    durable: LocalFleet, small_disk: SmallDisk
) -> None:
    durable.start_node("n1", "z1", data_dir=small_disk.data_dir)
    client = durable.connect("n1")
    client.add_consensus_group("filler", 1, FILLER)
    acknowledged, doubtful = fill(client, "filler")
    assert disk_state(durable, "n1") == "full"
    assert acknowledged <= client.query("filler", None, timeout=10.0) <= acknowledged + doubtful
    with pytest.raises(errors.DiskFull):
        client.command("filler", b"y", retry=0)
    small_disk.free()
    durable.wait_until(lambda: disk_state(durable, "n1") in ("ok", "low"), 30.0, "space to be noticed")
    total = client.command("filler", b"y", timeout=10.0, retry=10)
    assert acknowledged <= total <= acknowledged + doubtful, "nothing but commands in doubt came to it"
    durable.kill_node("n1")
    durable.restart_node("n1")
    assert durable.connect("n1").query("filler", None, timeout=10.0, retry=10) == total + 1


def test_a_node_without_room_hands_its_leaderships_over_and_takes_part_again_later(
    durable: LocalFleet, small_disk: SmallDisk
) -> None:
    durable.start_node("n1", "z1", data_dir=small_disk.data_dir)
    durable.start_node("n2", "z2")
    durable.start_node("n3", "z3")
    groups = add_groups(durable, 4, via="n2")
    client = durable.connect("n2")
    client.add_consensus_group("filler", 3, FILLER)
    durable.wait_settled()
    with Load(durable, groups, via=["n2", "n3"]) as load:
        for _ in range(68):  # a little more than a segment holds
            client.command("filler", CHUNK, timeout=20.0, retry=10)
        durable.wait_until(lambda: disk_state(durable, "n1") == "full", 30.0, "n1 to have no room")
        durable.wait_until(lambda: durable.status("n1")["workers"][0]["leaders"] == 0, 30.0, "n1 to lead nothing")
        load.await_progress(3)
        client.command("filler", CHUNK, timeout=20.0, retry=10)
        small_disk.free()
        durable.wait_until(lambda: disk_state(durable, "n1") in ("ok", "low"), 30.0, "space to be noticed")
        load.await_progress(3)
    assert_at_rest(durable, THREE_NODES_IN_THREE_ZONES, 3, load)
    durable.kill_node("n2")
    assert durable.connect("n1").query("filler", None, timeout=10.0, retry=20) == 69 * len(CHUNK)


def test_while_all_disks_are_full_idle_groups_keep_leaders_that_answer_queries(
    durable: LocalFleet, small_disks: dict[str, Path]
) -> None:
    for name, zone in THREE_NODES_IN_THREE_ZONES.items():
        durable.start_node(name, zone, workers=1, data_dir=small_disks[name] / "data")
    client = durable.connect("n1")
    # Long enough that no leader is lost to a machine that has a lot to do: none could follow it.
    patient = {"election_timeout_s": 20.0}
    client.add_consensus_group("filler", 3, raftfleet.GroupConfig("filler:Filler", **patient))
    idle = {f"idle{number}": number for number in range(6)}
    for name, value in idle.items():
        client.add_consensus_group(name, 3, raftfleet.GroupConfig(JUST_AN_INT.machine, **patient))
        client.command(name, ["set", value], retry=20)
    durable.wait_settled(deadline_s=60.0)
    acknowledged, doubtful = fill(client, "filler")
    # The third may have room for a last command that the other two, which are a quorum, have not.
    full = durable.wait_until(
        lambda: len(found := {name for name in small_disks if disk_state(durable, name) == "full"}) >= 2 and found,
        60.0,
        "the disks to be full",
    )
    before = {name: client.status(name, timeout=20.0)["term"] for name in idle}
    readers = [durable.connect(name) for name in small_disks]
    until = time.monotonic() + 18.0  # a leadership that nobody took is offered once more after 15 s
    while time.monotonic() < until:
        for reader in readers:
            assert {name: reader.query(name, "get", timeout=10.0, retry=3) for name in idle} == idle
    assert {name: client.status(name, timeout=20.0)["term"] for name in idle} == before, "no leadership was lost"
    for name in idle:
        if client.status(name, timeout=20.0)["leader"] in full:
            with pytest.raises(errors.DiskFull):
                client.command(name, "inc", timeout=20.0, retry=0)
    for path in small_disks.values():
        enlarge(path)
    durable.wait_until(
        lambda: all(disk_state(durable, name) in ("ok", "low") for name in small_disks), 60.0, "space to be noticed"
    )
    for name, value in idle.items():
        assert client.command(name, "inc", timeout=10.0, retry=20) == value
    total = client.query("filler", None, timeout=10.0, retry=20)
    assert acknowledged <= total <= acknowledged + doubtful


def test_a_worker_whose_write_fails_ends_and_reads_its_disk_again(durable: LocalFleet) -> None:
    durable.start_nodes(THREE_NODES_IN_THREE_ZONES)
    groups = add_groups(durable, 6)
    before = instances(durable)
    with Load(durable, groups, via=["n2", "n3"]) as load:
        load.await_progress()
        pid = durable.worker_pid("n1", 0)
        with contextlib.suppress(psutil.NoSuchProcess):
            # From now on the kernel refuses every write to a file of this process (EFBIG).
            psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (0, 0))
        durable.wait_until(lambda: "exited with code 10" in durable.nodes["n1"].log(), 60.0, "the worker to end")
        durable.wait_until(lambda: durable.worker_pid("n1", 0) not in (0, pid), 60.0, "the worker to be back")
        load.await_progress(3, deadline_s=60.0)
    assert instances(durable) == before
    assert_at_rest(durable, THREE_NODES_IN_THREE_ZONES, 3, load)

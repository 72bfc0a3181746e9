"""A large snapshot on its way to a member that lags, and SIGKILL in each phase of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from e2e.conftest import APPS

import raftfleet
from raftfleet.testing import LocalFleet

PLACES = 40
SIZE_BYTES = 400_000
LOG_PUTS = 90
"""36 MB of commands: more than is kept behind what is applied, so that whoever missed them needs a snapshot."""


class Lagging:
    """Three nodes, one of which missed so much that it needs a snapshot as soon as it is back.

    Attributes:
        leader: the node that leads the group.
        late: the node that missed it.
    """

    def __init__(self, fleet: LocalFleet) -> None:
        self.fleet = fleet
        fleet.start_nodes({"n1": "z1", "n2": "z2", "n3": "z3"})
        with fleet.connect("n1") as client:
            client.add_consensus_group("shelf", 3, raftfleet.GroupConfig("shelf:Shelf"), timeout=30.0)
        fleet.wait_settled()
        self.leader = fleet.groups("n1")["shelf"]["leader"]
        self.late = next(name for name in fleet.nodes if name != self.leader)
        self.round = 0

    def command(self, *arg: object) -> int:
        with self.fleet.connect(self.leader) as client:
            return int(client.command("shelf", list(arg), timeout=30.0, retry=10))  # type: ignore[call-overload]

    def leave_behind(self, how: str = "") -> None:
        """The late node is killed, and misses a new round of everything."""
        self.fleet.kill_node(self.late)
        self.round += 1
        if how:
            self.command("dump", how)
        data = bytes([self.round]) * SIZE_BYTES
        with self.fleet.connect(self.leader) as client:
            for number in range(LOG_PUTS):
                client.command("shelf", ["put", number % PLACES, data], timeout=30.0, retry=10)

    def bring_back(self) -> None:
        self.fleet.restart_node(self.late, wait=False)

    def folder(self, name: str) -> Path:
        path: Path = self.fleet.nodes[name].options["data_dir"] / "shard-0" / "snapshots"
        return path

    def arriving(self) -> list[Path]:
        return list(self.folder(self.late).glob("incoming-*.tmp"))

    def dumping(self, name: str) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.fleet.worker_pid(name, 0)).children()
        return []

    def is_up_to_date(self) -> bool:
        with self.fleet.connect(self.leader) as client:
            status = client.status("shelf")
        rows = {row["node"]: row for row in status["members"]}
        return self.late in rows and rows[self.late]["match"] >= status["commit"] and len(rows) == 3

    def check(self) -> None:
        """The late member comes up to date, and has every byte: it leads, and is asked."""
        self.fleet.wait_until(self.is_up_to_date, 90.0, f"{self.late} to be up to date")
        if self.fleet.groups(self.late)["shelf"]["leader"] != self.late:
            with self.fleet.connect(self.leader) as client:

                def leads() -> bool:
                    client.replace_leader("shelf", self.late)
                    return bool(self.fleet.groups(self.late)["shelf"]["leader"] == self.late)

                self.fleet.wait_until(leads, 60.0, f"{self.late} to lead")
        with self.fleet.connect(self.late) as client:
            assert client.query("shelf", "count", timeout=30.0, retry=10) == PLACES
            for number in range(PLACES):
                got = client.query("shelf", ["first byte", number], timeout=30.0, retry=10)  # type: ignore[call-overload]
                assert got == self.round
        self.fleet.wait_until(lambda: not self.arriving(), 30.0, "what had arrived to be a snapshot, or gone")


@pytest.fixture
def lagging() -> Iterator[Lagging]:
    with LocalFleet(app_dirs=[APPS], durable=True) as fleet:
        yield Lagging(fleet)


def test_a_late_member_gets_a_large_state_though_its_child_is_killed(lagging: Lagging) -> None:
    lagging.leave_behind("slowly")
    lagging.bring_back()
    (child, *_) = lagging.fleet.wait_until(lambda: lagging.dumping(lagging.leader), 60.0, "a child that dumps")
    lagging.command("dump", "")
    child.kill()
    lagging.check()


def test_a_leader_that_is_killed_while_its_child_dumps_costs_only_time(lagging: Lagging) -> None:
    lagging.leave_behind("slowly")
    lagging.bring_back()
    lagging.fleet.wait_until(lambda: lagging.dumping(lagging.leader), 60.0, "a child that dumps")
    lagging.fleet.kill_worker(lagging.leader, 0)
    lagging.command("dump", "")
    for name in lagging.fleet.nodes:  # whoever leads now may have begun to dump slowly before it was told not to
        for child in lagging.dumping(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    lagging.check()


@pytest.mark.parametrize("who", ["sender", "receiver", "all"])
def test_whoever_is_killed_while_chunks_are_under_way_the_state_arrives(lagging: Lagging, who: str) -> None:
    fleet = lagging.fleet
    lagging.leave_behind()
    lagging.bring_back()
    fleet.wait_until(lambda: lagging.arriving() or lagging.is_up_to_date(), 60.0, "chunks to arrive")
    fleet.pause_node(lagging.late)  # so that the end is not reached before somebody is killed
    if who == "all":
        fleet.kill_all_nodes()
        for name in fleet.nodes:
            fleet.restart_node(name, wait=False)
    elif who == "receiver":
        fleet.kill_node(lagging.late)
        lagging.bring_back()
    else:
        fleet.kill_worker(lagging.leader, 0)
        fleet.resume_node(lagging.late)
    lagging.check()


def test_a_receiver_that_is_killed_while_it_loads_gets_it_again(lagging: Lagging) -> None:
    fleet = lagging.fleet
    lagging.leave_behind("loads slowly")
    lagging.bring_back()
    fleet.wait_until(lambda: "loading slowly" in fleet.nodes[lagging.late].log(), 60.0, "the state to be loaded")
    assert lagging.arriving(), "it is not durable yet, and not acknowledged"
    fleet.kill_worker(lagging.late, 0)
    lagging.command("dump", "")
    lagging.check()

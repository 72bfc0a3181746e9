"""Another number of workers at the next start: nothing is lost, the fleet serves on, and shards come and go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from e2e.conftest import APPS
from e2e.load import THREE_NODES_IN_THREE_ZONES, Load, add_groups, assert_at_rest

from raftfleet.core.names import shard_of
from raftfleet.testing import LocalFleet

ZONES = THREE_NODES_IN_THREE_ZONES
GROUP_COUNT = 10


@pytest.fixture
def durable() -> Iterator[LocalFleet]:
    with LocalFleet(app_dirs=[APPS], durable=True) as fleet:
        yield fleet


def shard_directories(fleet: LocalFleet, name: str) -> list[str]:
    return sorted(path.name for path in fleet.nodes[name].options["data_dir"].glob("shard-*"))


def restart_all(fleet: LocalFleet, workers: int) -> None:
    for name in fleet.nodes:
        fleet.restart_node(name, wait=False, workers=workers)
    for name in fleet.nodes:
        fleet.wait_until(lambda name=name: fleet.status(name)["state"] == "active", 60.0, f"{name} to be active")


def shares(groups: list[str], workers: int) -> list[int]:
    """How many of the groups belong to each shard of a node that has a member of all."""
    counts = [0] * workers
    for group in groups:
        counts[shard_of(group, workers)] += 1
    return counts


def wait_resharded(fleet: LocalFleet, groups: list[str], workers: int) -> None:
    """Every node has exactly so many shards, and on each of them the members that belong there."""
    for name in fleet.nodes:
        fleet.wait_until(
            lambda name=name: len(fleet.status(name)["workers"]) == workers, 120.0, f"{name} to have {workers} shards"
        )
        fleet.wait_until(
            lambda name=name: len(shard_directories(fleet, name)) == workers, 60.0, f"the old stores of {name} to go"
        )
        fleet.wait_until(
            lambda name=name: (
                [worker["members"] for worker in fleet.status(name)["workers"]] == shares(groups, workers)
            ),
            120.0,
            f"all members on {name} to be where they belong",
        )
    fleet.wait_settled(deadline_s=120.0)


def test_one_node_after_the_other_is_resharded_under_load(durable: LocalFleet) -> None:
    durable.start_nodes(ZONES, workers=3)
    groups = add_groups(durable, GROUP_COUNT)
    with Load(durable, groups, via=ZONES, retry=90) as load:
        load.await_progress(3, deadline_s=60.0)
        for name in ZONES:
            load.leave(name)
            assert durable.stop_node(name) == 0
            load.await_progress(2, deadline_s=60.0)
            durable.restart_node(name, workers=1)
            load.join([name])
            load.await_progress(2, deadline_s=60.0)
        wait_resharded(durable, groups, 1)
        load.await_progress(2, deadline_s=60.0)
    assert_at_rest(durable, ZONES, 3, load)
    for name in ZONES:
        assert "re-sharding is done" in durable.nodes[name].log()


def test_all_nodes_at_once_more_then_fewer_killed_on_the_way(durable: LocalFleet) -> None:
    durable.start_nodes(ZONES, workers=4)
    for name in ZONES:  # it has ports for four; begin with two
        assert durable.stop_node(name) == 0
    restart_all(durable, 2)
    wait_resharded(durable, [], 2)
    groups = add_groups(durable, GROUP_COUNT)
    with Load(durable, groups, via=ZONES, retry=90) as load:
        load.await_progress(3, deadline_s=60.0)
        for workers in (4, 1, 3, 2):  # the next number comes while groups may still be on their way
            durable.kill_all_nodes()
            restart_all(durable, workers)
            load.await_progress(3, deadline_s=120.0)
        wait_resharded(durable, groups, 2)
        load.await_progress(3, deadline_s=60.0)
    assert_at_rest(durable, ZONES, 3, load)


def test_a_node_alone_is_resharded_and_removed_groups_stay_removed(durable: LocalFleet) -> None:
    durable.start_node("n1", "z1", workers=3)
    groups = add_groups(durable, 8, replicas=1)
    client = durable.connect("n1")
    for number, group in enumerate(groups):
        client.command(group, ["set", number], retry=20)
    assert durable.stop_node("n1") == 0
    durable.restart_node("n1", workers=1)
    client.remove_consensus_group(groups[0])
    wait_resharded(durable, groups[1:], 1)
    assert set(client.consensus_groups()) == set(groups[1:])
    for number, group in enumerate(groups[1:], 1):
        assert client.query(group, "get", retry=20) == number
    assert durable.stop_node("n1") == 0
    durable.restart_node("n1", workers=3)
    wait_resharded(durable, groups[1:], 3)
    for number, group in enumerate(groups[1:], 1):
        assert client.command(group, "inc", retry=20) == number
    assert max(shares(groups[1:], 3)) < len(groups) - 1, "they are spread again"

"""Sixty groups under load, while everything happens to the nodes that can happen to nodes."""

from __future__ import annotations

import pytest
from e2e.load import (
    FOUR_NODES_IN_TWO_ZONES,
    THREE_NODES_IN_THREE_ZONES,
    Load,
    add_groups,
    assert_at_rest,
    fleet_group_leader,
)

from raftfleet.testing import LocalFleet

GROUP_COUNT = 60
REPLICAS = 3

layouts = pytest.mark.parametrize(
    "zones",
    [
        pytest.param(THREE_NODES_IN_THREE_ZONES, id="3_nodes_in_3_zones"),
        pytest.param(FOUR_NODES_IN_TWO_ZONES, id="4_nodes_in_2_zones"),
    ],
)


@layouts
def test_steady_clients_each_count_without_a_gap(fleet: LocalFleet, zones: dict[str, str]) -> None:
    fleet.start_nodes(zones)
    groups = add_groups(fleet, GROUP_COUNT, replicas=REPLICAS)
    with Load(fleet, groups, via=zones) as load:
        load.await_progress(20)
    assert_at_rest(fleet, zones, REPLICAS, load)


@layouts
def test_twice_as_many_nodes_join_and_the_first_leave_one_by_one(fleet: LocalFleet, zones: dict[str, str]) -> None:
    newcomers = {f"m{number}": zone for number, zone in enumerate([*zones.values(), *zones.values()])}
    fleet.start_nodes(zones)
    groups = add_groups(fleet, GROUP_COUNT, replicas=REPLICAS)
    with Load(fleet, groups, via=zones) as load:
        load.await_progress()
        fleet.start_nodes(newcomers, deadline_s=60.0)
        load.join(newcomers)
        fleet.wait_active(len(zones) + len(newcomers))
        load.await_progress()
        for name in zones:
            load.leave(name)
            fleet.call(name, "deactivate", {"wait": True}, timeout=60.0)
            assert sum(worker["members"] for worker in fleet.status(name)["workers"]) == 0
            assert fleet.stop_node(name) == 0
            load.await_progress()
    assert_at_rest(fleet, newcomers, REPLICAS, load)


@layouts
def test_a_killed_node_is_purged_and_its_members_are_replaced(fleet: LocalFleet, zones: dict[str, str]) -> None:
    victim, *others = zones
    fleet.start_nodes(zones, node_purge_failure_time_window=3)
    groups = add_groups(fleet, GROUP_COUNT, replicas=REPLICAS)
    with Load(fleet, groups, via=others) as load:
        load.await_progress()
        fleet.kill_node(victim)
        load.await_progress(4)
        assert victim in fleet.call(others[0], "unreachable_nodes") or victim not in zones_of(fleet, others[0])
        fleet.wait_active(len(others))
        load.await_progress()
    assert_at_rest(fleet, {name: zones[name] for name in others}, REPLICAS, load)


@layouts
def test_a_killed_worker_with_the_fleet_groups_leader_comes_back_as_new(
    fleet: LocalFleet, zones: dict[str, str]
) -> None:
    fleet.start_nodes(zones)
    groups = add_groups(fleet, GROUP_COUNT, replicas=REPLICAS)
    victim = fleet_group_leader(fleet)
    with Load(fleet, groups, via=[name for name in zones if name != victim]) as load:
        load.await_progress()
        killed_pid = fleet.kill_worker(victim, 0)
        load.await_progress(4)
        fleet.wait_until(lambda: fleet.worker_pid(victim, 0) not in (0, killed_pid), 10.0, "the worker's restart")
        # Until its members are replaced, the victim's groups stand on two legs: rest comes only after that.
        fleet.wait_until(lambda: hosted_by(fleet, victim) > 0, 20.0, f"members on {victim} again")
        load.await_progress()
    assert_at_rest(fleet, zones, REPLICAS, load)
    assert fleet.status(victim)["workers"][0]["restarts"] == 1


def zones_of(fleet: LocalFleet, name: str) -> set[str]:
    """Active nodes in the eyes of node ``name``."""
    return {node for nodes in fleet.call(name, "active_nodes").values() for node in nodes}


def hosted_by(fleet: LocalFleet, name: str) -> int:
    """Members that the workers of node ``name`` say they hold."""
    return sum(worker["members"] for worker in fleet.status(name)["workers"])

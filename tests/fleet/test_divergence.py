"""A member whose state differs, in whole simulated fleets: it is told, shown, and made anew from the majority."""

from __future__ import annotations

import pytest

from raftfleet.core.config import GroupConfig
from raftfleet.core.names import shard_of
from raftfleet.testing.fleet import COUNTER, SimFleet, SimFleetOptions, SimNode

CHECKED = GroupConfig(COUNTER.machine, divergence_check_entries=5)
THREE = {"n1": "z1", "n2": "z2", "n3": "z3"}


def started(nodes: dict[str, str] = THREE, seed: int = 1) -> SimFleet:
    fleet = SimFleet(seed, SimFleetOptions(may_diverge=True))
    fleet.start(nodes)
    fleet.add_group("counter", 3, CHECKED)
    fleet.wait_settled()
    return fleet


def increments(fleet: SimFleet, count: int, node: str = "n1") -> list[int]:
    client = fleet.client(node)
    return [client.result(client.command("counter", "inc", retry=10)) for _ in range(count)]


def rot(fleet: SimFleet, instance: int) -> None:
    worker, member = next((w, m) for w, m in fleet.members_of(fleet.uid_of("counter")) if w.instance == instance)
    worker.work(lambda host: setattr(member, "state", member.state + 1000))
    fleet.run_for(0.01)


def some_instances(fleet: SimFleet) -> tuple[int, list[int]]:
    leader = fleet.leader_of("counter")
    assert leader is not None
    return leader.instance, [w.instance for w, _ in fleet.members_of(fleet.uid_of("counter")) if w is not leader]


def states(fleet: SimFleet) -> list[int]:
    fleet.run_for(1)
    return [m.state for _, m in fleet.members_of(fleet.uid_of("counter"))]


def errors_told(fleet: SimFleet) -> list[str]:
    return [text for worker in fleet.live_workers() for level, text in worker.notes if level == "error"]


def node_of(fleet: SimFleet, instance: int) -> SimNode:
    return next(worker.node for worker in fleet.live_workers() if worker.instance == instance)


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_follower_that_differs_is_made_anew_while_clients_notice_nothing(seed: int) -> None:
    fleet = started(seed=seed)
    _, (wrong, _) = some_instances(fleet)
    assert increments(fleet, 3) == [0, 1, 2]
    rot(fleet, wrong)
    assert increments(fleet, 10) == list(range(3, 13))
    name = node_of(fleet, wrong).name
    assert any(f"those on {name} differ from a quorum" in text for text in errors_told(fleet))
    fleet.run_for(3)
    fleet.wait_settled()
    assert increments(fleet, 10) == list(range(13, 23))
    assert states(fleet) == [23, 23, 23]
    uid = fleet.uid_of("counter")
    assert {w.instance for w, _ in fleet.members_of(uid)} >= {wrong}, "on the same node, by the same instance"
    assert not any(member.is_quarantined for _, member in fleet.members_of(uid))


def test_a_leader_that_differs_loses_the_lead_and_is_made_anew() -> None:
    fleet = started()
    wrong, _ = some_instances(fleet)
    increments(fleet, 3)
    rot(fleet, wrong)
    increments(fleet, 10)
    fleet.run_for(5)
    fleet.wait_settled()
    increments(fleet, 3)
    assert len(set(states(fleet))) == 1
    assert states(fleet)[0] < 1000
    leader, _ = some_instances(fleet)
    assert leader == wrong, "as a new member it is the desired leader that it was"


def test_nothing_is_removed_while_another_voter_is_away() -> None:
    fleet = started()
    _, (wrong, other) = some_instances(fleet)
    increments(fleet, 3)
    rot(fleet, wrong)
    fleet.cut_off(node_of(fleet, other).name)
    client_node = node_of(fleet, wrong).name
    assert increments(fleet, 3, client_node) == [3, 4, 5]
    fleet.run_for(5)
    uid = fleet.uid_of("counter")
    leader = fleet.leader_of("counter")
    assert leader is not None and len(leader.host.shard.members[uid].voters) == 3
    fleet.heal()
    increments(fleet, 12, client_node)
    fleet.run_for(5)
    fleet.wait_settled()
    increments(fleet, 6, client_node)
    assert len(set(states(fleet))) == 1 and states(fleet)[0] < 1000


def test_status_names_the_member_that_differs_and_forgets_it_when_it_is_well() -> None:
    fleet = started()
    leader, (wrong, _) = some_instances(fleet)
    increments(fleet, 3)
    rot(fleet, wrong)
    told = fleet.leader_of("counter").host.counters  # type: ignore[union-attr]
    while not told.get("divergences"):
        increments(fleet, 1)
    wrong_node = node_of(fleet, wrong).name
    index = shard_of("counter", 2)
    status = fleet.call("n1", "group_status", {"name": "counter"}, index=index)
    assert status["diverged"] == [wrong_node] and status["divergences"] == 1 and status["checked_index"]
    assert [m["node"] for m in status["members"] if m["diverged"]] == [wrong_node]
    info = fleet.call(node_of(fleet, leader).name, "shard_info", index=index)
    assert info["divergent"] == ["counter"] and info["counters"]["divergences"] == 1
    fleet.run_for(3)
    fleet.wait_settled()
    increments(fleet, 8)
    status = fleet.call("n1", "group_status", {"name": "counter"}, index=index)
    assert status["diverged"] == [] and status["divergences"] == 1
    info = fleet.call(node_of(fleet, leader).name, "shard_info", index=index)
    assert info["divergent"] == []


def test_a_stale_read_never_comes_from_a_quarantined_member() -> None:
    fleet = started()
    _, (wrong, _) = some_instances(fleet)
    uid = fleet.uid_of("counter")
    increments(fleet, 3)
    rot(fleet, wrong)
    fleet.cut_off(node_of(fleet, some_instances(fleet)[1][1]).name)  # so that it is not made anew meanwhile
    increments(fleet, 3, node_of(fleet, wrong).name)
    fleet.heal()
    increments(fleet, 6, node_of(fleet, wrong).name)
    client = fleet.client(node_of(fleet, wrong).name)
    for _ in range(20):
        assert client.result(client.query("counter", "get", consistency="stale", retry=10)) < 1000
    assert uid in node_of(fleet, wrong).workers[shard_of("counter", 2)].host.shard.members  # type: ignore[union-attr]


def test_the_fleets_own_group_is_checked_and_never_differs() -> None:
    fleet = started({f"n{i}": f"z{i % 3}" for i in range(1, 6)})
    for number in range(1100):
        fleet.add_group(f"group {number % 20} {number}", 1, CHECKED, wait=False)
    fleet.run_for(2)
    checks = [w.host.shard.members[0].audit for w in fleet.live_workers() if 0 in w.host.shard.members]
    assert any(audit is not None and audit.check_count for audit in checks)
    assert not any(worker.host.counters.get("divergences") for worker in fleet.live_workers())

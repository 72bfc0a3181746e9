"""A group goes over to a newer version of its state machine at one entry, or not at all (DESIGN 7)."""

from __future__ import annotations

from typing import Any

import pytest
from core.harness import Cluster

from raftfleet.core.change import ConfigChangeRefused


class Versioned:
    """A machine whose commands answer the version they ran as; version 2 keeps its state in a dict."""

    def __init__(self, machine: Any, version: int) -> None:
        self.version = version
        self.context = machine.context

    def command(self, state: Any, arg: Any) -> tuple[int, Any]:
        if self.context.version == 1:
            return 1, [*state, arg]
        return 2, {**state, "items": [*state["items"], arg]}

    def upgrade(self, state: Any, from_version: int) -> Any:
        if state == ["poison"]:
            raise ValueError("cannot")
        return {"items": state, "from": from_version, "to": self.context.version}


def cluster_with_code(**versions: int) -> tuple[Cluster, int]:
    """A settled group whose members' code knows these versions: ``m1=2`` is that of instance 1."""
    cluster = Cluster()
    leader = cluster.settle()
    for instance in cluster.shards:
        machine = cluster.member(instance).machine
        code = Versioned(machine, versions[f"m{instance}"])
        machine.version = code.version
        machine.command = code.command
        machine.upgrade = code.upgrade
    return cluster, leader


def raise_version(cluster: Cluster, leader: int, version: int) -> None:
    cluster.turn(leader, lambda shard: shard.members[1].raise_version(version))
    cluster.run_for(1)


def test_all_members_go_over_at_the_same_entry() -> None:
    cluster, leader = cluster_with_code(m1=2, m2=2, m3=2)
    assert cluster.command("a", seq=1) == 1
    raise_version(cluster, leader, 2)
    assert cluster.command("b", seq=2) == 2
    cluster.run_for(1)
    for instance in cluster.shards:
        assert cluster.state(instance) == {"items": ["a", "b"], "from": 1, "to": 2}
        assert cluster.member(instance).active_version == 2
    raise_version(cluster, leader, 2)
    assert cluster.state(leader)["from"] == 1, "asked twice, done once"


def test_until_then_newer_code_works_as_the_older_version() -> None:
    cluster, _ = cluster_with_code(m1=1, m2=2, m3=2)
    assert cluster.command("a", seq=1) == 1
    cluster.run_for(1)
    assert [cluster.state(instance) for instance in cluster.shards] == [["a"]] * 3


def test_a_member_with_older_code_stops_instead_of_applying_what_it_does_not_understand() -> None:
    cluster, leader = cluster_with_code(m1=2, m2=2, m3=2)
    late = max({1, 2, 3} - {leader})
    cluster.member(late).machine.version = 1
    raise_version(cluster, leader, 2)
    assert cluster.command("a", seq=1) == 2
    assert 1 not in cluster.shards[late].members
    assert cluster.happened("too_old")


def test_an_upgrade_that_raises_leaves_every_replica_at_the_older_version() -> None:
    cluster, leader = cluster_with_code(m1=2, m2=2, m3=2)
    cluster.command("poison", seq=1)
    raise_version(cluster, leader, 2)
    assert len(cluster.happened("upgrade_failed")) == 3
    assert cluster.command("a", seq=2) == 1
    cluster.run_for(1)
    assert [cluster.state(instance) for instance in cluster.shards] == [["poison", "a"]] * 3


def test_only_an_established_leader_raises_the_version() -> None:
    cluster, leader = cluster_with_code(m1=2, m2=2, m3=2)
    follower = max({1, 2, 3} - {leader})
    with pytest.raises(ConfigChangeRefused):
        cluster.member(follower).raise_version(2)


def test_a_new_member_gets_the_version_with_the_snapshot() -> None:
    cluster, leader = cluster_with_code(m1=2, m2=2, m3=2)
    cluster.command("a", seq=1)
    raise_version(cluster, leader, 2)
    member = cluster.member(leader)
    member.log.compact_to(member.applied)
    shard = cluster.add_shard(4)
    name, config, machine, hook = shard.may_create(1)  # type: ignore[misc]
    machine.version = 2
    shard.may_create = lambda uid: (name, config, machine, hook)
    cluster.change("add_learner", 4)
    cluster.run_for(2)
    assert cluster.member(4).active_version == 2
    assert cluster.state(4) == cluster.state(leader)

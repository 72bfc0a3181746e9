"""Most members of a group have lost what they had to their disks, on shards that still run (DESIGN 5.15)."""

from __future__ import annotations

import pytest
from core.disks import DurableCluster, DurableLone

from raftfleet.core import repair
from raftfleet.core.messages import LOSS_QUERY, LOST, ForceConfig, LossQuery, Lost


def damaged_majority(policy: str = "wait") -> tuple[DurableCluster, int]:
    """Three members that all know "precious"; the records of two are damaged while all are down. The third is named."""
    cluster = DurableCluster(on_majority_loss=policy)
    leader = cluster.settle()
    cluster.command("precious")
    cluster.command("more")
    cluster.run_for(1)
    survivor = 1 + leader % 3
    cluster.crash(1, 2, 3)
    for instance in {1, 2, 3} - {survivor}:
        damage(cluster, instance)
    cluster.restart(1, 2, 3)
    return cluster, survivor


def damage(cluster: DurableCluster, instance: int) -> None:
    file = next(f for name, f in cluster.files[instance].names.items() if name.endswith(".wal"))
    assert file is not None
    at = file.now.index(b"precious")
    for content in (file.now, file.durable):
        content[at] ^= 1


def damaged(survivor: int) -> list[int]:
    return sorted({1, 2, 3} - {survivor})


def test_a_group_whose_majority_is_damaged_waits_for_an_operator() -> None:
    cluster, survivor = damaged_majority()
    cluster.run_for(20)
    assert cluster.leader() == 0
    assert cluster.told(ForceConfig) == []
    assert cluster.member(survivor).term >> 32 == 0
    assert repair.lost_instances(cluster.member(survivor)) == set(damaged(survivor)), "they told so themselves"


def test_the_operators_word_lets_the_survivor_go_on_in_a_new_epoch_and_the_damaged_come_back_as_new() -> None:
    cluster, survivor = damaged_majority()
    cluster.run_for(5)
    repair.declare_lost(cluster.member(survivor), damaged(survivor))
    cluster.run_for(10)
    assert cluster.leader() == survivor
    member = cluster.member(survivor)
    assert (member.term >> 32, member.voters, cluster.state(survivor)) == (1, (survivor,), ["precious", "more"])
    (record,) = member.membership.audit
    assert record["dead"] == damaged(survivor)
    assert record["damaged_nodes"] == [str(instance) for instance in damaged(survivor)]
    for instance in damaged(survivor):
        cluster.change("add_learner", instance)
        cluster.run_for(1)
        if cluster.happened("member_lost")[-1:] and instance in {event[3] for event in cluster.happened("member_lost")}:
            cluster.change("remove_member", instance)  # asked once more which life it was that is lost
            cluster.run_for(1)
            cluster.change("add_learner", instance)
            cluster.run_for(1)
        cluster.change("promote", instance)
        cluster.run_for(1)
        assert cluster.state(instance) == ["precious", "more"]
    assert member.voters == (1, 2, 3)
    assert cluster.command("after") is not None


def test_the_word_about_a_member_that_is_whole_is_without_effect() -> None:
    cluster = DurableCluster()
    cluster.settle()
    cluster.command("precious")
    cluster.command("more")
    cluster.crash(1, 2, 3)
    damage(cluster, 2)
    cluster.restart(1, 2)  # 3 is down, but whole
    cluster.run_for(5)
    repair.declare_lost(cluster.member(1), [2, 3])
    cluster.run_for(10)
    assert cluster.leader() == 0, "3 never said that it lost anything"
    cluster.restart(3)
    cluster.run_for(10)
    assert cluster.leader() in (1, 3)
    assert cluster.member(cluster.leader()).term >> 32 == 0
    assert cluster.member(1).losses is None, "the word does not outlive the loss of the leader that it was about"


def test_with_survivor_a_damaged_majority_needs_no_word() -> None:
    cluster, survivor = damaged_majority("survivor")
    cluster.run_for(10)
    assert cluster.leader() == survivor
    assert cluster.state(survivor) == ["precious", "more"]
    assert len(cluster.member(survivor).membership.audit) == 1


def test_with_new_a_damaged_majority_is_told_to_the_owner_with_who_is_damaged() -> None:
    cluster, survivor = damaged_majority("new")
    cluster.run_for(10)
    assert cluster.leader() == 0
    assert cluster.happened("majority_lost")[-1][1:] == ("majority_lost", 1, damaged(survivor), damaged(survivor))


@pytest.mark.parametrize(("told", "counts"), [(6, False), (7, True), (8, True)])
def test_the_loss_of_an_earlier_life_says_nothing_of_the_present_one(told: int, counts: bool) -> None:
    lone = DurableLone()
    lone.member.membership.lives[2] = 7
    lone.pass_time(3)
    answers = lone.receive(2, Lost(LOST, 1, lone.member.term + 1, told))
    assert (repair.lost_instances(lone.member) == {2}) is counts
    assert [m.life for m in answers if isinstance(m, LossQuery)] == ([] if counts else [7])


def test_a_damaged_member_remembers_that_it_told_the_loss_of_a_life() -> None:
    lone = DurableLone()
    lone.shard.drop_member(lone.member)
    lone.shard.tombstones[1] = lone.shard.tombstones[1]._replace(is_lost=True)
    lone.turn()
    (answer,) = lone.receive(2, LossQuery(LOSS_QUERY, 1, 5, 9))
    assert answer == Lost(LOST, 1, 5, 9)
    lone.power_cycle()
    assert lone.shard.tombstones[1].life == 9


def test_a_member_that_is_here_has_lost_nothing() -> None:
    lone = DurableLone()
    assert lone.receive(2, LossQuery(LOSS_QUERY, 1, 5, 9)) == []

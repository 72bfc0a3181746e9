"""What is left of a durable group that was removed: its last state, once, and nothing that could come back to life."""

from __future__ import annotations

import msgpack
import pytest
from core.disks import DurableCluster

from raftfleet.core.member import Member
from raftfleet.core.shard import ShardSettings
from raftfleet.storage import store as store_module
from raftfleet.storage.snapshots import parse_name, write_snapshot
from raftfleet.wire.exported import ExportedState


def archived(cluster: DurableCluster, instance: int) -> list[ExportedState]:
    files = cluster.files[instance]
    states = []
    for name in files.listdir("/data/archive"):
        if parse_name(name) is not None:
            handle = files.open(f"/data/archive/{name}", write=False)
            states.append(ExportedState.unpack(files.pread(handle, files.size(handle), 0)))
            files.close(handle)
    return states


def remove_everywhere(cluster: DurableCluster, uid: int = 1) -> None:
    for instance in list(cluster.shards):
        cluster.turn(instance, lambda shard: shard.remove_group(uid))
    cluster.run_for(0.5)


def test_a_removed_group_leaves_its_last_state_on_every_disk() -> None:
    cluster = DurableCluster()
    cluster.settle()
    cluster.command("a", seq=1)
    cluster.command("b", seq=2)
    cluster.run_for(1)
    remove_everywhere(cluster)
    for instance in cluster.shards:
        (state,) = archived(cluster, instance)
        assert (state.name, msgpack.unpackb(state.state)) == ("group-1", ["a", "b"])
        assert cluster.files[instance].listdir("/data/snapshots") == []


def test_a_group_that_never_ran_a_command_leaves_nothing() -> None:
    cluster = DurableCluster()
    cluster.settle()
    remove_everywhere(cluster)
    assert [archived(cluster, instance) for instance in cluster.shards] == [[], [], []]


def test_a_removed_group_stays_removed_over_a_loss_of_power() -> None:
    cluster = DurableCluster()
    cluster.settle()
    cluster.command("a")
    cluster.run_for(1)
    remove_everywhere(cluster)
    for instance in list(cluster.shards):
        cluster.crash(instance)
        cluster.restart(instance)
        assert cluster.shards[instance].members == {}
        assert len(archived(cluster, instance)) == 1


def test_power_that_goes_before_the_removal_is_durable_brings_the_member_back_as_it_was() -> None:
    cluster = DurableCluster()
    leader = cluster.settle()
    cluster.command("a")
    cluster.run_for(1)
    other = next(instance for instance in cluster.shards if instance != leader)
    cluster.shards[other].remove_group(1)  # collected, its last state written, and not synced
    cluster.crash(other)
    cluster.restart(other)
    cluster.run_for(3)
    assert cluster.state(other) == ["a"]
    assert cluster.command("b", seq=2) == 2
    cluster.run_for(1)
    assert cluster.state(other) == ["a", "b"]


def test_the_archive_is_bounded_and_the_newest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "ARCHIVE_FILES_MAX", 2)
    cluster = DurableCluster(uids=(1, 2, 3, 4))
    for uid in (1, 2, 3, 4):
        cluster.settle(uid)
        cluster.command(f"of {uid}", uid)
    cluster.run_for(1)
    for uid in (2, 1, 4, 3):
        remove_everywhere(cluster, uid)
    for instance in cluster.shards:
        assert sorted(state.name for state in archived(cluster, instance)) == ["group-3", "group-4"]


def test_a_state_that_cannot_be_dumped_does_not_keep_its_group_from_being_removed() -> None:
    cluster = DurableCluster()
    leader = cluster.settle()
    cluster.command("a")
    cluster.run_for(1)

    def dump(state: object) -> bytes:
        raise RuntimeError("cannot")

    cluster.member(leader).machine.dump = dump  # type: ignore[method-assign]
    remove_everywhere(cluster)
    assert archived(cluster, leader) == []
    assert all(not shard.members for shard in cluster.shards.values())
    assert cluster.happened("snapshot_failed")


def test_the_last_state_of_a_large_group_is_written_elsewhere_and_archived_when_it_is_there() -> None:
    cluster = DurableCluster()
    leader = cluster.settle()
    cluster.command("a" * 1000)
    cluster.run_for(1)
    keeper = cluster.keepers[leader]
    cluster.shards[leader].settings = ShardSettings(inline_bytes_max=100)
    begun: list[tuple[int, int, int, bytes]] = []

    def begin(member: Member, generation: int) -> bool:
        begun.append((generation, *member.make_snapshot()))
        return True

    keeper.begin_last_state = begin
    assert keeper.save_snapshot(1, *cluster.member(leader).make_snapshot())
    cluster.command("b")
    remove_everywhere(cluster)
    (state,) = archived(cluster, leader)
    assert msgpack.unpackb(state.state) == ["a" * 1000], "the newest stored one, until it is done"
    (generation, index, term, data), *more = begun
    assert not more
    files = cluster.files[leader]
    info = write_snapshot(files, "/data/snapshots", 1, index, term, generation, {"name": "group-1"}, data)
    keeper.last_state_made(info)
    (state,) = archived(cluster, leader)
    assert (state.name, msgpack.unpackb(state.state)) == ("group-1", ["a" * 1000, "b"])


def test_a_last_state_that_was_written_and_not_archived_yet_is_archived_by_the_next_start() -> None:
    cluster = DurableCluster()
    leader = cluster.settle()
    cluster.command("a")
    index, term, data = cluster.member(leader).make_snapshot()
    generation = cluster.keepers[leader].store.reserve_generation()
    cluster.shards[leader].settings = ShardSettings(inline_bytes_max=1)
    cluster.keepers[leader].begin_last_state = lambda member, generation: True
    remove_everywhere(cluster)
    assert archived(cluster, leader) == []
    write_snapshot(cluster.files[leader], "/data/snapshots", 1, index, term, generation, {"name": "group-1"}, data)
    cluster.crash(leader)
    cluster.restart(leader)
    (state,) = archived(cluster, leader)
    assert msgpack.unpackb(state.state) == ["a"]

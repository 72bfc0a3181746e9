"""Snapshots that take their time: dumped elsewhere, sent from a file, received into one."""

from __future__ import annotations

import random
import zlib
from typing import Any

import msgpack
import pytest
from core.disks import DurableCluster, DurableLone
from core.harness import SECOND_US, WALL_US, Cluster, Journal, Lone, append

from raftfleet.core.member import Member
from raftfleet.core.membership import Membership
from raftfleet.core.messages import SNAPSHOT, Snapshot, SnapshotAnswer
from raftfleet.core.sending import RETRY_US, BytesSource
from raftfleet.core.shard import Shard, ShardSettings
from raftfleet.core.snapshots import dump_bytes_guess
from raftfleet.storage.arrival import SYNC_BYTES
from raftfleet.storage.base import StoragePoisoned
from raftfleet.storage.keeper import Keeper
from raftfleet.testing.disk import EIO, ENOSPC, TEAR, FakeFiles

CHUNK = 64
SETTINGS = ShardSettings(chunk_bytes=CHUNK, inline_bytes_max=CHUNK)


class SlowDumps(Cluster):
    """A cluster in memory whose states are dumped elsewhere, and done when the test says so."""

    def __init__(self, *args: Any, **fields: Any) -> None:
        self.dumps: list[tuple[Shard, Member, BytesSource]] = []
        super().__init__(*args, log_entries_kept=2, **fields)

    def add_shard(self, instance: int) -> Shard:
        shard = super().add_shard(instance)
        shard.settings = SETTINGS

        def begin(member: Member) -> bool:
            if any(row[0] is shard for row in self.dumps):
                return False
            self.dumps.append((shard, member, BytesSource(*member.make_snapshot())))
            return True

        shard.begin_dump = begin
        return shard

    def finish_dump(self) -> None:
        shard, member, source = self.dumps.pop(0)
        shard.dump_made(member, source)

    def fail_dump(self) -> None:
        shard, member, _ = self.dumps.pop(0)
        self.turn(shard.instance, lambda shard: shard.dump_failed(member, "its writer was killed"))

    def leave_behind(self, *instances: int) -> int:
        """These miss so much that they need a snapshot."""
        leader = self.settle()
        assert leader not in instances
        self.isolate(*instances)
        for number in range(12):
            self.command(f"number {number} " + "x" * 20)
        self.heal()
        return leader


def test_whoever_waits_for_a_snapshot_counts_for_its_leader() -> None:
    cluster = SlowDumps()
    leader = cluster.leave_behind(3)
    term = cluster.member(leader).term
    cluster.crash(2)
    cluster.run_for(5)
    assert cluster.dumps, "the state is large: it is dumped elsewhere"
    assert not cluster.told(Snapshot)
    assert (cluster.leader(), cluster.member(leader).term) == (leader, term), "five election timeouts went by"
    assert cluster.member(3).leader == leader
    cluster.finish_dump()
    cluster.run_for(1)
    assert cluster.state(3) == cluster.state(leader)
    cluster.command("and both go on")
    cluster.run_for(1)
    assert cluster.state(3)[-1] == "and both go on"
    assert not cluster.dumps, "one was enough"


def test_other_members_and_groups_are_served_while_a_state_is_dumped() -> None:
    cluster = SlowDumps(uids=(1, 2))
    leader = cluster.leave_behind(3)
    cluster.settle(2)
    cluster.run_for(1)
    assert cluster.dumps
    assert cluster.command("in the same group") == 13
    assert cluster.command("in another", 2) == 1
    assert cluster.leader() == leader


def test_two_that_need_a_snapshot_share_one() -> None:
    cluster = SlowDumps(5)
    cluster.leave_behind(4, 5)
    cluster.run_for(1)
    assert len(cluster.dumps) == 1
    cluster.finish_dump()
    cluster.run_for(1)
    assert cluster.state(4) == cluster.state(5) == cluster.state(1)
    assert not cluster.dumps


def test_the_log_behind_a_snapshot_is_kept_until_its_receiver_has_it() -> None:
    cluster = SlowDumps()
    leader = cluster.leave_behind(3)
    cluster.run_for(1)
    (_, _, source), *_ = cluster.dumps
    for number in range(30):  # without the log since the fork, what was dumped would be of no use
        cluster.command(f"meanwhile {number}")
    assert cluster.member(leader).log.snapshot_index <= source.index
    cluster.finish_dump()
    cluster.run_for(1)
    assert cluster.state(3) == cluster.state(leader)
    assert {m.index for _, _, m in cluster.told(Snapshot)} == {source.index}
    for number in range(6):
        cluster.command(f"after it {number}")
    assert cluster.member(leader).log.snapshot_index > source.index, "and no longer"


def test_the_log_is_not_kept_for_one_that_is_heard_no_more() -> None:
    cluster = SlowDumps()
    leader = cluster.leave_behind(3)
    cluster.run_for(1)
    assert cluster.dumps
    cluster.finish_dump()
    cluster.crash(3)
    cluster.run_for(60)
    for number in range(6):
        cluster.command(f"after a minute {number}")
    member = cluster.member(leader)
    assert member.applied - member.log.snapshot_index <= 4
    assert member.lead is not None and member.lead.snapshot is None


def test_a_dump_that_its_leader_does_not_live_to_see_hurts_nobody() -> None:
    cluster = SlowDumps()
    leader = cluster.leave_behind(3)
    cluster.run_for(1)
    assert cluster.dumps
    cluster.turn(leader, lambda shard: shard.members[1].step_down())
    other = cluster.settle()
    cluster.command("goes on")
    cluster.run_for(1)
    while cluster.dumps:  # the former leader's, and the new one's if it is another
        cluster.finish_dump()
        cluster.run_for(1)
    assert cluster.state(3) == cluster.state(other) == cluster.state(1)


def test_a_dump_of_a_group_that_is_removed_meanwhile_is_let_go() -> None:
    cluster = SlowDumps()
    leader = cluster.leave_behind(3)
    cluster.run_for(1)
    assert cluster.dumps
    cluster.turn(leader, lambda shard: shard.remove_group(1))
    cluster.finish_dump()
    cluster.turn(leader)
    assert 1 not in cluster.shards[leader].members


def test_a_dump_that_fails_is_told_and_tried_again_after_a_while() -> None:
    cluster = SlowDumps()
    cluster.leave_behind(3)
    cluster.run_for(1)
    cluster.fail_dump()
    cluster.run_for(RETRY_US / SECOND_US - 2)
    assert not cluster.dumps, "it costs seconds: not five times a second"
    assert [event[3] for event in cluster.happened("snapshot_failed")] == ["its writer was killed"]
    cluster.run_for(4)
    cluster.finish_dump()
    cluster.run_for(1)
    assert cluster.state(3) == cluster.state(1)


class Rotten(BytesSource):
    """Bytes that turned bad after their CRC was taken."""

    def read(self, offset: int, count: int) -> bytes:
        data = bytearray(super().read(offset, count))
        if offset == 0:
            data[-1] ^= 1
        return bytes(data)


@pytest.mark.parametrize("how", ["rotten", "short", "unreadable"])
def test_the_end_of_a_damaged_snapshot_never_leaves_and_another_is_made(how: str) -> None:
    cluster = SlowDumps()
    cluster.leave_behind(3)
    cluster.run_for(1)
    shard, member, source = cluster.dumps.pop(0)
    snapshot = member.make_snapshot()

    class Broken(Rotten):
        def read(self, offset: int, count: int) -> bytes:
            if how == "rotten":
                return super().read(offset, count)
            if offset + count < self.size_bytes:
                return BytesSource.read(self, offset, count)
            if how == "unreadable":
                raise OSError(EIO, "cannot be read")
            return b""

    shard.dump_made(member, Broken(*snapshot))
    cluster.run_for(1)
    assert cluster.told(Snapshot)
    assert all(m.offset + len(m.data) < source.size_bytes for _, _, m in cluster.told(Snapshot))
    assert cluster.happened("snapshot_failed")
    cluster.finish_dump()
    cluster.run_for(RETRY_US / SECOND_US + 2)  # its bytes may be the same, and the receiver has the damaged ones
    assert cluster.state(3) == cluster.state(1)


def test_a_receiver_that_lost_what_it_had_gets_it_again() -> None:
    cluster = SlowDumps()
    cluster.leave_behind(3)
    cluster.run_for(1)
    cluster.hold(lambda a, b, m: isinstance(m, Snapshot) and m.offset >= 3 * CHUNK)
    cluster.finish_dump()
    cluster.run_for(1)
    incoming = cluster.member(3).incoming
    assert incoming is not None and incoming.received == 3 * CHUNK
    cluster.member(3).incoming = None
    cluster.heal()
    cluster.run_for(2)
    assert cluster.state(3) == cluster.state(1)


# -- as the receiver ---------------------------------------------------------------------------------------------------


def whole(state: list[str], index: int = 10, term: int = 1) -> tuple[int, int, bytes]:
    data = msgpack.packb([1, 0, Membership.first((1, 2, 3)).pack(), WALL_US, [], 1, Journal().dump(state)])
    return index, term, data


def chunks(snapshot: tuple[int, int, bytes], term: int = 1, size: int = CHUNK, crc: int = -1) -> list[Snapshot]:
    index, index_term, data = snapshot
    known = zlib.crc32(data) if crc < 0 else crc
    return [
        Snapshot(SNAPSHOT, 1, term, index, index_term, at, len(data), 5 + at, 0, data[at : at + size], known)
        for at in range(0, len(data), size)
    ]


def test_another_leader_goes_on_where_one_stopped_if_the_bytes_are_the_same() -> None:
    lone = Lone()
    snapshot = whole(["a" * 100, "b" * 100])
    first = chunks(snapshot)
    lone.receive(2, append(1, (0, 0), [1]))
    lone.receive(2, *first[:2])
    again = chunks(snapshot, term=2)
    (answer,) = lone.receive(3, again[0])
    assert (answer.next_offset, answer.done) == (2 * CHUNK, False)
    *_, answer = lone.receive(3, *again[2:])
    assert answer.done
    assert lone.member.state == ["a" * 100, "b" * 100]


def test_a_snapshot_that_came_damaged_is_not_taken_over_nor_asked_for_at_once() -> None:
    lone = Lone()
    lone.receive(2, append(1, (0, 0), [1]))
    snapshot = whole(["a" * 100])
    bad = chunks(snapshot, crc=1)
    assert not [m for m in lone.receive(2, *bad) if m.done]
    assert (lone.member.state, lone.member.commit) == ([], 0)
    assert lone.receive(2, bad[0]) == [], "not again and again"
    lone.now_us += RETRY_US
    (answer,) = lone.receive(2, bad[0])
    assert answer.next_offset == CHUNK
    *_, answer = lone.receive(2, *chunks(snapshot))
    assert answer.done and lone.member.state == ["a" * 100]


def test_what_came_of_a_snapshot_goes_when_the_log_has_come_as_far() -> None:
    lone = Lone()
    lone.receive(2, append(1, (0, 0), [1]))
    lone.receive(2, chunks(whole(["a" * 100], index=3))[0])
    assert lone.member.incoming is not None
    lone.receive(2, append(1, (1, 1), [1, 1], commit=3))
    assert lone.member.incoming is None


# -- on disks ----------------------------------------------------------------------------------------------------------


class Disks(DurableCluster):
    """A durable cluster with housekeeping: its large states are stored before they are sent, in small chunks."""

    def add_shard(self, instance: int) -> Shard:
        shard = super().add_shard(instance)
        shard.settings = SETTINGS
        self.keepers[instance].inline_bytes_max = CHUNK
        return shard

    def turn(self, instance: int, work: Any = None) -> Any:
        effects = super().turn(instance, work)
        self.keepers[instance].work(self.local_us(instance))
        return effects

    def leave_behind(self, instance: int, count: int = 12) -> int:
        leader = self.settle()
        assert leader != instance
        self.isolate(instance)
        for number in range(count):
            self.command(f"number {number} " + "x" * 20)
        self.heal()
        return leader


def stored(files: FakeFiles) -> list[str]:
    return sorted(name for name in files.names if name.startswith("/data/snapshots/"))


def test_a_large_state_is_stored_and_sent_from_there() -> None:
    cluster = Disks(log_entries_kept=2)
    leader = cluster.leave_behind(3)
    made = cluster.keepers[leader].snapshot_count
    cluster.run_for(2)
    assert cluster.keepers[leader].snapshot_count == made + 1
    assert cluster.state(3) == cluster.state(leader)
    (name,) = stored(cluster.files[3])
    assert name.endswith(".snap")
    cluster.crash(3)
    cluster.restart(3)
    cluster.run_for(1)
    assert cluster.state(3) == cluster.state(leader)


def test_a_stored_snapshot_from_which_the_log_goes_on_is_sent_without_making_another() -> None:
    cluster = Disks(log_entries_kept=2)
    leader = cluster.leave_behind(3)
    member = cluster.member(leader)
    assert cluster.keepers[leader].save_snapshot(1, *member.make_snapshot())
    made = cluster.keepers[leader].snapshot_count
    cluster.run_for(2)
    assert cluster.state(3) == cluster.state(leader)
    assert cluster.keepers[leader].snapshot_count == made


def test_a_file_that_is_removed_while_it_is_sent_is_sent_to_its_end() -> None:
    cluster = Disks(log_entries_kept=2)
    leader = cluster.leave_behind(3)
    cluster.hold(lambda a, b, m: isinstance(m, Snapshot) and m.offset > 0)
    cluster.run_for(1)
    (first,) = stored(cluster.files[leader])
    for _ in range(2):
        cluster.command("more")
        assert cluster.keepers[leader].save_snapshot(1, *cluster.member(leader).make_snapshot())
    assert first not in stored(cluster.files[leader]), "two are kept"
    cluster.heal()
    cluster.run_for(2)
    assert cluster.state(3) == cluster.state(leader)
    (index,) = {m.index for _, _, m in cluster.told(Snapshot)}
    assert index < cluster.member(leader).applied
    assert [path for path, _ in cluster.files[leader].handles.values() if path == first] == [], "and closed then"


def test_a_stored_snapshot_that_turns_out_damaged_is_put_aside_and_another_is_sent() -> None:
    cluster = Disks(log_entries_kept=2)
    leader = cluster.leave_behind(3)
    member = cluster.member(leader)
    assert cluster.keepers[leader].save_snapshot(1, *member.make_snapshot())
    files = cluster.files[leader]
    (name,) = stored(files)
    file = files.names[name]
    assert file is not None
    file.now[-20] ^= 1
    cluster.run_for(3)
    assert cluster.state(3) == cluster.state(leader)
    assert name not in stored(files)
    assert [path for path in files.names if path.endswith(".damaged")]
    assert any("put aside" in text for _, text in cluster.keepers[leader].notes)


def test_a_stored_snapshot_that_somebody_removed_costs_nobody_a_shard() -> None:
    cluster = Disks(log_entries_kept=2)
    leader = cluster.leave_behind(3)
    assert cluster.keepers[leader].save_snapshot(1, *cluster.member(leader).make_snapshot())
    (name,) = stored(cluster.files[leader])
    cluster.files[leader].unlink(name)
    cluster.run_for(3)
    assert cluster.state(3) == cluster.state(leader)


def test_how_large_a_state_is_stays_known_over_a_restart_and_when_the_log_is_short() -> None:
    cluster = Disks(log_entries_kept=2)
    leader = cluster.settle()
    for number in range(20):
        cluster.command(f"number {number} " + "x" * 20)
    for instance in (1, 2, 3):
        assert cluster.keepers[instance].save_snapshot(1, *cluster.member(instance).make_snapshot())
    size_bytes = len(cluster.member(leader).make_snapshot()[2])
    cluster.crash(1, 2, 3)
    cluster.restart(1, 2, 3)
    for instance in (1, 2, 3):
        assert dump_bytes_guess(cluster.member(instance)) >= size_bytes


class BigLone(DurableLone):
    """A durable shard that receives what is more than a chunk into a file."""

    def open(self) -> None:
        super().open()
        self.shard.settings = SETTINGS

    def snapshots(self) -> list[str]:
        return stored(self.files)


def receiving(state: list[str], count: int) -> tuple[BigLone, list[Snapshot]]:
    """A follower to which so many chunks of a snapshot have come."""
    lone = BigLone()
    lone.receive(2, append(1, (0, 0), [1]))
    messages = chunks(whole(state))
    for message in messages[:count]:
        lone.receive(2, message)
    return lone, messages


STATE = ["a" * 100, "b" * 100]


def test_a_large_snapshot_is_written_as_it_comes() -> None:
    lone, messages = receiving(STATE, 2)
    (name,) = lone.snapshots()
    assert name.endswith(".tmp")
    incoming = lone.member.incoming
    assert incoming is not None and not incoming.buffer, "nothing of it stays in memory"
    for message in messages[2:]:
        answers = lone.receive(2, message)
    assert answers[-1].done
    (name,) = lone.snapshots()
    assert name.endswith(".snap")
    lone.power_cycle()
    assert lone.member.state == STATE
    assert (lone.member.applied, lone.member.log.last_term) == (10, 1)


def test_rule_04_what_a_crash_leaves_of_an_arrival_is_removed() -> None:
    lone, messages = receiving(STATE, 3)
    lone.power_cycle(keep=1.0)
    lone.turn()
    assert lone.snapshots() == []
    assert lone.member.state == []
    answers = [lone.receive(2, message) for message in messages]
    assert answers[-1][-1].done
    lone.power_cycle()
    assert lone.member.state == STATE


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_rule_04_a_crash_at_any_call_of_an_arrival_loses_nothing_that_was_acknowledged(keep: float) -> None:
    calls = 0
    while True:
        calls += 1
        lone, messages = receiving(STATE, 0)
        start = lone.files.calls
        stop = start + calls
        lone.files.plan = lambda number, name, stop=stop: -1 if number == stop else None  # type: ignore[misc]
        is_done = False
        try:
            for message in messages:
                is_done = is_done or any(m.done for m in lone.receive(2, message) if isinstance(m, SnapshotAnswer))
        except BaseException as error:
            assert type(error).__name__ == "PowerLoss"
        else:
            break
        lone.files.plan = lambda number, name: None
        lone.files.crash(random.Random(calls), keep=keep)
        lone.open()
        lone.turn()
        assert lone.member.state == STATE or not is_done
        assert lone.member.state in (STATE, [])
        assert not [name for name in lone.snapshots() if name.endswith(".tmp")]
    assert calls > 8, "writes, syncs, a rename: each was tried"


@pytest.mark.parametrize("fault", [EIO, ENOSPC, TEAR])
def test_rule_04_whichever_call_of_an_arrival_fails_what_was_acknowledged_is_there_and_the_rest_comes_again(
    fault: int,
) -> None:
    calls = 0
    while True:
        calls += 1
        lone, messages = receiving(STATE, 0)
        stop = lone.files.calls + calls
        lone.files.plan = lambda number, name, stop=stop: fault if number == stop else None  # type: ignore[misc]
        is_done = False
        for _ in range(3):
            try:
                for message in messages:
                    answers = lone.receive(2, message)
                    is_done = is_done or any(m.done for m in answers if isinstance(m, SnapshotAnswer))
                lone.keeper.work(lone.now_us)
            except StoragePoisoned:
                lone.files.plan = lambda number, name: None
                lone.files.crash(random.Random(calls))
                lone.open()
                assert lone.member.state == STATE or not is_done
                lone.receive(2, append(1, (0, 0), [1]))
            lone.now_us += RETRY_US
        was_met = lone.files.calls >= stop
        lone.files.plan = lambda number, name: None
        lone.power_cycle()
        assert is_done and lone.member.state == STATE, f"call {calls}"
        lone.turn()
        assert not [name for name in lone.snapshots() if name.endswith(".tmp")]
        if not was_met:
            break
    assert calls > 8


def test_no_room_for_an_arrival_costs_only_the_arrival() -> None:
    lone, messages = receiving(STATE, 1)
    lone.files.plan = lambda number, name: ENOSPC if name == "pwrite" and "incoming" in lone.files.log[-1] else None
    lone.receive(2, messages[1])
    lone.keeper.work(lone.now_us + SECOND_US)
    assert not lone.shard.is_full
    assert lone.snapshots() == [], "what was written makes room again"
    assert lone.receive(2, messages[2]) == []
    (answer,) = lone.receive(2, append(1, (1, 1), [1]))
    assert answer.accepted, "the log goes on"
    lone.files.plan = lambda number, name: None
    lone.now_us += RETRY_US
    answers = [lone.receive(2, message) for message in messages]
    assert answers[-1][-1].done


def test_an_arrival_larger_than_what_is_free_is_not_begun() -> None:
    lone, messages = receiving(STATE, 0)
    lone.files.capacity_bytes = lone.files.used_bytes() + 100
    lone.receive(2, messages[0])
    assert lone.snapshots() == []
    assert not lone.shard.is_full


def test_room_that_ends_with_the_last_chunk_holds_the_acknowledgement_back() -> None:
    lone, messages = receiving(STATE, len(chunks(whole(STATE))) - 1)
    lone.files.plan = lambda number, name: ENOSPC if name == "pwrite" else None
    assert lone.receive(2, messages[-1]) == []
    assert lone.shard.is_full
    lone.free()
    answers = [m for _, m in lone.turn() if isinstance(m, SnapshotAnswer)]
    assert [m.done for m in answers] == [True]
    lone.power_cycle()
    assert lone.member.state == STATE


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "rename", "sync_dir"])
def test_rule_14_a_disk_that_fails_an_arrival_is_finished_with(call: str) -> None:
    lone, messages = receiving(STATE, 2)
    lone.files.plan = lambda number, name: EIO if name == call else None
    with pytest.raises(StoragePoisoned):
        for message in messages[2:]:
            lone.receive(2, message)


def test_rule_14_an_arrival_whose_sync_found_no_room_is_not_synced_again() -> None:
    """Linux takes the pages for clean then: a second sync would return at once, and prove nothing."""
    lone, messages = receiving(STATE, 2)
    lone.files.plan = lambda number, name: ENOSPC if name == "fdatasync" else None
    with pytest.raises(StoragePoisoned):
        for message in messages[2:]:
            lone.receive(2, message)


def test_a_group_that_is_removed_takes_its_arrival_along() -> None:
    lone, _ = receiving(STATE, 2)
    lone.turn(lambda shard: shard.remove_group(1))
    lone.keeper.work(lone.now_us + SECOND_US)
    assert lone.snapshots() == []
    assert not [path for path, _ in lone.files.handles.values() if "incoming" in path]


def test_an_arrival_is_synced_in_pieces() -> None:
    lone = BigLone()
    lone.receive(2, append(1, (0, 0), [1]))
    size = 200_000
    messages = chunks(whole(["x" * size] * 30), size=size)
    since = longest = 0
    for message in messages:
        before = len(lone.files.log)
        answers = lone.receive(2, message)
        for call in lone.files.log[before:]:
            if "incoming" in call:
                since = 0 if call.startswith("fdatasync") else since + size * call.startswith("pwrite")
                longest = max(longest, since)
    assert answers[-1].done
    assert SYNC_BYTES <= longest < SYNC_BYTES + 2 * size


def test_an_unfinished_arrival_is_no_snapshot_to_the_keeper() -> None:
    lone, _ = receiving(STATE, 2)
    assert isinstance(lone.keeper, Keeper)
    assert lone.keeper.store.snapshot_of(1) is None

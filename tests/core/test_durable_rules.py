"""The rules of DESIGN section 5 that speak of disks, on a simulated one; each test is named after its rule."""

from __future__ import annotations

import zlib

import pytest
from core.disks import DurableCluster, DurableLone
from core.harness import SECOND_US, WALL_US, Answer, append, pack

from raftfleet.core.codes import DISK_FULL, OK
from raftfleet.core.membership import Membership
from raftfleet.core.messages import (
    BEAT,
    COMMANDS,
    CONFIG,
    GONE,
    NOOP,
    SNAPSHOT,
    TIMEOUT_NOW,
    VOTE,
    Append,
    AppendAnswer,
    Beat,
    BeatAnswer,
    Entry,
    Gone,
    Lost,
    Snapshot,
    SnapshotAnswer,
    TimeoutNow,
    Vote,
    VoteAnswer,
)
from raftfleet.core.sessions import pack_batch
from raftfleet.storage.base import StoragePoisoned
from raftfleet.testing.disk import CRASH, PowerLoss


def vote(term: int, last: tuple[int, int] = (0, 0), *, pre: bool = False) -> Vote:
    return Vote(VOTE, 1, term, pre, last[1], last[0], False)


# -- 4: snapshots -----------------------------------------------------------------------------------------------------


def snapshot_of(lone: DurableLone, term: int, index: int, state: list[str]) -> Snapshot:
    """A whole snapshot in one chunk, as the leader 2 would send it."""
    member = lone.member
    saved = member.state, member.applied, member.log
    from raftfleet.core.log import Log

    member.state, member.applied, member.log = state, index, Log()
    member.log.reset_to(index, term)
    _, _, data = member.make_snapshot()
    member.state, member.applied, member.log = saved
    return Snapshot(SNAPSHOT, 1, term, index, term, 0, len(data), 5, 0, data, zlib.crc32(data))


def test_rule_04_a_snapshot_is_on_the_disk_before_it_is_acknowledged() -> None:
    lone = DurableLone()
    lone.receive(2, append(1, (0, 0), [1]))
    message = snapshot_of(lone, 1, 10, ["a", "b"])
    answers = lone.receive(2, message)
    assert [a.done for a in answers if isinstance(a, SnapshotAnswer)] == [True]
    lone.power_cycle()
    assert lone.member.state == ["a", "b"]
    assert (lone.member.applied, lone.member.log.last_index, lone.member.log.last_term) == (10, 10, 1)


def test_rule_04_a_snapshot_that_cannot_be_saved_is_not_acknowledged_until_it_is() -> None:
    lone = DurableLone()
    lone.receive(2, append(1, (0, 0), [1]))
    message = snapshot_of(lone, 1, 10, ["a"])
    lone.fill()
    assert lone.receive(2, message) == []
    lone.free()
    answers = [m for to, m in lone.turn() if isinstance(m, SnapshotAnswer)]
    assert [a.done for a in answers] == [True]
    lone.power_cycle()
    assert lone.member.state == ["a"]


def test_rule_04_entries_that_came_with_the_snapshot_in_one_loop_follow_it_on_the_disk() -> None:
    lone = DurableLone()
    lone.receive(2, append(1, (0, 0), [1, 1]))
    message = snapshot_of(lone, 1, 4, ["a"])
    lone.receive(2, append(1, (2, 1), [1, 1, 1, 1]), message)
    assert (lone.member.log.snapshot_index, lone.member.last_index) == (4, 6)
    lone.receive(2, append(1, (6, 1), [1]))
    lone.power_cycle()
    assert (lone.member.log.snapshot_index, lone.member.last_index, lone.member.state) == (4, 7, ["a"])


# -- 5 and 7: what is damaged, and who comes back ----------------------------------------------------------------------


def damage_entries(lone: DurableLone) -> None:
    """Flip a bit in the log's first entry, behind which marks stand."""
    path = next(name for name in lone.files.names if name.endswith(".wal"))
    file = lone.files.names[path]
    assert file is not None
    at = file.now.index(b"precious")
    for content in (file.now, file.durable):
        content[at] ^= 1


def entry(term: int, text: bytes = b"x", seq: int = 1) -> Entry:
    return Entry(term, COMMANDS, pack_batch(1_700_000_000_000_000, [pack(text.decode(), seq)]))


def lost_member() -> DurableLone:
    lone = DurableLone()
    lone.receive(2, Append(1, 1, 1, 0, 0, 0, 1, 0, [entry(1, b"precious")]))
    lone.receive(2, append(1, (1, 1), [1]))
    damage_entries(lone)
    lone.power_cycle()
    assert 1 not in lone.shard.members
    return lone


def test_rule_05_a_damaged_record_costs_that_member_and_no_other() -> None:
    lone = DurableLone()
    lone.turn(lambda s: s.create_group(2, "group-2", lone.member.config, type(lone.member.machine)(), (1, 2, 3)))
    lone.receive(2, Append(1, 1, 1, 0, 0, 0, 1, 0, [entry(1, b"precious")]), append(1, (0, 0), [1, 1], uid=2))
    lone.receive(2, append(1, (2, 1), [1], uid=2))
    damage_entries(lone)
    lone.power_cycle()
    assert 1 not in lone.shard.members
    assert lone.shard.members[2].last_index == 3


def test_rule_07_a_member_whose_memory_is_damaged_gives_no_vote_and_follows_nobody_in_that_life() -> None:
    lone = lost_member()
    lone.pass_time(3)
    assert [m for m in lone.receive(3, vote(9, (0, 0))) if isinstance(m, VoteAnswer)] == []
    answers = lone.receive(2, append(9, (0, 0), [9]))
    assert [type(m) for m in answers] == [Lost], "a later term makes no damaged life whole"
    assert answers[0].life == 0
    assert 1 not in lone.shard.members


def test_rule_07_a_lost_member_comes_back_in_a_later_life_and_remembers_its_vote() -> None:
    lone = lost_member()
    lone.receive(2, append(1, (0, 0), [1]))
    (answer,) = lone.receive(2, append(1, (0, 0), [1, 1], life=7))
    assert isinstance(answer, AppendAnswer)
    assert (answer.accepted, answer.life) == (True, 7)
    lone.power_cycle()
    assert lone.member.life == 7
    assert lone.member.vote == 2


def test_rule_07_the_leader_removes_a_lost_member_and_adds_it_again() -> None:
    cluster = DurableCluster()
    leader = cluster.settle()
    cluster.command("precious")
    cluster.command("more")
    victim = 1 + leader % 3
    file = next(f for name, f in cluster.files[victim].names.items() if name.endswith(".wal"))
    assert file is not None
    at = file.now.index(b"precious")
    cluster.crash(victim)
    for content in (file.now, file.durable):
        content[at] ^= 1
    cluster.restart(victim)
    cluster.run_for(1)
    assert [event[1:] for event in cluster.happened("member_lost")] == [("member_lost", 1, victim)]
    assert cluster.leader() == leader
    cluster.change("remove_member", victim)
    cluster.run_for(0.5)
    cluster.change("add_learner", victim)
    cluster.run_for(1)
    cluster.change("promote", victim)
    cluster.run_for(1)
    assert cluster.state(victim) == ["precious", "more"]
    assert victim in cluster.member(leader).voters


def test_rule_07_a_removed_member_is_remembered_with_the_end_of_its_log() -> None:
    lone = DurableLone()
    lone.receive(2, append(1, (0, 0), [1, 1, 1]))
    lone.receive(2, Gone(GONE, 1, 1, 2))
    before = lone.shard.tombstones[1]
    lone.power_cycle()
    assert lone.shard.tombstones[1] == before
    assert before.log_end == (1, 3)
    members = Membership((1, 2, 3), (), {1: 1, 2: 0, 3: 0})
    lone.receive(2, Append(1, 1, 1, 0, 0, 0, 1, 5, [Entry(1, CONFIG, members.pack())]))
    lone.power_cycle()
    assert lone.member.forgotten_end == (1, 3)
    lone.pass_time(2.5)
    answers = [m for m in lone.receive(3, vote(9, (1, 2))) if isinstance(m, VoteAnswer)]
    assert [a.granted for a in answers] == [False], "it once acknowledged more than that candidate has"


# -- 6: saved before said ----------------------------------------------------------------------------------------------


def test_rule_06_a_vote_is_remembered_after_a_crash() -> None:
    lone = DurableLone()
    lone.pass_time(1)
    assert [m.granted for m in lone.receive(2, vote(5)) if isinstance(m, VoteAnswer)] == [True]
    lone.power_cycle()
    lone.pass_time(1.2)
    assert (lone.member.term >= 5, lone.member.vote) != (True, 0)
    assert [m.granted for m in lone.receive(3, vote(5)) if isinstance(m, VoteAnswer)] in ([], [False])


def test_rule_06_an_acknowledged_entry_survives_the_crash() -> None:
    lone = DurableLone()
    (answer,) = lone.receive(2, append(3, (0, 0), [2, 3, 3]))
    assert (answer.accepted, answer.index) == (True, 3)
    lone.power_cycle()
    assert [lone.member.log.term_at(i) for i in (1, 2, 3)] == [2, 3, 3]
    assert (lone.member.term, lone.member.vote) == (3, 2)


def test_rule_06_nothing_that_rests_on_a_failed_sync_leaves() -> None:
    lone = DurableLone()
    lone.pass_time(1)
    sent = len(lone.sends)
    lone.break_disk()
    with pytest.raises(StoragePoisoned):
        lone.receive(2, vote(5))
    with pytest.raises(StoragePoisoned):
        lone.turn()
    assert lone.sends[sent:] == []


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_rule_06_a_crash_within_the_sync_leaves_all_of_the_batch_or_nothing(call: str) -> None:
    for keep in (0.0, 0.3, 0.7, 1.0):
        lone = DurableLone()
        lone.receive(2, append(1, (0, 0), [1, 1]))
        lone.files.plan = lambda number, name: CRASH if name == call else None
        with pytest.raises(PowerLoss):
            lone.receive(2, append(2, (1, 1), [2, 2, 2]))
        lone.files.plan = lambda number, name: None
        lone.power_cycle(keep)
        terms = [lone.member.log.term_at(i) for i in range(1, lone.member.last_index + 1)]
        assert (lone.member.term, terms) in ((1, [1, 1]), (2, [1, 2, 2, 2]))


def test_rule_06_appends_leave_before_the_sync_and_votes_after_it() -> None:
    lone = DurableLone()
    lone.elect(2)
    for peer in (2, 3):
        lone.receive(peer, AppendAnswer(2, 1, lone.member.term, True, 1, 0, 0, lone.shard.stamp, 0))
    shard = lone.shard
    shard.begin(lone.now_us + 1000, WALL_US)
    shard.propose(1, pack("x", 1), Answer())
    shard.flush()
    assert [type(m) for messages in shard.take_sends().values() for m in messages] == [Append, Append]
    assert not shard.is_saved
    assert shard.persist()
    assert shard.is_saved


def test_rule_06_the_only_voter_leads_when_its_vote_is_saved() -> None:
    lone = DurableLone((1,))
    lone.fill()
    lone.now_us += 3 * SECOND_US
    lone.keeper.now_us = lone.now_us
    shard = lone.shard
    shard.begin(lone.now_us, WALL_US)
    shard.tick()
    shard.flush()
    shard.persist()
    assert shard.members[1].lead is None
    assert shard.take_sends() == {}
    lone.free()
    lone.turn()
    lone.turn()
    assert shard.members[1].is_established


def test_rule_06_a_life_is_saved_before_the_answer_that_carries_it() -> None:
    lone = DurableLone(None)
    (answer,) = lone.receive(2, append(3, (0, 0), [3], life=4))
    assert answer.life == 4
    lone.power_cycle()
    assert (lone.member.life, lone.member.life_term, lone.member.last_index) == (4, 3, 1)
    assert lone.receive(2, append(3, (0, 0), [3], life=2)) == [], "of an earlier life, in a term that knew the later"


# -- 9: silence after a restart ---------------------------------------------------------------------------------------


def test_rule_09_a_restarted_voter_gives_no_vote_for_one_election_timeout() -> None:
    lone = DurableLone()
    lone.receive(2, append(1, (0, 0), [1]))
    lone.power_cycle()
    for pre in (True, False):
        answers = lone.receive(3, vote(7, (1, 1), pre=pre))
        assert [m.granted for m in answers if isinstance(m, VoteAnswer)] == [False]
    lone.now_us += SECOND_US
    answers = lone.receive(3, vote(9, (1, 1)))
    assert [m.granted for m in answers if isinstance(m, VoteAnswer)] == [True]


def test_rule_09_a_new_member_of_a_shard_that_runs_is_not_silent() -> None:
    lone = DurableLone()
    assert [m.granted for m in lone.receive(2, vote(1)) if isinstance(m, VoteAnswer)] == [True]


# -- 13: the leader counts itself only when its own write is durable ---------------------------------------------------


def test_rule_12_an_empty_member_that_was_removed_while_it_was_down_asks_who_holds_the_group_now() -> None:
    """It knows no voter, and not any more who began it: without asking it would be there for ever."""
    lone = DurableLone(voters=None)
    lone.receive(2, append(3, (5, 3), [3], life=6))
    assert not lone.member.membership.lives
    lone.power_cycle()
    assert not lone.member.membership.lives
    assert lone.pass_time(5) == [], "nobody is known to it"
    lone.shard.holders = lambda uid: (1, 4, 5)
    asked = [to for to, m in lone.pass_time(5) if isinstance(m, Vote) and m.pre]
    assert set(asked) == {4, 5}
    lone.receive(4, Gone(GONE, 1, 3, 6))
    assert lone.member.life == 6, "who tells that knows of its addition only"
    lone.receive(4, Gone(GONE, 1, 3, 7))
    assert 1 not in lone.shard.members


def test_rule_12_a_voter_whose_peers_were_all_replaced_while_it_was_down_asks_those_who_came_after_them() -> None:
    lone = DurableLone()
    lone.receive(2, append(1, (0, 0), [1]))
    lone.power_cycle()
    lone.shard.holders = lambda uid: (3, 4, 5)
    asked = [to for to, m in lone.pass_time(6) if isinstance(m, Vote)]
    assert all(m.pre for _, m in lone.pass_time(6) if isinstance(m, Vote))
    assert asked[:2] == [2, 3], "its own voters first, and nobody else as long as they may answer"
    assert set(asked) == {2, 3, 4, 5}
    lone.receive(4, Gone(GONE, 1, 3, 7))
    assert 1 not in lone.shard.members


def test_rule_13_a_leader_whose_disk_is_full_does_not_count_itself() -> None:
    lone = DurableLone()
    lone.elect(2)
    member = lone.member
    noop = member.last_index
    lone.fill()
    shard = lone.shard
    shard.begin(lone.now_us + 1000, WALL_US)
    shard.propose(1, pack("x", 1), Answer())
    shard.flush()
    shard.take_sends()
    assert not shard.persist()
    index = member.last_index
    assert index == noop + 1
    lone.receive(2, AppendAnswer(2, 1, member.term, True, index, 0, 0, shard.stamp, 0))
    assert member.commit < index, "two hold it in memory, but only one on disk"
    lone.receive(3, AppendAnswer(2, 1, member.term, True, index, 0, 0, shard.stamp, 0))
    assert member.commit == index, "both followers have it on their disks: a quorum without this one"


def test_rule_13_a_leader_counts_itself_as_soon_as_its_write_is_durable() -> None:
    lone = DurableLone()
    lone.elect(2)
    member = lone.member
    lone.fill()
    answer = Answer()
    shard = lone.shard
    shard.begin(lone.now_us + 1000, WALL_US)
    shard.propose(1, pack("x", 1), answer)
    shard.flush()
    shard.take_sends()
    assert not shard.persist()
    index = member.last_index
    lone.receive(2, AppendAnswer(2, 1, member.term, True, index, 0, 0, shard.stamp, 0))
    assert member.commit < index
    lone.free()
    lone.turn()
    assert (member.commit, member.applied) == (index, index)
    assert (answer, OK) in [(token, code) for token, code, _ in lone.answers]


def test_rule_13_a_truncated_suffix_lowers_what_counts_as_saved() -> None:
    lone = DurableLone()
    lone.receive(2, append(1, (0, 0), [1, 1, 1, 1]))
    shard = lone.shard
    assert shard.saved_index(lone.member) == 4
    shard.begin(lone.now_us + 1000, WALL_US)
    shard.receive(3, [append(2, (1, 1), [2, 2])])
    assert shard.saved_index(lone.member) == 1
    assert shard.persist()
    assert shard.saved_index(lone.member) == 3


# -- 14: a disk that has no room, and one that fails -------------------------------------------------------------------


def full_follower() -> DurableLone:
    lone = DurableLone()
    lone.receive(2, append(1, (0, 0), [1, 1]))
    lone.fill()
    assert lone.receive(2, append(1, (2, 1), [1])) == []
    assert lone.shard.is_full
    return lone


def test_rule_14_a_full_follower_acknowledges_nothing_new_and_all_of_it_when_there_is_room() -> None:
    lone = full_follower()
    assert lone.receive(2, append(1, (3, 1), [1, 1])) == []
    assert lone.member.last_index == 3, "nothing new is taken on"
    lone.free()
    answers = [m for _, m in lone.turn() if isinstance(m, AppendAnswer)]
    assert [(a.accepted, a.index) for a in answers] == [(True, 3)]
    assert not lone.shard.is_full
    (answer,) = lone.receive(2, append(1, (3, 1), [1, 1]))
    assert (answer.accepted, answer.index) == (True, 5)
    lone.power_cycle()
    assert lone.member.last_index == 5


def test_rule_14_a_full_follower_answers_beats_and_gives_no_vote() -> None:
    lone = full_follower()
    assert [type(m) for m in lone.receive(2, Beat(BEAT, 1, 0, 1))] == [BeatAnswer]
    lone.now_us += 3 * SECOND_US
    assert lone.receive(3, vote(9, (9, 9))) == []
    assert lone.receive(2, TimeoutNow(TIMEOUT_NOW, 1, 1)) == []
    assert lone.member.term == 1


def test_rule_14_a_full_leader_refuses_commands_for_certain_and_answers_reads() -> None:
    lone = DurableLone((1,))
    lone.pass_time(3)
    assert lone.member.is_established
    first, second, read = Answer(), Answer(), Answer()
    lone.fill()
    lone.turn(lambda s: s.propose(1, pack("kept", 1), first))
    lone.turn(lambda s: s.propose(1, pack("refused", 2), second))
    lone.turn(lambda s: s.query(1, b"\xa3all", read))
    codes = {token: code for token, code, _ in lone.answers}
    assert codes == {second: DISK_FULL, read: OK}
    lone.free()
    lone.turn()
    assert {token: code for token, code, _ in lone.answers}[first] == OK
    assert lone.member.state == ["kept"]


def test_rule_14_a_full_disk_makes_no_busy_loop() -> None:
    lone = full_follower()
    lone.turn()
    assert not lone.shard.has_work


# -- the whole of it ---------------------------------------------------------------------------------------------------


def test_everything_acknowledged_is_there_after_all_disks_lost_power_at_once() -> None:
    cluster = DurableCluster(uids=(1, 2, 3))
    for uid in (1, 2, 3):
        cluster.settle(uid)
    for number in range(5):
        for uid in (1, 2, 3):
            cluster.command(f"{uid}-{number}", uid)
    cluster.crash(1, 2, 3, keep=0.5)
    cluster.restart(1, 2, 3)
    for uid in (1, 2, 3):
        leader = cluster.settle(uid)
        assert cluster.state(leader, uid) == [f"{uid}-{number}" for number in range(5)]
        assert cluster.command("after", uid) == 6


def test_a_membership_that_changed_is_what_it_was_after_a_restart() -> None:
    cluster = DurableCluster(4, voters=(1, 2, 3))
    leader = cluster.settle()
    cluster.change("add_learner", 4)
    cluster.run_for(1)
    cluster.change("promote", 4)
    cluster.run_for(1)
    cluster.crash(1, 2, 3, 4)
    cluster.restart(1, 2, 3, 4)
    leader = cluster.settle()
    assert cluster.member(leader).voters == (1, 2, 3, 4)
    assert cluster.member(4).life == cluster.member(leader).membership.lives[4] != 0


def test_one_write_and_one_sync_save_all_groups_of_a_loop() -> None:
    lone = DurableLone()
    for uid in range(2, 40):
        lone.shard.create_group(uid, f"group-{uid}", lone.member.config, type(lone.member.machine)(), (1, 2, 3))
    lone.turn()
    lone.files.log.clear()
    lone.receive(2, *(append(1, (0, 0), [1], uid=uid) for uid in range(1, 40)))
    assert [line.split()[0] for line in lone.files.log] == ["pwrite", "fdatasync"]


def test_a_loop_that_changed_nothing_touches_no_disk() -> None:
    lone = DurableLone()
    lone.receive(2, append(1, (0, 0), [1]))
    lone.files.log.clear()
    lone.receive(2, Beat(BEAT, 1, 0, 1), append(1, (1, 1), []))
    assert lone.files.log == []


def test_noop_entries_are_saved_like_any_other() -> None:
    lone = DurableLone((1,))
    lone.pass_time(3)
    lone.power_cycle()
    assert lone.member.log.entry(1).kind == NOOP

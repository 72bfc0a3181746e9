"""One test or more for each rule of DESIGN section 5 that applies in memory; each is named after its rule.

Rules 5, 9 and 14 speak of disks: :mod:`core.test_durable_rules`. 6 holds in memory trivially (nothing is saved later
than it is decided).
"""

from __future__ import annotations

import dataclasses
import zlib

import msgpack
import pytest
from core.harness import (
    SECOND_US,
    START_US,
    WALL_US,
    Answer,
    Cluster,
    Journal,
    Lone,
    append,
    config,
    pack,
)

from raftfleet.core.change import ConfigChangeRefused
from raftfleet.core.membership import AUDIT_RECORDS_MAX, Membership
from raftfleet.core.messages import (
    APPEND,
    APPEND_ANSWER,
    BEAT,
    LINK_LIST,
    SNAPSHOT,
    TIMEOUT_NOW,
    VOTE,
    VOTE_ANSWER,
    Append,
    AppendAnswer,
    Beat,
    BeatAnswer,
    Entry,
    ForceConfig,
    Gone,
    LinkList,
    LinkListAnswer,
    Snapshot,
    SnapshotAnswer,
    StepDown,
    TimeoutNow,
    Vote,
    VoteAnswer,
)
from raftfleet.core.roles import FOLLOWER, PRE_CANDIDATE

# -- 1: a follower's log ----------------------------------------------------------------------------------------------


def test_rule_01_an_append_that_came_late_deletes_nothing_after_it() -> None:
    lone = Lone()
    lone.receive(2, append(1, (0, 0), [1, 1, 1, 1], stamp=1))
    (answer,) = lone.receive(2, append(1, (0, 0), [1, 1], stamp=2))
    assert lone.member.last_index == 4
    assert (answer.accepted, answer.index) == (True, 2), "an answer speaks of what the append covered, not of the log"


def test_rule_01_a_suffix_is_deleted_from_the_first_conflict() -> None:
    lone = Lone()
    lone.receive(2, append(1, (0, 0), [1, 1, 1, 1]))
    (answer,) = lone.receive(3, append(2, (1, 1), [1, 2]))
    assert [lone.member.log.term_at(i) for i in range(1, 4)] == [1, 1, 2]
    assert lone.member.last_index == 3
    assert (answer.accepted, answer.index) == (True, 3)


def test_rule_01_an_empty_append_does_not_acknowledge_the_stale_tail_behind_it() -> None:
    lone = Lone()
    lone.receive(2, append(1, (0, 0), [1, 1, 1, 1]))
    (answer,) = lone.receive(3, append(2, (2, 1), []))
    assert (answer.accepted, answer.index) == (True, 2)
    assert lone.member.last_index == 4


def test_rule_01_commit_is_bounded_by_what_the_append_covered() -> None:
    lone = Lone()
    lone.receive(2, append(1, (0, 0), [1, 1, 1, 1]))
    lone.receive(3, append(2, (2, 1), [], commit=4))
    assert lone.member.commit == 2, "entries 3 and 4 are of a deposed leader and may not be what 4 stands for"


def test_rule_01_a_rejection_hints_where_the_logs_can_agree() -> None:
    lone = Lone()
    lone.receive(2, append(3, (0, 0), [1, 1, 3, 3, 3]))
    (answer,) = lone.receive(3, append(4, (5, 2), [4]))
    assert (answer.accepted, answer.index, answer.hint_index, answer.hint_term) == (False, 5, 2, 1)


# -- 2: reads ---------------------------------------------------------------------------------------------------------


def test_rule_02_a_leader_without_an_own_commit_answers_no_read() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.command("old")
    cluster.drop(lambda a, b, m: isinstance(m, AppendAnswer) and b == 2)
    cluster.change("transfer", 2)
    cluster.run_for(0.05)
    assert cluster.leader() == 2
    answer = cluster.query(2)
    cluster.run_for(0.4)  # beats are answered all the while: the digest confirms that 2 is followed
    assert answer.code is None
    cluster.heal()
    cluster.run_for(0.5)
    assert answer.value == ["old"]


def test_rule_02_answers_to_messages_sent_before_the_read_do_not_count() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    cluster.hold(lambda a, b, m: isinstance(m, (BeatAnswer, AppendAnswer)) and b == leader)
    cluster.run_for(0.25)
    assert cluster.held
    early = len(cluster.held)
    cluster.drop(lambda a, b, m: a == leader)
    answer = cluster.query(leader)
    cluster.release()
    cluster.run_for(0.01)
    assert early and answer.code is None, "what was sent before the read cannot confirm it"


def test_rule_02_rejections_do_not_confirm_a_reader() -> None:
    """An answer of a higher term is not a success; the read is not answered and the leader leads no more."""
    cluster = Cluster()
    leader = cluster.settle()
    cluster.isolate(leader)
    answer = cluster.query(leader)
    for peer in {1, 2, 3} - {leader}:
        stamp = cluster.shards[leader].stamp
        cluster.inject(peer, leader, AppendAnswer(APPEND_ANSWER, 1, 9, False, 1, 0, 0, stamp, 0))
    assert answer.code == 90
    assert cluster.leader() == 0


def test_rule_02_an_append_of_a_former_process_of_the_leader_proves_nothing_to_the_present_one() -> None:
    """It was under way while the machine rebooted; its stamp is of another clock, and may lie ahead of this one.

    Seed 40004 of the simulation answered reads under such a lease after another leader had been elected.
    """
    cluster = Cluster()
    leader = cluster.settle()
    cluster.change("transfer", leader % 3 + 1)
    cluster.run_for(0.5)
    leader = cluster.leader()
    member = cluster.member(leader)
    assert member.term > 1
    follower = next(peer for peer in (1, 2, 3) if peer != leader)
    before = member.lead.progress[follower].next
    cluster.inject(leader, follower, Append(APPEND, 1, member.term - 1, 1, 1, 1, 1 << 60, 0, []))
    cluster.run_for(0.05)
    assert member.is_leader and member.lead.progress[follower].next == before
    assert member.quorum_stamp() <= cluster.shards[leader].stamp
    cluster.isolate(leader)
    answer = cluster.query(leader)
    cluster.run_for(0.01)
    assert answer.code is None


def test_rule_02_a_read_sees_every_write_acknowledged_before_it() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    for number in range(5):
        cluster.command(number)
    answer = cluster.query(leader)
    cluster.run_for(0.05)
    assert answer.value == [0, 1, 2, 3, 4]


def test_rule_02_a_deposed_leader_refuses_a_read() -> None:
    cluster = Cluster()
    old = cluster.settle()
    cluster.isolate(old)
    answer = cluster.query(old)
    cluster.run_for(3)
    new = cluster.leader()
    assert new != old
    cluster.command("new")
    assert answer.code == 90
    cluster.heal()
    assert cluster.query(old).code == 90


# -- 3: membership ----------------------------------------------------------------------------------------------------


def test_rule_03_no_change_before_an_entry_of_the_own_term_is_committed() -> None:
    cluster = Cluster(4, voters=(1, 2, 3))
    cluster.settle()
    cluster.drop(lambda a, b, m: isinstance(m, AppendAnswer) and b == 2)
    cluster.change("transfer", 2)
    cluster.run_for(0.05)
    assert cluster.leader() == 2
    with pytest.raises(ConfigChangeRefused, match="term"):
        cluster.change("add_learner", 4)
    cluster.heal()
    cluster.run_for(0.5)
    cluster.change("add_learner", 4)
    cluster.run_for(0.1)
    assert cluster.member(3).learners == (4,)


def test_rule_03_one_change_at_a_time() -> None:
    cluster = Cluster(5, voters=(1, 2, 3))
    leader = cluster.settle()
    cluster.drop(lambda a, b, m: isinstance(m, AppendAnswer) and b == leader)
    cluster.change("add_learner", 4)
    with pytest.raises(ConfigChangeRefused, match="under way"):
        cluster.change("add_learner", 5)


def test_rule_03_a_learner_is_promoted_only_when_it_has_caught_up() -> None:
    cluster = Cluster(4, voters=(1, 2, 3))
    leader = cluster.settle()
    cluster.cut((leader, 4))
    cluster.change("add_learner", 4)
    cluster.run_for(0.1)
    with pytest.raises(ConfigChangeRefused, match="caught up"):
        cluster.change("promote", 4)
    cluster.heal()
    cluster.run_for(0.5)
    assert (leader, "caught_up", 1, 4) in cluster.events
    cluster.change("promote", 4)
    cluster.run_for(0.1)
    assert cluster.member(4).voters == (1, 2, 3, 4)
    assert not cluster.member(4).is_learner


def test_rule_03_a_change_that_leaves_no_live_quorum_is_refused() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    other, dead = sorted({1, 2, 3} - {leader})
    cluster.crash(dead)
    cluster.run_for(2)
    with pytest.raises(ConfigChangeRefused, match="live"):
        cluster.change("remove_member", other)
    cluster.change("remove_member", dead)
    cluster.run_for(0.1)
    assert set(cluster.member(leader).voters) == {leader, other}


def test_rule_03_a_dead_member_is_replaced_learner_first() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    cluster.command("kept")
    dead = max({1, 2, 3} - {leader})
    cluster.crash(dead)
    cluster.run_for(2)
    cluster.add_shard(9)
    cluster.change("remove_member", dead)
    cluster.run_for(0.1)
    cluster.change("add_learner", 9)
    cluster.run_for(0.5)
    assert cluster.member(9).is_learner
    cluster.change("promote", 9)
    cluster.run_for(0.1)
    assert cluster.state(9) == ["kept"]
    assert 9 in cluster.member(leader).voters


def test_rule_03_a_leader_that_fell_while_removing_itself_can_be_elected_to_finish_it() -> None:
    cluster = Cluster(2)
    leader = cluster.settle()
    other = 3 - leader
    cluster.cut((leader, other))
    cluster.change("remove_member", leader)
    cluster.run_for(3)
    assert cluster.member(leader).voters == (other,)
    cluster.heal()
    cluster.run_for(5)
    assert cluster.leader() == other
    assert cluster.member(other).voters == (other,)
    assert 1 not in cluster.shards[leader].members


# -- 4: snapshots -----------------------------------------------------------------------------------------------------


def _snapshot(index: int, index_term: int, term: int, state: list[object], voters: tuple[int, ...]) -> Snapshot:
    membership = Membership.first(voters).pack()
    data = msgpack.packb([1, 0, membership, WALL_US, [], 1, Journal().dump(state)])
    return Snapshot(SNAPSHOT, 1, term, index, index_term, 0, len(data), 1, 0, data, zlib.crc32(data))


def test_rule_04_a_snapshot_behind_the_commit_index_moves_nothing() -> None:
    lone = Lone()
    lone.receive(2, append(1, (0, 0), [1] * 6, commit=6))
    (answer,) = lone.receive(2, _snapshot(4, 1, 1, ["old"], (1, 2, 3)))
    assert (lone.member.commit, lone.member.last_index, lone.member.state) == (6, 6, [])
    assert answer.done


def test_rule_04_a_snapshot_of_an_older_term_is_refused() -> None:
    lone = Lone()
    lone.receive(2, append(5, (0, 0), [5]))
    (answer,) = lone.receive(3, _snapshot(9, 4, 4, ["old"], (1, 2, 3)))
    assert lone.member.last_index == 1
    assert answer.term == 5 and not isinstance(answer, SnapshotAnswer)


def test_rule_04_a_snapshot_keeps_the_entries_after_it_that_agree() -> None:
    lone = Lone()
    lone.receive(2, append(1, (0, 0), [1] * 6, commit=1))
    lone.receive(2, _snapshot(4, 1, 1, ["x"], (1, 2, 3)))
    assert (lone.member.commit, lone.member.log.first_index, lone.member.last_index) == (4, 5, 6)
    assert lone.member.state == ["x"]


def test_rule_04_a_snapshot_replaces_a_log_that_conflicts() -> None:
    lone = Lone()
    lone.receive(2, append(1, (0, 0), [1] * 6, commit=1))
    lone.receive(3, _snapshot(4, 2, 2, ["x"], (1, 2, 3)))
    assert (lone.member.commit, lone.member.last_index) == (4, 4)


def test_rule_04_membership_and_sessions_travel_in_a_snapshot() -> None:
    cluster = Cluster(4, voters=(1, 2, 3), log_entries_kept=2)
    leader = cluster.settle()
    for number in range(12):
        cluster.command(number)
    assert cluster.member(leader).log.first_index > 3
    cluster.change("add_learner", 4)
    cluster.run_for(0.5)
    assert cluster.told(Snapshot)
    cluster.change("promote", 4)
    cluster.run_for(0.2)
    assert cluster.state(4) == list(range(12))
    assert cluster.member(4).voters == (1, 2, 3, 4)
    cluster.change("transfer", 4)
    cluster.run_for(0.2)
    assert cluster.leader() == 4
    repeated = cluster.propose(4, 11, seq=12)
    cluster.run_for(0.05)
    assert repeated.value == 12, "the session came with the snapshot: the same result, not a second execution"
    assert cluster.state(4) == list(range(12))


def test_rule_04_chunks_of_two_leaders_are_not_mixed() -> None:
    lone = Lone()
    one = _snapshot(9, 2, 3, ["a" * 50], (1, 2, 3))
    two = _snapshot(9, 2, 4, ["b" * 50], (1, 2, 3))
    assert one.total == two.total
    half = one.total // 2
    lone.receive(2, one._replace(data=one.data[:half]))
    (answer,) = lone.receive(3, two._replace(offset=half, data=two.data[half:]))
    assert (answer.done, answer.next_offset) == (False, 0)
    lone.receive(3, two)
    assert lone.member.state == ["b" * 50]


def test_rule_04_a_late_chunk_of_an_earlier_snapshot_takes_nothing_from_the_present_one() -> None:
    lone = Lone()
    early = _snapshot(5, 2, 2, ["a"], (1, 2, 3))
    lone.receive(2, early)
    later = _snapshot(9, 2, 2, ["b" * 50], (1, 2, 3))
    half = later.total // 2
    lone.receive(2, later._replace(data=later.data[:half]))
    (answer,) = lone.receive(2, early)
    assert answer.done
    (answer,) = lone.receive(2, later._replace(offset=half, data=later.data[half:]))
    assert answer.done
    assert lone.member.state == ["b" * 50]


def test_rule_04_a_receiver_that_lost_what_it_had_is_sent_it_from_where_it_is() -> None:
    """Also where late chunks gave it a beginning, so that it never says that it has nothing."""
    cluster = Cluster(4, voters=(1, 2, 3), log_entries_kept=2)
    for shard in cluster.shards.values():
        shard.settings = dataclasses.replace(shard.settings, chunk_bytes=200)
    cluster.settle()
    for number in range(30):
        cluster.command("x" * 90 + str(number))
    cluster.change("add_learner", 4)
    cluster.drop(lambda a, b, m: isinstance(m, Snapshot) and m.offset >= 2000)
    cluster.run_for(0.5)
    (first,) = {m.offset: m for _, _, m in cluster.told(Snapshot) if m.offset == 0}.values()
    cluster.member(4).incoming = None
    cluster.inject(cluster.leader(), 4, first)
    cluster.heal()
    cluster.run_for(4)
    assert len(cluster.state(4)) == 30


def test_rule_04_a_lost_chunk_is_sent_again_and_order_does_not_matter() -> None:
    cluster = Cluster(4, voters=(1, 2, 3), log_entries_kept=2)
    for shard in cluster.shards.values():
        shard.settings = dataclasses.replace(shard.settings, chunk_bytes=200)
    cluster.settle()
    for number in range(30):
        cluster.command("x" * 90 + str(number))
    lost = []

    def lose_some(a: int, b: int, m: object) -> bool:
        if isinstance(m, Snapshot) and m.offset in (0, 400, 1400) and lost.count(m.offset) < 2:
            lost.append(m.offset)
            return True
        return False

    cluster.drop(lose_some)
    cluster.change("add_learner", 4)
    cluster.run_for(4)
    assert set(lost) == {0, 400, 1400}
    assert len(cluster.state(4)) == 30


# -- 6, 7: votes and identity -----------------------------------------------------------------------------------------


def _vote(term: int, last: tuple[int, int], *, pre: bool = False, transfer: bool = False) -> Vote:
    return Vote(VOTE, 1, term, pre, last[0], last[1], transfer)


def test_rule_06_one_vote_per_term() -> None:
    lone = Lone()
    (first,) = lone.receive(2, _vote(1, (0, 0)))
    (second,) = lone.receive(3, _vote(1, (0, 0)))
    (again,) = lone.receive(2, _vote(1, (0, 0)))
    assert (first.granted, second.granted, again.granted) == (True, False, True)


def test_rule_06_no_vote_for_a_shorter_log() -> None:
    lone = Lone()
    lone.receive(2, append(2, (0, 0), [1, 2]))
    lone.pass_time(1.1)
    (shorter,) = lone.receive(3, _vote(7, (1, 2)))
    (older,) = lone.receive(3, _vote(8, (9, 1)))
    (same,) = lone.receive(3, _vote(9, (2, 2)))
    assert (shorter.granted, older.granted, same.granted) == (False, False, True)


def test_rule_07_who_follows_a_leader_gives_no_vote_to_another_in_that_term() -> None:
    lone = Lone()
    lone.receive(2, append(3, (0, 0), [3]))
    lone.pass_time(5)
    (answer,) = lone.receive(3, _vote(3, (9, 3)))
    assert not answer.granted


def test_rule_07_an_instance_that_was_removed_and_added_again_keeps_its_vote() -> None:
    lone = Lone()
    (given,) = lone.receive(2, _vote(4, (0, 0)))
    assert given.granted
    lone.receive(3, Gone(9, 1, 4, 5))
    assert 1 not in lone.shard.members
    membership = Membership.first((2, 3)).with_learner(1).with_promoted(1)
    entries = [Entry(1, 0, b""), Entry(1, 2, membership.pack())]
    lone.receive(5, Append(1, 1, 4, 0, 0, 0, 1, 6, entries))
    assert lone.member.vote == 2, "the vote of term 4 is not forgotten with the log"


def test_rule_07_an_instance_that_forgot_a_log_votes_as_if_it_still_held_it() -> None:
    lone = Lone()
    lone.receive(2, append(2, (0, 0), [1, 1, 2, 2], commit=4))
    lone.receive(2, Gone(9, 1, 2, 5))
    lone.turn(lambda shard: shard.create_group(1, "group-1", config(), Journal(), None))
    (answers) = lone.receive(3, _vote(9, (3, 2)))
    assert not any(isinstance(m, VoteAnswer) and m.granted for m in answers), "an empty member has no say"
    membership = Membership.first((1, 2, 3))
    lone.receive(2, Append(1, 1, 10, 0, 0, 0, 1, 6, [Entry(1, 2, membership.pack())]))
    lone.pass_time(3)
    (shorter,) = lone.receive(3, _vote(20, (3, 2)))
    (as_long,) = lone.receive(3, _vote(21, (4, 2)))
    assert (shorter.granted, as_long.granted) == (False, True)


def test_rule_07_an_empty_member_gives_no_vote() -> None:
    lone = Lone(voters=None)
    lone.turn(lambda shard: shard.create_group(1, "group-1", config(), Journal(), None))
    assert not any(isinstance(m, VoteAnswer) for m in lone.receive(3, _vote(9, (3, 2))))
    assert lone.member.term == 0


def test_rule_07_an_append_of_a_life_that_was_forgotten_is_not_answered() -> None:
    """Its acknowledgement would speak for a log that is no longer held."""
    lone = Lone(voters=None)
    lone.receive(2, append(3, (0, 0), [1, 1], life=6, commit=2))
    lone.receive(2, Gone(9, 1, 3, 8))
    assert 1 not in lone.shard.members
    assert lone.receive(2, append(3, (0, 0), [1, 1], life=6)) == []
    assert 1 not in lone.shard.members
    (answer,) = lone.receive(2, append(3, (0, 0), [1, 1], life=9))
    assert answer.accepted and answer.life == 9


def test_rule_07_an_instance_that_forgot_a_log_votes_not_even_for_itself_by_a_shorter_one() -> None:
    """While its former log comes again, configurations of old are in force: in one it was the only voter."""
    lone = Lone()
    alone, later = Membership.first((1,)).pack(), Membership.first((2, 1)).pack()
    lone.receive(2, Append(1, 1, 2, 0, 0, 4, 1, 0, [Entry(1, 2, alone), *[Entry(t, 0, b"") for t in (1, 2, 2)]]))
    lone.receive(2, Gone(9, 1, 2, 5))
    first = Append(1, 1, 3, 0, 0, 4, 1, 6, [Entry(1, 2, alone), Entry(1, 0, b"")])
    lone.receive(2, first)
    assert lone.member.voters == (1,)
    asked = [to for to, m in lone.pass_time(5) if isinstance(m, Vote)]
    assert (lone.member.role, lone.member.term, lone.member.vote) == (FOLLOWER, 3, 2)
    assert set(asked) == {2}, "it asks its leader whether it was removed"
    lone.receive(2, append(3, (2, 1), [2, 2], life=6))
    lone.receive(2, Append(1, 1, 3, 4, 2, 4, 1, 6, [Entry(3, 2, later)]))
    assert any(isinstance(m, Vote) and m.pre for _, m in lone.pass_time(5)), "with all of it, it votes as any other"


def test_rule_12_a_member_that_was_removed_before_it_had_anything_asks_the_leader_that_began_it() -> None:
    """It knows no voter; the Gone that was sent at its removal may have been lost."""
    lone = Lone(voters=None)
    lone.receive(2, append(3, (5, 3), [3], life=6))
    assert not lone.member.voters
    asked = [to for to, m in lone.pass_time(5) if isinstance(m, Vote) and m.pre]
    assert asked and set(asked) == {2}
    lone.receive(2, Gone(9, 1, 3, 8))
    assert 1 not in lone.shard.members


def test_rule_12_a_gone_of_an_earlier_life_removes_nobody() -> None:
    lone = Lone(voters=None)
    lone.receive(2, append(3, (0, 0), [1, 1], life=6))
    lone.receive(2, Gone(9, 1, 3, 5))
    assert lone.member.life == 6


def test_rule_07_answers_of_an_earlier_life_are_not_counted() -> None:
    cluster = Cluster(4, voters=(1, 2, 3))
    leader = cluster.settle()
    cluster.change("add_learner", 4)
    cluster.run_for(0.3)
    first_life = cluster.member(4).life
    cluster.change("remove_member", 4)
    cluster.run_for(0.3)
    assert 1 not in cluster.shards[4].members
    cluster.cut((leader, 4))
    cluster.change("add_learner", 4)
    cluster.run_for(0.1)
    term, last = cluster.member(leader).term, cluster.member(leader).last_index
    stamp = cluster.shards[leader].stamp
    cluster.inject(4, leader, AppendAnswer(APPEND_ANSWER, 1, term, True, last, 0, 0, stamp, first_life))
    lead = cluster.member(leader).lead
    assert lead is not None and lead.progress[4].match == 0
    cluster.heal()
    cluster.run_for(1)
    assert cluster.member(4).life > first_life
    assert lead.progress[4].match == last


def test_rule_07_a_life_that_was_never_committed_does_not_make_an_instance_deaf() -> None:
    """Added at 20 by a leader that fell; the next leader adds it at 18."""
    lone = Lone(voters=None)
    lone.receive(2, append(3, (0, 0), [1], life=20))
    assert lone.member.life == 20
    assert lone.receive(2, append(3, (0, 0), [1], life=18)) == [], "within a term lives only grow"
    (answer,) = lone.receive(3, append(4, (0, 0), [1], life=18))
    assert answer.accepted and answer.life == 18


def test_rule_07_a_stranger_at_the_old_place_is_not_the_old_member() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    cluster.command("kept")
    dead = max({1, 2, 3} - {leader})
    cluster.crash(dead)
    cluster.add_shard(7)
    cluster.run_for(3)
    assert 1 not in cluster.shards[7].members
    assert all(b != 7 for _, b, _ in cluster.sent), "nobody speaks to it until it is a member"


# -- 8: pre-vote, check-quorum, stickiness ----------------------------------------------------------------------------


def test_rule_08_a_pre_vote_changes_nothing_at_the_receiver() -> None:
    lone = Lone()
    before = (lone.member.term, lone.member.vote, lone.member.timer_us)
    (answer,) = lone.receive(2, _vote(5, (0, 0), pre=True))
    assert answer == VoteAnswer(VOTE_ANSWER, 1, 5, True, True)
    assert (lone.member.term, lone.member.vote, lone.member.timer_us) == before


def test_rule_08_a_cut_off_member_raises_no_term_and_deposes_nobody() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    term = cluster.member(leader).term
    lonely = max({1, 2, 3} - {leader})
    cluster.isolate(lonely)
    cluster.run_for(20)
    assert cluster.member(lonely).term == term
    assert cluster.member(lonely).role in (PRE_CANDIDATE, FOLLOWER)
    cluster.heal()
    cluster.run_for(2)
    assert cluster.leader() == leader
    assert cluster.member(leader).term == term


def test_rule_08_a_refused_pre_vote_teaches_a_higher_term() -> None:
    lone = Lone()
    lone.pass_time(2)
    lone.receive(2, VoteAnswer(VOTE_ANSWER, 1, 7, True, False))
    assert lone.member.term == 7


def test_rule_08_a_leader_that_hears_no_quorum_steps_down() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    cluster.isolate(leader)
    cluster.run_for(2.5)
    assert cluster.member(leader).lead is None
    assert (leader, "stepped_down", 1, 1) in cluster.events


def test_rule_08_a_leader_with_answers_but_cut_in_one_direction_steps_down_too() -> None:
    """Its beats arrive nowhere; the followers' own traffic still reaches it."""
    cluster = Cluster()
    leader = cluster.settle()
    cluster.cut(*((leader, other) for other in {1, 2, 3} - {leader}))
    cluster.run_for(3)
    assert cluster.member(leader).lead is None or cluster.leader() != leader


def test_rule_08_no_vote_while_the_leader_is_heard() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    follower, other = sorted({1, 2, 3} - {leader})
    sent = len(cluster.sent)
    for pre in (True, False):
        cluster.inject(other, follower, _vote(50, (99, 49), pre=pre))
    assert not cluster.told(VoteAnswer, sent)
    assert cluster.member(follower).term == cluster.member(leader).term


def test_rule_08_a_promise_outlives_a_higher_term_learned_elsewhere() -> None:
    """A late refusal teaches a follower a higher term; its leader may still hold a lease on its last answer."""
    lone = Lone()
    lone.receive(2, append(1, (0, 0), [1]))
    lone.receive(3, VoteAnswer(VOTE_ANSWER, 1, 5, True, False))
    assert (lone.member.term, lone.member.leader) == (5, 0)
    assert lone.receive(3, _vote(6, (9, 4))) == []
    lone.pass_time(1.01)
    (answer,) = lone.receive(3, _vote(6, (9, 4)))
    assert answer.granted


def test_rule_08_a_leader_that_steps_down_gives_the_promise_back() -> None:
    lone = Lone()
    lone.receive(2, append(1, (0, 0), [1]))
    lone.receive(2, StepDown(8, 1, 1))
    (answer,) = lone.receive(3, _vote(2, (9, 1)))
    assert answer.granted


# -- 10: leases -------------------------------------------------------------------------------------------------------


def test_rule_10_a_lease_answers_without_a_round() -> None:
    cluster = Cluster(clock_drift_margin=0.1)
    leader = cluster.settle()
    assert cluster.query(leader).value == []


def test_rule_10_while_a_lease_holds_a_read_asks_nobody_and_after_it_everybody() -> None:
    cluster = Cluster(clock_drift_margin=0.1)
    leader = cluster.settle()
    first, second = Answer(), Answer()
    effects = cluster.turn(leader, lambda shard: shard.query(1, msgpack.packb("all"), first))
    assert first.value == [] and effects.sends == {}
    lease_us = cluster.member(leader).lease_until_us() - cluster.local_us(leader)
    shard = cluster.shards[leader]
    shard.begin(cluster.local_us(leader) + lease_us, WALL_US)
    shard.query(1, msgpack.packb("all"), second)
    assert shard.finish().sends.keys() == {1, 2, 3} - {leader}


def test_rule_10_without_a_margin_there_is_no_lease() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    answer = cluster.query(leader)
    assert answer.code is None
    cluster.run_for(0.01)
    assert answer.value == []


def test_rule_10_a_lease_ends_before_the_followers_promise() -> None:
    cluster = Cluster(clock_drift_margin=0.1)
    leader = cluster.settle()
    cluster.isolate(leader)
    left_us = cluster.member(leader).lease_until_us() - cluster.local_us(leader)
    assert left_us > 690_000, "at most one beat (0.2 s) of the 0.9 s was gone when the cut came"
    cluster.run_for(left_us / SECOND_US - 0.002)
    assert cluster.query(leader).code == 0
    cluster.run_for(0.003)
    assert cluster.query(leader).code is None
    followers = {1, 2, 3} - {leader}
    assert all(cluster.member(i).hears_leader() for i in followers)


def test_rule_10_a_lease_counts_from_when_the_beat_was_sent() -> None:
    cluster = Cluster(clock_drift_margin=0.1)
    leader = cluster.settle()
    cluster.hold(lambda a, b, m: b == leader)
    cluster.run_for(0.85)
    cluster.release()
    cluster.cut(*((a, leader) for a in (1, 2, 3)), *((leader, a) for a in (1, 2, 3)))
    cluster.run_for(0.01)
    last_beat = max(m.stamp for a, _, m in cluster.told(Beat) if a == leader)
    member = cluster.member(leader)
    assert member.lease_until_us() <= last_beat + 900_000
    assert member.lease_until_us() < cluster.local_us(leader) + 900_000


def test_rule_10_a_transfer_voids_the_lease_from_its_start() -> None:
    cluster = Cluster(clock_drift_margin=0.1)
    leader = cluster.settle()
    target = max({1, 2, 3} - {leader})
    cluster.drop(lambda a, b, m: isinstance(m, TimeoutNow))
    cluster.change("transfer", target)
    assert cluster.member(leader).lease_until_us() == 0
    assert cluster.query(leader).code is None


def test_rule_10_the_clock_is_read_again_after_the_state_was() -> None:
    """The process stood still between the two: the lease that held before holds no more."""
    cluster = Cluster(clock_drift_margin=0.1)
    leader = cluster.settle()
    shard = cluster.shards[leader]
    answer = Answer()
    now_us = cluster.local_us(leader)
    shard.begin(now_us, WALL_US)
    shard.query(1, msgpack.packb("all"), answer)
    shard.flush()
    shard.apply()
    shard.settle(now_us + 2 * SECOND_US)
    assert shard.take_replies() == []
    shard.begin(now_us + 2 * SECOND_US, WALL_US)
    assert shard.finish().replies == [], "it waits for a quorum now"


def test_rule_10_a_promise_lasts_from_after_the_message_came() -> None:
    """A follower stood still between its clock and its socket, and takes a beat that was sent long after that clock."""
    cluster = Cluster(clock_drift_margin=0.1)
    leader = cluster.settle()
    follower = min({1, 2, 3} - {leader})
    shard, member = cluster.shards[follower], cluster.member(follower)
    stopped_us = cluster.local_us(follower)
    sent_us = stopped_us + 2 * SECOND_US
    shard.begin(stopped_us, WALL_US)
    shard.clock_read(sent_us + 100)
    shard.receive(leader, [Beat(BEAT, 1_000, shard.link(leader).followed_digest, sent_us)])
    assert [type(m) for m in shard.finish().sends[leader]] == [BeatAnswer]
    shard.begin(sent_us + SECOND_US - 1, WALL_US)
    assert member.hears_leader(), "as long as the leader, whose lease counts from this beat, may rely on it"


def test_rule_10_a_promise_that_a_list_confirmed_lasts_from_that_list() -> None:
    cluster = Cluster(clock_drift_margin=0.1)
    leader = cluster.settle()
    follower = min({1, 2, 3} - {leader})
    shard, member = cluster.shards[follower], cluster.member(follower)
    now_us = cluster.local_us(follower) + SECOND_US // 2
    shard.begin(now_us, WALL_US)
    shard.receive(leader, [LinkList(LINK_LIST, 1_000, now_us, 0, 1, [(1, member.term)])])
    (answer,) = shard.finish().sends[leader]
    assert (type(answer), answer.stamp, answer.exceptions) == (LinkListAnswer, now_us, [])
    shard.begin(now_us + SECOND_US - 1, WALL_US)
    assert member.hears_leader()


def test_rule_10_clocks_beyond_the_margin_make_a_lease_read_stale() -> None:
    """The margin is a condition, not a decoration: with the leader's clock far too slow a stale read is seen."""
    cluster = Cluster(clock_drift_margin=0.1, rates={1: 0.3})
    assert cluster.settle() == 1
    cluster.isolate(1)
    cluster.run_for(2.5)
    new = next(i for i in (2, 3) if cluster.member(i).lead is not None)
    answer = cluster.propose(new, "new")
    cluster.run_for(0.05)
    assert answer.value == 1
    assert cluster.query(1).value == [], "stale, as it must be when the assumption is broken"


# -- 11: transfer -----------------------------------------------------------------------------------------------------


def test_rule_11_leadership_goes_to_the_voter_that_was_named() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    target = max({1, 2, 3} - {leader})
    cluster.change("transfer", target)
    cluster.run_for(0.05)
    assert cluster.leader() == target
    assert cluster.member(target).is_established


def test_rule_11_only_a_live_voter_can_be_the_target() -> None:
    cluster = Cluster(4, voters=(1, 2, 3))
    leader = cluster.settle()
    with pytest.raises(ConfigChangeRefused, match="voter"):
        cluster.change("transfer", 4)
    dead = max({1, 2, 3} - {leader})
    cluster.crash(dead)
    cluster.run_for(1.5)
    with pytest.raises(ConfigChangeRefused, match="heard"):
        cluster.change("transfer", dead)


def test_rule_11_after_the_deadline_the_leader_resumes_and_commands_that_waited_run() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    target = max({1, 2, 3} - {leader})
    cluster.drop(lambda a, b, m: isinstance(m, TimeoutNow))
    cluster.change("transfer", target)
    answer = cluster.propose(leader, "waits")
    cluster.run_for(0.5)
    assert answer.code is None
    cluster.run_for(1.0)
    assert answer.value == 1
    assert cluster.leader() == leader


def test_rule_11_a_timeout_now_from_another_than_the_leader_is_ignored() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    follower, other = sorted({1, 2, 3} - {leader})
    cluster.inject(other, follower, TimeoutNow(TIMEOUT_NOW, 1, cluster.member(leader).term))
    assert cluster.member(follower).role == FOLLOWER


# -- 12: removed members ----------------------------------------------------------------------------------------------


def test_rule_12_a_removed_member_is_told_and_stops() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    removed = max({1, 2, 3} - {leader})
    cluster.change("remove_member", removed)
    cluster.run_for(0.1)
    assert 1 not in cluster.shards[removed].members
    assert (removed, "member_gone", 1) in cluster.events


def test_rule_12_a_removed_member_that_was_not_told_disturbs_nobody_and_learns_it() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    removed = max({1, 2, 3} - {leader})
    cluster.isolate(removed)
    cluster.change("remove_member", removed)
    cluster.run_for(5)
    term = cluster.member(leader).term
    assert 1 in cluster.shards[removed].members
    cluster.heal()
    cluster.run_for(3)
    assert 1 not in cluster.shards[removed].members
    assert cluster.member(leader).term == term


def test_rule_12_a_removed_learner_that_was_not_told_asks() -> None:
    cluster = Cluster(4, voters=(1, 2, 3))
    cluster.settle()
    cluster.change("add_learner", 4)
    cluster.run_for(0.3)
    cluster.isolate(4)
    cluster.change("remove_member", 4)
    cluster.run_for(1)
    cluster.heal()
    cluster.run_for(4)
    assert 1 not in cluster.shards[4].members


def test_rule_12_a_leader_that_removes_itself_leaves() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    answer = cluster.propose(leader, "last")
    cluster.change("remove_member", leader)
    cluster.run_for(3)
    assert answer.value == 1
    assert 1 not in cluster.shards[leader].members
    assert cluster.leader() not in (0, leader)


def test_rule_12_a_group_that_is_no_more_stays_dead() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    follower, other = sorted({1, 2, 3} - {leader})
    cluster.shards[follower].is_dead = lambda uid: uid == 1
    cluster.turn(follower, lambda shard: shard.remove_group(1))
    cluster.propose(leader, "more")
    cluster.run_for(1)
    assert 1 not in cluster.shards[follower].members
    assert any(isinstance(m, Gone) and m.index == -1 for a, _, m in cluster.sent if a == follower)


# -- 13: who counts ---------------------------------------------------------------------------------------------------


def test_rule_13_a_learner_counts_neither_for_commit_nor_for_reads() -> None:
    cluster = Cluster(4, voters=(1, 2, 3))
    leader = cluster.settle()
    cluster.change("add_learner", 4)
    cluster.run_for(0.3)
    others = {1, 2, 3} - {leader}
    cluster.cut(*((leader, i) for i in others))
    write, read = cluster.propose(leader, "x"), cluster.query(leader)
    cluster.run_for(0.6)
    lead = cluster.member(leader).lead
    assert lead is not None and lead.progress[4].match == cluster.member(leader).last_index
    assert write.code is None and read.code is None


def test_rule_13_a_leader_that_is_no_voter_any_more_does_not_count_itself() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    others = sorted({1, 2, 3} - {leader})
    cluster.cut((others[0], leader))
    cluster.change("remove_member", leader)
    cluster.run_for(0.5)
    assert cluster.member(leader).commit < cluster.member(leader).last_index, "one of two new voters is no quorum"


def test_rule_13_an_entry_of_an_older_term_is_not_committed_by_counting() -> None:
    """Raft paper, figure 8: replicated on all or not, it waits for an entry of the new term."""
    lone = Lone()
    lone.receive(2, append(1, (0, 0), [1, 1]))
    lone.elect(2)
    term = lone.member.term
    assert lone.member.last_index == 3
    for peer in (2, 3):
        lone.receive(peer, AppendAnswer(APPEND_ANSWER, 1, term, True, 2, 0, 0, lone.shard.stamp, 0))
    assert lone.member.commit == 0
    lone.receive(2, AppendAnswer(APPEND_ANSWER, 1, term, True, 3, 0, 0, lone.shard.stamp, 0))
    assert lone.member.commit == 3


# -- 15: lost majorities ----------------------------------------------------------------------------------------------


def _lose_majority(**fields: object) -> tuple[Cluster, int, list[int]]:
    cluster = Cluster(5, **fields)
    leader = cluster.settle()
    cluster.command("kept")
    dead = sorted({1, 2, 3, 4, 5} - {leader})[:3]
    for instance in dead:
        cluster.crash(instance)
    cluster.run_for(10)
    return cluster, leader, dead


def test_rule_15_a_lost_majority_waits_for_an_operator() -> None:
    cluster, leader, _ = _lose_majority()
    assert cluster.leader() == 0
    assert cluster.member(leader).voters == (1, 2, 3, 4, 5)
    for shard in cluster.shards.values():
        shard.gone.update(dict.fromkeys({1, 2, 3, 4, 5} - cluster.shards.keys(), "restarted"))
    cluster.run_for(10)
    assert cluster.leader() == 0, "proof that they are gone is not an operator's word, and the config says wait"


def test_rule_15_an_operator_brings_a_group_back_in_a_new_epoch_with_an_audit_record() -> None:
    cluster, _, dead = _lose_majority()
    for shard in cluster.shards.values():
        shard.gone.update(dict.fromkeys(dead, "operator"))
    cluster.run_for(10)
    leader = cluster.leader()
    assert leader
    member = cluster.member(leader)
    assert member.term >> 32 == 1
    assert set(member.voters) == set(cluster.shards)
    assert any(event[1] == "recovered" for event in cluster.events)
    (record,) = member.membership.audit
    assert record["dead"] == sorted(dead)
    assert record["voters"] == sorted(cluster.shards)
    assert record["voters_before"] == [1, 2, 3, 4, 5]
    assert record["epoch"] == 1
    assert record["index"] == member.committed_membership()[0]
    assert cluster.command("after") == 2
    assert cluster.state(leader) == ["kept", "after"]


def test_rule_15_the_audit_record_outlives_later_configurations_and_snapshots() -> None:
    cluster, _, dead = _lose_majority()
    for shard in cluster.shards.values():
        shard.gone.update(dict.fromkeys(dead, "operator"))
    cluster.run_for(10)
    leader = cluster.leader()
    member = cluster.member(leader)
    other = next(instance for instance in cluster.shards if instance != leader)
    before = list(member.membership.audit)
    member.remove(other)
    cluster.run_for(1)
    assert member.voters == (leader,)
    assert member.membership.audit == before
    assert not member.membership.is_forced_at(member.committed_membership()[0]), "only the repair itself was forced"
    _, _, data = member.make_snapshot()
    _, at, packed, *_ = msgpack.unpackb(data, strict_map_key=False)
    assert Membership.unpack(packed, at).audit == before


def test_rule_15_a_group_remembers_its_last_repairs_and_not_without_bound() -> None:
    membership = Membership.first((1, 2, 3))
    for index in range(1, 2 * AUDIT_RECORDS_MAX):
        membership = Membership.unpack(membership.forced((1,), {1: 0}, {"epoch": index}).pack(), index)
    assert [record["epoch"] for record in membership.audit] == [record["index"] for record in membership.audit]
    assert len(membership.audit) == AUDIT_RECORDS_MAX
    assert membership.audit[-1]["epoch"] == 2 * AUDIT_RECORDS_MAX - 1


def test_rule_15_the_survivor_with_the_most_complete_log_goes_on() -> None:
    cluster = Cluster(5)
    leader = cluster.settle()
    behind = 5 if leader != 5 else 4
    cluster.isolate(behind)
    cluster.command("only the others have this")
    cluster.run_for(0.5)
    ahead = next(i for i in (2, 3, 4) if i not in (leader, behind))
    dead = sorted({1, 2, 3, 4, 5} - {ahead, behind})
    for instance in dead:
        cluster.crash(instance)
    cluster.heal()
    for shard in cluster.shards.values():
        shard.gone.update(dict.fromkeys(dead, "operator"))
    cluster.run_for(10)
    assert cluster.leader()
    assert cluster.state(behind) == cluster.state(ahead) == ["only the others have this"]


def test_rule_15_a_straggler_of_the_old_epoch_is_refused() -> None:
    cluster, _, dead = _lose_majority()
    for shard in cluster.shards.values():
        shard.gone.update(dict.fromkeys(dead, "operator"))
    cluster.run_for(10)
    leader = cluster.leader()
    sent = len(cluster.sent)
    cluster.inject(dead[0], leader, append(40, (1, 1), [40], commit=2))
    answers = cluster.told(AppendAnswer, sent)
    assert [m.accepted for _, b, m in answers if b == dead[0]] == [False]
    assert cluster.leader() == leader


def test_rule_15_who_has_no_entry_of_an_epoch_is_no_candidate_in_it() -> None:
    """Those who were given up, and live, would elect each other and depose the ones that went on without them."""
    lone = Lone()
    lone.receive(2, append(1, (0, 0), [1, 1], commit=2))
    epoch = 1 << 32 | 3
    lone.receive(3, append(epoch, (9, epoch), [epoch], life=8))
    assert (lone.member.term, lone.member.log.last_term) == (epoch, 1)
    asked = [m for _, m in lone.pass_time(9) if isinstance(m, Vote)]
    assert asked and all(m.pre for m in asked)
    lone.receive(2, VoteAnswer(VOTE_ANSWER, 1, epoch + 1, True, True))
    assert not [m for _, m in lone.pass_time(9) if isinstance(m, Vote) and not m.pre]
    lone.receive(3, append(epoch, (2, 1), [epoch], life=8))
    assert lone.member.log.last_term == epoch
    lone.pass_time(5)
    lone.receive(2, VoteAnswer(VOTE_ANSWER, 1, epoch + 1, True, True))
    assert lone.member.term == epoch + 1, "with an entry of it, it is"


def test_rule_15_nobody_is_forced_while_a_declared_death_is_unknown_here() -> None:
    lone = Lone()
    lone.receive(2, ForceConfig(12, 1, 1 << 32, [1], [2, 3]))
    assert lone.member.term >> 32 == 0
    assert lone.member.voters == (1, 2, 3)


def test_rule_15_a_group_that_asked_for_it_goes_on_with_its_survivor_when_the_loss_is_proven() -> None:
    cluster, leader, dead = _lose_majority(on_majority_loss="survivor")
    for shard in cluster.shards.values():
        shard.gone.update(dict.fromkeys(dead, "restarted"))
    cluster.run_for(10)
    assert cluster.leader()
    assert cluster.command("after") == 2


# -- 16: determinism --------------------------------------------------------------------------------------------------


def test_rule_16_time_and_seed_come_from_the_entry() -> None:
    cluster = Cluster(rates={2: 1.5, 3: 0.7})
    cluster.settle()
    cluster.command("time")
    cluster.run_for(1)
    (first,), (second,), (third,) = (cluster.state(i) for i in (1, 2, 3))
    assert first == second == third
    assert first[1] >= WALL_US


def test_rule_16_a_command_that_raises_leaves_every_replica_as_it_was() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    cluster.command("a")
    answer = cluster.propose(leader, "boom")
    cluster.run_for(0.5)
    assert (answer.code, answer.body) == (1, ["ValueError", "boom"])
    assert cluster.state(1) == cluster.state(2) == cluster.state(3) == ["a"]
    assert cluster.command("b") == 2


def test_rule_16_time_in_entries_never_goes_back() -> None:
    """The next leader's wall clock is an hour behind."""
    lone = Lone(voters=(1,))
    lone.pass_time(2)
    lone.turn(lambda shard: shard.propose(1, pack("time", 1), Answer()))
    lone.shard.begin(lone.now_us + 1000, WALL_US - 3600 * SECOND_US)
    lone.shard.propose(1, pack("time", 2, issued_us=WALL_US), Answer())
    lone.shard.finish()
    times = [row[1] for row in lone.member.state]
    assert len(times) == 2 and times[1] >= times[0] > WALL_US - START_US


def test_beats_are_numbered_from_one_on_each_link() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    numbers = [m.seq for a, b, m in cluster.told(Beat) if (a, b) == (leader, max({1, 2, 3} - {leader}))]
    assert numbers == list(range(1, len(numbers) + 1))
    assert BEAT == cluster.told(Beat)[0][2].kind

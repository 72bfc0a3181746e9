"""Links (DESIGN 6): liveness belongs to a pair of shards; an idle group costs nothing."""

from __future__ import annotations

from typing import Any

import pytest
from core.harness import SECOND_US, Answer, Cluster, Lone, append

from raftfleet.core import replication
from raftfleet.core.links import group_hash
from raftfleet.core.messages import (
    BEAT,
    LINK_LIST,
    Append,
    AppendAnswer,
    Beat,
    BeatAnswer,
    LinkList,
    LinkListAnswer,
    StepDown,
    Vote,
)

MANY = tuple(range(1, 41))


def unfollow(cluster: Cluster, instance: int, uid: int = 1) -> None:
    """Make a follower forget whom it follows, without a word: what a lost message would leave behind."""
    member = cluster.member(instance, uid)
    cluster.shards[instance].links[member.leader].unfollow(member)
    member.leader = 0
    member.wait_to_campaign()


def test_both_ends_of_a_link_come_to_equal_digests() -> None:
    cluster = Cluster(uids=MANY)
    cluster.run_for(1)
    for follower in (2, 3):
        led, followed = cluster.shards[1].links[follower], cluster.shards[follower].links[1]
        assert led.led_digest == followed.followed_digest
        assert led.led.keys() == followed.followed.keys()
    assert len(cluster.shards[1].links[2].led) == len(MANY)


def test_a_digest_is_the_xor_of_uid_and_term_hashes() -> None:
    cluster = Cluster(uids=(5, 9))
    cluster.run_for(1)
    assert cluster.shards[1].links[2].led_digest == group_hash(5, 1) ^ group_hash(9, 1)


def test_idle_groups_send_nothing_but_one_beat_per_interval_and_link() -> None:
    cluster = Cluster(uids=MANY)
    cluster.run_for(2)
    sent = len(cluster.sent)
    cluster.run_for(10)
    kinds = {type(m) for _, _, m in cluster.sent[sent:]}
    assert kinds == {Beat, BeatAnswer}
    beats = cluster.told(Beat, sent)
    assert len(beats) in range(98, 103), "1 to 2 and 1 to 3, five a second"
    assert not cluster.shards[1].active
    assert cluster.leader(MANY[-1]) == 1


def test_a_follower_does_not_campaign_while_beats_arrive() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    cluster.run_for(30)
    assert cluster.leader() == leader
    assert cluster.member(leader).term == 1
    assert not cluster.told(Vote)[6:], "no vote was asked after the first election"


def test_followers_campaign_when_the_link_is_silent_for_an_election_timeout() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    cluster.isolate(leader)
    sent = len(cluster.sent)
    cluster.run_for(0.75)
    assert not cluster.told(Vote, sent)
    cluster.run_for(2)
    assert cluster.leader() not in (0, leader)


def test_many_groups_do_not_campaign_at_one_moment() -> None:
    cluster = Cluster(uids=MANY)
    cluster.run_for(1)
    cluster.crash(1)
    moments = []
    for _ in range(60):
        before = len(cluster.sent)
        cluster.run_for(0.05)
        moments.append(len({m.uid for _, _, m in cluster.told(Vote, before) if m.pre}))
    assert max(moments) < len(MANY) // 2
    assert all(cluster.leader(uid) in (2, 3) for uid in MANY)


def test_an_answer_with_another_digest_confirms_nothing() -> None:
    cluster = Cluster(uids=(1, 2))
    cluster.run_for(1)
    for follower in (2, 3):
        unfollow(cluster, follower, uid=1)
    cluster.drop(lambda a, b, m: isinstance(m, (LinkList, Append)))
    cluster.run_for(0.01)
    since = {uid: cluster.member(1, uid).quorum_stamp() for uid in (1, 2)}
    cluster.run_for(0.45)
    assert {uid: cluster.member(1, uid).quorum_stamp() for uid in (1, 2)} == since, (
        "not even for the group that is fine"
    )


def test_digests_that_differ_are_brought_together_by_lists() -> None:
    """The follower had lost its leader; it is found on the list and gets an append."""
    cluster = Cluster(uids=(1, 2), election_timeout_s=10.0)
    cluster.run_for(1.1)
    unfollow(cluster, 2)
    sent = len(cluster.sent)
    cluster.run_for(0.45)
    assert not cluster.told(LinkList, sent), "three beats running, not fewer"
    cluster.run_for(0.5)
    assert [b for a, b, _ in cluster.told(LinkList, sent)] == [2]
    answers = [m for a, _, m in cluster.told(LinkListAnswer, sent) if a == 2]
    assert answers[0].exceptions == [(1, 1)]
    assert any(isinstance(m, Append) and m.uid == 1 and b == 2 for _, b, m in cluster.sent[sent:])
    assert cluster.member(2).leader == 1
    assert cluster.shards[1].links[2].led_digest == cluster.shards[2].links[1].followed_digest


def test_a_member_whose_leader_is_not_on_the_list_starts_its_own_clock() -> None:
    cluster = Cluster(uids=(1, 2))
    cluster.run_for(1)
    cluster.drop(lambda a, b, m: isinstance(m, StepDown))
    cluster.turn(1, lambda shard: shard.members[1].step_down())
    cluster.run_for(0.1)
    assert cluster.member(2).leader == 1, "it was not told"
    sent = len(cluster.sent)
    cluster.run_for(5)
    assert cluster.told(LinkList, sent)
    assert cluster.leader(1) in (2, 3), "beats for the other group keep the link alive all the while"
    assert cluster.leader(2) == 1


def test_a_list_that_comes_a_second_time_is_not_acted_on() -> None:
    lone = Lone()
    lone.receive(2, append(1, (0, 0), [1]))
    stale = LinkList(LINK_LIST, 5, 1, 0, 1, [])
    lone.receive(2, LinkList(LINK_LIST, 5, 1, 0, 1, [(1, 1)]))
    assert lone.member.leader == 2
    lone.receive(2, stale)
    assert lone.member.leader == 2


def test_a_list_in_parts_counts_when_it_is_whole() -> None:
    lone = Lone()
    lone.receive(2, append(1, (0, 0), [1]))
    assert lone.receive(2, LinkList(LINK_LIST, 5, 7, 1, 2, [(99, 3)])) == []
    (answer,) = lone.receive(2, LinkList(LINK_LIST, 5, 7, 0, 2, [(1, 1), (98, 2)]))
    assert (answer.seq, answer.stamp, sorted(answer.exceptions)) == (5, 7, [(98, 0), (99, 0)])
    assert lone.member.leader == 2


def test_a_promise_counts_from_when_the_beat_was_sent() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    cluster.run_for(1)
    cluster.hold(lambda a, b, m: isinstance(m, BeatAnswer))
    cluster.run_for(0.5)
    cluster.drop(lambda a, b, m: True)
    first_beat = min(m.seq for _, _, m in cluster.held)
    sent_us = max(m.stamp for a, _, m in cluster.told(Beat) if m.seq == first_beat)
    cluster.held = [row for row in cluster.held if row[2].seq == first_beat]
    cluster.release()
    cluster.run_for(0.01)
    assert cluster.member(leader).quorum_stamp() == sent_us
    assert cluster.local_us(leader) - sent_us > SECOND_US // 3


def test_an_answer_to_an_older_beat_takes_nothing_back() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    peer = max({1, 2, 3} - {leader})
    link = cluster.shards[leader].links[peer]
    before = (link.ok_seq, link.ok_stamp)
    cluster.inject(peer, leader, BeatAnswer(BEAT + 1, 1, link.led_digest))
    cluster.inject(peer, leader, BeatAnswer(BEAT + 1, 10_000, link.led_digest))
    assert (link.ok_seq, link.ok_stamp) == before


def test_a_leader_that_steps_down_says_so_at_once() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    cluster.turn(leader, lambda shard: shard.members[1].step_down())
    cluster.run_for(0.7)
    assert cluster.leader() not in (0, leader), "nobody waited for the link to fall silent"


def test_a_leader_deposed_by_a_higher_term_says_so_too() -> None:
    cluster = Cluster(uids=(1, 2))
    cluster.run_for(1)
    cluster.inject(2, 1, AppendAnswer(2, 1, 7, False, 1, 0, 0, 0, 0))
    cluster.run_for(1.2)
    assert cluster.leader(1) != 0
    assert cluster.member(1, 1).term > 7
    assert cluster.leader(2) == 1


def test_a_lost_append_costs_one_beat() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    cluster.run_for(1)
    lost: list[Any] = []

    def lose_once(a: int, b: int, m: Any) -> bool:
        if isinstance(m, Append) and m.entries and (a, b) not in lost:
            lost.append((a, b))
            return True
        return False

    cluster.drop(lose_once)
    answer = cluster.propose(leader, "x")
    cluster.run_for(0.41)
    assert len(lost) == 2
    assert answer.value == 1


def test_a_busy_group_does_not_wait_for_beats() -> None:
    """An append and its answer carry the proof of a beat: with all beats lost a group under load keeps its leader."""
    cluster = Cluster(clock_drift_margin=0.1)
    leader = cluster.settle()
    cluster.drop(lambda a, b, m: isinstance(m, (Beat, BeatAnswer)))
    for _ in range(40):
        cluster.command("x")
        cluster.run_for(0.05)
    assert cluster.leader() == leader
    assert cluster.member(leader).lease_until_us() > cluster.local_us(leader)
    assert cluster.query(leader).code == 0


def test_followers_learn_the_commit_index_of_the_last_entry_within_a_beat() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    cluster.command("last")
    cluster.run_for(0.3)
    assert {cluster.member(i).applied for i in (1, 2, 3)} == {cluster.member(leader).last_index}
    sent = len(cluster.sent)
    cluster.run_for(2)
    assert not cluster.told(Append, sent), "told once"


def test_a_full_window_breeds_no_appends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer of one peer gives a turn: an empty append to every other, answered too, would double each time."""
    monkeypatch.setattr(replication, "APPEND_BYTES_MAX", 1)
    monkeypatch.setattr(replication, "APPENDS_IN_FLIGHT_MAX", 2)
    cluster = Cluster()
    leader = cluster.settle()
    far = max({1, 2, 3} - {leader})
    cluster.hold(lambda a, b, m: a == far and isinstance(m, AppendAnswer))
    sent = len(cluster.sent)
    for number in range(9):
        cluster.propose(leader, number)
    cluster.run_for(0.01)
    appends = [m for _, to, m in cluster.sent[sent:] if to == far and isinstance(m, Append)]
    assert appends and all(m.entries for m in appends), "what is committed waits, as what is appended does"
    cluster.heal()
    cluster.release()
    cluster.run_for(1)
    assert len(cluster.state(far)) == 9


def test_a_read_that_waits_on_a_slow_link_asks_once() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    cluster.run_for(1)
    sent = len(cluster.sent)
    cluster.hold(lambda a, b, m: isinstance(m, BeatAnswer))
    answer = cluster.query(leader)
    for _ in range(50):
        cluster.turn(leader)
    assert len(cluster.told(Beat, sent)) == 2
    cluster.run_for(0.001)
    cluster.heal()
    cluster.release()
    cluster.run_for(0.001)
    assert answer.value == []


def test_many_reads_of_many_groups_share_one_beat() -> None:
    cluster = Cluster(uids=MANY)
    cluster.run_for(1.1)
    sent = len(cluster.sent)
    answers = []

    def ask(shard: Any) -> None:
        for uid in MANY:
            answers.append(Answer())
            shard.query(uid, b"\xa3all", answers[-1])

    cluster.turn(1, ask)
    cluster.run_for(0.01)
    assert len(cluster.told(Beat, sent)) == 2
    assert all(answer.value == [] for answer in answers)


def test_check_quorum_uses_the_shortest_timeout_on_the_link() -> None:
    cluster = Cluster(uids=())
    cluster.config = type(cluster.config)(machine="tests:Journal", election_timeout_s=60.0)
    cluster.create(1, (1, 2, 3))
    cluster.config = type(cluster.config)(machine="tests:Journal", election_timeout_s=1.0)
    cluster.create(2, (1, 2, 3))
    cluster.run_for(1)
    cluster.isolate(1)
    cluster.run_for(3)
    assert cluster.member(1, 2).lead is None
    assert cluster.member(1, 1).lead is not None
    assert cluster.leader(2) in (2, 3)

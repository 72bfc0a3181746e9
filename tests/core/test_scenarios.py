"""The four ways in which rafted_value 0.11 was made to break its promises, played against our core."""

from __future__ import annotations

import zlib

import msgpack
from core.harness import WALL_US, Cluster, Journal, Lone, append

from raftfleet.core.change import ConfigChangeRefused
from raftfleet.core.membership import Membership
from raftfleet.core.messages import SNAPSHOT, Append, AppendAnswer, Snapshot, SnapshotAnswer


def test_no_acknowledged_write_is_lost_to_a_deposed_leaders_longer_tail() -> None:
    """(a) A deposed leader comes back with a tail longer than the new leader's log.

    The new leader's append covers little of it. If the answer told the tail's end, or if the new leader counted an
    answer that the old one was meant to get, entries that nobody else holds would count as committed.
    """
    cluster = Cluster()
    old = cluster.settle()
    cluster.command("first")
    cluster.isolate(old)
    for number in range(30):
        cluster.propose(old, f"never acknowledged {number}")
    cluster.run_for(3)
    new = cluster.leader()
    third = ({1, 2, 3} - {old, new}).pop()
    assert new != old
    assert cluster.command("second") == 2
    tail = cluster.member(old).last_index
    assert tail > cluster.member(new).last_index + 20
    # An answer from the time of the old leader arrives at the new one, late: term, index and all.
    term, stamp = cluster.member(new).term, cluster.shards[new].stamp
    cluster.inject(old, new, AppendAnswer(2, 1, 1, True, tail, 0, 0, stamp, 0))
    # The third goes silent; the old one is back, its answers come: only these may count, and only what they cover.
    cluster.heal()
    cluster.isolate(third)
    acknowledged = cluster.propose(new, "third")
    cluster.run_for(1)
    assert acknowledged.value == 3
    answers = [m for a, b, m in cluster.told(AppendAnswer) if (a, b) == (old, new) and m.accepted and m.term == term]
    assert all(m.index <= cluster.member(new).last_index for m in answers)
    assert cluster.state(old) == cluster.state(new) == ["first", "second", "third"]
    # The new leader falls: what it acknowledged must be at the one that was behind.
    cluster.heal()
    cluster.isolate(new)
    cluster.run_for(4)
    assert cluster.leader() in (old, third)
    answer = cluster.query(cluster.leader())
    cluster.run_for(0.1)
    assert answer.value == ["first", "second", "third"]


def test_a_new_leader_with_failed_appends_only_answers_no_linearizable_query() -> None:
    """(b) All that a new leader has had are rejections of its appends: they prove nothing, and its state may be old."""
    cluster = Cluster()
    old = cluster.settle()
    slow = max({1, 2, 3} - {old})
    other = ({1, 2, 3} - {old, slow}).pop()
    for number in range(5):
        cluster.command(number)
    cluster.drop(lambda a, b, m: isinstance(m, Append) and a != old and bool(m.entries))
    cluster.change("transfer", other)
    cluster.run_for(0.02)
    assert cluster.leader() == other
    member = cluster.member(other)
    answer = cluster.query(other)
    for peer in (old, slow):
        cluster.inject(
            peer,
            other,
            AppendAnswer(2, 1, member.term, False, member.last_index - 1, 1, 1, cluster.shards[other].stamp, 0),
        )
    cluster.run_for(0.5)
    assert answer.code is None
    assert not member.is_established
    cluster.heal()
    cluster.run_for(1)
    assert answer.value == [0, 1, 2, 3, 4]


def test_two_membership_changes_across_a_leader_change_never_make_disjoint_quorums() -> None:
    """(c) Ongaro's bug in single-server changes (raft-dev, 2015): each leader changes the set it knows by one."""
    cluster = Cluster(5, voters=(1, 2, 3, 4))
    first = cluster.settle()
    assert first == 1
    # Leader 1 adds 5 (through learner), but the promotion reaches nobody but 5.
    cluster.change("add_learner", 5)
    cluster.run_for(0.5)
    cluster.isolate(1, 5)
    cluster.change("promote", 5)
    cluster.run_for(0.01)
    assert cluster.member(5).voters == (1, 2, 3, 4, 5)
    assert cluster.member(2).voters == (1, 2, 3, 4)
    # Another leader comes and wants to remove 1, without having committed in its term: refused.
    cluster.run_for(3)
    second = cluster.leader()
    assert second in (2, 3, 4)
    cluster.heal()
    cluster.drop(lambda a, b, m: isinstance(m, AppendAnswer))
    third = next(i for i in (2, 3, 4) if i != second)
    cluster.change("transfer", third)
    cluster.run_for(0.3)
    assert cluster.leader() == third
    refused = False
    try:
        cluster.change("remove_member", 1)
    except ConfigChangeRefused:
        refused = True
    assert refused
    assert cluster.member(third).voters == (1, 2, 3, 4)
    # With an own entry committed it may; 1's uncommitted promotion of 5 is overwritten everywhere.
    cluster.heal()
    leader = cluster.settle()
    cluster.run_for(2)
    cluster.change("remove_member", 1)
    cluster.run_for(2)
    assert {cluster.member(i).voters for i in (2, 3, 4)} == {(2, 3, 4)}
    assert cluster.member(leader).learners == (5,)
    assert 1 not in cluster.shards[1].members


def test_snapshots_of_an_older_and_a_newer_term_never_move_a_state_backwards() -> None:
    """(d) First the new leader's snapshot, then the old leader's, which was on its way all along."""

    def snapshot(index: int, index_term: int, term: int, state: list[object]) -> Snapshot:
        data = msgpack.packb([1, 0, Membership.first((1, 2, 3)).pack(), WALL_US, [], 1, Journal().dump(state)])
        return Snapshot(SNAPSHOT, 1, term, index, index_term, 0, len(data), 1, 0, data, zlib.crc32(data))

    lone = Lone()
    lone.receive(2, append(1, (0, 0), [1, 1], commit=2))
    old = snapshot(8, 1, 1, list(range(8)))
    new = snapshot(12, 3, 3, list(range(12)))
    # The older one begins, the newer one overtakes it.
    half = old.total // 2
    lone.receive(2, old._replace(data=old.data[:half]))
    (answer,) = lone.receive(3, new)
    assert isinstance(answer, SnapshotAnswer) and answer.done
    (late,) = lone.receive(2, old._replace(offset=half, data=old.data[half:]))
    assert late.term == 3 and not isinstance(late, SnapshotAnswer)
    assert (lone.member.commit, lone.member.last_index, len(lone.member.state)) == (12, 12, 12)
    # The same index again, from the rightful leader: nothing moves, and it is told so.
    lone.receive(3, append(3, (12, 3), [3], commit=13))
    (again,) = lone.receive(3, new)
    assert isinstance(again, SnapshotAnswer) and again.done
    assert (lone.member.commit, lone.member.last_index) == (13, 13)

"""Quorum arithmetic: majorities meet, also over one change of membership, and the commit index is what one holds."""

from __future__ import annotations

from itertools import combinations

from core.harness import Lone
from hypothesis import given, settings
from hypothesis import strategies as st

from raftfleet.core import own_log
from raftfleet.core.membership import Membership
from raftfleet.core.messages import APPEND_ANSWER, NOOP, VOTE_ANSWER, AppendAnswer, VoteAnswer
from raftfleet.fleet.reconcile import quorum

memberships = st.sets(st.integers(1, 9), min_size=1, max_size=7).map(lambda voters: Membership.first(tuple(voters)))


def majorities(membership: Membership) -> list[set[int]]:
    """The smallest ones: every other contains one of them."""
    return [set(some) for some in combinations(membership.voters, membership.quorum)]


@settings(deadline=None)
@given(st.integers(1, 31))
def test_a_quorum_is_the_smallest_number_of_which_two_always_meet(count: int) -> None:
    needed = Membership.first(tuple(range(1, count + 1))).quorum
    assert needed == quorum(count)
    assert 2 * needed > count, "two of them meet"
    assert 2 * (needed - 1) <= count, "two smaller ones need not"


def one_change(membership: Membership, instance: int) -> list[Membership]:
    """Every membership that is one step away and concerns ``instance``."""
    if instance not in membership:
        grown = membership.with_learner(instance)
        return [grown, grown.with_promoted(instance)]
    found = [membership.demoted(instance)] if instance in membership.voters else [membership.with_promoted(instance)]
    return [*found, membership.without(instance)]


@settings(deadline=None)
@given(memberships, st.integers(1, 9))
def test_majorities_before_and_after_one_change_meet(before: Membership, instance: int) -> None:
    for after in one_change(before, instance):
        if not after.voters:
            continue  # refused by raftfleet.core.change
        for old in majorities(before):
            for new in majorities(after):
                assert old & new, (before, after, old, new)


@settings(deadline=None)
@given(memberships, st.integers(1, 9))
def test_a_membership_comes_back_from_its_bytes_as_it_was(before: Membership, instance: int) -> None:
    for membership in (before, *one_change(before, instance)):
        index = 5
        lives = {i: (index if life == -1 else life) for i, life in membership.lives.items()}
        again = Membership.unpack(membership.pack(), index)
        assert (again.voters, again.learners, again.lives) == (membership.voters, membership.learners, lives)
        assert again.quorum == membership.quorum


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3).flatmap(lambda half: st.lists(st.integers(0, 9), min_size=2 * half, max_size=2 * half)))
def test_committed_is_the_highest_index_that_a_majority_holds(acknowledged: list[int]) -> None:
    """``acknowledged``: what each peer of the leader says it has; the leader has ten entries and counts itself."""
    voters = tuple(range(1, len(acknowledged) + 2))
    lone = Lone(voters)
    lone.pass_time(3)
    member = lone.member
    for pre in (True, False):
        for voter in voters[1:]:
            if member.lead is None:
                lone.receive(voter, VoteAnswer(VOTE_ANSWER, 1, member.term + pre, pre, True))
    assert member.lead is not None
    for _ in range(9):
        lone.turn(lambda shard: own_log.append(member, NOOP, b""))
    for voter, index in zip(voters[1:], acknowledged, strict=True):
        stamp = lone.shard.stamp
        lone.receive(voter, AppendAnswer(APPEND_ANSWER, 1, member.term, True, index, 0, 0, stamp, 0))
    held = sorted([10, *acknowledged], reverse=True)
    expected = held[len(voters) // 2]
    assert member.commit == expected, (held, member.commit)
    assert sum(index >= member.commit for index in [10, *acknowledged]) >= member.membership.quorum

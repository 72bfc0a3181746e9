"""Every checker of a rule can fail: each is shown the breach that it exists for, and a neighbour that is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raftfleet.core.log import Log
from raftfleet.core.membership import Membership
from raftfleet.core.messages import (
    COMMANDS,
    CONFIG,
    NOOP,
    TIMEOUT_NOW,
    VOTE,
    VOTE_ANSWER,
    Entry,
    TimeoutNow,
    Vote,
    VoteAnswer,
)
from raftfleet.testing.model import Violation
from raftfleet.testing.rules import RuleChecker

FIRST = Membership.first((1, 2, 3))


class World:
    """Members by instance, all of group 7, and a checker that sees them."""

    def __init__(self) -> None:
        self.members: dict[int, Any] = {}
        self.lost: set[int] = set()
        self.now_us = 0
        self.checker = RuleChecker(
            lambda instance, uid: self.members.get(instance),
            self.lost.__contains__,
            lambda instance: self.now_us,
        )

    def add(self, instance: int, terms: list[int], *, term: int = 0, leads: bool = False, vote: int = 0) -> Any:
        log = Log()
        log.extend([Entry(t, COMMANDS, b"%d" % i) for i, t in enumerate(terms)])
        member = SimpleNamespace(
            uid=7,
            log=log,
            term=term or max(terms),
            vote=vote,
            life=0,
            commit=0,
            last_index=log.last_index,
            lead=None,
            role="follower",
            voters=FIRST.voters,
            learners=(),
            membership=FIRST,
            memberships=[(0, FIRST)],
            election_timeout_us=1_000_000,
            forgotten_end=(0, 0),
            lease_us=0,
        )
        member.shard = SimpleNamespace(saved_index=lambda m: m.log.last_index)
        member.lease_until_us = lambda: member.lease_us
        member.quorum_stamp = lambda: 0
        if leads:
            progress = {p: SimpleNamespace(match=0, life=0) for p in (1, 2, 3) if p != instance}
            member.lead = SimpleNamespace(noop_index=0, transfer_target=0, progress=progress, elected_us=0)
            self.append(member, NOOP, b"")
            member.lead.noop_index = member.last_index
        self.members[instance] = member
        return member

    def append(self, member: Any, kind: int, data: bytes) -> None:
        member.log.append(Entry(member.term, kind, data))
        member.last_index = member.log.last_index

    def change(self, member: Any, membership: Membership) -> None:
        self.append(member, CONFIG, membership.pack())
        membership = Membership.unpack(membership.pack(), member.last_index)
        member.memberships.append((member.last_index, membership))
        member.membership, member.voters, member.learners = membership, membership.voters, membership.learners

    def step(self, instance: int) -> None:
        self.checker.stepped(instance, {7: self.members[instance]})

    def leader(self, instance: int = 1, term: int = 2) -> Any:
        """One that has committed in its term, and two followers that hold all it has."""
        leader = self.add(instance, [1, 1], term=term, leads=True, vote=instance)
        for other in {1, 2, 3} - {instance}:
            self.add(other, [1, 1, term], vote=instance)
            leader.lead.progress[other].match = 3
        self.step(instance)
        leader.commit = 3
        self.step(instance)
        return leader


def test_a_term_that_no_candidate_began_is_noticed() -> None:
    world = World()
    world.add(1, [1], term=2, vote=1)
    world.step(1)
    world.add(2, [1], term=2)
    world.step(2)
    world.add(3, [1], term=3)
    with pytest.raises(Violation, match="pre-vote: 3 is in term 3"):
        world.step(3)


def test_a_candidate_that_did_not_ask_before_is_noticed() -> None:
    world = World()
    world.add(1, [1], term=2, vote=1)
    vote = Vote(VOTE, 7, 2, False, 1, 1, False)
    with pytest.raises(Violation, match="said that they would"):
        world.checker.sent(1, 2, [vote])
    world.checker.sent(2, 1, [VoteAnswer(VOTE_ANSWER, 7, 2, True, True)])
    world.checker.sent(1, 2, [vote])


def test_a_campaign_in_the_name_of_a_leader_that_did_not_hand_over_is_noticed() -> None:
    world = World()
    world.leader()
    world.add(2, [1, 1, 2], term=3, vote=2)
    vote = Vote(VOTE, 7, 3, False, 3, 2, True)
    with pytest.raises(Violation, match="as if its leader had told it to"):
        world.checker.sent(2, 3, [vote])
    world.members[2].term = 2
    world.checker.sent(1, 2, [TimeoutNow(TIMEOUT_NOW, 7, 2)])
    world.members[2].term = 3
    world.checker.sent(2, 3, [vote])


def test_a_leadership_handed_over_to_one_that_lags_or_does_not_vote_is_noticed() -> None:
    world = World()
    leader = world.leader()
    world.append(leader, COMMANDS, b"more")
    leader.lead.transfer_target = 2
    with pytest.raises(Violation, match="before the leader's end"):
        world.checker.sent(1, 2, [TimeoutNow(TIMEOUT_NOW, 7, 2)])
    world.add(4, [1, 1, 2])
    with pytest.raises(Violation, match="no voter"):
        world.checker.sent(1, 4, [TimeoutNow(TIMEOUT_NOW, 7, 2)])


def test_commands_taken_during_a_transfer_are_noticed() -> None:
    world = World()
    leader = world.leader()
    leader.lead.transfer_target = 2
    world.append(leader, COMMANDS, b"came just before")
    world.step(1)
    world.append(leader, COMMANDS, b"too late")
    with pytest.raises(Violation, match="while it hands over"):
        world.step(1)


def test_a_change_before_the_leaders_own_term_is_committed_is_noticed() -> None:
    world = World()
    leader = world.add(1, [1, 1], term=2, leads=True, vote=1)
    leader.commit = 2
    world.step(1)
    world.change(leader, FIRST.with_learner(4))
    with pytest.raises(Violation, match="before an entry of its own term"):
        world.step(1)


def test_a_change_while_another_is_under_way_is_noticed() -> None:
    world = World()
    leader = world.leader()
    world.change(leader, FIRST.with_learner(4))
    world.step(1)
    world.change(leader, leader.membership.with_learner(5))
    with pytest.raises(Violation, match="is under way"):
        world.step(1)


@pytest.mark.parametrize("was_learner", [True, False])
def test_a_new_voter_that_had_not_caught_up_or_was_no_learner_is_noticed(was_learner: bool) -> None:
    world = World()
    leader = world.leader()
    if was_learner:
        world.change(leader, FIRST.with_learner(4))
        leader.lead.progress[4] = SimpleNamespace(match=0, life=4)
        for _ in range(30):
            world.append(leader, COMMANDS, b"")
        leader.commit = leader.last_index
        for other in (2, 3):
            world.add(other, [1, 1, *[2] * 32])
        world.step(1)
        world.change(leader, leader.membership.with_promoted(4))
    else:
        world.change(leader, Membership((1, 2, 3, 4), (), {1: 0, 2: 0, 3: 0, 4: -1}))
    with pytest.raises(Violation, match="no learner that had caught up"):
        world.step(1)


def test_a_change_to_voters_most_of_whom_are_lost_is_noticed() -> None:
    world = World()
    leader = world.leader()
    world.lost.add(3)
    world.change(leader, FIRST.without(2))
    with pytest.raises(Violation, match="gone for good"):
        world.step(1)


def test_a_match_that_the_followers_log_does_not_bear_out_is_noticed() -> None:
    world = World()
    leader = world.leader()
    world.append(leader, COMMANDS, b"more")
    world.add(2, [1, 1, 2, 2])
    leader.lead.progress[2].match = 4
    world.step(1)
    leader.lead.progress[3].match = 4
    with pytest.raises(Violation, match="match: leader 1"):
        world.step(1)


def test_a_commit_that_no_quorum_holds_or_has_saved_is_noticed() -> None:
    world = World()
    leader = world.leader()
    world.append(leader, COMMANDS, b"more")
    leader.commit = 4
    with pytest.raises(Violation, match="which 1 of 3 voters hold"):
        world.step(1)
    world = World()
    leader = world.leader()
    world.append(leader, COMMANDS, b"more")
    world.add(2, [1, 1, 2, 2]).shard.saved_index = lambda m: 3
    leader.commit = 4
    with pytest.raises(Violation, match="which 1 of 3 voters hold"):
        world.step(1)


def test_an_older_terms_entry_committed_by_counting_is_noticed() -> None:
    world = World()
    leader = world.add(1, [1, 1], term=2, leads=True, vote=1)
    for other in (2, 3):
        world.add(other, [1, 1], term=2)
    world.step(1)
    leader.commit = 2
    with pytest.raises(Violation, match="by counting"):
        world.step(1)


def test_a_lease_that_outlives_the_leadership_is_noticed() -> None:
    world = World()
    old = world.leader()
    old.lease_us = 500
    world.now_us = 600
    world.leader(2, term=3)
    world.members[1] = old
    world = World()
    old = world.leader()
    old.lease_us = 700
    world.now_us = 600
    with pytest.raises(Violation, match="lease: 1 may answer"):
        world.leader(2, term=3)


def test_a_leader_that_heard_no_quorum_for_long_is_noticed() -> None:
    world = World()
    leader = world.leader()
    world.checker.check_leaders_silence([(1, 2_900_000, {7: leader})])
    world.checker.check_leaders_silence([(1, 3_050_000, {7: leader})])
    with pytest.raises(Violation, match="check-quorum"):
        world.checker.check_leaders_silence([(1, 3_100_000, {7: leader})])


def test_a_vote_of_a_member_that_has_just_come_back_is_noticed() -> None:
    world = World()
    member = world.add(2, [1])
    granted = VoteAnswer(VOTE_ANSWER, 7, 2, False, True)
    world.checker.check_restored_voter(2, [granted], {7: world.add(3, [1])}, {7: member})
    world.checker.check_restored_voter(2, [granted._replace(granted=False)], {7: member}, {7: member})
    with pytest.raises(Violation, match="silence after a restart"):
        world.checker.check_restored_voter(2, [granted], {7: member}, {7: member})


@pytest.mark.parametrize(("term", "vote", "end"), [(2, 3, (2, 3)), (3, 1, (2, 3)), (3, 3, (2, 2))])
def test_a_member_that_was_added_again_and_forgot_its_former_life_is_noticed(
    term: int, vote: int, end: tuple[int, int]
) -> None:
    def come_again(term: int, vote: int, end: tuple[int, int]) -> None:
        world = World()
        for leader in (1, 3):
            world.add(leader, [1, 1], term=leader, vote=leader)
            world.step(leader)
        world.add(1, [1, 1], term=2, vote=1)
        world.step(1)
        world.add(2, [1, 1, 2], term=3, vote=3)
        world.step(2)
        world.add(2, [1], term=term, vote=vote).forgotten_end = end
        world.step(2)

    come_again(3, 3, (2, 3))
    with pytest.raises(Violation, match="identity: 2 is in group 7 again"):
        come_again(term, vote, end)


def test_a_vote_for_a_log_shorter_than_that_of_the_voters_former_life_is_noticed() -> None:
    world = World()
    world.add(1, [1, 1], term=3, vote=1)
    world.add(2, [1], term=3).forgotten_end = (1, 2)
    world.checker.sent(2, 1, [VoteAnswer(VOTE_ANSWER, 7, 3, False, True)])
    world.members[2].forgotten_end = (1, 3)
    with pytest.raises(Violation, match="in its former life"):
        world.checker.sent(2, 1, [VoteAnswer(VOTE_ANSWER, 7, 3, False, True)])


def test_a_candidate_whose_log_is_shorter_than_in_its_former_life_is_noticed() -> None:
    world = World()
    for instance, end in ((1, (1, 2)), (2, (1, 3))):
        candidate = world.add(instance, [1, 1], term=instance + 1, vote=instance)
        candidate.role, candidate.forgotten_end = "candidate", end
    world.step(1)
    with pytest.raises(Violation, match="identity: 2 campaigns in group 7"):
        world.step(2)

"""The checker of promises can fail: it is shown each false belief that it exists for, and a true one beside it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raftfleet.core.messages import APPEND, VOTE_ANSWER, Append, VoteAnswer
from raftfleet.core.roles import NEVER_US
from raftfleet.testing.clock import SECOND_US, DriftingClock
from raftfleet.testing.model import Violation
from raftfleet.testing.promises import PromiseChecker

LEADER, PEER = 1, 2


class World:
    """A leader of group 7 in term 3 and one peer; the leader's clock is 100 s ahead of true time, the peer's 500 s."""

    def __init__(self) -> None:
        self.now_us = 0
        self.clocks = {
            LEADER: DriftingClock(1_000_000, 100 * SECOND_US),
            PEER: DriftingClock(1_000_000, 500 * SECOND_US),
        }
        self.members: dict[int, Any] = {i: self._member() for i in (LEADER, PEER)}
        self.checker = PromiseChecker(lambda instance, uid: self.members.get(instance))
        for instance, clock in self.clocks.items():
            self.checker.started(instance, clock, 0)
        leader = self.members[LEADER]
        leader.leader, leader.confirmed = LEADER, 0
        leader.lead = SimpleNamespace(progress={PEER: None}, lease_void=False)
        leader.confirmed_stamp = lambda peer, progress: leader.confirmed

    def _member(self) -> Any:
        member = SimpleNamespace(
            uid=7,
            term=3,
            leader=0,
            lead=None,
            voters=(LEADER, PEER),
            election_timeout_us=SECOND_US,
            config=SimpleNamespace(clock_drift_margin=0.1),
            shard=SimpleNamespace(now_us=0),
            heard=NEVER_US,
        )
        member.heard_leader_us = lambda: member.heard
        return member

    def step(self, instance: int) -> None:
        member = self.members[instance]
        member.shard.now_us = self.clocks[instance].local_us(self.now_us)
        self.checker.stepped(instance, member.shard.now_us, {7: member}, self.now_us)

    def follow(self, at_us: int, heard_at_us: int) -> None:
        self.now_us = at_us
        peer = self.members[PEER]
        peer.leader, peer.heard = LEADER, self.clocks[PEER].local_us(heard_at_us)
        self.step(PEER)

    def leave(self, at_us: int) -> None:
        self.now_us = at_us
        self.members[PEER].leader = 0
        self.members[PEER].term = 4
        self.step(PEER)

    def believe(self, at_us: int, since_us: int) -> None:
        self.now_us = at_us
        self.members[LEADER].confirmed = self.clocks[LEADER].local_us(since_us)
        self.step(LEADER)


def test_a_belief_in_somebody_who_never_followed_is_noticed() -> None:
    world = World()
    world.step(PEER)
    with pytest.raises(Violation, match="confirmation: leader 1 .* which never did"):
        world.believe(2_000, 1_000)


def test_a_belief_that_lags_behind_is_true_and_one_from_after_the_end_is_noticed() -> None:
    world = World()
    world.follow(1_000, 1_000)
    world.leave(50_000)
    world.believe(90_000, 1_000)
    with pytest.raises(Violation, match="which did so until 0.050000 s"):
        world.believe(90_001, 60_000)


def test_a_promise_that_begins_before_the_belief_is_noticed() -> None:
    world = World()
    world.follow(50_000, 50_000)
    world.believe(60_000, 49_000)
    with pytest.raises(Violation, match="promise: leader 1 .* remembers hearing a leader at 0.050000 s, 8.0 ms before"):
        world.believe(60_001, 58_000)


def test_what_is_remembered_is_judged_by_the_rate_that_the_clock_had_then() -> None:
    world = World()
    world.follow(50_000, 50_000)
    world.now_us = 60_000
    world.clocks[PEER].set_rate(60_000, 2_000_000)
    world.believe(61_000, 50_000)


def test_who_followed_within_one_turn_only_did_follow() -> None:
    world = World()
    world.step(PEER)
    world.now_us = 40_000
    world.checker.arrived(LEADER, PEER, [Append(APPEND, 7, 3, 0, 0, 0, 1, 0, [])])
    world.leave(40_000)
    world.believe(41_000, 39_000)


def test_a_process_that_began_since_promised_nothing_and_followed_before() -> None:
    world = World()
    world.follow(50_000, 50_000)
    world.checker.ended(PEER, 60_000)
    world.members[PEER] = world._member()
    world.checker.started(PEER, world.clocks[PEER], 70_000)
    world.now_us = 70_000
    world.step(PEER)
    world.believe(80_000, 59_000)
    with pytest.raises(Violation, match="confirmation"):
        world.believe(80_001, 65_000)


def test_a_process_that_ended_in_the_middle_of_a_turn_may_have_followed_in_it() -> None:
    world = World()
    world.step(PEER)
    world.checker.arrived(LEADER, PEER, [Append(APPEND, 7, 3, 0, 0, 0, 1, 0, [])])
    world.checker.ended(PEER, 40_000)
    del world.members[PEER]
    world.believe(41_000, 39_000)
    with pytest.raises(Violation, match="confirmation"):
        world.believe(42_000, 41_000)


def test_a_vote_given_while_the_newest_leader_counts_on_the_voter_is_noticed() -> None:
    world = World()
    world.follow(50_000, 50_000)
    world.believe(60_000, 50_000)
    vote = VoteAnswer(VOTE_ANSWER, 7, 4, False, True)
    world.leave(SECOND_US)
    world.checker.sent(PEER, [vote], world.now_us)  # the lease ended 50 ms ago
    world.leave(800_000)
    with pytest.raises(Violation, match="promise kept: 2 votes in group 7 for term 4"):
        world.checker.sent(PEER, [vote], world.now_us)
    world.members[LEADER].lead.lease_void = True
    world.checker.sent(PEER, [vote], world.now_us)

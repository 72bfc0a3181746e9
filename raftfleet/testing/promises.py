"""What leaders believe of their followers, held against what those followers really were and really will do.

A lease, a ReadIndex round and a check of the quorum all rest on one sentence of a leader: "this peer has followed me,
in this term, at or after the moment S of my clock". A wrong one does harm only when a read, a deposed leader and a
write meet within milliseconds. An observer who sees all shards, and true time, can tell at once whether it is true:

* *confirmation*: the peer really was a follower of that leader in that term at or after the true moment of S;
* *promise*: what the peer remembers, and by which it refuses votes, is a moment not before S either. So its refusal,
  which lasts an election timeout from there, outlasts the lease as long as clocks keep to the margin;
* *promise kept*: who gives a vote does not take part in a lease of the newest leader at that moment.

This module changes nothing. It reads members' own fields; it does not trust what peers *say* (answers, digests), only
what they are after each step, and which appends came to them within it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from raftfleet.core.messages import APPEND, SNAPSHOT, VOTE_ANSWER
from raftfleet.core.roles import NEVER_US
from raftfleet.testing.clock import DriftingClock
from raftfleet.testing.model import Violation

SLACK_US = 100
"""Rates are rounded; a message takes five times as long at least."""


class _Instance:
    """One process of an instance."""

    __slots__ = ("ahead", "clock", "followed", "started_us", "taken")

    def __init__(self, clock: DriftingClock, started_us: int) -> None:
        self.clock = clock
        self.started_us = started_us
        self.ahead: dict[int, int] = {}  # stamp of a turn that is ahead of its clock -> true us of that turn
        self.taken: list[tuple[int, int, int]] = []  # (uid, leader, term) of appends that await a step
        self.followed: dict[int, tuple[Any, int, int]] = {}  # uid -> (member, leader, term) after the last step

    def stamped_us(self, stamp: int) -> int:
        """The true moment of the turn with this stamp. Stamps rise by one also where the clock does not."""
        true_us = self.ahead.get(stamp)
        return true_us if true_us is not None else self.clock.past_true_us(stamp)


class PromiseChecker:
    """Watches all members of all groups; see the module's text.

    Args:
        member_of: ``member_of(instance, uid)``: that member, or None if there is none at present.

    Attributes:
        are_leases_safe: whether clocks stay within what groups were told of them.
    """

    def __init__(self, member_of: Any) -> None:
        self._member_of = member_of
        self.are_leases_safe = True
        self._running: dict[int, _Instance] = {}
        self._until: dict[tuple[int, int], dict[tuple[int, int], int]] = {}  # (peer, uid) -> (leader, term) -> true us
        self._born: dict[tuple[int, int], int] = {}  # (instance, uid) -> true us at which the present member was new
        self._claims: dict[tuple[int, int], tuple[int, dict[int, int]]] = {}  # leader's -> its term, newest by peer
        self._newest: dict[int, tuple[int, int]] = {}  # uid -> the highest term that was led, and by whom

    # -- processes -------------------------------------------------------------------------------------------------

    def started(self, instance: int, clock: DriftingClock, now_us: int) -> None:
        """A process of an instance begins, with its clock."""
        self._running[instance] = _Instance(clock, now_us)

    def ended(self, instance: int, now_us: int) -> None:
        """It is no more; up to now it followed whom it followed."""
        process = self._running.pop(instance, None)
        if process is not None:
            for uid, known in process.followed.items():
                self._followed_until(instance, uid, known, now_us)
            self._passed_by(instance, process, {}, now_us)  # it may have ended in the middle of a turn
            for key in [key for key in self._claims if key[0] == instance]:
                del self._claims[key]

    # -- what is sent ----------------------------------------------------------------------------------------------

    def arrived(self, from_instance: int, to_instance: int, messages: Iterable[Any]) -> None:
        """A frame was handed to a shard, which may take it within its next step only."""
        process = self._running.get(to_instance)
        if process is not None:
            for message in messages:
                if message[0] == APPEND or message[0] == SNAPSHOT:
                    process.taken.append((message.uid, from_instance, message.term))

    def sent(self, instance: int, messages: Iterable[Any], now_us: int) -> None:
        """Look at what leaves a shard: a vote must not break a promise."""
        if self.are_leases_safe:
            for message in messages:
                if message[0] == VOTE_ANSWER and message.granted and not message.pre:
                    self._check_kept(instance, message.uid, message.term, now_us)

    def _check_kept(self, voter: int, uid: int, vote_term: int, now_us: int) -> None:
        """Only the newest leader's lease matters: its election ended every older one's, whoever promised those."""
        term, leader = self._newest.get(uid, (0, 0))
        member, process = self._member_of(leader, uid), self._running.get(leader)
        if member is None or process is None or member.lead is None or member.term != term or term >= vote_term:
            return
        margin = member.config.clock_drift_margin
        if margin is None or member.lead.lease_void or voter not in member.voters or voter == leader:
            return
        stamp = member.confirmed_stamp(voter, member.lead.progress[voter])
        if self._born.get((voter, uid), 0) > process.stamped_us(stamp):
            return  # it is silent for a while after a restart
        left_us = stamp + int(member.election_timeout_us * (1.0 - margin)) - process.clock.local_us(now_us)
        if left_us > SLACK_US:
            raise Violation(
                f"promise kept: {voter} votes in group {uid} for term {vote_term}, though leader {leader} of term"
                f" {term} counts on its promise for another {left_us / 1000:.1f} ms"
            )

    # -- what members are ------------------------------------------------------------------------------------------

    def stepped(self, instance: int, stamp: int, members: dict[int, Any], now_us: int) -> None:
        """Look at the members of a shard after a turn of it, which had this stamp."""
        process = self._running[instance]
        if stamp > process.clock.local_us(now_us):
            process.ahead[stamp] = now_us
        followed = process.followed
        for uid, member in members.items():
            known = followed.get(uid)
            if known is None or known[0] is not member:
                self._born[instance, uid] = now_us
            elif known[1] == member.leader and known[2] == member.term:
                continue
            if known is not None:
                self._followed_until(instance, uid, known, now_us)
            followed[uid] = (member, member.leader, member.term)
        if len(followed) != len(members):
            for uid in [uid for uid in followed if uid not in members]:
                self._followed_until(instance, uid, followed.pop(uid), now_us)
        if process.taken:
            self._passed_by(instance, process, members, now_us)
        for uid, member in members.items():
            if member.lead is not None:
                self._check_claims(instance, uid, member, process)

    def _followed_until(self, instance: int, uid: int, known: tuple[Any, int, int], now_us: int) -> None:
        _, leader, term = known
        self._until.setdefault((instance, uid), {})[leader, term] = now_us

    def _passed_by(self, instance: int, process: _Instance, members: dict[int, Any], now_us: int) -> None:
        """Within this turn it may have begun to follow somebody, and ceased to."""
        for uid, leader, term in process.taken:
            member = members.get(uid)
            if member is None or member.term >= term:
                self._until.setdefault((instance, uid), {}).setdefault((leader, term), now_us)
        process.taken.clear()

    def _check_claims(self, instance: int, uid: int, member: Any, process: _Instance) -> None:
        term = member.term
        if term > self._newest.get(uid, (0, 0))[0]:
            self._newest[uid] = (term, instance)
        known = self._claims.get((instance, uid))
        if known is None or known[0] != term:
            known = self._claims[instance, uid] = (term, {})
        claims = known[1]
        for peer, progress in member.lead.progress.items():
            stamp = member.confirmed_stamp(peer, progress)
            if stamp > claims.get(peer, 0):
                claims[peer] = stamp
                self._check_claim(instance, uid, member, peer, process.stamped_us(stamp))

    def _check_claim(self, instance: int, uid: int, member: Any, peer: int, since_us: int) -> None:
        """``instance`` believes that ``peer`` has followed it at or after ``since_us`` (true time)."""
        process = self._running.get(peer)
        follower = self._member_of(peer, uid)
        if follower is None or follower.leader != instance or follower.term != member.term:
            until_us = self._until.get((peer, uid), {}).get((instance, member.term), -1)
            if until_us < since_us - SLACK_US:
                was = f"did so until {until_us / 1e6:.6f} s" if until_us >= 0 else "never did"
                raise Violation(
                    f"confirmation: leader {instance} of group {uid} believes that {peer} has followed it in term"
                    f" {member.term} since {since_us / 1e6:.6f} s, which {was}"
                )
        if follower is None or process is None or process.started_us > since_us:
            return  # it is silent for a while after a restart
        if self._born.get((peer, uid), 0) > since_us or follower.lead is not None:
            return
        heard_us = follower.heard_leader_us()
        if heard_us == NEVER_US:
            return  # its leader, or a later one, has ended the promise
        heard_us = process.clock.past_true_us(heard_us)
        if heard_us < since_us - SLACK_US:
            raise Violation(
                f"promise: leader {instance} of group {uid} counts on {peer} from {since_us / 1e6:.6f} s on, but {peer}"
                f" remembers hearing a leader at {heard_us / 1e6:.6f} s, {(since_us - heard_us) / 1000:.1f} ms before"
            )

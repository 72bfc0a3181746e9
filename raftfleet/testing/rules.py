"""Rules of DESIGN 5 that can be seen broken before they do harm: in what is sent, and in what leaders believe.

The checkers in :mod:`raftfleet.testing.checkers` hold the promises (nothing lost, nothing twice). Many rules only
matter when three unlikely things meet; a run that waits for the harm finds them in one seed of thousands. Here is what
an observer who sees all members at once can say at the first step:

* a term is begun by a candidate and by nobody else: pre-votes change nothing (5.8);
* a candidate asks for votes when a quorum would give them, or when its leader told it to (5.8, 5.11);
* ``TimeoutNow`` goes to a voter that holds all that its leader has, and commands wait meanwhile (5.11);
* a leader appends a configuration when an entry of its own term is committed and no other change is under way; a new
  voter was a learner that had caught up; a quorum of the new voters is not lost for good (5.3);
* quorums of a configuration and the one that it replaces overlap (5.3);
* ``match`` implies an identical prefix, and what a leader commits is held, saved, by a quorum of voters (5.6, 5.13);
* while a leader holds a lease, no other one can commit (5.10); by counting it commits its own term's entries only;
* a voter that came back from its disk grants no vote for an election timeout (5.9);
* a member that was removed and added again remembers its term, its vote and how long its log was (5.7);
* who has heard no quorum for long leads no more (5.8).

This module changes nothing. It reads members' own fields (``lead``, ``progress``); the checkers of promises do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from raftfleet.core.change import CAUGHT_UP_ENTRIES
from raftfleet.core.membership import Membership
from raftfleet.core.messages import APPEND, COMMANDS, CONFIG, TIMEOUT_NOW, VOTE, VOTE_ANSWER
from raftfleet.core.roles import CANDIDATE
from raftfleet.testing.model import Violation

QUORUM_SILENCE_TIMEOUTS = 3
"""A leader steps down after one election timeout, seen at a beat; a paused loop and a drifting clock add to that."""


class _Leading:
    """A leader as it was after its last step."""

    __slots__ = ("commit", "is_established", "last_index", "matches", "member", "membership", "term", "transfer_target")

    def __init__(self, member: Any) -> None:
        self.member = member
        self.term = member.term
        self.last_index = member.lead.noop_index
        self.transfer_target = 0
        self.matches: dict[int, int] = {}
        self.commit = member.commit
        self.is_established = False
        self.membership = member.membership


class RuleChecker:
    """Watches all members of all groups; see the module's text.

    Args:
        member_of: ``member_of(instance, uid)``: that member, or None if there is none at present.
        is_lost: whether an instance will never come back.
        local_us: what the clock of an instance shows now.

    Attributes:
        are_leases_safe: whether clocks stay within what groups were told of them.
    """

    def __init__(self, member_of: Any, is_lost: Any, local_us: Any) -> None:
        self._member_of = member_of
        self._is_lost = is_lost
        self._local_us = local_us
        self.are_leases_safe = True
        self._born: dict[int, set[int]] = {}
        self._told: dict[tuple[int, int], tuple[int, bool]] = {}
        self._lives: dict[tuple[int, int], tuple[Any, int, int, tuple[int, int]]] = {}
        self._suspects: dict[tuple[int, int], int] = {}
        self._grants: dict[tuple[int, int, int], set[int]] = {}
        self._handed_over: set[tuple[int, int, int]] = set()
        self._leaders: dict[tuple[int, int], _Leading] = {}

    # -- what is sent ----------------------------------------------------------------------------------------------

    def sent(self, instance: int, to_instance: int, messages: Iterable[Any]) -> None:
        """Look at what leaves a shard. Call it before :meth:`stepped` for the same turn."""
        for message in messages:
            kind = message[0]
            if kind == VOTE and not message.pre:
                self._vote_asked(instance, message)
            elif kind == VOTE_ANSWER and message.granted:
                if message.pre:
                    self._grants.setdefault((message.uid, message.term, to_instance), set()).add(instance)
                self._vote_given(instance, to_instance, message)
            elif kind == TIMEOUT_NOW:
                self._handing_over(instance, to_instance, message)
            elif kind == APPEND:
                # Of a leader that elected itself alone, and may die before the end of this turn.
                self._born.setdefault(message.uid, set()).add(message.term)

    def _vote_asked(self, instance: int, message: Any) -> None:
        uid, term = message.uid, message.term
        self._born.setdefault(uid, set()).add(term)
        member = self._member_of(instance, uid)
        if member is None or member.term != term or member.membership.audit:
            return  # it went on since, or repairs a lost majority
        if message.transfer:
            if (uid, term - 1, instance) not in self._handed_over:
                raise Violation(f"transfer: {instance} campaigns in group {uid} as if its leader had told it to")
            return
        granted = self._grants.get((uid, term, instance), set())
        voters = member.voters
        count = sum(1 for voter in voters if voter == instance or voter in granted)
        if count < len(voters) // 2 + 1:
            raise Violation(
                f"pre-vote: {instance} asks for votes in group {uid} term {term}, which {count} of {len(voters)} said"
                " that they would give"
            )

    def _vote_given(self, instance: int, to_instance: int, message: Any) -> None:
        """A vote binds to the log that the voter holds, or held in a former life."""
        voter, candidate = self._member_of(instance, message.uid), self._member_of(to_instance, message.uid)
        if voter is None or candidate is None or candidate.lead is not None:
            return
        if candidate.term == message.term - (1 if message.pre else 0):
            end = (candidate.log.last_term, candidate.last_index)
            if end < voter.forgotten_end:
                raise Violation(
                    f"identity: {instance} votes in group {message.uid} for a log that ends at {end}, and held"
                    f" {voter.forgotten_end} in its former life"
                )

    def _handing_over(self, instance: int, to_instance: int, message: Any) -> None:
        uid = message.uid
        self._handed_over.add((uid, message.term, to_instance))
        leader, target = self._member_of(instance, uid), self._member_of(to_instance, uid)
        if leader is None or target is None or leader.lead is None or target.term != leader.term:
            return
        if to_instance not in leader.voters:
            raise Violation(f"transfer: group {uid} is handed over to {to_instance}, which is no voter")
        if target.last_index < leader.lead.progress[to_instance].match or (
            leader.lead.transfer_target == to_instance and target.last_index < leader.last_index
        ):
            raise Violation(
                f"transfer: group {uid} is handed over to {to_instance}, whose log ends at {target.last_index},"
                f" before the leader's end {leader.last_index}"
            )

    def check_restored_voter(
        self, instance: int, messages: Iterable[Any], restored: dict[int, Any], members: dict[int, Any]
    ) -> None:
        """Look at what a shard sends within an election timeout of its restart (5.9)."""
        for message in messages:
            if message[0] == VOTE_ANSWER and message.granted:
                if message.uid in restored and members.get(message.uid) is restored[message.uid]:
                    raise Violation(
                        f"silence after a restart: {instance} grants a vote in group {message.uid}, though it may have"
                        " promised a lease before"
                    )

    def forget_instance(self, instance: int) -> None:
        """It went down; whether it comes back is another matter."""
        for table in (self._leaders, self._lives):
            for key in [key for key in table if key[0] == instance]:
                del table[key]

    # -- what members are ------------------------------------------------------------------------------------------

    def stepped(self, instance: int, members: dict[int, Any]) -> None:
        """Look at the members of a shard after a turn of it."""
        told = self._told
        for uid, member in members.items():
            key = (instance, uid)
            lead = member.lead
            known = self._lives.get(key)
            if known is not None and known[0] is not member:
                self._check_new_life(key, known[1:], member)
            self._lives[key] = (member, member.term, member.vote, (member.log.last_term, member.last_index))
            seen = (member.term, lead is not None)
            if told.get(key) != seen:
                told[key] = seen
                self._check_term(instance, uid, member)
            if lead is not None:
                self._check_leader(key, member)
            elif key in self._leaders:
                del self._leaders[key]

    def _check_new_life(self, key: tuple[int, int], known: tuple[int, int, tuple[int, int]], member: Any) -> None:
        """A member that was removed is back at the same instance: what it promised in its former life still binds."""
        term, vote, log_end = known
        own_end = max(member.forgotten_end, (member.log.last_term, member.last_index))
        if member.term < term or (member.term == term and vote not in (0, member.vote)) or own_end < log_end:
            raise Violation(
                f"identity: {key[0]} is in group {key[1]} again and forgot its former life: term {term}, vote {vote},"
                f" end of the log {log_end}; now {member.term}, {member.vote}, {own_end}"
            )

    def _check_term(self, instance: int, uid: int, member: Any) -> None:
        born = self._born.setdefault(uid, set())
        if member.lead is not None or member.vote == instance:
            born.add(member.term)
            if member.lead is not None or member.role == CANDIDATE:
                self._check_candidate(instance, uid, member)
        elif member.term and member.term not in born:
            raise Violation(f"pre-vote: {instance} is in term {member.term} of group {uid}, which no candidate began")

    def _check_candidate(self, instance: int, uid: int, member: Any) -> None:
        """Its vote for itself binds as any other does."""
        end = member.lead.noop_index - 1 if member.lead is not None else member.last_index
        term = member.log.term_at(end)
        if -1 < term and (term, end) < member.forgotten_end:
            raise Violation(
                f"identity: {instance} campaigns in group {uid} with a log that ends at {(term, end)}, and held"
                f" {member.forgotten_end} in its former life"
            )

    def _check_leader(self, key: tuple[int, int], member: Any) -> None:
        instance, uid = key
        view = self._leaders.get(key)
        if view is None or view.member is not member or view.term != member.term:
            view = self._leaders[key] = _Leading(member)
        lead, log = member.lead, member.log
        if member.last_index > view.last_index:
            for index in range(max(view.last_index + 1, log.first_index), member.last_index + 1):
                entry = log.entry(index)
                if entry.kind == CONFIG:
                    self._check_config(instance, member, index)
                elif entry.kind == COMMANDS and view.transfer_target and view.transfer_target == lead.transfer_target:
                    raise Violation(f"transfer: leader {instance} of group {uid} takes commands while it hands over")
            view.last_index = member.last_index
        view.transfer_target = lead.transfer_target
        for peer, progress in lead.progress.items():
            if progress.match > view.matches.get(peer, 0):
                view.matches[peer] = progress.match
                self._check_match(instance, member, peer, progress)
        if member.commit > view.commit:
            view.commit = member.commit
            self._check_commit(instance, member, view.membership)
        if not view.is_established and member.commit >= lead.noop_index:
            view.is_established = True
            if self.are_leases_safe:
                self._check_leases(instance, member)
        view.membership = member.membership

    def _check_config(self, instance: int, member: Any, index: int) -> None:
        """A leader put a configuration into its log."""
        uid, log = member.uid, member.log
        new = Membership.unpack(log.entry(index).data, index)
        if new.audit:
            return  # a repair of a lost majority has rules of its own
        if log.term_at(max(member.commit, log.snapshot_index)) != member.term:
            raise Violation(
                f"configuration: leader {instance} of group {uid} changes it at {index} before an entry of its own term"
                f" {member.term} is committed"
            )
        earlier = [row for row in member.memberships if row[0] < index]
        if earlier and earlier[-1][0] > member.commit:
            raise Violation(
                f"configuration: leader {instance} of group {uid} changes it at {index} while the change at"
                f" {earlier[-1][0]} is under way"
            )
        if not earlier:
            return
        before = earlier[-1][1]
        self._check_newcomers(instance, member, before, new)
        if set(before.voters) != set(new.voters):
            lost = [voter for voter in new.voters if self._is_lost(voter)]
            if len(new.voters) - len(lost) < new.quorum:
                raise Violation(
                    f"configuration: leader {instance} of group {uid} goes on with {new.voters}, of which {lost} are"
                    " gone for good"
                )

    def _check_newcomers(self, instance: int, member: Any, before: Membership, new: Membership) -> None:
        for voter in new.voters:
            if voter in before.voters:
                continue
            progress = member.lead.progress.get(voter)
            match = member.last_index if voter == instance else progress.match if progress is not None else 0
            if voter not in before.learners or match + CAUGHT_UP_ENTRIES < member.commit:
                raise Violation(
                    f"configuration: {voter} votes in group {member.uid} though it was no learner that had caught up"
                )

    def _check_match(self, instance: int, member: Any, peer: int, progress: Any) -> None:
        """What a leader believes of a follower of the same term and life must be so."""
        follower = self._member_of(peer, member.uid)
        if follower is None or follower.term > member.term or follower.life != progress.life:
            return
        if follower.term < member.term or not _holds(follower, progress.match, member.log.term_at(progress.match)):
            raise Violation(
                f"match: leader {instance} of group {member.uid} believes that {peer} agrees up to {progress.match};"
                f" its log ends at {follower.last_index}"
            )

    def _check_commit(self, instance: int, member: Any, before: Membership) -> None:
        """A quorum holds it: of the voters in force now, or of those before this turn, which may have changed them."""
        index = member.commit
        if index < member.lead.noop_index:
            raise Violation(
                f"commit: leader {instance} of group {member.uid} commits {index}, an entry of an older term, by"
                " counting"
            )
        term = member.log.term_at(index)
        for membership in (member.membership, before):
            count = 0
            for voter in membership.voters:
                other = self._member_of(voter, member.uid)
                if other is None or (_holds(other, index, term) and other.shard.saved_index(other) >= index):
                    count += 1  # what is down cannot be asked
            if count >= membership.quorum:
                return
        raise Violation(
            f"quorum: leader {instance} of group {member.uid} commits {index}, which {count} of"
            f" {len(membership.voters)} voters hold"
        )

    def _check_leases(self, instance: int, member: Any) -> None:
        """A new leader can change the state from now on: nobody may answer from the old one."""
        for (other, uid), view in self._leaders.items():
            deposed = view.member
            if uid != member.uid or deposed.lead is None or deposed.term >= member.term:
                continue
            left_us = deposed.lease_until_us() - self._local_us(other)
            if left_us > 0:
                raise Violation(
                    f"lease: {other} may answer reads of group {uid} for another {left_us / 1000:.1f} ms, though"
                    f" {instance} leads it in a later term"
                )

    def check_leaders_silence(self, shards: Iterable[tuple[int, int, Any]]) -> None:
        """Now and then: ``(instance, now by its clock, members)`` of each shard that runs.

        Who is silent in two looks running is at fault: a leader may learn at once that its promises are void (a peer's
        list says that it is not followed there), and steps down at its next beat.
        """
        suspects, self._suspects = self._suspects, {}
        for instance, now_us, members in shards:
            for uid, member in members.items():
                lead = member.lead
                if lead is None:
                    continue
                heard_us = max(member.quorum_stamp(), lead.elected_us)
                if member.voters == (instance,) or now_us - heard_us <= (
                    QUORUM_SILENCE_TIMEOUTS * member.election_timeout_us
                ):
                    continue
                self._suspects[instance, uid] = member.term
                if suspects.get((instance, uid)) == member.term:
                    raise Violation(
                        f"check-quorum: {instance} leads group {uid} though it has heard no quorum for"
                        f" {(now_us - heard_us) / 1e6:.1f} s"
                    )


def _holds(member: Any, index: int, term: int) -> bool:
    """Whether a member's log has the entry of that term at ``index``, as far as it can be told."""
    if index <= member.log.snapshot_index:
        return True
    return member.last_index >= index and (term == -1 or member.log.term_at(index) == term)

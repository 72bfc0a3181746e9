"""Coming to lead: campaign, votes, the first act as leader, and handing over.

This module does not know when to campaign (:mod:`raftfleet.core.leaderless` does).

Rules (paper 5.2, 5.4.1; thesis 3.10, 4.2, 9.6; DESIGN 5.8, 5.11):

* A pre-vote changes nothing where it is asked; its refusals teach a higher term.
* No vote, and no pre-vote, while a leader is heard, except to the target of a transfer.
* On disks the target of a transfer asks before it campaigns, and whoever would vote for it writes to the disk before it
  says so, the target too. Only a quorum that has room goes over to another term; else the leader stays, who answers
  reads if it can do nothing else.
* A vote goes to a log at least as complete as ours, and as the log that this instance once held
  (``forgotten_end``). It is saved before it is told, a candidate's vote for itself too.
* Whoever asks needs not be a member as we know it: it may know a newer configuration, or not know of its removal.
* A new leader appends a NOOP: earlier terms' entries commit by it only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raftfleet.core import change, divergence, own_log, roles
from raftfleet.core.change import ConfigChangeRefused
from raftfleet.core.incoming import drop_incoming
from raftfleet.core.leading import Leading
from raftfleet.core.messages import GONE, NOOP, TIMEOUT_NOW, VOTE, VOTE_ANSWER, Gone, TimeoutNow, Vote, VoteAnswer
from raftfleet.core.progress import REPLICATE
from raftfleet.core.roles import CANDIDATE, FOLLOWER, LEADER, PRE_CANDIDATE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from raftfleet.core.member import Member

TRANSFER_US_MAX = 1_000_000
"""Commands wait while a leadership is handed over. Groups with a long election timeout need no longer for it."""


def campaign(member: Member, *, pre: bool, transfer: bool = False) -> None:
    """Ask for votes: first whether they would be given (thesis 9.6), then in earnest."""
    membership = member.membership
    if not member.may_campaign:
        return
    if member.leader:
        roles.follow(member, member.term, 0)
    member.takes_over_until_us = 0
    asked_before = member.role != FOLLOWER
    if pre:
        member.role = PRE_CANDIDATE
    else:
        member.role = CANDIDATE
        member.term += 1
        member.vote = member.id
        member.shard.save_vote(member)
    member.votes = {member.id: True}
    roles.wait_to_campaign(member, member.election_timeout_us // 2)
    if membership.voters == (member.id,):
        member.shard.when_saved(member)
        return
    term = member.term + 1 if pre else member.term
    message = Vote(VOTE, member.uid, term, pre, member.log.last_index, member.log.last_term, transfer)
    # Asked in vain before: ask learners too, and whoever holds the group now. They may be the only ones left that know
    # of this member's removal.
    asked: Iterable[int] = membership.voters
    if pre and asked_before:
        asked = dict.fromkeys((*membership.lives, *member.shard.holders(member.uid)))
    for peer in asked:
        if peer != member.id:
            # A vote request of a candidate speaks for its own, already saved, vote: it leaves after that is saved.
            member.shard.send_saved(peer, message)


def on_vote(member: Member, sender: int, m: Vote) -> None:
    """RequestVote and pre-vote, receiver's side (paper 5.4.1; thesis 4.2.3, 9.6)."""
    log = member.log
    if not member.membership.lives:
        return  # nothing is known here yet: an empty log would find every candidate up to date
    up_to_date = (m.last_term, m.last_index) >= max((log.last_term, log.last_index), member.forgotten_end)
    if sender not in member.committed_membership()[1] and sender not in member.membership:
        # Removed, or added by an entry that has not come here yet: Gone tells how far we know, and the sender
        # knows which. (The commit index, not the configuration's: up to there the sender is no member, also if it
        # counts its life from an entry that was never committed.) A new voter's log is ahead of ours, and it must
        # be able to win.
        member.shard.send(sender, Gone(GONE, member.uid, member.term, member.commit))
        if not up_to_date:
            return
    if not m.transfer and member.hears_leader():
        return
    if m.term < member.term or (m.pre and m.term == member.term):
        member.shard.send_saved(sender, VoteAnswer(VOTE_ANSWER, member.uid, member.term, m.pre, False))
        return
    if m.pre:
        if up_to_date and not member.shard.refuses_votes(member):
            if m.transfer:
                member.shard.prove_room(member)
            member.shard.send_saved(sender, VoteAnswer(VOTE_ANSWER, member.uid, m.term, True, True))
        else:
            member.shard.send_saved(sender, VoteAnswer(VOTE_ANSWER, member.uid, member.term, True, False))
        return
    if m.term > member.term:
        roles.follow(member, m.term, 0)
    granted = up_to_date and member.vote in (0, sender) and not member.leader and not member.shard.refuses_votes(member)
    if granted:
        if member.vote != sender:
            member.vote = sender
            member.shard.save_vote(member)
        roles.wait_to_campaign(member)
    member.shard.send_saved(sender, VoteAnswer(VOTE_ANSWER, member.uid, member.term, False, granted))


def on_vote_answer(member: Member, sender: int, m: VoteAnswer) -> None:
    """Count it if it answers what is being asked now; a refusal teaches a higher term."""
    if not m.granted and m.term > member.term:
        roles.follow(member, m.term, 0)
        return
    if m.pre:
        if member.takes_over_until_us:
            _on_heir_answer(member, sender, m)
            return
        if member.role != PRE_CANDIDATE or (m.granted and m.term != member.term + 1):
            return
    elif member.role != CANDIDATE or m.term != member.term:
        return
    assert member.votes is not None, "whoever campaigns counts"
    member.votes.setdefault(sender, m.granted)
    count_votes(member)


def count_votes(member: Member) -> None:
    """Go on if a quorum granted, wait if it cannot any more."""
    voters = member.membership.voters
    quorum = member.membership.quorum
    votes = member.votes or {}
    granted = sum(1 for voter in voters if votes.get(voter))
    if granted >= quorum:
        if member.role == PRE_CANDIDATE:
            member.campaign(pre=False)
        elif member.role == CANDIDATE:
            _start_leading(member)
    elif sum(1 for voter in voters if votes.get(voter) is False) >= len(voters) - quorum + 1:
        # Lost for sure: wait for the timer.
        member.role = FOLLOWER if member.role == PRE_CANDIDATE else member.role


def _start_leading(member: Member) -> None:
    shard = member.shard
    member.role = LEADER
    member.leader = member.id
    member.timer_us = 0
    member.votes = None
    member.recovery = None
    member.losses = None
    drop_incoming(member)
    lead = member.lead = Leading(shard.now_us)
    for index, _ in member.memberships:
        if index > member.commit:
            lead.config_index = index
    change.sync_progress(member)
    for peer, progress in lead.progress.items():
        progress.led = True
        progress.led_seq = shard.link(peer).lead(member)
    lead.noop_index = own_log.append(member, NOOP, b"")
    if member.is_quarantined:
        divergence.begin_to_lead(member, lead)
    shard.event("elected", member.uid, member.term)
    shard.set_dirty(member)


def transfer(member: Member, target: int) -> None:
    """Hand the leadership over (thesis 3.10). New commands wait until it is done or the deadline has passed."""
    lead = change.check_change(member)
    if target == member.id:
        return
    progress = lead.progress.get(target)
    if target not in member.membership.voters or progress is None:
        raise ConfigChangeRefused(f"{target} is not a voter")
    if target not in member.live_members() or progress.state != REPLICATE:
        raise ConfigChangeRefused(f"{target} is not caught up, or not heard")
    lead.transfer_target = target
    lead.transfer_deadline_us = member.shard.now_us + min(member.election_timeout_us, TRANSFER_US_MAX)
    lead.lease_void = True  # for the rest of the term: a late TimeoutNow may come to effect at any time
    member.shard.active[member.uid] = member
    if progress.match == member.log.last_index:
        member.shard.send(target, TimeoutNow(TIMEOUT_NOW, member.uid, member.term))


def on_timeout_now(member: Member, sender: int, m: TimeoutNow) -> None:
    """The leader hands over (thesis 3.10)."""
    if m.term == member.term and sender == member.leader and not member.is_learner and not member.is_quarantined:
        if member.shard.asks_before_taking_over:
            _ask_as_heir(member)
        else:
            member.campaign(pre=False, transfer=True)


def _ask_as_heir(member: Member) -> None:
    """Ask whether a quorum would vote, and could save its votes. Nothing changes by it: the leader is followed on."""
    member.takes_over_until_us = member.shard.now_us + min(member.election_timeout_us, TRANSFER_US_MAX)
    member.votes = {member.id: True}
    member.shard.prove_room(member)
    message = Vote(VOTE, member.uid, member.term + 1, True, member.log.last_index, member.log.last_term, True)
    for peer in member.membership.voters:
        if peer != member.id:
            member.shard.send_saved(peer, message)


def _on_heir_answer(member: Member, sender: int, m: VoteAnswer) -> None:
    """A quorum could vote now: campaign. What comes later than the leader waits for is of no use."""
    if member.shard.now_us >= member.takes_over_until_us or member.votes is None or m.term != member.term + 1:
        return
    member.votes[sender] = m.granted
    if sum(1 for voter in member.membership.voters if member.votes.get(voter)) >= member.membership.quorum:
        member.campaign(pre=False, transfer=True)

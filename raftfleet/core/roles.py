"""Term and role: following a leader, ceasing to lead, and the member's own election clock.

This module does not know why: whoever learned of a term or leader (an append, a vote, an answer) calls :func:`follow`.
How a member comes to lead is in :mod:`raftfleet.core.election`.

Rules (Raft paper 5.1; DESIGN 5.6):

* The term never goes back. A new term clears the vote, and both are saved before any answer that depends on them.
* Who ceases to lead says so to all its peers: their links to it do not fall silent, so they would wait for ever.
* All that only a leader has goes with ``member.lead``; whoever waits for an answer gets one: NOT_LEADER where nothing
  entered the log, DROPPED where the outcome is unknown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raftfleet.core.codes import DROPPED, NOT_LEADER
from raftfleet.core.messages import STEP_DOWN, StepDown

if TYPE_CHECKING:
    from raftfleet.core.leading import Leading
    from raftfleet.core.member import Member

FOLLOWER = "follower"
PRE_CANDIDATE = "pre_candidate"
CANDIDATE = "candidate"
LEADER = "leader"
DAMAGED = "damaged"
"""No role: shown in place of one where what a member held is lost to its disk."""
EPOCH_SHIFT = 32
NEVER_US = -(1 << 62)


def follow(member: Member, term: int, leader: int) -> None:
    """Be a follower in ``term`` of ``leader`` (0: unknown)."""
    shard = member.shard
    if member.lead is not None:
        if term != member.term:
            # Deposed: whoever still follows must not wait for the link to fall silent, for it does not.
            _say_step_down(member, member.lead)
        _stop_leading(member)
    if member.leader and (term != member.term or leader != member.leader):
        member.heard_us = member.heard_leader_us()
        link = shard.links.get(member.leader)
        if link is not None:
            link.unfollow(member)
        if not leader:
            shard.event("leaderless", member.uid)
    if term != member.term:
        assert term > member.term, (term, member.term)
        member.term = term
        member.vote = 0
        shard.save_vote(member)
    changed = leader != member.leader or member.role != FOLLOWER
    member.role = FOLLOWER
    member.leader = leader
    member.votes = None
    member.takes_over_until_us = 0
    member.recovery = None
    if leader:
        member.last_leader = leader
        member.losses = None
        if not member.vote:
            # The term has its leader. A member that lost its memory of this term (removed, added again) must not
            # give a second vote in it.
            member.vote = leader
            shard.save_vote(member)
        link = shard.link(leader)
        if member.uid not in link.followed:
            link.follow(member)
            if shard.now_us > link.heard_us:
                link.heard_us = shard.now_us
        member.heard_us = shard.now_us
        if changed:
            member.timer_us = 0
    elif not member.timer_us:
        wait_to_campaign(member)


def wait_to_campaign(member: Member, base_us: int = -1, spread_us_min: int = 0) -> None:
    """Start this member's own election clock: a full timeout, then a random part, so that few collide."""
    if base_us < 0:
        base_us = member.election_timeout_us
    spread_us = member.shard.rng.randrange(max(member.election_timeout_us // 2, spread_us_min) + 1)
    member.timer_us = member.shard.now_us + base_us + spread_us
    member.shard.set_timer(member)


def is_present_life(member: Member, life: int, term: int) -> bool:
    """Whether a leader of ``term`` speaks to this life of this member; a new life keeps all of the memory.

    Within a term lives only grow. A leader of a higher term is always right: its log may lack the uncommitted
    entry from which a higher number came, and add this instance again at a lower index.
    """
    if life < member.life and term <= member.life_term:
        return False
    member.life_term = term
    if life != member.life:
        member.life = life
        member.shard.save_group(member)
    return True


def step_down(member: Member) -> None:
    """Lead no more, and say so at once."""
    lead = member.lead
    if lead is None:
        return
    _say_step_down(member, lead)
    _stop_leading(member)
    follow(member, member.term, 0)
    # Whoever steps down lets others try first.
    wait_to_campaign(member)


def _stop_leading(member: Member) -> None:
    """Leave everything that only a leader has. The term must still be the one that was led."""
    shard = member.shard
    lead = member.lead
    assert lead is not None
    member.lead = None
    member.role = FOLLOWER
    member.leader = 0
    member.timer_us = 0
    for peer, progress in lead.progress.items():
        if progress.led:
            shard.links[peer].unlead(member, member.term)
    shard.active.pop(member.uid, None)
    shard.reading.pop(member.uid, None)
    for _, token in lead.batch:
        shard.reply(token, NOT_LEADER, (0, member.term))
    for tokens in lead.pending.values():
        for token in tokens:
            shard.reply(token, DROPPED, (0, member.term))
    for _, _, token, _ in lead.reads:
        shard.reply(token, NOT_LEADER, (0, member.term))
    shard.event("stepped_down", member.uid, member.term)


def _say_step_down(member: Member, lead: Leading) -> None:
    for peer in lead.progress:
        member.shard.send(peer, StepDown(STEP_DOWN, member.uid, member.term))

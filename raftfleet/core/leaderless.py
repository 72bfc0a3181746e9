"""What a member does when it loses its leader, and when its time is up.

This module hears no silence itself: links do, for all groups that share them (:mod:`raftfleet.core.links`), and the
shard calls :func:`leader_silent`. A member's own timer runs only while it has no leader, or one whose link is silent.

Rules (paper 5.2; DESIGN 5.8):

* A silent leader's promise lasts: a campaign starts after the whole election timeout and a random part, spread the
  wider the more groups lost the same leader. Only a leader's own word ("I lead no more") shortens that.
* Whoever may not campaign asks whether it was removed; where a majority is lost for good, the repair is tried instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raftfleet.core import divergence, repair, roles
from raftfleet.core.messages import VOTE, Vote
from raftfleet.core.roles import NEVER_US

if TYPE_CHECKING:
    from raftfleet.core.member import Member
    from raftfleet.core.messages import StepDown

CAMPAIGN_US_PER_GROUP = 300
"""When a link with n groups falls silent their elections are spread over at least n times this."""


def leader_silent(member: Member, silent_since_us: int) -> None:
    """The link to the leader is silent: campaign after what is left of the timeout and a random delay."""
    heard_us = max(member.heard_us, silent_since_us)
    if not member.timer_us:
        left_us = heard_us + member.election_timeout_us - member.shard.now_us
        roles.wait_to_campaign(
            member, max(left_us, 0), len(member.shard.link(member.leader).followed) * CAMPAIGN_US_PER_GROUP
        )


def leader_gone(member: Member) -> None:
    """The leader says that it leads no more: its promise to us and ours to it are void."""
    roles.follow(member, member.term, 0)
    member.heard_us = NEVER_US
    roles.wait_to_campaign(member, 0)


def on_step_down(member: Member, sender: int, m: StepDown) -> None:
    """The leader leads no more."""
    if m.term == member.term and sender == member.leader:
        member.leader_gone()


def not_on_leaders_list(member: Member) -> None:
    """The leader's list lacks this group: it is not followed any more; campaign after a full timeout."""
    roles.follow(member, member.term, 0)
    roles.wait_to_campaign(member)


def timer_due(member: Member) -> None:
    """The timer ran out."""
    member.timer_us = 0
    if member.lead is not None:
        return
    if member.shard.is_full:
        roles.wait_to_campaign(member)  # not even the vote for itself could be saved
        return
    if member.hears_leader():
        if not member.leader:
            roles.wait_to_campaign(member, member.heard_us + member.election_timeout_us - member.shard.now_us)
        return
    if member.leader:
        roles.follow(member, member.term, 0)
    if not member.may_campaign:
        if not repair.try_recovery(member):
            _ask_whether_removed(member)
        roles.wait_to_campaign(member)
        return
    if repair.try_recovery(member) or divergence.gives_way(member):
        roles.wait_to_campaign(member)
        return
    member.campaign(pre=True)


def _ask_whether_removed(member: Member) -> None:
    """A learner that hears no leader asks the voters that it knows: a pre-vote, which changes nothing there.

    Whoever knows that it was removed says Gone; the one sent at its removal may have been lost. One that was removed
    before it had anything, or when it had only times of which it was the last voter, asks the leader that began it;
    after a restart it has forgotten that one too. So those are asked as well of whom the owner of the shard thinks that
    they hold the group now.
    """
    message = Vote(VOTE, member.uid, member.term + 1, True, member.log.last_index, member.log.last_term, False)
    known = [voter for voter in member.membership.voters if voter != member.id] or [member.last_leader]
    for peer in dict.fromkeys((*known, *member.shard.holders(member.uid))):
        if peer and peer != member.id:
            member.shard.send_saved(peer, message)

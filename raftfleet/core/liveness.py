"""A leader's knowledge of who follows it, and since when.

This module reads no clock and sends nothing. It answers from two sources: appends answered in this term
(``progress.ack_stamp``), and beats of the link, which speak for all groups in whose digest both sides agree
(:mod:`raftfleet.core.links`).

The rule that is easily broken by a change here: a promise (lease, ReadIndex, check-quorum) counts from the *stamp* of
the message that was answered, never from the answer's arrival; and only voters of the newest configuration count
(thesis 6.2, 6.4; DESIGN 5.2, 5.8, 5.13).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raftfleet.core.member import Member
    from raftfleet.core.progress import Progress


def confirmed_stamp(member: Member, peer: int, progress: Progress) -> int:
    """The newest moment (own clock) since when ``peer`` is known to have followed this leader in this term."""
    if progress.led:
        link = member.shard.links[peer]
        if link.ok_seq >= progress.led_seq and link.ok_stamp > progress.ack_stamp:
            return link.ok_stamp
    return progress.ack_stamp


def quorum_stamp(member: Member) -> int:
    """The newest moment at which a quorum of voters, this one included, followed this leader."""
    lead = member.lead
    assert lead is not None
    membership = member.membership
    stamps = []
    for voter in membership.voters:
        if voter == member.id:
            stamps.append(member.shard.stamp)
        else:
            stamps.append(member.confirmed_stamp(voter, lead.progress[voter]))
    stamps.sort(reverse=True)
    return stamps[membership.quorum - 1]


def live_members(member: Member) -> frozenset[int]:
    """Members heard within an election timeout, this one included. Only on a leader."""
    lead = member.lead
    assert lead is not None
    horizon_us = member.shard.now_us - member.election_timeout_us
    live = {member.id}
    for peer, progress in lead.progress.items():
        if member.confirmed_stamp(peer, progress) > horizon_us:
            live.add(peer)
    return frozenset(live)


def check_quorum(member: Member) -> bool:
    """Step down if no quorum was heard for an election timeout (thesis 6.2). Returns whether it still leads."""
    lead = member.lead
    if lead is None:
        return False
    heard_us = max(member.quorum_stamp(), lead.elected_us)
    if member.shard.now_us - heard_us > member.election_timeout_us:
        member.step_down()
        return False
    return True

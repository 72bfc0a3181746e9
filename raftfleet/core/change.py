"""Changes of membership, as the leader makes them: one member at a time.

This module does not decide which change is wanted (the fleet's reconciling does), only whether it is safe now.

Rules (thesis 4; DESIGN 5.3, 5.12):

* No change before an entry of this leader's own term is committed, none while another is under way or while the
  leadership is handed over.
* New members come in as learners and are promoted when they have caught up.
* A change that would leave fewer live voters than a quorum is refused.
* Whoever is removed is told so when that is committed, and stops; a leader that removes itself leads until then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raftfleet.core import own_log
from raftfleet.core.messages import CONFIG
from raftfleet.core.progress import REPLICATE, Progress
from raftfleet.core.roles import EPOCH_SHIFT

if TYPE_CHECKING:
    from raftfleet.core.leading import Leading
    from raftfleet.core.member import Member
    from raftfleet.core.membership import Membership
    from raftfleet.core.messages import Gone

CAUGHT_UP_ENTRIES = 16
"""A learner so close behind the commit index (entries are batches) is caught up: under load none is ever level."""


class ConfigChangeRefused(Exception):
    """A change of membership, or a transfer, that would not be safe now. The message says why."""


def check_change(member: Member) -> Leading:
    """What this member leads with, if it may change something now.

    Raises:
        ConfigChangeRefused: see the rules above.
    """
    lead = member.lead
    if lead is None:
        raise ConfigChangeRefused("this member does not lead")
    if member.commit < lead.noop_index:
        raise ConfigChangeRefused("no entry of this leader's term is committed yet")
    if lead.config_index:
        raise ConfigChangeRefused("another change of membership is under way")
    if lead.transfer_target:
        raise ConfigChangeRefused("the leadership is being handed over")
    return lead


def change_membership(member: Member, membership: Membership) -> None:
    """Append a configuration that differs by one member (thesis 4.1; DESIGN 5.3).

    Raises:
        ConfigChangeRefused: not the leader, not established, another change is under way, or fewer live voters
            than a quorum would be left.
    """
    lead = check_change(member)
    if member.shard.is_full:
        raise ConfigChangeRefused("this leader has no room on its disk")
    now, new = set(member.membership.voters), set(membership.voters)
    assert len(now ^ new) <= 1, "one voter at a time"
    if not new:
        raise ConfigChangeRefused("the last voter cannot be removed")
    if now != new:
        live = member.live_members() & new
        if len(live) < membership.quorum:
            raise ConfigChangeRefused(f"only {len(live)} of the {len(new)} voters that this change leaves are live")
    lead.config_index = own_log.append(member, CONFIG, membership.pack())
    sync_progress(member)
    member.shard.set_dirty(member)


def add_learner(member: Member, instance: int) -> None:
    """Add a learner."""
    if instance in member.membership:
        raise ConfigChangeRefused(f"{instance} is a member already")
    member.change_membership(member.membership.with_learner(instance))


def promote(member: Member, instance: int) -> None:
    """Make a caught-up learner a voter."""
    lead = check_change(member)
    if instance not in member.membership.learners:
        raise ConfigChangeRefused(f"{instance} is not a learner")
    progress = lead.progress.get(instance)
    if progress is None or progress.state != REPLICATE or progress.match + CAUGHT_UP_ENTRIES < member.commit:
        raise ConfigChangeRefused(f"learner {instance} has not caught up")
    member.change_membership(member.membership.with_promoted(instance))


def demote(member: Member, instance: int) -> None:
    """Make a voter a learner."""
    check_change(member)
    if instance not in member.membership.voters:
        raise ConfigChangeRefused(f"{instance} is not a voter")
    member.change_membership(member.membership.demoted(instance))


def remove(member: Member, instance: int) -> None:
    """Remove a voter or learner."""
    check_change(member)
    if instance not in member.membership:
        raise ConfigChangeRefused(f"{instance} is not a member")
    member.change_membership(member.membership.without(instance))


def sync_progress(member: Member) -> None:
    """Bring the table of peers in line with the newest membership."""
    lead = member.lead
    assert lead is not None
    lives = member.membership.lives
    for peer in [peer for peer in lead.progress if peer not in lives]:
        progress = lead.progress.pop(peer)
        if progress.led:
            member.shard.links[peer].unlead(member, member.term)
        lead.removed.append(peer)
    for peer, life in lives.items():
        if peer != member.id and peer not in lead.progress:
            lead.progress[peer] = Progress(member.log.last_index + 1, life)
            member.shard.link(peer)


def leave(member: Member) -> None:
    """The configuration that ends this member's leadership is committed and applied (thesis 4.2.2)."""
    if member.lead is not None and member.id not in member.voters:
        member.step_down()
    if member.id not in member.committed_membership()[1] and member.id not in member.membership:
        member.shard.drop_member(member)


def on_gone(member: Member, sender: int, m: Gone) -> None:
    """This member was removed: stop, unless it was added again since."""
    if m.index > member.life or m.term >> EPOCH_SHIFT > member.term >> EPOCH_SHIFT:
        member.shard.drop_member(member)

"""Repair of a majority that is lost for good: the survivors go on in a new epoch.

This module does not judge who is dead: the shard is told (an operator's word, or proof that an instance cannot come
back). Nobody is ever dead because of silence (DESIGN 5.15).

An instance may live on without what one of its members knew: the records on its disk are damaged. It says so itself, to
whoever asks it for a vote (``Lost``), and comes back as a new member only. Its word is about one *life* of the member:
it counts where it reaches the life that the asker's configuration knows. For this group such a voter is as dead as one
whose instance is gone: an operator has to give it up, unless the group's config does so beforehand.

The way of it::

    smallest survivor  --RecoverQuery-->   every other survivor   (all must answer)
    every survivor     --RecoverAnswer-->  smallest survivor      (last term, last index, term)
    smallest survivor  --ForceConfig-->    the most complete log  (epoch + 1, the survivors as voters)
    most complete log  appends that configuration with an audit record and campaigns

Rules: nothing is taken from a group with a living quorum; whoever hears a leader, or does not know the same dead to be
dead, does not answer; the higher epoch refuses all that comes from before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raftfleet.core import own_log, roles
from raftfleet.core.messages import (
    CONFIG,
    FORCE_CONFIG,
    LOSS_QUERY,
    RECOVER_ANSWER,
    RECOVER_QUERY,
    VOTE,
    Entry,
    ForceConfig,
    LossQuery,
    RecoverAnswer,
    RecoverQuery,
    Vote,
)
from raftfleet.core.roles import CANDIDATE, EPOCH_SHIFT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from raftfleet.core.member import Member
    from raftfleet.core.messages import Lost


FIRST_TERM_MASK = 0xFFFFF
"""Low bits of an instance, which is random: a million elections' worth of the four thousand million of an epoch."""


class Losses:
    """What is known of damaged members while there is no leader; forgotten as soon as there is one.

    Attributes:
        lives: instance -> the life (and all earlier ones) that it said it lost.
        declared: instances that the operator gave up. Counts only together with their own word.
    """

    __slots__ = ("declared", "lives")

    def __init__(self) -> None:
        self.lives: dict[int, int] = {}
        self.declared: set[int] = set()


def lost_instances(member: Member) -> set[int]:
    """Members whose disks lost what they knew in their present lives, by their own word."""
    losses = member.losses
    if losses is None:
        return set()
    lives = member.membership.lives
    return {instance for instance, life in losses.lives.items() if lives.get(instance, life + 1) <= life}


def given_up(member: Member) -> set[int]:
    """Those of :func:`lost_instances` that the operator gave up."""
    losses = member.losses
    return lost_instances(member) & losses.declared if losses is not None else set()


def declare_lost(member: Member, instances: Iterable[int]) -> None:
    """The operator gives up what these members lost. Without effect on any that has not lost it."""
    if member.hears_leader():
        return
    if member.losses is None:
        member.losses = Losses()
    member.losses.declared.update(instances)


def on_lost(member: Member, sender: int, m: Lost) -> None:
    """A member's disk lost what this life of it knew. It follows no more; the owner is told, and removes it."""
    lead = member.lead
    if lead is None:
        _on_lost_without_leader(member, sender, m)
        return
    progress = lead.progress.get(sender) if m.term == member.term else None
    if progress is not None and progress.life == m.life and not progress.is_lost:
        progress.is_lost = True
        member.shard.event("member_lost", member.uid, sender)


def _on_lost_without_leader(member: Member, sender: int, m: Lost) -> None:
    life = member.membership.lives.get(sender)
    if life is None or member.hears_leader():
        return
    if m.life < life:
        member.shard.send_saved(sender, LossQuery(LOSS_QUERY, member.uid, member.term, life))
        return
    if member.losses is None:
        member.losses = Losses()
    member.losses.lives[sender] = m.life


def on_loss_query(member: Member, sender: int, m: LossQuery) -> None:
    """Asked of a member that is here: nothing is lost, and its votes and appends say so."""


def lost_majority(member: Member) -> set[int] | None:
    """The dead voters, if so many are gone for good that the rest can never be a quorum; else None."""
    membership = member.membership
    gone = member.shard.gone_for(member)
    dead = {voter for voter in membership.voters if voter in gone}
    if dead and len(membership.voters) - len(dead) < membership.quorum:
        return dead
    return None


def try_recovery(member: Member) -> bool:
    """Majority lost and declared so: the survivor with the smallest instance asks all others what they have.

    Nothing is taken from a group with a living quorum, and nothing happens until every survivor has answered, so
    the most complete log is found (DESIGN 5.15).
    """
    dead = member.lost_majority()
    if dead is None:
        return False
    if member.config.on_majority_loss == "new":
        member.shard.event("majority_lost", member.uid, sorted(dead), sorted(dead & lost_instances(member)))
        return True
    survivors = [voter for voter in member.membership.voters if voter not in dead]
    if not survivors:
        # Only learners are left: the one with the smallest instance goes on alone with what it has.
        survivors = [peer for peer in member.membership.learners if peer not in member.shard.gone_for(member)]
    if member.id not in survivors or member.id != min(survivors):
        return True
    member.recovery = {member.id: (member.log.last_term, member.log.last_index, member.term)}
    for peer in survivors:
        if peer != member.id:
            member.shard.send_saved(peer, RecoverQuery(RECOVER_QUERY, member.uid, member.term, sorted(dead)))
    _finish_recovery(member, survivors, dead)
    return True


def on_recover_query(member: Member, sender: int, m: RecoverQuery) -> None:
    """Answer only without a leader, and only if the dead are known to be dead here too."""
    if member.hears_leader() or member.id in m.dead:
        return
    gone = member.shard.gone_for(member)
    if any(instance not in gone for instance in m.dead):
        return
    member.shard.send_saved(
        sender, RecoverAnswer(RECOVER_ANSWER, member.uid, member.term, member.log.last_index, member.log.last_term)
    )


def on_recover_answer(member: Member, sender: int, m: RecoverAnswer) -> None:
    """One survivor's word."""
    dead = member.lost_majority()
    if member.recovery is None or dead is None or member.leader:
        return
    survivors = [voter for voter in member.membership.voters if voter not in dead]
    if not survivors:
        survivors = [peer for peer in member.membership.learners if peer not in member.shard.gone_for(member)]
    if sender in survivors:
        member.recovery[sender] = (m.last_term, m.last_index, m.term)
        _finish_recovery(member, survivors, dead)


def _finish_recovery(member: Member, survivors: list[int], dead: set[int]) -> None:
    recovery = member.recovery
    if recovery is None or any(peer not in recovery for peer in survivors):
        return
    best = max(survivors, key=lambda peer: (recovery[peer][:2], -peer))
    epoch = (max(row[2] for row in recovery.values()) >> EPOCH_SHIFT) + 1
    member.recovery = None
    # The first term of an epoch is different for each survivor that may begin it: if operators contradict each other,
    # two may, and their entries must not look the same.
    term = (epoch << EPOCH_SHIFT) | (best & FIRST_TERM_MASK)
    message = ForceConfig(FORCE_CONFIG, member.uid, term, sorted(survivors), sorted(dead))
    if best == member.id:
        member.on_force_config(member.id, message)
    else:
        member.shard.send_saved(best, message)


def on_force_config(member: Member, sender: int, m: ForceConfig) -> None:
    """Go on with the survivors, in a new epoch, and leave a record of it in the log."""
    gone = member.shard.gone_for(member)
    if m.term >> EPOCH_SHIFT <= member.term >> EPOCH_SHIFT or member.id not in m.voters or member.hears_leader():
        return
    if any(instance not in gone for instance in m.dead):
        return
    roles.follow(member, m.term, 0)
    member.vote = member.id
    member.shard.save_vote(member)
    lives = {i: life for i, life in member.membership.lives.items() if i in m.voters or i not in gone}
    damaged = sorted(lost_instances(member) & set(m.dead))
    node_of = member.shard.node_of
    audit = {
        "what": "majority lost; went on with the survivors",
        "epoch": m.term >> EPOCH_SHIFT,
        "wall_us": member.shard.wall_us,
        "dead": list(m.dead),
        "dead_nodes": sorted({node_of(instance) for instance in m.dead}),
        "damaged_nodes": sorted({node_of(instance) for instance in damaged}),
        "voters": list(m.voters),
        "voter_nodes": sorted({node_of(instance) for instance in m.voters}),
        "voters_before": list(member.membership.voters),
        "went_on_from": [member.log.last_term, member.log.last_index],
        "by": sender,
    }
    forced = member.membership.forced(tuple(m.voters), lives, audit)
    index = member.log.append(Entry(member.term, CONFIG, forced.pack()))
    member.shard.save_entries(member, index)
    own_log.take_membership(member, index, member.log.entry(index).data)
    member.shard.event("recovered", member.uid, audit)
    member.role = CANDIDATE
    member.votes = {member.id: True}
    roles.wait_to_campaign(member, member.election_timeout_us // 2)
    if forced.voters == (member.id,):
        member.shard.when_saved(member)
        return
    message = Vote(VOTE, member.uid, member.term, False, member.log.last_index, member.log.last_term, False)
    for peer in forced.voters:
        if peer != member.id:
            member.shard.send_saved(peer, message)

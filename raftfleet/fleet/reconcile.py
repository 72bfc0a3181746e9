"""One safe step at a time from the members a group has to those that it should have.

This module is pure: it looks at one moment of a group, as its leader sees it, and names the next step, or None. The
leader's shard takes the step and asks again when something has changed.

The order (DESIGN 5.3 and 7; each step assumes that those above have nothing to do):

1. a voter whose instance is gone for good is removed, if the live voters left are a quorum of the rest, and then an
   outlier (:mod:`raftfleet.core.divergence`), if all the rest are live: it comes back as a new member by the next step;
2. a desired member that is missing comes in as a learner;
3. a desired learner that has caught up is promoted;
4. a surplus voter is removed once its replacement votes; a surplus leader hands over first;
5. leadership goes home to the first desired member.

Never is a voter that may be alive removed before its replacement is promoted, but for an outlier, whose state is of no
use and whose instance is its own replacement; never would fewer live voters than a
quorum be left, and never is a step named while another is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from raftfleet.core.names import FLEET_GROUP, hash64
from raftfleet.fleet.machine import FleetState
from raftfleet.fleet.placement import node_hash, pair_hash

FLEET_VOTERS_MAX = 5
FLEET_VOTERS_MAX_LARGE = 7
LARGE_FLEET_NODES = 50


@dataclass(frozen=True)
class GroupView:
    """A group as its leader sees it now.

    Attributes:
        uid: the group.
        leader: instance of the leader (the one that asks).
        voters: of the active configuration.
        learners: of the active configuration.
        caught_up: members, voters too, whose log is at most a little behind the leader's (the leader is always in).
        live: members heard within an election timeout (the leader is always in).
        outliers: members whose state differs from what a quorum agrees on; none of them is in ``caught_up``.
        pending: a change of membership or a transfer is under way, or the leader has not committed in its term yet.
    """

    uid: int
    leader: int
    voters: tuple[int, ...]
    learners: tuple[int, ...]
    caught_up: frozenset[int]
    live: frozenset[int]
    pending: bool
    outliers: frozenset[int] = frozenset()


class AddLearner(NamedTuple):
    """Take this instance in as a learner."""

    instance: int


class Promote(NamedTuple):
    """Let this learner vote."""

    instance: int


class Remove(NamedTuple):
    """Take this voter or learner out."""

    instance: int


class Transfer(NamedTuple):
    """Hand leadership to this caught-up voter."""

    instance: int


Step: TypeAlias = AddLearner | Promote | Remove | Transfer


def quorum(voter_count: int) -> int:
    """The smallest majority of that many voters."""
    return voter_count // 2 + 1


def next_step(
    view: GroupView,
    desired: Sequence[int],
    known: Callable[[int], bool],
    learners: Sequence[int] = (),
    given_up: Collection[int] = (),
) -> Step | None:
    """The next step towards ``desired``, or None if there is none to take now.

    Args:
        view: the group as its leader sees it.
        desired: instances of the voters that it should have, desired leader first. Empty: leave all as it is.
        known: whether an instance is a current instance of a known node; what is not known is gone for good.
        learners: instances that should stay or become learners without being promoted (the fleet group's).
        given_up: instances that an operator has declared dead, perhaps not in the fleet's log yet: they are not brought
            in. One that lives after all holds what its group has gone on without.
    """
    if view.pending or not desired:
        return None
    return (
        _remove_gone(view, desired, known)
        or _remove_outlier(view)
        or _add_missing(view, desired, learners, given_up)
        or _promote_caught_up(view, desired)
        or _remove_surplus(view, desired, known, learners)
        or _bring_leadership_home(view, desired)
    )


def _remove_gone(view: GroupView, desired: Sequence[int], known: Callable[[int], bool]) -> Step | None:
    for instance in view.learners:
        if not known(instance):
            return Remove(instance)
    return _retire(view, [voter for voter in view.voters if not known(voter)], desired)


def _remove_outlier(view: GroupView) -> Step | None:
    for instance in view.learners:
        if instance in view.outliers:
            return Remove(instance)
    for instance in view.voters:
        rest = [voter for voter in view.voters if voter != instance]
        if instance in view.outliers and instance != view.leader and len(rest) > 1 and view.live.issuperset(rest):
            return Remove(instance)
    return None


def _retire(view: GroupView, voters: Sequence[int], desired: Sequence[int]) -> Step | None:
    """Take the first of these voters out that can be spared. A leader hands over, and its successor removes it."""
    for instance in voters:
        if instance == view.leader:
            heir = _heir(view, desired)
            return Transfer(heir) if heir is not None else None
        if _quorum_lives_without(view, instance):
            return Remove(instance)
    return None


def _add_missing(
    view: GroupView, desired: Sequence[int], learners: Sequence[int], given_up: Collection[int]
) -> Step | None:
    members = {*view.voters, *view.learners}
    for instance in (*desired, *learners):
        if instance not in members and instance not in given_up:
            return AddLearner(instance)
    return None


def _promote_caught_up(view: GroupView, desired: Sequence[int]) -> Step | None:
    live_voter_count = sum(voter in view.live for voter in view.voters)
    if live_voter_count + 1 < quorum(len(view.voters) + 1):
        return None
    for instance in desired:
        if instance in view.learners and instance in view.caught_up and instance in view.live:
            return Promote(instance)
    return None


def _remove_surplus(
    view: GroupView, desired: Sequence[int], known: Callable[[int], bool], learners: Sequence[int]
) -> Step | None:
    for instance in view.learners:
        if instance not in desired and instance not in learners:
            return Remove(instance)
    if len(view.voters) <= len(desired):
        return None
    # A gone voter that could not be removed above comes last: what is in its way is a lack of live voters.
    surplus = [voter for voter in view.voters if voter not in desired and known(voter)]
    surplus.sort(key=lambda voter: (voter == view.leader, voter in view.live))
    return _retire(view, surplus, desired)


def _bring_leadership_home(view: GroupView, desired: Sequence[int]) -> Step | None:
    home = desired[0]
    if home != view.leader and home in view.voters and home in view.caught_up and home in view.live:
        return Transfer(home)
    return None


def _heir(view: GroupView, desired: Sequence[int]) -> int | None:
    """Who takes over from a leader that has to go: the most desired of the live voters that have caught up."""
    for instance in desired:
        if instance != view.leader and instance in view.voters and instance in view.caught_up & view.live:
            return instance
    return None


def _quorum_lives_without(view: GroupView, instance: int) -> bool:
    rest = [voter for voter in view.voters if voter != instance]
    return bool(rest) and sum(voter in view.live for voter in rest) >= quorum(len(rest))


def fleet_voters(
    state: FleetState, voters: Sequence[int], live: Collection[int] | None = None, leader: int | None = None
) -> list[int]:
    """The instances (all shard 0) that should vote in the fleet group, desired leader first.

    Up to five of the active nodes, seven above fifty nodes; an odd number, since a fourth voter tolerates no more
    failures than three do, except that two nodes both vote: what is acknowledged is then on both. Spread over zones;
    live ones first; present voters keep their place, and the present leader its lead, so that a fleet in which
    nothing happens changes nothing.

    Args:
        state: the fleet.
        voters: of the fleet group's present configuration.
        live: instances taken to be alive; None: all. Pass a patient view: who is left out here loses its vote as
            soon as another node has taken its place.
        leader: instance of the present leader.
    """
    candidates = [(node.zone, node.name, node.instances[0]) for node in state.nodes.values() if node.active]
    count_max = FLEET_VOTERS_MAX_LARGE if len(candidates) > LARGE_FLEET_NODES else FLEET_VOTERS_MAX
    count = min(len(candidates), count_max)
    if count > 2 and count % 2 == 0:
        count -= 1
    group_hash = hash64(FLEET_GROUP.encode())
    present = set(voters)
    chosen: list[int] = []
    zone_counts: dict[str, int] = {}
    while len(chosen) < count:
        best = min(
            candidates,
            key=lambda c: (
                live is not None and c[2] not in live,
                zone_counts.get(c[0], 0),
                c[2] not in present,
                pair_hash(node_hash(c[1]), group_hash),
                c[1],
            ),
        )
        candidates.remove(best)
        zone_counts[best[0]] = zone_counts.get(best[0], 0) + 1
        chosen.append(best[2])
    if leader in chosen:
        chosen.remove(leader)
        chosen.insert(0, leader)
    return chosen


def fleet_learners(state: FleetState, desired_voters: Sequence[int]) -> list[int]:
    """The instances that should be learners of the fleet group: shard 0 of every other node.

    Nodes that are being deactivated too: they follow the fleet until they have left it.
    """
    return [node.instances[0] for node in state.nodes.values() if node.instances[0] not in desired_voters]

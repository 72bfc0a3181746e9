"""Reconciling the groups led here: the planner's next safe step, taken, until each group is where it should be.

This module does not plan; :mod:`raftfleet.fleet.reconcile` does, from a view that is made here. Rules:

* One step per group at a time. The next is planned when the step has had its effect, or a while later.
* Few groups at a time bring in a learner, since each may cost a snapshot; one that is not heard costs none and does not
  count.
* Groups that only move, and have lost nobody, begin at a pace (:mod:`raftfleet.fleet.pace`): those who are served come
  first.
* A voter of the fleet group makes way only after a long silence: restarts are short.
* A leader that an operator chose stays where it is until the nodes change.
"""

from __future__ import annotations

from typing import Any

from raftfleet.core import divergence
from raftfleet.core.change import CAUGHT_UP_ENTRIES, ConfigChangeRefused
from raftfleet.core.codes import OK
from raftfleet.core.member import Member
from raftfleet.core.names import FLEET_UID
from raftfleet.core.progress import REPLICATE
from raftfleet.fleet.host_following import FollowingLayer
from raftfleet.fleet.reconcile import (
    AddLearner,
    GroupView,
    Promote,
    Remove,
    Step,
    Transfer,
    fleet_learners,
    fleet_voters,
    next_step,
)

LEARNERS_AT_ONCE_MAX = 32
"""Groups led here that may be bringing in a learner at a time: each may cost a snapshot."""
VERSION_ANSWER_US = 2_000_000
TRANSFER_RETRY_US = 15_000_000
"""Commands wait while a leadership is handed over: where nobody took it (no room on its disk), not soon again."""
PATIENCE_US = 10_000_000
"""A voter of the fleet group unheard for so long makes way for another node."""


class ReconcilingLayer(FollowingLayer):
    """Moves the groups led here to where they should be. See the module's text."""

    def _reconcile_group(self, uid: int) -> None:
        """One safe step for a group led here; comes back when the step has had its effect."""
        self._look_at_group(uid)
        self._pace.looked_at(uid)

    def _look_at_group(self, uid: int) -> None:
        member = self.shard.members.get(uid)
        if member is None or member.lead is None or not self.fleet_known:
            return
        view = self._view(member)
        since_us = self._catching_up.get(uid)
        if since_us is not None and (
            not view.learners
            or (self.now_us - since_us > PATIENCE_US and not any(learner in view.live for learner in view.learners))
        ):
            del self._catching_up[uid]  # it came to nothing, or is not heard and costs no snapshot
        learners: list[int] = []
        if uid == FLEET_UID:
            desired = fleet_voters(self.fleet, view.voters, self._patiently_live(member), self.instance)
            learners = fleet_learners(self.fleet, desired)
        else:
            group = self.fleet.group_of_uid(uid)
            if group is None:
                return
            desired = [instance for _, instance in self.fleet.desired(group)]
        lost = self._lost_members(member)

        def is_known(instance: int) -> bool:
            return instance not in lost and self.fleet.is_current(instance)

        step = next_step(view, desired, is_known, learners, self.shard.gone)
        if step is None:
            if member.machine.version > member.active_version and not view.pending:
                self._ask_versions(member)
            settled = set(desired) == set(view.voters) and set(learners) == set(view.learners)
            if view.pending or not settled or (uid != FLEET_UID and desired and desired[0] != self.instance):
                if not (settled and uid in self._pinned):
                    self._reconcile_later[uid] = None
            elif view.outliers:
                self._reconcile_later[uid] = None
            return
        if not self._may_take(uid, view, len(desired), step):
            return
        try:
            self._take_step(member, step)
        except ConfigChangeRefused as refusal:
            self.count("steps_refused")
            self.note("debug", f"group {member.name}: {step} refused: {refusal}")
            self._reconcile_later[uid] = None

    def _may_take(self, uid: int, view: GroupView, wanted_count: int, step: Step) -> bool:
        """Whether it is this group's turn for that step; if not, it is looked at again when it is."""
        if uid == FLEET_UID or not isinstance(step, AddLearner | Transfer):
            return True
        if isinstance(step, AddLearner) and (len(view.voters) < wanted_count or not view.live.issuperset(view.voters)):
            return True
        return self._pace.may_move(uid, self.now_us, has_begun=len(view.voters) > wanted_count)

    @staticmethod
    def _lost_members(member: Member) -> set[int]:
        """Members whose disks lost what they knew: they count as gone until they are added again."""
        assert member.lead is not None
        return {peer for peer, progress in member.lead.progress.items() if progress.is_lost}

    def _ask_versions(self, member: Member) -> None:
        """The code here knows a newer version of the machine: if every member's does, the group goes over to it."""
        uid, term = member.uid, member.term
        supported = [member.machine.version]
        others = [instance for instance in member.membership.lives if instance != self.instance]

        def answered(code: int, body: Any) -> None:
            supported.append(body if code == OK and type(body) is int else 0)
            if len(supported) == len(others) + 1 and member.lead is not None and member.term == term:
                try:
                    if set(others) | {self.instance} == set(member.membership.lives):
                        member.raise_version(min(supported))
                except ConfigChangeRefused:
                    self._reconcile_later[uid] = None

        if not others:
            member.raise_version(member.machine.version)
        for instance in others:
            self.rpc(instance, "machine_version", {"uid": uid}, answered, VERSION_ANSWER_US)

    def _view(self, member: Member) -> GroupView:
        lead = member.lead
        assert lead is not None
        caught_up = {self.instance}
        for peer, progress in lead.progress.items():
            if progress.state == REPLICATE and progress.match + CAUGHT_UP_ENTRIES >= member.commit:
                caught_up.add(peer)
        outliers = divergence.outliers(member)
        pending = bool(lead.config_index or lead.transfer_target) or member.commit < lead.noop_index
        return GroupView(
            member.uid,
            self.instance,
            member.voters,
            member.learners,
            frozenset(caught_up - outliers),
            member.live_members(),
            pending,
            outliers,
        )

    def _patiently_live(self, member: Member) -> set[int]:
        lead = member.lead
        assert lead is not None
        horizon_us = self.now_us - PATIENCE_US
        if lead.elected_us > horizon_us:
            return {node.instances[0] for node in self.fleet.nodes.values()}
        live = {self.instance}
        for peer, progress in lead.progress.items():
            if member.confirmed_stamp(peer, progress) > horizon_us:
                live.add(peer)
        return live

    def _take_step(self, member: Member, step: AddLearner | Promote | Remove | Transfer) -> None:
        uid = member.uid
        if isinstance(step, AddLearner):
            if uid != FLEET_UID:
                if len(self._catching_up) >= LEARNERS_AT_ONCE_MAX and uid not in self._catching_up:
                    self._reconcile_later[uid] = None
                    return
                self._catching_up.setdefault(uid, self.now_us)
            member.add_learner(step.instance)
        elif isinstance(step, Promote):
            member.promote(step.instance)
        elif isinstance(step, Remove):
            is_known = self.fleet.is_current(step.instance) and step.instance not in self._lost_members(member)
            if uid == FLEET_UID and step.instance in member.voters and is_known:
                member.demote(step.instance)
            else:
                member.remove(step.instance)
        else:
            if (
                uid in self._pinned
                and step.instance not in member.learners
                and self.instance in (instance for _, instance in self.fleet.desired(self.fleet.groups[uid]))
            ):
                return  # an operator chose this leader
            if self._has_failed_lately(uid):
                self._reconcile_later[uid] = None
                return
            member.transfer(step.instance)
            self._reconcile_later[uid] = None

    def _has_failed_lately(self, uid: int) -> bool:
        """Whether nobody took this leadership over, a short while ago."""
        failed_us = self._transfer_failed_us.get(uid)
        if failed_us is None:
            return False
        if self.now_us - failed_us < TRANSFER_RETRY_US:
            return True
        del self._transfer_failed_us[uid]
        return False

    # ------------------------------------------------------------------ leaving

    def drain(self) -> None:
        """Hand each leadership over to the voter that lacks least (under load none is ever quite level).

        Without room on the disk only where others can elect and be elected: this worker cannot even save a vote for
        the next leader. Where that fails nobody leads, and not even queries are answered.
        """
        for member in list(self.shard.members.values()):
            lead = member.lead
            if lead is None or (self.shard.is_full and self._has_failed_lately(member.uid)):
                continue
            live = member.live_members()
            heirs = [voter for voter in member.voters if voter in live and voter != self.instance]
            if self.shard.is_full:
                # They have just saved what this disk had no room for, so there is room on theirs.
                heirs = [voter for voter in heirs if lead.progress[voter].match == member.log.last_index]
                if len(heirs) < member.membership.quorum:
                    continue
            try:
                if heirs:
                    member.transfer(max(heirs, key=lambda voter: lead.progress[voter].match))
            except ConfigChangeRefused:
                pass

    @property
    def is_draining(self) -> bool:
        """Whether a leadership that :meth:`drain` hands over is still on its way."""
        return any(m.lead is not None and m.lead.transfer_target for m in self.shard.members.values())

    def step_down_all(self) -> None:
        """Lead nothing any more, and say so."""
        for member in list(self.shard.members.values()):
            member.step_down()

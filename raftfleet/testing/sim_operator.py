"""The operator of a simulated cluster: adds and removes groups, and brings their members where they are wanted.

This module plays the part that the fleet group and its reconciling have in a real fleet, one safe step at a time, with
the eyes of an observer who sees all members. (The production code of that part runs in
:mod:`raftfleet.testing.fleet_simulation`.)
"""

from __future__ import annotations

import random

from raftfleet.core.change import ConfigChangeRefused
from raftfleet.core.config import GroupConfig
from raftfleet.core.shard import Shard
from raftfleet.testing.checkers import LEADER
from raftfleet.testing.clock import SECOND_US
from raftfleet.testing.model import RegistersMachine
from raftfleet.testing.shards import SimShard
from raftfleet.testing.sim_cluster import ClusterLayer


class Group:
    """What the operator knows of one group.

    Attributes:
        first_voters: instances that were told to begin it.
        places: where its members ought to be.
    """

    def __init__(self, uid: int, name: str, config: GroupConfig, places: list[int], voters: tuple[int, ...]) -> None:
        self.uid = uid
        self.name = name
        self.config = config
        self.places = places
        self.first_voters = voters


class OperatorLayer(ClusterLayer):
    """See the module's text."""

    def _add_group(self, rng: random.Random) -> None:
        options = self.options
        places = [place for place in range(self.place_count) if self.shards[place] is not None]
        replicas = min(len(places), rng.choice(options.replicas))
        self._last_uid += 1
        uid = self._last_uid
        has_lease = rng.random() < options.lease_share
        config = GroupConfig(
            machine="simulated:Registers",
            election_timeout_s=options.election_timeout_s,
            clock_drift_margin=options.drift_margin if has_lease else None,
            session_ttl_s=rng.choice(options.session_ttls_s),
            log_entries_kept=rng.choice(options.entries_kept),
            divergence_check_entries=5 + uid % 30,
        )
        rng.shuffle(places)
        shards = [shard for place in places[:replicas] if (shard := self.shards[place]) is not None]
        voters = tuple(shard.instance for shard in shards)
        group = Group(uid, f"group-{uid}", config, places[:replicas], voters)
        self.groups[uid] = self.all_groups[uid] = group
        self.history.record(uid)
        self.tell(f"group {uid} is added at places {group.places}")
        for number, shard in enumerate(shards):
            self._create_member(shard, group, voters, number == 0)
        self.group_uids.append(uid)

    def _drop_group(self, uid: int, rng: random.Random) -> None:
        self.group_uids.remove(uid)
        del self.groups[uid]
        self.count("group replaced")
        self.tell(f"group {uid} is removed")
        for shard in self.live_shards():
            self.queue.after(int(rng.random() * SECOND_US), self._remove_group, shard, uid)

    def _remove_group(self, shard: SimShard, uid: int) -> None:
        def remove(core: Shard) -> None:
            self.removed[shard.instance].add(uid)
            core.remove_group(uid)

        shard.work(remove)

    def _create_member(self, shard: SimShard, group: Group, voters: tuple[int, ...] | None, campaign: bool) -> None:
        machine = RegistersMachine(self.history.record(group.uid))

        def create(core: Shard) -> None:
            if core.holds(group.uid) or group.uid not in self.groups:
                return
            core.create_group(group.uid, group.name, group.config, machine, voters, campaign=campaign)

        shard.work(create)

    def catch_up(self, shard: SimShard) -> None:
        """A durable shard is back: it learns, a little later, which groups began and ended meanwhile."""
        for uid in list(shard.core.members):
            if uid not in self.groups:
                self.queue.after(int(self.operator_rng.random() * SECOND_US), self._remove_group, shard, uid)
        for group in self.groups.values():
            if shard.instance in group.first_voters:
                self._create_member(shard, group, group.first_voters, False)

    def recipe(self, uid: int) -> tuple[str, GroupConfig, RegistersMachine, None] | None:
        """What a shard needs to start a member when a leader first speaks to it."""
        group = self.groups.get(uid)
        if group is None:
            return None
        return group.name, group.config, RegistersMachine(self.history.record(uid)), None

    def leader_of(self, uid: int) -> SimShard | None:
        """The shard that leads in the highest term, as an observer who sees everything would say."""
        best: SimShard | None = None
        for shard in self.live_shards():
            member = shard.core.members.get(uid)
            if member is not None and member.role == LEADER:
                if best is None or member.term > best.core.members[uid].term:
                    best = shard
        return best

    def _operate(self) -> None:
        """One safe step for each group towards the members that it should have."""
        for uid in list(self.group_uids):
            shard = self.leader_of(uid)
            if shard is not None and not shard.is_paused:
                self._operate_group(self.groups[uid], shard)
        self.queue.after(int((0.2 + self.operator_rng.random()) * SECOND_US), self._operate)

    def _operate_group(self, group: Group, leader: SimShard) -> None:
        uid, rng = group.uid, self.operator_rng
        member = leader.core.members[uid]
        voters, learners = tuple(member.voters), tuple(member.learners)
        self._sweep(group, (*voters, *learners))
        wanted = [shard.instance for place in group.places if (shard := self.shards[place]) is not None]
        for instance in (*voters, *learners):
            if self.is_lost(instance):
                self._change(leader, uid, "remove_member", instance)
                return
        for instance in wanted:
            if instance not in voters and instance not in learners:
                shard = self.shards[self.place_of_instance(instance)]
                assert shard is not None
                if uid not in shard.core.members and rng.random() < 0.3:
                    self._create_member(shard, group, None, False)
                self._change(leader, uid, "add_learner", instance)
                return
        for instance in wanted:
            if instance in learners:
                self._change(leader, uid, "promote", instance)
                return
        surplus = [instance for instance in (*learners, *voters) if instance not in wanted]
        if len(wanted) == len(group.places) and surplus:
            instance = surplus[0]
            if instance == leader.instance and rng.random() < 0.5:
                self._change(leader, uid, "transfer", wanted[int(rng.random() * len(wanted))])
            else:
                self._change(leader, uid, "remove_member", instance)

    def _sweep(self, group: Group, members: tuple[int, ...]) -> None:
        """Take away what was started for a leader that then never added it, or is gone: it has nobody to ask."""

        def sweep(core: Shard) -> None:
            member = core.members.get(group.uid)
            if member is not None and not member.voters:
                core.drop_member(member)

        for shard in self.live_shards():
            member = shard.core.members.get(group.uid)
            if member is not None and not member.voters and shard.instance not in members:
                if shard.place not in group.places and self.place_of_instance(member.last_leader) < 0:
                    shard.work(sweep)

    def _change(self, leader: SimShard, uid: int, what: str, instance: int) -> None:
        def change(core: Shard) -> None:
            if uid not in core.members:
                return
            try:
                getattr(core, what)(uid, instance)
            except ConfigChangeRefused:
                self.count(f"{what} refused")
            else:
                self.count(what)
                self.tell(f"{leader.instance}: {what} {instance} in group {uid}")

        leader.work(change)

    def _is_survivable(self, victim: SimShard) -> bool:
        """Whether every group keeps a quorum of voters that have their memory.

        All members must know the same voters (no change is under way), and these without the victim and without the
        lost must still be a majority. Members of shards that are down are not looked at, so nothing is destroyed then.
        """
        if any(shard is None for shard in self.shards) and self.options.is_durable:
            return False
        for uid in self.groups:
            views = {
                tuple(member.voters)
                for shard in self.live_shards()
                if (member := shard.core.members.get(uid)) is not None and member.voters
            }
            if not views:
                return False  # its members are still being made, behind a pause
            if not any(victim.instance in voters for voters in views):
                continue
            if len(views) != 1:
                return False
            voters = next(iter(views))
            left = [i for i in voters if i != victim.instance and not self.is_lost(i)]
            if len(left) < len(voters) // 2 + 1:
                return False
        return True

    def is_settled(self, uid: int) -> bool:
        """Whether a group has exactly the voters that are wanted."""
        leader = self.leader_of(uid)
        if leader is None:
            return False
        member = leader.core.members[uid]
        wanted: list[int] = []
        for place in self.groups[uid].places:
            shard = self.shards[place]
            if shard is None:
                return False
            wanted.append(shard.instance)
        return sorted(member.voters) == sorted(wanted) and not member.learners

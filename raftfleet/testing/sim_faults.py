"""What each fault of a schedule does to a simulated cluster.

This module does not decide when; the schedule does (:mod:`raftfleet.testing.schedule`). A fault's details come from its
own dice and from how things stand (who leads, who is up), so that one that is left out leaves the others alone.

What a fault may not do is destroy so much that a group could never serve again: a disk is lost, or an instance that has
none, only if a quorum of every group keeps its memory. Everything else may happen to all at once.
"""

from __future__ import annotations

import random

from raftfleet.core.member import Member
from raftfleet.testing.clock import MILLISECOND_US, SECOND_US
from raftfleet.testing.disk import CRASH, EIO, ENOSPC, TEAR
from raftfleet.testing.network import DROP, STALL, NetworkFaults
from raftfleet.testing.schedule import NETWORK_KINDS, Fault
from raftfleet.testing.shards import SimShard
from raftfleet.testing.sim_disk import DurableSimShard
from raftfleet.testing.sim_operator import OperatorLayer


class FaultLayer(OperatorLayer):
    """Carries out faults. See the module's text."""

    def strike(self, fault: Fault) -> None:
        """A fault's moment has come."""
        if not self.faults_on:
            return
        self.struck.append(fault)
        rng = random.Random(fault.seed)
        if fault.kind in NETWORK_KINDS:
            getattr(self, "_fault_" + fault.kind)(rng, fault)
        else:
            getattr(self, "_fault_" + fault.kind)(rng)

    # -- the network -----------------------------------------------------------------------------------------------

    def _fault_frames(self, rng: random.Random, fault: Fault) -> None:
        """Frames are lost, doubled, reordered, held back; clients' requests too."""
        is_order = fault.detail == "unordered"
        faults = NetworkFaults(
            loss=rng.choice((0.0, 0.02, 0.1) if is_order else (0.0, 0.02, 0.1, 0.3)),
            duplicate=rng.choice((0.02, 0.1, 0.2) if is_order else (0.0, 0.02, 0.1)),
            reorder=rng.choice((0.1, 0.3) if is_order else (0.0, 0.05, 0.3)),
            hold=rng.choice((0.02, 0.1) if is_order else (0.0, 0.0, 0.01, 0.05)),
            hold_us_max=rng.choice((1, 5, 20)) * SECOND_US,
        )
        self.network.set_faults(faults)
        self.client_loss = rng.choice((0.0, 0.05, 0.3))
        self.tell(f"network: {faults}; clients' requests lost: {self.client_loss}")
        self.count("phase of lossy network")
        self.queue.at(fault.until_us, self._end_frames)

    def _end_frames(self) -> None:
        self.network.set_faults(None)
        self.client_loss = 0.0

    def _fault_cut(self, rng: random.Random, fault: Fault) -> None:
        """Paths are cut, in one direction or both."""
        state = STALL if rng.random() < 0.3 else DROP
        kind = rng.choice(("halves", "one way", "leader", "leader one way", "flapping"))
        self.count(f"cut: {kind}")
        pairs = self.network.pairs()
        if kind == "flapping":
            a, b = rng.choice(pairs)
            self.tell(f"network: the path {a} - {b} flaps")
            self._flap(a, b, rng, fault.until_us, 6)
            return
        if kind == "halves":
            side = [rng.random() < 0.5 for _ in range(self.place_count)]
            chosen = [(a, b) for a, b in pairs if side[a] != side[b]]
        elif kind == "one way":
            chosen = rng.sample(pairs, rng.randrange(1, 4))
        else:
            leader = self.leader_of(rng.choice(self.group_uids))
            place = leader.place if leader is not None else 0
            outward = rng.random() < 0.5
            if kind == "leader":
                chosen = [(a, b) for a, b in pairs if place in (a, b)]
            else:
                chosen = [(a, b) for a, b in pairs if place == (a if outward else b)]
        self.tell(f"network: cut {kind} {'stalls' if state == STALL else 'drops'} {chosen}")
        for a, b in chosen:
            self.network.cut(a, b, state)
        self.queue.at(fault.until_us, self._mend, chosen)

    def _mend(self, pairs: list[tuple[int, int]]) -> None:
        self.tell("network: the cut ends")
        for a, b in pairs:
            self.network.mend(a, b)

    def _flap(self, a: int, b: int, rng: random.Random, until_us: int, times: int) -> None:
        if times % 2 == 0 and self.faults_on and self.queue.now_us < until_us:
            self.network.cut(a, b)
            self.network.cut(b, a)
        else:
            self.network.mend(a, b)
            self.network.mend(b, a)
        if times > 1 and self.faults_on:
            self.queue.after(int((0.2 + rng.random()) * SECOND_US), self._flap, a, b, rng, until_us, times - 1)

    def _fault_slow(self, rng: random.Random, fault: Fault) -> None:
        """Some directions take long."""
        for a, b in self.network.pairs():
            if rng.random() < 0.4:
                delay_us = rng.choice((20, 100, 400)) * MILLISECOND_US
                self.network.set_delay(a, b, delay_us // 2, delay_us)
                self.tell(f"network: {a} -> {b} takes up to {delay_us // 1000} ms")
        self.count("slow links")
        self.queue.at(fault.until_us, self.network.reset_delays)

    # -- processes and machines ------------------------------------------------------------------------------------

    def _pick(self, rng: random.Random) -> SimShard | None:
        return self.shards[int(rng.random() * self.place_count)]

    def _fault_crash(self, rng: random.Random) -> None:
        """An instance goes down: in memory for ever; on a disk it is killed, or loses its power now or in a write."""
        shard = self._pick(rng)
        down_us = int(rng.random() * 5 * SECOND_US)
        if shard is None:
            return
        if not isinstance(shard, DurableSimShard):
            if self._is_survivable(shard):
                self.count("crash")
                self.tell(f"instance {shard.instance} crashes, and is lost")
                self._lose(shard, down_us)
            return
        draw, keep = rng.random(), rng.choice((0.0, 0.5, 1.0))
        if draw < 0.3:
            self.count("crash: process")
            self._take_down(shard, "is killed; its disk keeps all that was written", down_us)
            shard.files.kill()
        elif draw < 0.6:
            self.count("crash: power")
            self._take_down(shard, f"loses its power; {keep:.0%} of what was not synced survives", down_us)
            shard.files.crash(rng, keep=keep)
        else:
            self._arm(shard, rng, CRASH)

    def _fault_crash_all(self, rng: random.Random) -> None:
        """The power fails everywhere."""
        self.count("crash of all")
        self.tell("the power fails everywhere")
        for shard in self.live_shards():
            if isinstance(shard, DurableSimShard):
                keep = rng.choice((0.0, 0.5, 1.0))
                down_us = int(rng.random() * 2 * SECOND_US)
                self._take_down(shard, f"loses its power; {keep:.0%} of what was not synced survives", down_us)
                shard.files.crash(rng, keep=keep)

    def _fault_lose_disk(self, rng: random.Random) -> None:
        """A disk is lost; what comes up at that place is a stranger."""
        shard = self._pick(rng)
        if shard is not None and self._is_survivable(shard):
            self.count("disk lost")
            self.tell(f"instance {shard.instance} loses its disk")
            self._lose(shard, int(rng.random() * 5 * SECOND_US))

    def _arm(self, shard: DurableSimShard, rng: random.Random, fault: int) -> None:
        """One of the next calls that change the disk fails, or is the last before the power goes."""
        files = shard.files
        count = rng.randrange(1, 30)
        keep = rng.choice((0.0, 0.5, 1.0))
        kinds = ("pwrite", "fdatasync", "rename", "sync_dir", "unlink")
        only = rng.choice((kinds, ("fdatasync",)))

        def plan(number: int, name: str) -> int | None:
            nonlocal count
            if name not in only:
                return None
            count -= 1
            if count > 0:
                return None
            files.plan = lambda number, name: None
            return fault if name == "pwrite" or fault != TEAR else EIO

        files.plan = plan
        shard.keep = keep

    def _fault_disk_error(self, rng: random.Random) -> None:
        """A call fails, or a write takes only half."""
        shard = self._pick(rng)
        if isinstance(shard, DurableSimShard):
            self._arm(shard, rng, rng.choice((EIO, EIO, TEAR)))

    def _fault_disk_full(self, rng: random.Random) -> None:
        """No room for a while."""
        shard = self._pick(rng)
        if isinstance(shard, DurableSimShard):
            files = shard.files
            self.count("disk full")
            self.tell(f"the disk of instance {shard.instance} is full")
            files.plan = lambda number, name: ENOSPC if name in ("pwrite", "fallocate") else None
            self.queue.after(int(rng.random() * 6 * SECOND_US), self._free, shard)

    def _free(self, shard: DurableSimShard) -> None:
        shard.files.plan = lambda number, name: None
        self.tell(f"the disk of instance {shard.instance} has room")

    def _fault_pause(self, rng: random.Random) -> None:
        """A process is stopped for a while."""
        shards = [shard for shard in self.live_shards() if not shard.is_paused]
        if not shards:
            return
        shard = shards[int(rng.random() * len(shards))]
        length_us = int(rng.choice((0.2, 1.0, 3.0, 8.0)) * rng.random() * SECOND_US)
        self.count("pause")
        self.tell(f"instance {shard.instance} pauses for {length_us / SECOND_US:.3f} s")
        shard.pause(within_turn=rng.random() < 0.5)
        self.queue.after(length_us, shard.resume)

    def _fault_isolate(self, rng: random.Random) -> None:
        """A leader is stopped, and cut off until a moment after it goes on: clients still reach it."""
        leader = self.leader_of(rng.choice(self.group_uids))
        if leader is None or leader.is_paused:
            return
        length_us = int((1.2 + 2 * rng.random()) * SECOND_US)
        self.count("leader isolated")
        self.tell(f"instance {leader.instance} is stopped for {length_us / SECOND_US:.3f} s, and cut off")
        leader.pause(within_turn=True)
        self.queue.after(length_us, leader.resume)
        pairs = [(a, b) for a, b in self.network.pairs() if leader.place in (a, b)]
        for a, b in pairs:
            self.network.cut(a, b)
        self.queue.after(length_us + SECOND_US // 4, self._mend, pairs)

    def _fault_clock(self, rng: random.Random) -> None:
        """All clocks run at other rates."""
        for shard in self.live_shards():
            shard.clock.set_rate(self.queue.now_us, self.draw_rate_ppm(rng))

    # -- a chain of faults that meets by chance once in a million years ---------------------------------------------

    def _fault_usurp(self, rng: random.Random) -> None:
        """A leader has told one follower more than the other; that one wins the other's vote, and falls for good.

        Left are a member with the longest log, and one that knows a higher term. Neither can do without the other.
        """
        uid = rng.choice(self.group_uids)
        leader = self.leader_of(uid)
        voters = self._voters_elsewhere(leader, uid)
        if leader is None or len(voters) != 2 or any(shard is None for shard in self.shards):
            return
        heir, laggard = rng.sample(voters, 2)
        self.count("usurped")
        self.tell(f"group {uid}: {laggard.instance} is cut off, then its leader {leader.instance}")
        self._cut_off(laggard.place, (heir.place, leader.place))
        delay_us = int((0.2 + 0.3 * rng.random()) * SECOND_US)
        self.queue.after(delay_us, self._usurp, uid, leader, heir, laggard, self.queue.now_us + 6 * SECOND_US)

    def _usurp(self, uid: int, leader: SimShard, heir: SimShard, laggard: SimShard, until_us: int) -> None:
        self._cut_off(leader.place, (heir.place, laggard.place))
        self._mend([(heir.place, laggard.place), (laggard.place, heir.place)])
        self._await_usurper(uid, leader, heir, laggard, until_us)

    def _await_usurper(self, uid: int, leader: SimShard, heir: SimShard, laggard: SimShard, until_us: int) -> None:
        shards = (leader, heir, laggard)
        members = [None if shard.is_dead else shard.core.members.get(uid) for shard in shards]
        first, second, third = (member.term if member is not None else -1 for member in members)
        if third == second > first >= 0 and self._is_survivable(heir):
            self.tell(f"instance {heir.instance} was just elected, and is lost")
            self._lose(heir, SECOND_US)
        elif self.queue.now_us < until_us and self.faults_on:
            self.queue.after(200, self._await_usurper, uid, leader, heir, laggard, until_us)
            return
        self._mend(self.network.pairs())

    def _fault_strand(self, rng: random.Random) -> None:
        """A leader is cut off with one follower, which is stopped a little later and thus hears the next leader too.

        What the first told it and what the second takes back of that come to effect in one turn; then it is killed.
        """
        uid = rng.choice(self.group_uids)
        leader = self.leader_of(uid)
        voters = self._voters_elsewhere(leader, uid)
        if leader is None or len(voters) < 4 or any(shard is None for shard in self.shards):
            return
        victim = voters.pop(int(rng.random() * len(voters)))
        self.count("stranded")
        self.tell(f"group {uid}: its leader {leader.instance} is cut off from all but {victim.instance}")
        self._cut_off(leader.place, tuple(shard.place for shard in voters))
        self._cut_off(victim.place, tuple(shard.place for shard in voters))
        self.queue.after(SECOND_US // 5, self._stop_stranded, victim, [shard.place for shard in voters])

    def _stop_stranded(self, victim: SimShard, others: list[int]) -> None:
        victim.pause(within_turn=False)
        for place in others:
            self._mend([(victim.place, place), (place, victim.place)])
        self.queue.after(4 * SECOND_US, self._wake_stranded, victim)

    def _wake_stranded(self, victim: SimShard) -> None:
        victim.resume()
        self._mend(self.network.pairs())
        if not victim.is_dead and isinstance(victim, DurableSimShard):
            self._take_down(victim, "is killed; its disk keeps all that was written", SECOND_US)
            victim.files.kill()

    def _fault_abandon(self, rng: random.Random) -> None:
        """A learner is cut off when it has begun and has nothing yet, and removed while nobody can tell it so."""
        uid = rng.choice(self.group_uids)
        leader = self.leader_of(uid)
        strangers = [s for s in self.live_shards() if uid not in s.core.members and not s.is_paused]
        if leader is None or leader.is_paused or not strangers:
            return
        stranger = rng.choice(strangers)
        self._change(leader, uid, "add_learner", stranger.instance)
        self._await_learner(uid, leader, stranger, self.queue.now_us + SECOND_US)

    def _await_learner(self, uid: int, leader: SimShard, stranger: SimShard, until_us: int) -> None:
        member = stranger.core.members.get(uid)
        if stranger.is_dead or leader.is_dead or self.queue.now_us > until_us or (member is not None and member.voters):
            return
        if member is None:
            self.queue.after(200, self._await_learner, uid, leader, stranger, until_us)
            return
        self.count("abandoned")
        self.tell(f"instance {stranger.instance} has begun in group {uid} with nothing, and is cut off")
        self._cut_off(stranger.place, tuple(place for place in range(self.place_count) if place != stranger.place))
        self.queue.after(3 * SECOND_US, self._mend, self.network.pairs())

    def _fault_rebirth(self, rng: random.Random) -> None:
        """A voter is removed and added again, and when it has a part of its former log, it meets one that lags behind.

        Nobody else is there for the two. What the one asks, the other may not grant: it held more in its former life.
        It knows who votes only from a change that lies far enough back in the log; the first one serves the next.
        """
        uid = rng.choice(self.group_uids)
        leader = self.leader_of(uid)
        voters = self._voters_elsewhere(leader, uid)
        is_cut = any(not self.network.is_open(a, b) for a, b in self.network.pairs())
        if leader is None or len(voters) < 4 or is_cut or any(shard is None for shard in self.shards):
            return
        laggard, reborn = rng.sample(voters, 2)
        self.tell(f"group {uid}: {laggard.instance} is cut off, then {reborn.instance} is removed")
        self._cut_off(laggard.place, tuple(place for place in range(self.place_count) if place != laggard.place))
        delay_us = int((0.3 + 0.3 * rng.random()) * SECOND_US)
        self.queue.after(delay_us, self._change, leader, uid, "remove_member", reborn.instance)
        self._await_rebirth(uid, laggard, reborn, self.queue.now_us + 4 * SECOND_US)

    def _await_rebirth(self, uid: int, laggard: SimShard, reborn: SimShard, until_us: int) -> None:
        if laggard.is_dead or reborn.is_dead or not self.faults_on or self.queue.now_us > until_us:
            self._mend(self.network.pairs())
            return
        asks, asked = laggard.core.members.get(uid), reborn.core.members.get(uid)
        if asks is None or asked is None or not _is_partly_back(asks, asked):
            self.queue.after(100, self._await_rebirth, uid, laggard, reborn, until_us)
            return
        self.count("reborn")
        self.tell(f"instance {reborn.instance} is back with {asked.last_index} entries, alone with {laggard.instance}")
        pair = (laggard.place, reborn.place)
        self._cut_off(reborn.place, tuple(place for place in range(self.place_count) if place not in pair))
        self._mend([pair, (reborn.place, laggard.place)])
        self.queue.after(4 * SECOND_US, self._mend, self.network.pairs())

    def _cut_off(self, place: int, others: tuple[int, ...]) -> None:
        for other in others:
            self.network.cut(place, other)
            self.network.cut(other, place)

    def _voters_elsewhere(self, leader: SimShard | None, uid: int) -> list[SimShard]:
        """The shards of a leader's other voters, those that run."""
        if leader is None or leader.is_paused:
            return []
        voters = leader.core.members[uid].voters
        return [s for s in self.live_shards() if s.instance in voters and s is not leader and not s.is_paused]

    # -- the operator's whims --------------------------------------------------------------------------------------

    def _fault_transfer(self, rng: random.Random) -> None:
        uid = rng.choice(self.group_uids)
        shard = self.leader_of(uid)
        if shard is not None:
            voters = tuple(shard.core.members[uid].voters)
            self._change(shard, uid, "transfer", voters[int(rng.random() * len(voters))])

    def _fault_move(self, rng: random.Random) -> None:
        """The operator wants a group elsewhere."""
        group = self.groups[rng.choice(self.group_uids)]
        places = list(range(self.place_count))
        rng.shuffle(places)
        replicas = len(group.places) if rng.random() < 0.7 else rng.choice((1, 3, 4, 5))
        group.places = places[: min(replicas, self.place_count)]
        self.count("move")
        self.tell(f"group {group.uid} is wanted at places {group.places}")

    def _fault_replace_group(self, rng: random.Random) -> None:
        """A group is removed, another is added: nothing of the old one may live on."""
        if any(shard is None for shard in self.shards):
            return
        uid = rng.choice(self.group_uids)
        self._add_group(rng)
        self._drop_group(uid, rng)


def _is_partly_back(asks: Member, asked: Member) -> bool:
    """Whether one that was added again knows who votes, and by its present log alone would vote for ``asks``."""
    return bool(asked.membership.lives) and asked.last_index < asks.last_index < asked.forgotten_end[1]

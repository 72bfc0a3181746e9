"""A simulated cluster of shards with many groups, clients, an operator and faults, all from one seed.

``Simulation(seed).run()`` plays about two virtual minutes: phases of faults (loss, duplication, reordering, held
frames, cuts in one or both directions, slow links, crashes with all memory lost, pauses of seconds, drifting clocks,
membership changes, leader transfers, groups removed and added) while clients work; then everything heals, and every
group must serve within :data:`SERVE_WITHIN_US`, reach the members that the operator wants, and come to rest with equal
logs and states. After every step of a shard its own ``check_invariants()`` and the checkers run.

What is random is drawn from ``random.Random(seed)`` alone, and nothing iterates over a set of str or bytes, so a seed
gives the same run on any machine and with any PYTHONHASHSEED; :attr:`Simulation.trace` tells two runs apart.

An instance that crashes is lost for ever: the next one at its place is a stranger that must be brought in by membership
change. The simulation never destroys so many that a quorum of any group is gone (that is a matter for the operator,
DESIGN 5.15, and not for consensus); it does pause and cut off as many as it likes.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from raftfleet.core.change import ConfigChangeRefused
from raftfleet.core.config import GroupConfig
from raftfleet.core.shard import Shard, ShardSettings
from raftfleet.testing.checkers import LEADER, ClusterChecker, HistoryChecker
from raftfleet.testing.clients import KNOWN_CODES, Call, SimClient, Token
from raftfleet.testing.clock import MILLISECOND_US, SECOND_US, DriftingClock, EventQueue
from raftfleet.testing.linearizability import Operation, SearchTooLarge, find_violation, register_model
from raftfleet.testing.model import RegistersMachine, Violation
from raftfleet.testing.network import DROP, STALL, NetworkFaults, SimNetwork
from raftfleet.testing.shards import SimShard

SERVE_WITHIN_US = 20 * SECOND_US
"""After healing every group must answer a command and a linearizable query within this: twenty election timeouts, for
several dead members may have to be replaced first, one change at a time."""

SETTLE_WITHIN_US = 40 * SECOND_US
"""... and have exactly the members that the operator wants, all equal, within this."""


class SimulationFailure(AssertionError):
    """A promise was broken; the message holds the seed, the command that repeats it, and the last events."""


@dataclass(frozen=True)
class SimulationOptions:
    """How long and how rough. Rates are events per virtual second.

    Attributes:
        fault_us: length of the time with faults.
        beat_interval_us: of every shard.
        election_timeout_s: of every group.
    """

    fault_us: int = 120 * SECOND_US
    beat_interval_us: int = 200 * MILLISECOND_US
    election_timeout_s: float = 1.0
    crash_rate: float = 0.06
    pause_rate: float = 0.08
    transfer_rate: float = 0.08
    move_rate: float = 0.08
    replace_group_rate: float = 0.015
    network_faults: bool = True
    drift: float = 0.09
    drift_margin: float = 0.1
    linearizability_steps_max: int = 100_000
    steps_max: int = 100_000


@dataclass
class Summary:
    """What a run was made of."""

    seed: int
    virtual_us: int
    trace: int
    counts: dict[str, int] = field(default_factory=dict)


class Group:
    """What the operator knows of one group."""

    def __init__(self, uid: int, name: str, config: GroupConfig, places: list[int]) -> None:
        self.uid = uid
        self.name = name
        self.config = config
        self.places = places


class Simulation:
    """One cluster; see the module's text.

    Attributes:
        shards: the shard at each place, or None while the place is down.
        group_uids: the groups that clients may use.
        counts: how often what happened.
        story: the last events, for a failure's report.
    """

    def __init__(self, seed: int, options: SimulationOptions | None = None) -> None:
        self.seed = seed
        self.options = options or SimulationOptions()
        self.rng = rng = random.Random(seed)
        self.queue = EventQueue()
        self.place_count = rng.choice((3, 3, 3, 4, 4, 5))
        self.network = SimNetwork(self.queue, rng, self.place_count, self._deliver)
        self.cluster = ClusterChecker()
        self.history = HistoryChecker()
        self.operations: list[Operation] = []
        self.counts: dict[str, int] = {}
        self.story: deque[str] = deque(maxlen=60)
        self.trace = 0
        self.client_timeout_us = rng.choice((400, 800, 1600)) * MILLISECOND_US
        self.shards: list[SimShard | None] = [None] * self.place_count
        self.groups: dict[int, Group] = {}
        self._all_groups: dict[int, Group] = {}  # those that were removed too
        self.group_uids: list[int] = []
        self.clients: list[SimClient] = []
        self._lives = [0] * self.place_count
        self._place_of_instance: dict[int, int] = {}
        self._tokens: dict[int, dict[Token, None]] = {}
        self._removed: dict[int, set[int]] = {}
        self._last_operation = 0
        self._last_uid = 0
        self._faults_on = True
        self._client_loss = 0.0
        self._step_count = 0

    # -- the run ---------------------------------------------------------------------------------------------------

    def run(self) -> Summary:
        """Play the whole run.

        Raises:
            SimulationFailure: a promise was broken (or the code raised).
        """
        try:
            self._set_up()
            self.queue.run_until(self.options.fault_us)
            self._heal()
        except (Violation, Exception) as error:
            raise SimulationFailure(self._report(error)) from error
        self.counts.update({f"frames {name}": count for name, count in self.network.counts.items()})
        self.counts["steps"] = self._step_count
        self.counts["elections"] = len(self.cluster.leaders)
        self.counts["configurations"] = self.cluster.config_count
        self.counts["acknowledged"] = self.history.acknowledged_count()
        return Summary(self.seed, self.queue.now_us, self.trace, dict(sorted(self.counts.items())))

    def _report(self, error: BaseException) -> str:
        lines = [
            f"{type(error).__name__}: {error}",
            f"seed {self.seed}, at {self.queue.now_us / SECOND_US:.6f} s, step {self._step_count}; repeat it with:",
            f"    python -m raftfleet.testing.simulate --seed {self.seed}",
            "last events:",
            *(f"    {line}" for line in self.story),
            "members:",
        ]
        for shard in self.shards:
            if shard is None:
                continue
            for uid, m in shard.core.members.items():
                state = "paused" if shard.is_paused else ""
                lines.append(
                    f"    {shard.instance} group {uid}: {m.role} term {m.term} leader {m.leader} commit {m.commit}"
                    f" applied {m.applied} log {m.log.first_index}..{m.last_index} voters {m.voters}"
                    f" learners {m.learners} {state}"
                )
        return "\n".join(lines)

    def _set_up(self) -> None:
        rng = self.rng
        for place in range(self.place_count):
            self._start_shard(place)
        for _ in range(rng.choice((1, 2, 3))):
            self._add_group()
        for _ in range(rng.choice((2, 3, 5))):
            client = SimClient(self, random.Random(rng.getrandbits(64)))
            self.clients.append(client)
            client.start()
        self.queue.after(SECOND_US, self._operate)
        if self.options.network_faults:
            self.queue.after(int(rng.random() * 5 * SECOND_US), self._next_phase)
        for rate, event in (
            (self.options.crash_rate, self._crash),
            (self.options.pause_rate, self._pause),
            (self.options.transfer_rate, self._transfer),
            (self.options.move_rate, self._move),
            (self.options.replace_group_rate, self._replace_group),
            (0.05, self._change_clock),
        ):
            if rate > 0:
                self._again(rate, event)

    def _again(self, rate: float, event: Any) -> None:
        delay_us = int(self.rng.expovariate(rate) * SECOND_US)
        self.queue.after(delay_us, self._happen, rate, event)

    def _happen(self, rate: float, event: Any) -> None:
        if self._faults_on:
            event()
            self._again(rate, event)

    def tell(self, text: str) -> None:
        """Add a line to the story."""
        self.story.append(f"{self.queue.now_us / SECOND_US:10.6f} {text}")

    def count(self, what: str) -> None:
        """Count something for the summary."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def next_operation(self) -> int:
        """An id for a client's operation."""
        self._last_operation += 1
        return self._last_operation

    # -- shards ----------------------------------------------------------------------------------------------------

    def _start_shard(self, place: int) -> SimShard:
        rng = self.rng
        self._lives[place] += 1
        instance = (place + 1) * 1000 + self._lives[place]
        settings = ShardSettings(beat_interval_us=self.options.beat_interval_us)
        clock = DriftingClock(self._draw_rate_ppm(), rng.randrange(1, 1000) * SECOND_US)
        wall_offset_us = rng.randrange(-SECOND_US, SECOND_US)
        shard_rng = random.Random(rng.getrandbits(64))
        shard = SimShard(self, self.queue, place, instance, shard_rng, settings, clock, wall_offset_us)
        removed: set[int] = set()
        self._removed[instance] = removed
        shard.core.is_dead = removed.__contains__
        shard.core.may_create = self._recipe
        self.shards[place] = shard
        self._place_of_instance[instance] = place
        self._tokens[instance] = {}
        self.tell(f"instance {instance} starts")
        return shard

    def _draw_rate_ppm(self) -> int:
        """Two clocks may differ by ``drift`` at most: each is up to half of it off."""
        half = self.options.drift / 2
        return int(1_000_000 * (1 + self.rng.uniform(-half, half)))

    def live_shards(self) -> list[SimShard]:
        """Those that have not crashed."""
        return [shard for shard in self.shards if shard is not None]

    def place_of_instance(self, instance: int) -> int:
        """Where a current instance is; -1 if it is gone or 0."""
        place = self._place_of_instance.get(instance, -1)
        shard = self.shards[place] if place >= 0 else None
        return place if shard is not None and shard.instance == instance else -1

    def places_of(self, uid: int) -> list[int]:
        """Where members of a group ought to be."""
        return self._all_groups[uid].places

    def shard_sent(self, shard: SimShard, to_instance: int, messages: list[Any]) -> None:
        """A shard's frame goes into the network."""
        self.cluster.check_sends(shard.instance, to_instance, messages)
        to_place = self._place_of_instance.get(to_instance)
        if to_place is None or to_place == shard.place:
            assert to_instance != shard.instance, messages
            return
        self.network.send(shard.place, to_place, shard.instance, to_instance, messages)

    def _deliver(self, to_place: int, from_instance: int, to_instance: int, frame: Any) -> None:
        shard = self.shards[to_place]
        if shard is not None and shard.instance == to_instance:
            shard.receive(from_instance, frame)

    def shard_stepped(self, shard: SimShard) -> None:
        """Check everything that this step can have touched."""
        self._step_count += 1
        if self._step_count > self.options.steps_max:
            raise Violation(f"more than {self.options.steps_max} steps: messages breed messages")
        core = shard.core
        core.check_invariants()
        self.cluster.check_members(shard.instance, core.members)
        self.trace = hash((self.trace, self.queue.now_us, shard.instance)) & 0xFFFFFFFFFFFF

    def shard_event(self, shard: SimShard, event: tuple[Any, ...]) -> None:
        """Count it and remember it."""
        if event[0] == "diverged":
            raise Violation(f"shard {shard.instance} holds members to differ that are equal by construction: {event}")
        self.count("event " + event[0])
        self.tell(f"{shard.instance}: {event}")

    # -- clients ---------------------------------------------------------------------------------------------------

    def client_sent(self, place: int, call: Call, attempt: int) -> None:
        """A client's request sets out."""
        delay_us = self._client_delay_us()
        if delay_us >= 0:
            self.queue.after(delay_us, self._request, place, call, attempt)

    def _client_delay_us(self) -> int:
        """-1: lost."""
        draw = self.rng.random()
        if draw < self._client_loss:
            if draw < self._client_loss / 2:
                return -1
            return int(self.rng.random() * 2 * SECOND_US)
        return 200 + int(draw * MILLISECOND_US)

    def _request(self, place: int, call: Call, attempt: int) -> None:
        shard = self.shards[place]
        if shard is not None:
            shard.work(lambda core: self._take_request(shard, core, call, attempt))

    def _take_request(self, shard: SimShard, core: Shard, call: Call, attempt: int) -> None:
        token = Token(call, attempt, shard.instance, self.queue.now_us)
        self._tokens[shard.instance][token] = None
        if call.is_command:
            core.propose(call.uid, call.data, token)
        else:
            core.query(call.uid, call.data, token, stale=call.is_stale)

    def shard_replied(self, shard: SimShard, token: Token, code: int, body: Any) -> None:
        """An answer sets out to the client."""
        if token.is_answered:
            raise Violation(f"instance {shard.instance} answered one request twice: {code} {body!r}")
        if code not in KNOWN_CODES:
            raise Violation(f"instance {shard.instance} answered with code {code}, which no client knows")
        token.is_answered = True
        del self._tokens[shard.instance][token]
        delay_us = self._client_delay_us()
        if delay_us >= 0:
            self.queue.after(delay_us, token.call.client.answered, token, shard.place, code, body)

    # -- groups and the operator -----------------------------------------------------------------------------------

    def _add_group(self) -> None:
        rng = self.rng
        places = [place for place in range(self.place_count) if self.shards[place] is not None]
        replicas = min(len(places), rng.choice((3, 3, 3, 3, 5, 1)))
        if replicas == 1 and self.place_count == 1:
            return
        self._last_uid += 1
        uid = self._last_uid
        has_lease = rng.random() < 0.5
        config = GroupConfig(
            machine="simulated:Registers",
            election_timeout_s=self.options.election_timeout_s,
            clock_drift_margin=self.options.drift_margin if has_lease else None,
            session_ttl_s=rng.choice((15.0, 60.0, 600.0)),
            log_entries_kept=rng.choice((4, 20, 1000)),
            divergence_check_entries=5 + uid % 30,
        )
        rng.shuffle(places)
        group = Group(uid, f"group-{uid}", config, places[:replicas])
        self.groups[uid] = self._all_groups[uid] = group
        self.history.record(uid)
        self.tell(f"group {uid} is added at places {group.places}")
        voters = []
        for place in group.places:
            shard = self.shards[place]
            assert shard is not None
            voters.append(shard.instance)
        for number, place in enumerate(group.places):
            shard = self.shards[place]
            assert shard is not None
            self._create_member(shard, group, tuple(voters), number == 0)
        self.group_uids.append(uid)

    def _create_member(self, shard: SimShard, group: Group, voters: tuple[int, ...] | None, campaign: bool) -> None:
        machine = RegistersMachine(self.history.record(group.uid))

        def create(core: Shard) -> None:
            if group.uid not in core.members and group.uid in self.groups:
                core.create_group(group.uid, group.name, group.config, machine, voters, campaign=campaign)

        shard.work(create)

    def _recipe(self, uid: int) -> tuple[str, GroupConfig, RegistersMachine, None] | None:
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
        self.queue.after(int((0.2 + self.rng.random()) * SECOND_US), self._operate)

    def _operate_group(self, group: Group, leader: SimShard) -> None:
        uid = group.uid
        member = leader.core.members[uid]
        voters, learners = tuple(member.voters), tuple(member.learners)
        self._sweep(group, (*voters, *learners))
        wanted = []
        for place in group.places:
            shard = self.shards[place]
            if shard is not None:
                wanted.append(shard.instance)
        for instance in (*voters, *learners):
            if self.place_of_instance(instance) < 0:
                self._change(leader, uid, "remove_member", instance)
                return
        for instance in wanted:
            if instance not in voters and instance not in learners:
                shard = self.shards[self.place_of_instance(instance)]
                assert shard is not None
                if uid not in shard.core.members and self.rng.random() < 0.3:
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
            if instance == leader.instance and self.rng.random() < 0.5:
                self._change(leader, uid, "transfer", wanted[int(self.rng.random() * len(wanted))])
            else:
                self._change(leader, uid, "remove_member", instance)

    def _sweep(self, group: Group, members: tuple[int, ...]) -> None:
        """Take away what was started for a leader that then never added it: it has no voters to ask."""

        def sweep(core: Shard) -> None:
            member = core.members.get(group.uid)
            if member is not None and not member.voters:
                core.drop_member(member)

        for shard in self.live_shards():
            member = shard.core.members.get(group.uid)
            if member is not None and not member.voters and shard.instance not in members:
                if shard.place not in group.places:
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

    # -- faults ----------------------------------------------------------------------------------------------------

    def _next_phase(self) -> None:
        """Another weather for the network."""
        if not self._faults_on:
            return
        rng, network = self.rng, self.network
        network.heal()
        self._client_loss = 0.0
        chance = rng.random()
        if chance < 0.25:
            self.tell("network: calm")
        else:
            if rng.random() < 0.6:
                network.faults = NetworkFaults(
                    loss=rng.choice((0.0, 0.02, 0.1, 0.3)),
                    duplicate=rng.choice((0.0, 0.02, 0.1)),
                    reorder=rng.choice((0.0, 0.05, 0.3)),
                    hold=rng.choice((0.0, 0.0, 0.01, 0.05)),
                    hold_us_max=rng.choice((1, 5, 20)) * SECOND_US,
                )
                self._client_loss = rng.choice((0.0, 0.05, 0.3))
                self.tell(f"network: {network.faults}")
                self.count("phase of lossy network")
            if rng.random() < 0.6:
                self._cut()
            if rng.random() < 0.3:
                self._slow_down()
        self.queue.after(int((1 + rng.random() * 12) * SECOND_US), self._next_phase)

    def _cut(self) -> None:
        rng, network = self.rng, self.network
        state = STALL if rng.random() < 0.3 else DROP
        kind = rng.choice(("halves", "one way", "leader", "leader one way", "flapping"))
        self.count(f"cut: {kind}")
        pairs = network.pairs()
        if kind == "halves":
            side = [rng.random() < 0.5 for _ in range(self.place_count)]
            chosen = [(a, b) for a, b in pairs if side[a] != side[b]]
        elif kind == "one way":
            chosen = rng.sample(pairs, rng.randrange(1, 4))
        elif kind == "flapping":
            self._flap(rng.choice(pairs), 6)
            return
        else:
            leader = self.leader_of(rng.choice(self.group_uids))
            place = leader.place if leader is not None else 0
            if kind == "leader":
                chosen = [(a, b) for a, b in pairs if place in (a, b)]
            else:
                outward = rng.random() < 0.5
                chosen = [(a, b) for a, b in pairs if place == (a if outward else b)]
        self.tell(f"network: cut {kind} {'stalls' if state == STALL else 'drops'} {chosen}")
        for a, b in chosen:
            network.cut(a, b, state)

    def _flap(self, pair: tuple[int, int], times: int) -> None:
        a, b = pair
        if times % 2 == 0 and self._faults_on:
            self.network.cut(a, b)
            self.network.cut(b, a)
        else:
            self.network.mend(a, b)
            self.network.mend(b, a)
        if times > 1 and self._faults_on:
            self.queue.after(int((0.2 + self.rng.random()) * SECOND_US), self._flap, pair, times - 1)

    def _slow_down(self) -> None:
        rng = self.rng
        for a, b in self.network.pairs():
            if rng.random() < 0.4:
                delay_us = rng.choice((20, 100, 400)) * MILLISECOND_US
                self.network.set_delay(a, b, delay_us // 2, delay_us)
                self.tell(f"network: {a} -> {b} takes up to {delay_us // 1000} ms")

    def _crash(self) -> None:
        place = int(self.rng.random() * self.place_count)
        shard = self.shards[place]
        if shard is None or not self._is_survivable(shard):
            return
        self.count("crash")
        self.tell(f"instance {shard.instance} crashes")
        shard.kill()
        self.shards[place] = None
        self.cluster.forget_instance(shard.instance)
        del self._tokens[shard.instance]
        self.queue.after(int(self.rng.random() * 5 * SECOND_US), self._start_shard, place)

    def _is_survivable(self, victim: SimShard) -> bool:
        """Whether every group keeps a quorum of voters that have their memory.

        All members that are alive must know the same voters (no change is under way), and these without the victim and
        without the dead must still be a majority.
        """
        for uid in self.groups:
            views = {
                tuple(shard.core.members[uid].voters)
                for shard in self.live_shards()
                if uid in shard.core.members and shard.core.members[uid].voters
            }
            if not views:
                return False  # its members are still being made, behind a pause
            if not any(victim.instance in voters for voters in views):
                continue
            if len(views) != 1:
                return False
            voters = next(iter(views))
            left = [i for i in voters if i != victim.instance and self.place_of_instance(i) >= 0]
            if len(left) < len(voters) // 2 + 1:
                return False
        return True

    def _pause(self) -> None:
        shards = [shard for shard in self.live_shards() if not shard.is_paused]
        if not shards:
            return
        shard = shards[int(self.rng.random() * len(shards))]
        length_us = int(self.rng.choice((0.2, 1.0, 3.0, 8.0)) * self.rng.random() * SECOND_US)
        self.count("pause")
        self.tell(f"instance {shard.instance} pauses for {length_us / SECOND_US:.3f} s")
        shard.pause(within_turn=self.rng.random() < 0.5)
        self.queue.after(length_us, shard.resume)

    def _transfer(self) -> None:
        uid = self.rng.choice(self.group_uids)
        shard = self.leader_of(uid)
        if shard is not None:
            voters = tuple(shard.core.members[uid].voters)
            self._change(shard, uid, "transfer", voters[int(self.rng.random() * len(voters))])

    def _move(self) -> None:
        """The operator wants a group elsewhere."""
        group = self.groups[self.rng.choice(self.group_uids)]
        places = list(range(self.place_count))
        self.rng.shuffle(places)
        replicas = len(group.places) if self.rng.random() < 0.7 else self.rng.choice((1, 3, 4, 5))
        group.places = places[: min(replicas, self.place_count)]
        self.count("move")
        self.tell(f"group {group.uid} is wanted at places {group.places}")

    def _replace_group(self) -> None:
        """A group is removed, another is added: nothing of the old one may live on."""
        if any(shard is None for shard in self.shards):
            return
        uid = self.rng.choice(self.group_uids)
        self._add_group()
        self.group_uids.remove(uid)
        del self.groups[uid]
        self.count("group replaced")
        self.tell(f"group {uid} is removed")
        for shard in self.live_shards():
            self.queue.after(int(self.rng.random() * SECOND_US), self._remove_group, shard, uid)

    def _remove_group(self, shard: SimShard, uid: int) -> None:
        def remove(core: Shard) -> None:
            self._removed[shard.instance].add(uid)
            core.remove_group(uid)

        shard.work(remove)

    def _change_clock(self) -> None:
        for shard in self.live_shards():
            shard.clock.set_rate(self.queue.now_us, self._draw_rate_ppm())

    # -- healing ---------------------------------------------------------------------------------------------------

    def _heal(self) -> None:
        """Peace: everyone is up, the network is good; every group must serve, settle and agree."""
        self._faults_on = False
        self._client_loss = 0.0
        self.network.heal()
        self.tell("healed")
        for shard in self.live_shards():
            shard.resume()
        deadline_us = self.queue.now_us + SERVE_WITHIN_US
        probes: list[Call] = []
        for uid in self.group_uids:
            client = SimClient(self, random.Random(self.rng.getrandbits(64)))
            client.is_stopped = True
            probes.append(client.command(uid, "add", 0, 1, attempts_max=100))
            probes.append(client.query(uid, 0, is_stale=False, attempts_max=100))
        self._run_while(lambda: not all(call.is_done for call in probes), deadline_us)
        for call in probes:
            if call.outcome != "ok":
                raise Violation(
                    f"liveness: group {call.uid} did not serve within {SERVE_WITHIN_US // SECOND_US} s of healing"
                )
        for client in self.clients:
            client.is_stopped = True
        deadline_us = self.queue.now_us + SETTLE_WITHIN_US
        self._run_while(lambda: not all(self._is_settled(uid) for uid in self.group_uids), deadline_us)
        for uid in self.group_uids:
            if not self._is_settled(uid):
                raise Violation(f"liveness: group {uid} did not get the members that are wanted")
        self.queue.run_until(self.queue.now_us + 6 * SECOND_US)
        self._check_rest()

    def _run_while(self, condition: Any, deadline_us: int) -> None:
        while condition() and self.queue.now_us < deadline_us:
            self.queue.run_until(min(deadline_us, self.queue.now_us + 100 * MILLISECOND_US))

    def _is_settled(self, uid: int) -> bool:
        leader = self.leader_of(uid)
        if leader is None:
            return False
        member = leader.core.members[uid]
        wanted = []
        for place in self.groups[uid].places:
            shard = self.shards[place]
            if shard is None:
                return False
            wanted.append(shard.instance)
        return sorted(member.voters) == sorted(wanted) and not member.learners

    def _check_rest(self) -> None:
        """All is quiet: members are equal, no request is left without an answer, histories hold."""
        for shard in self.live_shards():
            for token in self._tokens[shard.instance]:
                age_us = self.queue.now_us - token.taken_us
                raise Violation(
                    f"instance {shard.instance} left a request for group {token.call.uid} {token.call.input}"
                    f" unanswered for {age_us / SECOND_US:.1f} s"
                )
            for uid in shard.core.members:
                if uid not in self.groups:
                    raise Violation(f"instance {shard.instance} still hosts group {uid}, which was removed")
                if shard.place not in self.groups[uid].places:
                    raise Violation(f"instance {shard.instance} still hosts group {uid}, whose member it is no more")
        for uid in self.group_uids:
            members = [
                (shard.instance, shard.core.members[uid])
                for shard in self.live_shards()
                if shard.place in self.groups[uid].places
            ]
            self.cluster.check_equal_members(uid, members)
            for instance, member in members:
                state = member.state
                self.history.check_state(uid, state.seen, f"instance {instance}")
        self.history.check_refused()
        self._check_linearizability()

    def _check_linearizability(self) -> None:
        """The same histories once more, by the general search, which knows nothing of versions."""
        try:
            wrong = find_violation(self.operations, register_model(), self.options.linearizability_steps_max)
        except SearchTooLarge:
            self.count("linearizability: search given up")
            return
        if wrong is not None:
            lines = "\n".join(f"    {operation}" for operation in wrong[-30:])
            raise Violation(f"linearizability: no order explains\n{lines}")
        self.count("linearizability: histories checked")

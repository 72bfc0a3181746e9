"""The shards of a simulated cluster: who runs where, what they say to each other and to clients, and every check of it.

This module does not know about faults or the operator. Dice are split by use (clients, operator, each shard, each path
of the network), so that what happens in one part changes nothing in the draws of another.
"""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING, Any

from raftfleet.core.shard import Shard, ShardSettings
from raftfleet.storage.base import StorageFull, StoragePoisoned
from raftfleet.testing.checkers import ClusterChecker, HistoryChecker
from raftfleet.testing.clients import KNOWN_CODES, Call, Token
from raftfleet.testing.clock import MILLISECOND_US, SECOND_US, DriftingClock, EventQueue
from raftfleet.testing.disk import FakeFiles, PowerLoss
from raftfleet.testing.model import RegistersMachine, Violation
from raftfleet.testing.network import SimNetwork
from raftfleet.testing.profiles import SimulationOptions
from raftfleet.testing.promises import PromiseChecker
from raftfleet.testing.restarts import RestartChecker
from raftfleet.testing.rules import RuleChecker
from raftfleet.testing.schedule import Fault
from raftfleet.testing.shards import SimShard
from raftfleet.testing.sim_disk import DurableSimShard

if TYPE_CHECKING:
    from raftfleet.testing.linearizability import Operation
    from raftfleet.testing.sim_operator import Group

STORY_LINES = 60
FRAMES_TOLD = 25
_MASK = (1 << 48) - 1


class EagerRandom(random.Random):
    """A shard's dice that often show the lowest number: two elections at once, or one without any delay."""

    eagerness = 0.0

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        """See :class:`random.Random`."""
        if self.random() < self.eagerness:
            return 0 if stop is None else start
        return super().randrange(start) if stop is None else super().randrange(start, stop, step)


class ClusterLayer:
    """See the module's text.

    Attributes:
        shards: the shard at each place, or None while the place is down.
        groups: by uid, those that are wanted; ``all_groups``: those that were removed too.
        group_uids: the groups that clients may use.
        counts: how often what happened.
        story: the last events, for a failure's report.
        struck: the faults that struck so far.
        trace: a running number that two runs share only if they took the same steps.
        faults_on: False once healing has begun.
        tells_clients: whether the end of every client's call is part of the story.
        client_loss: probability that a client's request or answer is lost or late.
        removed: for each instance, the uids that it was told to be removed.
    """

    def __init__(self, seed: int, options: SimulationOptions) -> None:
        self.seed = seed
        self.options = options
        self.rng = rng = random.Random(seed << 8)
        self.operator_rng = random.Random(rng.getrandbits(64))
        self.client_rng = random.Random(rng.getrandbits(64))
        self.queue = EventQueue()
        self.place_count: int = rng.choice(options.place_counts)
        self.network = SimNetwork(self.queue, rng, self.place_count, self._deliver)
        self.cluster = ClusterChecker()
        self.rules = RuleChecker(self.member_of, self.is_lost, self._local_us)
        self.rules.are_leases_safe = options.drift <= options.drift_margin or not options.lease_share
        self.promises = PromiseChecker(self.member_of)
        self.promises.are_leases_safe = self.rules.are_leases_safe
        self.restarts = RestartChecker()
        self.history = HistoryChecker()
        self.operations: list[Operation] = []
        self.counts: dict[str, int] = {}
        self.story: deque[str] = deque(maxlen=STORY_LINES)
        self.struck: list[Fault] = []
        self.trace = 0
        self.client_timeout_us: int = rng.choice((400, 800, 1600)) * MILLISECOND_US
        self.shards: list[SimShard | None] = [None] * self.place_count
        self.groups: dict[int, Group] = {}
        self.all_groups: dict[int, Group] = {}
        self.group_uids: list[int] = []
        self.removed: dict[int, set[int]] = {}
        self.faults_on = True
        self.client_loss = 0.0
        self.tells_clients = False
        self.step_count = 0
        self._frames: deque[tuple[int, int, int, Any]] = deque(maxlen=FRAMES_TOLD)
        self._lives = [0] * self.place_count
        self._starts = [0] * self.place_count
        self._disks: list[FakeFiles | None] = [None] * self.place_count
        self._place_of_instance: dict[int, int] = {}
        self._lost: set[int] = set()
        self._tokens: dict[int, dict[Token, None]] = {}
        self._last_operation = 0
        self._last_uid = 0

    def tell(self, text: str) -> None:
        """Add a line to the story."""
        self.story.append(f"{self.queue.now_us / SECOND_US:10.6f} {text}")

    def keep_frames(self, count: int) -> None:
        """Remember so many of the last frames that arrived."""
        self._frames = deque(maxlen=count)

    def count(self, what: str) -> None:
        """Count something for the summary."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def next_operation(self) -> int:
        """An id for a client's operation."""
        self._last_operation += 1
        return self._last_operation

    # -- who is where ----------------------------------------------------------------------------------------------

    def live_shards(self) -> list[SimShard]:
        """Those that run, paused ones too."""
        return [shard for shard in self.shards if shard is not None]

    def place_of_instance(self, instance: int) -> int:
        """Where an instance runs; -1 if it does not, or is 0."""
        place = self._place_of_instance.get(instance, -1)
        shard = self.shards[place] if place >= 0 else None
        return place if shard is not None and shard.instance == instance else -1

    def member_of(self, instance: int, uid: int) -> Any:
        """The member of a group at an instance; None if there is none."""
        place = self.place_of_instance(instance)
        shard = self.shards[place] if place >= 0 else None
        return shard.core.members.get(uid) if shard is not None else None

    def is_lost(self, instance: int) -> bool:
        """Whether an instance is gone for good."""
        return instance in self._lost

    def places_of(self, uid: int) -> list[int]:
        """Where members of a group ought to be."""
        return self.all_groups[uid].places

    def _local_us(self, instance: int) -> int:
        shard = self.shards[self._place_of_instance[instance]]
        return shard.clock.local_us(self.queue.now_us) if shard is not None else 0

    # -- starting and ending ---------------------------------------------------------------------------------------

    def draw_rate_ppm(self, rng: random.Random) -> int:
        """Two clocks may differ by ``drift`` at most: each is up to half of it off."""
        half = self.options.drift / 2
        return int(1_000_000 * (1 + rng.uniform(-half, half)))

    def start_shard(self, place: int) -> SimShard | None:
        """Start what is at a place: a new instance, or the one that lies on its disk. None if its disk fails."""
        options = self.options
        self._starts[place] += 1
        rng = random.Random(((self.seed << 8) + 3) << 32 | place << 16 | self._starts[place])
        files = self._disks[place]
        if files is None:
            self._lives[place] += 1
        instance = (place + 1) * 1000 + self._lives[place]
        settings = ShardSettings(options.beat_interval_us, options.chunk_bytes, options.inline_bytes_max)
        clock = DriftingClock(self.draw_rate_ppm(rng), rng.randrange(1, 1000) * SECOND_US)
        wall_offset_us = rng.randrange(-SECOND_US, SECOND_US)
        shard_rng = EagerRandom(rng.getrandbits(64))
        shard_rng.eagerness = options.eagerness
        self._place_of_instance[instance] = place
        self.removed.setdefault(instance, set())
        common = (self, self.queue, place, instance, shard_rng, settings, clock, wall_offset_us)
        if not options.is_durable:
            return self._started(SimShard(*common))
        if files is None:
            files = self._disks[place] = FakeFiles()
        try:
            shard = DurableSimShard(*common, files, lambda uid: RegistersMachine(self.history.record(uid)))
        except (PowerLoss, StoragePoisoned, StorageFull) as error:
            self._died_at_start(place, instance, files, error)
            return None
        shard.on_death = self._disk_ended
        return self._started(shard)

    def _started(self, shard: SimShard) -> SimShard:
        instance = shard.instance
        shard.core.is_dead = self.removed[instance].__contains__
        shard.core.may_create = self.recipe
        shard.child.fails_until_us = self.options.fault_us
        self.shards[shard.place] = shard
        self._tokens[instance] = {}
        self.promises.started(instance, shard.clock, self.queue.now_us)
        if isinstance(shard, DurableSimShard) and shard.restored:
            self.restarts.came_back(instance, shard.restored)
            self.tell(f"instance {instance} is back, with groups {sorted(shard.restored)}")
            self.count("restart with members")
        else:
            self.tell(f"instance {instance} starts")
        if self.all_groups:
            self.catch_up(shard)
        shard.work(lambda core: None)  # a first turn, though nobody may ever speak to it: it has timers to set
        return shard

    def _died_at_start(self, place: int, instance: int, files: FakeFiles, error: BaseException) -> None:
        self.count("crash in recovery")
        self.tell(f"instance {instance} cannot start: {type(error).__name__} {error}")
        if isinstance(error, PowerLoss):
            files.crash(self.operator_rng)
        else:
            files.kill()
        self.queue.after(SECOND_US, self.start_shard, place)

    def recipe(self, uid: int) -> Any:
        """What a shard needs to start a member; the operator knows."""
        raise NotImplementedError

    def catch_up(self, shard: SimShard) -> None:
        """The operator tells a shard that came up which groups there are."""
        raise NotImplementedError

    def _take_down(self, shard: SimShard, how: str, down_us: int) -> None:
        """The process ends; after ``down_us`` the place starts again."""
        self.tell(f"instance {shard.instance} {how}")
        if isinstance(shard, DurableSimShard):
            if shard.is_between_turns:
                self.restarts.ended(shard.instance, shard.core)
            else:
                self.restarts.forget(shard.instance)
        shard.kill()
        self.shards[shard.place] = None
        self.rules.forget_instance(shard.instance)
        self.promises.ended(shard.instance, self.queue.now_us)
        del self._tokens[shard.instance]
        self.queue.after(down_us, self.start_shard, shard.place)

    def _lose(self, shard: SimShard, down_us: int) -> None:
        """An instance is gone for good, with all it knew."""
        self._take_down(shard, "is gone", down_us)
        self._lost.add(shard.instance)
        self.restarts.forget(shard.instance)
        self._disks[shard.place] = None
        self.cluster.forget_instance(shard.instance)

    def _disk_ended(self, shard: DurableSimShard, reason: str) -> None:
        """A call to its disk was the last thing that a process did."""
        is_power = shard.files.is_off
        self.count("crash: power, in a call to the disk" if is_power else "crash: disk error")
        self._take_down(shard, f"ends: {reason}", int(self.operator_rng.random() * 3 * SECOND_US))
        if is_power:
            shard.files.crash(self.operator_rng, keep=shard.keep)
        else:
            shard.files.kill()

    # -- what shards say -------------------------------------------------------------------------------------------

    def shard_sent(self, shard: SimShard, to_instance: int, messages: list[Any]) -> None:
        """A shard's frame goes into the network."""
        self.cluster.check_sends(shard.instance, to_instance, messages)
        self.rules.sent(shard.instance, to_instance, messages)
        self.promises.sent(shard.instance, messages, self.queue.now_us)
        if isinstance(shard, DurableSimShard):
            self._check_silence_after_restart(shard, messages)
        to_place = self._place_of_instance.get(to_instance)
        if to_place is None or to_place == shard.place:
            assert to_instance != shard.instance, messages
            return
        self.network.send(shard.place, to_place, shard.instance, to_instance, messages)

    def _check_silence_after_restart(self, shard: DurableSimShard, messages: list[Any]) -> None:
        age_us = shard.clock.local_us(self.queue.now_us) - shard.started_us
        if age_us < self.options.election_timeout_s * SECOND_US:
            self.rules.check_restored_voter(shard.instance, messages, shard.restored, shard.core.members)

    def _deliver(self, to_place: int, from_instance: int, to_instance: int, frame: Any) -> None:
        shard = self.shards[to_place]
        if shard is not None and shard.instance == to_instance:
            self._frames.append((self.queue.now_us, from_instance, to_instance, frame))
            self.promises.arrived(from_instance, to_instance, frame)
            shard.receive(from_instance, frame)

    def shard_stepped(self, shard: SimShard) -> None:
        """Check everything that this step can have touched."""
        self.step_count += 1
        if self.step_count > self.options.steps_max:
            raise Violation(f"liveness: more than {self.options.steps_max} steps: messages breed messages")
        core = shard.core
        core.check_invariants()
        self.history.raise_found()
        self.cluster.check_members(shard.instance, core.members)
        self.rules.stepped(shard.instance, core.members)
        self.promises.stepped(shard.instance, core.stamp, core.members, self.queue.now_us)
        self.trace = (self.trace * 0x5DEECE66D + self.queue.now_us * 31 + shard.instance) & _MASK

    def _check_silence(self) -> None:
        running = [shard for shard in self.live_shards() if not shard.is_paused]
        self.rules.check_leaders_silence((s.instance, self._local_us(s.instance), s.core.members) for s in running)
        self.queue.after(SECOND_US, self._check_silence)

    def shard_event(self, shard: SimShard, event: tuple[Any, ...]) -> None:
        """Count it and remember it."""
        if event[0] == "diverged":
            raise Violation(f"divergence: {shard.instance} holds members to differ that are equal by design: {event}")
        self.count("event " + event[0])
        self.tell(f"{shard.instance}: {' '.join(str(part) for part in event)}")

    def state_hash(self) -> int:
        """One number for what all members are now: two runs that share it are at the same point."""
        value = self.trace
        for shard in self.live_shards():
            for uid, m in shard.core.members.items():
                for part in (uid, m.term, m.commit, m.applied, m.last_index, m.log.last_term, m.state.chain):
                    value = (value * 0x5DEECE66D + part) & _MASK
        return value

    # -- clients ---------------------------------------------------------------------------------------------------

    def client_sent(self, place: int, call: Call, attempt: int) -> None:
        """A client's request sets out."""
        delay_us = self._client_delay_us()
        if delay_us >= 0:
            self.queue.after(delay_us, self._request, place, call, attempt)

    def _client_delay_us(self) -> int:
        """-1: lost."""
        draw = self.client_rng.random()
        if draw < self.client_loss:
            if draw < self.client_loss / 2:
                return -1
            return int(self.client_rng.random() * 2 * SECOND_US)
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
            raise Violation(f"answers: instance {shard.instance} answered one request twice: {code} {body!r}")
        if code not in KNOWN_CODES:
            raise Violation(f"answers: instance {shard.instance} answered with code {code}, which no client knows")
        token.is_answered = True
        del self._tokens[shard.instance][token]
        delay_us = self._client_delay_us()
        if delay_us >= 0:
            self.queue.after(delay_us, token.call.client.answered, token, shard.place, code, body)

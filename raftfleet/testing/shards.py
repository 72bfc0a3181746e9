"""A shard without a process: the production core turned by simulated time and frames.

This module does not know about faults; the simulation tells it when to pause and when to die. Each turn is the
production loop in small: ``begin``, ``receive`` what has come, ``tick`` if a timer is due, ``finish``, send, answer. A
pause may fall between two turns or into the middle of one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Protocol

from raftfleet.core.member import Member
from raftfleet.core.sending import BytesSource
from raftfleet.core.shard import Shard, ShardSettings
from raftfleet.testing.clock import DriftingClock, EventQueue
from raftfleet.testing.sim_child import SimChild

WALL_EPOCH_US = 1_700_000_000_000_000
"""Unix microseconds at true time 0 of every simulation."""


class ShardOwner(Protocol):
    """What a simulated shard needs of the simulation around it."""

    def shard_sent(self, shard: SimShard, to_instance: int, messages: list[Any]) -> None:
        """Frames to carry."""

    def shard_replied(self, shard: SimShard, token: Any, code: int, body: Any) -> None:
        """An answer to whoever proposed or asked."""

    def shard_event(self, shard: SimShard, event: tuple[Any, ...]) -> None:
        """An event of the core, such as ``("leader", uid, term)``."""

    def shard_stepped(self, shard: SimShard) -> None:
        """After each turn: the time to check."""


class SimShard:
    """One instance at one place. It dies with its memory; what comes after it at the place is another instance.

    Attributes:
        core: the production shard.
        clock: its drifting monotonic clock.
        wall_offset_us: how far its wall clock is off.
        is_paused: stopped as by SIGSTOP: what comes waits.
        is_dead: crashed.
    """

    def __init__(
        self,
        owner: ShardOwner,
        queue: EventQueue,
        place: int,
        instance: int,
        rng: random.Random,
        settings: ShardSettings,
        clock: DriftingClock,
        wall_offset_us: int = 0,
        core: Shard | None = None,
    ) -> None:
        self.core = core or Shard(instance, rng, settings)
        self.place = place
        self.instance = instance
        self.clock = clock
        self.wall_offset_us = wall_offset_us
        self.is_paused = False
        self.is_dead = False
        self._owner = owner
        self._queue = queue
        self._frames: list[tuple[int, Any]] = []
        self._work: list[Callable[[Shard], None]] = []
        self._wake_us = -1
        self._is_mid_turn = False
        self._stops_in_turn = False
        self._stops_early = False
        self._is_begun = False
        self.child = SimChild(self, queue)
        self.core.begin_dump = self._begin_dump

    def _begin_dump(self, member: Member) -> bool:
        core = self.core
        return self.child.begin(
            member,
            lambda index, term, data: core.dump_made(member, BytesSource(index, term, data)),
            lambda why: core.dump_failed(member, why),
        )

    def receive(self, from_instance: int, frame: Any) -> None:
        """A frame has come."""
        if self.is_dead:
            return
        self._frames.append((from_instance, frame))
        if not self.is_paused:
            self.turn()

    def work(self, function: Callable[[Shard], None]) -> None:
        """Run ``function(core)`` within a turn: a client's request, an operator's act."""
        if self.is_dead:
            return
        self._work.append(function)
        if not self.is_paused:
            self.turn()

    def turn(self) -> None:
        """One turn of the loop."""
        core = self.core
        true_us = self._queue.now_us
        local_us = self.clock.local_us(true_us)
        core.begin(local_us, WALL_EPOCH_US + true_us + self.wall_offset_us)
        if self._stops_in_turn:
            self._stops_in_turn = False
            self.is_paused = True
            if self._stops_early:
                self._is_begun = True
                return
        self._go_on(local_us)

    def _go_on(self, local_us: int) -> None:
        """The turn after its clock was read, which showed ``local_us``."""
        core = self.core
        frames, self._frames = self._frames, []
        if frames:  # only then, as in production: what clients ask may be taken by an older clock
            core.clock_read(self.clock.local_us(self._queue.now_us))  # they came, maybe, while it stood still
        for from_instance, frame in frames:
            core.receive(from_instance, frame)
        if self._work:
            work, self._work = self._work, []
            for function in work:
                function(core)
        if core.next_deadline_us() <= local_us:
            core.tick()
        if self.is_paused:
            self._stop_within_turn()
            self._is_mid_turn = True
        else:
            self._finish()
        if not self.is_dead:
            self._owner.shard_stepped(self)
            self._schedule()

    def _stop_within_turn(self) -> None:
        """What was read from the state is not handed out, what was decided is not sent."""
        self.core.flush()
        self.core.apply()

    def _finish(self) -> None:
        """The part of a turn that speaks to others. The clock is read again after the state was."""
        core = self.core
        core.flush()
        core.apply()
        core.settle(self.clock.local_us(self._queue.now_us))
        self._emit(core.finish())

    def pause(self, within_turn: bool) -> None:
        """Stop, between two turns or, ``within_turn``, in the middle of the next one.

        There it stops as soon as its clock was read, so that it takes what clients asked meanwhile by an old clock, or,
        the next time, after the state was read and before anything leaves.
        """
        assert not self.is_dead
        if self.is_paused:
            return
        if within_turn:
            self._stops_in_turn = True
            self._stops_early = not self._stops_early
        else:
            self.is_paused = True

    def resume(self) -> None:
        """Go on: first what was held back, then everything that has come meanwhile, in one turn."""
        self._stops_in_turn = False
        if self.is_dead or not self.is_paused:
            return
        self.is_paused = False
        if self._is_begun:
            self._is_begun = False
            self._go_on(self.core.now_us)
        elif self._is_mid_turn:
            self._is_mid_turn = False
            self.core.settle(self.clock.local_us(self._queue.now_us))
            self._finish()
        self._wake_us = -1
        if not self.is_dead:
            self.turn()

    def kill(self) -> None:
        """Gone, with all it knew."""
        self.is_dead = True
        self._frames.clear()
        self._work.clear()

    def _emit(self, effects: Any) -> None:
        owner = self._owner
        for to_instance, messages in effects.sends.items():
            owner.shard_sent(self, to_instance, messages)
        for token, code, body in effects.replies:
            owner.shard_replied(self, token, code, body)
        for event in effects.events:
            owner.shard_event(self, event)

    def _next_deadline_us(self) -> int:
        """By its own clock."""
        return self.core.next_deadline_us()

    def _schedule(self) -> None:
        """Be woken at the next deadline; an earlier wake that is already under way will look again."""
        due_us = self.clock.true_us(self._next_deadline_us())
        now_us = self._queue.now_us
        if due_us <= now_us:
            due_us = now_us + 1
        if now_us < self._wake_us <= due_us:
            return
        self._wake_us = due_us
        self._queue.at(due_us, self._wake, due_us)

    def _wake(self, due_us: int) -> None:
        if self.is_dead or self.is_paused or due_us != self._wake_us:
            return
        self._wake_us = -1
        if self.clock.local_us(due_us) >= self._next_deadline_us():
            self.turn()
        else:
            self._schedule()

"""A network between simulated shards: frames of messages with delay, loss, duplication, reordering and cuts.

This module does not know what the messages mean. A frame is what one shard sends to another in one turn of its loop:
a list of messages. Between two places frames keep their order, as one ZeroMQ connection gives; that two frames pass
each other is a fault like the others (a connection lost and made again). Two kinds of cut:

* ``DROP``: what is sent is lost, and so is what was under way: a host that is gone, a queue that overflowed.
* ``STALL``: what is sent waits and comes, in order, when the cut ends: TCP under a cable pulled for a while.

Every choice comes from one ``random.Random``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raftfleet.testing.clock import MILLISECOND_US, EventQueue

OPEN = 0
DROP = 1
STALL = 2

Frame = Sequence[Any]
"""Messages; the network never looks inside."""

Deliver = Callable[[int, int, int, Frame], None]
"""``deliver(to_place, from_instance, to_instance, frame)``"""


@dataclass(frozen=True)
class NetworkFaults:
    """Probabilities per frame.

    Attributes:
        loss: the frame never comes.
        duplicate: it comes twice, the second time late.
        reorder: it takes a way of its own, so that later ones may pass it.
        hold: it is held back for ``hold_us_max`` at most, while others pass.
    """

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    hold: float = 0.0
    hold_us_max: int = 3_000_000

    @property
    def total(self) -> float:
        """Probability that something happens to a frame."""
        return self.loss + self.duplicate + self.reorder + self.hold


NO_FAULTS = NetworkFaults()


class _Path:
    """One direction between two places."""

    __slots__ = ("delay_us_min", "delay_us_spread", "last_arrival_us", "random", "stalled", "state")

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random  # its own: what happens on one path changes nothing on others
        self.state = OPEN
        self.delay_us_min = MILLISECOND_US // 2
        self.delay_us_spread = MILLISECOND_US
        self.last_arrival_us = 0
        self.stalled: list[tuple[int, int, Frame]] = []


class SimNetwork:
    """Carries frames between ``place_count`` places (a place is a node's address; instances come and go there).

    Attributes:
        faults: what may happen to a frame at present.
        counts: how often each thing happened, for the summary.
    """

    STALLED_FRAMES_MAX = 1000
    """Frames that one stalled path keeps, as a bounded send queue does; more are dropped."""

    def __init__(self, queue: EventQueue, rng: random.Random, place_count: int, deliver: Deliver) -> None:
        self.faults = NO_FAULTS
        self.counts = {"sent": 0, "lost": 0, "cut": 0, "duplicated": 0, "reordered": 0, "held": 0, "stalled": 0}
        self.place_count = place_count
        self._queue = queue
        self._deliver = deliver
        self._paths = [[_Path(rng.getrandbits(64)) for _ in range(place_count)] for _ in range(place_count)]

    def send(self, from_place: int, to_place: int, from_instance: int, to_instance: int, frame: Frame) -> None:
        """Take a frame; whether and when it arrives is up to the faults."""
        path = self._paths[from_place][to_place]
        counts = self.counts
        counts["sent"] += 1
        if path.state != OPEN:
            self._refuse(path, from_instance, to_instance, frame)
            return
        draw = path.random
        arrival_us = self._queue.now_us + path.delay_us_min + int(draw() * path.delay_us_spread)
        faults = self.faults
        if faults is not NO_FAULTS:
            chance = draw()
            if chance < faults.total:
                self._spoil(chance, path, to_place, arrival_us, from_instance, to_instance, frame)
                return
        if arrival_us < path.last_arrival_us:
            arrival_us = path.last_arrival_us
        path.last_arrival_us = arrival_us
        self._queue.at(arrival_us, self._arrive, path, to_place, from_instance, to_instance, frame)

    def _refuse(self, path: _Path, from_instance: int, to_instance: int, frame: Frame) -> None:
        if path.state == STALL and len(path.stalled) < self.STALLED_FRAMES_MAX:
            self.counts["stalled"] += 1
            path.stalled.append((from_instance, to_instance, frame))
        else:
            self.counts["cut"] += 1

    def _spoil(
        self,
        chance: float,
        path: _Path,
        to_place: int,
        arrival_us: int,
        from_instance: int,
        to_instance: int,
        frame: Frame,
    ) -> None:
        faults, queue, counts = self.faults, self._queue, self.counts
        if chance < faults.loss:
            counts["lost"] += 1
            return
        chance -= faults.loss
        if chance < faults.duplicate:
            counts["duplicated"] += 1
            queue.at(arrival_us, self._arrive, path, to_place, from_instance, to_instance, frame)
            arrival_us += int(path.random() * 300 * MILLISECOND_US)
        elif chance < faults.duplicate + faults.reorder:
            counts["reordered"] += 1
            arrival_us += int(path.random() * 30 * MILLISECOND_US)
        else:
            counts["held"] += 1
            arrival_us += int(path.random() * faults.hold_us_max)
        queue.at(arrival_us, self._arrive, path, to_place, from_instance, to_instance, frame)

    def _arrive(self, path: _Path, to_place: int, from_instance: int, to_instance: int, frame: Frame) -> None:
        if path.state != OPEN:
            self._refuse(path, from_instance, to_instance, frame)
            return
        self._deliver(to_place, from_instance, to_instance, frame)

    def cut(self, from_place: int, to_place: int, state: int = DROP) -> None:
        """Close one direction: ``DROP`` or ``STALL``."""
        self._paths[from_place][to_place].state = state

    def mend(self, from_place: int, to_place: int) -> None:
        """Open one direction; what was stalled comes now, in order."""
        path = self._paths[from_place][to_place]
        path.state = OPEN
        stalled, path.stalled = path.stalled, []
        for from_instance, to_instance, frame in stalled:
            self.send(from_place, to_place, from_instance, to_instance, frame)

    def is_open(self, a: int, b: int) -> bool:
        """Whether both directions between two places are open."""
        return self._paths[a][b].state == OPEN and self._paths[b][a].state == OPEN

    def set_faults(self, faults: NetworkFaults | None) -> None:
        """What may happen to a frame from now on; None: nothing."""
        self.faults = NO_FAULTS if faults is None else faults

    def reset_delays(self) -> None:
        """Quick paths everywhere."""
        for a, b in self.pairs():
            self.set_delay(a, b, MILLISECOND_US // 2, 3 * MILLISECOND_US // 2)

    def set_delay(self, from_place: int, to_place: int, delay_us_min: int, delay_us_max: int) -> None:
        """Frames of one direction take this long."""
        path = self._paths[from_place][to_place]
        path.delay_us_min = delay_us_min
        path.delay_us_spread = delay_us_max - delay_us_min

    def pairs(self) -> list[tuple[int, int]]:
        """All directions, in a fixed order."""
        return [(a, b) for a in range(self.place_count) for b in range(self.place_count) if a != b]

    def heal(self) -> None:
        """No faults, no cuts, quick paths."""
        self.set_faults(None)
        self.reset_delays()
        for a, b in self.pairs():
            self.mend(a, b)

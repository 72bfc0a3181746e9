"""Time that passes only when the simulation says so: an event queue, and clocks that run apart.

This module does not know what the events do. Two events of the same microsecond run in the order in which they were
put in, so that a run depends on nothing but its seed.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

SECOND_US = 1_000_000
MILLISECOND_US = 1_000


class EventQueue:
    """What happens when, in true time: microseconds since the simulation began.

    Attributes:
        now_us: the time of the event that is running.
        event_count: events run so far.
    """

    __slots__ = ("_heap", "_order", "event_count", "now_us")

    def __init__(self) -> None:
        self.now_us = 0
        self.event_count = 0
        self._order = 0
        self._heap: list[tuple[int, int, Callable[..., object], tuple[Any, ...]]] = []

    def at(self, time_us: int, function: Callable[..., object], *args: Any) -> None:
        """Run ``function(*args)`` at ``time_us``; a time in the past means now."""
        if time_us < self.now_us:
            time_us = self.now_us
        self._order += 1
        heapq.heappush(self._heap, (time_us, self._order, function, args))

    def after(self, delay_us: int, function: Callable[..., object], *args: Any) -> None:
        """Run ``function(*args)`` when ``delay_us`` have passed."""
        self.at(self.now_us + delay_us, function, *args)

    def run_until(self, end_us: int) -> None:
        """Run every event up to and including ``end_us``; the clock then stands at ``end_us``."""
        heap = self._heap
        pop = heapq.heappop
        while heap and heap[0][0] <= end_us:
            self.now_us, _, function, args = pop(heap)
            self.event_count += 1
            function(*args)
        self.now_us = end_us

    def run_one(self) -> bool:
        """Run the next event, however far away; False if there is none."""
        if not self._heap:
            return False
        self.now_us, _, function, args = heapq.heappop(self._heap)
        self.event_count += 1
        function(*args)
        return True

    def __len__(self) -> int:
        return len(self._heap)


class DriftingClock:
    """One machine's monotonic clock: starts anywhere, runs a little fast or slow, never goes back.

    Args:
        rate_ppm: its microseconds per million true ones; 1_000_000 is a true clock.
        offset_us: what it shows at true time 0.
    """

    __slots__ = ("_base_local_us", "_base_true_us", "_past", "rate_ppm")

    def __init__(self, rate_ppm: int = 1_000_000, offset_us: int = 0) -> None:
        assert rate_ppm > 0, rate_ppm
        self.rate_ppm = rate_ppm
        self._base_true_us = 0
        self._base_local_us = offset_us
        self._past: list[tuple[int, int, int]] = []  # (local, true, rate) at the beginning of each earlier rate

    def local_us(self, true_us: int) -> int:
        """What this clock shows at ``true_us``."""
        return self._base_local_us + (true_us - self._base_true_us) * self.rate_ppm // 1_000_000

    def true_us(self, local_us: int) -> int:
        """The first true microsecond at which this clock shows ``local_us`` or more."""
        return self._base_true_us - (local_us - self._base_local_us) * 1_000_000 // -self.rate_ppm

    def past_true_us(self, local_us: int) -> int:
        """As :meth:`true_us`, also for what this clock showed while it ran at an earlier rate."""
        if local_us >= self._base_local_us or not self._past:
            return self.true_us(local_us)
        base_local_us, base_true_us, rate_ppm = next(
            (row for row in reversed(self._past) if row[0] <= local_us), self._past[0]
        )
        return base_true_us - (local_us - base_local_us) * 1_000_000 // -rate_ppm

    def set_rate(self, true_us: int, rate_ppm: int) -> None:
        """Run at another rate from ``true_us`` on."""
        assert rate_ppm > 0, rate_ppm
        self._past.append((self._base_local_us, self._base_true_us, self.rate_ppm))
        self._base_local_us = self.local_us(true_us)
        self._base_true_us = true_us
        self.rate_ppm = rate_ppm

"""Garbage collection in a worker: only what is new is walked, and all of it only when nobody waits.

CPython's collector finds cycles of objects that hold one another. Now and then it walks everything that is alive, and a
worker holds much that lives long: logs, sessions, users' states. Measured: 0.3 s for a million log entries, in which
none of the worker's groups answers. Almost nothing there is ever in a cycle; it is freed without the collector.

So, after each full collection, what has survived it is frozen (``gc.freeze``): it is not looked at again. A cycle that
becomes garbage only later is then not noticed, so every ten minutes all of it is thawed and walked once: in a second in
which no client asked for anything, or after an hour in any case. With more than :data:`THAWED_OBJECTS_MAX` objects that
would take longer than a leader may be silent, and is left out: a state machine whose states are that large and hold
cycles must break them itself when it drops them.
"""

from __future__ import annotations

import contextlib
import gc
from typing import Any

FULL_INTERVAL_US = 600_000_000
FULL_INTERVAL_US_MAX = 3_600_000_000
THAWED_OBJECTS_MAX = 1_000_000
"""About a quarter of a second."""


class Garbage:
    """Takes the collector into care until :meth:`stop`. One per process; time is an argument, monotonic."""

    def __init__(self) -> None:
        self._last_us = -1
        self.full_count = 0

    def start(self) -> None:
        """Freeze what start-up has made, and from now on whatever survives a full collection."""
        gc.callbacks.append(self._on_collection)
        _collect_all()

    def stop(self) -> None:
        """Leave the collector as it was found."""
        with contextlib.suppress(ValueError):
            gc.callbacks.remove(self._on_collection)
        gc.unfreeze()

    def tick(self, now_us: int, is_idle: bool) -> None:
        """About once a second. ``is_idle``: nobody would notice a pause."""
        if self._last_us < 0:
            self._last_us = now_us
        since_us = now_us - self._last_us
        if since_us < FULL_INTERVAL_US or not (is_idle or since_us >= FULL_INTERVAL_US_MAX):
            return
        self._last_us = now_us
        if gc.get_freeze_count() <= THAWED_OBJECTS_MAX:
            self.full_count += 1
            gc.unfreeze()
            _collect_all()

    def _on_collection(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "stop" and info["generation"] == 2:
            gc.freeze()


def _collect_all() -> None:
    """Walk all there is, and let the next full collection come soon.

    Python puts it off until a quarter as much has come up as the last one left alive. So the last one must be one that
    found everything frozen: then they come every 70,000 objects, and take milliseconds.
    """
    gc.collect()
    gc.collect()

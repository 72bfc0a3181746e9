"""Log lines that strangers can cause, at a bounded rate.

This module knows no clock: time arrives as an argument, in microseconds.
"""

from __future__ import annotations

import logging

KEYS_MAX = 256
"""Different messages remembered at a time. Beyond it all share one allowance, so that inventing keys is of no use."""


class LimitedLog:
    """Lets ``burst`` lines per key and interval pass, then counts, and says how many it kept back."""

    def __init__(self, logger: logging.Logger, *, burst: int = 3, interval_us: int = 10_000_000) -> None:
        self._logger = logger
        self._burst = burst
        self._interval_us = interval_us
        self._windows: dict[str, list[int]] = {}
        """key -> [start of the interval, lines in it]"""

    def warning(self, now_us: int, key: str, message: str, *args: object) -> bool:
        """Log ``message % args`` as a warning unless ``key`` has had its share. Returns True if it was logged."""
        window = self._windows.get(key)
        if window is None:
            if len(self._windows) >= KEYS_MAX:
                self._forget_old(now_us)
            if len(self._windows) >= KEYS_MAX:
                key = "other"
            window = self._windows.setdefault(key, [now_us, 0])
        kept_back = 0
        if now_us - window[0] >= self._interval_us:
            kept_back = max(0, window[1] - self._burst)
            window[:] = [now_us, 0]
        window[1] += 1
        if window[1] > self._burst:
            return False
        if kept_back:
            message += f" ({kept_back} more like this were not logged)"
        self._logger.warning(message, *args)
        return True

    def _forget_old(self, now_us: int) -> None:
        self._windows = {k: w for k, w in self._windows.items() if now_us - w[0] < self._interval_us}

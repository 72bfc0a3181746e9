"""When a dead child is started again, and when the node gives up instead.

This module does not know about processes or clocks: exits come in, decisions come out, time is an argument.

Rules:

* A child that asks for a fresh start (``RESTART_FRESH``) gets it at once; it is not counted.
* A child that says that it cannot boot, or may not use its data, is believed: the node ends. So it is with an address
  in use at the child's first start; later, the address was its own a moment ago, and the reason may pass.
* Every other end is counted, a clean exit too: nobody had asked for it. The child is started again after a delay that
  doubles from one end to the next and starts over when the child has lived long enough to be called healthy.
* More than a budget of counted ends within a window: the node ends, with a code of its own. A service manager may
  start it again; a node that flaps for ever would keep its fleet busy with elections.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from raftfleet.node.exit_codes import ExitCode, describe_status

SECOND_US = 1_000_000


@dataclass(frozen=True, kw_only=True)
class RestartLimits:
    """How patient the supervisor is with one child.

    Attributes:
        delay_us_first: before the first restart. Short: a shard's groups wait for it.
        delay_us_max: no delay is longer.
        healthy_us: a child that lived longer starts with the first delay again.
        budget_count: counted ends allowed within the window; one more and the node gives up. Ten: with the delays
            that double, a child that dies at once is tried for about half a minute.
        budget_window_us: length of the window that slides over the counted ends.
        fresh_life_us: a child that asks for a fresh start after a shorter life is counted after all, so that a
            fault there cannot make the supervisor fork without end.
    """

    delay_us_first: int = SECOND_US // 10
    delay_us_max: int = 5 * SECOND_US
    healthy_us: int = 10 * SECOND_US
    budget_count: int = 10
    budget_window_us: int = 60 * SECOND_US
    fresh_life_us: int = SECOND_US // 5


@dataclass(frozen=True)
class StartAgain:
    """Start the child again, not before ``due_us``."""

    due_us: int
    counted: bool


@dataclass(frozen=True)
class GiveUp:
    """Stop the node; ``code`` is its exit code and ``reason`` a sentence for the log."""

    code: ExitCode
    reason: str


Decision = StartAgain | GiveUp


class RestartPolicy:
    """The history of one child, as far as decisions need it."""

    def __init__(self, title: str, limits: RestartLimits | None = None) -> None:
        self._title = title
        self._limits = limits or RestartLimits()
        self._ends_us: deque[int] = deque()
        self._delay_us = self._limits.delay_us_first
        self._ended_before = False

    def child_ended(self, *, now_us: int, started_us: int, status: int) -> Decision:
        """Decide about a child that ended without having been asked to.

        Args:
            status: exit code, or minus the number of the signal that killed it.
        """
        limits = self._limits
        lived_us = now_us - started_us
        is_first_life, self._ended_before = not self._ended_before, True
        if status == ExitCode.RESTART_FRESH and lived_us >= limits.fresh_life_us:
            return StartAgain(now_us, counted=False)
        if status in (ExitCode.CANNOT_BOOT, ExitCode.DATA_DIR_REFUSED):
            code = ExitCode.CANNOT_BOOT if status == ExitCode.CANNOT_BOOT else ExitCode.DATA_DIR_REFUSED
            return GiveUp(code, f"{self._title} {describe_status(status)}")
        if status == ExitCode.ADDRESS_IN_USE and is_first_life:
            return GiveUp(ExitCode.ADDRESS_IN_USE, f"{self._title} {describe_status(status)}")
        if lived_us >= limits.healthy_us:
            self._delay_us = limits.delay_us_first
        return self._count(now_us, status)

    def _count(self, now_us: int, status: int) -> Decision:
        limits = self._limits
        ends_us = self._ends_us
        ends_us.append(now_us)
        while ends_us[0] <= now_us - limits.budget_window_us:
            ends_us.popleft()
        if len(ends_us) > limits.budget_count:
            return GiveUp(
                ExitCode.BUDGET_EXCEEDED,
                f"{self._title} ended {len(ends_us)} times within {limits.budget_window_us / SECOND_US:g} s; "
                f"the last time it {describe_status(status)}",
            )
        delay_us = self._delay_us
        self._delay_us = min(2 * delay_us, limits.delay_us_max)
        return StartAgain(now_us + delay_us, counted=True)

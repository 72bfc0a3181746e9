"""How fast groups may move: a budget of beginnings per second, so that what moves does not hold up what is served.

This module knows nothing of groups but their uids, and reads no clock: time is an argument, monotonic microseconds.

When nodes come or go, every group may have to move: learners in, leaderships handed over. All at once they take CPU
and links from commands, and each command that comes during a handing-over waits for it. (Measured, a thousand groups
from three nodes to six: done in two seconds, in which the slowest hundredth of commands took seven times as long as
before.) Nobody needs it done in two seconds. So a worker begins at most :data:`MOVES_PER_S` moves a second, or as many
more as it takes to be through within about :data:`SPREAD_S`, however many there are.

A move that makes good a loss (a dead member to be replaced) does not ask here.
"""

from __future__ import annotations

from itertools import islice

MOVES_PER_S = 25
"""A handing-over takes some milliseconds: then one in ten of a worker's milliseconds sees one."""
SPREAD_S = 20
"""A backlog that would take longer than about this at that rate goes faster in proportion."""
MOVES_AT_ONCE = 8
"""What may begin without waiting after a quiet time: a few groups are where they belong in an instant."""
TICK_US = 40_000


class Pace:
    """Who may begin to move, in the order in which they asked; what has begun to move comes first."""

    def __init__(self) -> None:
        self._room = float(MOVES_AT_ONCE)
        self._counted_us = 0
        self._begun: dict[int, None] = {}
        self._waiting: dict[int, None] = {}
        self._granted: set[int] = set()

    def __len__(self) -> int:
        return len(self._begun) + len(self._waiting)

    def may_move(self, uid: int, now_us: int, *, has_begun: bool) -> bool:
        """Whether this group may take a costly step now. If not, :meth:`due` names it when its time has come.

        Args:
            uid: the group.
            now_us: now.
            has_begun: it is half way: it has more members than it should, until it may go on.
        """
        if uid in self._granted:
            self._granted.discard(uid)
            return True
        self._count(now_us)
        if not self and self._room >= 1.0:
            self._room -= 1.0
            return True
        if has_begun:
            self._waiting.pop(uid, None)
            self._begun[uid] = None
        elif uid not in self._begun:
            self._waiting[uid] = None
        return False

    def due(self, now_us: int) -> list[int]:
        """Groups whose time has come: their next question is answered with yes."""
        self._count(now_us)
        uids = [*islice(self._begun, int(self._room))]
        uids += islice(self._waiting, int(self._room) - len(uids))
        for uid in uids:
            self._begun.pop(uid, None)
            self._waiting.pop(uid, None)
        self._room -= len(uids)
        self._granted.update(uids)
        return uids

    def looked_at(self, uid: int) -> None:
        """The group was looked at: a permission that it did not need is void."""
        self._granted.discard(uid)

    def forget(self, uid: int) -> None:
        """The group is no more, or not led here any more."""
        self._begun.pop(uid, None)
        self._waiting.pop(uid, None)
        self._granted.discard(uid)

    def _count(self, now_us: int) -> None:
        per_s = max(MOVES_PER_S, len(self) / SPREAD_S)
        self._room = min(max(MOVES_AT_ONCE, per_s / 4), self._room + (now_us - self._counted_us) * per_s / 1e6)
        self._counted_us = now_us

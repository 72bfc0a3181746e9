"""Forked children of simulated shards: a dump that is there only after a while, or never.

This module does not know of files: what becomes of the dump is its maker's to say. As with the real ones
(``workers/snapshot_child.py``) there is one at a time, it has the state as it was when it was forked, it may fail, and
it dies with its shard.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from raftfleet.testing.clock import MILLISECOND_US, EventQueue

if TYPE_CHECKING:
    from raftfleet.core.member import Member
    from raftfleet.testing.shards import SimShard

LONGEST_US = 4_000_000
FAILS = 0.1


class SimChild:
    """One shard's children, one after another.

    Attributes:
        begun, failed: how many.
        fails_until_us: after this they all come to their end.
    """

    def __init__(self, shard: SimShard, queue: EventQueue) -> None:
        self.is_busy = False
        self.begun = 0
        self.failed = 0
        self.fails_until_us = 0
        self._shard = shard
        self._queue = queue
        self._rng = random.Random(shard.instance * 1_000_003 + queue.now_us)

    def begin(self, member: Member, made: Callable[[int, int, bytes], None], failed: Callable[[str], None]) -> bool:
        """Dump ``member`` as it is now; ``made(index, term, data)`` or ``failed(why)`` comes in a later turn."""
        if self.is_busy:
            return False
        self.is_busy = True
        self.begun += 1
        index, term, data = member.make_snapshot()
        draw = self._rng.random()
        took_us = int(draw**3 * LONGEST_US) + MILLISECOND_US
        is_lost = self._rng.random() < FAILS and self._queue.now_us < self.fails_until_us

        def ended() -> None:
            self.is_busy = False
            if is_lost:
                self.failed += 1
                failed("its writer was killed")
            else:
                made(index, term, data)

        self._queue.after(took_us, lambda: self._shard.work(lambda core: ended()))
        return True

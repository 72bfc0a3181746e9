"""What a state machine may know besides its state: the entry's own time, place and seed, equal on every replica."""

from __future__ import annotations

import hashlib


class CommandContext:
    """Facts of the entry being applied. Set before each ``command``; the same on every replica (DESIGN 5.16).

    Attributes:
        time_us: the leader's wall clock when it took the batch, Unix microseconds; never goes back within a group.
        index: log index of the batch. Commands of one batch share it.
        position: the command's place in its batch, from 0.
        term: ``epoch << 32 | election number``.
        version: of the state machine that the group works as, at most the class's own ``version``. Code that knows
            several versions asks here how to behave.
    """

    __slots__ = ("index", "position", "term", "time_us", "uid", "version")

    def __init__(self, uid: int = 0) -> None:
        self.uid = uid
        self.time_us = 0
        self.index = 0
        self.position = 0
        self.term = 0
        self.version = 1

    @property
    def epoch(self) -> int:
        """How often an operator repaired a lost majority of this group."""
        return self.term >> 32

    @property
    def time(self) -> float:
        """The entry's time in Unix seconds. Use it instead of ``time.time()``."""
        return self.time_us / 1e6

    def seed(self) -> int:
        """A 64-bit seed, different for each command and equal on every replica: ``random.Random(context.seed())``."""
        text = f"{self.uid}.{self.term}.{self.index}.{self.position}.{self.time_us}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")

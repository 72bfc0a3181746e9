"""What a child process of a node is given by its supervisor: who it is, and the table of its siblings.

The table is one anonymous shared mapping that the supervisor makes before the first fork. It is written by the
supervisor and, the last word of its own row, by each shard; every child reads it (``status`` shows it). A row is four
64-bit words, each written by one copy of eight aligned bytes, so that a reader sees the old word or the new one. A row
as a whole may be seen half-updated for an instant: it is for people, nothing is decided by it.
"""

from __future__ import annotations

import mmap
import os
import signal
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

from raftfleet.node.config import NodeConfig

Role = Literal["manager", "shard"]

_ROW_WORDS = 4
_WORD_BYTES = 8
_RETIRED = (1 << 64) - 1  # in place of a process number


class ChildRow(NamedTuple):
    """A child as the supervisor sees it.

    Attributes:
        pid: 0 while none runs.
        restarts: how often it was started again since the node started.
        started_us: monotonic microseconds of its last start.
        disk_since_us: since when it has been waiting for its disk, by its own word; 0 if it is not.
    """

    pid: int
    restarts: int
    started_us: int
    disk_since_us: int


class ChildTable:
    """Rows of the node's children: the manager first, then the shards in order."""

    def __init__(self, workers: int) -> None:
        self._rows_count = 1 + workers
        self._memory = mmap.mmap(-1, max(self._rows_count * _ROW_WORDS * _WORD_BYTES, mmap.PAGESIZE))
        self._words = memoryview(self._memory).cast("Q")

    @property
    def manager(self) -> ChildRow:
        """The manager's row."""
        return self._row(0)

    def shard(self, index: int) -> ChildRow:
        """The row of shard ``index``."""
        return self._row(1 + index)

    @property
    def shards(self) -> list[ChildRow]:
        """The rows of all shards, in order."""
        return [self._row(row) for row in range(1, self._rows_count)]

    def is_retired(self, index: int) -> bool:
        """Whether shard ``index`` has ended for good: its node has fewer workers now."""
        return self._words[(1 + index) * _ROW_WORDS] == _RETIRED

    def retire(self, row: int) -> None:
        """Supervisor only: the child has ended and is not started again."""
        self._words[row * _ROW_WORDS] = _RETIRED

    def write(self, row: int, *, pid: int, restarts: int, started_us: int) -> None:
        """Supervisor only. Row 0 is the manager, row 1 + i shard i."""
        for offset, value in enumerate((pid, restarts, started_us, 0)):
            self._words[row * _ROW_WORDS + offset] = value

    def write_disk_since(self, index: int, since_us: int) -> None:
        """Shard ``index`` only, about itself."""
        self._words[(1 + index) * _ROW_WORDS + 3] = since_us

    def _row(self, row: int) -> ChildRow:
        if not 0 <= row < self._rows_count:
            raise IndexError(f"row {row} of {self._rows_count}")
        first = row * _ROW_WORDS
        return ChildRow(*self._words[first : first + _ROW_WORDS])

    def close(self) -> None:
        """Give the mapping back, in this process only."""
        self._words.release()
        self._memory.close()


@dataclass(frozen=True, kw_only=True)
class ChildContext:
    """Given to a child's body.

    Attributes:
        config: the node's settings.
        role: ``"manager"`` or ``"shard"``.
        index: of the shard; 0 for the manager.
        supervisor_pid: the parent; the child dies with it.
        children: pid, restarts and start of every child, live.
    """

    config: NodeConfig
    role: Role
    index: int
    supervisor_pid: int
    children: ChildTable

    @property
    def title(self) -> str:
        """How the process is called in logs and listings, such as ``shard-0``."""
        return "manager" if self.role == "manager" else f"shard-{self.index}"

    @property
    def shard_count(self) -> int:
        """How many shards the node began with: ``--workers``, or more as long as a data directory holds more."""
        return len(self.children.shards)

    def stop_node(self) -> None:
        """Ask the supervisor to stop the node, as SIGTERM does. This process gets its own SIGTERM soon after."""
        self._signal(signal.SIGTERM)

    def grow_leader_table(self) -> None:
        """Ask the supervisor for a larger leader table. It comes as a new generation behind the same link."""
        self._signal(signal.SIGUSR1)

    def _signal(self, number: int) -> None:
        if os.getppid() == self.supervisor_pid:  # else it is dead and its number may be somebody else's
            os.kill(self.supervisor_pid, number)


def monotonic_us() -> int:
    """Monotonic microseconds, comparable between the processes of one machine."""
    return time.monotonic_ns() // 1000

"""State machines that fill disks, for ``disk.py``."""

from __future__ import annotations

from typing import Any

import raftfleet


class Filler(raftfleet.StateMachine):
    """Large commands, small state: counts the bytes that it was given."""

    def new(self) -> int:
        return 0

    def command(self, total: int, arg: Any) -> tuple[int, int]:
        return total, total + len(arg)

    def query(self, total: int, arg: Any) -> int:
        return total


class Shelf(raftfleet.StateMachine):
    """Keeps what it is given under a number; changed in place, as large states are."""

    def new(self) -> dict[int, bytes]:
        return {}

    def command(self, shelf: dict[int, bytes], arg: Any) -> tuple[int, dict[int, bytes]]:
        shelf[arg[0]] = arg[1]
        return len(shelf), shelf

    def query(self, shelf: dict[int, bytes], arg: Any) -> int:
        return len(shelf)

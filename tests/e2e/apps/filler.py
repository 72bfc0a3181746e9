"""A machine whose commands are large and whose state is small: it fills logs."""

from __future__ import annotations

from typing import Any

import raftfleet


class Filler(raftfleet.StateMachine):
    """Counts the bytes that it was given."""

    def new(self) -> int:
        return 0

    def command(self, total: int, arg: Any) -> tuple[int, int]:
        return total, total + len(arg)

    def query(self, total: int, arg: Any) -> int:
        return total

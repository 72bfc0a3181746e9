"""A machine with a large state, whose ``dump`` and ``load`` can be told to misbehave."""

from __future__ import annotations

import sys
import time
from typing import Any

import msgpack

import raftfleet


class Shelf(raftfleet.StateMachine):
    """Keeps what it is given under a number. ``["dump", how]``: "slowly" takes a minute, "loads slowly" six seconds."""

    def new(self) -> dict[Any, Any]:
        return {"dump": ""}

    def command(self, shelf: dict[Any, Any], arg: Any) -> tuple[int, dict[Any, Any]]:
        match arg:
            case ["put", number, data]:
                shelf[number] = data
            case ["dump", how]:
                shelf["dump"] = how
        return len(shelf) - 1, shelf

    def query(self, shelf: dict[Any, Any], arg: Any) -> int:
        if isinstance(arg, list):
            return int(shelf[arg[1]][0])  # ["first byte", number]
        return len(shelf) - 1

    def dump(self, shelf: dict[Any, Any]) -> bytes:
        if shelf["dump"] == "slowly":
            time.sleep(60)
        packed: bytes = msgpack.packb(shelf)
        return packed

    def load(self, data: bytes) -> dict[Any, Any]:
        shelf: dict[Any, Any] = msgpack.unpackb(data, strict_map_key=False)
        if shelf["dump"] == "loads slowly":
            print("loading slowly", file=sys.stderr, flush=True)
            for _ in range(60):
                time.sleep(0.1)
        return shelf

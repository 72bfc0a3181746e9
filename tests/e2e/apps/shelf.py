"""A machine with a large state, whose ``dump`` can be told to misbehave."""

from __future__ import annotations

import time
from typing import Any

import msgpack

import raftfleet


class Shelf(raftfleet.StateMachine):
    """Keeps what it is given under a number. ``["dump", how]``: "slowly" takes a minute."""

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
        return len(shelf) - 1

    def dump(self, shelf: dict[Any, Any]) -> bytes:
        if shelf["dump"] == "slowly":
            time.sleep(60)
        packed: bytes = msgpack.packb(shelf)
        return packed

    def load(self, data: bytes) -> dict[Any, Any]:
        shelf: dict[Any, Any] = msgpack.unpackb(data, strict_map_key=False)
        return shelf

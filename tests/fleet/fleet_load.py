"""Clients that load a simulated fleet and notice what is wrong with the answers."""

from __future__ import annotations

import random
from typing import Any

import msgpack

from raftfleet.client.core import Call
from raftfleet.testing.fleet import SimFleet
from raftfleet.testing.fleet_clients import Historian

__all__ = ["Historian", "Incrementer", "raw_command"]


class Incrementer:
    """Sends one ``inc`` after the other to a group of COUNTER: the n-th must return n - 1.

    ``errors`` stays empty if no call gave up; ``count`` is how many were answered.
    """

    def __init__(self, fleet: SimFleet, node: str, name: str, *, think_s_max: float = 0.2, **options: Any) -> None:
        self.fleet = fleet
        self.name = name
        self.count = 0
        self.errors: list[BaseException] = []
        self.is_stopped = False
        self.options = options
        self.think_us_max = int(think_s_max * 1e6)
        self.client = fleet.client(node)
        self.rng = random.Random(fleet.rng.getrandbits(64))
        self._next()

    def _next(self) -> None:
        if not self.is_stopped:
            self.client.command(self.name, "inc", then=self._answered, **self.options)

    def _answered(self, call: Call) -> None:
        if call.error is not None:
            self.errors.append(call.error)
            return
        if call.result != self.count:
            self.errors.append(AssertionError(f"inc number {self.count + 1} of {self.name} returned {call.result}"))
            return
        self.count += 1
        self.fleet.queue.after(int(self.rng.random() * self.think_us_max), self._next)


def raw_command(client_id: bytes, seq: int, arg: Any, issued_us: int) -> bytes:
    """A packed command, for tests that speak to a worker without the client's retries."""
    return bytes(msgpack.packb([client_id, seq, 0, issued_us, msgpack.packb(arg)]))

"""Clients that load a simulated fleet and tell its history checker what they were promised."""

from __future__ import annotations

import random
from typing import Any

from raftfleet import errors
from raftfleet.client.core import Call
from raftfleet.testing.fleet import SimFleet

KINDS = ("add", "add", "add", "set")


class Historian:
    """Sends commands and queries to a group of REGISTERS, and tells ``fleet.history`` what it was promised."""

    def __init__(self, fleet: SimFleet, node: str, name: str, uid: int, *, think_s_max: float = 0.3) -> None:
        self.fleet = fleet
        self.name = name
        self.uid = uid
        self.client = fleet.client(node)
        self.rng = random.Random(fleet.rng.getrandbits(64))
        self.ident = self.rng.getrandbits(40)
        self.think_us_max = int(think_s_max * 1e6)
        self.is_stopped = False
        self.outcomes: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        self.open_count = 0
        self.operation_count = 0
        fleet.history.record(uid)
        fleet.queue.after(int(self.rng.random() * self.think_us_max), self._burst)

    def _burst(self) -> None:
        if self.is_stopped:
            return
        count = 1 if self.rng.random() < 0.7 else self.rng.randrange(2, 8)
        self.open_count = count
        for _ in range(count):
            self._one()

    def _one(self) -> None:
        rng = self.rng
        floor = self.fleet.history.called(self.uid)
        timeout = rng.choice((0.05, 0.3, 0.5, 2.0))
        options: dict[str, Any] = {
            "timeout": timeout,
            "retry": rng.choice((0, 1, 3)),
            "retry_interval": rng.choice((0.01, 0.2, 1.0)),
        }
        key = rng.randrange(4)
        if rng.random() < 0.3:
            self.client.query(self.name, ["get", key], then=lambda call: self._queried(call, floor), **options)
            return
        self.operation_count += 1
        operation = self.ident * 1_000_000 + self.operation_count
        self.client.command(
            self.name,
            [operation, rng.choice(KINDS), key, rng.randrange(100)],
            then=lambda call: self._commanded(call, operation, floor),
            **options,
        )

    def _commanded(self, call: Call, operation: int, floor: int) -> None:
        history = self.fleet.history
        if call.error is None:
            version, chain, _ = call.result
            history.command_answered(self.uid, operation, floor, version, chain)
        elif isinstance(call.error, errors.NotApplied):
            history.refused(self.uid, operation)
        else:
            assert isinstance(call.error, errors.OutcomeUnknown), call.error
        self._done(call, "command")

    def _queried(self, call: Call, floor: int) -> None:
        if call.error is None:
            version, chain, _ = call.result
            self.fleet.history.query_answered(self.uid, floor, version, chain)
        else:
            assert isinstance(call.error, errors.NotApplied), call.error
        self._done(call, "query")

    def _done(self, call: Call, kind: str) -> None:
        outcome = type(call.error).__name__ if call.error is not None else "ok"
        self.counts[f"{kind} {outcome}"] = self.counts.get(f"{kind} {outcome}", 0) + 1
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self.open_count -= 1
        if self.open_count == 0:
            self.fleet.queue.after(int(self.rng.random() * self.think_us_max), self._burst)

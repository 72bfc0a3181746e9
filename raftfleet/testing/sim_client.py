"""A user's client in a simulated fleet: the production client core, driven by virtual time.

This module does not decide anything: routing, retries, sessions and outcomes are those of
:mod:`raftfleet.client.core`; here are only its driver's duties, as in ``client/sync.py`` and ``client/aio.py``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raftfleet.client.core import DONE, PAUSED, QUEUED, READY, Call, ClientCore, attempt_run, run_results, runs
from raftfleet.core.codes import OK
from raftfleet.testing.shards import WALL_EPOCH_US
from raftfleet.testing.sim_worker import Connection

if TYPE_CHECKING:
    from raftfleet.testing.fleet import SimFleet, SimNode


class SimFleetClient:
    """A client on one node. Calls run as the queue runs; ``then(call)`` is called when one has ended."""

    def __init__(self, fleet: SimFleet, node: SimNode, rng: random.Random) -> None:
        self.fleet = fleet
        self.node = node
        self.core = ClientCore(rng.getrandbits(128).to_bytes(16, "big"))
        self._connections: dict[int, Connection] = {}
        self._calls: dict[int, list[Call]] = {}  # by the id of the first of each run
        self._outbox: list[Call] = []
        self._next_id = 1

    def command(
        self,
        name: str,
        arg: object,
        *,
        timeout: float = 0.5,
        retry: int = 3,
        retry_interval: float = 1.0,
        then: Callable[[Call], None] | None = None,
    ) -> Call:
        """Begin a command; arguments and defaults are the synchronous client's."""
        return self._begin(self.core.command(name, arg, timeout, retry, retry_interval), then)

    def query(
        self,
        name: str,
        arg: object,
        *,
        consistency: str = "linearizable",
        timeout: float = 0.5,
        retry: int = 3,
        retry_interval: float = 1.0,
        then: Callable[[Call], None] | None = None,
    ) -> Call:
        """Begin a query; arguments and defaults are the synchronous client's."""
        return self._begin(self.core.query(name, arg, consistency, timeout, retry, retry_interval), then)

    def result(self, call: Call, within_s: float = 30.0) -> Any:
        """Let time pass until ``call`` has ended; return its result or raise its error."""
        self.fleet.run_until(lambda: call.state == DONE, f"an end of the call to {call.name!r}", within_s)
        if call.error is not None:
            raise call.error
        return call.result

    def _begin(self, call: Call, then: Callable[[Call], None] | None) -> Call:
        call.waiter = then
        self.core.start(call, self.fleet.queue.now_us)
        self._go_on(call)
        return call

    def _go_on(self, call: Call) -> None:
        """Do what the call's state asks for, and be there at its deadline."""
        now_us = self.fleet.queue.now_us
        if call.state == READY:
            if not self._outbox:
                self.fleet.queue.at(now_us, self._flush)
            self._outbox.append(call)
        if call.state == DONE:
            for admitted in self.core.turn(call, now_us):
                self._go_on(admitted)
            if call.waiter is not None:
                then, call.waiter = call.waiter, None
                then(call)
            return
        self.fleet.queue.at(call.deadline_us, self._on_deadline, call, call.deadline_us, call.state)

    def _flush(self) -> None:
        """Send what was asked for at this moment, as an asyncio client does at the end of a turn: in runs."""
        outbox, self._outbox = self._outbox, []
        for run in runs(outbox):
            self._attempt(run, self.fleet.queue.now_us)

    def _attempt(self, run: list[Call], now_us: int) -> None:
        index = self.core.where(run[0], self.node.workers_count)
        connection = self._connections.get(index)
        if connection is None or not connection.is_open:
            worker = self.node.workers[index] if self.node.is_up else None
            if worker is None:
                for call in run:
                    call.on_refused("connection refused", now_us)
                    self._go_on(call)
                return
            connection = Connection(self.fleet, worker, self._on_reply, lambda: self._on_lost(index))
            self._connections[index] = connection
        first_id = self._next_id
        self._next_id += len(run)
        row = self.node.lookup(run[0].name)
        item = attempt_run(run, first_id, row.uid if row is not None else 0, now_us, WALL_EPOCH_US + now_us)
        self._calls[first_id] = run
        connection.send(item)

    def _on_deadline(self, call: Call, deadline_us: int, state: int) -> None:
        if call.deadline_us == deadline_us and call.state == state and state in (QUEUED, PAUSED, READY, 2):
            call.on_deadline(self.fleet.queue.now_us)
            self._go_on(call)

    def _on_reply(self, ident: int, code: int, body: Any) -> None:
        run = self._calls.pop(ident, None)
        if run is None:
            return
        if code != OK or len(run) == 1:
            for number, call in enumerate(run, ident):
                self._tell(call, number, code, body)
            return
        offset, left, results = run_results(body, len(run))
        if left:
            self._calls[ident] = run
        for number, result in enumerate(results, offset):
            if type(result) is bytes:
                self._tell(run[number], ident + number, OK, result)
            else:
                self._tell(run[number], ident + number, *result)

    def _tell(self, call: Call, ident: int, code: int, body: Any) -> None:
        if call.state == DONE:
            return
        before = (call.state, call.deadline_us)
        call.on_reply(ident, code, body, self.fleet.queue.now_us)
        if (call.state, call.deadline_us) != before:
            self._go_on(call)

    def _on_lost(self, index: int) -> None:
        self._connections.pop(index, None)
        now_us = self.fleet.queue.now_us
        for ident, run in list(self._calls.items()):
            if self.core.where(run[0], self.node.workers_count) != index:
                continue
            del self._calls[ident]
            for number, call in enumerate(run, ident):
                if call.state != DONE and call.request_id == number:
                    call.on_lost(now_us)
                    self._go_on(call)

"""Simulated clients: sessions that retry as the real client does, and tell the checkers what they were promised.

This module does not know about faults or consensus. A command keeps its (client id, seq, issued at) over all attempts;
its outcome is known if any attempt is answered, or if every attempt was refused; otherwise it is *unknown* and may
take effect later, once.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import msgpack

from raftfleet.testing.clock import MILLISECOND_US
from raftfleet.testing.linearizability import Operation
from raftfleet.testing.shards import WALL_EPOCH_US

if TYPE_CHECKING:
    from raftfleet.testing.simulation import Simulation

OK = 0
COMMAND_FAILED = 1
QUERY_FAILED = 2
GROUP_GONE = 92
DISK_FULL = 21
NOT_APPLIED_CODES = (10, 11, 12, 18, 20, DISK_FULL, GROUP_GONE)
OUTCOME_UNKNOWN = 30
SESSION_EXPIRED = 31
NOT_LEADER = 90
DROPPED = 91
KNOWN_CODES = frozenset((OK, COMMAND_FAILED, *NOT_APPLIED_CODES, OUTCOME_UNKNOWN, SESSION_EXPIRED, NOT_LEADER, DROPPED))

KEYS_PER_GROUP = 4


class Call:
    """One operation of one client, over all its attempts."""

    __slots__ = (
        "attempt",
        "attempts_max",
        "called_us",
        "client",
        "data",
        "floor",
        "input",
        "is_command",
        "is_done",
        "is_stale",
        "key",
        "may_have_happened",
        "operation",
        "outcome",
        "seq",
        "uid",
    )

    def __init__(self, client: SimClient, operation: int, uid: int) -> None:
        self.client = client
        self.operation = operation
        self.uid = uid
        self.attempt = 0
        self.attempts_max = 4
        self.called_us = 0
        self.data = b""
        self.floor = 0
        self.input: tuple[Any, ...] = ()
        self.is_command = False
        self.is_stale = False
        self.is_done = False
        self.key = 0
        self.may_have_happened = False
        self.outcome = ""
        self.seq = 0


class Token:
    """Handed to the core with one attempt; must come back once, unless the instance dies."""

    __slots__ = ("attempt", "call", "instance", "is_answered", "taken_us")

    def __init__(self, call: Call, attempt: int, instance: int, taken_us: int) -> None:
        self.call = call
        self.attempt = attempt
        self.instance = instance
        self.taken_us = taken_us
        self.is_answered = False


class SimClient:
    """Does a burst of operations on one group, waits for all of them, thinks, does the next."""

    def __init__(self, simulation: Simulation, rng: random.Random) -> None:
        self._simulation = simulation
        self._rng = rng
        self.client_id = rng.getrandbits(128).to_bytes(16, "big")
        self.think_us_max: int = rng.choice(simulation.options.think_us)
        self._next_seq: dict[int, int] = {}
        self._unanswered: dict[int, dict[int, None]] = {}
        self._place_of: dict[int, int] = {}
        self._open_count = 0
        self.is_stopped = False

    def start(self) -> None:
        """Begin, after a first pause."""
        self._simulation.queue.after(int(self._rng.random() * self.think_us_max), self._burst)

    def _burst(self) -> None:
        simulation, rng = self._simulation, self._rng
        if self.is_stopped:
            return
        uids = simulation.group_uids
        uid = uids[int(rng.random() * len(uids))]
        if rng.random() < 0.01:  # A client that restarts: another session.
            self.client_id = rng.getrandbits(128).to_bytes(16, "big")
            self._next_seq.clear()
            self._unanswered.clear()
        count = 1 if rng.random() < 0.6 else 1 + int(rng.random() * 5)
        self._open_count = count
        for _ in range(count):
            self._begin(uid)

    def _begin(self, uid: int) -> None:
        rng = self._rng
        chance = rng.random()
        key = int(rng.random() * KEYS_PER_GROUP)
        query_share = self._simulation.options.query_share
        if chance < query_share:
            self.query(uid, key, is_stale=False)
            return
        chance = (chance - query_share) / (1 - query_share)
        if chance < 0.07:
            self.query(uid, key, is_stale=True)
        elif chance < 0.64:
            self.command(uid, "add", key, 1 + int(rng.random() * 9))
        elif chance < 0.81:
            self.command(uid, "set", key, int(rng.random() * 100))
        elif chance < 0.97:
            self.command(uid, "cas", key, [int(rng.random() * 20), int(rng.random() * 100)])
        else:
            self.command(uid, "fail", key, 0)

    def command(self, uid: int, kind: str, key: int, value: Any, attempts_max: int = 4) -> Call:
        """Begin a command."""
        simulation = self._simulation
        call = Call(self, simulation.next_operation(), uid)
        call.is_command = True
        call.key = key
        call.attempts_max = attempts_max
        call.input = (kind, *value) if isinstance(value, list) else (kind, value)
        call.seq = self._next_seq.get(uid, 1)
        self._next_seq[uid] = call.seq + 1
        unanswered = self._unanswered.setdefault(uid, {})
        unanswered[call.seq] = None
        acked = next(iter(unanswered)) - 1
        issued_us = WALL_EPOCH_US + simulation.queue.now_us
        arg = msgpack.packb([call.operation, kind, key, value, *self._padding()])
        call.data = msgpack.packb([self.client_id, call.seq, acked, issued_us, arg])
        self._call(call)
        return call

    def _padding(self) -> list[bytes]:
        """What makes commands as large as the options say."""
        size_bytes = self._simulation.options.pad_bytes
        return [self._rng.randbytes(size_bytes)] if size_bytes else []

    def query(self, uid: int, key: int, is_stale: bool, attempts_max: int = 4) -> Call:
        """Begin a query."""
        call = Call(self, self._simulation.next_operation(), uid)
        call.key = key
        call.attempts_max = attempts_max
        call.is_stale = is_stale
        call.input = ("get",)
        call.data = msgpack.packb(["get", key])
        self._call(call)
        return call

    def _call(self, call: Call) -> None:
        simulation = self._simulation
        call.called_us = simulation.queue.now_us
        call.floor = simulation.history.called(call.uid)
        self._attempt(call)

    def _attempt(self, call: Call) -> None:
        if call.is_done:
            return
        simulation = self._simulation
        call.attempt += 1
        place = self._place_of.get(call.uid, -1)
        if place < 0 or call.is_stale:
            places = simulation.places_of(call.uid)
            place = places[int(self._rng.random() * len(places))]
        simulation.client_sent(place, call, call.attempt)
        simulation.queue.after(simulation.client_timeout_us, self._timed_out, call, call.attempt)

    def _timed_out(self, call: Call, attempt: int) -> None:
        if call.is_done or call.attempt != attempt:
            return
        call.may_have_happened = True
        self._place_of.pop(call.uid, None)
        self._again(call, 0)

    def _again(self, call: Call, delay_us: int) -> None:
        if call.attempt >= call.attempts_max:
            self._done(call, "unknown" if call.may_have_happened else "refused")
        else:
            self._simulation.queue.after(delay_us, self._attempt, call)

    def answered(self, token: Token, place: int, code: int, body: Any) -> None:
        """An attempt was answered."""
        call = token.call
        if call.is_done:
            return
        if code == OK:
            self._place_of[call.uid] = place
            self._completed(call, body)
        elif code == COMMAND_FAILED and call.input[0] == "fail":
            self._done(call, "failed")
        elif code == SESSION_EXPIRED:
            self._done(call, "unknown")
        elif code in (OUTCOME_UNKNOWN, DROPPED):
            call.may_have_happened = True
            if token.attempt == call.attempt:
                self._again(call, 20 * MILLISECOND_US)
        elif code == NOT_LEADER:
            hint = self._simulation.place_of_instance(body[0])
            if hint < 0:
                self._place_of.pop(call.uid, None)
            else:
                self._place_of[call.uid] = hint
            if token.attempt == call.attempt:
                if hint >= 0 and self._rng.random() < 0.9:
                    call.attempts_max += 1 if call.attempts_max < 20 else 0
                    self._again(call, 0)
                else:
                    self._again(call, int(self._rng.random() * 300 * MILLISECOND_US))
        else:
            assert code in NOT_APPLIED_CODES, (code, body, call.input)
            self._place_of.pop(call.uid, None)
            if token.attempt == call.attempt:
                self._again(call, int(self._rng.random() * 300 * MILLISECOND_US))

    def _completed(self, call: Call, body: bytes) -> None:
        simulation = self._simulation
        version, chain, value = msgpack.unpackb(body)
        history = simulation.history
        if call.is_command:
            history.command_answered(call.uid, call.operation, call.floor, version, chain)
        elif call.is_stale:
            history.stale_query_answered(call.uid, version, chain)
        else:
            history.query_answered(call.uid, call.floor, version, chain)
        if not call.is_stale:
            simulation.operations.append(
                Operation(call.called_us, simulation.queue.now_us, call.input, value, (call.uid, call.key))
            )
        self._done(call, "ok")

    def _done(self, call: Call, outcome: str) -> None:
        simulation = self._simulation
        call.is_done = True
        call.outcome = outcome
        if simulation.tells_clients:
            simulation.tell(f"a client's {call.input} on key {call.key} of group {call.uid} ends: {outcome}")
        simulation.count(("command " if call.is_command else "stale query " if call.is_stale else "query ") + outcome)
        if call.is_command:
            self._unanswered.get(call.uid, {}).pop(call.seq, None)
            if outcome == "refused":
                simulation.history.refused(call.uid, call.operation)
            if outcome == "unknown" and call.input[0] != "fail":
                simulation.operations.append(Operation(call.called_us, None, call.input, None, (call.uid, call.key)))
        self._open_count -= 1
        if self._open_count == 0:
            simulation.queue.after(int(self._rng.random() * self.think_us_max), self._burst)

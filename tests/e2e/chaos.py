"""Faults for real nodes in network namespaces, clients that keep a history of it, and its judgement.

The history goes through the checkers of the simulations (:mod:`raftfleet.testing.checkers`,
:mod:`raftfleet.testing.linearizability`). They want what only a simulation has, a record of what every member applied;
here it is made afterwards, from the journal in the group's own state: the operations that took effect, in order.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import raftfleet
from raftfleet import errors
from raftfleet.testing import LocalFleetError
from raftfleet.testing.checkers import HistoryChecker
from raftfleet.testing.linearizability import Operation, SearchTooLarge, find_violation, register_model
from raftfleet.testing.model import RegistersMachine, Violation
from raftfleet.testing.namespaces import NamespaceFleet

KEYS = 6
UID = 1  # of a group in its own checker
THINK_S_MAX = 0.06
SETTLE_DEADLINE_S = 120.0


def now_us() -> int:
    return time.monotonic_ns() // 1000


@dataclass
class Event:
    """One call of one client."""

    group: str
    operation: int
    arg: list[Any]
    called_us: int
    answered_us: int = 0
    outcome: str = "unknown"  # "ok", "refused", "unknown"
    answer: list[Any] = field(default_factory=list)


class Clients:
    """Threads, each with a client of its own to one node; they stop at :meth:`finish`."""

    def __init__(self, fleet: NamespaceFleet, groups: list[str], count: int, seed: int) -> None:
        self.events: list[Event] = []
        self.strange: list[str] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._next = 0
        names = list(fleet.nodes)
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(fleet.nodes[names[number % len(names)]].run_dir, groups, random.Random(f"{seed} {number}")),
                name=f"client {number}",
            )
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def answered_count(self) -> int:
        with self._lock:
            return sum(event.outcome == "ok" for event in self.events)

    def finish(self) -> None:
        """Every thread ends its call and goes."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60.0)
            assert not thread.is_alive(), f"{thread.name} hangs"

    def _run(self, run_dir: Any, groups: list[str], rng: random.Random) -> None:
        client = None
        while not self._stop.is_set():
            try:
                client = client or raftfleet.connect(run_dir)
                self._one(client, rng.choice(groups), rng)
            except errors.NodeError:  # the node is down, and this client with it
                client = None
                self._stop.wait(0.2)
            except Exception as error:
                self.strange.append(repr(error))
                return
            self._stop.wait(rng.random() * THINK_S_MAX)
        if client is not None:
            client.close()

    def _one(self, client: raftfleet.Fleet, group: str, rng: random.Random) -> None:
        with self._lock:
            self._next += 1
            operation = self._next
        kind = rng.choice(("get", "get", "add", "add", "set", "cas"))
        key = rng.randrange(KEYS)
        value = {"add": rng.randrange(1, 10), "set": rng.randrange(100), "cas": [rng.randrange(9), rng.randrange(99)]}
        arg = ["get", key] if kind == "get" else [operation, kind, key, value[kind]]
        event = Event(group, operation, arg, now_us())
        options = {"timeout": rng.choice((0.3, 1.0)), "retry": rng.choice((0, 2)), "retry_interval": 0.2}
        with self._lock:
            self.events.append(event)
        try:
            call = client.query if kind == "get" else client.command
            event.answer = call(group, arg, **options)
            event.outcome = "ok"
        except errors.NotApplied as error:
            event.outcome = "refused"
            if isinstance(error, errors.NodeError):
                raise
        except errors.OutcomeUnknown:
            pass
        finally:
            event.answered_us = now_us()


class Chaos:
    """Draws faults and takes them back. Never loses what in-memory groups may not lose: one node's memory at a time."""

    def __init__(self, fleet: NamespaceFleet, rng: random.Random, *, durable: bool) -> None:
        self.fleet = fleet
        self.rng = rng
        self.durable = durable
        self.counts: dict[str, int] = {}
        self.story: list[str] = []
        self._began = time.monotonic()
        self._down: set[str] = set()
        self._paused: set[str] = set()
        self._has_cut = False

    def tell(self, text: str) -> None:
        self.story.append(f"{time.monotonic() - self._began:7.2f} s  {text}")

    def step(self) -> None:
        """One fault, or the end of one."""
        rng, fleet = self.rng, self.fleet
        if self._paused and rng.random() < 0.7:
            self._resume(rng.choice(sorted(self._paused)))
        elif self._down and rng.random() < 0.6:
            self._restart(rng.choice(sorted(self._down)))
        elif self._has_cut and rng.random() < 0.6:
            self._mend()
        else:
            kind = rng.choice(("unplug", "split", "pause", "kill node", "kill worker"))
            name = rng.choice(sorted(set(fleet.nodes) - self._down - self._paused))
            self._harm(kind, name)

    def _harm(self, kind: str, name: str) -> None:
        fleet = self.fleet
        loses_memory = kind.startswith("kill") and not self.durable
        if len(self._down | self._paused) >= 2 or (loses_memory and not self._is_whole()):
            return
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.tell(f"{kind} {name}")
        if kind == "unplug":
            fleet.unplug(name)
            self._has_cut = True
        elif kind == "split":
            others = [other for other in fleet.nodes if other != name]
            fleet.split(name, self.rng.choice(others))
            self._has_cut = True
        elif kind == "pause":
            fleet.pause_node(name)
            self._paused.add(name)
        elif kind == "kill node":
            fleet.kill_node(name, deadline_s=30.0)
            self._down.add(name)
        else:
            with contextlib.suppress(LocalFleetError, errors.RaftFleetError):  # it may be on its way up, or cut off
                fleet.kill_worker(name, 0)

    def _is_whole(self) -> bool:
        """Whether every group has all its members, so that one may lose its memory."""
        if self._down or self._paused or self._has_cut:
            return False
        try:
            asked = self.fleet.running()[0].name
            groups = self.fleet.groups(asked)
            own = self.fleet.call(asked, "group_status", {"name": "$fleet"})
        except errors.RaftFleetError:
            return False
        if any(member["role"] != "voter" or member["unresponsive"] for member in own["members"]):
            return False
        if len(own["members"]) != len(self.fleet.nodes):
            return False
        return all(len(group["members"]) == group["replicas"] and group["leader"] for group in groups.values())

    def _resume(self, name: str) -> None:
        self.tell(f"resume {name}")
        self.fleet.resume_node(name)
        self._paused.discard(name)

    def _restart(self, name: str) -> None:
        self.tell(f"restart {name}")
        self.fleet.restart_node(name, wait=False)
        self._down.discard(name)

    def _mend(self) -> None:
        self.tell("the network is whole")
        self.fleet.plug_all()
        self._has_cut = False

    def end(self) -> None:
        """Everything is taken back."""
        for name in sorted(self._paused):
            self._resume(name)
        self._mend()
        for name in sorted(self._down):
            self._restart(name)


def judge(events: list[Event], group: str, journal: list[int]) -> HistoryChecker:
    """Check all that clients of one group were told against the operations that took effect, in order.

    Raises:
        Violation, AssertionError: a promise was broken.
    """
    mine = [event for event in events if event.group == group]
    checker = HistoryChecker()
    machine = RegistersMachine(checker.record(UID))
    args = {event.operation: event.arg for event in mine}
    state = machine.new()
    for operation in journal:
        assert operation in args, f"operation {operation} took effect in {group}, and no client asked for it"
        _, state = machine.command(state, args[operation])
    moments = [(event.called_us, 0, event) for event in mine] + [(event.answered_us, 1, event) for event in mine]
    floors: dict[int, int] = {}
    for _, is_answer, event in sorted(moments, key=lambda row: (row[0], row[1], row[2].operation)):
        if not is_answer:
            floors[event.operation] = checker.called(UID)
        elif event.outcome == "ok":
            version, chain, _ = event.answer
            if event.arg[0] == "get":
                checker.query_answered(UID, floors[event.operation], version, chain)
            else:
                checker.command_answered(UID, event.operation, floors[event.operation], version, chain)
        elif event.outcome == "refused" and event.arg[0] != "get":
            checker.refused(UID, event.operation)
    checker.check_refused()
    checker.check_state(UID, {operation: version for version, operation in enumerate(journal, 1)}, group)
    _check_linearizable(mine, set(journal))
    return checker


def _check_linearizable(events: list[Event], took_effect: set[int]) -> None:
    history = []
    for event in events:
        is_query = event.arg[0] == "get"
        if event.outcome == "ok":
            answered_us: int | None = event.answered_us
        elif is_query or event.operation not in took_effect:
            continue
        else:
            answered_us = None
        if is_query:
            key, asked = event.arg[1], ("get",)
        else:
            _, kind, key, value = event.arg
            asked = (kind, *value) if isinstance(value, list) else (kind, value)  # type: ignore[assignment]
        output = event.answer[2] if event.outcome == "ok" else None
        history.append(Operation(event.called_us, answered_us, asked, output, key))
    try:
        wrong = find_violation(history, register_model())
    except SearchTooLarge:  # the versions, checked above, have given one order already
        return
    if wrong is not None:
        raise Violation(f"not linearizable: {wrong[-10:]}")

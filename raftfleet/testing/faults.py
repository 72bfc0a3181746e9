"""Your state machine in a fleet whose nodes die, lose messages and are cut off: :func:`check_under_faults`.

Each seed plays a whole simulated fleet (:class:`~raftfleet.testing.fleet.SimFleet`: production code, virtual time) in
which clients send your commands and queries while faults come and go, and then asks:

* Did any two replicas differ after the same command, in its result or in the dumped state? (A restored one counts.)
* Did a command that raised, or a query, change the state?
* Is the history that the clients saw linearizable, with the machine itself as the sequential model? That is: is there
  one order of all calls, in keeping with real time, in which a machine alone in the world gives these answers?
* Does the group serve again when the faults are over?

A failure says its seed, and the seed repeats it: the same faults at the same (virtual) microseconds.

The faults: a worker or a node killed, with its memory, and started again; a node cut off, wholly or in one direction;
messages lost, doubled, late and out of order; a node led out of the fleet and back. Never are so many members lost at
a time that the group could not know what it had acknowledged: groups in memory do not promise to survive that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack

from raftfleet import errors
from raftfleet.client.core import Call
from raftfleet.core.config import GroupConfig
from raftfleet.core.context import CommandContext
from raftfleet.machine import StateMachine
from raftfleet.testing.clock import SECOND_US
from raftfleet.testing.fleet import SimFleet, SimFleetOptions, SimNode
from raftfleet.testing.linearizability import Model, Operation, SearchTooLarge, find_violation
from raftfleet.testing.network import NetworkFaults
from raftfleet.testing.seeds import chosen_seeds

__all__ = ["FaultReport", "FaultsNotSurvived", "check_under_faults"]

Choice = Callable[[random.Random], Any] | Sequence[Any]
"""What to send: a function of a generator of random numbers, or arguments from which one is drawn each time."""

GROUP = "checked"
SPEC = "checked:Machine"
SEEDS = range(1, 21)
NODES = {"n1": "z1", "n2": "z2", "n3": "z3", "n4": "z1"}
CONFIG = GroupConfig(SPEC, log_entries_kept=8, divergence_check_entries=20)
"""A short log, so that members that were away need a snapshot: ``dump`` and ``load`` are tried too; and many checks."""

HEALED_S = 120.0
SHOWN_MAX = 12
LOSSY = NetworkFaults(loss=0.08, duplicate=0.05, reorder=0.1, hold=0.02, hold_us_max=SECOND_US)


class FaultsNotSurvived(AssertionError):
    """A promise was not kept under faults. The message names the seed that repeats it."""


@dataclass
class FaultReport:
    """What was played, over all seeds: ``str`` of it is one line.

    Attributes:
        virtual_s: seconds on the virtual clock.
        outcomes: calls by outcome: "ok", "raised", "not applied", "unknown".
        faults: by kind.
        snapshots: states that a member loaded.
    """

    seeds: int = 0
    virtual_s: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    snapshots: int = 0

    def __str__(self) -> str:
        calls = ", ".join(f"{count} {what}" for what, count in sorted(self.outcomes.items()))
        faults = ", ".join(f"{count} {what}" for what, count in sorted(self.faults.items()))
        return (
            f"{self.seeds} seeds, {self.virtual_s:.0f} virtual seconds; calls: {calls}; faults: {faults};"
            f" {self.snapshots} snapshots loaded"
        )


def check_under_faults(
    machine: type[StateMachine] | Callable[[], StateMachine],
    commands: Choice,
    *,
    queries: Choice = (),
    seeds: Iterable[int] = SEEDS,
    seconds: float = 15.0,
    clients: int = 3,
    nodes: Mapping[str, str] | None = None,
    config: GroupConfig | None = None,
) -> FaultReport:
    """Play the machine under faults, once for each seed; see the module's text for what is checked.

    Args:
        machine: makes a machine.
        commands: see :data:`Choice`. Keep the state small: the machine is asked for a dump after every command.
        queries: the same for ``query``; none by default.
        seeds: one play each. ``pytest --raftfleet-seed N`` plays that one alone.
        seconds: how long faults go on, in virtual time; a tenth of a real second or two each.
        clients: sessions, each with one call at a time.
        nodes: ``name -> zone``; at least three.
        config: of the group; its ``machine`` is of no meaning.

    Raises:
        FaultsNotSurvived: with the seed, what was seen, and what happened before.
    """
    report = FaultReport()
    for seed in chosen_seeds(seeds):
        play = _Play(seed, machine, commands, queries, dict(nodes or NODES), config or CONFIG)
        try:
            play.run(seconds, clients)
        except AssertionError as error:
            raise FaultsNotSurvived(
                f"with seed {seed}: {error}\nrepeat it with check_under_faults(…, seeds=[{seed}]), or"
                f" pytest --raftfleet-seed {seed}"
            ) from error
        play.add_to(report)
    return report


class _Record:
    """What replicas did, by place in the log; ``problems`` is what must not be."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.snapshot_count = 0
        self.context_of: dict[int, tuple[int, ...]] = {}
        self._seen: dict[tuple[int, int], tuple[int, tuple[str, bytes], bytes]] = {}

    def applied(
        self, context: CommandContext, operation: int, arg: Any, outcome: tuple[str, bytes], dump: bytes
    ) -> None:
        """A replica ran a command: the first one sets what all others must come to."""
        place = (context.index, context.position)
        first = self._seen.setdefault(place, (operation, outcome, dump))
        self.context_of.setdefault(operation, _facts(context))
        if first == (operation, outcome, dump):
            return
        what = "its result" if first[1] != outcome else "the dumped state after it"
        a, b = (first[1], outcome) if first[1] != outcome else (first[2], dump)
        self.problems.append(
            f"two replicas differ after the command {arg!r}: {what} is {_told(a)} on one and {_told(b)} on another."
            " check_deterministic() may tell why; a state that was restored must dump as it was dumped"
        )


def _facts(context: CommandContext) -> tuple[int, ...]:
    return (context.uid, context.index, context.position, context.term, context.time_us, context.version)


def _told(value: tuple[str, bytes] | bytes) -> str:
    if isinstance(value, tuple):
        return f"{value[0]} {msgpack.unpackb(value[1], strict_map_key=False)!r}"
    return repr(value)[:200]


class _Watched(StateMachine):
    """The user's machine, watched. Arguments of commands travel with the number of their operation."""

    def __init__(self, inner: StateMachine, record: _Record) -> None:
        self._inner = inner
        self._record = record
        self.context = inner.context = CommandContext()
        self.version = inner.version

    def new(self) -> Any:
        return self._inner.new()

    def command(self, state: Any, numbered: list[Any]) -> tuple[Any, Any]:
        operation, arg = numbered
        before = self._inner.dump(state)
        try:
            result, after = self._inner.command(state, arg)
            outcome = ("returned", bytes(msgpack.packb(result, use_bin_type=True)))
        except Exception as error:
            if self._inner.dump(state) != before:
                self._record.problems.append(
                    f"the command {arg!r} raised {type(error).__name__} after it had changed its state: check first,"
                    " change last"
                )
            told = ("raised", bytes(msgpack.packb([type(error).__name__, str(error)[:1000]])))
            self._record.applied(self.context, operation, arg, told, before)
            raise
        self._record.applied(self.context, operation, arg, outcome, self._inner.dump(after))
        return result, after

    def query(self, state: Any, arg: Any) -> Any:
        before = self._inner.dump(state)
        try:
            return self._inner.query(state, arg)
        finally:
            if self._inner.dump(state) != before:
                self._record.problems.append(f"the query {arg!r} changed the state: a query reads only")

    def dump(self, state: Any) -> bytes:
        return self._inner.dump(state)

    def load(self, data: bytes) -> Any:
        self._record.snapshot_count += 1
        return self._inner.load(data)

    def digest(self, state: Any) -> bytes:
        return self._inner.digest(state)

    def upgrade(self, state: Any, from_version: int) -> Any:
        return self._inner.upgrade(state, from_version)


class _Play:
    """One seed."""

    def __init__(
        self,
        seed: int,
        machine: Callable[[], StateMachine],
        commands: Choice,
        queries: Choice,
        nodes: dict[str, str],
        config: GroupConfig,
    ) -> None:
        self.fleet = SimFleet(seed, SimFleetOptions(may_diverge=True))  # what differs is told better here
        self.record = _Record()
        self.history: list[tuple[Operation, bool]] = []
        self.outcomes: dict[str, int] = {}
        self.faults: dict[str, int] = {}
        self._machine = machine
        self._choices = [_chooser(commands), _chooser(queries) if queries else None]
        self._nodes = nodes
        self._config = replace(config, machine=SPEC)
        self._rng = random.Random(f"faults {seed}")
        self._operation = 0
        self._is_over = False
        self._open_count = 0
        self.fleet.machines[SPEC] = lambda: _Watched(machine(), self.record)

    # ---------------------------------------------------------------- the play

    def run(self, seconds: float, clients: int) -> None:
        """All of it; AssertionError if something is wrong."""
        fleet = self.fleet
        fleet.start(self._nodes)
        fleet.add_group(GROUP, min(3, len(self._nodes)), self._config)
        names = list(self._nodes)
        for number in range(clients):
            self._think(fleet.client(names[number % len(names)]))
        end_us = fleet.queue.now_us + int(seconds * SECOND_US)
        while fleet.queue.now_us < end_us:
            self._one_fault()
            self._pass_time(0.3 + 1.5 * self._rng.random())
        self._heal()
        self._check_history()

    def _pass_time(self, seconds: float) -> None:
        self.fleet.run_for(seconds)
        self._check_record()

    def _check_record(self) -> None:
        if self.record.problems:
            raise AssertionError("\n".join([self.record.problems[0], *self._story()]))

    def _story(self) -> list[str]:
        return ["what happened before, by virtual seconds:", *(f"    {line}" for line in self.fleet.story[-SHOWN_MAX:])]

    def _heal(self) -> None:
        """Everything comes back; every call ends; the group serves."""
        fleet = self.fleet
        fleet.heal()
        self._is_over = True
        for name, node in fleet.nodes.items():
            if not node.is_up:
                fleet.restart_node(name)
            fleet.join(name, self._nodes[name])
        fleet.run_until(lambda: self._open_count == 0, "the end of every call", HEALED_S)
        fleet.wait_settled(HEALED_S)
        self._pass_time(1.0)
        for client in [fleet.client(name) for name in self._nodes]:
            self._call(client, is_last=True)
        fleet.run_until(lambda: self._open_count == 0, "an answer after healing", HEALED_S)
        self._check_record()
        if any(worker.host.counters.get("divergences") for worker in fleet.live_workers()):
            raise AssertionError(
                "equal members told each other different digests: does the machine's digest(state) depend on anything"
                " but the state?"
            )

    # ---------------------------------------------------------------- faults

    def _one_fault(self) -> None:
        """Begin a fault, or end the present ones."""
        rng, fleet = self._rng, self.fleet
        down = [name for name, node in fleet.nodes.items() if not node.is_up or not node.wants_in]
        if down and rng.random() < 0.6:
            self._bring_back(down[0])
        elif self._is_harmed() and rng.random() < 0.5:
            fleet.heal()
        elif rng.random() < 0.45:
            self._harm_network()
        elif not down and not fleet.unsettled():
            self._harm_node()

    def _is_harmed(self) -> bool:
        fleet = self.fleet
        places = [node.place for node in fleet.nodes.values()]
        return fleet.network.faults.total > 0 or any(not fleet.network.is_open(a, b) for a in places for b in places)

    def _bring_back(self, name: str) -> None:
        node = self.fleet.nodes[name]
        if not node.is_up:
            self.fleet.restart_node(name)
        else:
            self.fleet.tell(f"{name} joins again")
            self.fleet.join(name, self._nodes[name])

    def _harm_network(self) -> None:
        fleet, rng = self.fleet, self._rng
        name = rng.choice(list(fleet.nodes))
        kind = rng.choice(("cut", "one-way cut", "lossy network"))
        self._count(kind)
        if kind == "cut":
            fleet.cut_off(name)
        elif kind == "one-way cut":
            fleet.tell(f"nothing that {name} sends arrives")
            for other in fleet.nodes.values():
                if other.name != name:
                    fleet.network.cut(fleet.nodes[name].place, other.place)
        else:
            fleet.tell("messages are lost, doubled, late and out of order")
            fleet.network.faults = LOSSY

    def _harm_node(self) -> None:
        fleet, rng = self.fleet, self._rng
        node = fleet.nodes[rng.choice(list(fleet.nodes))]
        kind = rng.choice(("worker killed", "node killed", "node led out"))
        if kind == "node led out" and len(fleet.nodes) < 4:
            kind = "node killed"
        self._count(kind)
        if kind == "worker killed":
            fleet.kill_worker(node.name, rng.randrange(node.workers_count))
        elif kind == "node killed":
            fleet.kill_node(node.name)
        else:
            fleet.tell(f"{node.name} is deactivated")
            fleet.deactivate(node.name)
            node_is_out(fleet, node)

    def _count(self, kind: str) -> None:
        self.faults[kind] = self.faults.get(kind, 0) + 1

    # ---------------------------------------------------------------- clients

    def _think(self, client: Any) -> None:
        if not self._is_over:
            self.fleet.queue.after(int(self._rng.random() * 0.4 * SECOND_US), self._call, client)

    def _call(self, client: Any, *, is_last: bool = False) -> None:
        if self._is_over and not is_last:
            return
        rng = self._rng
        is_query = self._choices[1] is not None and rng.random() < 0.35
        chooser = self._choices[1 if is_query else 0]
        assert chooser is not None
        arg = chooser(rng)
        self._operation += 1
        self._open_count += 1
        operation, called_us = self._operation, self.fleet.queue.now_us
        options = {"timeout": rng.choice((0.3, 0.5, 2.0)), "retry": rng.choice((1, 3)), "retry_interval": 0.5}
        if is_last:
            options = {"timeout": 5.0, "retry": 5, "retry_interval": 0.5}

        def then(call: Call) -> None:
            self._open_count -= 1
            self._ended(call, operation, called_us, arg, is_query)
            if is_last and not (call.error is None or isinstance(call.error, errors.UserCodeFailed)):
                self.record.problems.append(f"the group does not serve after everything was healed: {call.error!r}")
            self._think(client)

        if is_query:
            client.query(GROUP, arg, then=then, **options)
        else:
            client.command(GROUP, [operation, arg], then=then, **options)

    def _ended(self, call: Call, operation: int, called_us: int, arg: Any, is_query: bool) -> None:
        error, now_us = call.error, self.fleet.queue.now_us
        packed = bytes(msgpack.packb(arg, use_bin_type=True))
        asked = ("query", packed) if is_query else ("command", packed, operation)
        if error is None:
            output = ("returned", bytes(msgpack.packb(call.result, use_bin_type=True)))
            self._outcome("ok", Operation(called_us, now_us, asked, output))
        elif isinstance(error, errors.UserCodeFailed):
            output = ("raised", bytes(msgpack.packb([error.exception_type, error.exception_message])))
            self._outcome("raised", Operation(called_us, now_us, asked, output))
        elif isinstance(error, errors.NotApplied) or is_query:
            self._outcome("not applied", None)
            if not is_query and operation in self.record.context_of:
                self.record.problems.append(f"the command {arg!r} was told to be not applied, and was: {error!r}")
        else:
            self._outcome("unknown", Operation(called_us, None, asked))

    def _outcome(self, kind: str, operation: Operation | None) -> None:
        self.outcomes[kind] = self.outcomes.get(kind, 0) + 1
        if operation is not None:
            self.history.append((operation, operation.return_us is not None))

    # ---------------------------------------------------------------- judgement

    def _check_history(self) -> None:
        """Linearizable, with a machine alone in the world as the model?"""
        contexts = self.record.context_of
        history = []
        for operation, is_known in self.history:
            if operation.input[0] == "query":
                history.append(operation)
                continue
            facts = contexts.get(operation.input[2])
            if facts is None:
                if is_known:
                    raise AssertionError(f"a command was answered, but no replica ran it: {_line(operation)}")
                continue  # nobody knows whether it happened: it did not
            asked = ("command", operation.input[1], facts)
            history.append(Operation(operation.call_us, operation.return_us, asked, operation.output))
        try:
            wrong = find_violation(history, _model(self._machine))
        except SearchTooLarge as error:
            raise AssertionError(f"{error}: give fewer seconds or clients") from None
        if wrong is not None:
            lines = [f"    {_line(operation)}" for operation in sorted(wrong, key=lambda o: o.call_us)[-SHOWN_MAX:]]
            raise AssertionError(
                "\n".join(["the answers fit no order of the calls; the last ones of those that do not:", *lines])
            )

    def add_to(self, report: FaultReport) -> None:
        """Count this play."""
        report.seeds += 1
        report.virtual_s += self.fleet.queue.now_us / SECOND_US
        report.snapshots += self.record.snapshot_count
        for total, mine in ((report.outcomes, self.outcomes), (report.faults, self.faults)):
            for kind, count in mine.items():
                total[kind] = total.get(kind, 0) + count


def node_is_out(fleet: SimFleet, node: SimNode) -> None:
    """Let time pass until a deactivated node has left, or some seconds have passed: the play goes on either way."""
    deadline_us = fleet.queue.now_us + 5 * SECOND_US
    while node.wants_in and fleet.queue.now_us < deadline_us:
        fleet.run_for(0.1)


def _chooser(choice: Choice) -> Callable[[random.Random], Any]:
    if callable(choice):
        return choice
    rows = list(choice)
    if not rows:
        raise ValueError("there is no command to send")
    return lambda rng: rng.choice(rows)


def _line(operation: Operation) -> str:
    asked = msgpack.unpackb(operation.input[1], strict_map_key=False)
    begin = f"{operation.call_us / SECOND_US:10.6f}"
    if operation.return_us is None:
        return f"{begin} to  (unknown)  {operation.input[0]} {asked!r}"
    return (
        f"{begin} to {operation.return_us / SECOND_US:10.6f}  {operation.input[0]} {asked!r} {_told(operation.output)}"
    )


def _model(machine: Callable[[], StateMachine]) -> Model:
    """The user's machine as a sequential object; its states are dumps, which can be compared."""
    alone = machine()
    alone.context = context = CommandContext()
    context.version = alone.version
    known: dict[tuple[bytes, Any], tuple[tuple[str, bytes], bytes]] = {}

    def step(state: bytes, asked: tuple[Any, ...]) -> tuple[tuple[str, bytes], bytes]:
        if (state, asked) not in known:
            known[state, asked] = run(state, asked)
        return known[state, asked]

    def run(state: bytes, asked: tuple[Any, ...]) -> tuple[tuple[str, bytes], bytes]:
        arg = msgpack.unpackb(asked[1], raw=False, strict_map_key=False)
        loaded = alone.load(state)
        try:
            if asked[0] == "query":
                result, after = alone.query(loaded, arg), loaded
            else:
                context.uid, context.index, context.position, context.term, context.time_us, context.version = asked[2]
                result, after = alone.command(loaded, arg)
            return ("returned", bytes(msgpack.packb(result, use_bin_type=True))), alone.dump(after)
        except Exception as error:
            return ("raised", bytes(msgpack.packb([type(error).__name__, str(error)[:1000]]))), state

    return Model(alone.dump(alone.new()), step)

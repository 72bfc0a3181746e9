"""The state machine that simulated groups run, and the record that tells whether its replicas ever disagreed.

This module does not know about shards or clocks. Every command that takes effect raises the group's *version* by one
and folds itself into a *chain* (a running checksum), so that the state after version v is a pure function of the
commands 1 to v. Every answer carries ``[version, chain, value]``. This makes the checks cheap and complete:

* two members that reach the same version with different chains broke state machine safety;
* an operation that takes effect twice is seen by its id (exactly-once);
* an answer whose version is below one that had been answered before the operation began is not linearizable.

Command arguments: ``[operation id, kind, key, value]``, and what pads them, with the kinds of
:func:`raftfleet.testing.linearizability.register_model` and ``"fail"``, which raises. Queries: ``["get", key]``.
"""

from __future__ import annotations

import zlib
from typing import Any

import msgpack

from raftfleet.core.context import CommandContext
from raftfleet.machine import StateMachine


class Violation(BaseException):
    """A promise of the design was seen broken.

    Not an ``Exception``, so that no handler for what may go wrong takes it. Still the core turns all that a state
    machine raises into a result: what is noticed in there is kept in :attr:`GroupRecord.found` too.
    """


class ModelState:
    """Changed in place, on purpose: a snapshot or a hook that kept only a reference would be noticed."""

    __slots__ = ("chain", "registers", "seen", "version")

    def __init__(self) -> None:
        self.version = 0
        self.chain = 0
        self.registers: dict[int, int] = {}
        self.seen: dict[int, int] = {}


class GroupRecord:
    """What all members of one group ever applied, by version.

    Attributes:
        chains: ``chains[v]`` = the chain after version v.
        operation_at: ``operation_at[v]`` = id of the operation that made version v (0 for version 0).
        applied_count: commands applied, over all members.
        found: the first violation that was noticed within a state machine.
    """

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.chains = [0]
        self.operation_at = [0]
        self.version_of: dict[int, int] = {}
        self.applied_count = 0
        self.found: Violation | None = None

    def violated(self, told: str) -> Violation:
        """A violation to be raised, and remembered."""
        violation = Violation(told)
        self.found = self.found or violation
        return violation

    def applied(self, operation: int, version: int, chain: int) -> None:
        """A member's state went to ``version``."""
        self.applied_count += 1
        if version < len(self.chains):
            if self.chains[version] != chain or self.operation_at[version] != operation:
                raise self.violated(
                    f"state machine safety: group {self.uid} version {version} is operation"
                    f" {self.operation_at[version]} on one member and {operation} on another"
                )
            return
        if version != len(self.chains):
            raise self.violated(
                f"state machine safety: group {self.uid}: version {version} applied before {len(self.chains)}"
            )
        if operation in self.version_of:
            raise self.violated(
                f"exactly-once: group {self.uid} operation {operation} took effect at version"
                f" {self.version_of[operation]} and again at {version}"
            )
        self.chains.append(chain)
        self.operation_at.append(operation)
        self.version_of[operation] = version

    def answered(self, version: int, chain: int) -> None:
        """An answer spoke of this state: it must be one that exists."""
        if not 0 <= version < len(self.chains) or self.chains[version] != chain:
            raise self.violated(f"answers: group {self.uid}: an answer from a state that never was (version {version})")

    def forget_after(self, version: int) -> None:
        """A repair of a lost majority gave up what came after ``version``: the one case in which it may be lost."""
        for operation in self.operation_at[version + 1 :]:
            del self.version_of[operation]
        del self.chains[version + 1 :]
        del self.operation_at[version + 1 :]


class RegistersMachine(StateMachine):
    """A few counters; see the module's text. ``record`` is shared by all members of the group in one simulation."""

    def __init__(self, record: GroupRecord) -> None:
        self.record = record
        self.context = CommandContext(record.uid)

    def new(self) -> ModelState:
        """All registers are 0."""
        return ModelState()

    def command(self, state: ModelState, arg: list[Any]) -> tuple[list[Any], ModelState]:
        """Apply; the answer is ``[version, chain, value]``."""
        operation, kind, key, value = arg[:4]
        if kind == "fail":
            raise ValueError(f"operation {operation} was told to fail")
        if operation in state.seen:
            raise self.record.violated(
                f"exactly-once: group {self.record.uid} operation {operation} reached the state twice"
            )
        registers = state.registers
        old = registers.get(key, 0)
        if kind == "add":
            result: Any = old + value
            registers[key] = result
        elif kind == "set":
            result = registers[key] = value
        else:
            assert kind == "cas", kind
            result = old == value[0]
            if result:
                registers[key] = value[1]
        state.version += 1
        # The entry's time is part of the state: a replica that takes its own clock instead is noticed (DESIGN 5.16).
        told = operation * 31 + registers.get(key, 0) + self.context.time_us * 7
        state.chain = (state.chain * 1_000_003 + told) & 0xFFFF_FFFF_FFFF
        state.seen[operation] = state.version
        self.record.applied(operation, state.version, state.chain)
        return [state.version, state.chain, result], state

    def query(self, state: ModelState, arg: list[Any]) -> list[Any]:
        """``[version, chain, value]``."""
        return [state.version, state.chain, state.registers.get(arg[1], 0)]

    def dump(self, state: ModelState) -> bytes:
        """All of it, with a checksum in front."""
        body = msgpack.packb([state.version, state.chain, list(state.registers.items()), list(state.seen.items())])
        return zlib.crc32(body).to_bytes(4, "big") + bytes(body)

    def load(self, data: bytes) -> ModelState:
        """The inverse; a snapshot that was put together wrongly is a violation, not a state."""
        if zlib.crc32(data[4:]).to_bytes(4, "big") != data[:4]:
            raise self.record.violated(f"snapshots: group {self.record.uid}: a snapshot arrived damaged")
        version, chain, registers, seen = msgpack.unpackb(data[4:])
        self.record.answered(version, chain)
        state = ModelState()
        state.version, state.chain = version, chain
        state.registers = dict(registers)
        state.seen = dict(seen)
        return state

"""Does a state machine do the same everywhere? Ask before a fleet does: :func:`check_deterministic`.

Replicas of a group run the same commands in different processes, on different machines, at different times. The check
does the same on one machine: it runs the commands in several interpreters that differ in what must not matter, and
compares results and dumped states after every command.

====================  ==========================================================================================
interpreter           what is different in it
====================  ==========================================================================================
the first             nothing; the others are compared with it
the others            hash seed (order of sets of str), wall clock, monotonic clock, random numbers, process id
the restored one      only that its state goes through ``dump`` and ``load`` after every command, as it does on a
                      member that is brought up to date by a snapshot
====================  ==========================================================================================

In all of them every use of a clock, of randomness, of the outside world and of ``id()`` by the machine is recorded with
the line that makes it (:mod:`raftfleet.testing.determinism_child`): it is reported even where results were equal by
luck. A command that raises must leave the dumped state as it was; that is looked at, too.

This module starts interpreters and knows nothing of Raft.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from raftfleet.machine import StateMachine

__all__ = ["NotDeterministic", "check_deterministic"]

DEADLINE_S = 60.0
SHOWN_BYTES = 160
USES_SHOWN_MAX = 10

ADVICE = {
    "clock": "take self.context.time, which the leader stamps on the command",
    "random": "take random.Random(self.context.seed())",
    "outside": "what a command needs must be in its argument or in the state",
    "id": "addresses differ between processes: number your objects in the state",
}


class NotDeterministic(AssertionError):
    """A state machine would make its replicas differ. The message says at which command and, where known, why."""


@dataclass(frozen=True)
class _Variant:
    """One interpreter: its hash seed, what its clocks and random numbers start from, whether states are reloaded."""

    hash_seed: int
    world: int
    is_restored: bool = False


@dataclass(frozen=True)
class _Use:
    """A call that the outcome must not depend on: ``what`` was called at ``where`` during step ``step``."""

    step: int
    kind: str
    what: str
    where: str


@dataclass(frozen=True)
class _Run:
    """What one interpreter tells. ``steps[0]`` is the new state, ``steps[i]`` what command i - 1 left.

    A step is ``(kind of outcome, packed result, dump, digest where the machine has its own)``.
    """

    variant: _Variant
    steps: list[tuple[str, bytes, bytes, bytes]]
    uses: list[_Use]
    faults: list[str]


def check_deterministic(
    machine: type[StateMachine] | str,
    commands: Iterable[Any],
    *,
    interpreters: int = 3,
    allow: Sequence[str] = (),
    deadline_s: float = DEADLINE_S,
) -> None:
    """Run ``commands`` in several interpreters and compare what came of each.

    Args:
        machine: the class, importable or at the top level of a file; or ``"module:Class"``.
        commands: arguments of ``command``, in order; what msgpack carries. Give enough of them, with strings: sets
            of one element have one order.
        interpreters: how many, at least two. Each has another hash seed.
        allow: calls that are known to do no harm, such as ``"time.perf_counter"`` for a statistic that is no part
            of the state.
        deadline_s: for each interpreter.

    Raises:
        NotDeterministic: what the machine did wrong, all of it.
        ValueError: the class cannot be found from another process, or a command cannot be packed.
    """
    if interpreters < 2:
        raise ValueError(f"interpreters is at least 2, not {interpreters}: one has nothing to be compared with")
    name, job = _job(machine, commands, allow)
    others = [_Variant(1 + number, 1 + number) for number in range(interpreters - 1)]
    first, restored, *runs = _run_all(job, [_Variant(0, 0), _Variant(0, 0, is_restored=True), *others], deadline_s)
    problems = [*first.faults]
    different = next((step for run in runs if (step := _first_difference(first, run)) is not None), None)
    if different is not None:
        problems += _describe(job, first, runs, deadline_s)
    elif (step := _first_difference(first, restored)) is not None:
        problems.append(
            f"{_step_name(job, step)}: a state that went through dump and load does not behave like the one that did"
            f" not\n{_both(first, restored, step)}"
        )
    problems += _uses([first, *runs])
    if problems:
        raise NotDeterministic("\n".join([f"{name} would make replicas differ:", *(f"* {line}" for line in problems)]))


def _job(machine: type[StateMachine] | str, commands: Iterable[Any], allow: Sequence[str]) -> tuple[str, bytes]:
    """What a child is told, on its standard input."""
    if isinstance(machine, str):
        module, _, qualified = machine.partition(":")
        file: str | None = None
    else:
        module, qualified = machine.__module__, machine.__qualname__
        if "<locals>" in qualified:
            raise ValueError(f"{qualified} is defined inside a function: another process cannot import it from there")
        file = getattr(sys.modules[module], "__file__", None)
    try:
        packed = [msgpack.packb(command, use_bin_type=True) for command in commands]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"a command is not what msgpack carries: {error}") from error
    path = [str(Path(entry or ".").resolve()) for entry in sys.path]
    job = [module, qualified, file, path, packed, list(allow)]
    return f"{module}:{qualified}", bytes(msgpack.packb(job, use_bin_type=True))


def _run_all(job: bytes, variants: Sequence[_Variant], deadline_s: float) -> list[_Run]:
    children = [_start(variant) for variant in variants]
    try:
        return [_read(variant, child, job, deadline_s) for variant, child in zip(variants, children, strict=True)]
    finally:
        for child in children:
            child.kill()
            child.communicate()


def _start(variant: _Variant) -> subprocess.Popen[bytes]:
    environ = {**os.environ, "PYTHONHASHSEED": str(variant.hash_seed)}
    options = json.dumps({"world": variant.world, "is_restored": variant.is_restored})
    return subprocess.Popen(
        [sys.executable, "-c", "from raftfleet.testing.determinism_child import main; main()", options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environ,
    )


def _read(variant: _Variant, child: subprocess.Popen[bytes], job: bytes, deadline_s: float) -> _Run:
    try:
        told, narrated = child.communicate(job, timeout=deadline_s)
    except subprocess.TimeoutExpired:
        raise NotDeterministic(f"the commands took longer than {deadline_s:g} s: give fewer, or deadline_s") from None
    if child.returncode != 0:
        raise ValueError(f"the machine could not be run: {narrated.decode(errors='replace').strip()}")
    steps, uses, faults = msgpack.unpackb(told, raw=False)
    return _Run(variant, [tuple(step) for step in steps], [_Use(*use) for use in uses], faults)


def _first_difference(a: _Run, b: _Run) -> int | None:
    return next((i for i, pair in enumerate(zip(a.steps, b.steps, strict=True)) if pair[0] != pair[1]), None)


def _describe(job: bytes, first: _Run, runs: Sequence[_Run], deadline_s: float) -> list[str]:
    """Where the first two that differ do so, and whether the hash seed alone is enough for it."""
    step, run = min(((_first_difference(first, run), run) for run in runs), key=lambda row: _or_never(row[0]))
    assert step is not None
    told = [f"{_step_name(job, step)} came out differently in two interpreters\n{_both(first, run, step)}"]
    hashed = [_Variant(run.variant.hash_seed, first.variant.world) for run in runs]
    if any(_first_difference(first, again) is not None for again in _run_all(job, hashed, deadline_s)):
        told.append(
            "it differs where nothing but the hash seed does: it depends on the order of a set, on hash() of a str or"
            " bytes, or on an address (id(), the repr of an object). Sort what comes out of a set, in dump too"
        )
    return told


def _or_never(step: int | None) -> int:
    return sys.maxsize if step is None else step


def _step_name(job: bytes, step: int) -> str:
    if step == 0:
        return "the new state"
    command = msgpack.unpackb(job, raw=False)[4][step - 1]
    return f"command {step - 1}, {_short(repr(msgpack.unpackb(command, raw=False, strict_map_key=False)))},"


def _both(a: _Run, b: _Run, step: int) -> str:
    return "\n".join(f"    {_outcome(run.steps[step])}" for run in (a, b))


def _outcome(step: tuple[str, bytes, bytes, bytes]) -> str:
    kind, result, state, digest = step
    try:
        told = repr(msgpack.unpackb(result, raw=False, strict_map_key=False))
    except Exception:
        told = repr(result)
    return f"{kind} {_short(told)}, state {_short(repr(state))}" + (f", digest {digest.hex()[:32]}" if digest else "")


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_BYTES else f"{text[:SHOWN_BYTES]}… ({len(text)} characters)"


def _uses(runs: Sequence[_Run]) -> list[str]:
    """One line for each place that asks what it must not ask."""
    seen = {(use.kind, use.what, use.where): None for run in runs for use in run.uses}
    lines = [f"{where} calls {what}: {ADVICE[kind]}" for kind, what, where in seen]
    more = len(lines) - USES_SHOWN_MAX
    return lines[:USES_SHOWN_MAX] + ([f"and {more} more places"] if more > 0 else [])

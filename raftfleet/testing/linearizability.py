"""Is a history of operations linearizable? A search after Wing & Gong with the memoisation of Lowe and of porcupine.

This module knows nothing of Raft: it is given operations, each with the moment it was called, the moment it was
answered (or None: no answer came) and a sequential model, and looks for one order of all answered operations, and of
any of the unanswered ones, that the model accepts and that keeps real time: if A was answered before B was called, A
comes before B.

An operation without an answer is *unknown*: it may take effect at any moment after its call, or never. (A clear
refusal is no operation at all: leave it out of the history.)

The search keeps the set of operations that are placed as the bits of one int. Having once failed from a
(placed, state) pair it does not try it again. Among the operations that could come next it tries those that must come
soonest first and the unknown ones last: a valid history is then found with little backtracking.

``partition`` splits a history by key: a history of independent objects is linearizable if each object's is
(Herlihy & Wing's locality), and many small searches are far quicker than one large one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

STEPS_MAX = 2_000_000
"""Steps after which a search gives up rather than run for hours: about ten seconds."""


class SearchTooLarge(Exception):
    """The search took more steps than allowed: the history is neither shown right nor wrong."""


@dataclass(frozen=True)
class Operation:
    """One call by one client.

    Attributes:
        call_us: when it was made.
        return_us: when it was answered; None: unknown.
        input: what was asked, in the model's terms.
        output: what was answered; of no meaning if unknown.
        key: which independent object it concerns.
    """

    call_us: int
    return_us: int | None
    input: Any
    output: Any = None
    key: Hashable = None


@dataclass(frozen=True)
class Model:
    """A sequential object.

    Attributes:
        initial: its first state (hashable).
        step: ``step(state, input) -> (output, next state)``.
        matches: whether an answer seen is the one the model gives.
    """

    initial: Hashable
    step: Callable[[Any, Any], tuple[Any, Hashable]]
    matches: Callable[[Any, Any], bool] = lambda expected, seen: bool(expected == seen)


def partition(history: Iterable[Operation]) -> dict[Hashable, list[Operation]]:
    """The history of each key, in the order given."""
    parts: dict[Hashable, list[Operation]] = {}
    for operation in history:
        parts.setdefault(operation.key, []).append(operation)
    return parts


def find_violation(history: Iterable[Operation], model: Model, steps_max: int = STEPS_MAX) -> list[Operation] | None:
    """None if every key's history is linearizable, else the shortest prefix (by answers) that is not.

    Raises:
        SearchTooLarge: a key's search took more than ``steps_max`` steps.
    """
    for operations in partition(history).values():
        if linearize(operations, model, steps_max) is None:
            return _shortest_wrong_prefix(operations, model, steps_max)
    return None


def is_linearizable(history: Iterable[Operation], model: Model, steps_max: int = STEPS_MAX) -> bool:
    """Whether every key's history is linearizable."""
    return all(linearize(part, model, steps_max) is not None for part in partition(history).values())


def linearize(operations: Sequence[Operation], model: Model, steps_max: int = STEPS_MAX) -> list[Operation] | None:
    """An order that explains the history of one object (unknown ones without effect are left out), or None."""
    never = 1 << 62
    known = [o for o in operations if o.return_us is not None]
    unknown = [o for o in operations if o.return_us is None]
    order = sorted(known, key=lambda o: (o.return_us, o.call_us)) + sorted(unknown, key=lambda o: o.call_us)
    calls = [o.call_us for o in order]
    returns = [never if o.return_us is None else o.return_us for o in order]
    count, known_count = len(order), len(known)
    all_known = (1 << known_count) - 1
    step, matches = model.step, model.matches

    # A frame of the search: what is placed, the state, the candidates left to try, and how it was reached.
    placed, state = 0, model.initial
    failed: set[tuple[int, Hashable]] = set()
    path: list[int] = []
    stack: list[tuple[int, Any, list[int]]] = []
    candidates = _candidates(placed, 0, known_count, count, calls, returns)
    steps = 0
    while placed & all_known != all_known:
        advanced = False
        while candidates:
            index = candidates.pop()
            steps += 1
            if steps > steps_max:
                raise SearchTooLarge(f"{count} operations: no answer after {steps_max} steps")
            expected, next_state = step(state, order[index].input)
            if index < known_count:
                if not matches(expected, order[index].output):
                    continue
            elif next_state == state:
                continue  # Without effect it explains nothing: placing it is as good as leaving it out.
            next_placed = placed | 1 << index
            if (next_placed, next_state) in failed:
                continue
            stack.append((placed, state, candidates))
            path.append(index)
            placed, state = next_placed, next_state
            first = _first_zero(placed)
            candidates = _candidates(placed, first, known_count, count, calls, returns)
            advanced = True
            break
        if not advanced:
            failed.add((placed, state))
            if not stack:
                return None
            placed, state, candidates = stack.pop()
            path.pop()
    return [order[index] for index in path]


def _first_zero(bits: int) -> int:
    return (~bits & (bits + 1)).bit_length() - 1


def _candidates(
    placed: int, first: int, known_count: int, count: int, calls: list[int], returns: list[int]
) -> list[int]:
    """Operations that may come next, the one to try first at the end.

    ``order`` is sorted by return, so the first unplaced one bounds all others: what was called after its return
    cannot come before it.
    """
    if first >= known_count:
        return []
    bound = returns[first]
    found = [first]
    for index in range(first + 1, count):
        if not placed >> index & 1 and calls[index] <= bound:
            found.append(index)
    found.reverse()
    return found


def _shortest_wrong_prefix(operations: Sequence[Operation], model: Model, steps_max: int) -> list[Operation]:
    """Cut a wrong history after each answer in turn: the first cut that is wrong is what a person wants to read."""
    moments = sorted({o.return_us for o in operations if o.return_us is not None})
    low, high = 0, len(moments) - 1
    while low < high:
        middle = (low + high) // 2
        if linearize(_cut(operations, moments[middle]), model, steps_max) is None:
            high = middle
        else:
            low = middle + 1
    return _cut(operations, moments[low])


def _cut(operations: Sequence[Operation], moment_us: int) -> list[Operation]:
    """The history as it stood at ``moment_us``: later answers are not known yet, later calls not made."""
    result = []
    for o in operations:
        if o.call_us > moment_us:
            continue
        if o.return_us is not None and o.return_us > moment_us:
            o = Operation(o.call_us, None, o.input, None, o.key)
        result.append(o)
    return result


def register_model() -> Model:
    """A register: ``("get",)``, ``("set", v)``, ``("add", n)`` give the (new) value, ``("cas", old, new)`` a bool."""
    return Model(0, _register_step)


def _register_step(state: int, request: tuple[Any, ...]) -> tuple[Any, int]:
    kind = request[0]
    if kind == "get":
        return state, state
    if kind == "set":
        return request[1], request[1]
    if kind == "add":
        return state + request[1], state + request[1]
    assert kind == "cas", request
    return (True, request[2]) if state == request[1] else (False, state)

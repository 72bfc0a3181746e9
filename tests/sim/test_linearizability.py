"""The history search itself: it accepts what is linearizable and refuses what is not."""

from __future__ import annotations

import itertools
import random

import pytest

from raftfleet.testing.linearizability import (
    Operation,
    SearchTooLarge,
    find_violation,
    is_linearizable,
    linearize,
    register_model,
)

MODEL = register_model()


def op(call: int, answer: int | None, *request: object, out: object = None, key: object = 0) -> Operation:
    return Operation(call, answer, request, out, key)


def test_an_empty_history_is_linearizable() -> None:
    assert is_linearizable([], MODEL)


def test_operations_one_after_another_must_follow_the_model() -> None:
    assert is_linearizable([op(0, 1, "set", 5, out=5), op(2, 3, "get", out=5), op(4, 5, "add", 2, out=7)], MODEL)


def test_a_read_of_a_value_overwritten_before_it_began_is_refused() -> None:
    history = [op(0, 1, "set", 1, out=1), op(2, 3, "set", 2, out=2), op(4, 5, "get", out=1)]
    assert not is_linearizable(history, MODEL)


def test_a_read_that_overlaps_a_write_may_see_either_value() -> None:
    for seen in (1, 2):
        history = [op(0, 1, "set", 1, out=1), op(2, 9, "set", 2, out=2), op(4, 5, "get", out=seen)]
        assert is_linearizable(history, MODEL)


def test_two_reads_during_a_write_may_not_go_back_from_new_to_old() -> None:
    write = [op(0, 1, "set", 1, out=1), op(2, 9, "set", 2, out=2)]
    assert is_linearizable([*write, op(3, 4, "get", out=1), op(5, 6, "get", out=2)], MODEL)
    assert not is_linearizable([*write, op(3, 4, "get", out=2), op(5, 6, "get", out=1)], MODEL)


def test_an_increment_that_ran_twice_is_refused() -> None:
    assert not is_linearizable([op(0, 1, "add", 1, out=1), op(2, 3, "get", out=2)], MODEL)


def test_an_acknowledged_write_that_is_lost_is_refused() -> None:
    assert not is_linearizable([op(0, 1, "add", 1, out=1), op(2, 3, "get", out=0)], MODEL)


def test_two_concurrent_increments_may_not_both_return_one() -> None:
    assert not is_linearizable([op(0, 5, "add", 1, out=1), op(0, 5, "add", 1, out=1)], MODEL)
    assert is_linearizable([op(0, 5, "add", 1, out=1), op(0, 5, "add", 1, out=2)], MODEL)


def test_an_unknown_operation_may_take_effect_or_not() -> None:
    unknown = op(0, None, "set", 7)
    assert is_linearizable([unknown, op(2, 3, "get", out=0)], MODEL)
    assert is_linearizable([unknown, op(2, 3, "get", out=7)], MODEL)


def test_an_unknown_operation_may_take_effect_long_after_its_call() -> None:
    history = [op(0, None, "set", 7), op(2, 3, "get", out=0), op(100, 101, "get", out=7)]
    assert is_linearizable(history, MODEL)


def test_an_unknown_operation_takes_effect_at_most_once_and_never_before_its_call() -> None:
    assert not is_linearizable([op(5, None, "set", 7), op(2, 3, "get", out=7)], MODEL)
    assert not is_linearizable([op(0, None, "add", 1), op(2, 3, "get", out=2)], MODEL)
    taken_back = [op(0, None, "set", 7), op(2, 3, "get", out=7), op(4, 5, "get", out=0)]
    assert not is_linearizable(taken_back, MODEL)


def test_a_compare_and_swap_that_says_yes_needs_the_value_it_named() -> None:
    assert is_linearizable([op(0, 1, "cas", 0, 3, out=True), op(2, 3, "get", out=3)], MODEL)
    assert not is_linearizable([op(0, 1, "cas", 1, 3, out=True)], MODEL)
    assert is_linearizable([op(0, 1, "cas", 1, 3, out=False), op(2, 3, "get", out=0)], MODEL)


def test_keys_are_independent_and_one_wrong_key_spoils_the_history() -> None:
    good = [op(0, 1, "set", 1, out=1, key="a"), op(2, 3, "get", out=0, key="b")]
    assert is_linearizable(good, MODEL)
    assert find_violation(good, MODEL) is None
    wrong = [*good, op(4, 5, "get", out=9, key="b"), op(6, 7, "get", out=9, key="b")]
    assert find_violation(wrong, MODEL) == [good[1], wrong[2]]


def test_the_order_found_keeps_real_time_and_the_model() -> None:
    history = [op(0, 9, "set", 4, out=4), op(1, 2, "get", out=0), op(3, 4, "get", out=4), op(0, None, "set", 8)]
    order = linearize(history, MODEL)
    assert order == [history[1], history[0], history[2]]


def test_a_search_that_grows_beyond_its_bound_says_so() -> None:
    history = [op(0, 100, "add", 1 << i, out=-1) for i in range(3)]
    history += [op(0, None, "add", 1 << i) for i in range(20)]
    with pytest.raises(SearchTooLarge):
        linearize([*history, op(0, 100, "get", out=-5)], MODEL, steps_max=1000)


def _brute_force(history: list[Operation]) -> bool:
    """Every order of every subset that holds all answered operations."""
    known = [o for o in history if o.return_us is not None]
    unknown = [o for o in history if o.return_us is None]
    for count in range(len(unknown) + 1):
        for chosen in itertools.combinations(unknown, count):
            for order in itertools.permutations([*known, *chosen]):
                if _explains(order):
                    return True
    return False


def _explains(order: tuple[Operation, ...]) -> bool:
    for i, later in enumerate(order):
        for earlier in order[:i]:
            if later.return_us is not None and later.return_us < earlier.call_us:
                return False
    state = 0
    for o in order:
        expected, state = MODEL.step(state, o.input)
        if o.return_us is not None and expected != o.output:
            return False
    return True


@pytest.mark.parametrize("seed", range(20))
def test_the_search_agrees_with_trying_every_order(seed: int) -> None:
    rng = random.Random(seed)
    verdicts = set()
    for _ in range(60):
        history = []
        for _ in range(rng.randrange(1, 6)):
            call = rng.randrange(10)
            answer = None if rng.random() < 0.25 else call + rng.randrange(1, 6)
            kind = rng.choice(("get", "set", "add", "cas"))
            if kind == "get":
                history.append(op(call, answer, "get", out=rng.randrange(3)))
            elif kind == "set":
                value = rng.randrange(3)
                history.append(op(call, answer, "set", value, out=value))
            elif kind == "add":
                history.append(op(call, answer, "add", 1, out=rng.randrange(1, 4)))
            else:
                history.append(op(call, answer, "cas", rng.randrange(3), rng.randrange(3), out=rng.random() < 0.5))
        verdict = is_linearizable(history, MODEL)
        assert verdict == _brute_force(history), history
        verdicts.add(verdict)
    assert verdicts == {True, False}

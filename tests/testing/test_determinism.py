"""``check_deterministic`` passes what is right and tells what is wrong, with the line that does it."""

from __future__ import annotations

from typing import Any

import pytest
from testing import machines_to_check as machines

import raftfleet
from raftfleet.testing import NotDeterministic, check_deterministic

WORDS = ["a", "b", "c", "delta", "epsilon", "zeta", "eta", "theta", 7, "roll", "clear", "iota"]


def refusal(machine: Any, commands: list[Any] = WORDS, **options: Any) -> str:
    with pytest.raises(NotDeterministic) as caught:
        check_deterministic(machine, commands, **options)
    return str(caught.value)


def test_a_machine_that_sorts_its_set_and_asks_its_context_passes() -> None:
    check_deterministic(machines.Tags, WORDS)


def test_a_shipped_machine_is_found_by_its_name() -> None:
    check_deterministic("raftfleet.testing.machines:KeyValue", [["put", "a", 1], ["add", "a", 2], "nonsense"])


@pytest.mark.parametrize("machine", [machines.SetOrder, machines.SetOrderInDump])
def test_the_order_of_a_set_is_noticed_and_told_to_be_that(machine: Any) -> None:
    told = refusal(machine, [word for word in WORDS if isinstance(word, str)])
    assert "the hash seed" in told
    assert "sort" in told.lower()


@pytest.mark.parametrize(
    ("machine", "call", "advice"),
    [
        (machines.Clock, "time.time", "self.context.time"),
        (machines.Today, "datetime.now", "self.context.time"),
        (machines.Dice, "random.choice", "self.context.seed()"),
        (machines.UnseededRandom, "random.Random() without a seed", "self.context.seed()"),
        (machines.Uuids, "uuid.uuid4", "self.context.seed()"),
        (machines.Process, "os.getpid", "in its argument or in the state"),
    ],
)
def test_what_differs_is_told_with_the_call_that_makes_it_differ(machine: Any, call: str, advice: str) -> None:
    told = refusal(machine)
    assert "came out differently" in told
    assert f"in command calls {call}: " in told
    assert "machines_to_check.py:" in told
    assert advice in told


@pytest.mark.parametrize(
    ("machine", "call"),
    [(machines.QuietClock, "time.monotonic"), (machines.Files, "open"), (machines.Address, "id()")],
)
def test_a_forbidden_call_is_told_even_where_results_are_equal(machine: Any, call: str) -> None:
    assert f"in command calls {call}: " in refusal(machine, ["a", "b"])


def test_a_digest_of_its_own_is_compared_as_well() -> None:
    told = refusal(machines.WrongDigest, ["a"])
    assert "the new state came out differently" in told and ", digest " in told
    assert "in digest calls random.randbytes" in told


def test_a_call_that_is_allowed_is_not_told() -> None:
    check_deterministic(machines.QuietClock, ["a", "b"], allow=["time.monotonic"])


def test_a_command_that_raises_half_way_through_its_change_is_told() -> None:
    told = refusal(machines.HalfDone, ["a", "b"])
    assert "command 1, 'b', raised ValueError after it had changed its state" in told


def test_a_state_that_does_not_survive_dump_and_load_is_told() -> None:
    assert "a state that went through dump and load" in refusal(machines.Forgetful, ["a", "b"])


def test_a_machine_that_cannot_be_run_is_an_error_of_the_call() -> None:
    with pytest.raises(ValueError, match="not today"):
        check_deterministic(machines.Grumpy, [])
    with pytest.raises(ValueError, match="No module named 'nowhere'"):
        check_deterministic("nowhere:Machine", [])


def test_a_class_inside_a_function_is_refused_with_the_reason() -> None:
    class Inside(raftfleet.StateMachine):
        pass

    with pytest.raises(ValueError, match="defined inside a function"):
        check_deterministic(Inside, [])


def test_one_interpreter_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        check_deterministic(machines.Tags, [], interpreters=1)


def test_a_command_that_msgpack_does_not_carry_is_refused() -> None:
    with pytest.raises(ValueError, match="msgpack"):
        check_deterministic(machines.Tags, [object()])


def test_a_command_that_never_ends_is_stopped_and_told() -> None:
    assert "longer than" in refusal(machines.Sleepless, ["a"], deadline_s=1.0)

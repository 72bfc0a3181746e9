"""The state machines that ship with raftfleet and its examples, without any node."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import raftfleet.machine as machine_module
from raftfleet.machine import PIECE_BYTES, CommandContext, StateMachine
from raftfleet.testing.machines import Echo, JustAnInt, KeyValue

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


class Alone:
    """A state machine with its state, as one member has it."""

    def __init__(self, machine: StateMachine) -> None:
        self.machine = machine
        self.state = machine.new()

    def command(self, arg: Any, time_us: int = 0) -> Any:
        self.machine.context = CommandContext()
        self.machine.context.time_us = time_us
        result, self.state = self.machine.command(self.state, arg)
        return result

    def query(self, arg: Any) -> Any:
        return self.machine.query(self.state, arg)


def test_just_an_int_returns_what_was_before() -> None:
    number = Alone(JustAnInt())
    assert [number.command(arg) for arg in ("inc", "inc", ["set", 9], "inc")] == [0, 1, 2, 9]
    assert number.query("get") == 10


def test_key_value_puts_adds_and_deletes() -> None:
    bag = Alone(KeyValue())
    assert bag.command(["put", "a", [1]]) is None
    assert bag.command(["put", "a", 2]) == [1]
    assert bag.command(["add", "n", 5]) == 5
    assert bag.command(["add", "n", -7]) == -2
    assert bag.query(["keys"]) == ["a", "n"]
    assert bag.command(["delete", "a"]) == 2
    assert (bag.query(["get", "a"]), bag.query(["get", "n"]), bag.query(["size"])) == (None, -2, 1)


def test_key_value_that_raises_changes_nothing() -> None:
    bag = Alone(KeyValue())
    bag.command(["put", "text", "abc"])
    bag.command(["put", "most", (1 << 63) - 1])
    before = dict(bag.state)
    for arg, error in ((["add", "text", 1], TypeError), (["add", "most", 1], OverflowError), ("what", ValueError)):
        with pytest.raises(error):
            bag.command(arg)
    assert bag.state == before


def test_echo_returns_its_argument() -> None:
    assert Alone(Echo()).command(["x"]) == ["x"]


@pytest.mark.parametrize("machine", [JustAnInt(), KeyValue(), Echo()], ids=lambda machine: type(machine).__name__)
def test_what_a_machine_does_not_know_it_refuses_or_echoes(machine: StateMachine) -> None:
    if isinstance(machine, Echo):
        return
    with pytest.raises(ValueError):
        machine.command(machine.new(), ["no such", "command"])
    with pytest.raises(ValueError):
        machine.query(machine.new(), ["no such query"])


@pytest.fixture
def locks() -> Alone:
    spec = importlib.util.spec_from_file_location("lock_service", EXAMPLES / "lock_service.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Alone(module.LockService())


def test_a_lock_is_held_until_it_is_released(locks: Alone) -> None:
    first = locks.command(["acquire", "door", "ann", 1000], time_us=0)
    assert first == {"token": 1, "until_us": 1_000_000}
    assert locks.command(["acquire", "door", "bob", 1000], time_us=999_999) is None
    assert locks.query(["holder", "door"]) == "ann"
    assert locks.command(["release", "door", 99]) is False
    assert locks.command(["release", "door", 1]) is True
    assert locks.query(["count"]) == 0


def test_a_lease_that_ran_out_gives_way_to_a_higher_token(locks: Alone) -> None:
    locks.command(["acquire", "door", "ann", 1000], time_us=0)
    second = locks.command(["acquire", "door", "bob", 1000], time_us=1_000_000)
    assert second["token"] == 2
    assert locks.command(["release", "door", 1]) is False, "ann's token is fenced off"


def test_a_renewed_lease_keeps_its_token(locks: Alone) -> None:
    locks.command(["acquire", "door", "ann", 1000], time_us=0)
    renewed = locks.command(["acquire", "door", "ann", 1000], time_us=500_000)
    assert renewed == {"token": 1, "until_us": 1_500_000}
    assert locks.command(["acquire", "gate", "bob", 1000], time_us=500_000)["token"] == 2


def test_a_lock_command_that_makes_no_sense_changes_nothing(locks: Alone) -> None:
    before = locks.state
    for arg in (["acquire", "door", "ann", 0], ["acquire", "door"], "release", ["release", "door", "one"]):
        with pytest.raises(ValueError):
            locks.command(arg)
    assert locks.state is before


# -- large states ------------------------------------------------------------------------------------------------------


def large() -> dict[Any, Any]:
    return {
        "one": b"1" * 3 * PIECE_BYTES,
        "many": [[number, str(number), {"n": None}] for number in range(40_000)],
        7: "\u00e4" * PIECE_BYTES,
    }


def test_a_large_state_is_loaded_as_a_small_one_is() -> None:
    machine = KeyValue()
    state = large()
    assert machine.load(StateMachine.dump(machine, state)) == state


def test_python_runs_between_the_pieces_of_a_large_state(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = machine_module._Pieces.read
    monkeypatch.setattr(
        machine_module._Pieces, "read", lambda pieces, count: (reads.append(count), read(pieces, count))[1]
    )
    data = StateMachine.dump(KeyValue(), large())
    StateMachine.load(KeyValue(), data)
    assert len(reads) >= len(data) // PIECE_BYTES, "signals are handled there"


@pytest.mark.parametrize("bad", [lambda data: data[:-1], lambda data: data + b"\0"])
def test_a_large_state_that_is_cut_off_or_too_long_is_refused(bad: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ValueError, match="state"):
        StateMachine.load(KeyValue(), bad(StateMachine.dump(KeyValue(), large())))

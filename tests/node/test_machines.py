"""Importing users' machines and hooks: what is accepted, and what their code cannot do to the worker."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raftfleet.core.config import GroupConfig
from raftfleet.node.machines import MachineLoader

APP = """
import raftfleet


class Machine(raftfleet.StateMachine):
    def command(self, arg):
        return arg


class Hook(raftfleet.LeaderHook):
    pass


class Both(Machine, raftfleet.LeaderHook):
    pass


class Leaving(Machine):
    def __init__(self):
        raise SystemExit(3)


class Interrupted(raftfleet.LeaderHook):
    def __init__(self):
        raise KeyboardInterrupt


class Failing(Machine):
    def __init__(self):
        raise LookupError("no such thing")
"""


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MachineLoader]:
    """A loader for ``loader_app``, as above, and ``loader_leaving``, which cannot be imported."""
    (tmp_path / "loader_app.py").write_text(APP)
    (tmp_path / "loader_leaving.py").write_text("import sys\nsys.exit('not today')\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield MachineLoader([tmp_path])
    for name in ("loader_app", "loader_leaving"):
        sys.modules.pop(name, None)


def config(machine: str, hook: str | None = None) -> GroupConfig:
    return GroupConfig(f"loader_app:{machine}", hook=hook and f"loader_app:{hook}")


def test_a_machine_and_a_hook_are_new_at_every_call(loader: MachineLoader) -> None:
    first, second = loader(config("Machine", "Hook")), loader(config("Machine", "Hook"))
    assert [type(made).__name__ for made in first] == ["Machine", "Hook"]
    assert first[0] is not second[0] and first[1] is not second[1]
    assert loader(config("Machine"))[1] is None


def test_a_machine_is_no_hook_even_where_it_was_loaded_as_a_machine_before(loader: MachineLoader) -> None:
    loader(config("Machine"))
    for _ in range(2):
        with pytest.raises(TypeError, match=r"loader_app:Machine is not a subclass of raftfleet\.LeaderHook"):
            loader(config("Machine", "Machine"))
    loader(config("Machine", "Hook"))
    with pytest.raises(TypeError, match=r"loader_app:Hook is not a subclass of raftfleet\.StateMachine"):
        loader(config("Hook"))


def test_one_class_may_be_both(loader: MachineLoader) -> None:
    machine, hook = loader(config("Both", "Both"))
    assert type(machine) is type(hook) and machine is not hook


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (config("Leaving"), "loader_app:Leaving raised SystemExit: 3 "),
        (config("Machine", "Interrupted"), "loader_app:Interrupted raised KeyboardInterrupt "),
        (GroupConfig("loader_leaving:Machine"), "loader_leaving:Machine raised SystemExit: not today "),
    ],
)
def test_user_code_that_wants_to_leave_does_not_take_the_worker_along(
    loader: MachineLoader, wanted: GroupConfig, told: str
) -> None:
    with pytest.raises(RuntimeError) as raised:
        loader(wanted)
    assert str(raised.value) == told + "when it was imported or constructed"


def test_an_ordinary_error_comes_as_it_is(loader: MachineLoader) -> None:
    with pytest.raises(LookupError, match="no such thing"):
        loader(config("Failing"))

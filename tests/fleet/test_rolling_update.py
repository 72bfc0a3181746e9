"""Nodes get new code one after the other, and a group goes over to it when the last one has it."""

from __future__ import annotations

from typing import Any

import pytest

from raftfleet.core.context import CommandContext
from raftfleet.testing.fleet import SimFleet, SimFleetOptions, SimNode
from raftfleet.testing.machines import JustAnInt

THREE = {"n1": "z1", "n2": "z2", "n3": "z3"}
NAME = "group"


class Second(JustAnInt):
    """Counts in tens from version 2 on."""

    version = 2

    def command(self, i: int, arg: Any) -> tuple[int, int]:
        return (i, i + 10) if self.context.version == 2 and arg == "inc" else super().command(i, arg)

    def upgrade(self, i: int, from_version: int) -> int:
        return i * 10


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[JustAnInt]]:
    """Which code each node has; what is changed here counts from the node's next start."""
    code: dict[str, type[JustAnInt]] = dict.fromkeys(THREE, JustAnInt)
    running: dict[int, type[JustAnInt]] = {}

    def make_machine(node: SimNode, config: Any) -> tuple[Any, Any]:
        machine = running.setdefault(node.instances[0], code[node.name])()
        machine.context = CommandContext()
        return machine, None

    monkeypatch.setattr(SimNode, "make_machine", make_machine)
    return code


def version_of(fleet: SimFleet) -> int:
    status = fleet.call("n1", "group_status", {"name": NAME})
    version = status["machine_version"]
    assert isinstance(version, int)
    return version


def inc(fleet: SimFleet) -> Any:
    client = fleet.client("n1")
    return client.result(client.command(NAME, "inc"))


def test_a_group_goes_over_when_the_last_node_has_the_new_code(code: dict[str, type[JustAnInt]]) -> None:
    fleet = SimFleet(1, SimFleetOptions(workers=1))
    fleet.start(THREE)
    fleet.add_group(NAME)
    assert inc(fleet) == 0
    for count, node in enumerate(THREE, start=1):
        code[node] = Second
        fleet.kill_worker(node, 0)
        fleet.run_for(2)
        fleet.wait_settled(30)
        if count < len(THREE):
            assert version_of(fleet) == 1
            assert inc(fleet) == count
    fleet.run_until(lambda: version_of(fleet) == 2, "the group works as version 2", 30)
    assert inc(fleet) == 30
    assert inc(fleet) == 40


def test_a_group_added_where_one_node_has_old_code_begins_as_the_older_version(
    code: dict[str, type[JustAnInt]],
) -> None:
    code.update(n1=Second, n2=Second)
    fleet = SimFleet(1, SimFleetOptions(workers=1))
    fleet.start(THREE)
    fleet.add_group(NAME)
    assert version_of(fleet) == 1
    assert (inc(fleet), inc(fleet)) == (0, 1)


def test_a_group_added_where_all_have_new_code_begins_as_the_newer_version(code: dict[str, type[JustAnInt]]) -> None:
    code.update(dict.fromkeys(THREE, Second))
    fleet = SimFleet(1, SimFleetOptions(workers=1))
    fleet.start(THREE)
    fleet.add_group(NAME)
    assert version_of(fleet) == 2
    assert (inc(fleet), inc(fleet)) == (0, 10)

"""Adding, using and removing groups: the README example, and every way to get it wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e.load import FOUR_NODES_IN_TWO_ZONES, JUST_AN_INT, THREE_NODES_IN_THREE_ZONES, add_groups

import raftfleet
from raftfleet import errors
from raftfleet.testing import LocalFleet


def test_readme_example_of_raft_fleet_works_line_by_line(fleet: LocalFleet) -> None:
    fleet.start_nodes(FOUR_NODES_IN_TWO_ZONES)
    n1, n2, n3 = (fleet.connect(name) for name in ("n1", "n2", "n3"))
    names = [f"consensus{number}" for number in range(1, 6)]
    for name in names:
        n1.add_consensus_group(name, 3, JUST_AN_INT)
    assert n2.active_nodes() == {"z1": ["n1", "n3"], "z2": ["n2", "n4"]}
    assert n3.consensus_groups() == {name: 3 for name in names}
    assert n1.query("consensus1", "get") == 0
    assert n2.command("consensus1", "inc") == 0
    assert n3.query("consensus1", "get") == 1
    leader = n1.whereis_leader("consensus1")
    assert leader is not None and leader.node in FOUR_NODES_IN_TWO_ZONES
    for name in names:
        n1.remove_consensus_group(name)
    assert n3.consensus_groups() == {}


def test_many_groups_added_at_once_serve_on_every_node(fleet: LocalFleet) -> None:
    fleet.start_nodes(FOUR_NODES_IN_TWO_ZONES)
    n1, n2 = fleet.connect("n1"), fleet.connect("n2")
    names = [f"many{number}" for number in range(1200)]
    n1.add_consensus_groups(names, 3, JUST_AN_INT)
    assert set(n2.consensus_groups()) == set(names)
    for name in names[::100]:
        assert n2.command(name, "inc", timeout=10.0) == 0
    with pytest.raises(errors.AlreadyAdded, match="many0"):
        n2.add_consensus_groups(["another", "many0"], 3, JUST_AN_INT)
    assert "another" not in n1.consensus_groups()
    with pytest.raises(errors.StateMachineNotImportable):
        n2.add_consensus_groups(["another", "one more"], 3, raftfleet.GroupConfig("no_such_module:Machine"))


def test_a_group_that_does_not_exist_is_not_found(fleet: LocalFleet) -> None:
    fleet.start_node("n1", "z1")
    client = fleet.connect("n1")
    with pytest.raises(errors.GroupNotFound):
        client.command("nowhere", "inc")
    with pytest.raises(errors.GroupNotFound):
        client.query("nowhere", "get")
    with pytest.raises(errors.GroupNotFound):
        client.query("nowhere", "get", consistency="stale")
    with pytest.raises(errors.GroupNotFound):
        client.status("nowhere")
    with pytest.raises(errors.GroupNotFound):
        client.remove_consensus_group("nowhere")
    assert client.whereis_leader("nowhere") is None


def test_adding_a_group_twice_leaves_the_first_as_it_was(fleet: LocalFleet) -> None:
    fleet.start_node("n1", "z1")
    client = fleet.connect("n1")
    client.add_consensus_group("counter", 1, JUST_AN_INT)
    assert client.command("counter", ["set", 7]) == 0
    with pytest.raises(errors.AlreadyAdded):
        client.add_consensus_group("counter", 1, JUST_AN_INT)
    assert client.query("counter", "get") == 7
    client.remove_consensus_group("counter")
    with pytest.raises(errors.GroupNotFound):
        client.remove_consensus_group("counter")


def test_a_fleet_without_active_nodes_hosts_nothing(fleet: LocalFleet) -> None:
    fleet.start_node("n1", None)
    with pytest.raises((errors.NoActiveNode, errors.NotActive)):
        fleet.connect("n1").add_consensus_group("counter", 1, JUST_AN_INT)


def test_a_machine_that_one_node_cannot_import_is_refused_and_nothing_is_left(
    fleet: LocalFleet, tmp_path: Path
) -> None:
    (tmp_path / "only_here.py").write_text(
        "import raftfleet\n"
        "class Machine(raftfleet.StateMachine):\n"
        "    def new(self): return 0\n"
        "    def command(self, state, arg): return state, state + 1\n"
        "    def query(self, state, arg): return state\n"
    )
    for name, zone in THREE_NODES_IN_THREE_ZONES.items():
        # The third node has no --app-dir in which the module lies.
        fleet.start_node(name, zone, app_dir=[] if name == "n3" else [tmp_path])
    client = fleet.connect("n1")
    with pytest.raises(errors.StateMachineNotImportable) as raised:
        client.add_consensus_group("only", 3, raftfleet.GroupConfig("only_here:Machine"))
    assert raised.value.node == "n3"
    assert "only_here" in str(raised.value)
    assert client.consensus_groups() == {}
    for machine in ("awkward:NotAMachine", "awkward:Absent", "awkward:NewRaises"):
        with pytest.raises(errors.StateMachineNotImportable):
            client.add_consensus_group("only", 3, raftfleet.GroupConfig(machine))
    assert client.consensus_groups() == {}
    assert sum(worker["members"] for worker in fleet.status("n1")["workers"]) <= 1, "only the fleet group's own"


def test_a_group_removed_and_added_a_hundred_times_is_new_each_time(fleet: LocalFleet) -> None:
    fleet.start_nodes(THREE_NODES_IN_THREE_ZONES)
    clients = [fleet.connect(name) for name in THREE_NODES_IN_THREE_ZONES]
    uids = set()
    for turn in range(100):
        client = clients[turn % len(clients)]
        client.add_consensus_group("phoenix", 3, JUST_AN_INT)
        assert client.command("phoenix", "inc") == 0, f"turn {turn}: a state from before"
        assert clients[(turn + 1) % len(clients)].command("phoenix", "inc") == 1, f"turn {turn}"
        uids.add(client.status("phoenix")["uid"])
        client.remove_consensus_group("phoenix")
    assert len(uids) == 100
    for client in clients:
        assert client.consensus_groups() == {}
    for name in THREE_NODES_IN_THREE_ZONES:
        fleet.wait_until(
            lambda name=name: hosted(fleet, name) <= 1, 10.0, f"{name} to hold nothing but the fleet group"
        )


def test_leadership_goes_where_it_is_told_to_go(fleet: LocalFleet) -> None:
    fleet.start_nodes(THREE_NODES_IN_THREE_ZONES)
    client = fleet.connect("n1")
    client.add_consensus_group("counter", 3, JUST_AN_INT)
    leader = fleet.wait_settled()["counter"]["leader"]
    target = next(name for name in THREE_NODES_IN_THREE_ZONES if name != leader)
    client.replace_leader("counter", target)
    fleet.wait_until(lambda: client.status("counter")["leader"] == target, 10.0, f"{target} to lead")
    assert client.command("counter", "inc") == 0


def test_a_changed_config_reaches_the_group(fleet: LocalFleet) -> None:
    fleet.start_nodes(THREE_NODES_IN_THREE_ZONES)
    client = fleet.connect("n1")
    client.add_consensus_group("bag", 3, raftfleet.GroupConfig("raftfleet.testing.machines:KeyValue"))
    client.command("bag", ["put", "key", "x" * 2000])
    client.change_config("bag", raftfleet.GroupConfig("raftfleet.testing.machines:KeyValue", command_bytes_max=1000))

    def is_refused() -> bool:
        try:
            client.command("bag", ["put", "key", "y" * 2000])
        except errors.CommandTooLarge as error:
            assert "command_bytes_max" in str(error), "a limit names the option that sets it"
            return True
        return False

    fleet.wait_until(is_refused, 10.0, "the lower limit")
    assert client.query("bag", ["size"]) == 1


def test_sixty_groups_are_spread_over_the_nodes(fleet: LocalFleet) -> None:
    fleet.start_nodes(FOUR_NODES_IN_TWO_ZONES, workers=2)
    names = add_groups(fleet, 60)
    groups = fleet.wait_settled()
    assert sorted(groups) == sorted(names)
    for name in FOUR_NODES_IN_TWO_ZONES:
        per_worker = [worker["members"] for worker in fleet.status(name)["workers"]]
        assert all(per_worker), f"{name} has an idle worker: {per_worker}"


def hosted(fleet: LocalFleet, name: str) -> int:
    """Members that the workers of node ``name`` hold, the fleet group's among them."""
    return sum(worker["members"] for worker in fleet.status(name)["workers"])

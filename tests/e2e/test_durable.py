"""Real nodes with data directories: nothing acknowledged is lost, whatever is killed, and all at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from e2e.conftest import APPS
from e2e.load import THREE_NODES_IN_THREE_ZONES, Load, add_groups, assert_at_rest, instances

from raftfleet.node.exit_codes import ExitCode
from raftfleet.testing import LocalFleet

ZONES = THREE_NODES_IN_THREE_ZONES
ROUNDS = int(os.environ.get("RAFTFLEET_TEST_RESTARTS", "3"))
"""How often all nodes are killed at once; by hand: RAFTFLEET_TEST_RESTARTS=20."""
GROUP_COUNT = int(os.environ.get("RAFTFLEET_TEST_GROUPS", "12"))
"""By hand: RAFTFLEET_TEST_GROUPS=60."""


@pytest.fixture
def durable() -> Iterator[LocalFleet]:
    with LocalFleet(app_dirs=[APPS], durable=True) as fleet:
        yield fleet


def restart_all(fleet: LocalFleet) -> None:
    for name in fleet.nodes:
        fleet.restart_node(name, wait=False)
    for name in fleet.nodes:
        fleet.wait_until(lambda name=name: fleet.status(name)["state"] == "active", 60.0, f"{name} to be active")


def test_all_nodes_killed_at_once_under_load_lose_nothing_and_run_nothing_twice(durable: LocalFleet) -> None:
    durable.start_nodes(ZONES, workers=2)
    groups = add_groups(durable, GROUP_COUNT)
    before = instances(durable)
    with Load(durable, groups, via=ZONES, pause_s_max=0.02, retry=90) as load:
        for _ in range(ROUNDS):
            load.await_progress(10, deadline_s=60.0)
            durable.kill_all_nodes()
            restart_all(durable)
        load.await_progress(10, deadline_s=60.0)
    assert instances(durable) == before, "every shard came back as itself"
    assert_at_rest(durable, ZONES, 3, load)
    assert all(durable.status(name)["durable"] for name in ZONES)


def test_a_killed_node_comes_back_with_its_members_and_is_replaced_by_nobody(durable: LocalFleet) -> None:
    durable.start_nodes(ZONES)
    groups = add_groups(durable, 6)
    before = instances(durable)
    with Load(durable, groups, via=["n1", "n2"]) as load:
        load.await_progress()
        durable.kill_node("n3")
        load.await_progress(3)
        durable.restart_node("n3")
        load.await_progress(3)
        durable.kill_worker("n2", 0)
        load.await_progress(3, deadline_s=60.0)
    assert instances(durable) == before
    assert_at_rest(durable, ZONES, 3, load)


def test_a_node_alone_finds_its_fleet_again(durable: LocalFleet) -> None:
    durable.start_node("n1", "z1")
    (group,) = add_groups(durable, 1, replicas=1)
    client = durable.connect("n1")
    assert [client.command(group, "inc") for _ in range(3)] == [0, 1, 2]
    fleet_id = durable.status("n1")["fleet"]
    assert durable.stop_node("n1") == 0
    durable.restart_node("n1")
    assert durable.status("n1")["fleet"] == fleet_id
    assert durable.connect("n1").command(group, "inc", retry=20) == 3


def test_a_wiped_directory_is_a_new_instance_and_says_so(durable: LocalFleet) -> None:
    durable.start_nodes(ZONES)
    groups = add_groups(durable, 4)
    before = instances(durable)
    with Load(durable, groups, via=["n1", "n2"]) as load:
        load.await_progress()
        durable.kill_node("n3")
        shutil.rmtree(durable.nodes["n3"].options["data_dir"] / "shard-0")
        durable.restart_node("n3")
        load.await_progress(3)
    assert instances(durable)["n3"] != before["n3"]
    assert "what this node once held there is lost" in durable.nodes["n3"].log()
    assert_at_rest(durable, ZONES, 3, load)


@pytest.mark.parametrize("what", ["name", "shard of another node"])
def test_a_directory_that_is_not_this_nodes_is_refused_and_the_node_ends(durable: LocalFleet, what: str) -> None:
    durable.start_node("n1", "z1")
    durable.stop_node("n1")
    data_dir = durable.nodes["n1"].options["data_dir"]
    if what == "name":
        node = durable.define_node("n2", "z1", data_dir=data_dir)
    else:
        node = durable.define_node("n2", "z1")
        os.makedirs(node.options["data_dir"], mode=0o700)
        shutil.copytree(data_dir / "shard-0", node.options["data_dir"] / "shard-0")
    node.peers = (node.endpoint,)
    durable.launch_node(node.name)
    assert node.process is not None
    assert node.process.wait(30) == ExitCode.DATA_DIR_REFUSED
    assert "belongs to" in node.log()


@pytest.mark.parametrize(
    ("precious", "members"),
    [
        pytest.param((1_000_000_008).to_bytes(4, "big"), 3, id="of_a_group"),
        pytest.param(b"group2", 3, id="of_the_fleets_own_group"),
    ],
)
def test_a_damaged_record_costs_one_member_which_comes_back_from_its_leader(
    durable: LocalFleet, precious: bytes, members: int
) -> None:
    durable.start_nodes(ZONES)
    groups = add_groups(durable, 3)
    client = durable.connect("n1")
    for number in range(5):
        for name in groups:
            assert client.command(name, ["set", 1_000_000_007 + number], retry=10) is not None
    before = instances(durable)
    durable.kill_node("n3")
    (segment,) = (durable.nodes["n3"].options["data_dir"] / "shard-0" / "wal").glob("*1.wal")
    data = bytearray(segment.read_bytes())
    at = data.index(precious)
    data[at] ^= 1
    segment.write_bytes(data)
    durable.restart_node("n3")
    assert " is refused" in durable.nodes["n3"].log()
    durable.wait_until(
        lambda: durable.status("n3")["workers"][0]["members"] == members, 60.0, "the lost member to be back on n3"
    )
    durable.wait_settled(deadline_s=60.0)
    assert instances(durable) == before, "it is the same instance, in another life"
    assert [client.query(name, "get", retry=10) for name in groups] == [1_000_000_011] * 3
    durable.kill_node("n1")
    client = durable.connect("n3")
    assert [client.command(name, "inc", retry=20) for name in groups] == [1_000_000_011] * 3


def test_a_node_that_leaves_puts_its_data_aside_and_may_come_back_as_new(durable: LocalFleet) -> None:
    durable.start_nodes({**ZONES, "n4": "z1"})
    groups = add_groups(durable, 4)
    before = instances(durable)
    with Load(durable, groups, via=["n1", "n2"]) as load:
        load.await_progress()
        durable.call("n4", "deactivate", {"wait": True}, timeout=60.0)
        load.await_progress()
        durable.call("n4", "activate", {"zone": "z1"}, timeout=60.0)
        durable.wait_active(4, deadline_s=60.0)
        load.await_progress()
    assert instances(durable)["n4"] != before["n4"]
    assert len(list((durable.nodes["n4"].options["data_dir"] / "former").iterdir())) == 1
    assert_at_rest(durable, {**ZONES, "n4": "z1"}, 3, load)


def test_a_node_that_comes_back_alone_reaches_leaders_on_nodes_that_knew_it(durable: LocalFleet) -> None:
    """Its shards are the same instances as before, and what they ask now must not be taken for what they asked then."""
    durable.start_nodes(ZONES, workers=1)
    groups = add_groups(durable, 6)
    with Load(durable, groups, via=ZONES, pause_s_max=0.01, retry=90) as load:
        for name in durable.nodes:
            load.await_progress(30, deadline_s=60.0)
            durable.kill_node(name)
            durable.restart_node(name)
    client = durable.connect(name)
    for group in groups:
        assert client.query(group, "get", retry=10) == load.counts[group]
    assert_at_rest(durable, ZONES, 3, load)

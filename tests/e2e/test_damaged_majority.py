"""Records of a majority are damaged on disks of nodes that run: an operator's word brings the groups back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.load import JUST_AN_INT, THREE_NODES_IN_THREE_ZONES
from e2e.test_cli import run
from e2e.test_majority_loss import all_have_everything

from raftfleet import GroupConfig
from raftfleet.core.names import FLEET_UID
from raftfleet.storage.inspect import dump, shard_directories
from raftfleet.testing import LocalFleet

HURT = ("n2", "n3")


@pytest.fixture
def stopped() -> Iterator[LocalFleet]:
    """Three durable nodes with three groups that stand at 10, 20 and 30 on all of them; then all are killed."""
    with LocalFleet(durable=True) as fleet:
        fleet.start_nodes(THREE_NODES_IN_THREE_ZONES, workers=1)
        client = fleet.connect("n1")
        policies = {"group1": "wait", "group2": "survivor", "group3": "wait"}
        for name, policy in policies.items():
            client.add_consensus_group(name, 3, GroupConfig(JUST_AN_INT.machine, on_majority_loss=policy))
            client.command(name, ["set", 10 * int(name[-1])], retry=20)
            client.command(name, "inc", retry=20)
            fleet.wait_until(lambda name=name: all_have_everything(client, name), 60.0, f"all of {name} to have it")
        fleet.wait_settled(deadline_s=60.0)
        fleet.kill_all_nodes()
        yield fleet


def damage(fleet: LocalFleet, node: str, *uids: int) -> None:
    """Flip a byte in the first record of entries that each of these groups has in the log of ``node``."""
    data_dir = Path(fleet.nodes[node].options["data_dir"])
    ((_, folder),) = shard_directories(str(data_dir))
    for uid in uids:
        row = next(row for row in dump(folder, uid=uid) if row["kind"] == "entries")
        path = Path(folder) / "wal" / row["segment"]
        content = bytearray(path.read_bytes())
        content[row["offset"] + row["length"] - 1] ^= 1
        path.write_bytes(content)


def uid_of(fleet: LocalFleet, name: str) -> int:
    data_dir = Path(fleet.nodes["n1"].options["data_dir"])
    ((_, folder),) = shard_directories(str(data_dir))
    return next(row["uid"] for row in dump(folder) if row["kind"] == "group" and row.get("name") == name)


def start_all(fleet: LocalFleet) -> None:
    for name in fleet.nodes:
        fleet.restart_node(name, wait=False)


def case_of(fleet: LocalFleet, name: str) -> dict[str, object] | None:
    plan = fleet.call("n1", "repair_plan")
    return next((group for group in plan["groups"] if group["name"] == name), None)


def test_groups_whose_majority_is_damaged_are_repaired_from_the_member_that_is_whole(stopped: LocalFleet) -> None:
    fleet = stopped
    for node in HURT:
        damage(fleet, node, uid_of(fleet, "group1"), uid_of(fleet, "group2"))
    start_all(fleet)
    fleet.wait_active(3, deadline_s=60.0)
    client = fleet.connect("n1")
    fleet.wait_until(
        lambda: (case := case_of(fleet, "group1")) is not None and case["verdict"] == "repairable", 60.0, "the losses"
    )
    assert client.query("group2", "get", retry=60) == 21, "its config is the operator's word, given beforehand"
    assert client.query("group3", "get", retry=60) == 31, "nothing of it is damaged"

    run_dir = fleet.nodes["n1"].run_dir
    shown = run("repair", "--dry-run", run_dir=run_dir)
    assert shown.returncode == 0
    assert "group1: has lost its majority; it can go on with what is left" in shown.stderr
    assert shown.stderr.count("damaged: lost what it had") == 2
    assert "would be given up: the damaged members of group1 on n2, n3" in shown.stderr
    assert "group3" not in shown.stderr

    done = run("repair", "--yes", "--json", run_dir=run_dir, deadline_s=120.0)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["done"]["recovered"] == ["group1"]
    assert client.command("group1", "inc", retry=60) == 11, "what was acknowledged, and was held by the survivor"
    fleet.wait_settled(of="n1", deadline_s=120.0)  # the damaged members came back as new ones
    for name in ("group1", "group2"):
        (record,) = client.status(name)["audit"]
        assert record["damaged_nodes"] == ["n2", "n3"]
        assert (record["voter_nodes"], record["epoch"]) == (["n1"], 1)
    assert client.status("group3")["audit"] == []
    fleet.kill_all_nodes()
    start_all(fleet)
    assert client.query("group1", "get", retry=90) == 12
    assert client.query("group2", "get", retry=90) == 21


def test_the_fleets_own_group_is_repaired_like_any_other(stopped: LocalFleet) -> None:
    fleet = stopped
    for node in HURT:
        damage(fleet, node, FLEET_UID, uid_of(fleet, "group1"))
    start_all(fleet)
    for name in ("$fleet", "group1"):
        fleet.wait_until(
            lambda name=name: (case := case_of(fleet, name)) is not None and case["verdict"] == "repairable",
            60.0,
            f"the losses of {name}",
        )
    done = run("repair", "--yes", "--json", run_dir=fleet.nodes["n1"].run_dir, deadline_s=120.0)
    assert done.returncode == 0, done.stderr
    assert {"$fleet", "group1"} <= set(json.loads(done.stdout)["done"]["recovered"])
    fleet.wait_active(3, deadline_s=60.0)
    client = fleet.connect("n1")
    for name, value in (("group1", 11), ("group2", 21), ("group3", 31)):
        assert client.query(name, "get", retry=60) == value
    fleet.wait_settled(of="n1", deadline_s=120.0)
    client.add_consensus_group("group4", 3, JUST_AN_INT)
    assert fleet.connect("n3").command("group4", "inc", retry=60) == 0


def test_a_group_that_nobody_can_go_on_with_is_said_to_need_a_copy(stopped: LocalFleet) -> None:
    fleet = stopped
    for node in fleet.nodes:
        damage(fleet, node, uid_of(fleet, "group1"))
    start_all(fleet)
    fleet.wait_active(3, deadline_s=60.0)
    run_dir = fleet.nodes["n1"].run_dir
    fleet.wait_until(lambda: case_of(fleet, "group1") is not None, 60.0, "the loss")
    shown = run("repair", run_dir=run_dir)
    assert shown.returncode == 1
    assert "group1: no reachable node has a member that could go on" in shown.stderr
    assert shown.stderr.count("damaged: lost what it had") == 3
    assert "raftfleet-node remove-group group1" in shown.stderr
    assert "raftfleet-node restore FILE --name group1" in shown.stderr
    client = fleet.connect("n1")
    assert client.query("group3", "get", retry=60) == 31
    client.remove_consensus_group("group1", timeout=30.0)
    client.add_consensus_group("group1", 3, JUST_AN_INT, timeout=30.0)
    assert client.command("group1", "inc", retry=30) == 0

"""Three of five nodes are lost: what is known of the groups, and how an operator brings them back."""

from __future__ import annotations

import json
import shutil

import pytest
from e2e.load import JUST_AN_INT
from e2e.test_cli import run

from raftfleet import errors
from raftfleet.client.sync import Fleet
from raftfleet.testing import LocalFleet

ZONES = {f"n{number}": f"z{number}" for number in range(1, 6)}
GROUPS = [f"group{number}" for number in range(5)]


@pytest.fixture
def survivors(fleet: LocalFleet) -> LocalFleet:
    """Five nodes with five groups of five, each set to its number times ten, and then n3, n4 and n5 killed."""
    fleet.start_nodes(ZONES)
    client = fleet.connect("n1")
    for number, name in enumerate(GROUPS):
        client.add_consensus_group(name, 5, JUST_AN_INT)
        client.command(name, ["set", 10 * number])
    fleet.wait_settled()
    # Three of five are enough to acknowledge a command, and they may be the three that are about to die.
    for name in GROUPS:
        fleet.wait_until(lambda name=name: all_have_everything(client, name), 60.0, f"all members of {name} to have it")
    for name in ("n3", "n4", "n5"):
        fleet.kill_node(name)
    return fleet


def all_have_everything(client: Fleet, name: str) -> bool:
    status = client.status(name)
    return all(member["match"] == status["last_index"] for member in status["members"])


def test_groups_that_lost_their_majority_are_named_with_what_is_known(survivors: LocalFleet) -> None:
    client = survivors.connect("n1")
    leaderless = survivors.wait_until(
        lambda: len(seen := client.leaderless_groups()) >= len(GROUPS) and seen, 60.0, "all groups to be leaderless"
    )
    assert set(GROUPS) <= set(leaderless)
    for name in GROUPS:
        assert set(leaderless[name]) == {"n1", "n2"}, f"{name}: {leaderless[name]}"
        for seen in leaderless[name].values():
            assert {"role", "term", "last_index", "leader"} <= set(seen)
            assert seen["last_index"] >= 2, "the no-op and the set"
    assert set(client.unreachable_nodes()) == {"n3", "n4", "n5"}
    with pytest.raises(errors.RaftFleetError):
        client.command(GROUPS[0], "inc", retry=0)
    # A survivor may not have learned yet, before the others died, that the set was committed.
    assert client.query(GROUPS[1], "get", consistency="stale") in (0, 10)


def test_the_operators_word_brings_every_group_back_and_the_dead_return_as_new(survivors: LocalFleet) -> None:
    client = survivors.connect("n1")
    survivors.wait_until(lambda: set(client.unreachable_nodes()) == {"n3", "n4", "n5"}, 20.0, "the dead to be noticed")
    for name in ("n3", "n4", "n5"):
        client.remove_dead_node(name)
    for number, name in enumerate(GROUPS):
        survivors.wait_until(lambda name=name: client.query(name, "get") is not None, 20.0, f"{name} to serve")
        assert client.query(name, "get") == 10 * number
        assert client.command(name, "inc", retry=10) == 10 * number
    survivors.wait_active(2)
    assert client.leaderless_groups() == {}

    survivors.restart_node("n3")
    survivors.wait_active(3)
    groups = survivors.wait_settled(of="n1")
    assert all(sorted(group["members"]) == ["n1", "n2", "n3"] for group in groups.values())
    back = survivors.connect("n3")
    for number, name in enumerate(GROUPS):
        assert back.query(name, "get") == 10 * number + 1


def test_repair_shows_what_is_left_asks_first_and_brings_every_group_back(survivors: LocalFleet) -> None:
    client = survivors.connect("n1")
    survivors.wait_until(lambda: set(client.unreachable_nodes()) == {"n3", "n4", "n5"}, 60.0, "the dead to be noticed")
    survivors.wait_until(
        lambda: set(survivors.call("n1", "repair_plan")["dead"]) == {"n3", "n4", "n5"}, 60.0, "the losses to be known"
    )
    run_dir = survivors.nodes["n1"].run_dir
    shown = run("repair", "--dry-run", run_dir=run_dir)
    assert (shown.returncode, shown.stdout) == (0, "")
    for text in ("group0: has lost its majority", "node n4, silent since", "nothing was done"):
        assert text in shown.stderr
    refused = run("repair", run_dir=run_dir)  # no terminal, no --yes: nobody said yes
    assert refused.returncode == 1
    assert set(survivors.call("n1", "repair_plan")["dead"]) == {"n3", "n4", "n5"}

    done = run("repair", "--yes", "--json", run_dir=run_dir, deadline_s=120.0)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer["plan"]["dead"]) == {"n3", "n4", "n5"}
    for name in GROUPS:
        group = next(group for group in answer["plan"]["groups"] if group["name"] == name)
        assert group["verdict"] == "repairable"
        assert {m["node"] for m in group["members"] if m["state"] == "answers"} == {"n1", "n2"}
        assert all(m["last_index"] >= 2 for m in group["members"] if m["state"] == "answers")
    assert set(GROUPS) <= set(answer["done"]["recovered"])
    for number, name in enumerate(GROUPS):
        assert client.query(name, "get", retry=20) == 10 * number
        (record,) = json.loads(run("audit", name, "--json", run_dir=run_dir).stdout)
        assert record["dead_nodes"] == ["n3", "n4", "n5"]
        assert record["voter_nodes"] == ["n1", "n2"]
        assert record["epoch"] >= 1
    assert "GAVE UP" in run("audit", "group0", run_dir=run_dir).stdout
    assert len(json.loads(run("audit", "$fleet", "--json", run_dir=run_dir).stdout)) == 1
    again = run("repair", run_dir=run_dir)
    assert again.returncode == 0
    assert "every group has a leader" in again.stderr

    survivors.restart_node("n3")  # one that was given up comes back as a new one
    survivors.wait_active(3, deadline_s=60.0)
    survivors.wait_settled(of="n1", deadline_s=60.0)
    back = survivors.connect("n3")
    for number, name in enumerate(GROUPS):
        assert back.query(name, "get", retry=20) == 10 * number


def test_repair_goes_on_with_the_only_disk_that_was_not_lost() -> None:
    with LocalFleet(durable=True) as fleet:
        fleet.start_nodes({"n1": "z1", "n2": "z2", "n3": "z3"})
        client = fleet.connect("n1")
        for number, name in enumerate(GROUPS):
            client.add_consensus_group(name, 3, JUST_AN_INT)
            client.command(name, ["set", 10 * number], retry=20)
            fleet.wait_until(lambda name=name: all_have_everything(client, name), 60.0, f"all of {name} to have it")
        for name in ("n2", "n3"):
            fleet.kill_node(name)
            shutil.rmtree(fleet.nodes[name].options["data_dir"])
        for name in ("n2", "n3"):
            fleet.restart_node(name, wait=False)  # with an empty directory: it waits to be let in
        fleet.wait_until(
            lambda: set(fleet.call("n1", "repair_plan")["dead"]) == {"n2", "n3"}, 60.0, "the losses to be known"
        )
        done = run("repair", "--yes", "--json", run_dir=fleet.nodes["n1"].run_dir, deadline_s=120.0)
        assert done.returncode == 0, done.stderr
        assert set(GROUPS) <= set(json.loads(done.stdout)["done"]["recovered"])
        fleet.wait_active(3, deadline_s=120.0)
        fleet.wait_settled(of="n1", deadline_s=120.0)
        for number, name in enumerate(GROUPS):
            assert client.command(name, "inc", retry=30) == 10 * number
            (record,) = client.status(name)["audit"]
            assert record["dead_nodes"] == ["n2", "n3"]
        for name in ("n1", "n2", "n3"):  # what was repaired is durable, and so is the record of it
            fleet.kill_node(name)
        for name in ("n1", "n2", "n3"):
            fleet.restart_node(name, wait=False)
        fleet.wait_until(lambda: fleet.status("n1")["state"] == "active", 60.0, "n1 to be active")
        for number, name in enumerate(GROUPS):
            assert client.query(name, "get", retry=60) == 10 * number + 1
            assert len(client.status(name, timeout=30.0)["audit"]) == 1

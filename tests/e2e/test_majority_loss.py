"""Three of five nodes are lost: what is known of the groups, and how an operator brings them back."""

from __future__ import annotations

import pytest
from e2e.load import JUST_AN_INT

from raftfleet import errors
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
    for name in ("n3", "n4", "n5"):
        fleet.kill_node(name)
    return fleet


def test_groups_that_lost_their_majority_are_named_with_what_is_known(survivors: LocalFleet) -> None:
    client = survivors.connect("n1")
    leaderless = survivors.wait_until(
        lambda: len(seen := client.leaderless_groups()) >= len(GROUPS) and seen, 20.0, "all groups to be leaderless"
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

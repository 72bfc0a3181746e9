"""A majority of a group's members is provably lost: each policy of ``on_majority_loss`` does what it says."""

from __future__ import annotations

import pytest

from raftfleet import errors
from raftfleet.core.config import GroupConfig
from raftfleet.core.names import shard_of
from raftfleet.testing.fleet import COUNTER, SimFleet, SimFleetOptions

FOUR = {"n1": "z1", "n2": "z2", "n3": "z1", "n4": "z2"}
NAME = "group"


def two_of_three_members_restart(policy: str) -> SimFleet:
    """Counts to three in a group of three, then the workers of two of its members lose their memory."""
    fleet = SimFleet(1, SimFleetOptions(workers=2))
    fleet.start(FOUR)
    fleet.add_group(NAME, config=GroupConfig(COUNTER.machine, on_majority_loss=policy))
    client = fleet.client("n1")
    for _ in range(3):
        client.result(client.command(NAME, "inc"))
    fleet.run_for(2)
    state = fleet.any_state()
    assert state is not None
    hosts = [node for node, _ in state.desired(state.by_name[NAME])]
    for node in hosts[:2]:
        fleet.kill_worker(node, shard_of(NAME, 2))
    fleet.run_for(20)
    return fleet


def count_of(fleet: SimFleet, node: str = "n1") -> int:
    client = fleet.client(node)
    value = client.result(client.query(NAME, "get", retry=1))
    assert isinstance(value, int)
    return value


def test_by_default_a_group_waits_for_an_operator_who_may_change_its_policy():
    fleet = two_of_three_members_restart("wait")
    with pytest.raises(errors.NotApplied):
        count_of(fleet)
    fleet.call(
        "n1",
        "change_config",
        {"name": NAME, "config": GroupConfig(COUNTER.machine, on_majority_loss="survivor").to_dict()},
    )
    fleet.run_for(20)
    assert count_of(fleet) == 3
    fleet.wait_settled()


def test_with_survivor_a_group_goes_on_with_what_is_left_of_it():
    fleet = two_of_three_members_restart("survivor")
    assert count_of(fleet) == 3
    status = fleet.call("n1", "group_status", {"name": NAME}, index=shard_of(NAME, 2))
    assert status["term"] >> 32 == 1
    fleet.wait_settled()


def test_with_new_a_group_begins_anew_and_empty_under_its_name():
    fleet = two_of_three_members_restart("new")
    for node in FOUR:
        assert count_of(fleet, node) == 0
    state = fleet.any_state()
    assert state is not None
    assert len(state.groups) == 1
    assert fleet.members_of(1) == [], "a member of the old group is left"
    fleet.wait_settled()


def test_the_operators_word_about_a_node_that_runs_again_is_about_the_memory_that_it_lost():
    fleet = two_of_three_members_restart("wait")
    state = fleet.any_state()
    assert state is not None
    hosts = [node for node, _ in state.desired(state.by_name[NAME])]
    lost = fleet.call(hosts[2], "fleet_command", {"command": ["declare_lost", hosts[0]]})["instances"]
    assert len(lost) == 1
    fleet.run_for(20)
    with pytest.raises(errors.NotApplied):
        count_of(fleet)  # one of two lost members is declared lost: the other might still hold the truth
    assert fleet.call(hosts[2], "fleet_command", {"command": ["declare_lost", hosts[1]]})["instances"]
    fleet.run_for(20)
    assert count_of(fleet) == 3
    assert fleet.call(hosts[2], "fleet_command", {"command": ["declare_lost", hosts[1]]}) == {"instances": []}
    fleet.wait_settled()

"""The fleet's state machine: what it refuses, what it remembers, and that it is the same everywhere."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raftfleet.core.config import GroupConfig
from raftfleet.core.context import CommandContext
from raftfleet.fleet import machine as fleet_machine
from raftfleet.fleet.machine import FleetMachine, FleetRefused, FleetState

FLEET = bytes(range(16))
CONFIG = {"machine": "just_an_int:JustAnInt"}


def node(
    name: str, instances: list[int], zone: str = "z1", host: str | None = None, port: int = 7400
) -> dict[str, Any]:
    return {"name": name, "zone": zone, "host": host or name, "port": port, "public_key": "", "instances": instances}


@pytest.fixture
def state() -> FleetState:
    fleet = FleetState()
    fleet.apply(["found", FLEET, [node("a", [1, 2]), node("b", [3, 4], "z2"), node("c", [5, 6], "z3")]], 0)
    return fleet


def refused(state: FleetState, command: Any, epoch: int = 0) -> FleetRefused:
    """Assert that the command is refused and nothing changed; return the refusal."""
    before, version = state.dump(), state.node_version
    with pytest.raises(FleetRefused) as caught:
        state.apply(command, epoch + 1)
    assert state.dump() == before and state.node_version == version
    return caught.value


def test_nothing_is_done_before_the_fleet_is_founded() -> None:
    state = FleetState()
    assert refused(state, ["join", node("a", [1])]).code == fleet_machine.NOT_ACTIVE
    state.apply(["found", FLEET, [node("a", [1])]], 0)
    state.apply(["found", FLEET, [node("a", [1])]], 0)
    assert "this is fleet" in refused(state, ["found", b"x" * 16, [node("a", [1])]]).message


def test_a_uid_carries_the_epoch_and_is_never_used_again(state: FleetState) -> None:
    first = state.apply(["add_group", "g", 3, CONFIG], 0)
    assert first["uid"] == 1 and [n for n, _ in first["members"]] == [n for n, _ in state.desired(state.by_name["g"])]
    assert state.apply(["remove_group", "g"], 0)["uid"] == 1
    assert state.is_dead_uid(1) and not state.is_dead_uid(2)
    second = state.apply(["add_group", "g", 3, CONFIG], 5)
    assert second["uid"] == (5 << 40 | 2)
    assert state.is_dead_uid(2) and state.is_dead_uid(1 << 40 | 7), "uids of an older epoch that are unknown were lost"
    assert not state.is_dead_uid(5 << 40 | 3)
    assert state.group_of_uid(second["uid"]) is state.by_name["g"]


def test_adding_twice_and_removing_twice_are_refused(state: FleetState) -> None:
    state.apply(["add_group", "g", 3, CONFIG], 0)
    assert refused(state, ["add_group", "g", 3, CONFIG]).code == fleet_machine.ALREADY_ADDED
    state.apply(["remove_group", "g"], 0)
    error = refused(state, ["remove_group", "g"])
    assert error.code == fleet_machine.GROUP_NOT_FOUND and str(error).startswith("12:")


def test_many_groups_are_added_as_a_whole_or_not_at_all(state: FleetState) -> None:
    added = state.apply(["add_groups", ["a", "b", "c"], 3, CONFIG], 0)
    assert [state.by_name[name].uid for name in "abc"] == added["uids"] == [1, 2, 3]
    assert [n for n, _ in state.by_name["b"].members] == [row.node for row in state.explain(state.by_name["b"])]
    error = refused(state, ["add_groups", ["d", "c", "b"], 3, CONFIG])
    assert error.code == fleet_machine.ALREADY_ADDED and "'c' (and 1 others of these)" in error.message
    assert "differ" in refused(state, ["add_groups", ["d", "d"], 3, CONFIG]).message
    many = [str(number) for number in range(fleet_machine.GROUPS_AT_ONCE_MAX + 1)]
    for names in ([], "abc", many, ["", "d"], [7]):
        assert refused(state, ["add_groups", names, 3, CONFIG]).code == fleet_machine.BAD_REQUEST
    state.apply(["add_groups", many[1:], 3, CONFIG], 0)


def test_groups_of_one_kind_share_what_is_equal(state: FleetState) -> None:
    state.apply(["add_groups", [f"g{number}" for number in range(100)], 3, CONFIG], 0)
    state.apply(["add_group", "late", 3, CONFIG], 0)
    for fleet in (state, FleetState.load(state.dump())):
        groups = list(fleet.groups.values())
        assert len({id(group.config) for group in groups}) == len({id(group.group_config()) for group in groups}) == 1
        assert len({id(group.members) for group in groups}) <= 6 * 2, (
            "three nodes of two shards: six orders, two shards"
        )
    state.apply(["change_config", "g1", CONFIG | {"election_timeout_s": 3.0}], 0)
    assert state.by_name["g1"].config["election_timeout_s"] == 3.0 != state.by_name["g2"].config["election_timeout_s"]


def test_settings_that_are_equal_and_not_the_same_are_kept_apart(state: FleetState) -> None:
    state.apply(["add_group", "whole", 3, CONFIG | {"session_ttl_s": 600}], 0)
    state.apply(["add_group", "real", 3, CONFIG | {"session_ttl_s": 600.0}], 0)
    for fleet in (state, FleetState.load(state.dump())):
        assert repr(fleet.by_name["whole"].config["session_ttl_s"]) == "600"
        assert repr(fleet.by_name["real"].config["session_ttl_s"]) == "600.0"


def test_the_state_of_a_hundred_thousand_groups_fits_into_a_frame(state: FleetState) -> None:
    size_before = len(state.dump())
    state.apply(["add_groups", [f"some-group-{number:06}" for number in range(1000)], 3, CONFIG], 0)
    assert (len(state.dump()) - size_before) * 100 < 4 << 20


def test_a_group_keeps_its_machine_when_its_config_changes(state: FleetState) -> None:
    state.apply(["add_group", "g", 3, CONFIG], 0)
    state.apply(["change_config", "g", CONFIG | {"election_timeout_s": 5.0}], 0)
    assert state.by_name["g"].group_config().election_timeout_s == 5.0
    assert "keeps its machine" in refused(state, ["change_config", "g", {"machine": "other:M"}]).message


def test_a_group_keeps_what_applying_its_commands_depends_on(state: FleetState) -> None:
    state.apply(["add_group", "g", 3, CONFIG], 0)
    for field, value in (("session_ttl_s", 5.0), ("session_count_max", 7)):
        assert f"keeps its {field}" in refused(state, ["change_config", "g", CONFIG | {field: value}]).message
    assert state.by_name["g"].config == GroupConfig.from_dict(CONFIG).to_dict()


def test_the_election_timeout_of_a_group_with_leases_stays(state: FleetState) -> None:
    leased = CONFIG | {"clock_drift_margin": 0.1}
    state.apply(["add_group", "g", 3, leased], 0)
    assert (
        "keeps its election_timeout_s"
        in refused(state, ["change_config", "g", leased | {"election_timeout_s": 5.0}]).message
    )
    state.apply(["change_config", "g", CONFIG], 0)
    state.apply(["change_config", "g", CONFIG | {"election_timeout_s": 5.0}], 0)


def test_the_last_active_node_stays_while_there_are_groups(state: FleetState) -> None:
    state.apply(["add_group", "g", 3, CONFIG], 0)
    state.apply(["deactivate", "a"], 0)
    state.apply(["deactivate", "a"], 0)
    state.apply(["deactivate", "b"], 0)
    assert "last active" in refused(state, ["deactivate", "c"]).message
    assert [n for n, _ in state.desired(state.by_name["g"])] == ["c"]
    state.apply(["remove_group", "g"], 0)
    state.apply(["deactivate", "c"], 0)
    assert refused(state, ["add_group", "g", 3, CONFIG]).code == fleet_machine.NO_ACTIVE_NODE


def test_a_node_leaves_only_after_it_was_deactivated(state: FleetState) -> None:
    assert "deactivate it" in refused(state, ["leave", "a"]).message
    state.apply(["deactivate", "a"], 0)
    state.apply(["leave", "a"], 0)
    assert "a" not in state.nodes and state.gone == {1: "left", 2: "left"} and state.instance_home(1) is None
    assert "no node" in refused(state, ["leave", "a"]).message


def test_a_gone_instance_never_comes_back(state: FleetState) -> None:
    state.apply(["remove_node", "a", "operator", [1, 2]], 0)
    assert "gone (operator)" in refused(state, ["join", node("a", [1, 2])]).message
    assert "gone (operator)" in refused(state, ["instances", "b", [3, 2], [3, 4]]).message
    state.apply(["join", node("a", [11, 12])], 0)
    assert state.instance_home(12) == ("a", 1)


def test_a_restarted_shard_replaces_its_old_instance(state: FleetState) -> None:
    version = state.node_version
    state.apply(["instances", "a", [1, 22], [1, 2]], 0)
    assert state.gone == {2: "restarted"} and state.instance_home(22) == ("a", 1) and state.node_version > version
    version = state.node_version
    state.apply(["instances", "a", [1, 22], [1, 2]], 0)
    assert state.node_version == version
    assert "belongs to node b" in refused(state, ["instances", "a", [1, 3], [1, 22]]).message


def test_a_group_is_renewed_when_those_of_its_voters_that_live_say_that_they_are_damaged(state: FleetState) -> None:
    uid = state.apply(["add_group", "g", 3, CONFIG | {"on_majority_loss": "new"}], 0)["uid"]
    voters = [instance for _, instance in state.desired(state.by_name["g"])]
    assert "not known to be gone" in refused(state, ["renew_group", uid, voters[:2]]).message
    assert "not known to be gone" in refused(state, ["renew_damaged_group", uid, voters[:2], voters[:1]]).message
    renewed = state.apply(["renew_damaged_group", uid, voters[:2], voters[:2]], 0)
    assert renewed["uid"] != uid and state.is_dead_uid(uid)
    assert state.by_name["g"].uid == renewed["uid"]
    assert refused(state, ["renew_damaged_group", uid, voters[:2], voters[:2]]).code == fleet_machine.GROUP_NOT_FOUND


def test_a_delayed_command_of_a_former_life_is_refused(state: FleetState) -> None:
    state.apply(["instances", "a", [1, 33], [1, 2]], 0)
    assert "changed meanwhile" in refused(state, ["instances", "a", [1, 22], [1, 2]]).message
    state.apply(["join", node("d", [50]) | {"replaces": []}], 0)
    state.apply(["join", node("d", [50]) | {"replaces": []}], 0)
    assert "changed meanwhile" in refused(state, ["join", node("d", [49]) | {"replaces": []}]).message
    assert "changed meanwhile" in refused(state, ["join", node("e", [51]) | {"replaces": [7]}]).message
    state.apply(["join", node("d", [51]) | {"replaces": [50]}], 0)
    assert state.instance_home(51) == ("d", 0)


def test_a_node_that_returns_at_its_address_replaces_its_former_self(state: FleetState) -> None:
    state.apply(["deactivate", "a"], 0)
    state.apply(["join", node("a", [11, 12], "z9")], 0)
    assert state.gone == {1: "restarted", 2: "restarted"} and state.nodes["a"].active
    assert state.active_nodes() == {"z2": ["b"], "z3": ["c"], "z9": ["a"]}


def test_a_name_held_by_another_live_endpoint_is_refused(state: FleetState) -> None:
    assert "taken" in refused(state, ["join", node("a", [11, 12], host="elsewhere")]).message
    assert "belongs to node a" in refused(state, ["join", node("d", [11, 12], host="a")]).message


def test_remove_node_spares_a_node_that_has_come_back(state: FleetState) -> None:
    state.apply(["join", node("a", [11, 12])], 0)
    assert "other instances" in refused(state, ["remove_node", "a", "purged", [1, 2]]).message
    assert "belongs to" in refused(state, ["remove_node", "zzz", "operator", [11]]).message
    assert state.apply(["remove_node", "zzz", "operator", [77]], 0) == {"removed": False}
    assert state.gone[77] == "operator"


def test_gone_is_bounded_and_forgets_the_oldest_first(state: FleetState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_machine, "GONE_COUNT_MAX", 4)
    for i in range(10):
        state.apply(["instances", "a", [100 + i, 200 + i], list(state.nodes["a"].instances)], 0)
    assert list(state.gone) == [107, 207, 108, 208]


@pytest.mark.parametrize(
    "command",
    [
        None,
        [],
        [1],
        ["nonsense"],
        ["join"],
        ["join", 7],
        ["join", {}],
        ["join", node("", [11])],
        ["join", node("x" * 256, [11])],
        ["join", node("x\0", [11])],
        ["join", node("\ud800", [11])],
        ["join", node("d", [])],
        ["join", node("d", [11, 11])],
        ["join", node("d", [0])],
        ["join", node("d", [True])],
        ["join", node("d", [1 << 63])],
        ["join", node("d", [11], port=65535)],
        ["join", node("d", [11], port=True)],
        ["join", node("d", [11]) | {"public_key": "short"}],
        ["join", node("d", [3])],
        ["deactivate", None],
        ["deactivate", []],
        ["leave", "nobody"],
        ["remove_node", "a", "mood", [1, 2]],
        ["remove_node", 1, "operator", [1, 2]],
        ["instances", "a", "12", [1, 2]],
        ["instances", "a", [11, 12], None],
        ["add_group", "$fleet", 3, CONFIG],
        ["add_group", "", 3, CONFIG],
        ["add_group", "g", 0, CONFIG],
        ["add_group", "g", True, CONFIG],
        ["add_group", "g", 32, CONFIG],
        ["add_group", "g", 3, {}],
        ["add_group", "g", 3, None],
        ["add_group", "g", 3, {"machine": "m:M", "colour": 1}],
        ["remove_group", []],
        ["change_config", "nobody", CONFIG],
        ["found", FLEET[:3], []],
    ],
    ids=repr,
)
def test_a_malformed_command_is_refused_and_changes_nothing(state: FleetState, command: Any) -> None:
    refused(state, command)


def random_command(rng: random.Random) -> list[Any]:
    name = rng.choice("abcdef")
    instances = rng.sample(range(1, 40), rng.choice([1, 2, 2, 2, 3]))
    kind = rng.randrange(9)
    if kind <= 1:
        return ["join", node(name, instances, rng.choice(["z1", "z2"]), rng.choice([name, name, "other"]))]
    if kind == 2:
        return ["deactivate", name]
    if kind == 3:
        return ["leave", name]
    if kind == 4:
        return ["remove_node", name, "operator", instances]
    if kind == 5:
        return ["instances", name, instances, rng.sample(range(1, 40), 2)]
    if kind == 6:
        return ["remove_group", rng.choice("ghij")]
    if kind == 7:
        return ["change_config", rng.choice("ghij"), CONFIG | {"election_timeout_s": float(rng.randrange(1, 9))}]
    return ["add_group", rng.choice("ghij"), rng.randrange(1, 5), CONFIG]


def check_consistent(state: FleetState) -> None:
    homes = {i: (n.name, index) for n in state.nodes.values() for index, i in enumerate(n.instances)}
    assert homes == state._homes and not homes.keys() & state.gone.keys()
    assert {g.name: g for g in state.groups.values()} == state.by_name
    assert len({(n.host, n.port) for n in state.nodes.values()}) == len(state.nodes)
    for group in state.groups.values():
        for name, instance in state.desired(group):
            assert state.nodes[name].active and state.instance_home(instance) is not None


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_refusals_change_nothing_and_a_loaded_dump_goes_on_the_same(seed: int) -> None:
    rng = random.Random(seed)
    machine = FleetMachine()
    machine.context = CommandContext()
    state = machine.new()
    machine.command(state, ["found", FLEET, [node("a", [1, 2]), node("b", [3, 4])]])
    twin = machine.load(machine.dump(state))
    for step in range(60):
        command = random_command(rng)
        before, version = machine.dump(state), state.node_version
        machine.context.term = (step // 20) << 32
        try:
            result, state = machine.command(state, command)
        except FleetRefused as error:
            assert machine.dump(state) == before and state.node_version == version
            with pytest.raises(FleetRefused, match=str(error.code)):
                machine.command(twin, command)
        else:
            assert machine.command(twin, command)[0] == result
        check_consistent(state)
        if step % 10 == 0:
            twin = machine.load(machine.dump(twin))
        assert twin == state and list(twin.nodes) == list(state.nodes) and list(twin.gone) == list(state.gone)
        assert [twin.desired(g) for g in twin.groups.values()] == [state.desired(g) for g in state.groups.values()]


def test_the_state_does_not_depend_on_the_hash_seed() -> None:
    program = (
        "import random, sys; sys.path.insert(0, sys.argv[1]); import test_machine as t\n"
        "rng = random.Random(7); s = t.FleetState(); s.apply(['found', t.FLEET, [t.node('a', [1, 2])]], 0)\n"
        "for _ in range(300):\n"
        "    try: s.apply(t.random_command(rng), 0)\n"
        "    except t.FleetRefused: pass\n"
        "print(s.dump().hex(), [s.desired(g) for g in s.groups.values()])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, os.path.dirname(__file__)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "1", "12345")
    }
    assert len(outputs) == 1


def test_queries_answer_what_msgpack_carries(state: FleetState) -> None:
    machine = FleetMachine()
    state.apply(["add_group", "g", 2, CONFIG], 0)
    assert machine.query(state, ["groups"]) == {"g": 2}
    assert machine.query(state, ["nodes"])["a"]["instances"] == [1, 2]
    assert machine.query(state, ["group", "g"])["uid"] == 1
    assert FleetState.load(machine.query(state, ["state"])) == state
    for query in (["group", "zzz"], ["nonsense"], 5):
        with pytest.raises(FleetRefused):
            machine.query(state, query)


def test_a_hundred_thousand_groups_are_placed_anew_within_seconds() -> None:
    state = FleetState()
    state.apply(["found", FLEET, [node(f"n{i}", [i + 1], f"z{i % 3}") for i in range(6)]], 0)
    for i in range(20_000):
        state.apply(["add_group", f"g{i}", 3, CONFIG], 0)
    state.apply(["join", node("n6", [7], "z0")], 0)
    start = time.process_time()
    for group in state.groups.values():
        state.desired(group)
    assert time.process_time() - start < 2.0, "measured: 0.1 s for 20,000 groups on 7 nodes"

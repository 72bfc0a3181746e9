"""States out of groups and into new ones, through a whole simulated fleet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest

from raftfleet import errors
from raftfleet.client import copying
from raftfleet.core.config import GroupConfig
from raftfleet.core.names import shard_of
from raftfleet.core.restoring import PIECE_BYTES_MAX
from raftfleet.fleet.host_copying import COPIES_MAX, COPY_IDLE_US
from raftfleet.testing.fleet import SimFleet
from raftfleet.testing.machines import KeyValue
from raftfleet.wire.exported import ExportedState

THREE = {"n1": "z1", "n2": "z2", "n3": "z3"}
KEYS = GroupConfig("raftfleet.testing.machines:KeyValue")
BIG = "v" * (PIECE_BYTES_MAX // 2)


def started(nodes: dict[str, str] | None = None) -> SimFleet:
    fleet = SimFleet(3)
    fleet.start(nodes or THREE)
    return fleet


def filled(fleet: SimFleet, name: str = "old", count: int = 5) -> None:
    """A group whose state has several pieces."""
    fleet.add_group(name, config=KEYS)
    client = fleet.client("n1")
    for number in range(count):
        client.result(client.command(name, ["put", f"k{number}", BIG]))


def keys_of(fleet: SimFleet, name: str, node: str = "n2") -> Any:
    client = fleet.client(node)
    return client.result(client.query(name, ["keys"]))


def test_a_copy_of_a_group_begins_another_one_with_all_it_had():
    fleet = started()
    filled(fleet)
    exported = fleet.export_group("old", node="n3")
    assert (exported.name, exported.replicas, exported.machine_version) == ("old", 3, 1)
    assert exported.config["machine"] == KEYS.machine
    assert exported.is_linearizable
    assert len(exported.state) > 2 * PIECE_BYTES_MAX
    fleet.add_group("new", config=KEYS, restore=exported, node="n2")
    for node in THREE:
        assert keys_of(fleet, "new", node) == [f"k{number}" for number in range(5)]
    fleet.run_for(2)
    dumps = {KeyValue().dump(member.state) for _, member in fleet.members_of(fleet.uid_of("new"))}
    assert dumps == {exported.state}, "every member has the same"
    client = fleet.client("n1")
    client.result(client.command("new", ["put", "more", 1]))
    assert "more" not in keys_of(fleet, "old")
    assert all(not worker.host._copies for worker in fleet.live_workers()), "the copies are dropped"


def test_a_group_that_was_removed_comes_back_under_its_name():
    fleet = started()
    filled(fleet)
    exported = fleet.export_group("old")
    fleet.remove_group("old")
    fleet.add_group("old", config=KEYS, restore=exported)
    assert keys_of(fleet, "old") == [f"k{number}" for number in range(5)]


def test_clients_wait_or_are_refused_until_the_whole_state_is_there():
    fleet = started()
    filled(fleet)
    exported = fleet.export_group("old")
    config = copying.restored_config(exported, KEYS)
    args = {"name": "new", "replicas": 3, "config": config.to_dict()}
    uid = fleet.take("n1", "new", copying.begin_steps(args, 5.0))
    fleet.run_for(2)
    client = fleet.client("n3")
    with pytest.raises(errors.BeingRestored):
        client.result(client.command("new", ["put", "early", 1], retry=0))
    with pytest.raises(errors.BeingRestored):
        client.result(client.query("new", ["keys"], consistency="stale", retry=0))
    status = fleet.call("n1", "group_status", {"name": "new"})
    assert (status["restoring"], status["restored_bytes"]) == ([len(exported.state), exported.crc], 0)
    waiting = client.command("new", ["put", "late", 1], retry=30)
    fleet.take("n2", "new", copying.piece_steps("new", uid, exported.state, 20.0))
    client.result(waiting)
    assert keys_of(fleet, "new") == sorted([*(f"k{number}" for number in range(5)), "late"])
    assert fleet.call("n1", "group_status", {"name": "new"})["restoring"] is None


def test_the_same_call_goes_on_where_it_was_cut_short_and_another_state_is_refused():
    fleet = started()
    filled(fleet)
    exported = fleet.export_group("old")
    args = {"name": "new", "replicas": 3, "config": copying.restored_config(exported, KEYS).to_dict()}
    uid = fleet.take("n1", "new", copying.begin_steps(args, 5.0))
    steps = copying.piece_steps("new", uid, exported.state, 20.0)
    method, piece, seconds = next(steps)
    owner = shard_of("new", 2)
    assert fleet.call("n1", method, piece, index=owner, timeout_s=seconds) == [PIECE_BYTES_MAX, False]
    steps.close()  # whoever restores is killed
    other = replace(exported, state=exported.state + b"\x00")
    with pytest.raises(errors.AlreadyAdded):
        fleet.add_group("new", config=KEYS, restore=other)
    assert fleet.add_group("new", config=KEYS, restore=exported, node="n3") == uid
    assert keys_of(fleet, "new") == [f"k{number}" for number in range(5)]
    with pytest.raises(errors.AlreadyAdded):
        fleet.add_group("new", config=KEYS, restore=exported)


def test_a_restore_survives_the_loss_of_leaders_on_its_way():
    fleet = started({**THREE, "n4": "z1", "n5": "z2"})
    filled(fleet, count=9)
    exported = fleet.export_group("old")
    args = {"name": "new", "replicas": 3, "config": copying.restored_config(exported, KEYS).to_dict()}
    uid = fleet.take("n1", "new", copying.begin_steps(args, 5.0))
    steps = copying.piece_steps("new", uid, exported.state, 60.0)
    method, args, seconds = next(steps)
    kills = 0
    while True:
        leader = fleet.leader_of("new")
        if kills < 2 and leader is not None and args.get("offset", 0) > kills * 2 * PIECE_BYTES_MAX:
            kills += 1
            fleet.kill_worker(leader.node.name, leader.index)
        try:
            if method == copying.PAUSE:
                fleet.run_for(seconds)
                method, args, seconds = next(steps)
                continue
            answer = fleet.call("n5", method, args, index=shard_of("new", 2), timeout_s=seconds)
        except errors.RaftFleetError as error:
            method, args, seconds = steps.throw(error)
        else:
            try:
                method, args, seconds = steps.send(answer)
            except StopIteration:
                break
    assert kills == 2
    assert keys_of(fleet, "new") == [f"k{number}" for number in range(9)]
    fleet.wait_settled()
    fleet.run_for(2)
    assert {KeyValue().dump(member.state) for _, member in fleet.members_of(uid)} == {exported.state}


def test_a_member_alone_gives_a_stale_copy_and_no_other():
    fleet = started()
    filled(fleet)
    fleet.run_for(2)
    for node in ("n2", "n3"):
        fleet.nodes[node].kill()
    fleet.run_for(10)
    with pytest.raises(errors.NotApplied):
        fleet.export_group("old", node="n1")
    exported = fleet.export_group("old", node="n1", consistency="stale")
    assert msgpack.unpackb(exported.state)["k4"] == BIG
    assert not exported.is_linearizable


def test_a_group_that_is_not_there_cannot_be_copied():
    fleet = started()
    with pytest.raises(errors.GroupNotFound):
        fleet.export_group("nobody")


def test_a_group_that_waits_for_its_state_has_none_to_give():
    fleet = started()
    filled(fleet)
    exported = fleet.export_group("old")
    args = {"name": "new", "replicas": 3, "config": copying.restored_config(exported, KEYS).to_dict()}
    fleet.take("n1", "new", copying.begin_steps(args, 5.0))
    fleet.run_for(2)
    for consistency in ("linearizable", "stale"):
        with pytest.raises(errors.BeingRestored):
            fleet.export_group("new", consistency=consistency)


def test_copies_are_few_and_dropped_when_nobody_fetches_them():
    fleet = started()
    filled(fleet, count=1)
    fleet.run_for(1)
    begin = ("copy_begin", {"name": "old", "stale": False})
    owner = shard_of("old", 2)
    copies = [fleet.call("n1", *begin, index=owner) for _ in range(COPIES_MAX)]
    with pytest.raises(errors.Overloaded):
        fleet.call("n1", *begin, index=owner)
    fleet.run_for(COPY_IDLE_US / 1e6 + 1)
    assert fleet.call("n1", *begin, index=owner)["size_bytes"] > 0
    at = {"name": "old", "instance": copies[0]["instance"], "id": copies[0]["id"], "offset": 0}
    with pytest.raises(errors.Unanswered):
        fleet.call("n1", "copy_read", at, index=owner)


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("restore_piece", {"name": "old", "uid": 1, "offset": 0}),
        ("restore_piece", {"name": "old", "uid": 1, "offset": -1, "data": b""}),
        ("restore_piece", {"name": "old", "uid": 1, "offset": 0, "data": "text"}),
        ("restore_piece", {"name": "old", "uid": 1, "offset": 0, "data": bytes(PIECE_BYTES_MAX + 1)}),
        ("copy_begin", {"name": "old"}),
        ("copy_begin", {"name": 5, "stale": True}),
        ("copy_read", {"name": "old", "instance": "x", "id": 1, "offset": 0}),
    ],
)
def test_bad_arguments_are_refused_and_stop_nothing(method: str, args: dict[str, Any]):
    fleet = started()
    filled(fleet, count=1)
    if "uid" in args:
        args = {**args, "uid": fleet.uid_of("old")}
    with pytest.raises((errors.RaftFleetError, ValueError)):
        fleet.call("n1", method, args, index=shard_of("old", 2))
    assert keys_of(fleet, "old") == ["k0"]


def test_a_restored_group_keeps_what_its_first_entry_was_about_through_changes_of_its_config():
    fleet = started()
    filled(fleet, count=1)
    exported = fleet.export_group("old")
    fleet.add_group("new", config=KEYS, restore=exported)
    changed = replace(KEYS, election_timeout_s=2.0)
    fleet.call("n1", "change_config", {"name": "new", "config": changed.to_dict()})
    fleet.run_for(2)
    state = fleet.any_state()
    assert state is not None
    assert state.by_name["new"].config["restore"] == [len(exported.state), exported.crc]
    other = replace(changed, restore=(1, 1))
    with pytest.raises(errors.RaftFleetError, match="restore"):
        fleet.call("n1", "change_config", {"name": "new", "config": other.to_dict()})


def test_the_config_of_a_state_is_taken_unless_another_is_given():
    state = ExportedState(name="g", state=b"\xc0", machine_version=2, config=KEYS.to_dict())
    taken = copying.restored_config(state, None)
    assert (taken.machine, taken.machine_version, taken.restore) == (KEYS.machine, 2, (1, state.crc))
    with pytest.raises(ValueError, match="version"):
        copying.restored_config(state, replace(KEYS, machine_version=1))
    with pytest.raises(ValueError, match="give a config"):
        copying.restored_config(replace(state, config={}), None)

"""Another number of workers: what the fleet is told, and that nothing is given up that may hold a member."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fleet.founding_world import MS, SECOND, FakeShard, World, WorldNode
from fleet.test_manager_core import only_fleet, run_until

from raftfleet import errors
from raftfleet.core import codes
from raftfleet.core.names import FLEET_UID, shard_of
from raftfleet.fleet.machine import FleetRefused, FleetState, Node
from raftfleet.fleet.manager_outputs import ShardCall
from raftfleet.testing.fleet import SimFleet, SimFleetOptions


class DurableWorld(World):
    """Shards keep their instance over restarts of their node, and hold as many members as a test says."""

    def __init__(self, seed: int, workers: int) -> None:
        super().__init__(seed, 3, worker_count=workers)
        self.members: dict[int, int] = {}
        self.retired: list[int] = []
        for node in self.nodes:
            self.start(node)
        run_until(self, lambda: all(node.core is not None and node.core.node_state == "active" for node in self.nodes))

    def restart(self, node: WorldNode, workers: int) -> None:
        """Stop the node and start it with so many workers: its stores are what they were."""
        while len(node.shards) < workers:
            node.shards.append(self._new_shard())
        node.placing_count = workers
        self.kill_manager(node)

    def _info(self, node: WorldNode, index: int, shard: FakeShard) -> dict[str, Any]:
        info = super()._info(node, index, shard)
        return {**info, "members": self.members.get(shard.instance, 0), "resting": 0}

    def _shard_method(self, node: WorldNode, call: ShardCall, shard: FakeShard) -> tuple[int, Any] | None:
        if call.method != "retire":
            return super()._shard_method(node, call, shard)
        state = only_fleet(self).state
        if self.members.get(shard.instance) or shard.instance not in state.gone:
            return codes.REFUSED, "it holds members"
        self.retired.append(shard.instance)
        self._die(shard)
        if node.core is not None:
            node.core.on_shard_lost(self.now_us, call.shard)
        return None

    def _start_manager(self, node: WorldNode) -> None:
        super()._start_manager(node)
        self._later(SECOND, lambda: self._sweep(node, node.core))

    def _sweep(self, node: WorldNode, core: Any) -> None:
        """What the driver does once a second: tell the core what the supervisor knows."""
        if core is None or node.core is not core:
            return
        for index in range(len(node.shards) - 1, -1, -1):
            if index < len(node.shards) and not node.shards[index].alive:
                core.on_shard_retired(self.now_us, index)
                self._drain(node)
        self._later(SECOND, lambda: self._sweep(node, core))

    def node_of(self, node: WorldNode) -> Node:
        return only_fleet(self).state.nodes[node.name]


def instances_of(node: WorldNode) -> list[int]:
    return [shard.instance for shard in node.shards]


def assert_nobody_left(world: DurableWorld) -> None:
    assert not [line for line in world.logs if "leaving fleet" in line]
    assert len(world.fleets) == 1
    assert all(node.core is not None and node.core.node_state == "active" for node in world.nodes)


def test_more_workers_are_told_to_the_fleet_before_members_are_placed_on_them() -> None:
    world = DurableWorld(1, 2)
    node = world.nodes[1]
    before = instances_of(node)
    world.restart(node, 4)
    run_until(world, lambda: world.node_of(node).workers == 4)
    assert list(world.node_of(node).instances) == instances_of(node)
    assert instances_of(node)[:2] == before, "the stores that were there stay what they are"
    assert not only_fleet(world).state.gone
    assert_nobody_left(world)


def test_fewer_workers_leave_the_surplus_shards_running_as_long_as_they_hold_members() -> None:
    world = DurableWorld(2, 3)
    node = world.nodes[0]
    surplus = instances_of(node)[1:]
    world.members.update(dict.fromkeys(surplus, 5))
    world.restart(node, 1)
    run_until(world, lambda: world.node_of(node).workers == 1)
    world.run(20 * SECOND)
    assert list(world.node_of(node).instances)[1:] == surplus
    assert any("10 members are still to move" in line for line in world.logs)
    world.members[surplus[0]] = 0
    world.run(5 * SECOND)
    assert world.retired == [], "they go together, so that the shards of a node are always the first ones"
    world.members[surplus[1]] = 0
    run_until(world, lambda: len(world.node_of(node).instances) == 1 and len(node.shards) == 1)
    assert sorted(world.retired) == sorted(surplus)
    assert set(only_fleet(world).state.gone) == set(surplus)
    world.run(5 * SECOND)
    assert_nobody_left(world)
    assert node.core is not None
    assert [row["surplus"] for row in node.core.status()["workers"]] == [False]


def test_the_node_is_itself_whenever_its_manager_dies_on_the_way() -> None:
    for moment in range(60):
        world = DurableWorld(100 + moment, 3)
        node = world.nodes[2]
        kept, *surplus = instances_of(node)
        world.restart(node, 1)
        world.run(moment * 50 * MS)
        world.kill_manager(node)
        run_until(world, lambda node=node: len(node.shards) == 1)  # type: ignore[misc]
        world.run(3 * SECOND)
        assert list(world.node_of(node).instances) == [kept]
        assert sorted(world.retired) == sorted(surplus)
        assert_nobody_left(world)


def test_a_node_that_dies_between_giving_up_and_putting_aside_goes_on_with_the_latter() -> None:
    world = DurableWorld(3, 2)
    node = world.nodes[0]
    (kept, surplus) = instances_of(node)
    # As after a crash: the fleet's log has it, the store is still there.
    only_fleet(world).state.apply(["workers", node.name, 1], 0)
    only_fleet(world).state.apply(["instances", node.name, [kept], [kept, surplus]], 0)
    only_fleet(world).index += 2
    world.restart(node, 1)
    run_until(world, lambda: len(node.shards) == 1)
    world.run(3 * SECOND)
    assert world.retired == [surplus]
    assert_nobody_left(world)


def test_a_surplus_shard_that_lost_its_store_alone_does_not_stop_the_others_from_going() -> None:
    world = DurableWorld(4, 3)
    node = world.nodes[0]
    world.members[node.shards[2].instance] = 1
    world.restart(node, 1)
    run_until(world, lambda: world.node_of(node).workers == 1)
    world.kill_shard(node, 1)  # a new instance: the former one is gone
    world.members.clear()
    run_until(world, lambda: len(node.shards) == 1)
    world.run(3 * SECOND)
    assert len(world.node_of(node).instances) == 1
    assert_nobody_left(world)


def test_all_nodes_may_be_resharded_at_once_and_back_again() -> None:
    world = DurableWorld(5, 2)
    for workers in (4, 1, 3):
        for node in world.nodes:
            world.restart(node, workers)
        run_until(
            world,
            lambda workers=workers: all(  # type: ignore[misc]
                len(node.shards) == workers
                and world.node_of(node).workers == workers
                and list(world.node_of(node).instances) == instances_of(node)
                for node in world.nodes
            ),
        )
    world.run(3 * SECOND)
    assert_nobody_left(world)


# -------------------------------------------------------------------- the fleet's machine


def founded() -> FleetState:
    state = FleetState()
    fields = {"name": "n1", "zone": "z", "host": "h", "port": 1000, "public_key": "", "instances": [1, 2, 3]}
    state.apply(["found", bytes([1] * 16), [fields]], 0)
    return state


def test_members_are_placed_on_the_shards_that_take_them_and_on_no_other() -> None:
    state = founded()
    names = [f"g{number}" for number in range(40)]
    for name in names:
        state.apply(["add_group", name, 1, {"machine": "m:M"}], 0)
    groups = [state.by_name[name] for name in names]
    assert {instance for group in groups for _, instance in state.desired(group)} == {1, 2, 3}
    state.apply(["workers", "n1", 2], 0)
    for group in groups:
        assert list(state.desired(group)) == [("n1", state.nodes["n1"].instances[shard_of(group.name, 2)])]
    assert FleetState.load(state.dump()) == state


@pytest.mark.parametrize("count", [0, 4, -1, "2", None, True])
def test_a_number_of_workers_that_the_node_does_not_have_is_refused(count: object) -> None:
    state = founded()
    with pytest.raises(FleetRefused):
        state.apply(["workers", "n1", count], 0)
    assert state.nodes["n1"].workers == 3


def test_new_shards_take_nothing_before_it_is_said_and_a_join_changes_nothing_about_it() -> None:
    state = founded()
    state.apply(["workers", "n1", 1], 0)
    state.apply(["instances", "n1", [1, 2, 3, 4], [1, 2, 3]], 0)
    assert state.nodes["n1"].workers == 1
    fields = {key: value for key, value in state.nodes["n1"].fields().items() if key not in ("active", "workers")}
    state.apply(["join", fields], 0)
    assert state.nodes["n1"].workers == 1
    state.apply(["instances", "n1", [1], [1, 2, 3, 4]], 0)
    assert (state.nodes["n1"].workers, list(state.gone)) == (1, [2, 3, 4])


# -------------------------------------------------------------------- workers with members of others' names


def resharded_fleet() -> tuple[SimFleet, list[str]]:
    """Three nodes of two workers, and groups on both; then each node has one that names belong to."""
    fleet = SimFleet(7, SimFleetOptions(workers=2))
    fleet.start({"n1": "z1", "n2": "z2", "n3": "z3"})
    names = [f"group{number}" for number in range(6)]
    assert len({shard_of(name, 2) for name in names}) == 2
    for name in names:
        fleet.add_group(name)
        client = fleet.client("n1")
        client.result(client.command(name, ["set", len(name)]))
    for worker in fleet.live_workers():
        host = worker.host
        host.settings = replace(host.settings, workers=1)
        for name in [name for name in host._known if not host._owns(name)]:
            host._guests[host._known.pop(name)] = None
        host._fleet_replaced()
    for node in fleet.nodes.values():
        node.workers_count = 1  # what clients of this node see
    return fleet, names


def test_groups_on_shards_that_do_not_own_their_names_serve_and_move() -> None:
    fleet, names = resharded_fleet()
    client = fleet.client("n2")
    for name in names:
        assert client.result(client.query(name, "get", retry=20)) == len(name)
    for node in fleet.nodes:
        fleet.call(node, "fleet_command", {"command": ["workers", node, 1]})
    fleet.run_until(
        lambda: not any(set(w.host.shard.members) - {FLEET_UID} for w in fleet.live_workers() if w.index == 1),
        "the second workers to be empty",
        60,
    )
    for name in names:
        assert client.result(client.command(name, "inc", retry=20)) == len(name)
        assert len(fleet.members_of(fleet.uid_of(name))) == 3


def test_a_group_that_is_removed_leaves_no_member_on_a_shard_that_does_not_own_its_name() -> None:
    fleet, names = resharded_fleet()
    for name in names:
        fleet.remove_group(name)
    fleet.run_for(3)
    for worker in fleet.live_workers():
        assert set(worker.host.shard.members) <= {FLEET_UID}
        assert not worker.host._guests


def test_a_worker_that_holds_members_or_is_not_given_up_does_not_retire() -> None:
    fleet, _ = resharded_fleet()
    with pytest.raises(errors.RaftFleetError, match="members"):
        fleet.call("n1", "retire", index=1)
    assert fleet.nodes["n1"].workers[1] is not None

"""What a manager does for its node: join, come back, leave, notice the silent, remove the dead, answer the operator."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fleet.founding_world import MS, SECOND, World, WorldNode

from raftfleet.core import codes
from raftfleet.core import manager_messages as messages
from raftfleet.fleet.founding import Memory
from raftfleet.fleet.manager_core import ManagerCore
from raftfleet.fleet.manager_outputs import ManagerSettings


def settled(peer_count: int = 3, extra_count: int = 0, **options: Any) -> World:
    world = World(1, peer_count, extra_count, **options)
    world.heal()
    return world


def only_fleet(world: World) -> Any:
    assert len(world.fleets) == 1, world.story()
    return next(iter(world.fleets.values()))


def run_until(world: World, condition: Any, limit_us: int = 60 * SECOND) -> None:
    end_us = world.now_us + limit_us
    while not condition():
        assert world.now_us < end_us, world.story()
        world.run(200 * MS)


def ask(
    world: World, node: WorldNode, method: str, args: dict[str, Any], timeout_us: int = 5 * SECOND
) -> tuple[int, Any]:
    token = world.call(node, method, args, timeout_us)
    run_until(world, lambda: token in world.replies)
    return world.replies[token]


def add_group(world: World) -> None:
    only_fleet(world).state.apply(["add_group", "g", 3, {"machine": "m:M"}], 0)
    only_fleet(world).index += 1
    world.run(SECOND)


def test_a_node_without_peers_founds_at_once() -> None:
    world = World(1, 1)
    world.start(world.nodes[0])
    world.run(SECOND)
    assert world.is_settled() and only_fleet(world).voters == list(world.nodes[0].core.instances)  # type: ignore[union-attr]


def test_a_minority_of_peers_waits_and_says_for_whom() -> None:
    world = World(1, 3)
    world.start(world.nodes[1])
    world.run(10 * SECOND)
    core = world.nodes[1].core
    assert core is not None and not world.fleets
    assert "waiting for h:100, h:300" in core.status_text and core.node_state == "activating"


def test_a_node_that_is_not_among_the_peers_joins_but_never_founds() -> None:
    world = World(1, 2, extra_count=1)
    world.start(world.nodes[2])
    world.run(5 * SECOND)
    core = world.nodes[2].core
    assert core is not None and "cannot found" in core.status_text
    world.heal()
    assert set(only_fleet(world).state.nodes) == {"n0", "n1", "n2"}


def test_a_worker_that_dies_again_before_its_node_heard_of_its_return_comes_back_all_the_same() -> None:
    world = settled(worker_count=2)
    node, fleet = world.nodes[0], only_fleet(world)
    first = fleet.state.nodes["n0"].instances
    world.kill_shard(node, 0)
    end_us = world.now_us + 20 * SECOND
    while fleet.state.nodes["n0"].instances == first:
        assert world.now_us < end_us, world.story()
        world.run(MS)
    assert node.core is not None and node.core.state is not None
    assert node.core.state.nodes["n0"].instances == first, "the node has heard: this test is about what comes before"
    world.kill_shard(node, 0)
    world.heal()
    assert fleet.state.nodes["n0"].instances == tuple(shard.instance for shard in node.shards)


def test_a_restarted_shard_takes_its_place_with_a_new_instance() -> None:
    world = settled(worker_count=2)
    old = world.nodes[0].shards[1].instance
    world.kill_shard(world.nodes[0], 1)
    world.heal()
    state = only_fleet(world).state
    assert state.gone[old] == "restarted"
    assert state.nodes["n0"].instances == tuple(shard.instance for shard in world.nodes[0].shards)


def test_a_restarted_manager_finds_its_fleet_again() -> None:
    world = settled()
    before = only_fleet(world).state.dump()
    world.kill_manager(world.nodes[0])
    world.heal()
    assert only_fleet(world).state.dump() == before


def test_a_killed_node_comes_back_as_a_new_one() -> None:
    world = settled()
    old = world.nodes[0].shards[0].instance
    world.kill(world.nodes[0])
    world.run(2 * SECOND)
    world.heal()
    assert only_fleet(world).state.gone[old] == "restarted" and old not in only_fleet(world).voters


def test_a_silent_node_is_unreachable_and_is_removed_after_the_window() -> None:
    world = settled(purge_window_us=20 * SECOND)
    dead = world.nodes[2]
    instance = dead.shards[0].instance
    world.kill(dead)
    watcher = world.nodes[0]
    run_until(world, lambda: "n2" in ask(world, watcher, "unreachable_nodes", {})[1], 10 * SECOND)
    assert "n2" in only_fleet(world).state.nodes
    run_until(world, lambda: "n2" not in only_fleet(world).state.nodes, 30 * SECOND)
    assert only_fleet(world).state.gone[instance] == "purged"
    run_until(world, lambda: ask(world, watcher, "unreachable_nodes", {})[1] == {})


def test_a_node_that_was_removed_while_cut_off_comes_back_as_a_new_one() -> None:
    world = settled(purge_window_us=10 * SECOND)
    far = world.nodes[2]
    instance = far.shards[0].instance
    for other in world.nodes[:2]:
        world.cut |= {(far.port, other.port), (other.port, far.port)}
    run_until(world, lambda: "n2" not in only_fleet(world).state.nodes)
    world.cut.clear()
    run_until(world, lambda: far.shards[0].instance != instance)
    world.heal()
    assert "n2" in only_fleet(world).state.nodes


def test_a_deactivated_node_leaves_and_can_be_activated_again() -> None:
    world = settled(4)
    node = world.nodes[3]
    assert ask(world, node, "deactivate", {"wait": True}, 20 * SECOND) == (0, {})
    assert "n3" not in only_fleet(world).state.nodes
    assert node.core is not None and node.core.node_state == "inactive" and not node.core.fleet
    assert ask(world, node, "activate", {"zone": "elsewhere"}, 20 * SECOND) == (0, {})
    assert only_fleet(world).state.nodes["n3"].zone == "elsewhere"


def test_a_name_that_is_taken_is_refused_and_said() -> None:
    world = settled(3, extra_count=0)
    stranger = WorldNode("n0", 900)
    world.nodes.append(stranger)
    world.by_port[900] = stranger
    world.start(stranger)
    world.run(5 * SECOND)
    assert stranger.core is not None and "the name n0 is taken" in stranger.core.status_text
    assert not stranger.core.fleet


def test_a_dead_node_is_removed_on_the_operators_word_but_not_a_living_one() -> None:
    world = settled(3)
    code, text = ask(world, world.nodes[0], "remove_dead_node", {"node": "n2"})
    assert code == codes.REFUSED and "is not dead" in text
    assert ask(world, world.nodes[0], "remove_dead_node", {"node": "nobody"})[0] == codes.REFUSED
    instance = world.nodes[2].shards[0].instance
    world.kill(world.nodes[2])
    world.run(8 * SECOND)
    code, body = ask(world, world.nodes[0], "remove_dead_node", {"node": "n2"}, 20 * SECOND)
    assert code == 0 and "was removed" in body["message"]
    assert only_fleet(world).state.gone[instance] == "operator"
    told = {name for name, method, args in world.calls if method == "declare_dead" and args["instances"] == [instance]}
    assert told == {"n0", "n1"}, "every reachable manager tells its shards"


def test_without_a_majority_the_operators_word_is_noted_and_carried_out_later() -> None:
    world = settled(3)
    add_group(world)
    for node in world.nodes[1:]:
        world.kill(node)
    world.run(8 * SECOND)
    code, body = ask(world, world.nodes[0], "remove_dead_node", {"node": "n1"}, 20 * SECOND)
    assert code == 0 and "still has no leader" in body["message"]
    group = only_fleet(world)
    group.voters = [world.nodes[0].shards[0].instance]  # what the core's recovery comes to
    run_until(world, lambda: "n1" not in group.state.nodes)
    assert "n2" in group.state.nodes


def test_a_fleet_with_groups_waits_for_the_operator() -> None:
    world = settled(3)
    add_group(world)
    for node in world.nodes[1:]:
        world.kill(node)
        world.start(node)
    world.run(20 * SECOND)
    core = world.nodes[0].core
    assert core is not None and core.fleet and len(world.fleets) == 1
    assert "remove-dead-node" in core.status_text


def test_without_a_leader_a_full_disk_is_named_and_no_node_that_answers_is_called_missing() -> None:
    world = settled(3)
    add_group(world)
    core = world.nodes[0].core
    assert core is not None
    assert "remove-dead-node" not in core._why_leaderless() and "answers" in core._why_leaderless()
    core.shards[0].info["disk"] = {"state": "full"}
    why = core._why_leaderless()
    assert "shard 0 is full" in why and "free some space" in why and "remove-dead-node" not in why
    world.kill(world.nodes[2])
    run_until(world, lambda: "n2" in core.unreachable)
    core.shards[0].info["disk"] = {"state": "ok"}
    why = core._why_leaderless()
    assert "of n2 nothing is heard" in why and "remove-dead-node" in why and "full or" not in why


def test_peers_that_restart_apart_from_a_living_fleet_found_no_second_one() -> None:
    world = settled(3, extra_count=2)
    apart, rest = world.nodes[:2], world.nodes[2:]
    world.cut = {(a.port, b.port) for a in world.nodes for b in world.nodes if (a in apart) != (b in apart)}
    for node in apart:
        world.kill(node)
        world.start(node)
    world.run(30 * SECOND)
    assert len(world.fleets) == 1
    core = apart[0].core
    assert core is not None and "which may still be in the fleet that this node was in" in core.status_text
    assert any(world._leader(node.shards[0]) for node in rest), "the fleet lives on meanwhile"
    world.heal()
    assert len(world.fleets) == 1


def test_after_all_died_the_peers_found_anew_once_everyone_has_answered_or_is_declared_dead() -> None:
    world = settled(3, extra_count=1)
    add_group(world)
    for node in world.nodes:
        world.kill(node)
    for node in world.nodes[:3]:
        world.start(node)
    world.run(20 * SECOND)
    assert len(world.fleets) == 1, "n3 may still live in the old fleet"
    code, body = ask(world, world.nodes[0], "remove_dead_node", {"node": "n3"})
    assert code == 0 and "does not wait for n3" in body["message"]
    for node in world.nodes[1:3]:
        ask(world, node, "remove_dead_node", {"node": "n3"})
    run_until(world, world.is_settled)
    assert len(world.fleets) == 2 and world.nodes[0].core is not None
    assert world.nodes[0].core.state is not None and not world.nodes[0].core.state.groups


def test_a_delayed_join_of_a_former_life_does_no_harm() -> None:
    world = settled(3)
    node = world.nodes[2]
    assert node.core is not None and world.nodes[0].core is not None
    stale = messages.ManagerRpc(messages.MANAGER_RPC, 7, node.core.record, "join", {})
    world.kill(node)
    world.heal()
    instances = node.core.instances
    world.nodes[0].core.receive(world.now_us, stale)
    world._drain(world.nodes[0])
    world.run(5 * SECOND)
    assert node.core.instances == instances and only_fleet(world).state.nodes["n2"].instances == instances


def test_bad_calls_and_messages_are_refused_and_nothing_raises() -> None:
    world = settled(1)
    node = world.nodes[0]
    core = node.core
    assert core is not None
    for method, args in [("nonsense", {}), ("activate", {}), ("activate", {"zone": 5}), ("remove_dead_node", {})]:
        assert ask(world, node, method, args)[0] == codes.BAD_REQUEST, method
    record = core.record
    for bad in [record._replace(instances=()), record._replace(port=0), record._replace(name="")]:
        core.receive(world.now_us, messages.Ping(messages.PING, 1, bad, b""))
    core.receive(world.now_us, messages.Founded(messages.FOUNDED, record, messages.FoundingValue(b"", (0, 0), ())))
    for method, rpc_args in [("propose", {"command": b"\xc1"}), ("propose", {}), ("declare_dead", {}), ("what", {})]:
        core.receive(world.now_us, messages.ManagerRpc(messages.MANAGER_RPC, 1, record, method, rpc_args))
    world._drain(node)
    world.run(SECOND)
    assert world.is_settled()


def test_status_has_the_documented_fields() -> None:
    world = settled(2)
    code, status = ask(world, world.nodes[0], "status", {})
    assert code == 0
    assert {"node", "instance", "zone", "state", "fleet", "endpoint", "durable", "nodes", "unreachable"} <= set(status)
    assert status["state"] == "active" and status["nodes"] == {"n0": ["n0"], "n1": ["n1"]}
    assert {"index", "members", "leaders"} <= set(status["workers"][0])


def test_an_inactive_node_says_how_to_activate_it() -> None:
    world = World(1, 1)
    world.nodes[0].zone = None  # type: ignore[assignment]
    world.start(world.nodes[0])
    world.run(SECOND)
    code, text = ask(world, world.nodes[0], "groups", {})
    assert code == codes.NOT_ACTIVE and "activate --zone" in text
    assert ask(world, world.nodes[0], "activate", {"zone": "z"})[0] == 0


def test_the_manager_ticks_however_busy_it_is() -> None:
    settings = ManagerSettings(name="n", host="h", port=1, public_key="", workers=1)
    core = ManagerCore(settings, Memory(1), random.Random(1), 0)
    deadline = core.next_deadline_us()
    core.call(deadline - 1, object(), "status", {}, SECOND)
    assert core.next_deadline_us() == deadline


@pytest.mark.parametrize("nodes", [3, 200])
def test_the_ping_interval_grows_with_the_fleet(nodes: int) -> None:
    world = settled(1)
    core = world.nodes[0].core
    assert core is not None and core.state is not None
    for i in range(nodes):
        fields = {"name": f"x{i}", "zone": "z", "host": f"x{i}", "port": 1, "instances": [10**6 + i]}
        core.state.apply(["join", fields], 0)
    assert core._ping_interval_us() == SECOND * max(20, nodes + 1) // 20

"""The life of node processes: start, stop, kill, take-over, founding."""

from __future__ import annotations

import os
import random
import signal
import time

import psutil
from e2e.load import JUST_AN_INT, THREE_NODES_IN_THREE_ZONES

from raftfleet.testing import LocalFleet


def test_a_stopped_node_leaves_no_process_socket_or_segment(fleet: LocalFleet) -> None:
    node = fleet.start_node("n1", "z1", workers=2)
    processes = node.processes()
    assert len(processes) == 4, "supervisor, manager and two shards"
    segment = os.readlink(node.run_dir / "leader_table")
    assert os.path.exists(segment)
    assert fleet.stop_node("n1") == 0
    assert not any(psutil.pid_exists(process.pid) for process in processes[1:])
    assert not os.path.exists(segment)
    left = sorted(path.name for path in node.run_dir.iterdir()) if node.run_dir.exists() else []
    assert left in ([], ["node.lock"])


def test_a_killed_supervisor_takes_its_children_along_and_the_next_start_takes_over(fleet: LocalFleet) -> None:
    node = fleet.start_node("n1", "z1", workers=2)
    fleet.kill_node("n1")  # waits for the children, which nobody else ends
    segment = os.readlink(node.run_dir / "leader_table")
    assert os.path.exists(segment), "SIGKILL leaves its segment behind"
    assert (node.run_dir / "control.sock").exists()
    fleet.restart_node("n1")
    fleet.connect("n1").add_consensus_group("counter", 1, JUST_AN_INT)
    assert fleet.connect("n1").command("counter", "inc") == 0
    assert fleet.stop_node("n1") == 0
    assert not os.path.exists(segment)


def test_killed_children_are_replaced(fleet: LocalFleet) -> None:
    node = fleet.start_node("n1", "z1", workers=2)
    for index in (0, 1):
        pid = fleet.kill_worker("n1", index)
        fleet.wait_until(lambda i=index, pid=pid: fleet.worker_pid("n1", i) not in (0, pid), 10.0, "another worker")
    fleet.wait_until(lambda: len(node.processes()) == 4, 10.0, "all processes")
    assert fleet.stop_node("n1") == 0


def test_a_killed_manager_is_replaced_and_commands_go_on_meanwhile(fleet: LocalFleet) -> None:
    fleet.start_nodes(THREE_NODES_IN_THREE_ZONES)
    client = fleet.connect("n1")
    client.add_consensus_group("counter", 3, JUST_AN_INT)
    node = fleet.nodes["n1"]
    workers = {worker["pid"] for worker in fleet.status("n1")["workers"]}
    managers = [process for process in node.processes()[1:] if process.pid not in workers]
    assert len(managers) == 1
    managers[0].kill()
    assert [client.command("counter", "inc") for _ in range(20)] == list(range(20))
    fleet.wait_until(lambda: fleet.status("n1")["state"] == "active", 10.0, "the manager to be back")
    assert {worker["pid"] for worker in fleet.status("n1")["workers"]} == workers
    client.add_consensus_group("another", 3, JUST_AN_INT)


def test_a_second_node_in_the_same_run_directory_is_refused(fleet: LocalFleet) -> None:
    first = fleet.start_node("n1", "z1")
    second = fleet.start_node("n2", "z1", wait=False, run_dir=first.run_dir)
    assert second.process is not None
    assert second.process.wait(10.0) == 7
    assert str(first.run_dir) in second.log()
    assert fleet.status("n1")["state"] == "active"


def test_a_paused_node_is_missed_and_welcomed_back(fleet: LocalFleet) -> None:
    fleet.start_nodes(THREE_NODES_IN_THREE_ZONES)
    client = fleet.connect("n1")
    names = [f"group{number}" for number in range(6)]
    for name in names:
        client.add_consensus_group(name, 3, JUST_AN_INT)
    fleet.wait_settled()
    fleet.pause_node("n3")
    try:
        for name in names:
            assert client.command(name, "inc", retry=10) == 0
        fleet.wait_until(lambda: "n3" in client.unreachable_nodes(), 20.0, "n3 to be missed")
    finally:
        fleet.resume_node("n3")
    fleet.wait_until(lambda: not client.unreachable_nodes(), 20.0, "n3 to be back")
    fleet.wait_settled()
    woken = fleet.connect("n3")
    for name in names:
        assert woken.query(name, "get", retry=10) == 1


def test_sigterm_while_starting_ends_a_node_cleanly(fleet: LocalFleet) -> None:
    # Its only peer does not exist, so it waits for a majority and says what for.
    node = fleet.start_node("n1", "z1", peers=["127.0.0.1:1", "127.0.0.1:2"], wait=False)
    fleet.wait_until(lambda: fleet.status("n1")["state"] == "activating", 10.0, "the node to wait for its peers")
    assert node.process is not None
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(10.0) == 0


def test_nodes_started_at_random_moments_and_killed_half_way_found_one_fleet(fleet: LocalFleet) -> None:
    """Many rounds of this, with cuts, run in the simulator; here the real processes do it a few times."""
    rng = random.Random(20)
    for round_ in range(4):
        names = {f"r{round_}n{number}": f"z{number}" for number in range(3)}
        nodes = [fleet.define_node(name, zone) for name, zone in names.items()]
        for node in nodes:
            node.peers = tuple(other.endpoint for other in nodes)
        for node in rng.sample(nodes, 3):
            fleet.launch_node(node.name)
            moment = time.monotonic() + rng.uniform(0.0, 0.6)
            fleet.wait_until(lambda moment=moment: time.monotonic() >= moment, 5.0, "a random moment")
        victim = rng.choice(nodes)
        fleet.kill_node(victim.name)
        fleet.restart_node(victim.name, wait=False)
        fleet.wait_until(lambda nodes=nodes: len(fleets(fleet, nodes)) == 1, 30.0, f"one fleet in round {round_}")
        for node in nodes:
            fleet.wait_until(lambda node=node: fleet.status(node.name)["state"] == "active", 20.0, f"{node.name}")
        assert len(fleets(fleet, nodes)) == 1
        for node in nodes:
            fleet.stop_node(node.name)


def fleets(fleet: LocalFleet, nodes: list) -> set:
    """The fleets that the nodes say they are in; None of a node that is in none yet."""
    return {fleet.status(node.name)["fleet"] for node in nodes} or {None}

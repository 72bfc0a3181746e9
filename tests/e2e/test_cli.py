"""The command line as a person and a script meet it: stdout, stderr, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.load import THREE_NODES_IN_THREE_ZONES

from raftfleet.testing import LocalFleet

MACHINE = "raftfleet.testing.machines:JustAnInt"


def run(*words: str, run_dir: Path | None = None, deadline_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAFTFLEET_")}
    if run_dir is not None:
        environ["RAFTFLEET_RUN_DIR"] = str(run_dir)
    return subprocess.run(
        [sys.executable, "-m", "raftfleet.node.cli", *words],
        capture_output=True,
        text=True,
        timeout=deadline_s,
        env=environ,
    )


@pytest.fixture
def node(fleet: LocalFleet) -> Path:
    """Run directory of n1 of three nodes."""
    return fleet.start_nodes(THREE_NODES_IN_THREE_ZONES)[0].run_dir


def test_a_group_lives_and_dies_on_the_command_line(node: Path) -> None:
    added = run("add-group", "counter", "--machine", MACHINE, "--set", "election_timeout_s=2", run_dir=node)
    assert (added.returncode, added.stdout) == (0, ""), added.stderr
    assert "counter" in added.stderr
    assert run("command", "counter", '["set", 41]', run_dir=node).stdout == "0\n"
    assert run("command", "counter", '"inc"', run_dir=node).stdout == "41\n"
    assert run("query", "counter", '"get"', run_dir=node).stdout == "42\n"
    assert run("query", "counter", '"get"', "--stale", run_dir=node).stdout in ("0\n", "41\n", "42\n")

    groups = json.loads(run("groups", "--json", run_dir=node).stdout)
    assert set(groups) == {"counter"}
    assert set(groups["counter"]) >= {"replicas", "uid", "leader", "term", "members", "desired", "commit"}
    assert sorted(groups["counter"]["members"]) == ["n1", "n2", "n3"]
    table = run("groups", run_dir=node).stdout.splitlines()
    assert table[0].split() == ["GROUP", "REPLICAS", "LEADER", "TERM", "COMMIT", "MEMBERS", "SETTLED"]
    assert table[1].startswith("counter")

    members = json.loads(run("members", "counter", "--json", run_dir=node).stdout)
    assert [row["desired"] for row in members["order"]] == [True, True, True]
    assert "n2" in run("members", "counter", run_dir=node).stdout

    assert run("remove-group", "counter", run_dir=node).returncode == 0
    assert json.loads(run("groups", "--json", run_dir=node).stdout) == {}


def test_status_and_nodes_show_the_fleet(node: Path) -> None:
    status = json.loads(run("status", "--json", run_dir=node).stdout)
    assert status["node"] == "n1" and status["zone"] == "z1" and status["state"] == "active"
    assert status["durable"] is False and status["unreachable"] == {} and status["groups"] == 0
    assert status["nodes"] == {"z1": ["n1"], "z2": ["n2"], "z3": ["n3"]}
    assert {"instance", "fleet", "endpoint"} <= set(status)
    (worker,) = status["workers"]
    assert set(worker) >= {"index", "pid", "members", "leaders", "cpu_percent", "rss_bytes", "restarts"}
    assert "node n1: active, zone z1, in memory" in run("status", run_dir=node).stdout
    assert json.loads(run("nodes", "--json", run_dir=node).stdout) == {"nodes": status["nodes"], "unreachable": {}}
    assert len(run("nodes", run_dir=node).stdout.splitlines()) == 4
    assert json.loads(run("leaderless", "--json", run_dir=node).stdout) == {}


def test_leadership_is_transferred(node: Path, fleet: LocalFleet) -> None:
    assert run("add-group", "counter", "--machine", MACHINE, run_dir=node).returncode == 0
    leader = fleet.wait_settled()["counter"]["leader"]
    target = next(name for name in THREE_NODES_IN_THREE_ZONES if name != leader)
    done = run("transfer", "counter", target, run_dir=node)
    assert done.returncode == 0, done.stderr


def test_a_node_is_deactivated_activated_and_stopped(node: Path, fleet: LocalFleet) -> None:
    assert run("add-group", "counter", "--machine", MACHINE, "--replicas", "2", run_dir=node).returncode == 0
    run_dir = fleet.nodes["n3"].run_dir
    done = run("deactivate", "--wait", run_dir=run_dir)
    assert done.returncode == 0, done.stderr
    assert fleet.status("n3")["state"] == "inactive"
    fleet.wait_until(lambda: "z3" not in fleet.call("n1", "active_nodes"), 10.0, "n3 to be out of the fleet")
    assert run("activate", "--zone", "z4", run_dir=run_dir).returncode == 0
    fleet.wait_until(lambda: fleet.call("n1", "active_nodes").get("z4") == ["n3"], 20.0, "n3 to be active again")
    done = run("stop", "--drain", run_dir=run_dir)
    assert done.returncode == 0, done.stderr
    process = fleet.nodes["n3"].process
    assert process is not None and process.wait(10.0) == 0
    assert run("query", "counter", '"get"', run_dir=node).stdout == "0\n"


def test_a_dead_node_is_removed(node: Path, fleet: LocalFleet) -> None:
    assert run("add-group", "counter", "--machine", MACHINE, run_dir=node).returncode == 0
    fleet.kill_node("n2")
    fleet.kill_node("n3")
    fleet.wait_until(lambda: "counter" in fleet.call("n1", "leaderless_groups"), 20.0, "the leader to step down")
    assert "counter" in run("leaderless", run_dir=node).stdout
    for name in ("n2", "n3"):
        done = run("remove-dead-node", name, run_dir=node)
        assert done.returncode == 0, done.stderr
    fleet.wait_until(lambda: fleet.connect("n1").query("counter", "get") == 0, 20.0, "the group to serve again")


@pytest.mark.parametrize(
    ("words", "said", "next_step"),
    [
        (["command", "nowhere", '"inc"'], "nowhere", "raftfleet-node groups"),
        (["remove-group", "nowhere"], "nowhere", "raftfleet-node groups"),
        (["members", "nowhere"], "nowhere", "raftfleet-node groups"),
        (["add-group", "broken", "--machine", "no_such_module:Machine"], "no_such_module", "--app-dir"),
    ],
)
def test_what_fails_says_why_and_what_to_do_next(node: Path, words: list[str], said: str, next_step: str) -> None:
    done = run(*words, run_dir=node)
    assert done.returncode == 1
    assert done.stdout == ""
    assert said in done.stderr and next_step in done.stderr and "Traceback" not in done.stderr


def test_a_command_that_the_machine_refuses_is_a_failure(node: Path) -> None:
    run("add-group", "counter", "--machine", MACHINE, run_dir=node)
    done = run("command", "counter", '"multiply"', run_dir=node)
    assert done.returncode == 1
    assert "ValueError" in done.stderr and "state is what it was" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["command", "counter", "inc"],
        ["add-group", "counter"],
        ["add-group", "counter", "--machine", "no colon"],
        ["add-group", "counter", "--machine", MACHINE, "--set", "election_timeout_s"],
        ["add-group", "counter", "--machine", MACHINE, "--set", "no_such_field=1"],
        ["start", "--bind", "nonsense"],
        ["start", "--bind", "10.0.0.1:7400"],
        ["start", "--workers", "many"],
        ["no-such-command"],
        ["query"],
    ],
    ids=" ".join,
)
def test_a_wrong_call_exits_with_2_and_explains(words: list[str], tmp_path: Path) -> None:
    done = run(*words, run_dir=tmp_path)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr and "Traceback" not in done.stderr


def test_without_a_node_the_message_says_how_to_start_one(tmp_path: Path) -> None:
    done = run("status", run_dir=tmp_path)
    assert done.returncode == 1
    assert "raftfleet-node start" in done.stderr and "--run-dir" in done.stderr


def test_a_node_is_ready_on_one_line_and_reads_a_config_file(fleet: LocalFleet, tmp_path: Path) -> None:
    node = fleet.define_node("n1", "z1")
    config = tmp_path / "node.toml"
    config.write_text(f'name = "from-file"\nzone = "z9"\nbind = "{node.endpoint}"\nrun-dir = "{node.run_dir}"\n')
    command = [sys.executable, "-m", "raftfleet.node.cli", "start", "--config", str(config), "--workers", "1"]
    environ = {**os.environ, "RAFTFLEET_ZONE": "z5"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("ready") and node.endpoint in line
            status = json.loads(run("status", "--json", run_dir=node.run_dir).stdout)
            assert (status["node"], status["zone"]) == ("from-file", "z5")
        finally:
            process.terminate()
        assert process.wait(10.0) == 0
        assert process.stdout.read() == ""

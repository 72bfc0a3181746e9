"""States to files and back, with real nodes: one group, a whole fleet, from Python and from the command line."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from e2e.load import THREE_NODES_IN_THREE_ZONES
from e2e.test_cli import run

import raftfleet
from raftfleet import aio, errors
from raftfleet.testing import LocalFleet

KEYS = raftfleet.GroupConfig("raftfleet.testing.machines:KeyValue")
NUMBER = raftfleet.GroupConfig("raftfleet.testing.machines:JustAnInt")
LARGE = "v" * 900_000


def test_a_removed_group_comes_back_from_its_file(fleet: LocalFleet, tmp_path: Path) -> None:
    run_dir = fleet.start_nodes(THREE_NODES_IN_THREE_ZONES)[0].run_dir
    client = fleet.connect("n1")
    client.add_consensus_group("keys", 3, KEYS)
    for number in range(3):
        client.command("keys", ["put", f"k{number}", LARGE], timeout=10.0)
    file = tmp_path / "keys.raftstate"
    done = run("export", "keys", str(file), run_dir=run_dir)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert run("export", "keys", str(file), run_dir=run_dir).returncode == 2, "it is there already"
    client.remove_consensus_group("keys")
    with pytest.raises(errors.GroupNotFound):
        client.query("keys", ["keys"], retry=0)
    done = run("restore", str(file), run_dir=run_dir)
    assert done.returncode == 0, done.stderr
    for name in THREE_NODES_IN_THREE_ZONES:
        assert fleet.connect(name).query("keys", ["keys"], retry=20) == ["k0", "k1", "k2"]
    assert client.query("keys", ["get", "k2"]) == LARGE
    assert client.command("keys", ["put", "k3", 1], retry=20) is None
    done = run("restore", str(file), run_dir=run_dir)
    assert done.returncode == 1 and "was not restored" in done.stderr
    done = run("add-group", "copy", "--machine", KEYS.machine, "--restore", str(file), run_dir=run_dir)
    assert done.returncode == 0, done.stderr
    assert client.query("copy", ["size"], retry=20) == 3


def test_a_whole_fleet_moves_into_another(fleet: LocalFleet, tmp_path: Path) -> None:
    fleet.start_nodes({"n1": "z1", "n2": "z2", "n3": "z3"})
    client = fleet.connect("n1")
    names = [f"group/{number}" for number in range(8)]
    for number, name in enumerate(names):
        client.add_consensus_group(name, 2 + number % 2, NUMBER)
        client.command(name, ["set", number], retry=20)
    folder = tmp_path / "backup"
    done = run("export", "--all", str(folder), run_dir=fleet.nodes["n2"].run_dir)
    assert done.returncode == 0, done.stderr
    assert len(list(folder.iterdir())) == len(names)
    for name in ("n1", "n2", "n3"):
        fleet.kill_node(name)
    fleet.start_nodes({"m1": "z1", "m2": "z2", "m3": "z3"})
    damaged = folder / "damaged.raftstate"
    damaged.write_bytes(b"nonsense")
    done = run("restore", str(folder), run_dir=fleet.nodes["m1"].run_dir, deadline_s=120.0)
    assert done.returncode == 1, "one of them is no state"
    assert f"1 of {len(names) + 1} files failed: {damaged}" in done.stderr
    after = fleet.connect("m3")
    assert after.consensus_groups() == {name: 2 + number % 2 for number, name in enumerate(names)}
    for number, name in enumerate(names):
        assert after.query(name, "get", retry=20) == number
        assert after.command(name, "inc", retry=20) == number


def test_python_copies_a_group_in_one_process(fleet: LocalFleet) -> None:
    run_dir = fleet.start_nodes(THREE_NODES_IN_THREE_ZONES)[0].run_dir
    client = fleet.connect("n1")
    client.add_consensus_group("number", 3, NUMBER)
    client.command("number", ["set", 42], retry=20)
    state = client.export_group("number")
    assert raftfleet.ExportedState.unpack(state.pack()) == state
    client.add_consensus_group("second", restore=state, timeout=20.0)
    assert client.query("second", "get", retry=20) == 42

    async def copied() -> int:
        async with aio.connect(run_dir) as fleet:
            state = await fleet.export_group("second", consistency="stale")
            await fleet.add_consensus_group("third", 3, NUMBER, restore=state, timeout=20.0)
            return int(await fleet.query("third", "get", retry=20))

    assert asyncio.run(copied()) == 42
    with pytest.raises(TypeError, match="ExportedState"):
        client.add_consensus_group("fourth", 3, NUMBER, restore=state.pack())  # type: ignore[arg-type]
    broken = raftfleet.ExportedState(name="x", state=b"\xc1", machine_version=1)
    with pytest.raises(errors.CommandFailed):
        client.add_consensus_group("broken", 3, NUMBER, restore=broken, timeout=20.0)
    with pytest.raises(errors.BeingRestored):
        client.query("broken", "get", retry=0, timeout=5.0)
    client.remove_consensus_group("broken")


def test_a_removed_durable_group_comes_back_from_the_archive(tmp_path: Path) -> None:
    with LocalFleet(durable=True) as fleet:
        run_dir = fleet.start_nodes(THREE_NODES_IN_THREE_ZONES)[0].run_dir
        client = fleet.connect("n1")
        client.add_consensus_group("number", 3, NUMBER)
        client.command("number", ["set", 7], retry=20)
        client.remove_consensus_group("number")
        data_dir = fleet.nodes["n1"].options["data_dir"]
        fleet.wait_until(
            lambda: len(list(data_dir.glob("shard-*/archive/*.snap"))) == 1, 60.0, "the archive to be there"
        )
        listed = [json.loads(line) for line in run("wal", "ls", "--json", str(data_dir)).stdout.splitlines()]
        (row,) = [row for row in listed if row["file"].startswith("archive/")]
        assert row["name"] == "number"
        file = data_dir / row["shard"] / row["file"]
        refused = run("restore", str(file), run_dir=run_dir)
        assert refused.returncode == 2 and "--machine" in refused.stderr
        done = run("restore", str(file), "--machine", NUMBER.machine, run_dir=run_dir)
        assert done.returncode == 0, done.stderr
        assert client.query("number", "get", retry=20) == 7
        for name in THREE_NODES_IN_THREE_ZONES:
            fleet.kill_node(name)
        for name in THREE_NODES_IN_THREE_ZONES:
            fleet.restart_node(name, wait=False)
        fleet.wait_until(lambda: fleet.status("n2")["state"] == "active", 60.0, "n2 to be active")
        assert fleet.connect("n2").query("number", "get", retry=60) == 7, "the restored state is durable"

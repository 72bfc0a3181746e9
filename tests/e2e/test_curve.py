"""Nodes with CURVE keys: those whose key is in the list work together, another one stays outside and is told why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from e2e.load import JUST_AN_INT

from raftfleet.testing import LocalFleet
from raftfleet.transport.curve import generate_keys


def make_key(folder: Path, name: str) -> tuple[Path, str]:
    """A key pair as an operator makes it: the file of the secret key, and the public key."""
    file = folder / f"{name}.key"
    command = [sys.executable, "-m", "raftfleet.node.cli", "keygen", str(file)]
    return file, subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write_list(file: Path, keys: list[str]) -> Path:
    file.write_text("".join(f"{key}  node {number}\n" for number, key in enumerate(keys)))
    return file


def curve(secret: Path, keys: Path) -> dict[str, Any]:
    return {"curve_secret_file": secret, "curve_public_keys_file": keys}


def test_nodes_of_one_list_form_a_fleet_and_a_stranger_is_told_why_it_cannot_join(
    fleet: LocalFleet, tmp_path: Path
) -> None:
    made = {name: make_key(tmp_path, name) for name in ("n1", "n2", "stranger")}
    spare = [generate_keys().public_key for _ in range(15)]  # nodes that are not there yet: their keys are tried too
    ours = write_list(tmp_path / "fleet.keys", [made["n1"][1], made["n2"][1], *spare])
    nodes = [fleet.define_node(name, f"z-{name}", **curve(made[name][0], ours)) for name in ("n1", "n2")]
    for node in nodes:
        node.peers = tuple(other.endpoint for other in nodes)
        fleet.launch_node(node.name)
    for node in nodes:
        fleet.wait_until(lambda node=node: fleet.status(node.name)["state"] == "active", 20.0, f"{node.name}")
    client = fleet.connect("n2")
    client.add_consensus_group("counter", 2, JUST_AN_INT)
    assert [client.command("counter", "inc") for _ in range(5)] == [0, 1, 2, 3, 4]

    # It put its own key into its own list, and nobody else did.
    its = write_list(tmp_path / "its.keys", [key for _, key in made.values()])
    stranger = fleet.start_node("stranger", "z1", wait=False, **curve(made["stranger"][0], its))
    refused = f"refused this node: its public key {made['stranger'][1]} is not in the list there"
    fleet.wait_until(lambda: refused in stranger.log(), 20.0, "the stranger to be told")
    here = "refused (public key): from 127.0.0.1, which is not in the fleet's list"
    fleet.wait_until(lambda: any(here in node.log() for node in nodes), 5.0, "a node to say whom it refused")
    assert fleet.status("stranger")["state"] == "activating"
    assert sorted(sum(fleet.status("n1")["nodes"].values(), [])) == ["n1", "n2"]


def test_a_node_whose_key_is_not_in_its_own_list_says_so(fleet: LocalFleet, tmp_path: Path) -> None:
    secret, key = make_key(tmp_path, "n1")
    others = write_list(tmp_path / "fleet.keys", [make_key(tmp_path, "n2")[1]])
    node = fleet.start_node("n1", "z1", **curve(secret, others))  # alone it needs no other's trust
    assert f"this node's own public key {key} is not in {others}" in node.log()

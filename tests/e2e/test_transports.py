"""Nodes over each transport, and two that differ."""

from __future__ import annotations

import pytest
from e2e.load import JUST_AN_INT

from raftfleet.testing import LocalFleet

ZONES = {"n1": "a", "n2": "b", "n3": "c"}


@pytest.mark.parametrize("transport", ["tcp", "zeromq"])
def test_a_fleet_serves_and_outlives_a_node_over_either_transport(fleet: LocalFleet, transport: str) -> None:
    fleet.start_nodes(ZONES, transport=transport)
    client = fleet.connect("n1")
    client.add_consensus_group("counter", 3, JUST_AN_INT)
    assert [client.command("counter", "inc") for _ in range(20)] == list(range(20))
    fleet.kill_node("n3")
    assert [client.command("counter", "inc", timeout=5.0, retry=10) for _ in range(20)] == list(range(20, 40))
    fleet.restart_node("n3")
    assert fleet.connect("n3").command("counter", "inc", timeout=5.0, retry=10) == 40


def test_nodes_that_speak_different_transports_say_so(fleet: LocalFleet) -> None:
    fleet.start_node("n1", "a")
    other = fleet.start_node("n2", "b", wait=False, transport="zeromq")
    here = "it began as ZeroMQ does (--transport"
    fleet.wait_until(lambda: here in fleet.nodes["n1"].log(), 30.0, "the node that speaks TCP to say so")
    client = fleet.connect("n1")
    client.add_consensus_group("counter", 1, JUST_AN_INT)
    assert client.command("counter", "inc") == 0
    assert "Traceback" not in other.log() + fleet.nodes["n1"].log()

"""A machine that is not deterministic, on purpose, on real nodes: seen, told, quarantined, made anew."""

from __future__ import annotations

from pathlib import Path

import raftfleet
from raftfleet.testing import LocalFleet


def test_a_member_that_differs_is_seen_quarantined_and_made_anew(fleet: LocalFleet, tmp_path: Path) -> None:
    fleet.start_nodes({"n1": "z1", "n2": "z2", "n3": "z3"})
    client = fleet.connect("n1")
    config = raftfleet.GroupConfig("awkward:Liar", divergence_check_entries=5)
    client.add_consensus_group("lies", 3, config)
    liar = tmp_path / "liar"
    liar.write_text("nobody")
    command = ["inc unless", str(liar)]
    for _ in range(12):
        client.command("lies", command, retry=10)
    assert client.status("lies")["divergences"] == 0
    assert client.status("lies")["checked_index"] > 0

    leader = client.status("lies")["leader"]
    wrong = next(name for name in ("n1", "n2", "n3") if name != leader)
    liar.write_text(str(fleet.worker_pid(wrong, 0)))
    client.command("lies", command, retry=10)
    liar.write_text("nobody")

    def is_told() -> bool:
        client.command("lies", command, retry=10)
        return all("differ from a quorum" in node.log() for node in fleet.running())

    fleet.wait_until(is_told, 60.0, "every member's node to tell of the difference")
    assert f"those on {wrong} differ" in fleet.nodes[leader].log()
    assert "quarantined until it is rebuilt" in fleet.nodes[wrong].log()
    assert sum(worker["divergences"] for worker in fleet.status(leader)["workers"]) >= 1

    def is_well() -> bool:
        client.command("lies", command, retry=10)
        status = client.status("lies")
        voters = [member["node"] for member in status["members"] if member["role"] == "voter"]
        return sorted(voters) == ["n1", "n2", "n3"] and not status["diverged"] and not fleet.status(leader)["divergent"]

    fleet.wait_until(is_well, 60.0, "the member to be made anew, and found equal")
    total = client.query("lies", "get", retry=10)
    assert total < 1000
    stale = fleet.connect(wrong)
    fleet.wait_until(
        lambda: stale.query("lies", "get", consistency="stale") == total, 60.0, f"{wrong} to hold the majority's state"
    )

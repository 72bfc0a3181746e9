"""Every example runs and prints what it says; the demo verifies what it claims."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

EXPECTED = {
    "just_an_int.py": [
        "groups: {'consensus1': 3, 'consensus2': 3, 'consensus3': 3, 'consensus4': 3, 'consensus5': 3}",
        "query from n1: 0",
        "command from n2: 0",
        "query from n3: 1",
        "groups: {}",
    ],
    "asyncio_client.py": [
        "every counter answered 0 to 99, each once",
        "refused by the state machine: ValueError",
        "not applied:",
    ],
    "lock_service.py": ["3 workers on 3 nodes held the lock 30 times, one after the other", "is held by patient"],
}


def run(*command: str, deadline_s: float) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAFTFLEET_")}
    return subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, env=environ)


def test_every_example_is_known_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example_prints_what_it_says(name: str) -> None:
    done = run(sys.executable, str(EXAMPLES / name), deadline_s=60.0)
    assert done.returncode == 0, done.stderr
    position = 0
    for expected in EXPECTED[name]:
        found = done.stdout.find(expected, position)
        assert found >= 0, f"{expected!r} is missing (or out of order) in:\n{done.stdout}"
        position = found + len(expected)


def test_the_demo_verifies_its_claims_within_a_minute() -> None:
    began = time.monotonic()
    done = run(sys.executable, "-m", "raftfleet.node.cli", "demo", deadline_s=120.0)
    took_s = time.monotonic() - began
    assert done.returncode == 0, done.stdout + done.stderr
    facts = done.stdout.splitlines()
    assert len(facts) >= 10
    assert all(fact.startswith("verified") for fact in facts), done.stdout
    assert took_s < 60.0, f"the demo took {took_s:.0f} s"


@pytest.mark.timeout(900)
def test_the_benchmark_suite_measures_every_part_and_leaves_its_files(tmp_path: Path) -> None:
    done = run(
        sys.executable, str(ROOT / "benchmarks"), "--quick", "--systems", "echo,raftfleet", "--out", str(tmp_path),
        deadline_s=840.0,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads((tmp_path / "result.json").read_text())
    assert {row["system"] for row in measured["rows"]} == {"echo", "raftfleet"}
    assert {row["workload"].split("/")[0] for row in measured["rows"]} == {"command", "query", "lease", "stale"}
    assert all(row["count"] > 0 and row["cpu_us"]["client"] >= 0 for row in measured["rows"])
    assert [row["groups"] for row in measured["idle"]] == [10, 100]
    assert measured["tail"]["count"] > 0 and measured["leader_table"]["us"] > 0
    assert any(row["what"].startswith("failover") for row in measured["life_cycle"])
    page = (tmp_path / "result.md").read_text()
    for section in ("Goals", "Commands and queries", "Idle groups", "Life cycle", "Tail"):
        assert f"## {section}" in page
    assert done.stdout.strip() == page.strip()


def test_the_cost_model_counts_what_it_computes(tmp_path: Path) -> None:
    told = tmp_path / "model.json"
    done = run(
        sys.executable, str(ROOT / "benchmarks" / "cost_model.py"), "--quick", "--json", str(told), deadline_s=240
    )
    assert done.returncode == 0, done.stderr
    model = json.loads(told.read_text())
    for row in model["idle, simulated"]:
        assert abs(row["linked_pairs"] / row["linked_pairs_computed"] - 1) < 0.1, row
    three_nodes = [row for row in model["idle, simulated"] if row["nodes"] == 3]
    assert len({row["bytes_per_s"] for row in three_nodes}) == 1, "idle traffic does not depend on the number of groups"
    assert model["memory"][0]["member_bytes"] < 3072
    assert all(f"\n{title}\n" in done.stdout for title in model)

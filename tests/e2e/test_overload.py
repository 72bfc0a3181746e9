"""More commands at once than a worker may hold: what it takes it does, the rest is told so, nothing else happens."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

import raftfleet
from raftfleet import errors
from raftfleet.client.core import WINDOW
from raftfleet.fleet.host_requests import OPEN_REQUESTS_MAX
from raftfleet.testing import LocalFleet

GROUP_COUNT = OPEN_REQUESTS_MAX // WINDOW + 6
"""One client keeps WINDOW commands under way in each group: six thousand more than its node's worker takes."""


def test_a_worker_that_is_offered_too_much_refuses_the_rest_and_does_what_it_took_once(fleet: LocalFleet) -> None:
    fleet.start_nodes({"n1": "z1", "n2": "z2", "n3": "z3"}, workers=1)
    client = fleet.connect("n1")
    names = [f"group{number}" for number in range(GROUP_COUNT)]
    for name in names:
        client.add_consensus_group(name, 3, raftfleet.GroupConfig("slow_counter:SlowCounter"))
    fleet.wait_settled()
    terms = {name: group["term"] for name, group in fleet.groups().items()}
    outcomes = asyncio.run(offer(fleet.nodes["n1"].run_dir, names, WINDOW))

    kinds = Counter(type(outcome) for _, outcome in outcomes)
    assert kinds.keys() == {int, errors.Overloaded}, "no other outcome, and none that is unknown"
    assert kinds[int] >= OPEN_REQUESTS_MAX, "what the worker has room for is done"
    for name in names:
        results = [outcome for group, outcome in outcomes if group == name and isinstance(outcome, int)]
        assert sorted(results) == list(range(len(results))), "each command that was taken ran once"
        assert client.query(name, "get", retry=10) == len(results), "and none that was refused"
    assert {name: group["term"] for name, group in fleet.groups().items()} == terms, "elections"
    refused = next(outcome for _, outcome in outcomes if isinstance(outcome, errors.Overloaded))
    assert isinstance(refused, errors.NotApplied) and not isinstance(refused, errors.OutcomeUnknown)
    assert str(OPEN_REQUESTS_MAX) in str(refused) or "full" in str(refused)
    assert all(rss < 1 << 30 for rss in resident_bytes(fleet)), "memory has a bound"


async def offer(run_dir: Path, names: list[str], count: int) -> list[tuple[str, Any]]:
    """``count`` commands to each group; what came of each.

    All are asked for before the connection is there, so they leave in one frame: the worker finds all of them at once.
    """
    async with raftfleet.aio.connect(run_dir) as client:
        asked = [name for name in names for _ in range(count)]
        calls = [client.command(name, "inc", timeout=120.0, retry=0) for name in asked]
        return list(zip(asked, await asyncio.gather(*calls, return_exceptions=True), strict=True))


def resident_bytes(fleet: LocalFleet) -> list[int]:
    """Memory of every process of the nodes."""
    return [psutil.Process(process.pid).memory_info().rss for node in fleet.running() for process in node.processes()]

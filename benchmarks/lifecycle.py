"""What happens to a fleet, and how long it takes: adding groups, a node that dies, nodes that come, a node that leaves.

Each scenario starts nodes of its own (one worker each) and returns rows ``{"what", "value", "unit", ...}``. Clients use
their default timeouts and retries, and every error that one of them sees is counted.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

from measuring import Child, Histogram, say
from systems import MACHINE, ZONES, Raftfleet

import raftfleet
from raftfleet.testing import LocalFleet
from raftfleet.testing.local_fleet import is_settled

LOAD_RATE = 1000
"""Commands per second while nodes come and go: enough to see a stall, little enough to leave CPU to six nodes."""
SETTLED_POLL_S = 2.0
"""With many groups the question whether all have settled is itself a load: the nodes are not asked oftener."""
NEW_ZONES = {"n4": "z1", "n5": "z2", "n6": "z3"}


def row(what: str, value: float, unit: str, **more: Any) -> dict[str, Any]:
    """One figure."""
    extra = "".join(f", {name} {number}" for name, number in more.items())
    say(f"  {what}: {value:,.2f} {unit}{extra}")
    return {"what": what, "value": value, "unit": unit, **more}


def adding(counts: list[int]) -> Iterator[dict[str, Any]]:
    """Groups added one by one, and many at once."""
    with Raftfleet() as system:
        client = system.fleet.connect("n1")
        times: list[float] = []
        for number in range(200):
            began_s = time.perf_counter()
            client.add_consensus_group(f"single{number}", 3, raftfleet.GroupConfig(MACHINE), timeout=60.0)
            times.append(time.perf_counter() - began_s)
        p99_ms = sorted(times)[int(len(times) * 0.99)] * 1000
        yield row("adding one group, p50", statistics.median(times) * 1000, "ms", p99_ms=round(p99_ms, 2))
        for count in counts:
            began_s = time.perf_counter()
            system.groups(count)
            yield row(f"adding {count:,} groups at once", time.perf_counter() - began_s, "s")


def failover(count: int, in_flight: int) -> Iterator[dict[str, Any]]:
    """kill -9 of a node; then one command to every group at once, with default settings."""
    with Raftfleet() as system:
        names = system.groups(count)
        system.fleet.wait_settled(deadline_s=120)
        with contextlib.closing(Child("load.py", "raftfleet", str(system.fleet.nodes["n1"].run_dir))) as client:
            client.answer()
            job = {"op": "command", "groups": names, "in_flight": in_flight, "value_bytes": 16, "seconds": 0,
                   "each_once": True, "default_settings": True}  # fmt: skip
            client.tell(job)
            client.answer()
            began_s = time.perf_counter()
            system.fleet.kill_node("n3", deadline_s=60)
            client.tell(job)
            answer = client.answer(300.0)
            took_s = time.perf_counter() - began_s
        histogram = Histogram(answer["counts"], answer["max_us"])
        yield row(
            f"failover, {count:,} groups all answer after", took_s, "s",
            slowest_command_s=round(histogram.max_us / 1e6, 2), client_errors=answer["errors"],
        )  # fmt: skip


def growing(count: int, seconds: int, drain_seconds: int) -> Iterator[dict[str, Any]]:
    """Three nodes become six under load; then one of the six drains."""
    with Raftfleet() as system:
        fleet = system.fleet
        names = system.groups(count)
        fleet.wait_settled(deadline_s=120)
        with contextlib.closing(Child("load.py", "raftfleet", str(fleet.nodes["n1"].run_dir))) as client:
            client.answer()
            job = {"op": "command", "groups": names, "in_flight": 1, "value_bytes": 16, "rate": LOAD_RATE,
                   "seconds": drain_seconds / 2, "default_settings": True}  # fmt: skip
            client.tell(job)
            before = client.answer()
            client.tell({**job, "seconds": seconds})
            time.sleep(1.0)
            started_s = time.perf_counter()
            peers = tuple(node.endpoint for node in fleet.nodes.values())
            for name, zone in NEW_ZONES.items():
                fleet.define_node(name, zone=zone).peers = peers
                fleet.launch_node(name)
            fleet.wait_active(len(ZONES) + len(NEW_ZONES), deadline_s=60)
            active_s = time.perf_counter()
            wait_until_settled(fleet, SETTLED_POLL_S if count > 100 else 0.05)
            settled_s = time.perf_counter()
            answer = client.answer(seconds + 60.0)
            yield row(
                f"3 to 6 nodes, {count:,} groups settled after", settled_s - active_s, "s",
                starting_s=round(active_s - started_s, 2), client_errors=answer["errors"],
            )  # fmt: skip
            p99_before = Histogram(before["counts"], before["max_us"]).quantile_us(0.99)
            p99 = phase(answer, started_s, settled_s).quantile_us(0.99)
            p99_moving = phase(answer, active_s, settled_s).quantile_us(0.99)
            yield row(
                f"3 to 6 nodes, {count:,} groups, p99 meanwhile", p99 / p99_before, "× before",
                before_us=f"{p99_before:.0f}", meanwhile_us=f"{p99:.0f}", without_the_start_us=f"{p99_moving:.0f}",
            )  # fmt: skip
            yield from _draining(fleet, client, {**job, "seconds": drain_seconds}, count)


def wait_until_settled(fleet: LocalFleet, poll_s: float) -> None:
    """Ask every ``poll_s`` until all groups are where they should be."""
    deadline_s = time.monotonic() + 300
    while not all(map(is_settled, fleet.groups().values())):
        if time.monotonic() > deadline_s:
            raise RuntimeError("waited 300 s in vain for all groups to settle")
        time.sleep(poll_s)


def _draining(fleet: LocalFleet, client: Child, job: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    client.tell(job)
    time.sleep(0.5)
    began_s = time.perf_counter()
    fleet.connect("n6").deactivate(wait=True, timeout=300.0)
    took_s = time.perf_counter() - began_s
    answer = client.answer(120.0)
    p99 = phase(answer, began_s, began_s + took_s).quantile_us(0.99)
    yield row(
        f"draining one of 6 nodes, {count:,} groups", took_s, "s", p99_us=f"{p99:.0f}", client_errors=answer["errors"]
    )


def phase(answer: dict[str, Any], first_s: float, last_s: float) -> Histogram:
    """The latencies of the seconds of an open loop's answer that touch this time."""
    merged = Histogram()
    for second, counts in answer["seconds"].items():
        start_s = answer["began_s"] + int(second)
        if start_s < last_s and start_s + 1 > first_s:
            merged.merge(Histogram(counts, float("inf")))
    return merged

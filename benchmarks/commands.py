"""What a command costs: three nodes on this machine, one client, a table.

    python benchmarks/commands.py [--seconds 3] [--json FILE]

Three nodes of one worker each run on loopback, and one asyncio client in this process sends ``inc`` to counters: one
at a time, then with 16, 64 and 256 in flight, on one group and on sixty. A bare pyzmq echo, without replication, is
measured in the same run: the absolute figures say more about the machine than about the code, the ratios do not.

CPU time is read from /proc before and after each row and divided by its commands. On one group the roles are: the
leader's node, the two followers' nodes together, the client. When the client's node does not lead, it forwards, and is
one of the followers. On sixty groups every node leads some, so the sum of all three stands under "nodes".
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

import raftfleet
from raftfleet.testing import LocalFleet

sys.path.insert(0, str(Path(__file__).parent))
from echo import run_echo  # noqa: E402

ZONES = {"n1": "z1", "n2": "z2", "n3": "z3"}
MACHINE = "raftfleet.testing.machines:JustAnInt"
IN_FLIGHT = (1, 16, 64, 256)
GROUP_COUNTS = (1, 60)
WARM_UP_S = 0.5


class Row(NamedTuple):
    """One measurement. Latencies in µs; CPU in µs per command and role (None: the role does not exist here)."""

    what: str
    groups: int
    in_flight: int
    commands: int
    per_second: float
    p50_us: float
    p99_us: float
    cpu_us: dict[str, float]


class Cpu:
    """CPU time of each role since the last :meth:`take`, from /proc."""

    def __init__(self, roles: dict[str, list[psutil.Process]]) -> None:
        self._roles = roles
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        return {
            role: sum(sum(process.cpu_times()[:2]) for process in processes) for role, processes in self._roles.items()
        }

    def take(self, commands: int) -> dict[str, float]:
        before, self._before = self._before, self._now()
        return {role: (self._before[role] - before[role]) * 1e6 / max(1, commands) for role in before}


async def measure(client: Any, groups: list[str], in_flight: int, seconds: float) -> tuple[list[float], float]:
    """Keep ``in_flight`` commands under way for ``seconds``; return each one's latency in s, and the time it took."""
    latencies: list[float] = []
    turn = itertools.cycle(groups)
    clock = time.perf_counter
    end = clock() + seconds

    async def worker() -> None:
        command = client.command
        while (began := clock()) < end:
            await command(next(turn), "inc", timeout=5.0)
            latencies.append(clock() - began)

    began = clock()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return latencies, clock() - began


async def measure_row(
    what: str, run_dir: Path, groups: list[str], in_flight: int, seconds: float, roles: dict[str, list[psutil.Process]]
) -> Row:
    async with raftfleet.aio.connect(run_dir) as client:
        await measure(client, groups, in_flight, WARM_UP_S)
        gc.collect()
        cpu = Cpu({**roles, "client": [psutil.Process()]})
        latencies, took = await measure(client, groups, in_flight, seconds)
        cpu_us = cpu.take(len(latencies))
    return Row(
        what=what,
        groups=len(groups),
        in_flight=in_flight,
        commands=len(latencies),
        per_second=len(latencies) / took,
        p50_us=statistics.median(latencies) * 1e6,
        p99_us=sorted(latencies)[int(len(latencies) * 0.99)] * 1e6,
        cpu_us=cpu_us,
    )


def measure_sync(what: str, run_dir: Path, group: str, seconds: float, roles: dict[str, list[psutil.Process]]) -> Row:
    """One command at a time through the synchronous client."""
    latencies: list[float] = []
    clock = time.perf_counter
    with raftfleet.connect(run_dir) as client:
        for _ in range(200):
            client.command(group, "inc")
        cpu = Cpu({**roles, "client": [psutil.Process()]})
        end = clock() + seconds
        while (began := clock()) < end:
            client.command(group, "inc")
            latencies.append(clock() - began)
        cpu_us = cpu.take(len(latencies))
    return Row(
        what=what,
        groups=1,
        in_flight=1,
        commands=len(latencies),
        per_second=len(latencies) / seconds,
        p50_us=statistics.median(latencies) * 1e6,
        p99_us=sorted(latencies)[int(len(latencies) * 0.99)] * 1e6,
        cpu_us=cpu_us,
    )


def roles_of(fleet: LocalFleet, leader: str) -> dict[str, list[psutil.Process]]:
    """Processes of the leader's node and of the others, as one group has them."""
    return {
        "leader": fleet.nodes[leader].processes(),
        "followers": [process for name in ZONES if name != leader for process in fleet.nodes[name].processes()],
    }


def run_rows(fleet: LocalFleet, seconds: float) -> list[Row]:
    client = fleet.connect("n1")
    for number in range(max(GROUP_COUNTS)):
        client.add_consensus_group(f"group{number}", 3, raftfleet.GroupConfig(MACHINE))
    placed = fleet.wait_settled()
    groups = sorted(placed)
    leader = placed[groups[0]]["leader"]
    other = next(name for name in ZONES if name != leader)
    run_dirs = {name: node.run_dir for name, node in fleet.nodes.items()}
    roles = roles_of(fleet, leader)
    rows = [
        measure_sync("sync client, leader here", run_dirs[leader], groups[0], seconds, roles),
        measure_sync("sync client, leader elsewhere", run_dirs[other], groups[0], seconds, roles),
    ]
    say(rows[-2:])
    for in_flight in IN_FLIGHT:
        for what, node in (("leader here", leader), ("leader elsewhere", other)):
            rows.append(asyncio.run(measure_row(what, run_dirs[node], groups[:1], in_flight, seconds, roles)))
            say(rows[-1:])
    nodes = {"nodes": [process for node in fleet.running() for process in node.processes()]}
    for count in GROUP_COUNTS[1:]:
        for in_flight in IN_FLIGHT:
            what = "leaders on all nodes"
            rows.append(asyncio.run(measure_row(what, run_dirs[leader], groups[:count], in_flight, seconds, nodes)))
            say(rows[-1:])
    return rows


# -------------------------------------------------------------------- output


def say(rows: list[Row]) -> None:
    for row in rows:
        print(f"  {row.what}, {row.groups} groups, {row.in_flight} in flight: {row.per_second:,.0f}/s", file=sys.stderr)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import msgpack
    import zmq

    with open("/proc/cpuinfo") as cpuinfo:
        models = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "pyzmq": zmq.pyzmq_version(),
        "libzmq": zmq.zmq_version(),
        "msgpack": ".".join(map(str, msgpack.version)),
    }


def echo_rate(measured: dict[str, Any], in_flight: int) -> float:
    """Messages per second of the bare echo; one at a time, that is the inverse of its median round trip."""
    return float(1e6 / measured["p50_us"] if in_flight == 1 else measured["messages_per_s"][in_flight])


def print_table(rows: list[Row], measured: dict[str, Any]) -> None:
    """Print the table. Its last column is the rate as a part of the bare echo's at the same number in flight."""
    head = ["what", "groups", "in flight", "per second", "p50 µs", "p99 µs", "µs CPU per command", "of echo"]
    lines = [head]
    for in_flight in IN_FLIGHT:
        latency = [f"{measured['p50_us']:.0f}", f"{measured['p99_us']:.0f}"] if in_flight == 1 else ["-", "-"]
        rate = f"{echo_rate(measured, in_flight):,.0f}"
        lines.append(["bare pyzmq echo, TCP", "-", str(in_flight), rate, *latency, "-", "1.00"])
    for row in rows:
        cpu = ", ".join(f"{role} {us:.1f}" for role, us in row.cpu_us.items())
        ratio = f"{row.per_second / echo_rate(measured, row.in_flight):.2f}"
        latency = [f"{row.p50_us:.0f}", f"{row.p99_us:.0f}"]
        lines.append([row.what, str(row.groups), str(row.in_flight), f"{row.per_second:,.0f}", *latency, cpu, ratio])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for number, line in enumerate(lines):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="per row (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    arguments = parser.parse_args()

    print("bare pyzmq echo", file=sys.stderr)
    measured = run_echo(arguments.seconds)
    with LocalFleet() as fleet:
        print("three nodes", file=sys.stderr)
        fleet.start_nodes(ZONES)
        rows = run_rows(fleet, arguments.seconds)
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()), end="\n\n")
    print_table(rows, measured)
    if arguments.json:
        result = {
            "machine": about,
            "seconds": arguments.seconds,
            "echo": measured,
            "rows": [row._asdict() for row in rows],
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

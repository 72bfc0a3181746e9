"""Benchmarks of nodes with data directories; each part is one run of its own, on three nodes on loopback.

    python benchmarks/disk.py [restart] [snapshot] [transfer] [commands]
                              [--groups 10,1000,5000] [--log-mib 1024] [--state-mib 500]

restart
    All processes of all nodes are killed at once and started again: how long until every group has answered a command.
    With few and many groups, and after so many MiB of commands were written.
snapshot
    A state of ``--state-mib`` is snapshotted by a forked child under load: latencies before, and while the child works.
transfer
    A node of a group with such a state loses all it had and comes back: latencies of commands for a small group of the
    same workers before, and while the new member is brought up to date; on disks, and in memory.
commands
    Durable commands beside the same in memory, and beside a bare loop of pwrite and fdatasync of the same bytes into
    preallocated space: what one disk alone could do if each command had its own fdatasync.

Prints one row per figure. All processes share the machine's CPUs and one disk: compare within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import raftfleet
from raftfleet.testing import LocalFleet

ZONES = {"n1": "z1", "n2": "z2", "n3": "z3"}
APPS = Path(__file__).parent
PARTS = ("restart", "snapshot", "transfer", "commands")
CHUNK_BYTES = 500_000
IN_FLIGHT = (1, 16, 64, 256)


def say(*columns: object) -> None:
    """One row."""
    print("  ".join(str(column) for column in columns), flush=True)


async def commands(
    run_dir: Path, jobs: Iterable[tuple[str, object]], in_flight: int, seconds: float = 0.0
) -> list[float]:
    """Run commands, so many at a time, each answered; ``seconds``: stop after so long. Returns latencies in seconds."""
    took: list[float] = []
    waiting = iter(jobs)
    end_s = time.perf_counter() + seconds if seconds else float("inf")

    async def one_after_another(client: raftfleet.aio.Fleet) -> None:
        for name, arg in waiting:
            began_s = time.perf_counter()
            if began_s > end_s:
                return
            await client.command(name, arg, timeout=30.0, retry=20)
            took.append(time.perf_counter() - began_s)

    async with raftfleet.aio.connect(run_dir) as client:
        await asyncio.gather(*(one_after_another(client) for _ in range(in_flight)))
    return took


def quantiles(latencies: list[float]) -> str:
    """p50, p99 and the maximum in ms."""
    ranked = sorted(latencies)
    return "  ".join(
        f"{name} {1000 * ranked[min(int(part * len(ranked)), len(ranked) - 1)]:.2f} ms"
        for name, part in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0))
    )


def start(fleet: LocalFleet, workers: int = 1) -> None:
    fleet.start_nodes(ZONES, workers=workers, deadline_s=60.0)


def add_groups(fleet: LocalFleet, names: list[str], machine: str) -> None:
    """Add groups, sixteen at a time."""

    async def add() -> None:
        waiting = iter(names)

        async def some(client: raftfleet.aio.Fleet) -> None:
            for name in waiting:
                await client.add_consensus_group(name, 3, raftfleet.GroupConfig(machine), timeout=60.0)

        async with raftfleet.aio.connect(fleet.nodes["n1"].run_dir) as client:
            await asyncio.gather(*(some(client) for _ in range(16)))

    asyncio.run(add())


def restart_all(fleet: LocalFleet) -> float:
    """Start all nodes again; returns how long until all are active."""
    began_s = time.perf_counter()
    for name in fleet.nodes:
        fleet.restart_node(name, wait=False)
    for name in fleet.nodes:
        fleet.wait_until(lambda name=name: fleet.status(name)["state"] == "active", 120.0, f"{name} to be active")
    return time.perf_counter() - began_s


def log_mib(fleet: LocalFleet, name: str) -> float:
    return float(sum(worker["disk"]["log_bytes"] for worker in fleet.status(name)["workers"]) / (1 << 20))


# -------------------------------------------------------------------- restart


def measure_restart(counts: list[int], mib: int) -> None:
    for count in counts:
        with LocalFleet(durable=True, show_logs=False) as fleet:
            start(fleet)
            names = [f"g{number}" for number in range(count)]
            began_s = time.perf_counter()
            add_groups(fleet, names, "raftfleet.testing.machines:JustAnInt")
            added_s = time.perf_counter() - began_s
            asyncio.run(commands(fleet.nodes["n1"].run_dir, ((name, "inc") for name in names), 64))
            log = log_mib(fleet, "n1")
            fleet.kill_all_nodes()
            began_s = time.perf_counter()
            active_s = restart_all(fleet)
            asyncio.run(commands(fleet.nodes["n2"].run_dir, ((name, "inc") for name in names), 256))
            served_s = time.perf_counter() - began_s
            say(
                f"restart  {count} groups:  added in {added_s:.1f} s, log {log:.1f} MiB;",
                f"nodes active after {active_s:.1f} s, every group answered a command after {served_s:.1f} s",
            )
    if mib:
        with LocalFleet(durable=True, app_dirs=[APPS], show_logs=False) as fleet:
            start(fleet)
            names = [f"g{number}" for number in range(8)]
            add_groups(fleet, names, "disk_machines:Filler")
            chunk = bytes(CHUNK_BYTES)
            jobs = ((names[number % len(names)], chunk) for number in range((mib << 20) // CHUNK_BYTES))
            began_s = time.perf_counter()
            asyncio.run(commands(fleet.nodes["n1"].run_dir, jobs, 16))
            wrote_s = time.perf_counter() - began_s
            log = log_mib(fleet, "n1")
            fleet.kill_all_nodes()
            began_s = time.perf_counter()
            active_s = restart_all(fleet)
            asyncio.run(commands(fleet.nodes["n2"].run_dir, ((name, b"") for name in names), 8))
            say(
                f"restart  {mib} MiB of commands in {wrote_s:.0f} s, of which the log still holds {log:.0f} MiB;",
                f"nodes active after {active_s:.1f} s, all groups after {time.perf_counter() - began_s:.1f} s",
            )


# -------------------------------------------------------------------- snapshot


def measure_snapshot(mib: int) -> None:
    with LocalFleet(durable=True, app_dirs=[APPS], show_logs=False) as fleet:
        start(fleet)
        add_groups(fleet, ["big", "small"], "disk_machines:Shelf")
        chunk = os.urandom(CHUNK_BYTES)
        run_dir = fleet.nodes["n1"].run_dir
        fill = (("big", [number, chunk]) for number in range((mib << 20) // CHUNK_BYTES))
        asyncio.run(commands(run_dir, fill, 4))
        fleet.wait_until(lambda: not writers(fleet), 300.0, "the snapshots of the filling to be done")
        say(f"snapshot  state of {mib} MiB is there; snapshots so far: {snapshots(fleet)}")
        before = asyncio.run(commands(run_dir, endless("small"), 16, 10.0))
        say(f"snapshot  before: {len(before) / 10:.0f} commands/s  {quantiles(before)}")
        # Overwrite what is there, until the log is so large that it wants a snapshot of the whole; then look.
        during: list[float] = []
        made = snapshots(fleet)
        number = 0
        deadline_s = time.perf_counter() + 240.0
        while time.perf_counter() < deadline_s:
            if writers(fleet):
                during += asyncio.run(commands(run_dir, endless("small"), 16, 0.5))
            elif during and snapshots(fleet) >= made + 3:
                break
            else:
                again = [("big", [number % 50 + i, chunk]) for i in range(8)]
                number += 8
                asyncio.run(commands(run_dir, again, 4))
        say(f"snapshot  during: {len(during)} commands  {quantiles(during)}")
        say(f"snapshot  made: {snapshots(fleet) - made}; longest fork: {fork_ms(fleet):.1f} ms")


# -------------------------------------------------------------------- transfer


def measure_transfer(mib: int) -> None:
    for title, durable in (("--data-dir", True), ("in memory", False)):
        with LocalFleet(durable=durable, app_dirs=[APPS], show_logs=False) as fleet:
            start(fleet)
            add_groups(fleet, ["big", "small"], "disk_machines:Shelf")
            chunk = os.urandom(CHUNK_BYTES)
            count = (mib << 20) // CHUNK_BYTES
            leader = fleet.groups()["small"]["leader"]
            run_dir = fleet.nodes[leader].run_dir
            asyncio.run(commands(run_dir, (("big", [number, chunk]) for number in range(count)), 4))
            fleet.wait_until(lambda: not writers(fleet), 300.0, "the snapshots of the filling to be done")
            before = asyncio.run(commands(run_dir, endless("small"), 16, 10.0))
            say(f"transfer  {title}: {mib} MiB; before: {len(before) / 10:.0f} commands/s  {quantiles(before)}")
            lost = next(name for name in fleet.nodes if name not in (leader, fleet.groups()["big"]["leader"]))
            fleet.kill_node(lost)
            if durable:
                shutil.rmtree(fleet.nodes[lost].options["data_dir"] / "shard-0")
            alone = asyncio.run(commands(run_dir, endless("small"), 16, 5.0))
            say(f"transfer  {title}: with two of three nodes: {len(alone) / 5:.0f} commands/s  {quantiles(alone)}")
            fleet.restart_node(lost, wait=False)
            began_s = time.perf_counter()
            during: list[float] = []
            while time.perf_counter() - began_s < 240.0 and not has_state(fleet, leader, lost):
                during += asyncio.run(commands(run_dir, endless("small"), 16, 1.0))
            took_s = time.perf_counter() - began_s
            say(f"transfer  {title}: {lost} has it after {took_s:.1f} s")
            say(f"transfer  {title}: meanwhile: {len(during) / took_s:.0f} commands/s  {quantiles(during)}")


def has_state(fleet: LocalFleet, leader: str, lost: str) -> bool:
    """Whether the node's member of the large group is a voter again, up to date."""
    with contextlib.suppress(raftfleet.errors.RaftFleetError), fleet.connect(leader) as client:
        status = client.status("big")
        return any(
            row["node"] == lost
            and row["role"] == "voter"
            and row["match"] >= status["commit"]
            and not row["unresponsive"]
            for row in status["members"]
        )
    return False


def endless(name: str) -> Iterable[tuple[str, object]]:
    number = 0
    while True:
        number += 1
        yield name, [number % 16, b"x"]


def writers(fleet: LocalFleet) -> int:
    """Processes that write a snapshot now: a shard's only children."""
    return sum(len(process.children()) for node in fleet.nodes.values() for process in node.processes()[1:])


def snapshots(fleet: LocalFleet) -> int:
    return int(sum(fleet.status(name)["workers"][0]["disk"]["snapshots_made"] for name in fleet.nodes))


def fork_ms(fleet: LocalFleet) -> float:
    return max(fleet.status(name)["workers"][0]["disk"]["fork_us_max"] for name in fleet.nodes) / 1000


# -------------------------------------------------------------------- commands


def bare_fdatasyncs(folder: Path, size_bytes: int, seconds: float) -> list[float]:
    """Latencies of pwrite and fdatasync, one after another, into preallocated zeros."""
    took = []
    descriptor = os.open(folder / "bare", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, 64 << 20)
        os.fsync(descriptor)
        data = bytes(size_bytes)
        offset = 0
        end_s = time.perf_counter() + seconds
        while (began_s := time.perf_counter()) < end_s:
            os.pwrite(descriptor, data, offset)
            os.fdatasync(descriptor)
            took.append(time.perf_counter() - began_s)
            offset = (offset + size_bytes) % (60 << 20)
    finally:
        os.close(descriptor)
        os.unlink(folder / "bare")
    return took


def measure_commands(seconds: float, rounds: int) -> None:
    value = "x" * 16
    with (
        LocalFleet(show_logs=False) as memory,
        LocalFleet(durable=True, show_logs=False) as disk,
        tempfile.TemporaryDirectory(dir="/tmp") as folder,
    ):
        fleets = {"in memory": memory, "--data-dir": disk}
        leaders = {}
        for title, fleet in fleets.items():
            start(fleet)
            add_groups(fleet, [f"g{number}" for number in range(60)], "raftfleet.testing.machines:Echo")
            leaders[title] = fleet.groups()["g0"]["leader"]
        rates: dict[tuple[str, int, int], list[float]] = {}
        latencies: dict[tuple[str, int, int], list[float]] = {}
        for _ in range(rounds):
            for groups in (1, 60):
                for in_flight in IN_FLIGHT:
                    for title, fleet in fleets.items():
                        jobs = ((f"g{number % groups}", value) for number in range(1 << 40))
                        run_dir = fleet.nodes[leaders[title]].run_dir
                        took = asyncio.run(commands(run_dir, jobs, in_flight, seconds))
                        rates.setdefault((title, groups, in_flight), []).append(len(took) / seconds)
                        latencies.setdefault((title, groups, in_flight), []).extend(took)
            bare = bare_fdatasyncs(Path(folder), 200, seconds)
            rates.setdefault(("pwrite + fdatasync of 200 bytes", 0, 1), []).append(len(bare) / seconds)
            latencies.setdefault(("pwrite + fdatasync of 200 bytes", 0, 1), []).extend(bare)
        for key, took in latencies.items():
            title, groups, in_flight = key
            rate = sorted(rates[key])[len(rates[key]) // 2]
            say(f"commands  {title}, {groups} groups, {in_flight} in flight:  {rate:.0f}/s  {quantiles(took)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/disk.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])  # type: ignore[list-item]
    parser.add_argument("--groups", default="10,1000,5000")
    parser.add_argument("--log-mib", type=int, default=1024)
    parser.add_argument("--state-mib", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    parts = arguments.parts or list(PARTS)
    if "restart" in parts:
        measure_restart([int(count) for count in arguments.groups.split(",") if count], arguments.log_mib)
    if "snapshot" in parts:
        measure_snapshot(arguments.state_mib)
    if "transfer" in parts:
        measure_transfer(arguments.state_mib)
    if "commands" in parts:
        measure_commands(arguments.seconds, arguments.rounds)


if __name__ == "__main__":
    sys.exit(main())

"""What groups cost that nobody uses: CPU time, memory and traffic of three nodes with more and more groups.

One fleet of three nodes, one worker each, grows from step to step. Memory of a member is what the fleet holds more than
with the first step's groups, over the members added since: PSS of all processes, so that pages shared by a fork count
once. Traffic is what the sockets between the nodes have sent, as ``ss`` tells it.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from typing import Any

import psutil
from measuring import Cpu, memory_bytes, say
from systems import ZONES, Raftfleet

SETTLE_S = 3.0


def sent_bytes(ports: set[int]) -> tuple[int, int]:
    """(bytes, TCP segments) that the connections to and from these local ports have sent so far, all together."""
    told = subprocess.run(["ss", "-tinH"], capture_output=True, text=True, check=True).stdout.splitlines()
    total = segments = 0
    for head, detail in zip(told[::2], told[1::2], strict=False):
        ends = [int(word.rsplit(":", 1)[1]) for word in head.split()[3:5]]
        if ports.intersection(ends):
            fields = dict(word.split(":", 1) for word in detail.split() if ":" in word)
            total += int(fields.get("bytes_sent", 0))
            segments += int(fields.get("segs_out", 0))
    return total, segments


def measure_idle(counts: list[int], seconds: float) -> Iterator[dict[str, Any]]:
    """One row per number of groups, ascending."""
    with Raftfleet() as system:
        processes: list[psutil.Process] = [p for node in system.fleet.nodes.values() for p in node.processes()]
        ports = {node.port + offset for node in system.fleet.nodes.values() for offset in (0, 1)}
        base: tuple[int, int] | None = None
        for count in counts:
            began_s = time.perf_counter()
            system.groups(count)
            added_s = time.perf_counter() - began_s
            time.sleep(SETTLE_S)
            memory = memory_bytes(processes)
            cpu = Cpu({f"{p.pid}": [p] for p in processes})
            sent = sent_bytes(ports)
            began_s = time.perf_counter()
            time.sleep(seconds)
            took_s = time.perf_counter() - began_s
            percent = cpu.percent_of_a_core()
            now_sent = sent_bytes(ports)
            row: dict[str, Any] = {
                "groups": count,
                "members": count * len(ZONES),
                "added_s": added_s,
                "cpu_percent": percent,
                "memory_bytes": memory,
                "bytes_per_s": (now_sent[0] - sent[0]) / took_s,
                "segments_per_s": (now_sent[1] - sent[1]) / took_s,
                "member_bytes": (memory - base[1]) / (3 * (count - base[0])) if base is not None else None,
            }
            if base is None:
                base = (count, memory)
            member = f", {row['member_bytes']:,.0f} bytes per member" if row["member_bytes"] else ""
            say(f"  {count:,} groups: {percent:.2f} % of a core, {memory / 1e6:,.0f} MB{member}, "
                f"{row['bytes_per_s']:,.0f} bytes/s; added in {added_s:.1f} s")  # fmt: skip
            yield row

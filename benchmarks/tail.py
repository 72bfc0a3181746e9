"""The slow ones: latency at half the peak rate over a minute, and what the worst ten pauses came from.

The load is open: commands begin at their times, whatever becomes of those before, so a pause hits all that were due in
it. A pause is a run of slow commands that overlap in time. Its causes are looked for in what the processes wrote down:
garbage collections, fsyncs and forks of the nodes (``probe/sitecustomize.py``) and the client, and the time for which a
process was ready and had no CPU (the kernel's schedstat, read every ten milliseconds).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from measuring import HERE, Histogram, say
from systems import ZONES, Raftfleet, start_defined

from raftfleet.testing import LocalFleet

SAMPLE_S = 0.01
PAUSES_SHOWN = 10
PART_OF_PEAK = 0.5
CAUSE_PART_MIN = 0.1
"""A cause counts if it covers this part of the pause."""


class Probed(Raftfleet):
    """Three nodes whose processes write down their pauses."""

    def start(self) -> None:
        self.probe_file = self.folder() / "probe"
        environ = {"PYTHONPATH": str(HERE / "probe"), "BENCHMARK_PROBE_FILE": str(self.probe_file)}
        self.fleet = self.stack.enter_context(LocalFleet(show_logs=False, environ=environ))
        for name, zone in ZONES.items():
            self.fleet.define_node(name, zone=zone)
        start_defined(self.fleet)
        self._groups = []
        self._lease_group = ""


class WaitSampler(threading.Thread):
    """Reads how long each thread of some processes waited for a CPU, until stopped."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__(daemon=True)
        self._names = names
        self._stop_asked = threading.Event()
        self.waits: list[tuple[str, float, float, float]] = []  # who, from, to, seconds waited

    def run(self) -> None:
        before: dict[str, int] = {}
        last_s = time.perf_counter()
        while not self._stop_asked.wait(SAMPLE_S):
            now_s = time.perf_counter()
            for pid, name in self._names.items():
                waited_ns = 0
                with contextlib.suppress(OSError):
                    for thread in os.listdir(f"/proc/{pid}/task"):
                        path = f"/proc/{pid}/task/{thread}/schedstat"
                        value = int(Path(path).read_text().split()[1])
                        waited_ns += value - before.get(path, value)
                        before[path] = value
                if waited_ns > 1_000_000:
                    self.waits.append((f"{name} waits for a CPU", last_s, now_s, waited_ns / 1e9))
            last_s = now_s

    def stop(self) -> None:
        """End the thread."""
        self._stop_asked.set()
        self.join()


def measure_tail(seconds: float) -> dict[str, Any]:
    """Quantiles over ``seconds`` at half the peak rate of 60 groups, and the worst pauses with their causes."""
    with Probed() as system:
        names = system.groups(60)
        system.fleet.wait_settled(deadline_s=60)
        client = system.client("here", 0)
        job = {"op": "command", "groups": names, "in_flight": 256, "value_bytes": 16, "seconds": min(3.0, seconds)}
        client.tell({**job, "seconds": 1.0})
        client.answer()
        client.tell(job)
        answer = client.answer()
        peak = Histogram(answer["counts"]).count / answer["took_s"]
        rate = peak * PART_OF_PEAK
        processes = {client.process.pid: "the client"}
        for node in system.fleet.nodes.values():
            processes |= {process.pid: f"{node.name}'s {process.name()}" for process in node.processes()}
        sampler = WaitSampler(processes)
        sampler.start()
        try:
            client.tell({**job, "rate": rate, "seconds": seconds})
            answer = client.answer(seconds + 60.0)
        finally:
            sampler.stop()
        causes = list(sampler.waits)
        causes += [("the client's GC", first, last, last - first) for first, last in answer["gc"]]
        if system.probe_file.exists():
            for line in system.probe_file.read_text().splitlines():
                what, pid, first, last = json.loads(line)
                causes.append((f"{processes.get(pid, 'a process')}: {what}", first, last, last - first))
    histogram = Histogram(answer["counts"], answer["max_us"])
    result = {
        "groups": len(names),
        "peak_per_second": peak,
        "per_second": rate,
        "seconds": seconds,
        "count": histogram.count,
        "errors": answer["errors"],
        **{f"p{name}_us": histogram.quantile_us(part) for name, part in (("50", 0.5), ("99", 0.99), ("999", 0.999))},
        "max_us": histogram.max_us,
        "pauses": explain(answer["worst"], causes, answer["began_s"]),
    }
    say(f"  at {rate:,.0f}/s: p50 {result['p50_us']:,.0f}, p99 {result['p99_us']:,.0f}, "
        f"p99.9 {result['p999_us']:,.0f}, max {result['max_us']:,.0f} µs")  # fmt: skip
    return result


def explain(
    worst: list[list[float]], causes: list[tuple[str, float, float, float]], began_s: float
) -> list[dict[str, Any]]:
    """The worst pauses, worst first, each with the causes that cover a good part of it."""
    pauses: list[list[float]] = []
    for due_s, latency_s in sorted(worst):
        if pauses and due_s <= pauses[-1][1]:
            pauses[-1][1] = max(pauses[-1][1], due_s + latency_s)
        else:
            pauses.append([due_s, due_s + latency_s])
    pauses.sort(key=lambda pause: pause[0] - pause[1])
    explained = []
    for first_s, last_s in pauses[:PAUSES_SHOWN]:
        found: dict[str, float] = {}
        for what, cause_first_s, cause_last_s, cause_s in causes:
            overlap_s = min(last_s, cause_last_s) - max(first_s, cause_first_s)
            if overlap_s > 0:
                found[what] = found.get(what, 0.0) + min(cause_s, overlap_s)
        long = {what: s for what, s in found.items() if s >= CAUSE_PART_MIN * (last_s - first_s)}
        shown = [f"{what} {s * 1000:.1f} ms" for what, s in sorted(long.items(), key=lambda item: -item[1])[:3]]
        explained.append(
            {"at_s": first_s - began_s, "ms": (last_s - first_s) * 1000, "causes": shown or ["none that was recorded"]}
        )
    return explained

"""What the measurements have in common: latencies as a histogram, CPU time by role, processes that end in every case.

A latency is kept as the number of its bucket, one percent wide, so that the figures of several client processes and
rounds can be added up without keeping a million numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
BUCKETS_PER_E = 100
"""Buckets per factor of e: neighbouring ones differ by one percent."""
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Histogram:
    """Latencies in µs, by buckets of one percent; the highest is kept as it was."""

    def __init__(self, counts: Mapping[Any, int] | None = None, max_us: float = 0.0) -> None:
        self.counts = {int(bucket): int(count) for bucket, count in (counts or {}).items()}
        self.max_us = max_us

    def add(self, latencies_s: Iterable[float]) -> Histogram:
        """Count these latencies (seconds); returns itself."""
        counts, log = self.counts, math.log
        top = 0.0
        for latency_s in latencies_s:
            us = latency_s * 1e6
            top = us if us > top else top
            bucket = int(log(us) * BUCKETS_PER_E) if us > 1 else 0
            counts[bucket] = counts.get(bucket, 0) + 1
        self.max_us = max(self.max_us, top)
        return self

    def merge(self, other: Histogram) -> None:
        """Add another one's counts."""
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.max_us = max(self.max_us, other.max_us)

    @property
    def count(self) -> int:
        """How many latencies it has seen."""
        return sum(self.counts.values())

    def quantile_us(self, part: float) -> float:
        """The latency below which ``part`` of all are, in µs (nan without any)."""
        left = part * self.count
        for bucket in sorted(self.counts):
            left -= self.counts[bucket]
            if left <= 0:
                return min(math.exp((bucket + 0.5) / BUCKETS_PER_E), self.max_us)
        return math.nan


class Cpu:
    """CPU time of each role from /proc, user and system, of processes that live throughout."""

    def __init__(self, roles: Mapping[str, list[psutil.Process]]) -> None:
        self._roles = roles
        self._before = self._now()
        self._began_s = time.perf_counter()

    def _now(self) -> dict[str, float]:
        return {role: sum(_cpu_s(process) for process in processes) for role, processes in self._roles.items()}

    def spent_s(self) -> dict[str, float]:
        """CPU seconds of each role since this object was made."""
        now = self._now()
        return {role: now[role] - self._before[role] for role in now}

    def percent_of_a_core(self) -> float:
        """What all roles together used, in percent of one core."""
        return 100 * sum(self.spent_s().values()) / (time.perf_counter() - self._began_s)


def _cpu_s(process: psutil.Process) -> float:
    # schedstat counts nanoseconds of each thread; stat counts ticks of 10 ms, too coarse for an idle process.
    total_ns = 0
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{process.pid}/task"):
            with contextlib.suppress(OSError):
                total_ns += int(Path(f"/proc/{process.pid}/task/{thread}/schedstat").read_text().split()[0])
    if total_ns:
        return total_ns / 1e9
    with contextlib.suppress(psutil.Error):
        return float(sum(process.cpu_times()[:2]))
    return 0.0


def memory_bytes(processes: Iterable[psutil.Process]) -> int:
    """Memory of the processes together; what they share (forked from one supervisor) is counted once (PSS)."""
    total = 0
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


class Child:
    """A process of the benchmark that speaks JSON lines: jobs on its standard input, results on its output.

    It dies with this process, however that ends.
    """

    def __init__(self, script: str, *arguments: str) -> None:
        self._name = script
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=die_with_parent,
        )

    def tell(self, job: Mapping[str, Any]) -> None:
        """Send a job and wait for nothing."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, deadline_s: float = 120.0) -> Any:
        """The next result.

        Raises:
            RuntimeError: the process ended, or said nothing for ``deadline_s``.
        """
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], deadline_s)[0]:
            raise RuntimeError(f"{self._name} gave no answer for {deadline_s:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended with exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        end(self.process)
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()


def die_with_parent() -> None:
    """In a new process, before its program: be killed when the parent dies, however it does."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def end(process: subprocess.Popen[bytes], grace_s: float = 5.0) -> None:
    """SIGTERM, then SIGKILL; returns when it is gone."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)

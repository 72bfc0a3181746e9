"""Loaded by every process of a node under the tail benchmark (PYTHONPATH): writes down what may have made it pause.

One JSON line ``[what, pid, began_s, ended_s]`` for each garbage collection, fsync and fork of more than a millisecond,
in the file that ``$BENCHMARK_PROBE_FILE`` names. Times are CLOCK_MONOTONIC's.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable
from typing import Any

LONG_S = 0.001


def _install(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    began_s = 0.0

    def note(what: str, first_s: float, last_s: float) -> None:
        if last_s - first_s > LONG_S:
            os.write(descriptor, json.dumps([what, os.getpid(), first_s, last_s]).encode() + b"\n")

    def on_gc(step: str, info: dict[str, Any]) -> None:
        nonlocal began_s
        if step == "start":
            began_s = time.perf_counter()
        else:
            note(f"GC of generation {info['generation']}", began_s, time.perf_counter())

    def timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            first_s = time.perf_counter()
            try:
                return function(*args)
            finally:
                note(what, first_s, time.perf_counter())

        return call

    gc.callbacks.append(on_gc)
    os.fsync = timed("fsync", os.fsync)
    os.fdatasync = timed("fdatasync", os.fdatasync)
    os.fork = timed("fork (snapshot)", os.fork)


if "BENCHMARK_PROBE_FILE" in os.environ:
    _install(os.environ["BENCHMARK_PROBE_FILE"])

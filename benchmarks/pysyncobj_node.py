"""One process of PySyncObj: a counter; on the leader, jobs as in ``load.py`` are run in this very process.

    python benchmarks/pysyncobj_node.py OWN_ADDRESS OTHER_ADDRESS...

Says ``true`` or ``false`` (does it lead?) when the three have a leader. The process has one thread, which calls
``doTick`` in turn with the commands: PySyncObj's own ticking thread would compete with them for the interpreter.
"""

from __future__ import annotations

import json
import select
import sys
import time
from typing import Any

from measuring import Histogram
from pysyncobj import SyncObj, SyncObjConf, replicated

TICK_S = 0.001
WAIT_S = 30.0


class Counter(SyncObj):  # type: ignore[misc]
    """The replicated value."""

    def __init__(self, address: str, others: list[str]) -> None:
        # Without batches at first: the notifier that single commands need is made only then.
        conf = SyncObjConf(
            autoTick=False, appendEntriesUseBatch=False, appendEntriesPeriod=TICK_S, commandsQueueSize=1 << 20
        )
        super().__init__(address, others, conf)
        self.value = 0

    @replicated  # type: ignore[untyped-decorator]
    def put(self, value: bytes) -> bytes:
        self.value += 1
        return value


def run_job(counter: Counter, job: dict[str, Any]) -> dict[str, Any]:
    """A closed loop of ``in_flight`` commands, each begun in the callback of another."""
    # Its batches wait for the period, which is faster as soon as several commands are under way, and slower for one.
    counter.conf.appendEntriesUseBatch = job["in_flight"] > 1
    latencies: list[float] = []
    clock = time.perf_counter
    value = b"v" * job["value_bytes"]
    began_s = clock()
    end_s = began_s + job["seconds"]
    open_count = 0

    def begin() -> None:
        nonlocal open_count
        open_count += 1
        start_s = clock()

        def done(result: Any, error: Any) -> None:
            nonlocal open_count
            open_count -= 1
            latencies.append(clock() - start_s)
            if clock() < end_s:
                begin()

        counter.put(value, callback=done)

    for _ in range(job["in_flight"]):
        begin()
    while open_count and clock() < end_s + WAIT_S:
        counter.doTick(TICK_S)
    histogram = Histogram().add(latencies)
    return {"counts": histogram.counts, "max_us": histogram.max_us, "took_s": clock() - began_s, "gc": []}


def main() -> None:
    counter = Counter(sys.argv[1], sys.argv[2:])
    deadline = time.monotonic() + WAIT_S
    while not (counter.isReady() and counter._getLeader() is not None):
        if time.monotonic() > deadline:
            raise SystemExit("PySyncObj found no leader")
        counter.doTick(TICK_S)
    print(json.dumps(bool(counter._isLeader())), flush=True)
    while True:
        counter.doTick(TICK_S)
        if select.select([sys.stdin], [], [], 0)[0]:
            line = sys.stdin.readline()  # jobs come one at a time: nothing is left behind in the buffer
            if not line:
                return
            print(json.dumps(run_job(counter, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

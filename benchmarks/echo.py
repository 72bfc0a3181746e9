"""The yardstick: a bare pyzmq echo over TCP on loopback, one client process, one server process, no replication.

    python benchmarks/echo.py --client

takes jobs as ``load.py`` does, with ``in_flight`` messages under way, of which ``batch`` share a frame (a frame of 64
messages counts as 64). It is written as fast as plain pyzmq goes: both sides take all that ``EVENTS`` reports before
they wait again, and no receive ends in EAGAIN.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any, cast

import zmq
from measuring import Histogram, die_with_parent, end

HEADER_BYTES = 48
"""About what a small command takes on the wire besides its argument."""

_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)


def run_job(dealer: zmq.Socket[bytes], job: dict[str, Any]) -> dict[str, Any]:
    """Keep ``in_flight`` messages under way, in frames of ``batch``, for ``seconds``."""
    batch = job.get("batch", 1)
    frame = bytes((HEADER_BYTES + job["value_bytes"]) * batch)
    frame_count = max(1, job["in_flight"] // batch)
    clock = time.perf_counter
    started: list[float] = []  # of the frames under way, oldest first: TCP keeps their order
    latencies: list[float] = []
    began_s = clock()
    end_s = began_s + job["seconds"]
    for _ in range(frame_count):
        started.append(clock())
        dealer.send(frame)
    while started:
        dealer.recv()
        received = 1
        while cast(int, dealer.get(_EVENTS)) & _POLLIN:
            dealer.recv()
            received += 1
        now_s = clock()
        latencies.extend(now_s - start_s for start_s in started[:received])
        del started[:received]
        if now_s < end_s:
            for _ in range(received):
                dealer.send(frame)
            started.extend([now_s] * received)
    histogram = Histogram().add(latencies)
    counts = {bucket: count * batch for bucket, count in histogram.counts.items()}
    return {"counts": counts, "max_us": histogram.max_us, "took_s": clock() - began_s, "gc": []}


def client() -> None:
    """Start the server, say its pid, run jobs until standard input ends."""
    # A process of its own, not a fork: this one holds ZeroMQ contexts soon.
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=die_with_parent,
    )
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        assert server.stdout is not None
        endpoint = server.stdout.readline().decode().strip()
        if not endpoint:
            raise RuntimeError("the echo server did not start")
        dealer = context.socket(zmq.DEALER)
        dealer.set(zmq.LINGER, 0)
        dealer.set(zmq.RCVTIMEO, 10_000)
        dealer.set(zmq.SNDHWM, 0)  # no limits: a ROUTER drops what is above them
        dealer.set(zmq.RCVHWM, 0)
        dealer.connect(endpoint)
        print(json.dumps(server.pid), flush=True)
        for line in sys.stdin:
            print(json.dumps(run_job(dealer, json.loads(line))), flush=True)
    finally:
        context.destroy(linger=0)
        end(server)


def serve() -> None:
    """Echo until killed."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.set(zmq.LINGER, 0)
    router.set(zmq.SNDHWM, 0)
    router.set(zmq.RCVHWM, 0)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    print(f"tcp://127.0.0.1:{port}", flush=True)
    while True:
        router.send_multipart([router.recv(), router.recv()])
        while cast(int, router.get(_EVENTS)) & _POLLIN:
            router.send_multipart([router.recv(), router.recv()])


if __name__ == "__main__":
    client() if sys.argv[1:] == ["--client"] else serve()

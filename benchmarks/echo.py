"""The yardstick: a bare pyzmq echo over TCP on loopback, one client process, one server process, no replication.

    python benchmarks/echo.py --seconds 2

prints the round trip (p50, p99 in µs) of one message at a time and messages per second at 16, 64 and 256 in flight.
Other benchmarks call :func:`run_echo` in the same run: figures of different runs on a shared machine do not compare.

It is written as fast as plain pyzmq goes: both sides take all that ``EVENTS`` reports before they wait again, and no
receive ends in EAGAIN.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any, cast

import zmq

IN_FLIGHT = (16, 64, 256)
MESSAGE = bytes(64)
"""About what a small command takes on the wire."""

_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)


def run_echo(seconds: float = 2.0) -> dict[str, Any]:
    """Measure for about ``seconds`` per figure.

    Returns:
        ``{"p50_us", "p99_us", "messages_per_s": {16: ..., 64: ..., 256: ...}, "message_bytes", "pyzmq", "libzmq"}``
    """
    # A process of its own, not a fork: the caller may hold ZeroMQ contexts, threads or loops.
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        assert server.stdout is not None
        endpoint = server.stdout.readline().decode().strip()
        if not endpoint:
            raise RuntimeError("the echo server did not start")
        dealer = context.socket(zmq.DEALER)
        dealer.set(zmq.LINGER, 0)
        dealer.set(zmq.RCVTIMEO, 10_000)
        dealer.connect(endpoint)
        _sequential(dealer, min(0.2, seconds))  # warm up
        latencies_us = sorted(_sequential(dealer, seconds))
        rates = {count: round(_in_flight(dealer, count, seconds)) for count in IN_FLIGHT}
    finally:
        context.destroy(linger=0)
        assert server.stdin is not None and server.stdout is not None
        server.stdin.close()  # tells it to end
        server.stdout.close()
        server.wait(10)
    return {
        "p50_us": round(latencies_us[len(latencies_us) // 2], 1),
        "p99_us": round(latencies_us[len(latencies_us) * 99 // 100], 1),
        "messages_per_s": rates,
        "message_bytes": len(MESSAGE),
        "pyzmq": zmq.__version__,
        "libzmq": zmq.zmq_version(),
    }


def _sequential(dealer: zmq.Socket[bytes], seconds: float) -> list[float]:
    """Round trips in µs, one at a time."""
    latencies_us = []
    stop = time.perf_counter() + seconds
    before = time.perf_counter()
    while before < stop:
        dealer.send(MESSAGE)
        dealer.recv()
        after = time.perf_counter()
        latencies_us.append((after - before) * 1e6)
        before = after
    return latencies_us


def _in_flight(dealer: zmq.Socket[bytes], count: int, seconds: float) -> float:
    """Messages per second with ``count`` always under way."""
    for _ in range(count):
        dealer.send(MESSAGE)
    done = 0
    started = time.perf_counter()
    stop = started + seconds
    while (now := time.perf_counter()) < stop:
        dealer.recv()
        received = 1
        while cast(int, dealer.get(_EVENTS)) & _POLLIN:
            dealer.recv()
            received += 1
        for _ in range(received):
            dealer.send(MESSAGE)
        done += received
    for _ in range(count):
        dealer.recv()
    return done / (now - started)


def _serve() -> None:
    """Echo until stdin ends."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.set(zmq.LINGER, 0)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    print(f"tcp://127.0.0.1:{port}", flush=True)
    poller = zmq.Poller()
    poller.register(router, zmq.POLLIN)
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    while True:
        ready = dict(poller.poll())
        if sys.stdin.fileno() in ready:
            break
        while cast(int, router.get(_EVENTS)) & _POLLIN:
            router.send_multipart([router.recv(), router.recv()])
    context.destroy(linger=0)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="per figure")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve()
        return
    figures = run_echo(options.seconds)
    if options.json:
        print(json.dumps(figures))
        return
    print(f"bare pyzmq echo over TCP ({figures['message_bytes']} bytes, libzmq {figures['libzmq']})")
    print(f"  one at a time   p50 {figures['p50_us']:.0f} µs   p99 {figures['p99_us']:.0f} µs")
    for count, rate in figures["messages_per_s"].items():
        print(f"  {count:>3} in flight   {rate:>9,}/s")


if __name__ == "__main__":
    main()

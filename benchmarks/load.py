"""A client process: jobs in, one JSON line each; for each a line with what was measured.

    python benchmarks/load.py SYSTEM ADDRESS

A job is ``{"op", "groups", "in_flight", "seconds", "value_bytes"}``: so many operations are kept under way all the
time (a closed loop). With ``rate``, so many begin each second, whatever becomes of those before (an open loop), and a
latency counts from the moment at which the operation should have begun. With ``each_once``, every group gets one.
With ``default_settings``, timeouts and retries are the client's own; else a call may take long and counts as one.

What differs between the systems is :func:`connect_SYSTEM`: it returns a coroutine function that does one operation.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import itertools
import json
import sys
import time
from array import array
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from measuring import Histogram

Operation = Callable[[str], Awaitable[Any]]
TIMEOUT_S = 10.0
OPEN_LOOP_TICK_S = 0.002
WORST_COUNT = 200


async def connect_raftfleet(stack: AsyncExitStack, address: str) -> Callable[[dict[str, Any]], Operation]:
    """``address`` is a run directory. Operations: command, query, lease (a query of groups with leases), stale."""
    import raftfleet

    client = await stack.enter_async_context(raftfleet.aio.connect(address))

    def make(job: dict[str, Any]) -> Operation:
        value = b"v" * job["value_bytes"]
        if job.get("default_settings"):
            return lambda group: client.command(group, value)
        if job["op"] == "command":
            return lambda group: client.command(group, value, timeout=TIMEOUT_S)
        consistency = "stale" if job["op"] == "stale" else "linearizable"
        return lambda group: client.query(group, value, consistency=consistency, timeout=TIMEOUT_S)

    return make


async def connect_nats(stack: AsyncExitStack, address: str) -> Callable[[dict[str, Any]], Operation]:
    """``address`` is host:port; a command is a publish that waits for the acknowledgement of its stream."""
    import nats

    client = await nats.connect(f"nats://{address}")
    stack.push_async_callback(client.close)
    jetstream = client.jetstream(publish_async_max_pending=1 << 16)

    def make(job: dict[str, Any]) -> Operation:
        value = b"v" * job["value_bytes"]
        return lambda group: jetstream.publish(group, value, timeout=TIMEOUT_S)

    return make


async def connect_etcd(stack: AsyncExitStack, address: str) -> Callable[[dict[str, Any]], Operation]:
    """``address`` is host:port; a command is a Put. The message is written by hand: two fields, length-delimited."""
    import grpc.aio

    channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
    put = channel.unary_unary("/etcdserverpb.KV/Put")

    def make(job: dict[str, Any]) -> Operation:
        size = job["value_bytes"]
        length = bytes([size & 0x7F | 0x80, size >> 7]) if size > 0x7F else bytes([size])
        value = b"\x12" + length + b"v" * size

        async def operation(group: str) -> Any:
            key = group.encode()
            return await put(b"\x0a" + bytes([len(key)]) + key + value, timeout=TIMEOUT_S)

        return operation

    return make


SYSTEMS = {"raftfleet": connect_raftfleet, "nats": connect_nats, "etcd": connect_etcd}


async def closed_loop(operation: Operation, job: dict[str, Any]) -> tuple[list[float], float]:
    """Keep ``in_flight`` operations under way; latencies in s, and the time it all took."""
    latencies: list[float] = []
    turn = itertools.cycle(job["groups"])
    clock = time.perf_counter
    began_s = clock()
    end_s = began_s + job["seconds"]

    async def worker() -> None:
        while (start_s := clock()) < end_s:
            await operation(next(turn))
            latencies.append(clock() - start_s)

    await asyncio.gather(*(worker() for _ in range(job["in_flight"])))
    return latencies, clock() - began_s


async def open_loop(operation: Operation, job: dict[str, Any], out: dict[str, Any]) -> tuple[list[float], float]:
    """Begin ``rate`` operations a second, in bursts of a tick.

    ``out`` gets ``seconds`` (a histogram for each second since ``began_s``), ``worst`` (begin and latency of the
    slowest) and ``errors`` (name of the exception -> how many). Times are CLOCK_MONOTONIC's, as in all processes.
    """
    begins, latencies = array("d"), array("d")  # no objects: the client's own GC is not what is to be measured
    errors: dict[str, int] = {}
    turn = itertools.cycle(job["groups"])
    clock = time.perf_counter
    running: set[asyncio.Task[None]] = set()

    async def one(due_s: float) -> None:
        try:
            await operation(next(turn))
            latencies.append(clock() - due_s)
            begins.append(due_s)
        except Exception as error:
            errors[type(error).__name__] = errors.get(type(error).__name__, 0) + 1

    began_s = clock()
    begun = 0
    while (now_s := clock()) - began_s < job["seconds"]:
        due = int((now_s - began_s) * job["rate"])
        while begun < due:
            planned_s = began_s + begun / job["rate"]
            # A burst is due when its tick comes; a tick that comes late by more than its own grain has been held up.
            due_s = now_s if now_s - planned_s < 2 * OPEN_LOOP_TICK_S else planned_s
            task = asyncio.ensure_future(one(due_s))
            running.add(task)
            task.add_done_callback(running.discard)
            begun += 1
        await asyncio.sleep(OPEN_LOOP_TICK_S)
    if running:
        await asyncio.gather(*running)
    by_second: dict[int, list[float]] = {}
    for latency_s, due_s in zip(latencies, begins, strict=True):
        by_second.setdefault(int(due_s - began_s), []).append(latency_s)
    out["began_s"] = began_s
    out["seconds"] = {second: Histogram().add(rows).counts for second, rows in sorted(by_second.items())}
    out["worst"] = [
        [begins[i], latencies[i]] for i in heapq.nlargest(WORST_COUNT, range(len(begins)), key=latencies.__getitem__)
    ]
    out["errors"] = errors
    return list(latencies), clock() - began_s


async def each_once(operation: Operation, job: dict[str, Any], out: dict[str, Any]) -> tuple[list[float], float]:
    """One operation for each group, ``in_flight`` at a time."""
    latencies: list[float] = []
    errors: dict[str, int] = {}
    left = iter(job["groups"])
    clock = time.perf_counter

    async def worker() -> None:
        for group in left:
            start_s = clock()
            try:
                await operation(group)
                latencies.append(clock() - start_s)
            except Exception as error:
                errors[type(error).__name__] = errors.get(type(error).__name__, 0) + 1

    began_s = clock()
    await asyncio.gather(*(worker() for _ in range(job["in_flight"])))
    out["errors"] = errors
    return latencies, clock() - began_s


def sequential_sync(address: str, job: dict[str, Any]) -> tuple[list[float], float]:
    """raftfleet's synchronous client, one operation at a time."""
    import raftfleet

    latencies: list[float] = []
    clock = time.perf_counter
    value = b"v" * job["value_bytes"]
    group = job["groups"][0]
    with raftfleet.connect(address) as client:
        client.command(group, value, timeout=TIMEOUT_S)
        began_s = clock()
        end_s = began_s + job["seconds"]
        while (start_s := clock()) < end_s:
            client.command(group, value, timeout=TIMEOUT_S)
            latencies.append(clock() - start_s)
    return latencies, clock() - began_s


async def serve(system: str, address: str) -> None:
    """Until standard input ends."""
    loop = asyncio.get_running_loop()
    pauses: list[list[float]] = []
    gc_began_s = 0.0

    def on_gc(phase: str, info: dict[str, Any]) -> None:
        nonlocal gc_began_s
        now_s = time.perf_counter()
        if phase == "start":
            gc_began_s = now_s
        elif now_s - gc_began_s > 0.001:
            pauses.append([gc_began_s, now_s])

    gc.callbacks.append(on_gc)
    async with AsyncExitStack() as stack:
        make = await SYSTEMS[system](stack, address)
        print(json.dumps("ready"), flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            job = json.loads(line)
            out: dict[str, Any] = {}
            gc.collect()
            gc.freeze()
            pauses.clear()
            if job.get("sync"):
                latencies, took_s = await loop.run_in_executor(None, sequential_sync, address, job)
            elif job.get("each_once"):
                latencies, took_s = await each_once(make(job), job, out)
            elif job.get("rate"):
                latencies, took_s = await open_loop(make(job), job, out)
            else:
                latencies, took_s = await closed_loop(make(job), job)
            histogram = Histogram().add(latencies)
            out |= {"counts": histogram.counts, "max_us": histogram.max_us, "took_s": took_s, "gc": pauses}
            print(json.dumps(out), flush=True)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2]))

"""Overload: far more offered than can be done.

The load comes from a client of the plainest kind, which costs a tenth of what the nodes do: it writes runs of 64
commands over 60 groups by itself and offers a refused one again at once, as new commands, so that the load does not
fall when it is refused. The peak is what is done with 1,024 commands under way. Then half as many again are kept under
way as a node's worker takes in. Counted are what was done, what was refused (``Overloaded``) and every other outcome;
looked at are the groups' terms, which an election would raise, and the memory of the nodes' processes.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import msgpack
from measuring import say
from systems import Raftfleet

from raftfleet.fleet.host_requests import OPEN_REQUESTS_MAX
from raftfleet.node import rundir
from raftfleet.wire import ipc

GROUP_COUNT = 60
RUN_COMMANDS = 64
PEAK_IN_FLIGHT = 1024
OVERLOAD_IN_FLIGHT = OPEN_REQUESTS_MAX * 3 // 2


def measure_overload(seconds: float) -> dict[str, Any]:
    """Throughput, outcomes and memory, at the peak and beyond."""
    with Raftfleet() as system:
        system.groups(GROUP_COUNT)
        system.fleet.wait_settled(deadline_s=60)
        offer(system, PEAK_IN_FLIGHT, min(1.0, seconds))
        peak = offer(system, PEAK_IN_FLIGHT, seconds)
        before = terms(system)
        overload = offer(system, OVERLOAD_IN_FLIGHT, seconds)
        elections = sum(before[name] != term for name, term in terms(system).items())
    part = overload["done_per_second"] / peak["done_per_second"]
    say(f"  {peak['done_per_second']:,.0f}/s at the peak; {overload['offered_per_second']:,.0f}/s offered: "
        f"{overload['done_per_second']:,.0f}/s")  # fmt: skip
    return {"peak": peak, "overload": overload, "part_of_peak": part, "elections": elections}


def terms(system: Raftfleet) -> dict[str, int]:
    """Of every group."""
    return {name: group["term"] for name, group in system.fleet.groups().items()}


def offer(system: Raftfleet, in_flight: int, seconds: float) -> dict[str, Any]:
    """Keep ``in_flight`` commands offered for ``seconds``, from a process of its own, through one node."""
    run_dir = system.fleet.nodes[system.leader()].run_dir
    processes = [process for node in system.fleet.nodes.values() for process in node.processes()]
    job = {"socket": str(rundir.shard_socket(run_dir, 0)), "names": system.groups(GROUP_COUNT)}
    job |= {"in_flight": in_flight, "seconds": seconds}
    client = subprocess.Popen([sys.executable, __file__, json.dumps(job)], stdout=subprocess.PIPE)
    rss_max = 0
    while client.poll() is None:
        rss_max = max(rss_max, *(process.memory_info().rss for process in processes))
        time.sleep(0.1)
    assert client.stdout is not None
    outcomes: dict[str, int] = json.load(client.stdout)
    client.stdout.close()
    return {
        "in_flight": in_flight,
        "done_per_second": outcomes.get("done", 0) / seconds,
        "offered_per_second": sum(outcomes.values()) / seconds,
        "outcomes": outcomes,
        "rss_max_bytes": rss_max,
    }


class Slot:
    """One run after the other, in a session of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.client_id = secrets.token_bytes(ipc.CLIENT_ID_BYTES)
        self.next_seq = 1
        self.args = [msgpack.packb("inc")] * RUN_COMMANDS

    def request(self, request_id: int) -> list[Any]:
        """The next run."""
        seq, self.next_seq = self.next_seq, self.next_seq + RUN_COMMANDS
        run = msgpack.packb([self.client_id, seq, seq - 1, time.time_ns() // 1000, self.args])
        return [request_id, ipc.COMMAND_RUN, self.name, 0, 30_000, RUN_COMMANDS, run]


def offer_from_here(job: dict[str, Any]) -> dict[str, int]:
    """What became of the commands that ended within the time."""
    names = job["names"]
    slots = [Slot(names[number % len(names)]) for number in range(job["in_flight"] // RUN_COMMANDS)]
    outcomes: Counter[str] = Counter()
    under_way = dict(enumerate(slots, 1))
    next_id = len(slots) + 1
    reader = ipc.FrameReader()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(job["socket"])
        connection.sendall(ipc.pack_frame([[0, ipc.HELLO, ipc.PROTOCOL, os.urandom(ipc.CLIENT_ID_BYTES)]]))
        connection.sendall(ipc.pack_frame([slot.request(number) for number, slot in under_way.items()]))
        end_s = time.perf_counter() + job["seconds"]
        while time.perf_counter() < end_s:
            requests = []
            for frame in reader.feed(connection.recv(ipc.RECEIVE_BYTES)):
                for request_id, code, body in frame:
                    slot = under_way.pop(request_id, None)
                    if slot is None:
                        continue
                    outcomes["done" if code == ipc.OK else type(ipc.error_of(code, body)).__name__] += RUN_COMMANDS
                    under_way[next_id] = slot
                    requests.append(slot.request(next_id))
                    next_id += 1
            if requests:
                connection.sendall(ipc.pack_frame(requests))
    return dict(outcomes)


if __name__ == "__main__":
    print(json.dumps(offer_from_here(json.loads(sys.argv[1]))))

"""What grows with what: messages, bytes and memory of fleets that are too large for this machine, counted.

    python benchmarks/cost_model.py [--quick] [--json FILE]

The production core (:class:`raftfleet.core.shard.Shard`, one per node) runs over links that deliver at once, without
sockets or clocks: nothing here is a time. Messages are counted as they are handed over, bytes as they would be framed
(without the headers of ZeroMQ, TCP and IP). Groups are placed by the production rule, in three zones.

Idle traffic has one term: the number of **linked pairs**, (shard that leads a group, shard with another member of it).
For fleets that do not fit here that number is computed: members of a group are in different zones (three here), so of
P ordered pairs of nodes in different zones, with G groups of R members, each is linked with probability
``1 - exp(-G (R - 1) / P)``. Where a fleet fits, both are shown: that checks the formula. Memory is what the Python
allocator gives out for members and for rows of the fleet's state.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import tracemalloc
from pathlib import Path
from typing import Any

import msgpack

from raftfleet.core.config import GroupConfig
from raftfleet.core.context import CommandContext
from raftfleet.core.shard import Shard, ShardSettings
from raftfleet.fleet.machine import FleetState
from raftfleet.fleet.placement import place
from raftfleet.testing.machines import Echo
from raftfleet.wire.codec import encode_frame

REPLICAS = 3
ZONES = 3
BEATS_PER_S = 5
BEAT_US = 1_000_000 // BEATS_PER_S
FINE_US = 5_000
FLEET = bytes(range(16))
CLIENT = bytes(16)
WALL_US = 1_700_000_000_000_000
CONFIG = GroupConfig("raftfleet.testing.machines:Echo")
BARE_FRAME_BYTES = len(encode_frame(FLEET, 1 << 61, 1 << 61, []))


class Counts:
    """What was sent. Every message counts as if it had a frame of its own for its bytes' header, once per frame."""

    def __init__(self) -> None:
        self.frames = 0
        self.messages = 0
        self.bytes = 0


class Fleet:
    """Shards, one per node, whose messages arrive at once. Only what is sent is counted."""

    def __init__(self, node_count: int) -> None:
        self.now_us = 1_000_000
        self.zones: dict[str, list[str]] = {}
        self.instances: dict[str, int] = {}
        self.shards: dict[int, Shard] = {}
        rng = random.Random(node_count)
        for number in range(node_count):
            name = f"node-{number:04}"
            instance = rng.getrandbits(62) + 1
            self.zones.setdefault(f"zone-{number % ZONES}", []).append(name)
            self.instances[name] = instance
            shard = self.shards[instance] = Shard(instance, random.Random(number), ShardSettings(BEAT_US))
            shard.begin(self.now_us, WALL_US)
        self.counts = Counts()

    def add(self, group_count: int) -> None:
        """Create groups, as the fleet's log would, and let each have its leader."""
        for uid in range(1, group_count + 1):
            name = f"group-{uid:07}"
            places = [self.instances[node] for node in place(name, REPLICAS, self.zones)]
            for number, instance in enumerate(reversed(places)):
                machine = Echo()
                machine.context = CommandContext()
                campaign = number == len(places) - 1
                self.shards[instance].create_group(uid, name, CONFIG, machine, tuple(places), campaign=campaign)
            self.deliver(places)

    def deliver(self, senders: Any = None) -> None:
        """Carry messages until nobody has anything to say."""
        inboxes: dict[int, list[tuple[int, list[Any]]]] = {}
        busy = dict.fromkeys(self.shards if senders is None else senders)
        while busy:
            for instance in busy:
                shard = self.shards.get(instance)
                if shard is None:
                    continue
                shard.begin(self.now_us, WALL_US)
                for sender, messages in inboxes.pop(instance, ()):
                    shard.receive(sender, messages)
                for peer, messages in shard.finish().sends.items():
                    self.counts.frames += 1
                    self.counts.messages += len(messages)
                    self.counts.bytes += len(encode_frame(FLEET, instance, peer, messages))
                    if peer in self.shards:
                        inboxes.setdefault(peer, []).append((instance, messages))
            busy = dict.fromkeys(inboxes)

    def run(self, seconds: float, step_us: int = BEAT_US) -> None:
        """Let simulated time pass."""
        for _ in range(round(seconds * 1_000_000 / step_us)):
            self.now_us += step_us
            for shard in self.shards.values():
                shard.begin(self.now_us, WALL_US)
                shard.tick()
            self.deliver()

    def leaderless(self) -> int:
        """Groups that nobody leads."""
        uids = {uid for shard in self.shards.values() for uid in shard.members}
        led = {uid for shard in self.shards.values() for uid, member in shard.members.items() if member.is_established}
        return len(uids - led)


def linked_pairs(group_count: int, node_count: int) -> float:
    """The expected number of linked pairs, by the formula of the module's text."""
    zones = [len(range(number, node_count, ZONES)) for number in range(ZONES)]
    pairs = node_count**2 - sum(size**2 for size in zones)
    return pairs * (1 - math.exp(-group_count * (REPLICAS - 1) / pairs))


def idle(node_count: int, group_count: int, seconds: float = 2.0) -> dict[str, Any]:
    """Idle traffic of a fleet that is simulated whole."""
    fleet = Fleet(node_count)
    fleet.add(group_count)
    created = fleet.counts
    fleet.run(3.0)  # what follows an election: the last commit index, told once
    fleet.counts = Counts()
    fleet.run(seconds)
    pairs = sum(bool(link.led) for shard in fleet.shards.values() for link in shard.links.values())
    return {
        "nodes": node_count,
        "groups": group_count,
        "linked_pairs": pairs,
        "linked_pairs_computed": round(linked_pairs(group_count, node_count)),
        "messages_per_s": fleet.counts.messages / seconds,
        "bytes_per_s": fleet.counts.bytes / seconds,
        "messages_per_creation": created.messages / group_count,
        "bytes_per_creation": created.bytes / group_count,
    }


def extrapolated(node_count: int, group_count: int, measured: dict[str, Any]) -> dict[str, Any]:
    """The same figures for a fleet that does not fit here: linked pairs by the formula, each as in ``measured``."""
    pairs = linked_pairs(group_count, node_count)
    return {
        "nodes": node_count,
        "groups": group_count,
        "linked_pairs_computed": round(pairs),
        "messages_per_s": pairs * measured["messages_per_s"] / measured["linked_pairs"],
        "bytes_per_s": pairs * measured["bytes_per_s"] / measured["linked_pairs"],
    }


def command(batch: int, value_bytes: int = 16, rounds: int = 50) -> dict[str, Any]:
    """What ``batch`` commands that come together to one group's leader cost between the nodes."""
    fleet = Fleet(3)
    fleet.add(1)
    fleet.run(3.0)
    leader = next(shard for shard in fleet.shards.values() if shard.members[1].lead is not None)
    fleet.counts = Counts()
    argument = msgpack.packb(b"v" * value_bytes)
    for number in range(rounds):
        leader.begin(fleet.now_us, WALL_US)
        for position in range(batch):
            seq = number * batch + position + 1
            leader.propose(1, msgpack.packb([CLIENT, seq, max(0, seq - batch), WALL_US, argument]), seq)
        fleet.deliver([leader.instance])
    total = rounds * batch
    return {
        "commands_together": batch,
        "value_bytes": value_bytes,
        "messages_per_command": fleet.counts.messages / total,
        "bytes_per_command": fleet.counts.bytes / total,
    }


def failover(node_count: int, group_count: int) -> dict[str, Any]:
    """What the death of one node costs, in messages for each group that it led."""
    fleet = Fleet(node_count)
    fleet.add(group_count)
    fleet.run(3.0)
    dead = fleet.shards.pop(next(iter(fleet.shards)))
    led = sum(member.lead is not None for member in dead.members.values())
    beats = 2 * BEATS_PER_S * sum(bool(link.led) for shard in fleet.shards.values() for link in shard.links.values())
    fleet.counts = Counts()
    seconds = 0.0
    while fleet.leaderless() and seconds < 60:
        fleet.run(0.2, FINE_US)  # in steps so fine that two candidates of a group seldom share one
        seconds += 0.2
    return {
        "nodes": node_count,
        "groups": group_count,
        "groups_without_leader": led,
        "simulated_s": round(seconds, 1),
        "messages_per_group": max(0.0, fleet.counts.messages - beats * seconds) / led,
    }


def memory(count: int) -> dict[str, Any]:
    """Bytes that Python gives out per member (of an idle group, mean of leaders and followers) and per group's row."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    fleet = Fleet(3)
    fleet.add(count)
    fleet.run(3.0)
    gc.collect()
    members = (tracemalloc.get_traced_memory()[0] - before) / (count * REPLICAS)
    del fleet
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    state = FleetState()
    nodes = [
        {"name": f"n{i}", "zone": f"z{i}", "host": "h", "port": 7400 + 10 * i, "public_key": "", "instances": [i + 1]}
        for i in range(3)
    ]
    state.apply(["found", FLEET, nodes], 0)
    for start in range(0, count, 1000):
        names = [f"group-{start + number:07}" for number in range(min(1000, count - start))]
        state.apply(["add_groups", names, REPLICAS, CONFIG.to_dict()], 0)
    rows = (tracemalloc.get_traced_memory()[0] - before) / count
    dump_bytes = len(state.dump()) / count
    tracemalloc.stop()
    return {"groups": count, "member_bytes": members, "row_bytes": rows, "row_bytes_in_a_dump": dump_bytes}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown; a figure that a row lacks stays empty."""
    head = list(dict.fromkeys(name for row in rows for name in row))

    def text(value: Any) -> str:
        return "" if value is None else f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"

    lines = [[text(row.get(name)) for name in head] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small fleets only")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    sizes = [(3, 10), (3, 300), (10, 300)]
    large = [(1000, 1_000_000)]
    if not arguments.quick:
        sizes = [(3, 10), (3, 10_000), (10, 10_000), (100, 10_000), (300, 10_000), (1000, 20_000)]
        large = [(100, 100_000), (300, 1_000_000), (1000, 100_000), (1000, 1_000_000)]
    simulated = [idle(*size) for size in sizes]
    result = {
        "idle, simulated": simulated,
        "idle, extrapolated": [extrapolated(*size, simulated[-1]) for size in large],
        "commands": [command(1), command(64), command(64, 1024)],
        "failover": [failover(*size) for size in (sizes[1:3] if arguments.quick else [(3, 1000), (100, 10_000)])],
        "memory": [memory(300 if arguments.quick else 20_000)],
    }
    for title, rows in result.items():
        print(f"\n{title}\n\n{table(rows)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

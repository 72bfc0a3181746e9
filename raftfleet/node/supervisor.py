"""The supervisor: forks the node's processes, waits, restarts, and cleans up. The parent of all, and the dullest.

It has no threads, no sockets, no ZeroMQ context and runs no user code, so that it can fork at any time and has little
to fail by. It owns what must outlive a child: the run directory with its lock, the leader table's segment, the table of
children.

Signals are blocked and taken from the kernel's queue by ``sigtimedwait``, one at a time: there are no handlers, nothing
is interrupted, and a child is born with all of them blocked until it has put its own house in order.

==============  ====================================================================================================
SIGCHLD         reap; ask the restart policy (restart.py) about each child that was not asked to end
SIGTERM SIGINT  stop: SIGTERM to all children, SIGKILL after ``STOP_GRACE_US``; one that comes more than
                ``SAME_WISH_US`` after the first: SIGKILL at once
SIGHUP          stop (the terminal is gone), however often it comes; not under nohup
SIGUSR1         a shard's region of the leader table is full: grow it
==============  ====================================================================================================

The node's exit code is 0 after a stop that was asked for, else one of exit_codes.py.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from raftfleet.errors import NodeError
from raftfleet.node import leader_table, logs, rundir
from raftfleet.node.config import NodeConfig
from raftfleet.node.context import ChildContext, ChildTable, Role, monotonic_us
from raftfleet.node.data_dir import DataDir, DataDirRefused
from raftfleet.node.exit_codes import ExitCode, describe_status
from raftfleet.node.restart import GiveUp, RestartLimits, RestartPolicy
from raftfleet.workers import boot

STOP_GRACE_US = 5_000_000
"""What children get between SIGTERM and SIGKILL. A shard hands its leaderships over within two seconds."""

SAME_WISH_US = 500_000
"""A stop signal so soon after the first is the same wish: `timeout` sends one to its child and one to its own group.
Nobody becomes impatient in half a second."""

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SIGNALS = (signal.SIGCHLD, signal.SIGUSR1, *_STOP_SIGNALS)

_logger = logging.getLogger(__name__)


class Table(Protocol):
    """What the supervisor needs of the leader table (leader_table.py)."""

    @property
    def wants_growth(self) -> bool:
        """Whether a shard's region is too full."""

    def grow(self) -> None:
        """Begin a larger generation."""

    def close(self) -> None:
        """Tell the readers that the node has stopped, and remove the segment."""


MakeTable = Callable[[Path, NodeConfig], Table]
"""(run directory, settings) -> a new leader table."""


def run(
    config: NodeConfig,
    *,
    bodies: Mapping[Role, boot.Body] | None = None,
    make_table: MakeTable | None = None,
    limits: RestartLimits | None = None,
    stop_grace_us: int = STOP_GRACE_US,
    same_wish_us: int = SAME_WISH_US,
) -> int:
    """Run a node until it is told to stop; return its exit code. Call it from the main thread of a process of its own,
    which is to end with it: stop signals stay blocked once the node has run.

    Args:
        bodies: what the children do; None: the manager and shards of raftfleet.workers.
        make_table: makes the leader table; None: the one in shared memory.
        limits: patience with children that end by themselves.
        stop_grace_us: time for children to end by themselves in a stop.
        same_wish_us: time after the first stop signal within which others mean nothing more.

    Raises:
        ConfigError: the run directory cannot be used.
    """
    logs.configure(level=config.log_level, format=config.log_format, node=config.name, process="supervisor")
    mask_after = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    previous_child_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, children would reap themselves
    try:
        # Imported before the first fork, so that the children share these modules' memory and start in milliseconds.
        bodies = bodies or _bodies()
        make_table = make_table or _leader_table
        try:
            run_dir = rundir.RunDir.acquire(config.run_dir, name=config.name, socket_group=config.socket_group)
        except rundir.RunDirBusy as error:
            _logger.error("%s", error)
            return ExitCode.RUN_DIR_BUSY
        data_dir: DataDir | None = None
        try:
            if config.data_dir is not None:
                try:
                    data_dir = DataDir.acquire(config.data_dir, node=config.name, workers=config.workers)
                except DataDirRefused as error:
                    _logger.error("%s", error)
                    return ExitCode.DATA_DIR_REFUSED
                _tell_of_resharding(data_dir, config.workers)
            else:
                _logger.info("groups live in memory: they are lost with the majority of their members' processes")
            table = make_table(run_dir.path, config)
            # For good: who asks again while the node ends, to the last moment of its process, has what he wanted, and
            # it must not look like a death by signal.
            mask_after = mask_after.union(_STOP_SIGNALS)
            try:
                shard_count = data_dir.shard_count if data_dir is not None else config.workers
                limits_us = (stop_grace_us, same_wish_us)
                return _Supervisor(config, run_dir, table, bodies, limits, *limits_us, shard_count).serve()
            finally:
                table.close()
        finally:
            if data_dir is not None:
                data_dir.release()
            run_dir.release()
    finally:
        signal.signal(signal.SIGCHLD, previous_child_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask_after)


def _tell_of_resharding(data_dir: DataDir, workers: int) -> None:
    before = data_dir.workers_before
    if before not in (0, workers):
        _logger.info("re-sharding: %s was written by %d workers, there are %d now", data_dir.path, before, workers)
    if data_dir.shard_count > workers:
        surplus = data_dir.shard_count - workers
        _logger.info("%d surplus shards run until their members have moved to the others", surplus)


def _bodies() -> dict[Role, boot.Body]:
    from raftfleet.workers import manager, shard

    return {"manager": manager.main, "shard": shard.main}


def _leader_table(run_dir: Path, config: NodeConfig) -> Table:
    gid = rundir.group_id(config.socket_group)
    mode = 0o600 if gid is None else 0o640
    return leader_table.create_table(run_dir, config.name, config.workers, mode=mode, gid=gid)


@dataclass
class _Child:
    """One child over all its lives. ``pid`` is 0 while it is dead; ``due_us`` is set while a restart waits."""

    role: Role
    index: int
    row: int
    title: str
    policy: RestartPolicy
    pid: int = 0
    started_us: int = 0
    restart_count: int = 0
    due_us: int | None = None

    @property
    def socket_name(self) -> str:
        return rundir.CONTROL_SOCKET_NAME if self.role == "manager" else rundir.shard_socket_name(self.index)


class _Supervisor:
    """The loop. ``_exit_code`` is None while the node runs and set from the moment it stops."""

    def __init__(
        self,
        config: NodeConfig,
        run_dir: rundir.RunDir,
        table: Table,
        bodies: Mapping[Role, boot.Body],
        limits: RestartLimits | None,
        stop_grace_us: int,
        same_wish_us: int,
        shard_count: int,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._table = table
        self._bodies = bodies
        self._stop_grace_us = stop_grace_us
        self._same_wish_us = same_wish_us
        self._pid = os.getpid()
        self._child_table = ChildTable(shard_count)
        self._stop_signals = [number for number in _STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._exit_code: ExitCode | None = None
        self._kill_due_us: int | None = None
        self._first_demand_us: int | None = None
        self._is_killing = False
        self._children = [_Child("manager", 0, 0, "manager", RestartPolicy("the manager", limits))]
        for index in range(shard_count):
            policy = RestartPolicy(f"shard {index}", limits)
            self._children.append(_Child("shard", index, 1 + index, f"shard-{index}", policy))

    def serve(self) -> int:
        """Start all children, serve signals and deadlines until the last child is gone after a stop."""
        gc.freeze()  # before the first fork: a collection in a child would copy every page of what is here
        try:
            for child in self._children:
                self._start(child)
            while self._exit_code is None or any(child.pid for child in self._children):
                self._serve_signal()
                self._serve_deadlines()
            return self._exit_code
        finally:  # nothing is left but after an error in here
            self._kill_all()
            for child in self._children:
                if child.pid:
                    os.waitpid(child.pid, 0)
            self._child_table.close()

    # ---------------------------------------------------------------- events

    def _serve_signal(self) -> None:
        """Wait for a signal until the next deadline, and act on it."""
        deadlines = [child.due_us for child in self._children if child.due_us is not None]
        if self._kill_due_us is not None:
            deadlines.append(self._kill_due_us)
        if deadlines:
            info = signal.sigtimedwait(_SIGNALS, max(0, min(deadlines) - monotonic_us()) / 1e6)
        else:
            info = signal.sigwaitinfo(_SIGNALS)
        if info is None:
            return
        if info.si_signo == signal.SIGCHLD:
            self._reap()
        elif info.si_signo == signal.SIGUSR1:
            self._grow_table()
        elif info.si_signo in self._stop_signals:
            self._serve_stop_signal(info.si_signo, info.si_pid)

    def _serve_stop_signal(self, number: int, sender_pid: int) -> None:
        name = signal.Signals(number).name
        if self._exit_code is None:
            self._stop(ExitCode.OK, f"{name} from process {sender_pid}")
        # Impatient is who asks twice: not the terminal, whose SIGHUP the kernel and the shell may both send, and not
        # a child that passed on what `raftfleet-node stop` wanted, with a service manager's SIGTERM after it.
        if number == signal.SIGHUP or any(child.pid == sender_pid for child in self._children):
            return
        now_us = monotonic_us()
        if self._first_demand_us is None:
            self._first_demand_us = now_us
        elif now_us - self._first_demand_us >= self._same_wish_us and not self._is_killing:
            self._is_killing = True
            _logger.warning("%s again: killing all children", name)
            self._kill_all()

    def _serve_deadlines(self) -> None:
        now_us = monotonic_us()
        for child in self._children:
            if child.due_us is not None and child.due_us <= now_us:
                child.due_us = None
                child.restart_count += 1
                self._start(child)
        if self._kill_due_us is not None and self._kill_due_us <= now_us:
            self._kill_due_us = None
            late = ", ".join(child.title for child in self._children if child.pid)
            _logger.warning("still running %g s after SIGTERM, killing: %s", self._stop_grace_us / 1e6, late)
            self._kill_all()

    def _reap(self) -> None:
        """Collect every dead child: one SIGCHLD may stand for several. As process 1, strangers' orphans too."""
        while True:
            try:
                pid, wait_status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for child in self._children:
                if child.pid == pid:
                    self._ended(child, os.waitstatus_to_exitcode(wait_status))

    def _grow_table(self) -> None:
        if not self._table.wants_growth:  # two shards asked, the first one's growth was enough for both
            return
        try:
            self._table.grow()
        except (NodeError, OSError) as error:  # what fits stays readable; the next request tries again
            _logger.error("the leader table cannot grow: %s", error)

    # ---------------------------------------------------------------- children

    def _start(self, child: _Child) -> None:
        context = ChildContext(
            config=self._config,
            role=child.role,
            index=child.index,
            supervisor_pid=self._pid,
            children=self._child_table,
        )
        sys.stdout.flush()  # or the child would write what is buffered once more
        sys.stderr.flush()
        child.started_us = monotonic_us()
        try:
            pid = os.fork()
        except OSError as error:
            _logger.error("cannot fork %s: %s", child.title, error)
            self._decide(child, ExitCode.FAILED)
            return
        if pid == 0:
            status: int = ExitCode.FAILED
            try:
                status = boot.run_child(context, self._bodies[child.role])
            finally:
                os._exit(status & 0xFF)
        child.pid = pid
        self._write_row(child)

    def _ended(self, child: _Child, status: int) -> None:
        pid, child.pid = child.pid, 0
        self._write_row(child)
        self._run_dir.remove_socket(child.socket_name)  # a connection is refused rather than left waiting
        if self._exit_code is not None:
            _logger.info("%s (process %d) %s", child.title, pid, describe_status(status))
            return
        level = logging.INFO if status in (ExitCode.RESTART_FRESH, ExitCode.RETIRED) else logging.WARNING
        _logger.log(level, "%s (process %d) %s", child.title, pid, describe_status(status))
        if status == ExitCode.RETIRED:
            self._child_table.retire(child.row)
            return
        self._decide(child, status)

    def _decide(self, child: _Child, status: int) -> None:
        decision = child.policy.child_ended(now_us=monotonic_us(), started_us=child.started_us, status=status)
        if isinstance(decision, GiveUp):
            self._stop(decision.code, decision.reason)
        else:
            child.due_us = decision.due_us

    def _stop(self, code: ExitCode, reason: str) -> None:
        _logger.log(logging.INFO if code == ExitCode.OK else logging.ERROR, "stopping: %s", reason)
        self._exit_code = code
        self._kill_due_us = monotonic_us() + self._stop_grace_us
        for child in self._children:
            child.due_us = None
            if child.pid:
                os.kill(child.pid, signal.SIGTERM)

    def _kill_all(self) -> None:
        for child in self._children:
            if child.pid:  # not yet reaped, so the number is still its own
                os.kill(child.pid, signal.SIGKILL)

    def _write_row(self, child: _Child) -> None:
        self._child_table.write(child.row, pid=child.pid, restarts=child.restart_count, started_us=child.started_us)

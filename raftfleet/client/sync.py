"""The synchronous client: :func:`connect` and :class:`Fleet`.

Each call runs in the thread that makes it, on a connection that it has for itself meanwhile; idle connections are kept
in a pool, by socket. All decisions are the core's (:mod:`raftfleet.client.core`); here is only what waits: sockets,
clocks, locks.

After a fork the child's copy of a client has an id, sessions and connections of its own: with its parent's id, its
commands would be taken for repetitions of its parent's. A hook at fork sees to it, since locks must be made anew, too.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from raftfleet import errors
from raftfleet.client import copying, core, discovery
from raftfleet.client.core import CONTROL, DONE, IN_FLIGHT, PAUSED, QUEUED, READY, Call, ClientCore, Leader
from raftfleet.core.config import GroupConfig
from raftfleet.core.names import check_group_name
from raftfleet.node import rundir
from raftfleet.wire import ipc
from raftfleet.wire.errors import WireError
from raftfleet.wire.exported import ExportedState

IDLE_CONNECTIONS_MAX = 64
"""Per socket; more are closed when they become idle."""

POLL_S_FIRST, POLL_S_MAX = 0.001, 0.02
GROUPS_AT_ONCE = 1000
"""Groups that one call to the node adds, which is also the fleet's own limit."""
"""How often the leader table is looked at by whoever waits for a leader: a look costs no I/O."""

POLL_MS_MAX = 3_600_000
"""poll(2) counts in an int; who waits for longer waits again."""

_TIMEVAL = struct.Struct("ll")


def connect(run_dir: str | os.PathLike[str] | None = None) -> Fleet:
    """A client of the fleet, by way of this machine's node.

    Args:
        run_dir: the node's run directory. None: ``$RAFTFLEET_RUN_DIR``, else that of the only node that runs on this
            machine at a default place (``$XDG_RUNTIME_DIR/raftfleet/NAME`` or ``/run/raftfleet/NAME``), or, of
            several, of the one named ``$RAFTFLEET_NAME``.

    Raises:
        NodeNotRunning: there is no node; or there are several, and the message lists them.
        NodeError: there is one, but this user may not use it.
    """
    return Fleet(discovery.find_run_dir(run_dir))


class Fleet:
    """A fleet, seen from one of its nodes. Made by :func:`raftfleet.connect`.

    Safe to share between threads, and to use after ``fork`` in parent and child. The node may restart meanwhile: calls
    wait for it as long as their retries allow, and commands are still applied exactly once.

    A context manager: leaving it closes the client.

    Attributes:
        run_dir: the node's run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._is_closed = False
        self._begin()
        _clients.add(self)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<raftfleet.Fleet via {self.run_dir}{' (closed)' if self._is_closed else ''}>"

    def close(self) -> None:
        """Close the connections. Calls of other threads that are under way end first, by themselves.

        Every later call raises RuntimeError; a second ``close`` does nothing.
        """
        self._is_closed = True
        self._pool.close()
        self._table.close()

    # ---------------------------------------------------------------- nodes

    def activate(self, zone: str, *, timeout: float = 30.0) -> None:
        """Let this node take part in the fleet and host members of groups.

        Args:
            zone: its failure domain: members of a group are spread over zones.
            timeout: seconds until the node must be active.
        """
        self.call("activate", {"zone": zone}, timeout)

    def deactivate(self, wait: bool = False, *, timeout: float | None = None) -> None:
        """Take this node out of the fleet: its members move to other nodes.

        Args:
            wait: return only when no member is left here, so that the node can be stopped without loss.
            timeout: seconds; None means 5, or 300 with ``wait``.
        """
        seconds = (300.0 if wait else 5.0) if timeout is None else timeout
        self.call("deactivate", {"wait": bool(wait)}, seconds)

    def active_nodes(self, *, timeout: float = 5.0) -> dict[str, list[str]]:
        """The active nodes' names by zone."""
        answer: dict[str, list[str]] = self.call("active_nodes", {}, timeout)
        return answer

    def unreachable_nodes(self, *, timeout: float = 5.0) -> dict[str, float]:
        """Nodes of the fleet that this node cannot reach, and since when (seconds since 1970)."""
        answer: dict[str, float] = self.call("unreachable_nodes", {}, timeout)
        return answer

    def remove_dead_node(self, node: str, *, timeout: float = 60.0) -> dict[str, Any]:
        """Declare ``node`` gone for good: its members are replaced, even where a majority was lost.

        This is the operator's word, and nothing checks it: a node that still runs is shut out and must be restarted.

        Returns:
            ``recovered`` and ``waiting``, lists of names of groups that had lost their majority, and a ``message``.
        """
        answer: dict[str, Any] = self.call("remove_dead_node", {"node": node}, timeout)
        return answer

    # ---------------------------------------------------------------- groups

    def add_consensus_group(
        self,
        name: str,
        replicas: int = 3,
        config: GroupConfig | None = None,
        *,
        restore: ExportedState | None = None,
        timeout: float = 5.0,
    ) -> None:
        """Add a group and return when it has a leader.

        Args:
            name: 1 to 255 bytes of UTF-8.
            replicas: members to keep, on as many nodes (fewer while the fleet has fewer).
            config: how the group behaves, and its state machine. Required, unless ``restore`` knows it.
            restore: the state to begin with (:meth:`export_group`; a file's bytes through ``ExportedState.unpack``).
                Nobody is served before all of it is there. If this is cut short, the group waits: the same call again
                goes on, ``remove_consensus_group`` gives up.
            timeout: seconds until the group must serve; with ``restore``, for each step towards it.

        Raises:
            AlreadyAdded: there is a group of that name.
            NoActiveNode: no node could host a member.
            StateMachineNotImportable: on the node that the error names.
            NoLeader: the group was added and had no leader yet when the time was over.
            OutcomeUnknown: no answer came; ``consensus_groups`` tells.
            CommandFailed: the machine's ``load`` raised on the state to begin with; the group waits for another try.
        """
        args = group_arguments(name, replicas, config, restore)
        if restore is None:
            uid = self.call("add_group", args, timeout)["uid"]
        else:
            uid = self._take(copying.begin_steps(args, timeout))
        deadline_s = time.monotonic() + timeout
        pause_s = POLL_S_FIRST
        while not core.serves(self._table.lookup(name), uid):
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                raise errors.NoLeader(f"group {name!r} was added, but has no leader after {timeout:g} s")
            time.sleep(min(pause_s, remaining_s))
            pause_s = min(pause_s * 2, POLL_S_MAX)
        if restore is not None:
            self._take(copying.piece_steps(name, uid, restore.state, timeout))

    def export_group(self, name: str, *, consistency: str = "linearizable", timeout: float = 30.0) -> ExportedState:
        """Copy a group's state, to keep it or to begin another group with it.

        Args:
            name: of the group.
            consistency: ``"linearizable"``: the copy contains every command that ended before this call began.
                ``"stale"``: any member gives what it has, even without a leader.
            timeout: seconds for each step: until the state is dumped, and for each piece of it.

        Raises:
            GroupNotFound: there is none of that name.
            NoLeader, Overloaded, Unanswered: try again.
            QueryFailed: the machine's ``dump`` raised.
        """
        exported: ExportedState = self._take(copying.export_steps(name, consistency, timeout))
        return exported

    def _take(self, steps: copying.Steps) -> Any:
        """Carry steps out, one after the other."""
        try:
            method, args, seconds = next(steps)
            while True:
                if method == copying.PAUSE:
                    time.sleep(seconds)
                    method, args, seconds = next(steps)
                    continue
                try:
                    answer = self.call(method, args, seconds)
                except errors.RaftFleetError as error:
                    method, args, seconds = steps.throw(error)
                else:
                    method, args, seconds = steps.send(answer)
        except StopIteration as end:
            return end.value

    def add_consensus_groups(
        self, names: Iterable[str], replicas: int = 3, config: GroupConfig | None = None, *, timeout: float = 60.0
    ) -> None:
        """Add many groups of one kind and return when each has a leader: a thousand take about a second.

        They are added a thousand at a time, and each thousand as a whole or not at all: when this raises, those before
        it are there, and ``consensus_groups`` tells which.

        Args:
            names: all different.
            replicas, config: of each of them, as for :meth:`add_consensus_group`.
            timeout: seconds until all must serve.

        Raises:
            AlreadyAdded: there is a group of one of the names.
            NoLeader: the groups were added and one that is named had no leader yet when the time was over.
            NoActiveNode, StateMachineNotImportable, OutcomeUnknown: as :meth:`add_consensus_group`.
        """
        deadline_s = time.monotonic() + timeout
        for args in groups_arguments(names, replicas, config):
            uids = self.call("add_groups", args, max(0.1, deadline_s - time.monotonic()))["uids"]
            waiting = list(zip(args["names"], uids, strict=True))
            while waiting := core.without_leader(self._table.lookup, waiting):
                if time.monotonic() >= deadline_s:
                    raise errors.NoLeader(unled_text(waiting, timeout))
                time.sleep(POLL_S_MAX)

    def remove_consensus_group(self, name: str, *, timeout: float = 5.0) -> None:
        """Remove a group and its state from all nodes. The name can be used again at once.

        Raises:
            GroupNotFound: there is none of that name.
        """
        self.call("remove_group", {"name": check_group_name(name)}, timeout)

    def change_config(self, name: str, config: GroupConfig, *, timeout: float = 5.0) -> None:
        """Give a group another config.

        Raises:
            GroupNotFound: there is none of that name.
            StateMachineNotImportable: on the node that the error names.
        """
        self.call("change_config", config_arguments(name, config), timeout)

    def consensus_groups(self, *, timeout: float = 5.0) -> dict[str, int]:
        """All groups' names and numbers of replicas wanted."""
        answer: dict[str, int] = self.call("groups", {}, timeout)
        return answer

    def command(self, name: str, arg: Any, *, timeout: float = 0.5, retry: int = 3, retry_interval: float = 1.0) -> Any:
        """Send a command to a group and return its result. It is applied exactly once, or the error says otherwise.

        Args:
            name: of the group.
            arg: what the state machine's ``command`` gets; anything msgpack carries (a tuple arrives as a list).
            timeout: seconds for one attempt.
            retry: how many attempts may follow the first.
            retry_interval: seconds between attempts.

        Raises:
            CommandFailed: the state machine raised; its state is what it was.
            NotApplied: it did not happen and will not: GroupNotFound, NoLeader, Overloaded, CommandTooLarge, ...
            OutcomeUnknown: it may have been applied, once.
            TypeError, ValueError: an argument is of no use; nothing was sent.
        """
        shared = self._shared()
        with shared.lock:
            call = shared.core.command(name, arg, timeout, retry, retry_interval)
            shared.core.start(call, _now_us())
        return self._run(shared, call)

    def query(
        self,
        name: str,
        arg: Any,
        *,
        consistency: str = "linearizable",
        timeout: float = 0.5,
        retry: int = 3,
        retry_interval: float = 1.0,
    ) -> Any:
        """Ask a group and return the answer; nothing changes.

        Args:
            name: of the group.
            arg: what the state machine's ``query`` gets.
            consistency: ``"linearizable"``: the answer reflects every command that ended before this call began.
                ``"stale"``: any member answers, even without a leader, and the answer may be old.
            timeout: seconds for one attempt.
            retry: how many attempts may follow the first.
            retry_interval: seconds between attempts.

        Raises:
            QueryFailed: the state machine raised.
            NotApplied: no answer: GroupNotFound, NoLeader, Unanswered, Overloaded, ...
            TypeError, ValueError: an argument is of no use; nothing was sent.
        """
        shared = self._shared()
        with shared.lock:
            call = shared.core.query(name, arg, consistency, timeout, retry, retry_interval)
            shared.core.start(call, _now_us())
        return self._run(shared, call)

    def whereis_leader(self, name: str) -> Leader | None:
        """Who leads a group, or None if nobody does, or there is no such group.

        From the leader table in shared memory, without I/O, where that knows the group; else the node is asked.

        Raises:
            ValueError: no group can have that name. So in every call that takes one.
        """
        self._shared()
        slot = self._table.lookup(check_group_name(name))
        if slot is not None:
            return core.leader_of(slot)
        with contextlib.suppress(errors.RaftFleetError):
            return core.leader_in(self.call("group_status", {"name": name}, 1.0))
        return None

    def status(self, name: str, *, timeout: float = 5.0) -> dict[str, Any]:
        """What is known of a group.

        Returns:
            ``name``, ``uid``, ``leader`` (node or None), ``term``, ``commit``, ``applied``, ``last_index``, ``state``
            and ``members``, a list of dicts with ``node``, ``instance``, ``role``, ``match``, ``unresponsive`` and
            ``diverged`` (its state differs from what a quorum agrees on, as of the check at ``checked_index``).

        Raises:
            GroupNotFound: there is none of that name.
        """
        answer: dict[str, Any] = self.call("group_status", {"name": check_group_name(name)}, timeout)
        return answer

    def replace_leader(self, name: str, node: str, *, timeout: float = 5.0) -> None:
        """Make the member on ``node`` the leader of a group.

        Raises:
            Refused: it is not a voter that has caught up, or the transfer did not come off in time.
            GroupNotFound: there is no group of that name.
        """
        self.call("replace_leader", {"name": check_group_name(name), "node": node}, timeout)

    def leaderless_groups(self, *, timeout: float = 10.0) -> dict[str, dict[str, Any]]:
        """All groups without a leader, with what each reachable member says: ``{name: {node: {...}}}``."""
        answer: dict[str, dict[str, Any]] = self.call("leaderless_groups", {}, timeout)
        return answer

    # ---------------------------------------------------------------- anything

    def call(self, method: str, args: dict[str, Any] | None = None, timeout: float = 5.0) -> Any:
        """Call a method of the node's manager by name, and return its answer. The calls above go this way.

        Args:
            method: as in ``"status"``.
            args: its arguments by name.
            timeout: seconds for all attempts together. A method that changes something is tried again only if it
                certainly was not carried out.
        """
        shared = self._shared()
        call = shared.core.control(method, args or {}, timeout)
        shared.core.start(call, _now_us())
        return self._run(shared, call)

    # ---------------------------------------------------------------- driving a call

    def _begin(self) -> None:
        self._table = discovery.open_table(self.run_dir)
        self._pool = _Shared()

    def _after_fork(self) -> None:
        """In the child: nothing of the parent's is used again. Its sockets are closed here, which it does not see."""
        self._pool.close_all()
        self._pool = _Shared()

    def _shared(self) -> _Shared:
        if self._is_closed:
            raise RuntimeError("this client is closed")
        return self._pool

    def _run(self, shared: _Shared, call: Call) -> Any:
        connection: _Connection | None = None
        try:
            while call.state != DONE:
                if call.state == READY:
                    connection = self._attempt(shared, call, connection)
                elif call.state == PAUSED:
                    time.sleep(max(0, call.deadline_us - _now_us()) / 1e6)
                    self._tell(shared, call, "on_deadline")
                else:
                    self._await_turn(shared, call)
            error = call.error
            if error is None:
                return call.result
            try:
                raise error
            finally:
                del error, call.error  # the traceback holds this frame, the frame the error: no cycles left to the GC
        except BaseException:
            if call.state != DONE:  # interrupted: a reply may be under way, and half a request may have been written
                self._tell(shared, call, "abandon", "interrupted")
                if connection is not None:
                    shared.discard(connection)
                    connection = None
            raise
        finally:
            if connection is not None:
                shared.give_back(connection)

    def _attempt(self, shared: _Shared, call: Call, connection: _Connection | None) -> _Connection | None:
        """Send and await the answer; return the connection if it can still be used."""
        connection = connection if connection is not None and not connection.is_broken else None
        where = shared.core.where(call, self._table.workers)
        if connection is not None and connection.where != where:
            shared.give_back(connection)
            connection = None
        while True:
            connection = connection or shared.idle(where)
            is_fresh = connection is None
            if connection is None:
                try:
                    connection = self._connect(shared, call, where)
                except (OSError, errors.NodeError) as error:
                    self._tell(shared, call, "on_refused", reason_of(error, self.run_dir))
                    return None
                if connection is None:  # workers changed: another socket
                    return None
            slot = self._table.lookup(call.name) if not call.is_control else None
            with shared.lock:
                request = call.attempt(next(shared.request_ids), slot.uid if slot else 0, _now_us(), _wall_us())
            try:
                connection.send(ipc.pack_frame([request]), call.deadline_us)
                break
            except OSError as error:
                shared.discard(connection)
                connection = None
                if is_fresh:
                    self._tell(shared, call, "on_refused", reason_of(error, self.run_dir))
                    return None
                call.on_unsent()  # it was idle while the node restarted: another one may be alive
        try:
            while call.state == IN_FLIGHT:
                replies = connection.receive(call.deadline_us)
                if replies is None:
                    self._tell(shared, call, "on_deadline")
                    continue
                for request_id, code, body in replies:
                    if request_id == call.request_id or connection.is_of(call, request_id):
                        self._tell(shared, call, "on_reply", request_id, code, body)
        except (OSError, WireError):
            shared.discard(connection)
            self._tell(shared, call, "on_lost")
            return None
        connection.remember(call)
        return connection

    def _connect(self, shared: _Shared, call: Call, where: int) -> _Connection | None:
        """A new connection, or None if the node turns out to have another number of workers now."""
        self._table.refresh()
        if shared.core.where(call, self._table.workers) != where:
            return None
        return shared.connect(self.run_dir, where, call.deadline_us)

    def _await_turn(self, shared: _Shared, call: Call) -> None:
        with shared.turn:
            while call.state == QUEUED:
                remaining_us = call.deadline_us - _now_us()
                if remaining_us <= 0:
                    call.on_deadline(_now_us())
                else:
                    shared.turn.wait(remaining_us / 1e6)

    def _tell(self, shared: _Shared, call: Call, event: str, *args: Any) -> None:
        """Report an event to the call; if that ends it, those that waited for room have their turn."""
        with shared.lock:
            if event == "abandon":
                call.abandon(*args)
            else:
                getattr(call, event)(*args, _now_us())
            if call.state == DONE and shared.core.turn(call, _now_us()):
                shared.turn.notify_all()


def group_arguments(
    name: str, replicas: int, config: GroupConfig | None, restore: ExportedState | None = None
) -> dict[str, Any]:
    """Arguments of the manager's ``add_group``.

    Raises:
        TypeError, ValueError: one is missing or of no use.
    """
    if restore is not None:
        if not isinstance(restore, ExportedState):
            raise TypeError(f"restore is a raftfleet.ExportedState, not {type(restore).__name__}")
        config = copying.restored_config(restore, config)
    arguments = config_arguments(name, config)
    if type(replicas) is not int or replicas < 1:
        raise ValueError(f"replicas is a whole number from 1, not {replicas!r}")
    return {**arguments, "replicas": replicas}


def groups_arguments(names: Iterable[str], replicas: int, config: GroupConfig | None) -> list[dict[str, Any]]:
    """Arguments of the manager's ``add_groups``, one call's for each thousand of the names.

    Raises:
        TypeError, ValueError: one is missing or of no use.
    """
    if isinstance(names, (str, bytes)):
        raise TypeError(f"names is a list of names, not one of them: {names!r:.100}")
    every = [check_group_name(name) for name in names]
    if len(set(every)) != len(every):
        raise ValueError("names must differ from each other")
    batches = [every[start : start + GROUPS_AT_ONCE] for start in range(0, len(every), GROUPS_AT_ONCE)]
    arguments = [{**group_arguments(batch[0], replicas, config), "names": batch} for batch in batches]
    for batch_arguments in arguments:
        del batch_arguments["name"]
    return arguments


def unled_text(waiting: list[tuple[str, int]], timeout: float) -> str:
    """What the caller is told of groups without a leader."""
    others = f" and {len(waiting) - 1} others" if len(waiting) > 1 else ""
    return f"group {waiting[0][0]!r}{others} was added, but has no leader after {timeout:g} s"


def config_arguments(name: str, config: GroupConfig | None) -> dict[str, Any]:
    """Arguments of the manager's ``change_config``.

    Raises:
        TypeError, ValueError: one is missing or of no use.
    """
    if not isinstance(config, GroupConfig):
        given = "" if config is None else f", not {type(config).__name__}"
        raise TypeError(f"config is required: a raftfleet.GroupConfig('module:Class'){given}")
    return {"name": check_group_name(name), "config": config.to_dict()}


def _now_us() -> int:
    return time.monotonic_ns() // 1000


def _wall_us() -> int:
    return time.time_ns() // 1000


def reason_of(error: Exception, run_dir: Path) -> str:
    """Why the node in ``run_dir`` could not be reached, and what to do about it."""
    if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
        return f"no node answers in {run_dir}: start one with `raftfleet-node start --run-dir {run_dir}`"
    if isinstance(error, PermissionError):
        return f"this user may not open the sockets in {run_dir}"
    return f"the node in {run_dir} could not be reached: {error}"


class _Connection:
    """One blocking connection to one socket of the node, used by one thread at a time."""

    def __init__(self, where: int) -> None:
        self.where = where
        self.is_broken = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._reader = ipc.FrameReader()
        self._buffer = bytearray(ipc.RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._timeout_ms = 0
        self._given_up: tuple[Call, set[int]] | None = None

    def open(self, path: Path, hello: list[Any], deadline_us: int) -> None:
        """Connect and say hello.

        Raises:
            OSError: the socket is not there, or nobody answered in time.
            ProtocolError: the node does not understand this version.
        """
        self._limit(deadline_us)
        self._socket.connect(os.fspath(path))
        self.send(ipc.pack_frame([hello]), deadline_us)
        replies: list[list[Any]] | None = []
        while replies is not None and not replies:
            replies = self.receive(deadline_us)
        if replies is None:
            raise TimeoutError("no answer to hello")
        _request_id, code, body = replies[0]
        if code != ipc.OK:
            raise errors.ProtocolError(f"the node refused this client: {ipc.error_of(code, body)}")

    def send(self, data: bytes, deadline_us: int) -> None:
        """Write all of ``data``; an OSError means that not all of it was written."""
        self._limit(deadline_us)
        sent = self._socket.send(data, socket.MSG_NOSIGNAL)
        if sent < len(data):
            view = memoryview(data)
            while sent < len(data):
                self._limit(deadline_us)
                sent += self._socket.send(view[sent:], socket.MSG_NOSIGNAL)

    def receive(self, deadline_us: int) -> list[list[Any]] | None:
        """The replies that came with the next bytes (maybe none), or None if the deadline passed first.

        Raises:
            OSError: the connection is broken.
            WireError: what came was not understood.
        """
        timeout_ms = (deadline_us - _now_us() + 999) // 1000
        if timeout_ms <= 0:
            return None
        # Not in ``recv``: who waits there is woken for nothing when the node has read what was sent, and while the
        # node has better things to do. Measured: its read of a request took 18 µs with it, and 8 without.
        if not self._poll.poll(min(timeout_ms, POLL_MS_MAX)):
            return None if deadline_us <= _now_us() else []
        count = self._socket.recv_into(self._buffer)
        if count == 0:
            raise ConnectionResetError("the node closed the connection")
        frames = self._reader.feed(self._view[:count])
        return [ipc.check_reply(item) for frame in frames for item in frame]

    def _limit(self, deadline_us: int) -> None:
        """Let no writing take longer than until the deadline, if that has not passed.

        The kernel's own time-out (in whole milliseconds, so that it seldom changes) costs nothing; Python's costs a
        ``poll`` before each call.
        """
        timeout_ms = (deadline_us - _now_us() + 999) // 1000
        if timeout_ms <= 0:
            return
        if timeout_ms != self._timeout_ms:
            self._timeout_ms = timeout_ms
            limit = _TIMEVAL.pack(timeout_ms // 1000, timeout_ms % 1000 * 1000)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def remember(self, call: Call) -> None:
        """Keep in mind which attempt of a call that will be tried again was made here: its answer may come late."""
        if call.state == DONE:
            self._given_up = None
        elif self._given_up is not None and self._given_up[0] is call:
            self._given_up[1].add(call.request_id)
        else:
            self._given_up = (call, {call.request_id})

    def is_of(self, call: Call, request_id: int) -> bool:
        """Whether that was an earlier attempt of this call on this connection."""
        return self._given_up is not None and self._given_up[0] is call and request_id in self._given_up[1]

    def close(self) -> None:
        """Close the socket."""
        self.is_broken = True
        self._socket.close()


class _Shared:
    """What the threads of one process share: core, lock, idle connections."""

    def __init__(self) -> None:
        self.core = ClientCore(secrets.token_bytes(ipc.CLIENT_ID_BYTES))
        self.lock = threading.Lock()
        self.turn = threading.Condition(self.lock)
        self.request_ids = itertools.count(1)
        self._idle: dict[int, list[_Connection]] = {}
        self._all: set[_Connection] = set()
        self._is_closed = False

    def idle(self, where: int) -> _Connection | None:
        try:
            return self._idle[where].pop()  # the last used: those that are not needed age at the bottom
        except (KeyError, IndexError):
            return None

    def connect(self, run_dir: Path, where: int, deadline_us: int) -> _Connection:
        path = rundir.control_socket(run_dir) if where == CONTROL else rundir.shard_socket(run_dir, where)
        connection = _Connection(where)
        try:
            connection.open(path, self.core.hello(), deadline_us)
        except BaseException:
            connection.close()
            raise
        with self.lock:
            self._all.add(connection)
        return connection

    def give_back(self, connection: _Connection) -> None:
        if connection.is_broken:
            return
        with self.lock:
            idle = self._idle.setdefault(connection.where, [])
            if not self._is_closed and len(idle) < IDLE_CONNECTIONS_MAX:
                idle.append(connection)
                return
        self.discard(connection)

    def discard(self, connection: _Connection) -> None:
        connection.close()
        with self.lock:
            self._all.discard(connection)

    def close(self) -> None:
        """Close what is idle now and, when it is given back, what is in use."""
        with self.lock:
            self._is_closed = True
            connections = [connection for idle in self._idle.values() for connection in idle]
            self._idle = {}
        for connection in connections:
            self.discard(connection)

    def close_all(self) -> None:
        """In a forked child, where nobody holds the lock or a connection any more: close this process's descriptors."""
        for connection in self._all:
            connection.close()


_clients: weakref.WeakSet[Fleet] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for client in list(_clients):
        client._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)

"""The asyncio client, as ``raftfleet.aio``: the same calls as :class:`raftfleet.Fleet`, awaitable.

::

    async with raftfleet.aio.connect() as fleet:
        results = await asyncio.gather(*(fleet.command("counter", "inc") for _ in range(1000)))

One connection per socket of the node carries all calls. What the tasks of one turn of the loop ask for goes out in one
write, so many calls in flight cost far less each than one at a time. All decisions are the core's
(:mod:`raftfleet.client.core`); here is only what waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import threading
import time
from collections.abc import Generator, Iterable
from types import TracebackType
from typing import Any

from raftfleet import errors
from raftfleet.client import copying, core, discovery
from raftfleet.client.core import (
    CONTROL,
    DONE,
    HOLD_US_MAX,
    IN_FLIGHT,
    READY,
    RUNS_UNHELD_MAX,
    Call,
    ClientCore,
    Leader,
    attempt_run,
    run_results,
    runs,
)
from raftfleet.client.sync import (
    POLL_S_FIRST,
    POLL_S_MAX,
    config_arguments,
    group_arguments,
    groups_arguments,
    reason_of,
    unled_text,
)
from raftfleet.core.config import GroupConfig
from raftfleet.core.names import check_group_name
from raftfleet.node import rundir
from raftfleet.wire import ipc
from raftfleet.wire.errors import WireError
from raftfleet.wire.exported import ExportedState

__all__ = ["Fleet", "connect"]

FRAME_BYTES = 1 << 20
"""A frame takes requests until it has about this size (and then one more); a control call has one of its own."""

TIMER_US = 10_000
"""Deadlines are kept to within this: the timer looks at all calls at once, and no oftener."""

_NO_TIMER_US = 1 << 62
_NAMES_MAX = 1 << 17

# Called once or twice for each call: without the way through their modules.
_monotonic_ns, _thread_id = time.monotonic_ns, threading.get_ident

_fork_count = 0


def _count_fork() -> None:
    global _fork_count
    _fork_count += 1


# Asking for the process's id, and for the running loop, which asks for it too, took a tenth of a call's time.
os.register_at_fork(after_in_child=_count_fork)


def connect(run_dir: str | os.PathLike[str] | None = None) -> Fleet:
    """A client of the fleet, by way of this machine's node: for ``async with``, or to be awaited.

    Args:
        run_dir: the node's run directory; None: see :func:`raftfleet.connect`, which also says what is raised (here on
            entering, or awaiting).
    """
    return Fleet(run_dir)


class Fleet:
    """A fleet, seen from one of its nodes. Made by :func:`connect`; belongs to the event loop in which it was entered.

    A call that is cancelled is given up at once; its command may still be applied, once. The node may restart while
    calls are in flight: they wait for it as long as their retries allow.

    Attributes:
        run_dir: the node's run directory (after entering).
    """

    def __init__(self, run_dir: str | os.PathLike[str] | None = None) -> None:
        self._wanted_run_dir = run_dir
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False

    async def __aenter__(self) -> Fleet:
        if self._loop is not None:
            raise RuntimeError("this client was entered already")
        self._loop = asyncio.get_running_loop()
        self._thread_id = _thread_id()
        self._fork_count = _fork_count
        self.run_dir = discovery.find_run_dir(self._wanted_run_dir)
        self._table = discovery.open_table(self.run_dir)
        self._core = ClientCore(secrets.token_bytes(ipc.CLIENT_ID_BYTES))
        self._next_request_id = 1
        self._links: dict[int, _Link] = {}
        self._links_by_name: dict[str, _Link] = {}  # what _link_for found, while that link lasts
        self._calls: set[Call] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_us = _NO_TIMER_US
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __await__(self) -> Generator[Any, None, Fleet]:
        return self.__aenter__().__await__()

    def __repr__(self) -> str:
        return f"<raftfleet.aio.Fleet via {getattr(self, 'run_dir', self._wanted_run_dir)}>"

    async def close(self) -> None:
        """Give up the calls under way, as if they were cancelled with an error, and close the connections.

        Every later call raises RuntimeError; a second ``close`` does nothing.
        """
        if self._is_closed or self._loop is None:
            self._is_closed = True
            return
        self._is_closed = True
        for call in list(self._calls):
            call.abandon("the client was closed")
            self._advance(call)
        if self._timer is not None:
            self._timer.cancel()
        links, self._links = list(self._links.values()), {}
        for link in links:
            await link.close()
        self._table.close()

    # ---------------------------------------------------------------- nodes

    async def activate(self, zone: str, *, timeout: float = 30.0) -> None:
        """Let this node take part in the fleet. As :meth:`raftfleet.Fleet.activate`."""
        await self.call("activate", {"zone": zone}, timeout)

    async def deactivate(self, wait: bool = False, *, timeout: float | None = None) -> None:
        """Take this node out of the fleet. As :meth:`raftfleet.Fleet.deactivate`."""
        seconds = (300.0 if wait else 5.0) if timeout is None else timeout
        await self.call("deactivate", {"wait": bool(wait)}, seconds)

    async def active_nodes(self, *, timeout: float = 5.0) -> dict[str, list[str]]:
        """The active nodes' names by zone."""
        answer: dict[str, list[str]] = await self.call("active_nodes", {}, timeout)
        return answer

    async def unreachable_nodes(self, *, timeout: float = 5.0) -> dict[str, float]:
        """Nodes of the fleet that this node cannot reach, and since when (seconds since 1970)."""
        answer: dict[str, float] = await self.call("unreachable_nodes", {}, timeout)
        return answer

    async def remove_dead_node(self, node: str, *, timeout: float = 60.0) -> dict[str, Any]:
        """Declare ``node`` gone for good. As :meth:`raftfleet.Fleet.remove_dead_node`."""
        answer: dict[str, Any] = await self.call("remove_dead_node", {"node": node}, timeout)
        return answer

    # ---------------------------------------------------------------- groups

    async def add_consensus_group(
        self,
        name: str,
        replicas: int = 3,
        config: GroupConfig | None = None,
        *,
        restore: ExportedState | None = None,
        timeout: float = 5.0,
    ) -> None:
        """Add a group and return when it has a leader. As :meth:`raftfleet.Fleet.add_consensus_group`."""
        args = group_arguments(name, replicas, config, restore)
        if restore is None:
            uid = (await self.call("add_group", args, timeout))["uid"]
        else:
            uid = await self._take(copying.begin_steps(args, timeout))
        deadline_s = time.monotonic() + timeout
        pause_s = POLL_S_FIRST
        while not core.serves(self._table.lookup(name), uid):
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                raise errors.NoLeader(f"group {name!r} was added, but has no leader after {timeout:g} s")
            await asyncio.sleep(min(pause_s, remaining_s))
            pause_s = min(pause_s * 2, POLL_S_MAX)
        if restore is not None:
            await self._take(copying.piece_steps(name, uid, restore.state, timeout))

    async def export_group(
        self, name: str, *, consistency: str = "linearizable", timeout: float = 30.0
    ) -> ExportedState:
        """Copy a group's state. As :meth:`raftfleet.Fleet.export_group`."""
        exported: ExportedState = await self._take(copying.export_steps(name, consistency, timeout))
        return exported

    async def _take(self, steps: copying.Steps) -> Any:
        """Carry steps out, one after the other."""
        try:
            method, args, seconds = next(steps)
            while True:
                if method == copying.PAUSE:
                    await asyncio.sleep(seconds)
                    method, args, seconds = next(steps)
                    continue
                try:
                    answer = await self.call(method, args, seconds)
                except errors.RaftFleetError as error:
                    method, args, seconds = steps.throw(error)
                else:
                    method, args, seconds = steps.send(answer)
        except StopIteration as end:
            return end.value

    async def add_consensus_groups(
        self, names: Iterable[str], replicas: int = 3, config: GroupConfig | None = None, *, timeout: float = 60.0
    ) -> None:
        """Add many groups and return when each has a leader. As :meth:`raftfleet.Fleet.add_consensus_groups`."""
        deadline_s = time.monotonic() + timeout
        for args in groups_arguments(names, replicas, config):
            uids = (await self.call("add_groups", args, max(0.1, deadline_s - time.monotonic())))["uids"]
            waiting = list(zip(args["names"], uids, strict=True))
            while waiting := core.without_leader(self._table.lookup, waiting):
                if time.monotonic() >= deadline_s:
                    raise errors.NoLeader(unled_text(waiting, timeout))
                await asyncio.sleep(POLL_S_MAX)

    async def remove_consensus_group(self, name: str, *, timeout: float = 5.0) -> None:
        """Remove a group and its state. As :meth:`raftfleet.Fleet.remove_consensus_group`."""
        await self.call("remove_group", {"name": check_group_name(name)}, timeout)

    async def change_config(self, name: str, config: GroupConfig, *, timeout: float = 5.0) -> None:
        """Give a group another config. As :meth:`raftfleet.Fleet.change_config`."""
        await self.call("change_config", config_arguments(name, config), timeout)

    async def consensus_groups(self, *, timeout: float = 5.0) -> dict[str, int]:
        """All groups' names and numbers of replicas wanted."""
        answer: dict[str, int] = await self.call("groups", {}, timeout)
        return answer

    async def command(
        self, name: str, arg: Any, *, timeout: float = 0.5, retry: int = 3, retry_interval: float = 1.0
    ) -> Any:
        """Send a command to a group and return its result. As :meth:`raftfleet.Fleet.command`.

        Up to 1024 commands of this client to one group are under way at a time; more wait for their turn here. Commands
        to one group that are in flight together are applied in any order.
        """
        loop = self._entered()
        call = self._core.command(name, arg, timeout, retry, retry_interval)
        try:
            return await self._begin(call, loop)
        except asyncio.CancelledError:
            self._give_up(call)
            raise

    async def query(
        self,
        name: str,
        arg: Any,
        *,
        consistency: str = "linearizable",
        timeout: float = 0.5,
        retry: int = 3,
        retry_interval: float = 1.0,
    ) -> Any:
        """Ask a group and return the answer; nothing changes. As :meth:`raftfleet.Fleet.query`."""
        loop = self._entered()
        call = self._core.query(name, arg, consistency, timeout, retry, retry_interval)
        try:
            return await self._begin(call, loop)
        except asyncio.CancelledError:
            self._give_up(call)
            raise

    async def whereis_leader(self, name: str) -> Leader | None:
        """Who leads a group, or None. As :meth:`raftfleet.Fleet.whereis_leader`."""
        self._entered()
        slot = self._table.lookup(check_group_name(name))
        if slot is not None:
            return core.leader_of(slot)
        with contextlib.suppress(errors.RaftFleetError):
            return core.leader_in(await self.call("group_status", {"name": name}, 1.0))
        return None

    async def status(self, name: str, *, timeout: float = 5.0) -> dict[str, Any]:
        """What is known of a group. As :meth:`raftfleet.Fleet.status`."""
        answer: dict[str, Any] = await self.call("group_status", {"name": check_group_name(name)}, timeout)
        return answer

    async def replace_leader(self, name: str, node: str, *, timeout: float = 5.0) -> None:
        """Make the member on ``node`` the leader of a group. As :meth:`raftfleet.Fleet.replace_leader`."""
        await self.call("replace_leader", {"name": check_group_name(name), "node": node}, timeout)

    async def leaderless_groups(self, *, timeout: float = 10.0) -> dict[str, dict[str, Any]]:
        """All groups without a leader, with what each reachable member says: ``{name: {node: {...}}}``."""
        answer: dict[str, dict[str, Any]] = await self.call("leaderless_groups", {}, timeout)
        return answer

    # ---------------------------------------------------------------- anything

    async def call(self, method: str, args: dict[str, Any] | None = None, timeout: float = 5.0) -> Any:
        """Call a method of the node's manager by name. As :meth:`raftfleet.Fleet.call`."""
        loop = self._entered()
        call = self._core.control(method, args or {}, timeout)
        try:
            return await self._begin(call, loop)
        except asyncio.CancelledError:
            self._give_up(call)
            raise

    # ---------------------------------------------------------------- driving calls

    def _entered(self) -> asyncio.AbstractEventLoop:
        loop = self._loop
        if loop is None or self._thread_id != _thread_id() or not loop.is_running():
            raise RuntimeError("use this client in an `async with` block of this event loop")
        if self._is_closed:
            raise RuntimeError("this client is closed")
        if self._fork_count != _fork_count:
            raise RuntimeError("an asyncio client cannot be used after a fork: connect again in the child")
        return loop

    def _begin(self, call: Call, loop: asyncio.AbstractEventLoop) -> asyncio.Future[Any]:
        """Start a call; what is returned is awaited by the caller's own coroutine, for each one more costs time."""
        future = call.waiter = loop.create_future()
        self._calls.add(call)
        self._core.start(call, _now_us())
        if call.state == READY:
            link = self._links_by_name.get(call.name)
            (self._link_for(call) if link is None or call.kin is None else link).enqueue(call)
        if call.deadline_us < self._timer_us:
            self._set_timer(call.deadline_us)
        return future

    def _give_up(self, call: Call) -> None:
        if call.state != DONE:
            call.abandon("cancelled")
            self._advance(call)

    def _advance(self, call: Call) -> None:
        """Do what the state of ``call``, which has just changed, asks for."""
        if call.state == DONE:
            self._calls.discard(call)
            future = call.waiter
            if not future.done():
                if call.error is None:
                    future.set_result(call.result)
                else:
                    future.set_exception(call.error)
            for admitted in self._core.turn(call, _now_us()):
                self._advance(admitted)
            return
        if call.state == READY:
            self._link_for(call).enqueue(call)
        if call.deadline_us < self._timer_us:
            self._set_timer(call.deadline_us)

    def _set_timer(self, deadline_us: int) -> None:
        assert self._loop is not None
        if self._timer is not None:
            self._timer.cancel()
        self._timer_us = deadline_us
        self._timer = self._loop.call_later(max(0, deadline_us - _now_us()) / 1e6, self._on_timer)

    def _on_timer(self) -> None:
        """Look after all calls, and come back at the next deadline.

        Most calls end long before theirs. So there is no list of deadlines, in which each would have to be entered and
        would be kept until then, but one look at all that are under way, seldom.
        """
        self._timer, self._timer_us = None, _NO_TIMER_US
        now_us = _now_us()
        for call in [call for call in self._calls if call.deadline_us <= now_us]:
            if call.state != DONE and call.deadline_us <= now_us:
                call.on_deadline(now_us)
                self._advance(call)
        if self._calls:
            next_us = max(min(call.deadline_us for call in self._calls), now_us + TIMER_US)
            if next_us < self._timer_us:
                self._set_timer(next_us)

    def _link_for(self, call: Call) -> _Link:
        where = self._core.where(call, self._table.workers)
        link = self._links.get(where)
        if link is None:
            if self._table.refresh():
                where = self._core.where(call, self._table.workers)
            link = self._links.get(where)
        if link is None:
            link = self._links[where] = _Link(self, where)
        if not call.is_control:
            if len(self._links_by_name) >= _NAMES_MAX:
                self._links_by_name.clear()
            self._links_by_name[call.name] = link
        return link

    def _drop(self, link: _Link) -> None:
        self._links_by_name.clear()
        if self._links.get(link.where) is link:
            del self._links[link.where]


def _now_us() -> int:
    return _monotonic_ns() // 1000


class _Link(asyncio.BufferedProtocol):
    """The connection to one socket of the node, from the wish to connect until it breaks; then there is a new one."""

    def __init__(self, fleet: Fleet, where: int) -> None:
        assert fleet._loop is not None
        self.where = where
        self._fleet = fleet
        self._loop = fleet._loop
        self._outbox: list[Call] = []
        self._in_flight: dict[int, list[Call]] = {}  # by the id of the first of each run
        self._held: dict[Any, list[Call]] = {}  # kin of a run under way -> calls that leave when it has come back
        self._is_hold_timed = False
        self._transport: asyncio.Transport | None = None
        self._is_ready = False
        self._is_paused = False
        self._is_over = False
        self._is_flush_scheduled = False
        self._reader = ipc.FrameReader()
        self._buffer = bytearray(ipc.RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._closed = self._loop.create_future()
        self._opening = self._loop.create_task(self._open())

    def enqueue(self, call: Call) -> None:
        """Send ``call`` with what else there is when the loop comes round, or when its kin have come back (rule 7)."""
        held = self._held.get(call.kin)
        if held is not None and (held or len(self._in_flight) > RUNS_UNHELD_MAX) and call.is_patient:
            held.append(call)
            if not self._is_hold_timed:
                self._is_hold_timed = True
                self._loop.call_later(HOLD_US_MAX / 1e6, self._release_all)
            return
        self._outbox.append(call)
        if not self._is_flush_scheduled and self._is_ready:
            self._is_flush_scheduled = True
            self._loop.call_soon(self._flush)

    async def close(self) -> None:
        """Close and wait until the socket is closed."""
        if self._transport is not None:
            self._transport.abort()
            await self._closed
        if not self._opening.done():
            self._opening.cancel()
        await asyncio.wait([self._opening])

    async def _open(self) -> None:
        run_dir, where = self._fleet.run_dir, self.where
        path = rundir.control_socket(run_dir) if where == CONTROL else rundir.shard_socket(run_dir, where)
        try:
            await self._loop.create_unix_connection(lambda: self, os.fspath(path))
        except (OSError, ValueError) as error:
            self._end(reason_of(error, run_dir))

    # ---------------------------------------------------------------- called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello; requests follow when it was answered."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(ipc.pack_frame([self._fleet._core.hello()]))

    def connection_lost(self, error: Exception | None) -> None:
        """What was sent and not answered has an unknown outcome; what was not sent can be sent again."""
        if not self._closed.done():
            self._closed.set_result(None)
        self._end("the connection to the node broke before the request was sent")

    def get_buffer(self, size_hint: int) -> memoryview:
        """Where the loop puts what it reads."""
        return self._view

    def buffer_updated(self, byte_count: int) -> None:
        """Hand out the replies in what has been read."""
        try:
            for frame in self._reader.feed(self._view[:byte_count]):
                if self._is_ready:
                    self._take(frame)
                else:
                    self._greet(frame)
        except WireError as error:
            self._break_off(str(error))

    def pause_writing(self) -> None:
        """The node does not keep up: requests wait here, where their deadlines are looked after."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """The node reads again."""
        self._is_paused = False
        self._flush()

    # ---------------------------------------------------------------- frames

    def _greet(self, frame: list[Any]) -> None:
        for item in frame:
            _request_id, code, body = ipc.check_reply(item)
            if code != ipc.OK:
                self._break_off(f"the node refused this client: {ipc.error_of(code, body)}")
                return
            self._is_ready = True
        self._flush()

    def _take(self, frame: list[Any]) -> None:
        in_flight, now_us = self._in_flight, _now_us()
        for item in frame:
            request_id, code, body = ipc.check_reply(item)
            run = in_flight.pop(request_id, None)
            if run is None:
                continue
            held = self._held.pop(run[0].kin, None)
            if held:
                self._release(held)
            if code != ipc.OK or len(run) == 1:
                for number, call in enumerate(run, request_id):
                    self._tell(call, number, code, body, now_us)
                continue
            offset, left, results = run_results(body, len(run))
            if left:
                in_flight[request_id] = run  # more of it will come
            self._take_results(run[offset : offset + len(results)], request_id + offset, results, now_us)

    def _take_results(self, calls: list[Call], first_id: int, results: list[Any], now_us: int) -> None:
        open_calls = self._fleet._calls
        for number, (call, result) in enumerate(zip(calls, results, strict=True), first_id):
            if type(result) is bytes and call.state == IN_FLIGHT and call.request_id == number:
                call.on_result(result)
                open_calls.discard(call)
                future = call.waiter
                if not future.done():
                    if call.error is None:
                        future.set_result(call.result)
                    else:
                        future.set_exception(call.error)
            elif type(result) is bytes:
                self._tell(call, number, ipc.OK, result, now_us)
            elif type(result) is list and len(result) == 2 and type(result[0]) is int:
                self._tell(call, number, result[0], result[1], now_us)
            else:
                raise WireError("reply", "a run's result is bytes or [code, body]")
        for admitted in self._fleet._core.turn(calls[-1], now_us) if calls else ():
            self._fleet._advance(admitted)

    def _tell(self, call: Call, request_id: int, code: int, body: Any, now_us: int) -> None:
        if call.state != DONE:
            before = call.state, call.deadline_us
            call.on_reply(request_id, code, body, now_us)
            if (call.state, call.deadline_us) != before:
                self._fleet._advance(call)

    def _flush(self) -> None:
        """Write what waits: one frame, unless it would be very large."""
        self._is_flush_scheduled = False
        if self._must_wait() or self._is_over:
            return
        assert self._transport is not None
        fleet, in_flight = self._fleet, self._in_flight
        waiting, self._outbox = runs(self._outbox), []
        lookup = fleet._table.lookup
        now_us, wall_us = _now_us(), time.time_ns() // 1000
        items: list[list[Any]] = []
        size_bytes = 0
        for position, run in enumerate(waiting):
            is_control = run[0].is_control
            if size_bytes > FRAME_BYTES or (items and is_control):
                self._transport.write(ipc.pack_frame(items))
                items, size_bytes = [], 0
            if self._must_wait():  # since that write
                self._outbox = [call for later in waiting[position:] for call in later] + self._outbox
                return
            slot = None if is_control else lookup(run[0].name)
            first_id = fleet._next_request_id
            fleet._next_request_id += len(run)
            request = attempt_run(run, first_id, slot.uid if slot is not None else 0, now_us, wall_us)
            in_flight[first_id] = run
            if run[0].kin is not None:
                self._held.setdefault(run[0].kin, [])
            items.append(request)
            size_bytes += FRAME_BYTES + 1 if is_control else len(request[-1]) + 64
        if items:
            self._transport.write(ipc.pack_frame(items))

    def _release(self, calls: list[Call]) -> None:
        self._outbox += calls
        if not self._is_flush_scheduled:
            self._is_flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _release_all(self) -> None:
        """What is held has waited long enough: a group may be without a leader, and its calls wait in the node then."""
        self._is_hold_timed = False
        held, self._held = self._held, {}
        for calls in held.values():
            if calls:
                self._release(calls)

    def _must_wait(self) -> bool:
        return self._is_paused or not self._is_ready

    def _break_off(self, reason: str) -> None:
        assert self._transport is not None
        self._transport.abort()
        self._end(reason)

    def _end(self, reason: str) -> None:
        """This link is over: tell its calls, of which some will come back through a new one."""
        if self._is_over:
            return
        self._is_over = True
        self._fleet._drop(self)
        now_us = _now_us()
        self._release_all()
        outbox, self._outbox = self._outbox, []
        in_flight, self._in_flight = self._in_flight, {}
        for call in outbox:
            if call.state == READY:
                call.on_refused(reason, now_us)
                self._fleet._advance(call)
        for first_id, run in in_flight.items():
            for request_id, call in enumerate(run, first_id):
                if call.state == IN_FLIGHT and call.request_id == request_id:
                    call.on_lost(now_us)
                    self._fleet._advance(call)

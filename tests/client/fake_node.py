"""A node to a client's eyes: real Unix sockets and a real leader table, with answers from a script."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack

from raftfleet.core.names import shard_of
from raftfleet.node import rundir
from raftfleet.node.leader_table import LeaderTable, RegionWriter, create_table
from raftfleet.wire import ipc
from raftfleet.wire.errors import WireError

Reply = list[Any]
Script = Callable[["FakeNode", int, list[Any]], "Reply | list[Reply] | None"]

CONTROL = -1
HANG_UP = [-1]
"""What a script returns to have the connection closed instead of an answer."""


class FakeNode:
    """Answers on ``control.sock`` and ``shard-N.sock`` of ``run_dir``, from one thread per connection.

    The default script keeps a counter per group that ``inc`` increments, exactly once per (client, seq), and adds
    groups. Others call :meth:`serve` for what they do not answer themselves.
    """

    def __init__(self, run_dir: Path, workers: int = 2) -> None:
        self.run_dir = run_dir
        self.workers = workers
        self.script: Script = FakeNode.serve
        self.lock = threading.RLock()
        self.received: list[tuple[int, list[Any]]] = []
        self.client_ids: set[bytes] = set()
        self.counters: dict[str, int] = {}
        self.uids: dict[str, int] = {}
        self.results: dict[tuple[bytes, str, int], Any] = {}
        self.run_counts: list[int] = []
        self.accepted = 0
        self.table: LeaderTable | None = None
        self.start()

    # ---------------------------------------------------------------- life

    def start(self, workers: int | None = None) -> None:
        self.workers = workers or self.workers
        self.table = create_table(self.run_dir, "n1", self.workers)
        self.writers = [RegionWriter(self.run_dir, index) for index in range(self.workers)]
        for name, uid in self.uids.items():
            self.writers[shard_of(name, self.workers)].set_leader(name, uid, 1, "n1", 11)
        self._threads: list[threading.Thread] = []
        self._connections: set[socket.socket] = set()
        self._listeners = []
        self.is_stopping = False
        for where in (CONTROL, *range(self.workers)):
            path = rundir.control_socket(self.run_dir) if where < 0 else rundir.shard_socket(self.run_dir, where)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(os.fspath(path))
            listener.listen(100)
            self._listeners.append((listener, path))
            self._run(self._accept, listener, where)

    def stop(self) -> None:
        """As a node that stops or dies: every connection breaks."""
        self.is_stopping = True
        for listener, path in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            path.unlink(missing_ok=True)
        self.hang_up()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        for writer in self.writers:
            writer.close()
        if self.table is not None:
            self.table.close()
            self.table = None

    def hang_up(self) -> None:
        """Break every connection."""
        with self.lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> FakeNode:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.table is not None:
            self.stop()

    # ---------------------------------------------------------------- what tests look at

    def set_leader(self, name: str, uid: int = 7, term: int = 1, node: str = "n1") -> None:
        with self.lock:
            self.uids[name] = uid
            self.writers[shard_of(name, self.workers)].set_leader(name, uid, term, node, 11)

    def requests(self, kind: int | None = None) -> list[list[Any]]:
        with self.lock:
            return [request for _where, request in self.received if kind is None or request[1] == kind]

    def commands(self) -> list[list[Any]]:
        """``[client_id, seq, acked, issued_us, arg]`` of every attempt of a command."""
        return [msgpack.unpackb(request[5]) for request in self.requests(ipc.COMMAND)]

    # ---------------------------------------------------------------- the default script

    def serve(self, where: int, request: list[Any]) -> Reply | None:
        request_id, kind, name = request[:3]
        with self.lock:
            if kind == ipc.CALL:
                return [request_id, *self.call(name, request[3])]
            assert where == shard_of(name, self.workers), "the request came to the wrong shard"
            if name.startswith("no such"):
                return [request_id, ipc.GROUP_NOT_FOUND, f"no group {name!r}"]
            if kind == ipc.QUERY:
                return [request_id, ipc.OK, msgpack.packb(self.counters.get(name, 0))]
            client_id, seq, _acked, _issued_us, arg = msgpack.unpackb(request[5])
            key = (client_id, name, seq)
            if key not in self.results:
                value = msgpack.unpackb(arg, strict_map_key=False)
                if value == "inc":
                    self.results[key] = self.counters.get(name, 0)
                    self.counters[name] = self.results[key] + 1
                elif value == "fail":
                    return [request_id, ipc.COMMAND_FAILED, ["ValueError", "no"]]
                else:
                    self.results[key] = value
            return [request_id, ipc.OK, msgpack.packb(self.results[key])]

    def call(self, method: str, args: dict[str, Any]) -> tuple[int, Any]:
        if method == "groups":
            return ipc.OK, {name: 3 for name in self.uids}
        if method == "add_group":
            if args["name"] in self.uids:
                return ipc.ALREADY_ADDED, f"there is a group {args['name']!r} already"
            uid = 100 + len(self.uids)
            self.set_leader(args["name"], uid)
            return ipc.OK, {"uid": uid}
        if method == "add_groups":
            taken = [name for name in args["names"] if name in self.uids]
            if taken:
                return ipc.ALREADY_ADDED, f"there is a group {taken[0]!r} already"
            uids = [100 + len(self.uids) + number for number in range(len(args["names"]))]
            for name, uid in zip(args["names"], uids, strict=True):
                self.set_leader(name, uid)
            return ipc.OK, {"uids": uids}
        if method == "group_status" and args["name"] in self.uids:
            return ipc.OK, {"name": args["name"], "leader": "n2", "term": 4}
        if method == "group_status":
            return ipc.GROUP_NOT_FOUND, "no such group"
        return ipc.OK, [method, args]

    # ---------------------------------------------------------------- sockets

    def _run(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket, where: int) -> None:
        while True:
            try:
                connection, _address = listener.accept()
            except OSError:
                return
            with self.lock:
                self.accepted += 1
                self._connections.add(connection)
                self._run(self._talk, connection, where)
            if self.is_stopping:
                self.hang_up()

    def _talk(self, connection: socket.socket, where: int) -> None:
        reader = ipc.FrameReader()
        try:
            while data := connection.recv(ipc.RECEIVE_BYTES):
                replies: list[Any] = []
                for frame in reader.feed(data):
                    for item in frame:
                        replies += self._answer(where, ipc.check_request(item))
                if HANG_UP in replies:
                    return
                if replies:
                    connection.sendall(ipc.pack_frame(replies))
        except (OSError, WireError):
            pass
        finally:
            with self.lock:
                self._connections.discard(connection)
            connection.close()

    def _answer(self, where: int, request: list[Any]) -> list[Reply]:
        if request[1] == ipc.HELLO:
            with self.lock:
                self.client_ids.add(request[3])
            body = {"node": "n1", "role": "shard", "index": where, "instance": 11, "workers": self.workers}
            return [[0, ipc.OK, {**body, "protocol": ipc.PROTOCOL}]]
        if request[1] in (ipc.COMMAND_RUN, ipc.QUERY_RUN):
            return self._answer_run(where, request)
        with self.lock:
            self.received.append((where, request))
        reply = self.script(self, where, request)
        if reply is None:
            return []
        return [reply] if not reply or not isinstance(reply[0], list) else reply

    def _answer_run(self, where: int, request: list[Any]) -> list[Reply]:
        """Take a run apart, so that scripts see single requests; their answers go out as parts of the run's."""
        first_id, count = request[0], request[-2]
        with self.lock:
            self.run_counts.append(count)
        replies: list[Reply] = []
        for offset, single in enumerate(_singles(request)):
            for reply in self._answer(where, single):
                if reply and reply[0] == first_id + offset:
                    result = reply[2] if reply[1] == ipc.OK else reply[1:]
                    replies.append([first_id, ipc.OK, [offset, count - offset - 1, msgpack.packb([result])]])
                else:
                    replies.append(reply)
        return replies


def _singles(request: list[Any]) -> list[list[Any]]:
    if request[1] == ipc.QUERY_RUN:
        first_id, _, name, uid, timeout_ms, consistency, _count, packed = request
        args = msgpack.unpackb(packed)
        return [[first_id + i, ipc.QUERY, name, uid, timeout_ms, consistency, arg] for i, arg in enumerate(args)]
    first_id, _, name, uid, timeout_ms, _count, run = request
    client_id, seq, acked, issued_us, args = msgpack.unpackb(run)
    commands = [msgpack.packb([client_id, seq + i, acked, issued_us, arg]) for i, arg in enumerate(args)]
    return [[first_id + i, ipc.COMMAND, name, uid, timeout_ms, command] for i, command in enumerate(commands)]

"""The body of a node's manager: sockets, clock and disk around :class:`raftfleet.fleet.manager_core.ManagerCore`.

One loop, like a shard's: wait, read all that is there, let the core step, carry out what it wants in its order. What
the core wants on disk is there before anything that it wanted later leaves this process.

Managers speak to each other by address: a manager's "instance" on the wire is the hash of its ``host:port``, so that
one can be reached before anything is known of it, and frames carry no fleet id (a message says itself which fleet its
sender is in: those who found a fleet, or who must tell another fleet that they are strangers, are in none together).
"""

from __future__ import annotations

import gc
import logging
import os
import random
import secrets
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import psutil

from raftfleet.core.names import hash64
from raftfleet.errors import ConfigError
from raftfleet.fleet.founding import Address, Memory, Persist, Send
from raftfleet.fleet.manager_core import ManagerCore
from raftfleet.fleet.manager_outputs import (
    DropShards,
    Log,
    ManagerSettings,
    Output,
    Reply,
    ShardCall,
    StateChanged,
    StopNode,
)
from raftfleet.node import rundir
from raftfleet.node.config import NodeConfig
from raftfleet.node.context import ChildContext, monotonic_us
from raftfleet.node.disk_watch import DiskWatch
from raftfleet.node.notify import sd_notify
from raftfleet.storage.wal import NO_SPACE
from raftfleet.transport.choose import open_peers
from raftfleet.transport.curve import NodeKeys, load_public_keys, load_secret_key
from raftfleet.transport.poller import Poller
from raftfleet.transport.unix import UnixServer
from raftfleet.transport.unix_client import UnixChannel
from raftfleet.wire import ipc

logger = logging.getLogger(__name__)

MEMORY_NAME = "founding"
SWEEP_US = 1_000_000
LAST_REPLIES_US = 200_000


def address_instance(address: Address) -> int:
    """What a manager calls itself on the wire."""
    return (hash64(f"{address[0]}:{address[1]}".encode()) >> 1) | 1


class MemoryFile:
    """What this node must remember across its own death: ``founding`` in the data directory, else the run directory.

    Layout: CRC32 of the rest, 4 bytes big-endian; then :meth:`Memory.pack`. Replaced as a whole: written beside,
    synced, renamed, the directory synced.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / MEMORY_NAME

    def load(self) -> Memory:
        """The memory, or a new one if there is no file.

        Raises:
            ConfigError: the file is damaged. It is not thrown away: an acceptor that forgets can make two fleets.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return Memory(secrets.randbits(62) + 1)
        try:
            if len(data) < 4 or int.from_bytes(data[:4], "big") != zlib.crc32(data[4:]):
                raise ValueError("its checksum is wrong")
            return Memory.unpack(data[4:])
        except ValueError as error:
            raise ConfigError(
                f"{self.path} is damaged ({error}): move it away if most of --peers still have theirs, or if no node "
                "of its fleet runs any more (docs/operations.md says why)"
            ) from error

    def remove(self) -> None:
        """Forget: there is nobody whom it could concern."""
        self.path.unlink(missing_ok=True)

    def save(self, data: bytes) -> None:
        """Put it on disk; when this returns it is there."""
        temporary = self.path.with_suffix(".new")
        with open(temporary, "wb", opener=_open_private) as file:
            file.write(zlib.crc32(data).to_bytes(4, "big") + data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


class ManagerProcess:
    """The manager of one node and everything it holds open."""

    def __init__(self, context: ChildContext) -> None:
        config = context.config
        self.context = context
        self.keys, allowed = _node_keys(config)
        self.allowed_keys = sorted(allowed)
        if self.keys is not None and self.keys.public_key not in allowed:
            logger.warning(
                "this node's own public key %s is not in %s: nodes with the same list refuse it",
                *(self.keys.public_key, config.curve_public_keys_file),
            )
        self.memory_file = MemoryFile(config.data_dir or config.run_dir)
        self.core = ManagerCore(
            ManagerSettings(
                name=config.name,
                host=config.bind[0],
                port=config.bind[1],
                public_key=self.keys.public_key if self.keys is not None else "",
                workers=context.shard_count,
                placing_count=config.workers,
                peers=tuple(config.peers),
                zone=config.zone,
                purge_window_us=int(config.node_purge_failure_time_window_s * 1_000_000),
                durable=config.data_dir is not None,
            ),
            self.memory_file.load(),
            random.Random(secrets.randbits(128)),
            monotonic_us(),
        )
        self.stopping = False
        self.ready_said = False
        self.sweep_us = 0
        self.waiting: list[Output] = []  # outputs behind one that could not be saved
        self.is_full = False
        self.disk_watch = DiskWatch(context.children)
        self.addresses: dict[int, Address] = {}  # of managers, by their instance
        self.peer_keys: dict[Address, str] = {}  # by which each is connected, known or under trial
        self.key_turns: dict[Address, int] = {}  # how far the list was tried
        self.processes: dict[int, psutil.Process] = {}
        self.poller = Poller()
        self.poller.watch_signals(self._on_signal, signal.SIGTERM)
        self.peers = open_peers(
            config.peer_transport,
            address_instance(config.bind),
            *config.bind,
            self.poller,
            keys=self.keys,
            allowed_keys=allowed,
            accept_without_fleet=lambda frame: True,
        )
        self.shards = [self._channel(index) for index in range(context.shard_count)]
        self.clients = UnixServer(
            rundir.control_socket(config.run_dir),
            self.poller,
            self._welcome,
            mode=0o660 if config.socket_group else 0o600,
            group=config.socket_group,
        )

    def _channel(self, index: int) -> UnixChannel:
        channel: UnixChannel

        def up(welcome: dict[str, Any]) -> None:
            channel.call("shard_info", {}, 1000, monotonic_us(), answered)

        def answered(code: int, body: Any) -> None:
            if code == ipc.OK:
                self.core.on_shard_info(monotonic_us(), index, body)
            elif channel.is_up and not self.stopping:
                channel.call("shard_info", {}, 1000, monotonic_us(), answered)

        channel = UnixChannel(
            rundir.shard_socket(self.context.config.run_dir, index),
            secrets.token_bytes(ipc.CLIENT_ID_BYTES),
            self.poller,
            on_push=lambda body: self.core.on_fleet_push(monotonic_us(), body),
            on_up=up,
            on_down=lambda reason: self.core.on_shard_lost(monotonic_us(), index),
        )
        return channel

    def _welcome(self) -> dict[str, Any]:
        config = self.context.config
        return {
            "node": config.name,
            "role": "manager",
            "index": 0,
            "instance": self.core.shards[0].instance,
            "workers": config.workers,
            "protocol": ipc.PROTOCOL,
        }

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until SIGTERM."""
        gc.collect()
        gc.freeze()
        while not self.stopping:
            self._iterate()
        sd_notify("STOPPING=1")
        self._send_last_replies()
        if self.core.is_alone and self.context.config.data_dir is None:
            self.memory_file.remove()

    def _iterate(self) -> None:
        self.poller.wait(0 if self.peers.is_woken else self._timeout_us())
        now_us = monotonic_us()
        for _, messages in self.peers.receive():
            for message in messages:
                self.core.receive(now_us, message)
        for instance in self.peers.tend(now_us):
            self._try_next_key(instance)
        for channel in self.shards:
            channel.tick(now_us)
        for connection, requests in self.clients.receive():
            for request in requests:
                self._on_request(now_us, connection, request)
        if now_us >= self.core.next_deadline_us():
            self.core.tick(now_us, _wall_us())
        if now_us >= self.sweep_us:
            self.sweep_us = now_us + SWEEP_US
            for index in range(self.context.config.workers, len(self.shards)):
                if self.context.children.is_retired(index):
                    self.core.on_shard_retired(now_us, index)
            self.clients.sweep(now_us)
            self._tell_systemd()
            for level, text in self.disk_watch.look(now_us):
                logger.log(getattr(logging, level.upper()), "%s", text)
        self._carry_out(now_us)

    def _timeout_us(self) -> int:
        deadlines = [self.core.next_deadline_us(), self.sweep_us, self.peers.next_tend_us()]
        deadlines.extend(d for channel in self.shards if (d := channel.next_deadline_us()) is not None)
        return max(0, min(deadlines) - monotonic_us())

    def _on_request(self, now_us: int, connection: int, request: list[Any]) -> None:
        if request[1] != ipc.CALL:
            text = "the control socket takes calls; commands and queries go to a shard's socket"
            self.clients.send(connection, [[request[0], ipc.BAD_REQUEST, text]])
            return
        request_id, _, method, args, timeout_ms = request
        self.core.call(now_us, (connection, request_id, method), method, args, timeout_ms * 1000)

    def _carry_out(self, now_us: int) -> None:
        outputs = [*self.waiting, *self.core.take_outputs()]
        self.waiting = []
        for output in outputs:
            if self.waiting and not isinstance(output, (Reply, Log)):
                self.waiting.append(output)  # it may rest on what could not be saved
            elif isinstance(output, Send):
                self._send(output)
            elif isinstance(output, ShardCall):
                self._call_shard(now_us, output)
            elif isinstance(output, Reply):
                assert isinstance(output.token, tuple)
                connection, request_id, method = output.token
                if method == "status" and output.code == ipc.OK:
                    self._add_processes(output.body)
                self.clients.send(connection, [[request_id, output.code, output.body]])
            elif isinstance(output, Persist):
                self._save(output)
            elif isinstance(output, Log):
                logger.log(getattr(logging, output.level.upper()), "%s", output.text)
            elif isinstance(output, DropShards):
                dropped, self.shards[output.kept :] = self.shards[output.kept :], []
                for channel in dropped:
                    channel.close()
            elif isinstance(output, StateChanged):
                self._state_changed(output.state)
            elif isinstance(output, StopNode):
                self.clients.flush()
                self.context.stop_node()
        for channel in self.shards:
            channel.flush()
        self.clients.flush()

    def _save(self, output: Persist) -> None:
        """Put the founding memory on disk. Without room it is tried again each time, and what rests on it waits."""
        try:
            self.memory_file.save(output.data)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            self.waiting = [output]
            if not self.is_full:
                logger.error("no space left for %s: this node changes nothing in its fleet now", self.memory_file.path)
            self.is_full = True
        else:
            self.is_full = False

    def _call_shard(self, now_us: int, call: ShardCall) -> None:
        def answered(code: int, body: Any) -> None:
            self.core.on_shard_answer(monotonic_us(), call.token, code, body)

        self.shards[call.shard].call(call.method, call.args, call.timeout_ms, now_us, answered)

    # -- other managers ---------------------------------------------------------------------------------------------

    def _send(self, output: Send) -> None:
        instance = address_instance(output.address)
        self.addresses[instance] = output.address
        if self._connect(instance, output.address):
            self.peers.send(instance, [output.message])

    def _connect(self, instance: int, address: Address) -> bool:
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        key = self._key_of(address)
        return key is not None and self.peers.set_address(instance, f"tcp://{host}:{address[1]}", key)

    def _key_of(self, address: Address) -> str | None:
        """The CURVE key to expect at ``address``; "" without keys, None if the fleet's list is empty.

        Before anything is known of a node, CURVE wants its key: the first of the list is tried, and the next one
        whenever the node there turns out to hold another (:meth:`_try_next_key`). Only keys of the list come in
        question, whatever other nodes say.
        """
        if self.keys is None:
            return ""
        key = self.peer_keys.get(address)
        if key is None and self.allowed_keys:
            said = self.core.public_key_at(address)
            key = self.peer_keys[address] = said if said in self.allowed_keys else self.allowed_keys[0]
        return key

    def _try_next_key(self, instance: int) -> None:
        """The key that others say is at that address, if they do and it was not the wrong one; else the list's next."""
        address = self.addresses[instance]
        said = self.core.public_key_at(address)
        if said in self.allowed_keys and said != self.peer_keys[address]:
            self.peer_keys[address] = said
        else:
            turn = self.key_turns[address] = (self.key_turns.get(address, 0) + 1) % len(self.allowed_keys)
            self.peer_keys[address] = self.allowed_keys[turn]
        self._connect(instance, address)

    # -- what people see --------------------------------------------------------------------------------------------

    def _state_changed(self, state: str) -> None:
        config = self.context.config
        fleet = f", fleet {self.core.fleet.hex()}" if self.core.fleet else ""
        logger.info("node %s is %s%s", config.name, state, fleet)
        if not self.ready_said and state in ("active", "inactive") and self.core.is_ready:
            self.ready_said = True
            try:
                print(f"ready {config.name} {config.endpoint} {state}", flush=True)
            except OSError:
                pass  # nobody reads it any more
            sd_notify("READY=1", f"STATUS={state}")

    def _tell_systemd(self) -> None:
        sd_notify(f"STATUS={self.core.node_state}{': ' if self.core.status_text else ''}{self.core.status_text}")

    def _add_processes(self, status: dict[str, Any]) -> None:
        """Complete an answer to ``status`` by what the operating system knows."""
        for worker in status["workers"]:
            row = self.context.children.shard(worker["index"])
            worker.update(pid=row.pid, restarts=row.restarts, cpu_percent=0.0, rss_bytes=0)
            if worker["disk"] is not None and worker["index"] in self.disk_watch.hung:
                worker["disk"] = {**worker["disk"], "state": "hung"}
            try:
                process = self.processes.get(row.pid)
                if process is None:
                    process = self.processes[row.pid] = psutil.Process(row.pid)
                worker["cpu_percent"] = process.cpu_percent()  # since the last question; 0.0 at the first
                worker["rss_bytes"] = process.memory_info().rss
            except psutil.Error:
                self.processes.pop(row.pid, None)
        status["manager"] = {"pid": os.getpid(), "restarts": self.context.children.manager.restarts}
        status["refused"] = {name: count for name, count in self.peers.counters.items() if name.startswith("refused")}

    # -- the end ----------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        self.stopping = True

    def _send_last_replies(self) -> None:
        """Whoever asked for the stop wants to hear that it was understood."""
        deadline_us = monotonic_us() + LAST_REPLIES_US
        self._carry_out(monotonic_us())
        while monotonic_us() < deadline_us and self.clients.connection_ids():
            self.poller.wait(10_000)
            self.clients.flush()

    def close(self) -> None:
        """Close everything that is open."""
        for channel in self.shards:
            channel.close()
        self.clients.close()
        self.peers.close()
        self.poller.close()


def _node_keys(config: NodeConfig) -> tuple[NodeKeys | None, frozenset[str]]:
    if config.curve_secret_file is None or config.curve_public_keys_file is None:
        return None, frozenset()
    return load_secret_key(config.curve_secret_file), frozenset(load_public_keys(config.curve_public_keys_file))


def _wall_us() -> int:
    return time.time_ns() // 1000


def main(context: ChildContext) -> None:
    """Run the node's manager until it is told to stop."""
    manager = ManagerProcess(context)
    try:
        manager.run()
    finally:
        sys.stdout.flush()
        manager.close()

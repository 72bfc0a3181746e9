"""The body of a worker process: one loop around :class:`raftfleet.fleet.host.Host`.

An iteration: **drain** all that can be read, **step** the host, **send** one frame per peer, **persist**, send what
waited for that, **apply**, **reply** with one frame per client (DESIGN 4). Nothing waits for company: a batch is what
came while the last iteration ran. Without ``--data-dir`` there is nothing to persist and one sending.

The disk is waited for here, in the loop: one fdatasync for all groups is the least latency, and a disk that hangs
silences this worker's beats, so that its leaderships go elsewhere by themselves. What fails for good (DESIGN 5.14) ends
this process: it tells those it led that it leads no more, and nothing else; the next one reads the disk again.

While a user's code runs for long, SIGALRM keeps the links alive: its handler runs between two bytecodes of that code,
in this same thread, and exchanges beats and nothing else (:meth:`raftfleet.core.shard.Shard.pulse`). So a command that
takes seconds delays its own worker's groups but costs nobody a leader. Code that stays inside one C call for longer
than the election timeout still does.
"""

from __future__ import annotations

import logging
import random
import secrets
import signal
import time
from types import FrameType
from typing import Any

from raftfleet.core.durable import DurableShard
from raftfleet.core.member import Member
from raftfleet.core.messages import STEP_DOWN
from raftfleet.fleet.host import Host, HostSettings, Outputs
from raftfleet.node import rundir
from raftfleet.node.config import NodeConfig
from raftfleet.node.context import ChildContext, monotonic_us
from raftfleet.node.data_dir import retire_shard, shard_dir, was_there
from raftfleet.node.exit_codes import ExitCode
from raftfleet.node.garbage import Garbage
from raftfleet.node.leader_table import RegionWriter
from raftfleet.node.machines import MachineLoader
from raftfleet.storage.base import RecoveredShard, StorageLocked, StoragePoisoned
from raftfleet.storage.keeper import Keeper, load_state, open_keeper
from raftfleet.transport.choose import open_peers
from raftfleet.transport.curve import NodeKeys, load_public_keys, load_secret_key
from raftfleet.transport.poller import Poller
from raftfleet.transport.unix import UnixServer
from raftfleet.transport.unix_client import UnixChannel
from raftfleet.wire.ipc import PROTOCOL
from raftfleet.workers.snapshot_child import FileTarget, MemoryTarget, SnapshotChild

logger = logging.getLogger(__name__)

SLOW_COMMAND_US = 500_000
"""User code that runs longer is named in the log."""
BACKLOG_FRAMES_MAX = 4096
WAIT_US_MAX = 1_000_000
LOCK_WAIT_US = 5_000_000
DRAIN_US = 1_500_000
"""At SIGTERM: time to hand leaderships over."""


def wall_us() -> int:
    """Unix microseconds."""
    return time.time_ns() // 1000


def node_keys(config: NodeConfig) -> tuple[NodeKeys | None, frozenset[str]]:
    """The node's CURVE keys and the fleet's public keys, if it has any."""
    if config.curve_secret_file is None or config.curve_public_keys_file is None:
        return None, frozenset()
    return load_secret_key(config.curve_secret_file), load_public_keys(config.curve_public_keys_file)


class Worker:
    """One shard's process."""

    def __init__(self, context: ChildContext) -> None:
        config = context.config
        self.context = context
        self.index = context.index
        self.keeper, found = open_data(context)
        self.instance = found.instance if found is not None else secrets.randbits(62) + 1
        keys, allowed = node_keys(config)
        host_name, port = config.shard_address(context.index)
        self.poller = Poller()
        self.stopping_us = 0
        self.poller.watch_signals(self._on_signal, signal.SIGTERM)
        self.peers = open_peers(
            config.peer_transport, self.instance, host_name, port, self.poller, keys=keys, allowed_keys=allowed
        )
        self.host = Host(
            self.instance,
            HostSettings(
                config.name,
                context.index,
                config.workers,
                self.peers.endpoint,
                keys.public_key if keys is not None else "",
                int(config.beat_interval_s * 1_000_000),
            ),
            random.Random(secrets.randbits(64)),
            MachineLoader(config.app_dirs),
            self.keeper,
        )
        self.snapshots = SnapshotChild(self.poller)
        # A surplus shard owns no names, so it has no region to write them into.
        self.table = RegionWriter(config.run_dir, context.index) if context.index < config.workers else None
        self.clients = UnixServer(
            rundir.shard_socket(config.run_dir, context.index),
            self.poller,
            self._welcome,
            mode=0o660 if config.socket_group else 0o600,
            group=config.socket_group,
            on_disconnect=self.host.on_disconnect,
        )
        self.feed: UnixChannel | None = None
        self.pushes: list[list[Any]] = []
        if context.index != 0:
            self.feed = UnixChannel(
                rundir.shard_socket(config.run_dir, 0),
                self.host.client_id,
                self.poller,
                on_push=lambda push: self.pushes.append(push),
                on_up=self._feed_up,
            )
        self.fleet_set = False
        self.backlog: list[tuple[int, list[Any]]] = []
        self.running: Member | None = None
        self.in_user_code = False
        self.is_alarm_set = False
        self.user_code_since_us = 0
        self.sweep_us = 0
        self.garbage = Garbage()
        self.requests_seen = 0
        self.exit_fresh = False
        self.exit_retired = False
        if self.keeper is not None and found is not None:
            self._take_disk(self.keeper, found)
        else:
            self.host.shard.begin_dump = self._begin_dump
        self.host.shard.user_code_watch = self._watch_user_code

    def _take_disk(self, keeper: Keeper, found: RecoveredShard) -> None:
        """Bring back what lies on the disk, before the first message is read."""
        shard = self.host.shard
        assert isinstance(shard, DurableShard)
        keeper.shard = shard
        keeper.watch = self._watch_disk
        keeper.begin_snapshot = self._begin_snapshot
        keeper.begin_last_state = lambda member, generation: self._begin_snapshot(member, generation, is_last=True)
        started_us = monotonic_us()
        self.host.begin(started_us, wall_us())
        self.host.restore(found, lambda info: load_state(keeper.store, info))
        logger.info(
            "%s: %d members are back after %.1f s (instance %d)",
            *(keeper.store.path, len(shard.members), (monotonic_us() - started_us) / 1e6, self.instance),
        )

    def _begin_snapshot(self, member: Member, generation: int, *, is_last: bool = False) -> bool:
        keeper = self.keeper
        assert keeper is not None
        has_begun = self.snapshots.begin(member, lambda: FileTarget(keeper, member, generation, is_last=is_last))
        keeper.fork_us_max = self.snapshots.fork_us_max
        return has_begun

    def _begin_dump(self, member: Member) -> bool:
        return self.snapshots.begin(member, lambda: MemoryTarget(self.host.shard, member))

    def _watch_disk(self, waits: bool) -> None:
        self.context.children.write_disk_since(self.index, monotonic_us() if waits else 0)

    def _welcome(self) -> dict[str, Any]:
        return {
            "node": self.context.config.name,
            "role": "shard",
            "index": self.index,
            "instance": self.instance,
            "workers": self.context.config.workers,
            "protocol": PROTOCOL,
        }

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        """Until SIGTERM, or until this worker has left its fleet."""
        signal.signal(signal.SIGALRM, self._pulse)
        self.garbage.start()
        try:
            while not self._is_done():
                self._iterate()
            self.host.begin(monotonic_us(), wall_us())
            self.host.step_down_all()
            self._carry_out()
        except StoragePoisoned:
            self._give_up()
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self._wait_for_queues()

    def _give_up(self) -> None:
        """The disk failed. Whoever waits for an answer learns from the broken connection that it is not known."""
        shard = self.host.shard
        for member in list(shard.members.values()):
            member.step_down()
        for peer, messages in shard.take_sends().items():
            self.peers.send(peer, [message for message in messages if message[0] == STEP_DOWN])
        self._wait_for_queues()

    def _is_done(self) -> bool:
        if self.exit_fresh or self.exit_retired:
            return True
        if not self.stopping_us:
            return False
        return not self.host.is_draining or monotonic_us() - self.stopping_us > DRAIN_US

    def _iterate(self) -> None:
        host = self.host
        peers = self.peers
        # Asked before the wait and not again after it: what came meanwhile sets no timer that is due at once.
        deadline_us = self._deadline_us()
        is_busy = host.has_work or self.backlog or peers.is_woken
        self.poller.wait(0 if is_busy else min(deadline_us - monotonic_us(), WAIT_US_MAX))
        now_us = monotonic_us()
        host.begin(now_us, wall_us())
        if self.backlog:
            backlog, self.backlog = self.backlog, []
            for sender, messages in backlog:
                host.receive(sender, messages)
        if peers.is_woken:
            received = peers.receive()
            # Again, and after they came: if this process stood still since the first look at the clock, what it
            # promises to their senders would end too early (DESIGN 5.10).
            host.clock_read(monotonic_us())
            for sender, messages in received:
                host.receive(sender, messages)
        if self.pushes:
            pushes, self.pushes = self.pushes, []
            for push in pushes:
                self._on_push(push)
        for connection, requests in self.clients.receive():
            for request in requests:
                host.on_client_request(connection, request)
        if now_us >= deadline_us:
            host.tick()
            peers.tend(now_us)
        if self.feed is not None:
            self.feed.tick(now_us)
        if now_us >= self.sweep_us:
            self.sweep_us = now_us + WAIT_US_MAX
            self.clients.sweep(now_us)
            peers.tend(now_us)
            if self.table is not None:
                self.table.follow()
            self._care_for_garbage(now_us)
            self.snapshots.tick(now_us)
        self._carry_out()

    def _carry_out(self) -> None:
        host = self.host
        host.flush()
        for peer, messages in host.collect_sends().items():
            self.peers.send(peer, messages)
        if self.keeper is not None:
            self._persist(self.keeper)
        host.apply()
        out = host.settle(monotonic_us())
        if out.replies:
            for connection, replies in out.replies.items():
                self.clients.send(connection, replies)
            self.clients.flush()
        for peer, messages in host.collect_answers().items():
            self.peers.send(peer, messages)
        if host.fleet_id and not self.fleet_set:
            # On the disk before anything of that fleet is heard.
            self.fleet_set = self.keeper is None or self.keeper.set_fleet(host.fleet_id)
            if self.fleet_set:
                self.peers.set_fleet(host.fleet_id)
        if (
            out.table
            or out.addresses
            or out.forgotten
            or out.upcalls
            or out.notes
            or out.exit_fresh
            or out.exit_retired
        ):
            self._carry_out_the_rest(out)

    def _persist(self, keeper: Keeper) -> None:
        now_us = keeper.now_us = monotonic_us()
        for peer, messages in self.host.persist().items():
            self.peers.send(peer, messages)
        if self.host.has_work or self.backlog or self.peers.is_woken:
            keeper.work(now_us)
        else:
            keeper.rest(now_us)
        if keeper.notes:
            notes, keeper.notes = keeper.notes, []
            for level, text in notes:
                logger.log(getattr(logging, level.upper()), "%s", text)

    def _carry_out_the_rest(self, out: Outputs) -> None:
        for instance, (endpoint, public_key) in out.addresses.items():
            self.peers.set_address(instance, endpoint, public_key)
        for instance in out.forgotten:
            self.peers.forget(instance)
        if out.table and self.table is not None:
            self._write_table(self.table, out.table)
        for token, method, args in out.upcalls:
            self._upcall(token, method, args)
        for level, text in out.notes:
            logger.log(getattr(logging, level.upper()), "%s", text)
        self.exit_fresh |= out.exit_fresh
        self.exit_retired |= out.exit_retired

    def _write_table(self, table: RegionWriter, operations: list[tuple[Any, ...]]) -> None:
        for operation in operations:
            if operation[0] == "leader":
                table.set_leader(*operation[1:])
            elif operation[0] == "leaderless":
                table.set_leaderless(*operation[1:])
            else:
                table.remove(*operation[1:])
        if table.needs_growth:
            self.context.grow_leader_table()

    def _care_for_garbage(self, now_us: int) -> None:
        requests = self.clients.counters["requests"]
        self.garbage.tick(now_us, is_idle=requests == self.requests_seen and not self.host.open_counts()["open"])
        self.requests_seen = requests

    def _deadline_us(self) -> int:
        """When the loop has something to do even if nothing comes."""
        deadline_us = min(self.host.next_deadline_us(), self.sweep_us, self.peers.next_tend_us())
        if self.feed is not None:
            feed_us = self.feed.next_deadline_us()
            if feed_us is not None and feed_us < deadline_us:
                deadline_us = feed_us
        if self.keeper is not None:
            deadline_us = min(deadline_us, self.keeper.next_deadline_us())
        if self.stopping_us:
            deadline_us = min(deadline_us, monotonic_us() + 10_000)
        return deadline_us

    def _wait_for_queues(self) -> None:
        """The last frames say who leads no more: give ZeroMQ's thread, or a slow peer, a moment to take them."""
        deadline_us = monotonic_us() + 50_000
        while not self.peers.is_flushed() and monotonic_us() < deadline_us:
            self.poller.wait(deadline_us - monotonic_us())

    def close(self) -> None:
        """Close everything that is open."""
        self.snapshots.close()
        if self.keeper is not None:
            self.keeper.close()
            if self.exit_fresh or self.exit_retired:
                self._retire()
        if self.feed is not None:
            self.feed.close()
        self.clients.close()
        self.peers.close()
        if self.table is not None:
            self.table.close()
        self.poller.close()

    def _retire(self) -> None:
        """This instance has left its fleet for good: what it held is put aside, and the next one begins empty."""
        data_dir = self.context.config.data_dir
        assert data_dir is not None
        put_at = retire_shard(data_dir, self.index, self.instance)
        logger.warning(
            "instance %d has left its fleet; what it held is in %s until the next time", self.instance, put_at
        )

    # ------------------------------------------------------------------ what wakes the loop

    def _on_signal(self, number: int) -> None:
        if not self.stopping_us:
            self.stopping_us = monotonic_us()
            self.host.begin(self.stopping_us, wall_us())
            self.host.drain()

    def _feed_up(self, welcome: dict[str, Any]) -> None:
        """Worker 0 is there (again): ask for the fleet's state and all that follows."""
        assert self.feed is not None

        def watched(code: int, body: Any) -> None:
            if code == 0 and body["state"] is not None:
                self.pushes.append(["fleet_reset", body["index"], body["state"]])

        self.feed.call("watch_fleet", {}, 5000, monotonic_us(), watched)

    def _on_push(self, push: list[Any]) -> None:
        if push[0] == "fleet":
            self.host.on_feed(push[1], push[2], push[3])
        elif push[0] == "fleet_reset":
            self.host.on_feed_reset(push[1], push[2])

    def _upcall(self, token: int, method: str, args: dict[str, Any]) -> None:
        assert self.feed is not None
        self.feed.call(
            method,
            args,
            int(args.get("timeout_ms", 2000)),
            monotonic_us(),
            lambda code, body: self.host.on_upcall_answer(token, code, body),
        )

    # ------------------------------------------------------------------ users' code

    def _watch_user_code(self, member: Member | None) -> None:
        now_us = monotonic_us()
        if not self.in_user_code:
            self.running = member
            self.user_code_since_us = now_us
            self.in_user_code = True
            if not self.is_alarm_set:
                self._set_alarm()
            return
        self.in_user_code = False
        took_us = now_us - self.user_code_since_us
        if took_us > SLOW_COMMAND_US:
            name = self.running.name if self.running is not None else "(new)"
            logger.warning(
                "group %s: its state machine took %.1f s, and all groups of worker %d waited (warned of from %.1f s)",
                name,
                took_us / 1e6,
                self.index,
                SLOW_COMMAND_US / 1e6,
            )
            self.host.count("slow_commands")
        self.running = None

    def _set_alarm(self) -> None:
        """One SIGALRM in a beat's time. None while no user's code runs: an idle worker is not woken for nothing."""
        self.is_alarm_set = True
        signal.setitimer(signal.ITIMER_REAL, self.context.config.beat_interval_s)

    def _pulse(self, number: int, frame: FrameType | None) -> None:
        """SIGALRM: if a user's code is running, keep the links alive meanwhile."""
        if not self.in_user_code:
            self.is_alarm_set = False
            return
        self._set_alarm()
        shard = self.host.shard
        self.peers.look()
        received = self.peers.receive(256)  # what is more than that leaves ``is_woken`` set
        now_us = monotonic_us()  # after they came: see _iterate
        self.peers.tend(now_us)
        for sender, messages in received:
            rest = shard.pulse(now_us, sender, messages)
            if rest:
                if len(self.backlog) < BACKLOG_FRAMES_MAX:
                    self.backlog.append((sender, rest))
                else:
                    self.host.count("dropped_in_pulse")
        sends = shard.pulse_beats(now_us)
        for peer, messages in shard.take_saved_sends().items():
            sends.setdefault(peer, []).extend(messages)
        for peer, messages in sends.items():
            self.peers.send(peer, messages)


def open_data(context: ChildContext) -> tuple[Keeper | None, RecoveredShard | None]:
    """This worker's part of the data directory and what lies there; None without ``--data-dir``.

    Raises:
        StorageError: it cannot be used; boot turns it into an exit code.
    """
    config = context.config
    if config.data_dir is None:
        return None, None
    path = str(shard_dir(config.data_dir, context.index))
    deadline_us = monotonic_us() + LOCK_WAIT_US
    while True:
        try:
            keeper, found = open_keeper(
                path, node=config.name, new_instance=secrets.randbits(62) + 1, shard=context.index
            )
            break
        except StorageLocked:  # a child that the former worker forked for a snapshot dies with it, but not before it
            if monotonic_us() > deadline_us:
                raise
            time.sleep(0.02)
    if found.created:
        had_data = (config.data_dir / "founding").exists() and was_there(config.data_dir, context.index)
        level = logging.WARNING if had_data else logging.INFO
        lost = "; what this node once held there is lost, and its groups bring it here again" if had_data else ""
        logger.log(level, "%s was empty: this shard is a new instance, %d%s", path, found.instance, lost)
    if found.cut_bytes:
        logger.info("%s: %d bytes of a write that was never finished were cut", path, found.cut_bytes)
    return keeper, found


def main(context: ChildContext) -> None:
    """Run worker ``context.index`` until it is told to stop."""
    worker = Worker(context)
    try:
        worker.run()
    finally:
        worker.close()
    if worker.exit_retired:
        raise SystemExit(int(ExitCode.RETIRED))
    if worker.exit_fresh:
        raise SystemExit(int(ExitCode.RESTART_FRESH))

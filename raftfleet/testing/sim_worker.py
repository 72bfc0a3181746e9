"""A worker process without a process: the production host, turned by simulated time, frames and connections.

This module does not know about faults; :class:`raftfleet.testing.fleet.SimFleet` says when a worker dies. What the real
loop (``workers/shard.py``) does is done here in small:

* whatever comes wakes the loop a little later, so that what comes meanwhile is taken in the same turn;
* frames between workers are bytes of the real codec, and only go to instances whose address is known;
* local connections (:class:`Connection`) carry requests and replies in order, as Unix sockets do, and break when the
  worker dies; a request that was written and not answered then has an unknown outcome;
* workers other than 0 follow worker 0's feed over such a connection, and send it their upcalls.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack

from raftfleet.fleet.host import Host, HostSettings, Outputs
from raftfleet.testing.clock import MILLISECOND_US, DriftingClock
from raftfleet.wire import ipc
from raftfleet.wire.codec import NO_FLEET, decode_frame, encode_frame

if TYPE_CHECKING:
    from raftfleet.testing.fleet import SimFleet, SimNode

LOCAL_DELAY_US = 50
"""A hop over a Unix socket, loops of both sides included."""
RECONNECT_US = 10 * MILLISECOND_US
CHANNEL_GRACE_US = 100 * MILLISECOND_US
"""How much longer than the other side a channel waits for an answer, as the real one does."""

Answer = Callable[[int, Any], None]


class TableRow(NamedTuple):
    """One row of a node's leader table. ``node`` None: no leader is known."""

    uid: int
    term: int
    node: str | None
    instance: int


class Connection:
    """One client's end of a worker's Unix socket. Made anew after it broke.

    Args:
        on_reply: called with ``(id, code, body)``, pushes included.
        on_lost: called when the worker dies.
    """

    def __init__(
        self, fleet: SimFleet, worker: SimWorker, on_reply: Callable[[int, int, Any], None], on_lost: Callable[[], None]
    ) -> None:
        self.fleet = fleet
        self.worker = worker
        self.ident = fleet.next_connection()
        self.is_open = True
        self._on_reply = on_reply
        self._on_lost = on_lost
        worker.connections[self.ident] = self

    def send(self, item: list[Any]) -> None:
        """Write one request; it was accepted by the socket, whatever becomes of it."""
        packed = ipc.pack_frame([item])
        self.fleet.queue.after(LOCAL_DELAY_US, self._arrive, packed)

    def _arrive(self, packed: bytes) -> None:
        if self.is_open:
            for frame in ipc.FrameReader().feed(packed):
                for item in frame:
                    self.worker.take_request(self.ident, ipc.check_request(item))

    def replies(self, items: list[Any]) -> None:
        """The worker writes replies."""
        self.fleet.queue.after(LOCAL_DELAY_US, self._replied, ipc.pack_frame(items))

    def _replied(self, packed: bytes) -> None:
        for frame in ipc.FrameReader().feed(packed):
            for item in frame:
                if self.is_open:
                    self._on_reply(*ipc.check_reply(item))

    def close(self) -> None:
        """The client goes away."""
        if self.is_open:
            self.is_open = False
            self.worker.disconnected(self.ident)

    def break_off(self) -> None:
        """The worker died."""
        if self.is_open:
            self.is_open = False
            self.fleet.queue.after(LOCAL_DELAY_US, self._on_lost)


class Channel:
    """A process of the node speaks to a worker of it: requests wait while there is no connection.

    Answers as :class:`raftfleet.transport.unix_client.UnixChannel` does: UNANSWERED for what was never written,
    OUTCOME_UNKNOWN for what was and got no answer.
    """

    def __init__(
        self,
        fleet: SimFleet,
        find: Callable[[], SimWorker | None],
        on_up: Callable[[], None] | None = None,
        on_push: Callable[[list[Any]], None] | None = None,
    ) -> None:
        self._fleet = fleet
        self._find = find
        self._on_up = on_up
        self._on_push = on_push
        self._connection: Connection | None = None
        self._is_closed = False
        self._next_ident = 1
        self._waiting: dict[int, list[Any]] = {}
        self._answers: dict[int, Answer] = {}
        self._connect()

    def call(self, method: str, args: dict[str, Any], timeout_ms: int, answer: Answer) -> None:
        """Ask; ``answer(code, body)`` comes once."""
        ident = self._next_ident
        self._next_ident += 1
        self._answers[ident] = answer
        item = [ident, ipc.CALL, method, args, timeout_ms]
        if self._connection is not None:
            self._connection.send(item)
        else:
            self._waiting[ident] = item
        self._fleet.queue.after(timeout_ms * 1000 + CHANNEL_GRACE_US, self._overdue, ident)

    def close(self) -> None:
        """The process that asked is gone, and with it whoever waited."""
        self._is_closed = True
        self._answers.clear()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> None:
        if self._is_closed:
            return
        worker = self._find()
        if worker is None:
            self._fleet.queue.after(RECONNECT_US, self._connect)
            return
        self._connection = Connection(self._fleet, worker, self._reply, self._lost)
        if self._on_up is not None:
            self._on_up()
        waiting, self._waiting = self._waiting, {}
        for item in waiting.values():
            self._connection.send(item)

    def _lost(self) -> None:
        self._connection = None
        answers, self._answers = self._answers, {}
        for answer in answers.values():
            answer(ipc.OUTCOME_UNKNOWN, "connection lost")
        self._fleet.queue.after(RECONNECT_US, self._connect)

    def _reply(self, ident: int, code: int, body: Any) -> None:
        if ident == 0:
            if self._on_push is not None:
                self._on_push(body)
            return
        answer = self._answers.pop(ident, None)
        if answer is not None:
            answer(code, body)

    def _overdue(self, ident: int) -> None:
        answer = self._answers.pop(ident, None)
        if answer is not None:
            written = self._waiting.pop(ident, None) is None
            answer(ipc.OUTCOME_UNKNOWN if written else ipc.UNANSWERED, "no answer in time")


class SimWorker:
    """One worker process: dies with its memory; what comes after it is another instance.

    Attributes:
        host: the production host.
        addresses: the instances that it can reach.
        table: its region of the node's leader table, by name.
        notes: lines that it logged.
        connections: open local connections, by id.
        is_paused: the process is stopped; what comes waits.
        is_feed_held: the fleet's news waits, as on a busy machine, until :meth:`release_feed`.
    """

    def __init__(self, fleet: SimFleet, node: SimNode, index: int, instance: int, rng: random.Random) -> None:
        self.fleet = fleet
        self.node = node
        self.index = index
        self.instance = instance
        self.is_dead = False
        self.is_paused = False
        self.addresses: dict[int, str] = {}
        self.table: dict[str, TableRow] = {}
        self.notes: list[tuple[str, str]] = []
        self.connections: dict[int, Connection] = {}
        self.clock = DriftingClock(1_000_000, rng.randrange(1, 1000) * 1_000_000)
        self.rng = rng
        settings = HostSettings(
            node.name, index, node.workers_count, node.endpoint(index), "", fleet.options.beat_interval_us
        )
        self.host = self._new_host(settings, random.Random(rng.getrandbits(64)))
        self._frames: list[bytes] = []
        self._requests: list[tuple[int, list[Any]]] = []
        self._work: list[Callable[[Host], None]] = []
        self._turn_at_us = -1
        self._wake_us = -1
        self._held_pushes: list[list[Any]] = []
        self.is_feed_held = False
        self.feed: Channel | None = None
        if index != 0:
            self.feed = Channel(fleet, lambda: node.workers[0], self._feed_up, self._feed_pushed)
        self._soon()

    def _new_host(self, settings: HostSettings, rng: random.Random) -> Host:
        return Host(self.instance, settings, rng, self.node.make_machine)

    def next_deadline_us(self) -> int:
        """When a turn is due though nothing comes, by this worker's clock."""
        return self.host.next_deadline_us()

    # -- what comes in ---------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """A frame of another worker."""
        self._frames.append(data)
        self._soon()

    def take_request(self, connection: int, item: list[Any]) -> None:
        """A request of a local client."""
        self._requests.append((connection, item))
        self._soon()

    def work(self, function: Callable[[Host], None]) -> None:
        """Run ``function(host)`` within a turn."""
        self._work.append(function)
        self._soon()

    def disconnected(self, connection: int) -> None:
        """A local client went away."""
        if self.connections.pop(connection, None) is not None and not self.is_dead:
            self.host.on_disconnect(connection)

    def die(self) -> None:
        """As by SIGKILL: everything that it knew is lost."""
        self.is_dead = True
        if self.feed is not None:
            self.feed.close()
        for connection in list(self.connections.values()):
            connection.break_off()
        self.connections.clear()

    def pause(self) -> None:
        """As by SIGSTOP."""
        self.is_paused = True

    def resume(self) -> None:
        """As by SIGCONT."""
        if self.is_paused:
            self.is_paused = False
            self._soon()

    # -- the loop --------------------------------------------------------------------------------------------------

    def _soon(self) -> None:
        """Take a turn when the loop comes round: at once if it waits, later if it is busy."""
        if self.is_dead or self.is_paused or self._turn_at_us >= 0:
            return
        draw = self.rng.random()
        delay_us = 10 + int(draw * 60)
        if draw < self.fleet.options.slow_turn:
            delay_us += int(self.rng.random() * self.fleet.options.slow_turn_us_max)
        self._turn_at_us = self.fleet.queue.now_us + delay_us
        self.fleet.queue.at(self._turn_at_us, self._turn)

    def _turn(self) -> None:
        self._turn_at_us = -1
        if self.is_dead or self.is_paused:
            return
        host = self.host
        true_us = self.fleet.queue.now_us
        local_us = self.clock.local_us(true_us)
        host.begin(local_us, self.node.wall_us(true_us))
        frames, self._frames = self._frames, []
        host.clock_read(local_us)
        for data in frames:
            self._take_frame(data)
        requests, self._requests = self._requests, []
        for connection, item in requests:
            host.on_client_request(connection, item)
        work, self._work = self._work, []
        for function in work:
            function(host)
        if local_us >= host.next_deadline_us():
            host.tick()
        self._end_turn()
        if not self.is_dead:
            self._finish_turn()

    def _end_turn(self) -> None:
        """All that the turn has to say and to do."""
        self._carry_out(self.host.finish())

    def _finish_turn(self) -> None:
        self.fleet.stepped(self)
        if self.host.has_work:
            self._soon()
        else:
            self._sleep()

    def _take_frame(self, data: bytes) -> None:
        frame = decode_frame(data)
        fleet = self.host.fleet_id
        if not fleet or frame.fleet != fleet or frame.to_instance != self.instance:
            self.fleet.count("frames refused")
            return
        self.host.receive(frame.from_instance, frame.messages)

    def _carry_out(self, out: Outputs) -> None:
        for instance, (endpoint, _) in out.addresses.items():
            self.addresses[instance] = endpoint
        fleet_id = self.host.fleet_id or NO_FLEET
        for instance, messages in out.sends.items():
            self.fleet.sent(self, instance, messages)
            endpoint = self.addresses.get(instance, "")
            if not endpoint:
                self.fleet.count("frames without an address")
                continue
            self.fleet.send(self, endpoint, instance, encode_frame(fleet_id, self.instance, instance, messages))
        for instance in out.forgotten:
            self.addresses.pop(instance, None)
        for operation in out.table:
            self._write_table(operation)
        for ident, replies in out.replies.items():
            connection = self.connections.get(ident)
            if connection is not None:
                connection.replies(replies)
        for token, method, args in out.upcalls:
            self._upcall(token, method, args)
        self.notes.extend(out.notes)
        if out.exit_fresh:
            self.node.worker_exited(self)
        elif out.exit_retired:
            self.node.worker_retired(self)

    def _sleep(self) -> None:
        """Be woken at the host's next deadline; an earlier wake that is under way will look again."""
        due_us = max(self.clock.true_us(self.next_deadline_us()), self.fleet.queue.now_us + 1)
        if self.fleet.queue.now_us < self._wake_us <= due_us:
            return
        self._wake_us = due_us
        self.fleet.queue.at(due_us, self._wake, due_us)

    def _wake(self, due_us: int) -> None:
        if self.is_dead or due_us != self._wake_us:
            return
        self._wake_us = -1
        if self.clock.local_us(due_us) >= self.next_deadline_us():
            self._soon()
        else:
            self._sleep()

    # -- the leader table, the feed --------------------------------------------------------------------------------

    def _write_table(self, operation: tuple[Any, ...]) -> None:
        """As :class:`raftfleet.node.leader_table.RegionWriter` does: older news is passed over."""
        kind, name, uid = operation[:3]
        row = self.table.get(name)
        if kind == "remove":
            if row is not None and row.uid == uid:
                del self.table[name]
            return
        if kind == "leader":
            new = TableRow(uid, *operation[3:])
        else:
            term = operation[3] if len(operation) > 3 else 0
            if term == 0 and row is not None and row.uid == uid:
                term = row.term
            new = TableRow(uid, term, None, 0)
        if row is None or (new.uid, new.term) >= (row.uid, row.term):
            self.table[name] = new

    def _feed_up(self) -> None:
        def watched(code: int, body: Any) -> None:
            if code == ipc.OK and body["state"] is not None:
                self._feed_pushed(["fleet_reset", body["index"], body["state"]])

        def watch() -> None:
            if self.feed is not None:
                self.feed.call("watch_fleet", {}, 5000, watched)

        self.fleet.queue.after(0, watch)

    def release_feed(self) -> None:
        """What was held comes now."""
        self.is_feed_held = False
        held, self._held_pushes = self._held_pushes, []
        for push in held:
            self._feed_pushed(push)

    def _feed_pushed(self, push: list[Any]) -> None:
        if self.is_feed_held:
            self._held_pushes.append(push)
            return
        if push[0] == "fleet":
            self.work(lambda host: host.on_feed(push[1], push[2], push[3]))
        elif push[0] == "fleet_reset":
            self.work(lambda host: host.on_feed_reset(push[1], push[2]))

    def _upcall(self, token: int, method: str, args: dict[str, Any]) -> None:
        assert self.feed is not None, "worker 0 asks itself"
        self.feed.call(
            method,
            args,
            int(args["timeout_ms"]),
            lambda code, body: self.work(lambda host: host.on_upcall_answer(token, code, body)),
        )


def unpacked(body: Any) -> Any:
    """The value of a packed result."""
    return msgpack.unpackb(body, strict_map_key=False)

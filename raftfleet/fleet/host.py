"""The host of a shard: everything between the shard's members and the node's sockets, without the sockets.

This module does not know about sockets, files, clocks or threads; the loop in ``workers/shard.py`` (or a simulation)
brings messages, requests and the time, and carries out what :meth:`Host.finish` returns. Its duties:

* **Routing.** A client's request comes to the worker that owns the group's name. If the leader is here it is proposed;
  if the leader is elsewhere it is forwarded, many requests in one message; if no leader is known it is parked, and
  tried again when one is announced. A wrong guess goes round inside the node, never through the client.
* **Following the fleet's log.** Worker 0 holds the fleet group's member and feeds its siblings and the manager; each
  worker creates and drops members as that log says.
* **Announcing leaders** to the owning worker of every node, and writing this node's leader table.
* **Reconciling** the groups led here, one safe step at a time (:mod:`raftfleet.fleet.reconcile`).
* **Changing the fleet** (worker 0): import checks, the fleet command, and, for a removal, making sure that the old
  group has stopped before the caller is told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgpack

from raftfleet.core.codes import (
    ALREADY_ADDED,
    BAD_REQUEST,
    DROPPED,
    GONE_UID,
    GROUP_CHANGED,
    GROUP_NOT_FOUND,
    NO_LEADER,
    NOT_ACTIVE,
    NOT_IMPORTABLE,
    NOT_LEADER,
    OK,
    OUTCOME_UNKNOWN,
    OVERLOADED,
    PUSH,
    REFUSED,
    TOO_LARGE,
    UNANSWERED,
)
from raftfleet.core.config import GroupConfig
from raftfleet.core.context import CommandContext
from raftfleet.core.host_messages import (
    FORWARD,
    FORWARD_ANSWER,
    INTRODUCE,
    LEADERS,
    OP_COMMAND,
    OP_QUERY,
    RPC,
    RPC_ANSWER,
    Forward,
    ForwardAnswer,
    ForwardReply,
    ForwardRequest,
    Introduce,
    Leaders,
    Leadership,
    Rpc,
    RpcAnswer,
)
from raftfleet.core.member import CAUGHT_UP_ENTRIES, ConfigChangeRefused, Member
from raftfleet.core.names import FLEET_GROUP, FLEET_UID, check_group_name, shard_of
from raftfleet.core.progress import REPLICATE
from raftfleet.core.sessions import size_refusal
from raftfleet.core.shard import Shard, ShardSettings
from raftfleet.fleet.machine import FleetMachine, FleetState, Group, Node
from raftfleet.fleet.reconcile import (
    AddLearner,
    GroupView,
    Promote,
    Remove,
    Transfer,
    fleet_learners,
    fleet_voters,
    next_step,
)
from raftfleet.fleet.requests import (
    FROM_CLIENT,
    FROM_HOST,
    FROM_PEER,
    IN_A_LOG,
    ON_ITS_WAY,
    Request,
)

if TYPE_CHECKING:
    import random

HELLO_OP, COMMAND_OP, QUERY_OP, CALL_OP = 0, 1, 2, 3

OPEN_REQUESTS_MAX = 16_384
OPEN_BYTES_MAX = 64 << 20
RETRY_PARKED_US = 50_000
SWEEP_US = 10_000_000
RECONCILE_RETRY_US = 300_000
RECONCILE_PER_ROUND = 64
LEARNERS_AT_ONCE_MAX = 32
"""Groups led here that may be bringing in a learner at a time: each may cost a snapshot."""
PATIENCE_US = 10_000_000
"""A voter of the fleet group unheard for so long makes way for another node."""
ASK_WHO_LEADS_US = 250_000
IMPORT_CHECK_US = 3_000_000
DROP_WAIT_US = 1_000_000
FLEET_CONFIG = GroupConfig("raftfleet.fleet.machine:FleetMachine", log_entries_kept=4096)

MachineFactory = Callable[[GroupConfig], tuple[Any, Any]]


class RecordingFleetMachine(FleetMachine):
    """The fleet's machine, which also keeps the commands that took effect in the batch being applied, for the feed."""

    def __init__(self) -> None:
        super().__init__()
        self.executed: list[Any] = []

    def command(self, state: FleetState, arg: Any) -> tuple[Any, FleetState]:
        """Apply, then remember."""
        outcome = super().command(state, arg)
        self.executed.append(arg)
        return outcome


@dataclass
class Outputs:
    """What the loop has to carry out.

    Attributes:
        sends: messages by instance, leaving first.
        replies: ``connection -> [[id, code, body], ...]``.
        table: operations on the leader table: ``("leader", name, uid, term, node, instance)``,
            ``("leaderless", name, uid)``, ``("remove", name)``.
        addresses: ``instance -> (endpoint, public key)`` to be known from now on.
        forgotten: instances that are gone for good.
        upcalls: ``(token, method, args)`` for worker 0 of this node; answered with :meth:`Host.on_upcall_answer`.
        notes: lines for the log: ``(level, text)``.
        exit_fresh: this worker has left its fleet: end, and come back with a new instance.
    """

    sends: dict[int, list[Any]] = field(default_factory=dict)
    replies: dict[int, list[Any]] = field(default_factory=dict)
    table: list[tuple[Any, ...]] = field(default_factory=list)
    addresses: dict[int, tuple[str, str]] = field(default_factory=dict)
    forgotten: list[int] = field(default_factory=list)
    upcalls: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    exit_fresh: bool = False


@dataclass(frozen=True)
class HostSettings:
    """Who this worker is.

    Attributes:
        node: this node's name. index: of this worker. workers: how many there are.
        endpoint, public_key: how other shards reach this one.
        beat_interval_us: see :class:`raftfleet.core.shard.ShardSettings`.
    """

    node: str
    index: int
    workers: int
    endpoint: str
    public_key: str = ""
    beat_interval_us: int = 200_000


class Host:
    """See the module's text. One per worker process."""

    def __init__(self, instance: int, settings: HostSettings, rng: random.Random, make_machine: MachineFactory) -> None:
        self.instance = instance
        self.settings = settings
        self.rng = rng
        self.make_machine = make_machine
        self.shard = Shard(instance, rng, ShardSettings(beat_interval_us=settings.beat_interval_us))
        self.shard.may_create = self._recipe
        self.shard.is_dead = self._is_dead
        self.shard.node_of = self._node_of
        self.client_id = rng.getrandbits(128).to_bytes(16, "big")
        self.fleet_id = b""
        self.fleet = FleetState()
        self.fleet_index = 0
        self.fleet_known = False  # whether self.fleet holds a fleet's state at all
        self.leaders: dict[int, tuple[int, int]] = {}  # uid -> (term, instance)
        self.addresses: dict[int, tuple[str, str]] = {}
        self.counters: dict[str, int] = {}
        self._fleet_machine: RecordingFleetMachine | None = None
        self._known: dict[str, int] = {}  # name -> uid, of the groups whose name this worker owns
        self._dead_early: set[int] = set()
        self._open: dict[Request, None] = {}
        self._open_bytes = 0
        self._parked: dict[int, list[Request]] = {}
        self._checking: dict[str, list[Request]] = {}
        self._awaiting_feed: dict[str, list[Request]] = {}
        self._forwarded: dict[int, Request] = {}
        self._newest_forward: dict[int, int] = {}
        self._moved: dict[int, None] = {}
        self._asking: dict[int, None] = {}
        self._leaderless: dict[int, None] = {}
        self._guess_count = 0
        self._next_id = 1
        self._forwards: dict[int, list[ForwardRequest]] = {}
        self._answers: dict[int, list[ForwardReply]] = {}
        self._notices: dict[int, dict[int, Leadership]] = {}
        self._rpcs: dict[int, tuple[int, Callable[[int, Any], None]]] = {}
        self._upcalls: dict[int, Callable[[int, Any], None]] = {}
        self._watchers: dict[int, None] = {}
        self._reconcile: dict[int, None] = {}
        self._reconcile_later: dict[int, None] = {}
        self._pinned: dict[int, int] = {}
        self._catching_up: dict[int, int] = {}  # uid -> since when
        self._introduced: dict[int, int] = {}
        self._import_ok: dict[tuple[int, str, str | None], None] = {}
        self._delayed: list[tuple[int, Callable[[], None]]] = []
        self._next_retry_us = 0
        self._next_sweep_us = 0
        self._next_reconcile_us = 0
        self._out = Outputs()
        self._seq = 0
        self._acked = 0
        self._acked_ahead: set[int] = set()
        self._seen_node_version = -1
        self._founding_commands: list[Any] = []

    # ------------------------------------------------------------------ the loop

    def begin(self, now_us: int, wall_us: int) -> None:
        """Start an iteration."""
        self.shard.begin(now_us, wall_us)

    @property
    def now_us(self) -> int:
        """The iteration's monotonic time."""
        return self.shard.now_us

    def next_deadline_us(self) -> int:
        """When :meth:`tick` wants to be called next."""
        deadline_us = self.shard.next_deadline_us()
        if self._open or self._parked or self._rpcs or self._delayed or self._moved or self._leaderless:
            deadline_us = min(deadline_us, self._next_retry_us)
        if self._reconcile:
            deadline_us = min(deadline_us, self.now_us + 1000)
        return deadline_us

    def tick(self) -> None:
        """Timers of the shard, deadlines of requests, parked requests, reconciling."""
        shard = self.shard
        now_us = shard.now_us
        if now_us >= shard.next_deadline_us():
            shard.tick()
        if now_us >= self._next_retry_us:
            self._next_retry_us = now_us + RETRY_PARKED_US
            self._expire(now_us)
            if self._moved:
                self._follow_leaders()
            if self._leaderless:
                self._look_for_leaders()
            if self._parked:
                parked = self._parked
                self._parked = {}
                for requests in parked.values():
                    for request in requests:
                        if not request.done:
                            self._route(request, guess=True)
        if now_us >= self._next_reconcile_us:
            self._next_reconcile_us = now_us + RECONCILE_RETRY_US
            self._reconcile.update(self._reconcile_later)
            self._reconcile_later = {}
        if now_us >= self._next_sweep_us:
            self._next_sweep_us = now_us + SWEEP_US
            self._sweep()

    def _follow_leaders(self) -> None:
        """Requests that wait for the answer of a leader that was replaced go to the new one.

        A session answers a command that comes twice with what its first execution gave.
        """
        moved, self._moved = self._moved, {}
        for request in [r for r in self._forwarded.values() if r.uid in moved]:
            known = self.leaders.get(request.uid)
            if known is not None and known[1] != request.sent_to:
                self._forwarded.pop(request.forward_id, None)
                request.forward_id = 0
                request.maybe |= IN_A_LOG
                self._route(request)

    def _look_for_leaders(self) -> None:
        """Members that lost their leader and follow one again.

        The same one does not announce itself twice, and the notice of another may have come in the very turn in which
        the loss was told, and been undone by it.
        """
        for uid in list(self._leaderless):
            member = self.shard.members.get(uid)
            if member is None or member.lead is not None or uid in self.leaders:
                del self._leaderless[uid]
            elif member.leader:
                del self._leaderless[uid]
                self._learn_leader(uid, member.term, member.leader)

    def _expire(self, now_us: int) -> None:
        for request in [request for request in self._open if request.deadline_us <= now_us]:
            if request.forward_id:
                # Its leader may be dead without our knowing: the next request asks around.
                known = self.leaders.get(request.uid)
                if known is not None and known[1] == request.sent_to:
                    del self.leaders[request.uid]
            self._finish_request(request, request.overdue_code(), "no answer before the deadline")
        for request_id, (deadline_us, answer) in list(self._rpcs.items()):
            if deadline_us <= now_us:
                del self._rpcs[request_id]
                answer(NO_LEADER, "no answer before the deadline")
        for name, requests in list(self._awaiting_feed.items()):
            requests[:] = [request for request in requests if not request.done]
            if not requests:
                del self._awaiting_feed[name]
        due = [row for row in self._delayed if row[0] <= now_us]
        if due:
            self._delayed = [row for row in self._delayed if row[0] > now_us]
            for _, action in due:
                action()

    def _sweep(self) -> None:
        """Slowly, behind the events: reconcile all groups led here; start members that could not start."""
        for uid, member in self.shard.members.items():
            if member.lead is not None:
                self._reconcile[uid] = None
                if member.is_established:
                    self._announce(member)
        if self.fleet_known:
            for group in self.fleet.groups.values():
                self._maybe_create(group)
            for uid in [uid for uid in self._dead_early if self.fleet.is_dead_uid(uid)]:
                self._dead_early.discard(uid)
            for instance in [i for i in self._newest_forward if i in self.fleet.gone]:
                del self._newest_forward[instance]
        links = self.shard.links
        for peer in [peer for peer, link in links.items() if not link.in_use and peer not in self.addresses]:
            del links[peer]
            self._introduced.pop(peer, None)

    def flush(self) -> None:
        """Before sending: what the shard has to say, and what this host queued."""
        for uid in list(islice(self._reconcile, RECONCILE_PER_ROUND)) if self._reconcile else ():
            del self._reconcile[uid]
            self._reconcile_group(uid)
        self.shard.flush()

    def collect_sends(self) -> dict[int, list[Any]]:
        """Everything to be sent now, by instance. The caller sends it before :meth:`apply`."""
        sends = self.shard.take_sends()
        for peer, messages in self.shard.take_saved_sends().items():
            if peer in sends:
                sends[peer].extend(messages)
            else:
                sends[peer] = messages
        if self._forwards:
            for peer, requests in self._forwards.items():
                sends.setdefault(peer, []).append(Forward(FORWARD, requests))
            self._forwards = {}
        if self._answers:
            for peer, replies in self._answers.items():
                sends.setdefault(peer, []).append(ForwardAnswer(FORWARD_ANSWER, replies))
            self._answers = {}
        if self._notices:
            for peer, notices in self._notices.items():
                sends.setdefault(peer, []).append(Leaders(LEADERS, list(notices.values())))
            self._notices = {}
        if self._out.sends:
            for peer, messages in self._out.sends.items():
                sends.setdefault(peer, []).extend(messages)
            self._out.sends = {}
        for peer in sends:
            introduced_us = self._introduced.get(peer)
            if introduced_us is None or self.now_us - introduced_us > SWEEP_US:
                self._introduced[peer] = self.now_us
                settings = self.settings
                sends[peer].insert(0, Introduce(INTRODUCE, settings.node, settings.endpoint, settings.public_key))
        return sends

    def apply(self) -> None:
        """Apply, and hand out answers and events."""
        shard = self.shard
        shard.apply()

    def settle(self, now_us: int) -> Outputs:
        """After :meth:`apply`, with the clock read again: everything else that the loop has to carry out."""
        shard = self.shard
        shard.settle(now_us)
        for token, code, body in shard.take_replies():
            self._on_reply(token, code, body)  # type: ignore[arg-type]
        for event in shard.take_events():
            self._on_event(event)
        out = self._out
        self._out = Outputs(sends=out.sends)  # made while answering: they leave with the next collection
        out.sends = {}
        return out

    @property
    def has_work(self) -> bool:
        """Whether something waits to be sent or done without further input."""
        return bool(self.shard.has_work or self._forwards or self._answers or self._notices or self._out.sends)

    def finish(self) -> Outputs:
        """``flush``, ``collect_sends``, ``apply``, ``settle`` and a second collection, for simulations."""
        self.flush()
        sends = self.collect_sends()
        self.apply()
        out = self.settle(self.now_us)
        if self.has_work:
            self.shard.flush()
            for peer, messages in self.collect_sends().items():
                sends.setdefault(peer, []).extend(messages)
        out.sends = sends
        return out

    def note(self, level: str, text: str) -> None:
        """A line for the log."""
        self._out.notes.append((level, text))

    def open_counts(self) -> dict[str, int]:
        """How much waits, by where: all zero in a worker from which nobody wants anything."""
        return {
            "open": len(self._open),
            "open_bytes": self._open_bytes,
            "parked": sum(len(requests) for requests in self._parked.values()),
            "checking": sum(len(requests) for requests in self._checking.values()),
            "awaiting_feed": sum(len(requests) for requests in self._awaiting_feed.values()),
            "forwarded": len(self._forwarded),
            "rpcs": len(self._rpcs),
            "upcalls": len(self._upcalls),
            "delayed": len(self._delayed),
        }

    def count(self, what: str) -> None:
        """Count an occurrence."""
        self.counters[what] = self.counters.get(what, 0) + 1

    # ------------------------------------------------------------------ messages of other shards

    def receive(self, sender: int, messages: list[Any]) -> None:
        """Messages of another shard, decoded and checked."""
        self.shard.receive(sender, messages)
        for message in messages:
            kind = message[0]
            if kind < 64:
                continue
            if kind == FORWARD:
                self._on_forward(sender, message.requests)
            elif kind == FORWARD_ANSWER:
                self._on_forward_answer(sender, message.replies)
            elif kind == LEADERS:
                for uid, term, instance in message.leaders:
                    self._learn_leader(uid, term, instance)
            elif kind == RPC:
                self._on_rpc(sender, message)
            elif kind == RPC_ANSWER:
                waiting = self._rpcs.pop(message.request_id, None)
                if waiting is not None:
                    waiting[1](message.code, message.body)
            elif kind == INTRODUCE:
                if sender not in self.addresses:
                    self._set_address(sender, message.endpoint, message.public_key)

    def _set_address(self, instance: int, endpoint: str, public_key: str) -> None:
        if instance != self.instance and self.addresses.get(instance) != (endpoint, public_key):
            self.addresses[instance] = (endpoint, public_key)
            self._out.addresses[instance] = (endpoint, public_key)

    def _send(self, peer: int, message: Any) -> None:
        self._out.sends.setdefault(peer, []).append(message)

    # ------------------------------------------------------------------ requests of clients

    def on_client_request(self, connection: int, item: list[Any]) -> None:
        """One request, its form already checked: ``[id, op, ...]`` as in :mod:`raftfleet.wire.ipc`."""
        op = item[1]
        if op == COMMAND_OP:
            request_id, _, name, uid, timeout_ms, body = item
            deadline_us = self.now_us + timeout_ms * 1000
            request = Request(FROM_CLIENT, connection, request_id, OP_COMMAND, name, uid, deadline_us, 0, body)
            self._accept(request)
        elif op == QUERY_OP:
            request_id, _, name, uid, timeout_ms, consistency, body = item
            deadline_us = self.now_us + timeout_ms * 1000
            self._accept(
                Request(FROM_CLIENT, connection, request_id, OP_QUERY, name, uid, deadline_us, consistency, body)
            )
        elif op == CALL_OP:
            request_id, _, method, args, timeout_ms = item
            self._on_call(connection, request_id, method, args, timeout_ms)

    def on_disconnect(self, connection: int) -> None:
        """A client went away; what it asked goes on, unanswered."""
        self._watchers.pop(connection, None)

    def _reply(self, connection: int, request_id: int, code: int, body: Any) -> None:
        replies = self._out.replies.get(connection)
        if replies is None:
            self._out.replies[connection] = [[request_id, code, body]]
        else:
            replies.append([request_id, code, body])

    def _accept(self, request: Request) -> None:
        if not self.fleet_known and request.name != FLEET_GROUP:
            self._reply(
                request.source,
                request.request_id,
                NOT_ACTIVE,
                f"node {self.settings.node} is not in a fleet yet: see 'raftfleet-node status'",
            )
            return
        if len(self._open) >= OPEN_REQUESTS_MAX or self._open_bytes >= OPEN_BYTES_MAX:
            self.count("overloaded")
            self._answer(
                request,
                OVERLOADED,
                f"{len(self._open)} requests of {self._open_bytes} bytes are open in this worker (limits: "
                f"{OPEN_REQUESTS_MAX} and {OPEN_BYTES_MAX}); start the node with more --workers, or offer less load",
            )
            return
        self._open[request] = None
        self._open_bytes += len(request.body)
        self._route(request)

    def _finish_request(self, request: Request, code: int, body: Any) -> None:
        if request.done:
            return
        request.done = True
        if request.maybe & IN_A_LOG and NO_LEADER <= code <= UNANSWERED and request.op == OP_COMMAND:
            # What became of the last try is known, but an earlier one was in a log.
            code, body = OUTCOME_UNKNOWN, f"it was in the log of a leader that was deposed; then: {body}"
        if request in self._open:
            del self._open[request]
            self._open_bytes -= len(request.body)
        if request.forward_id:
            self._forwarded.pop(request.forward_id, None)
            request.forward_id = 0
        self._answer(request, code, body)

    def _answer(self, request: Request, code: int, body: Any) -> None:
        if request.origin == FROM_CLIENT:
            self._reply(request.source, request.request_id, code, body)
        elif request.origin == FROM_PEER:
            self._answers.setdefault(request.source, []).append(ForwardReply(request.request_id, code, body))
        elif request.answer is not None:
            request.answer(code, body)

    def _route(self, request: Request, *, guess: bool = False) -> None:
        """Bring a request one step further: to a member here, over a link, or into a waiting room."""
        name = request.name
        if name == FLEET_GROUP:
            uid = FLEET_UID
        else:
            group = self.fleet.by_name.get(name)
            if group is None or group.uid in self._dead_early:
                self._check_name(request)
                return
            uid = group.uid
            if request.uid != uid:
                if request.uid:
                    self._group_changed(request)
                    return
                request.uid = uid
            if request.op == OP_COMMAND:
                refusal = size_refusal(name, len(request.body), group.config["command_bytes_max"])
                if refusal is not None:
                    self._finish_request(request, TOO_LARGE, refusal)
                    return
        member = self.shard.members.get(uid)
        if member is not None:
            if member.lead is not None:
                if request.op == OP_COMMAND:
                    request.maybe |= ON_ITS_WAY
                    member.propose(request.body, request)
                    return
                if not request.consistency:
                    request.maybe |= ON_ITS_WAY
                    member.read(request.body, request)
                    return
            if request.consistency and request.op == OP_QUERY and member.applied:
                self._finish_request(request, *member.evaluate(request.body))
                return
        leader = 0
        if member is not None and member.leader != self.instance:
            leader = member.leader
        if not leader:
            known = self.leaders.get(uid)
            if known is not None and known[1] != self.instance:
                leader = known[1]
        request.attempts += guess
        if request.consistency and request.op == OP_QUERY:
            if not leader or request.attempts % 2:
                leader = self._guess(uid)  # any member will do
        elif (not leader and (member is None or request.attempts > 4)) or (guess and request.attempts % 2 == 0):
            self._ask_who_leads(uid)
        if leader:
            self._forward(request, leader)
        else:
            self._parked.setdefault(uid, []).append(request)

    def _ask_who_leads(self, uid: int) -> None:
        """Ask some member, one at a time. The requests themselves wait meanwhile.

        They are sent only to whom somebody holds for the leader: one that was sent to a guess, and got no answer, could
        not be told any more that it was not applied.
        """
        if uid in self._asking:
            return
        instance = self._guess(uid)
        if not instance:
            return
        self._asking[uid] = None

        def answered(code: int, body: Any) -> None:
            self._asking.pop(uid, None)
            if code == GONE_UID:
                for request in self._parked.pop(uid, ()):
                    if not request.done:
                        self._dead_uid_met(request)
            elif code == OK and body[0] and body[0] != self.instance:
                self._learn_leader(uid, body[1], body[0])

        self.rpc(instance, "who_leads", {"uid": uid}, answered, ASK_WHO_LEADS_US)

    def _guess(self, uid: int) -> int:
        """Some member of the group, each time another: it will say who leads."""
        if uid == FLEET_UID:
            candidates = [node.instances[0] for node in self.fleet.nodes.values()]
        else:
            group = self.fleet.groups.get(uid)
            if group is None:
                return 0
            candidates = [instance for _, instance in self.fleet.desired(group)]
            candidates += [instance for _, instance in group.members if instance not in candidates]
        candidates = [i for i in candidates if i != self.instance and i not in self.fleet.gone]
        if not candidates:
            return 0
        # Another one each time, over all requests: the first may be the very node that is down.
        self._guess_count += 1
        return candidates[self._guess_count % len(candidates)]

    def _forward(self, request: Request, instance: int) -> None:
        request_id = self._next_id
        self._next_id += 1
        self._forwarded[request_id] = request
        request.forward_id = request_id
        request.sent_to = instance
        timeout_ms = max(1, (request.deadline_us - self.now_us) // 1000)
        item = ForwardRequest(request_id, request.op, request.uid, timeout_ms, request.consistency, request.body)
        queue = self._forwards.get(instance)
        if queue is None:
            self._forwards[instance] = [item]
        else:
            queue.append(item)
        request.maybe |= ON_ITS_WAY

    def _on_forward(self, sender: int, requests: list[ForwardRequest]) -> None:
        members = self.shard.members
        now_us = self.now_us
        # A request is taken once: should a network bring one again, later, it may find a leader where the first found
        # none, and the client was told by then that nothing happened. Ids of one sender rise.
        newest_id = self._newest_forward.get(sender, 0)
        for request_id, op, uid, timeout_ms, consistency, body in requests:
            if request_id <= newest_id:
                self.count("forwards_repeated")
                continue
            self._newest_forward[sender] = newest_id = request_id
            member = members.get(uid)
            if member is None:
                answer = (GONE_UID, None) if self._is_dead(uid) else (NOT_LEADER, [0, 0])
                self._answers.setdefault(sender, []).append(ForwardReply(request_id, *answer))
                continue
            deadline_us = now_us + timeout_ms * 1000
            request = Request(FROM_PEER, sender, request_id, op, member.name, uid, deadline_us, consistency, body)
            if member.lead is None:
                if consistency and op == OP_QUERY and member.applied:
                    self._answer(request, *member.evaluate(body))
                else:
                    self._answer(request, NOT_LEADER, [member.leader, member.term])
                continue
            if len(self._open) >= OPEN_REQUESTS_MAX or self._open_bytes >= OPEN_BYTES_MAX:
                self.count("overloaded")
                self._answer(request, OVERLOADED, f"the leader's worker on node {self.settings.node} is full")
                continue
            self._open[request] = None
            self._open_bytes += len(body)
            request.maybe = ON_ITS_WAY  # should its deadline pass here: the sender is told no more than is known
            if op == OP_COMMAND:
                member.propose(body, request)
            else:
                member.read(body, request)

    def _on_forward_answer(self, sender: int, replies: list[ForwardReply]) -> None:
        for request_id, code, body in replies:
            request = self._forwarded.pop(request_id, None)
            if request is None:
                continue
            request.forward_id = 0
            if code == NOT_LEADER:
                request.maybe &= ~ON_ITS_WAY
                self._on_wrong_guess(request, sender, body)
            elif code == DROPPED:
                request.maybe |= IN_A_LOG
                self._parked.setdefault(request.uid, []).append(request)
            elif code == GONE_UID:
                request.maybe &= ~ON_ITS_WAY
                self._dead_uid_met(request)
            else:
                self._finish_request(request, code, body)

    def _on_wrong_guess(self, request: Request, sender: int, body: Any) -> None:
        uid = request.uid
        known = self.leaders.get(uid)
        if known is not None and known[1] == sender:
            del self.leaders[uid]
        leader = body[0] if isinstance(body, (list, tuple)) and len(body) == 2 and type(body[0]) is int else 0
        if leader and leader not in (sender, self.instance) and request.attempts < 8:
            request.attempts += 2
            self._forward(request, leader)
        else:
            self._parked.setdefault(uid, []).append(request)

    def _dead_uid_met(self, request: Request) -> None:
        """The group that this node believes in was removed: ask the fleet's leader what the name means now."""
        if request.uid in self.fleet.groups:
            self._dead_early.add(request.uid)
        self._check_name(request)

    def _on_reply(self, request: Request, code: int, body: Any) -> None:
        """The shard's answer to something that was proposed or read here."""
        if request.done:
            return
        if request.origin == FROM_PEER:
            if code in (NOT_LEADER, DROPPED) and isinstance(body, tuple):
                body = list(body)
            self._finish_request(request, code, body)
        elif code in (NOT_LEADER, DROPPED):
            if code == NOT_LEADER:
                request.maybe &= ~ON_ITS_WAY  # it never entered a log
            else:
                request.maybe |= IN_A_LOG
            self._parked.setdefault(request.uid, []).append(request)
        elif code == GONE_UID:
            request.maybe &= ~ON_ITS_WAY  # it waited in front of the log
            self._check_name(request)
        else:
            self._finish_request(request, code, body)

    # ------------------------------------------------------------------ names that are not known here

    def _check_name(self, request: Request) -> None:
        """This node has not heard of the group: maybe the fleet has."""
        if request.uid and self._is_dead(request.uid):
            if request.given_uid or (request.maybe and request.op == OP_COMMAND):
                self._group_changed(request)
                return
            request.uid = 0
        waiting = self._checking.get(request.name)
        if waiting is not None:
            waiting.append(request)
            return
        self._checking[request.name] = [request]
        name = request.name
        self.ask_fleet(["group", name], lambda code, body: self._name_checked(name, code, body))

    def _group_changed(self, request: Request) -> None:
        """The group that was meant is no more. Never done on to its successor of the same name by this node."""
        if request.maybe and request.op == OP_COMMAND:
            self._finish_request(
                request, OUTCOME_UNKNOWN, f"group {request.name} was removed while this command was under way"
            )
        else:
            self._finish_request(request, GROUP_CHANGED, f"group {request.name} is not the one that it was")

    def _name_checked(self, name: str, code: int, body: Any) -> None:
        requests = self._checking.pop(name, [])
        if code == OK:
            uid = body.get("uid") if isinstance(body, dict) else None
            group = self.fleet.by_name.get(name)
            here = group is not None and group.uid == uid
            for request in requests:
                if request.done:
                    continue
                if here:
                    self._route(request)
                else:
                    self._awaiting_feed.setdefault(name, []).append(request)
            return
        for request in requests:
            if code == GROUP_NOT_FOUND:
                self._finish_request(request, GROUP_NOT_FOUND, f"there is no consensus group {name!r}")
            else:
                self._finish_request(request, request.overdue_code(), f"the fleet group gave no answer: {body}")

    def ask_fleet(self, query: list[Any], answer: Callable[[int, Any], None], *, timeout_us: int = 2_000_000) -> None:
        """A linearizable query to the fleet group; ``answer(code, value)``."""
        if self.settings.index != 0:
            token = self._next_id
            self._next_id += 1
            self._upcalls[token] = answer
            args = {"query": query, "stale": False, "timeout_ms": timeout_us // 1000}
            self._out.upcalls.append((token, "fleet_query", args))
            return
        self._fleet_request(OP_QUERY, msgpack.packb(query), timeout_us, answer)

    def on_upcall_answer(self, token: int, code: int, body: Any) -> None:
        """Worker 0's answer to one of :attr:`Outputs.upcalls`."""
        answer = self._upcalls.pop(token, None)
        if answer is not None:
            answer(code, body)

    def _fleet_request(
        self, op: int, body: bytes, timeout_us: int, answer: Callable[[int, Any], None], *, stale: bool = False
    ) -> None:
        """A request to the fleet group from this worker (0) itself."""

        def answered(code: int, packed: Any) -> None:
            if code == OK:
                answer(OK, msgpack.unpackb(packed, raw=False, strict_map_key=False))
            elif isinstance(packed, list) and len(packed) == 2 and packed[0] == "FleetRefused":
                number, _, message = str(packed[1]).partition(":")
                answer(int(number) if number.isdigit() else REFUSED, message)
            else:
                answer(code, packed)

        deadline_us = self.now_us + timeout_us
        self._accept(Request(FROM_HOST, 0, 0, op, FLEET_GROUP, 0, deadline_us, int(stale), body, answered))

    def _fleet_command(self, command: Any, timeout_us: int, answer: Callable[[int, Any], None]) -> None:
        """A command to the fleet group, exactly once."""
        self._seq += 1
        seq = self._seq
        arg = msgpack.packb(command, use_bin_type=True)
        body = msgpack.packb([self.client_id, seq, self._acked, self.shard.wall_us, arg])

        def answered(code: int, value: Any) -> None:
            self._acked_ahead.add(seq)
            while self._acked + 1 in self._acked_ahead:
                self._acked += 1
                self._acked_ahead.discard(self._acked)
            answer(code, value)

        self._fleet_request(OP_COMMAND, body, timeout_us, answered)

    # ------------------------------------------------------------------ the fleet's log

    def set_fleet(self, fleet_id: bytes) -> None:
        """This worker belongs to that fleet from now on."""
        assert not self.fleet_id or self.fleet_id == fleet_id
        self.fleet_id = fleet_id

    def start_fleet(self, voters: tuple[int, ...], commands: list[Any], *, campaign: bool) -> None:
        """Worker 0 of a founding node: start the fleet group's member. Its first leader proposes ``commands``."""
        self._founding_commands = commands
        if FLEET_UID not in self.shard.members:
            self._listen_to_fleet()
            machine = self._new_fleet_machine()
            self.shard.create_group(FLEET_UID, FLEET_GROUP, FLEET_CONFIG, machine, voters, campaign=campaign)

    def _new_fleet_machine(self) -> RecordingFleetMachine:
        self._fleet_machine = RecordingFleetMachine()
        self._fleet_machine.context = CommandContext()
        return self._fleet_machine

    def _listen_to_fleet(self) -> None:
        self.shard.applied_listener[FLEET_UID] = self._on_fleet_applied
        self.shard.restored_listener[FLEET_UID] = self._on_fleet_restored

    def _recipe(self, uid: int) -> tuple[str, GroupConfig, Any, Any] | None:
        """What a leader's first message to a new member here needs: name, config, machine, hook."""
        if uid == FLEET_UID:
            if self.settings.index != 0 or not self.fleet_id:
                return None
            self._listen_to_fleet()
            return FLEET_GROUP, FLEET_CONFIG, self._new_fleet_machine(), None
        group = self.fleet.group_of_uid(uid)
        if group is None or uid in self._dead_early:
            return None
        made = self._make_machine(group)
        return (group.name, group.group_config(), *made) if made is not None else None

    def _make_machine(self, group: Group) -> tuple[Any, Any] | None:
        try:
            return self.make_machine(group.group_config())
        except Exception as error:
            self.count("not_importable")
            self.note("error", f"group {group.name}: cannot start a member here: {type(error).__name__}: {error}")
            return None

    def _is_dead(self, uid: int) -> bool:
        return uid in self._dead_early or (self.fleet_known and self.fleet.is_dead_uid(uid))

    def _node_of(self, instance: int) -> str:
        home = self.fleet.instance_home(instance)
        return home[0] if home is not None else f"instance {instance:x}"

    def _on_fleet_applied(self, index: int, time_us: int, commands: list[bytes]) -> None:
        """Worker 0: the fleet member applied a batch."""
        machine = self._fleet_machine
        member = self.shard.members[FLEET_UID]
        assert machine is not None
        executed = machine.executed
        machine.executed = []
        self.fleet = member.state
        self.fleet_index = index
        if not executed:
            return
        epoch = machine.context.epoch
        self._fleet_changed(executed)
        if self._watchers:
            packed = [msgpack.packb(command, use_bin_type=True) for command in executed]
            for connection in self._watchers:
                self._reply(connection, 0, PUSH, ["fleet", index, packed, epoch])

    def _on_fleet_restored(self) -> None:
        """Worker 0: a snapshot replaced the fleet's state."""
        member = self.shard.members[FLEET_UID]
        if self._fleet_machine is not None:
            self._fleet_machine.executed = []
        self.fleet = member.state
        self.fleet_index = member.applied
        self._fleet_replaced()
        state = self.fleet.dump()
        for connection in self._watchers:
            self._reply(connection, 0, PUSH, ["fleet_reset", self.fleet_index, state])

    def on_feed(self, index: int, commands: list[bytes], epoch: int) -> None:
        """Other workers: commands of the fleet's log, as worker 0 applied them."""
        if index <= self.fleet_index:
            return
        executed = [msgpack.unpackb(command, raw=False, strict_map_key=False) for command in commands]
        for command in executed:
            self.fleet.apply(command, epoch)
        self.fleet_index = index
        self._fleet_changed(executed)

    def on_feed_reset(self, index: int, state: bytes) -> None:
        """Other workers: the whole state of the fleet. An older one than is known is not taken."""
        fleet = FleetState.load(state)
        if self.fleet_known and (fleet.epoch, index) < (self.fleet.epoch, self.fleet_index):
            return
        self.fleet = fleet
        self.fleet_index = index
        self._fleet_replaced()

    def _fleet_replaced(self) -> None:
        self._seen_node_version = -1
        self.fleet_known = bool(self.fleet.fleet_id)
        for name, uid in list(self._known.items()):
            group = self.fleet.by_name.get(name)
            if group is None or group.uid != uid:
                self._group_removed(name, uid)
        for uid in [uid for uid in self.shard.members if uid != FLEET_UID and uid not in self.fleet.groups]:
            self.shard.remove_group(uid)
        for group in self.fleet.groups.values():
            self._group_added(group)
        self._nodes_changed()

    def _fleet_changed(self, executed: list[Any]) -> None:
        self.fleet_known = bool(self.fleet.fleet_id)
        for command in executed:
            what = command[0]
            if what == "add_group":
                group = self.fleet.by_name.get(command[1])
                if group is not None:
                    self._group_added(group)
            elif what == "remove_group":
                uid = self._known.get(command[1])
                group = self.fleet.by_name.get(command[1])
                if uid is not None and (group is None or group.uid != uid):
                    self._group_removed(command[1], uid)
            elif what == "renew_group":
                self._group_renewed(command[1])
            elif what == "change_config":
                self._config_changed(command[1])
        if self.fleet.node_version != self._seen_node_version:
            self._nodes_changed()

    def _nodes_changed(self) -> None:
        self._seen_node_version = self.fleet.node_version
        for node in self.fleet.nodes.values():
            for index, instance in enumerate(node.instances):
                self._set_address(instance, node.endpoint(index), node.public_key)
        for instance, why in self.fleet.gone.items():
            if instance not in self.shard.gone:
                self.shard.gone[instance] = why
            if instance in self.addresses:
                del self.addresses[instance]
                self._out.forgotten.append(instance)
        self._pinned = {}
        for uid, member in self.shard.members.items():
            if member.lead is not None:
                self._reconcile[uid] = None
                if member.is_established:
                    self._announce(member)

    def _owns(self, name: str) -> bool:
        return shard_of(name, self.settings.workers) == self.settings.index

    def _group_added(self, group: Group) -> None:
        name = group.name
        if not self._owns(name) or self._known.get(name) == group.uid:
            return
        self._known[name] = group.uid
        known = self.leaders.get(group.uid)
        if known is not None:
            self._table_leader(name, group.uid, *known)
        else:
            self._out.table.append(("leaderless", name, group.uid))
        self._maybe_create(group)
        for request in self._awaiting_feed.pop(name, ()):
            if not request.done:
                self._route(request)

    def _maybe_create(self, group: Group) -> None:
        """Start the first member that the fleet's log gives to this worker."""
        uid = group.uid
        if uid in self.shard.members or uid in self.shard.tombstones or uid in self._dead_early:
            return
        instances = tuple(instance for _, instance in group.members)
        if self.instance not in instances:
            return
        made = self._make_machine(group)
        if made is not None:
            machine, hook = made
            self.shard.create_group(
                uid,
                group.name,
                group.group_config(),
                machine,
                instances,
                campaign=instances[0] == self.instance,
                hook=hook,
            )

    def _group_removed(self, name: str, uid: int) -> None:
        if self._known.get(name) == uid:
            del self._known[name]
            self._out.table.append(("remove", name, uid))
        self.shard.remove_group(uid)
        self.leaders.pop(uid, None)
        self._dead_early.discard(uid)
        for table in (self._reconcile, self._reconcile_later, self._pinned, self._catching_up):
            table.pop(uid, None)
        for request in self._parked.pop(uid, ()):
            if not request.done:
                self._check_name(request)

    def _group_renewed(self, uid: int) -> None:
        for name in [name for name, known in self._known.items() if known == uid]:
            self._group_removed(name, uid)
            group = self.fleet.by_name.get(name)
            if group is not None:
                self._group_added(group)

    def _renew(self, uid: int, dead: list[int]) -> None:
        """A group here has lost its majority for good, and its config says to begin anew then."""

        def answered(code: int, body: Any) -> None:
            self.note("warning", f"group {self._name(uid)}: majority lost, begun anew: {body}")

        command = ["renew_group", uid, dead]
        if self.settings.index == 0:
            self._fleet_command(command, 5_000_000, answered)
        else:
            token = self._next_id
            self._next_id += 1
            self._upcalls[token] = answered
            self._out.upcalls.append((token, "fleet_command", {"command": command, "timeout_ms": 5000}))

    def _config_changed(self, name: str) -> None:
        group = self.fleet.by_name.get(name)
        if group is None:
            return
        member = self.shard.members.get(group.uid)
        if member is not None:
            config = group.group_config()
            member.config = config
            member.election_timeout_us = int(config.election_timeout_s * 1_000_000)
            made = self._make_machine(group)
            if made is not None:
                member.hook = made[1]

    # ------------------------------------------------------------------ events of the shard

    def _on_event(self, event: tuple[Any, ...]) -> None:
        kind, uid = event[0], event[1]
        member = self.shard.members.get(uid)
        if kind == "leader":
            if member is not None and member.lead is not None:
                self._learn_leader(uid, member.term, self.instance)
                self._announce(member)
                self._reconcile[uid] = None
                if uid == FLEET_UID and not self.fleet_known:
                    for command in self._founding_commands:  # done twice, the second is without effect
                        self._fleet_command(command, 5_000_000, lambda code, body: None)
        elif kind in ("caught_up", "config", "transfer_failed"):
            self._reconcile[uid] = None
            if kind == "caught_up":
                self._catching_up.pop(uid, None)
        elif kind == "leaderless":
            self._lost_leader(uid)
        elif kind == "stepped_down":
            self._catching_up.pop(uid, None)
            self._lost_leader(uid)
        elif kind == "member_gone" and uid == FLEET_UID:
            self.note("warning", "this node was removed from its fleet")
            self._out.exit_fresh = True
        elif kind == "violation":
            self.count("violations")
            self.note("error", f"group uid {uid}: {event[2]}")
        elif kind == "hook_failed":
            self.count("hook_failures")
            self.note("error", f"group {self._name(uid)}: hook {event[2]} raised {event[3]}")
        elif kind == "snapshot_failed":
            self.count("snapshot_failures")
            self.note("error", f"group {self._name(uid)}: its state could not be dumped or loaded: {event[2]}")
        elif kind == "majority_lost":
            self._renew(uid, event[2])
        elif kind == "recovered":
            self.note("warning", f"group {self._name(uid)}: majority lost and declared dead; went on: {event[2]}")

    def _name(self, uid: int) -> str:
        member = self.shard.members.get(uid)
        return member.name if member is not None else f"uid {uid}"

    def _lost_leader(self, uid: int) -> None:
        member = self.shard.members.get(uid)
        self.leaders.pop(uid, None)
        if member is not None:
            self._leaderless[uid] = None
            self._out.table.append(("leaderless", member.name, uid))

    def _learn_leader(self, uid: int, term: int, instance: int) -> None:
        known = self.leaders.get(uid)
        if known is not None and known[0] > term:
            return
        if known != (term, instance):
            self.leaders[uid] = (term, instance)
            if self._forwarded:
                self._moved[uid] = None
            group = self.fleet.groups.get(uid)
            if group is not None:
                if self._known.get(group.name) == uid:
                    self._table_leader(group.name, uid, term, instance)
            elif uid == FLEET_UID:
                self._table_leader(FLEET_GROUP, uid, term, instance)
            elif not self._is_dead(uid):
                pass  # announced before the fleet's log told of it; used when it does
            else:
                del self.leaders[uid]
        waiting = self._parked.pop(uid, None)
        if waiting:
            for request in waiting:
                if not request.done:
                    self._route(request)

    def _table_leader(self, name: str, uid: int, term: int, instance: int) -> None:
        node = self.settings.node if instance == self.instance else self._node_of(instance)
        self._out.table.append(("leader", name, uid, term, node, instance))

    def _announce(self, member: Member) -> None:
        """Tell the owning worker of every node who leads."""
        notice = Leadership(member.uid, member.term, self.instance)
        for node in self.fleet.nodes.values():
            instance = node.instances[shard_of(member.name, len(node.instances))]
            if instance != self.instance:
                self._notices.setdefault(instance, {})[member.uid] = notice

    # ------------------------------------------------------------------ reconciling

    def _view(self, member: Member) -> GroupView:
        lead = member.lead
        assert lead is not None
        caught_up = {self.instance}
        for peer, progress in lead.progress.items():
            if progress.state == REPLICATE and progress.match + CAUGHT_UP_ENTRIES >= member.commit:
                caught_up.add(peer)
        pending = bool(lead.config_index or lead.transfer_target) or member.commit < lead.noop_index
        return GroupView(
            member.uid,
            self.instance,
            member.voters,
            member.learners,
            frozenset(caught_up),
            member.live_members(),
            pending,
        )

    def _reconcile_group(self, uid: int) -> None:
        """One safe step for a group led here; comes back when the step has had its effect."""
        member = self.shard.members.get(uid)
        if member is None or member.lead is None or not self.fleet_known:
            return
        view = self._view(member)
        since_us = self._catching_up.get(uid)
        if since_us is not None and (
            not view.learners
            or (self.now_us - since_us > PATIENCE_US and not any(learner in view.live for learner in view.learners))
        ):
            del self._catching_up[uid]  # it came to nothing, or is not heard and costs no snapshot
        learners: list[int] = []
        if uid == FLEET_UID:
            desired = fleet_voters(self.fleet, view.voters, self._patiently_live(member), self.instance)
            learners = fleet_learners(self.fleet, desired)
        else:
            group = self.fleet.group_of_uid(uid)
            if group is None:
                return
            desired = [instance for _, instance in self.fleet.desired(group)]
        step = next_step(view, desired, self.fleet.is_current, learners)
        if step is None:
            settled = set(desired) == set(view.voters) and set(learners) == set(view.learners)
            if view.pending or not settled or (uid != FLEET_UID and desired and desired[0] != self.instance):
                if not (settled and uid in self._pinned):
                    self._reconcile_later[uid] = None
            return
        try:
            self._take_step(member, step)
        except ConfigChangeRefused as refusal:
            self.count("steps_refused")
            self.note("debug", f"group {member.name}: {step} refused: {refusal}")
            self._reconcile_later[uid] = None

    def _patiently_live(self, member: Member) -> set[int]:
        lead = member.lead
        assert lead is not None
        horizon_us = self.now_us - PATIENCE_US
        if lead.elected_us > horizon_us:
            return {node.instances[0] for node in self.fleet.nodes.values()}
        live = {self.instance}
        for peer, progress in lead.progress.items():
            if member.confirmed_stamp(peer, progress) > horizon_us:
                live.add(peer)
        return live

    def _take_step(self, member: Member, step: AddLearner | Promote | Remove | Transfer) -> None:
        uid = member.uid
        if isinstance(step, AddLearner):
            if uid != FLEET_UID:
                if len(self._catching_up) >= LEARNERS_AT_ONCE_MAX and uid not in self._catching_up:
                    self._reconcile_later[uid] = None
                    return
                self._catching_up.setdefault(uid, self.now_us)
            member.add_learner(step.instance)
        elif isinstance(step, Promote):
            member.promote(step.instance)
        elif isinstance(step, Remove):
            if uid == FLEET_UID and step.instance in member.voters and self.fleet.is_current(step.instance):
                member.demote(step.instance)
            else:
                member.remove(step.instance)
        else:
            if (
                uid in self._pinned
                and step.instance not in member.learners
                and self.instance in (instance for _, instance in self.fleet.desired(self.fleet.groups[uid]))
            ):
                return  # an operator chose this leader
            member.transfer(step.instance)
            self._reconcile_later[uid] = None

    def drain(self) -> None:
        """Hand each leadership over to the voter that lacks least (under load none is ever quite level)."""
        for member in list(self.shard.members.values()):
            lead = member.lead
            if lead is None:
                continue
            live = member.live_members()
            heirs = [voter for voter in member.voters if voter in live and voter != self.instance]
            try:
                if heirs:
                    member.transfer(max(heirs, key=lambda voter: lead.progress[voter].match))
            except ConfigChangeRefused:
                pass

    @property
    def is_draining(self) -> bool:
        """Whether a leadership that :meth:`drain` hands over is still on its way."""
        return any(m.lead is not None and m.lead.transfer_target for m in self.shard.members.values())

    def step_down_all(self) -> None:
        """Lead nothing any more, and say so."""
        for member in list(self.shard.members.values()):
            member.step_down()

    # ------------------------------------------------------------------ calls between shards

    def rpc(
        self, instance: int, method: str, args: dict[str, Any], answer: Callable[[int, Any], None], timeout_us: int
    ) -> None:
        """Call another shard (or this one); ``answer(code, body)`` comes once."""
        if instance == self.instance:
            self._run_rpc(method, args, answer)
            return
        request_id = self._next_id
        self._next_id += 1
        self._rpcs[request_id] = (self.now_us + timeout_us, answer)
        self._send(instance, Rpc(RPC, request_id, method, args))

    def _on_rpc(self, sender: int, message: Rpc) -> None:
        request_id = message.request_id
        self._run_rpc(
            message.method,
            message.args,
            lambda code, body: self._send(sender, RpcAnswer(RPC_ANSWER, request_id, code, body)),
        )

    def _run_rpc(self, method: str, args: dict[str, Any], answer: Callable[[int, Any], None]) -> None:
        try:
            if method == "import_check":
                answer(*self._rpc_import_check(args))
            elif method == "drop_group":
                uid = int(args["uid"])
                if uid == FLEET_UID:
                    raise ValueError("the fleet group is not dropped")
                if not self.fleet.is_dead_uid(uid):
                    self._dead_early.add(uid)
                self.shard.remove_group(uid)
                answer(OK, {})
            elif method == "who_leads":
                answer(*self._rpc_who_leads(int(args["uid"])))
            elif method == "group_status":
                answer(*self._rpc_group_status(int(args["uid"])))
            elif method == "transfer":
                answer(*self._rpc_transfer(int(args["uid"]), int(args["instance"])))
            elif method == "pin":
                self._pinned[int(args["uid"])] = self.now_us
                answer(OK, {})
            else:
                answer(BAD_REQUEST, f"there is no call {method!r:.100}")
        except (KeyError, ValueError, TypeError) as error:
            answer(BAD_REQUEST, f"{method}: {type(error).__name__}: {error}")

    def _rpc_import_check(self, args: dict[str, Any]) -> tuple[int, Any]:
        config = GroupConfig.from_dict(args["config"])
        try:
            machine, _ = self.make_machine(config)
            machine.dump(machine.new())
        except Exception as error:
            return NOT_IMPORTABLE, [self.settings.node, f"{type(error).__name__}: {error}"]
        return OK, {}

    def _rpc_who_leads(self, uid: int) -> tuple[int, Any]:
        if self._is_dead(uid):
            return GONE_UID, None
        member = self.shard.members.get(uid)
        return OK, [member.leader, member.term] if member is not None else [0, 0]

    def _rpc_group_status(self, uid: int) -> tuple[int, Any]:
        member = self.shard.members.get(uid)
        if member is None or member.lead is None:
            known = self.leaders.get(uid)
            hint = member.leader if member is not None else (known[1] if known else 0)
            return NOT_LEADER, [hint, member.term if member is not None else 0]
        lead = member.lead
        live = member.live_members()
        rows = []
        for instance in member.membership.lives:
            progress = lead.progress.get(instance)
            rows.append(
                {
                    "node": self.settings.node if instance == self.instance else self._node_of(instance),
                    "instance": instance,
                    "role": "voter" if instance in member.voters else "learner",
                    "match": member.last_index if progress is None else progress.match,
                    "unresponsive": instance not in live,
                }
            )
        return OK, {
            "name": member.name,
            "uid": uid,
            "leader": self.settings.node,
            "term": member.term,
            "commit": member.commit,
            "applied": member.applied,
            "last_index": member.last_index,
            "members": rows,
            "unresponsive": [row["node"] for row in rows if row["unresponsive"]],
            "sessions": len(member.session_table.by_client),
            "audit": member.membership.audit,
        }

    def _rpc_transfer(self, uid: int, instance: int) -> tuple[int, Any]:
        member = self.shard.members.get(uid)
        if member is None or member.lead is None:
            return NOT_LEADER, [member.leader if member is not None else 0, 0]
        try:
            member.transfer(instance)
        except ConfigChangeRefused as refusal:
            return REFUSED, str(refusal)
        return OK, {}

    # ------------------------------------------------------------------ calls of the manager and of sibling workers

    def _on_call(self, connection: int, request_id: int, method: str, args: dict[str, Any], timeout_ms: int) -> None:
        def answer(code: int, body: Any) -> None:
            self._reply(connection, request_id, code, body)

        handler = _CALLS.get(method)
        if handler is None:
            answer(BAD_REQUEST, f"a worker has no call {method!r:.100}")
            return
        try:
            handler(self, connection, args, timeout_ms * 1000, answer)
        except (KeyError, ValueError, TypeError) as error:
            answer(BAD_REQUEST, f"{method}: {type(error).__name__}: {error}")

    def _call_shard_info(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        members = self.shard.members
        known = self.leaders.get(FLEET_UID)
        fleet_member = members.get(FLEET_UID)
        answer(
            OK,
            {
                "index": self.settings.index,
                "instance": self.instance,
                "endpoint": self.settings.endpoint,
                "members": sum(uid != FLEET_UID for uid in members),
                "leaders": sum(uid != FLEET_UID and member.lead is not None for uid, member in members.items()),
                "fleet": self.fleet_id or None,
                "fleet_index": self.fleet_index,
                "fleet_leader": (fleet_member.leader if fleet_member is not None else 0) or (known[1] if known else 0),
                "fleet_leads": bool(fleet_member is not None and fleet_member.is_established),
                "fleet_known": self.fleet_known,
                "fleet_voters": list(fleet_member.voters) if fleet_member is not None else [],
                "counters": dict(self.counters),
            },
        )

    def _call_set_fleet(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        fleet_id = args["fleet"]
        if type(fleet_id) is not bytes or len(fleet_id) != 16:
            raise ValueError("a fleet id has 16 bytes")
        if self.fleet_id and self.fleet_id != fleet_id:
            answer(REFUSED, f"this worker is in fleet {self.fleet_id.hex()}")
            return
        self.set_fleet(fleet_id)
        for instance, endpoint, public_key, _ in args.get("addresses", ()):
            self._set_address(instance, endpoint, public_key)
        answer(OK, {})

    def _call_start_fleet(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        if not self.fleet_id or self.settings.index != 0:
            answer(REFUSED, "set_fleet comes first, and only worker 0 holds the fleet group")
            return
        voters = tuple(int(voter) for voter in args["voters"])
        if self.instance not in voters:
            raise ValueError("this worker is not among the voters")
        commands = msgpack.unpackb(args["state"], raw=False, strict_map_key=False) if args.get("state") else []
        self.start_fleet(voters, commands, campaign=bool(args.get("campaign")))
        answer(OK, {})

    def _call_leave_fleet(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        answer(OK, {})
        self._out.exit_fresh = True

    def _call_watch_fleet(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        self._watchers[connection] = None
        answer(OK, {"index": self.fleet_index, "state": self.fleet.dump() if self.fleet_known else None})

    def _call_fleet_command(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        self._fleet_command(args["command"], int(args.get("timeout_ms", 0)) * 1000 or timeout_us, answer)

    def _call_fleet_query(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        timeout_us = int(args.get("timeout_ms", 0)) * 1000 or timeout_us
        body = msgpack.packb(args["query"], use_bin_type=True)
        self._fleet_request(OP_QUERY, body, timeout_us, answer, stale=bool(args.get("stale")))

    def _call_local_groups(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        rows = []
        for uid, member in self.shard.members.items():
            role = "leader" if member.lead is not None else ("learner" if member.is_learner else member.role)
            rows.append(
                [member.name, uid, role, member.leader, member.term, member.last_index, member.commit, member.applied]
            )
        answer(OK, rows)

    def _call_declare_dead(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        for instance in args["instances"]:
            if int(instance) != self.instance:
                self.shard.gone[int(instance)] = "operator"
        answer(OK, {})

    def _call_drain(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        self.drain()
        answer(OK, {})

    def _group_named(self, name: object) -> Group | None:
        return self.fleet.by_name.get(name) if isinstance(name, str) else None

    def _call_group_status(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        if args["name"] == FLEET_GROUP:
            uid = FLEET_UID
        else:
            group = self._group_named(args["name"])
            if group is None:
                self._group_missing(
                    args["name"], answer, lambda left_us: self._call_group_status(0, args, left_us, answer), timeout_us
                )
                return
            uid = group.uid
        self._ask_leader(uid, "group_status", {"uid": uid}, timeout_us, answer)

    def _group_missing(self, name: object, answer: Any, again: Callable[[int], None], timeout_us: int) -> None:
        """Not known here: ask the fleet, and once the feed is there, go on with the time that is left."""
        deadline_us = self.now_us + timeout_us
        if not isinstance(name, str):
            raise ValueError("a group name is a str")

        def checked(code: int, body: Any) -> None:
            if code != OK:
                answer(code, body if code != GROUP_NOT_FOUND else f"there is no consensus group {name!r}")
            elif self._group_named(name) is not None:
                again(deadline_us - self.now_us)
            elif self.now_us + RETRY_PARKED_US >= deadline_us:
                answer(NO_LEADER, f"node {self.settings.node} has not heard of group {name!r} from the fleet yet")
            else:
                left_us = deadline_us - self.now_us - RETRY_PARKED_US
                self._delayed.append((self.now_us + RETRY_PARKED_US, lambda: again(left_us)))

        self.ask_fleet(["group", name], checked)

    def _ask_leader(self, uid: int, method: str, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        """Call the group's leader, wherever it is; tries again until ``timeout_us`` is over."""
        deadline_us = self.now_us + timeout_us
        attempts = 0

        def ask(instance: int) -> None:
            if instance:
                self.rpc(instance, method, args, answered, min(1_000_000, timeout_us))
            else:
                answered(NOT_LEADER, [0, 0])

        def answered(code: int, body: Any) -> None:
            nonlocal attempts
            attempts += 1
            if code not in (NOT_LEADER, NO_LEADER):
                answer(code, body)
            elif self.now_us + RETRY_PARKED_US >= deadline_us:
                answer(NO_LEADER, "no leader answered before the deadline")
            elif code == NOT_LEADER and body and body[0] and attempts % 3:
                ask(body[0])
            else:
                self._delayed.append((self.now_us + RETRY_PARKED_US, lambda: ask(self._some_member(uid, attempts))))

        ask(self._some_member(uid, 0))

    def _some_member(self, uid: int, attempt: int) -> int:
        member = self.shard.members.get(uid)
        if member is not None and member.leader and attempt % 2 == 0:
            return member.leader
        known = self.leaders.get(uid)
        if known is not None and attempt % 2 == 0:
            return known[1]
        return self._guess(uid)

    def _call_replace_leader(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        group = self._group_named(args["name"])
        if group is None:
            self._group_missing(
                args["name"], answer, lambda left_us: self._call_replace_leader(0, args, left_us, answer), timeout_us
            )
            return
        node = self.fleet.nodes.get(args["node"])
        if node is None:
            answer(REFUSED, f"there is no node {args['node']!r:.100}: see 'raftfleet-node nodes'")
            return
        uid = group.uid
        instance = node.instances[shard_of(group.name, len(node.instances))]

        def pinned(code: int, body: Any) -> None:
            self._ask_leader(uid, "transfer", {"uid": uid, "instance": instance}, timeout_us, answer)

        self.rpc(instance, "pin", {"uid": uid}, pinned, 500_000)

    # ------------------------------------------------------------------ changing the fleet (worker 0)

    def _call_add_group(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        name = check_group_name(args["name"])
        replicas = args["replicas"]
        if type(replicas) is not int:
            raise ValueError("replicas is a whole number")
        config = GroupConfig.from_dict(args["config"])
        if not self.fleet_known:
            answer(NOT_ACTIVE, f"node {self.settings.node} is not in a fleet yet: see 'raftfleet-node status'")
            return
        if name in self.fleet.by_name:
            answer(ALREADY_ADDED, f"a consensus group {name!r} exists already")
            return
        probe = Group(0, name, replicas, config.to_dict(), ())
        places = self.fleet.desired(probe)
        command = ["add_group", name, replicas, config.to_dict()]
        if not places:
            self._fleet_command(command, timeout_us, answer)  # which says why not
            return
        unchecked = [
            (node, instance)
            for node, instance in places
            if (instance, config.machine, config.hook) not in self._import_ok
        ]
        failures: list[Any] = []
        left = len(unchecked)

        def checked(instance: int, code: int, body: Any) -> None:
            nonlocal left
            left -= 1
            if code == OK:
                if len(self._import_ok) > 100_000:
                    self._import_ok.clear()
                self._import_ok[instance, config.machine, config.hook] = None
            elif code == NOT_IMPORTABLE:
                failures.append(body)
            if left == 0:
                decide()

        def decide() -> None:
            if failures:
                answer(NOT_IMPORTABLE, failures[0])
            else:
                self._fleet_command(command, timeout_us, answer)

        if not unchecked:
            decide()
        for _, instance in unchecked:
            self.rpc(
                instance,
                "import_check",
                {"config": config.to_dict()},
                lambda code, body, instance=instance: checked(instance, code, body),  # type: ignore[misc]
                min(IMPORT_CHECK_US, timeout_us // 2),
            )

    def _call_remove_group(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        """Remove from the fleet's log; then see to it that most members have stopped before saying so."""

        def removed(code: int, body: Any) -> None:
            if code != OK:
                answer(code, body)
                return
            uid = body["uid"]
            instances = {instance for _, instance in body["members"]}
            group = Group(uid, str(args["name"]), max(1, len(instances)), {}, ())
            instances.update(instance for _, instance in self.fleet.desired(group))
            needed = len(instances) // 2 + 1
            answers = 0
            finished = False

            def dropped(code: int, _: Any) -> None:
                nonlocal answers, finished
                answers += 1
                if not finished and (answers >= len(instances) or (code == OK and answers >= needed)):
                    finished = True
                    answer(OK, {"uid": uid})

            for instance in instances:
                self.rpc(instance, "drop_group", {"uid": uid}, dropped, DROP_WAIT_US)

        self._fleet_command(["remove_group", args["name"]], timeout_us, removed)

    def _call_change_config(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        config = GroupConfig.from_dict(args["config"])
        self._fleet_command(["change_config", args["name"], config.to_dict()], timeout_us, answer)


_CALLS: dict[str, Callable[[Host, int, dict[str, Any], int, Any], None]] = {
    "shard_info": Host._call_shard_info,
    "set_fleet": Host._call_set_fleet,
    "start_fleet": Host._call_start_fleet,
    "leave_fleet": Host._call_leave_fleet,
    "watch_fleet": Host._call_watch_fleet,
    "fleet_command": Host._call_fleet_command,
    "fleet_query": Host._call_fleet_query,
    "local_groups": Host._call_local_groups,
    "declare_dead": Host._call_declare_dead,
    "drain": Host._call_drain,
    "group_status": Host._call_group_status,
    "replace_leader": Host._call_replace_leader,
    "add_group": Host._call_add_group,
    "remove_group": Host._call_remove_group,
    "change_config": Host._call_change_config,
}

__all__ = ["Host", "HostSettings", "Node", "Outputs"]

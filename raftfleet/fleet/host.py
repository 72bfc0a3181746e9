"""The host of a shard: everything between the shard's members and the node's sockets, without the sockets.

This module does not know about sockets, files, clocks or threads; the loop in ``workers/shard.py`` (or a simulation)
brings messages, requests and the time, and carries out what :meth:`Host.finish` returns. What is here is the loop's
side: the order of an iteration, and where messages, requests and the shard's events go. The duties themselves are
layers, one class over the other, each in a module of its own, which calls those below it:

* :mod:`~raftfleet.fleet.host_restoring`: **coming back from a disk**, if the worker has one.
* :mod:`~raftfleet.fleet.host_calls`: what the manager, sibling workers and clients ask of this worker.
* :mod:`~raftfleet.fleet.host_changing`: **changing the fleet** (worker 0): import checks, the fleet command, and, for a
  removal, making sure that the old group has stopped before the caller is told.
* :mod:`~raftfleet.fleet.host_reconciling`: the groups led here, one safe step at a time.
* :mod:`~raftfleet.fleet.host_following`: **following the fleet's log**. Worker 0 holds the fleet group's member and
  feeds its siblings and the manager; each worker creates and drops members as that log says.
* :mod:`~raftfleet.fleet.host_routing`: a client's request, to the leader here or elsewhere, or into a waiting room.
* :mod:`~raftfleet.fleet.host_leaders`: **announcing leaders** to the owning worker of every node, and this node's
  leader table.
* :mod:`~raftfleet.fleet.host_asking`: names that are not known here, and commands to the fleet group.
* :mod:`~raftfleet.fleet.host_requests`: limits, deadlines, and one answer to each request.
* :mod:`~raftfleet.fleet.host_rpc`: calls between shards.
* :mod:`~raftfleet.fleet.host_state`: all that they share.

It is one object, not ten: the way of a command crosses several layers, and a call within one object costs least.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, TypeVar

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
)
from raftfleet.core.names import FLEET_UID
from raftfleet.fleet.host_requests import is_run_part
from raftfleet.fleet.host_restoring import RestoringLayer
from raftfleet.fleet.host_state import RETRY_PARKED_US, HostSettings, Outputs
from raftfleet.fleet.pace import TICK_US as PACE_TICK_US
from raftfleet.fleet.requests import FROM_CLIENT, Request

COMMAND_OP, QUERY_OP, CALL_OP, COMMAND_RUN_OP, QUERY_RUN_OP = 1, 2, 3, 4, 5
"""Kinds of requests, as in :mod:`raftfleet.wire.ipc` (fleet imports core only)."""

SWEEP_US = 10_000_000
SWEEP_MEMBERS_MAX = 200
"""Members that one sweep looks at: ten thousand are through in eight minutes, and cost no more than two hundred."""
RECONCILE_RETRY_US = 300_000
DRAIN_RETRY_US = 1_000_000
"""How often a worker without room on its disk tries again to hand its leaderships over."""
DRAIN_AFTER_US = 50_000
"""When it tries first: by then the others have said whether they could save what was sent to them."""
RECONCILE_PER_ROUND = 16
"""Groups looked at in one turn of the loop: commands that came meanwhile wait for it, about half a millisecond."""
MESSAGE_BYTES_MAX = 4 << 20
"""Requests or answers of one message: a frame holds several messages, and is cut between them where it is too large."""

_NOTHING = Outputs()

Item = TypeVar("Item", ForwardRequest, ForwardReply)


def in_parts(items: list[Item]) -> list[list[Item]]:
    """``items`` in runs whose bodies have at most MESSAGE_BYTES_MAX together (or a single larger one)."""
    sizes = [_body_bytes(item.body) for item in items]
    if sum(sizes) <= MESSAGE_BYTES_MAX:
        return [items]
    parts: list[list[Item]] = []
    room = 0
    for item, size_bytes in zip(items, sizes, strict=True):
        room -= size_bytes
        if room < 0 or not parts:
            parts.append([])
            room = MESSAGE_BYTES_MAX - size_bytes
        parts[-1].append(item)
    return parts


def _body_bytes(body: Any) -> int:
    if type(body) is bytes:
        return len(body)
    return 64 + len(body[2]) if is_run_part(body) else 64


class Host(RestoringLayer):
    """See the module's text. One per worker process."""

    # ------------------------------------------------------------------ the loop

    def begin(self, now_us: int, wall_us: int) -> None:
        """Start an iteration."""
        self.shard.begin(now_us, wall_us)

    def clock_read(self, now_us: int) -> None:
        """The clock was read again; see :meth:`raftfleet.core.shard.Shard.receive`."""
        self.shard.clock_read(now_us)

    def next_deadline_us(self) -> int:
        """When :meth:`tick` wants to be called next."""
        deadline_us = self.shard.next_deadline_us()
        if self._open or self._parked or self._rpcs or self._delayed or self._moved or self._leaderless:
            deadline_us = min(deadline_us, self._next_retry_us)
        if self._reconcile:
            deadline_us = min(deadline_us, self.now_us + 1000)
        if self._pace:
            deadline_us = min(deadline_us, self._next_pace_us)
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
        if self._pace and now_us >= self._next_pace_us:
            self._next_pace_us = now_us + PACE_TICK_US
            self._reconcile.update(dict.fromkeys(self._pace.due(now_us)))
        if shard.is_full and now_us >= self._next_drain_us:
            self._next_drain_us = now_us + DRAIN_RETRY_US
            self.drain()
        if now_us >= self._next_sweep_us:
            self._next_sweep_us = now_us + SWEEP_US
            self._sweep()

    def _sweep(self) -> None:
        """Slowly, behind the events: look again at some groups led here; start members that could not start.

        A sweep costs the same however many groups there are, so that idle ones cost nothing: it looks at what was
        elected since the last one, whose news may have been lost, and at a few of the others in turn.
        """
        young, self._elected = self._elected, {}
        for uid in [*young, *self._sweep_turn()]:
            member = self.shard.members.get(uid)
            if member is not None and member.lead is not None:
                self._reconcile[uid] = None
                if member.is_established:
                    self._announce(member)
        if self._resting:
            self._retry_resting()
        if self.fleet_known:
            unstarted, self._unstarted = self._unstarted, {}
            for uid in unstarted:
                group = self.fleet.groups.get(uid)
                if group is not None:
                    self._maybe_create(group)
            for uid in [uid for uid in self._dead_early if self.fleet.is_dead_uid(uid)]:
                self._dead_early.discard(uid)
            for instance in [i for i in self._newest_forward if i in self.fleet.gone]:
                del self._newest_forward[instance]
        links = self.shard.links
        for peer in [peer for peer, link in links.items() if not link.in_use and peer not in self.addresses]:
            del links[peer]
            self._introduced.pop(peer, None)

    def _sweep_turn(self) -> list[int]:
        """The next few members, in a turn that reaches all of them."""
        if not self._sweep_left:
            self._sweep_left = list(self.shard.members)
        turn = self._sweep_left[-SWEEP_MEMBERS_MAX:]
        del self._sweep_left[-SWEEP_MEMBERS_MAX:]
        return turn

    def flush(self) -> None:
        """Before sending: what the shard has to say, and what this host queued."""
        for uid in list(islice(self._reconcile, RECONCILE_PER_ROUND)) if self._reconcile else ():
            del self._reconcile[uid]
            self._reconcile_group(uid)
        self.shard.flush()

    def collect_sends(self) -> dict[int, list[Any]]:
        """What is to be sent now, by instance: in memory all of it, on a disk what need not wait for it.

        The caller sends it, then what :meth:`persist` returns, before :meth:`apply`.
        """
        sends = self.shard.take_sends()
        if self.disk is not None:
            self._introduce(sends)
            return sends
        return self._collect_rest(sends)

    def persist(self) -> dict[int, list[Any]]:
        """Save what changed; returns what may be sent then. Nothing in memory.

        Raises:
            Exception: what the disk raises. This host is finished then: nothing of it may be sent or answered any more.
        """
        if self.disk is None:
            return {}
        self.shard.persist()
        return self._collect_rest({})

    def _collect_rest(self, sends: dict[int, list[Any]]) -> dict[int, list[Any]]:
        for peer, messages in self.shard.take_saved_sends().items():
            if peer in sends:
                sends[peer].extend(messages)
            else:
                sends[peer] = messages
        if self._forwards:
            for peer, requests in self._forwards.items():
                for part in in_parts(requests):
                    sends.setdefault(peer, []).append(Forward(FORWARD, part))
            self._forwards = {}
        if self._answers:
            self._collect_answers(sends)
        if self._notices:
            for peer, notices in self._notices.items():
                sends.setdefault(peer, []).append(Leaders(LEADERS, list(notices.values())))
            self._notices = {}
        if self._out.sends:
            for peer, messages in self._out.sends.items():
                sends.setdefault(peer, []).extend(messages)
            self._out.sends = {}
        self._introduce(sends)
        return sends

    def _introduce(self, sends: dict[int, list[Any]]) -> None:
        for peer in sends:
            introduced_us = self._introduced.get(peer)
            if introduced_us is None or self.now_us - introduced_us > SWEEP_US:
                self._introduced[peer] = self.now_us
                settings = self.settings
                sends[peer].insert(0, Introduce(INTRODUCE, settings.node, settings.endpoint, settings.public_key))

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
        if out.is_empty:
            return _NOTHING  # as most turns of an idle fleet, and half of those of a busy one
        if out.addresses and self.disk is not None:
            self._save_addresses()
        self._out = Outputs(sends=out.sends)  # made while answering: they leave with the next collection
        out.sends = {}
        return out

    def collect_answers(self) -> dict[int, list[Any]]:
        """Answers to forwarded requests that :meth:`settle` made: they leave in the turn in which they were found.

        They wait for no disk: what was applied here is committed, and a refusal promises nothing.
        """
        if not self._answers:
            return {}
        sends: dict[int, list[Any]] = {}
        self._collect_answers(sends)
        self._introduce(sends)
        return sends

    def _collect_answers(self, sends: dict[int, list[Any]]) -> None:
        for peer, replies in self._answers.items():
            for answered in in_parts(replies):
                sends.setdefault(peer, []).append(ForwardAnswer(FORWARD_ANSWER, answered))
        self._answers = {}

    @property
    def has_work(self) -> bool:
        """Whether something waits to be sent or done without further input."""
        return bool(self.shard.has_work or self._forwards or self._answers or self._notices or self._out.sends)

    def finish(self) -> Outputs:
        """``flush``, ``collect_sends``, ``persist``, ``apply``, ``settle`` and a second collection, for simulations."""
        self.flush()
        sends = self.collect_sends()
        self._add_sends(sends, self.persist())
        self.apply()
        out = self.settle(self.now_us)
        if out is _NOTHING:
            out = Outputs()
        if self.has_work:
            self.shard.flush()
            self._add_sends(sends, self.collect_sends())
            self._add_sends(sends, self.persist())
        out.sends = sends
        return out

    @staticmethod
    def _add_sends(sends: dict[int, list[Any]], more: dict[int, list[Any]]) -> None:
        for peer, messages in more.items():
            sends.setdefault(peer, []).extend(messages)

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
        elif op == COMMAND_RUN_OP:
            request_id, _, name, uid, timeout_ms, count, body = item
            deadline_us = self.now_us + timeout_ms * 1000
            self._accept(
                Request(
                    *(FROM_CLIENT, connection, request_id, OP_COMMAND, name, uid, deadline_us, 0, body), count=count
                )
            )
        elif op == QUERY_RUN_OP:
            request_id, _, name, uid, timeout_ms, consistency, count, body = item
            deadline_us = self.now_us + timeout_ms * 1000
            self._accept(
                Request(
                    *(FROM_CLIENT, connection, request_id, OP_QUERY, name, uid, deadline_us, consistency, body),
                    count=count,
                )
            )
        elif op == CALL_OP:
            request_id, _, method, args, timeout_ms = item
            self._on_call(connection, request_id, method, args, timeout_ms)

    def on_disconnect(self, connection: int) -> None:
        """A client went away; what it asked goes on, unanswered."""
        self._watchers.pop(connection, None)

    # ------------------------------------------------------------------ events of the shard

    def _on_event(self, event: tuple[Any, ...]) -> None:
        kind, uid = event[0], event[1]
        member = self.shard.members.get(uid)
        if kind == "leader":
            if member is not None and member.lead is not None:
                self._learn_leader(uid, member.term, self.instance)
                self._announce(member)
                self._elected[uid] = None
                self._reconcile[uid] = None
                if uid == FLEET_UID and not self.fleet_known:
                    for command in self._founding_commands:  # done twice, the second is without effect
                        self._fleet_command(command, 5_000_000, lambda code, body: None)
        elif kind in ("caught_up", "config", "transfer_failed"):
            self._reconcile[uid] = None
            if kind == "caught_up":
                self._catching_up.pop(uid, None)
            elif kind == "transfer_failed":
                self._transfer_failed_us[uid] = self.now_us
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
        elif kind == "upgraded":
            self.note("info", f"group {self._name(uid)} works as version {event[2]} of its state machine from now on")
        elif kind == "upgrade_failed":
            self.count("upgrade_failures")
            self.note("error", f"group {self._name(uid)} stays at its version: upgrade to {event[2]} raised {event[3]}")
        elif kind == "too_old":
            self.count("too_old")
            self.note(
                "error",
                f"group uid {uid} works as version {event[2]}; the code on this node knows {event[3]}: "
                "its member here is stopped; update the code and start the node again",
            )
        elif kind == "cannot_start":
            self._cannot_start(event[2], event[3])
        elif kind == "snapshot_failed":
            self.count("snapshot_failures")
            self.note("error", f"group {self._name(uid)}: its state could not be dumped or loaded: {event[2]}")
        elif kind == "member_lost":
            self._reconcile[uid] = None
            self.note("warning", f"group {self._name(uid)}: the disk of {self._node_of(event[2])} lost its member")
        elif kind == "restored":
            self.note("info", f"group {self._name(uid)} begins with a restored state of {event[2]} bytes")
        elif kind == "disk_full":
            self._next_drain_us = self.now_us + DRAIN_AFTER_US
        elif kind == "diverged":
            self.count("divergences")
            self._tell_divergence(self._name(uid), *event[2:])
        elif kind == "quarantined":
            self.count("quarantined")
            self.note(
                "error", f"group {self._name(uid)}: its member here differs and is quarantined until it is rebuilt"
            )
        elif kind == "outliers":
            self._reconcile[uid] = None
        elif kind == "led_in_quarantine":
            self.note("error", f"group {self._name(uid)}: led from here for a moment, since no other member could")
        elif kind == "majority_lost":
            self._renew(uid, event[2], event[3])
        elif kind == "recovered":
            self.note("warning", f"group {self._name(uid)}: majority lost and declared dead; went on: {event[2]}")

    def _tell_divergence(self, name: str, index: int, instances: tuple[int, ...], has_majority: bool) -> None:
        nodes = ", ".join(self.settings.node if i == self.instance else self._node_of(i) for i in instances)
        who = f"those on {nodes} differ from a quorum" if has_majority else f"no quorum agrees: {nodes}"
        self.note(
            "error",
            f"group {name}: members came to different states or results at index {index}; {who}."
            " Is the state machine deterministic? raftfleet.testing.check_deterministic may tell",
        )


__all__ = ["Host", "HostSettings", "Outputs"]

"""A node's manager without its sockets: founding, joining, pings, removal of the dead, what the command line asks for.

This module does not know about sockets, files or clocks. Time arrives as an argument; what is to be done leaves as
:data:`Output` values, which the driver carries out in their order (a :class:`Persist` before the sends behind it).

A node is in one of these states (``status --json`` shows them):

    inactive      in no fleet and not wanting to be; it still answers as an acceptor of founding
    activating    it wants to be active: it looks for a fleet to join among its peers, or founds one with them
    active        the fleet's state names it, with its present instances
    deactivating  its members move away; then it leaves

Rules:

* A node enters a fleet once per instance of its shards. Leaving means new instances: every shard starts afresh.
* What this node wants of the fleet (to be in it, with these instances) is compared with the fleet's state on every
  tick and proposed until they agree; nothing depends on a message that arrives once.
* Only the manager beside the fleet group's leader purges nodes that have been silent for the whole window.
* A fleet that is still empty (no group was ever added) and whose first voters are provably gone is abandoned: this
  node behaves as if it had crashed, which is always safe. One with groups waits for an operator (DESIGN 5.15).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgpack

from raftfleet.core.manager_messages import (
    ACCEPT,
    ACCEPTED,
    FOUNDED,
    MANAGER_RPC,
    MANAGER_RPC_ANSWER,
    PING,
    PONG,
    PREPARE,
    PROMISE,
    FleetMemory,
    Founded,
    FoundingValue,
    ManagerRpc,
    ManagerRpcAnswer,
    NodeRecord,
    Ping,
    Pong,
    record_of,
    shaped,
)
from raftfleet.core.names import FLEET_GROUP, shard_of
from raftfleet.fleet.founding import Address, Chosen, Founding, Memory, Persist, Send
from raftfleet.fleet.machine import FleetRefused, FleetState, Node

if TYPE_CHECKING:
    from random import Random

OK = 0
NO_LEADER = 10
OVERLOADED = 11
GROUP_NOT_FOUND = 12
BAD_REQUEST = 17
NOT_ACTIVE = 18
REFUSED = 19
UNANSWERED = 20
OUTCOME_UNKNOWN = 30
"""Codes as in the client protocol (raftfleet.wire.ipc; fleet imports core only)."""

TRY_ELSEWHERE = (NO_LEADER, OVERLOADED, NOT_ACTIVE, UNANSWERED, OUTCOME_UNKNOWN)
"""Shard 0 has not got a fleet command through: another node may know the leader (every fleet command is idempotent)."""

MS = 1_000
SECOND = 1_000_000
SURVEY_INTERVAL_US = 400 * MS
RPC_TIMEOUT_US = 3 * SECOND
RECOVERY_WAIT_US = 6 * SECOND
"""A fleet group that can recover from a declared death has a leader by then: a few election timeouts."""
ABANDON_AFTER_US = 3 * SECOND
"""Ten failed elections: a leader that is still possible has had its chance."""
PING_NODES = 20
"""Up to so many nodes are pinged once per interval; above, the interval grows with the nodes."""


class ShardCall(NamedTuple):
    """Call a method of a shard; its answer comes back through :meth:`ManagerCore.on_shard_answer`."""

    shard: int
    method: str
    args: dict[str, Any]
    timeout_ms: int
    token: int


class Reply(NamedTuple):
    """Answer a call that came in through :meth:`ManagerCore.call`."""

    token: object
    code: int
    body: Any


class Log(NamedTuple):
    """Say this in the log. ``level``: "info", "warning" or "error"."""

    level: str
    text: str


class StopNode(NamedTuple):
    """End the node."""


class StateChanged(NamedTuple):
    """The node's state (active, ...) is another one now."""

    state: str


Output: TypeAlias = Send | Persist | ShardCall | Reply | Log | StopNode | StateChanged
Answer: TypeAlias = Callable[[int, Any], None]


@dataclass(frozen=True)
class ManagerSettings:
    """What a manager is told at its start. ``zone`` None: inactive until ``activate``."""

    name: str
    host: str
    port: int
    public_key: str
    workers: int
    peers: tuple[Address, ...] = ()
    zone: str | None = None
    purge_window_us: int = 600 * SECOND
    ping_interval_us: int = SECOND
    durable: bool = False


class _Shard:
    """What the manager knows of one of its shards. ``instance`` 0: not known (yet, or it is restarting)."""

    __slots__ = ("addresses_version", "fleet", "fleet_leader", "info", "instance", "stale_instance", "watched")

    def __init__(self) -> None:
        self.instance = 0
        self.stale_instance = 0
        self.fleet = b""
        self.fleet_leader = 0
        self.addresses_version = -1
        self.watched = False
        self.info: dict[str, Any] = {}


class _Pending(NamedTuple):
    deadline_us: int
    then: Answer


class ManagerCore:
    """One node's manager. See the module's essay for the rules and :data:`Output` for what it asks of its driver."""

    def __init__(self, settings: ManagerSettings, memory: Memory, rng: Random, now_us: int = 0) -> None:
        self.settings = settings
        self.zone = settings.zone
        self.fleet = b""
        self.state: FleetState | None = None
        self.fleet_index = 0
        self.unreachable: dict[str, int] = {}
        self.shards = [_Shard() for _ in range(settings.workers)]
        self.founding = Founding((settings.host, settings.port), settings.peers, memory, rng, rng.getrandbits(62) + 1)
        self._rng = rng
        self._now_us = now_us
        self._ticked_us = now_us
        self._wall_us = 0
        self._outputs: list[Output] = []
        self._incarnation = rng.getrandbits(62) + 1
        self._tokens = rng.getrandbits(40)
        self._shard_calls: dict[int, _Pending] = {}
        self._rpc_calls: dict[int, _Pending] = {}
        self._tasks: dict[str, int] = {}  # name of a repeated duty -> not before
        self._value: FoundingValue | None = None
        self._records: dict[Address, NodeRecord] = {}  # nodes of this fleet until its state is here
        self._sponsored: dict[Address, str] = {}
        self._seen: dict[Address, tuple[NodeRecord, bytes, int]] = {}  # record, fleet, when: from answered pings
        self._pings: dict[Address, int] = {}
        self._heard_us: dict[str, int] = {}
        self._removals: dict[str, list[int]] = {}  # an operator's words that the fleet has not confirmed yet
        self._declared: set[int] = set()
        self._node_version_base = 0
        self._deactivating = False
        self._leaving = False
        self._leaderless_since_us = now_us
        self._join_turn = 0
        self._waiters: list[tuple[int, Callable[[], bool], Callable[[bool], None]]] = []
        self._last_state = ""
        self._status = ""
        self._trouble = ""

    # -- what the driver calls --------------------------------------------------------------------------------------

    def take_outputs(self) -> list[Output]:
        """What is to be done, in this order. The list is emptied."""
        self._pull_founding()
        outputs, self._outputs = self._outputs, []
        return outputs

    def next_deadline_us(self) -> int:
        """When :meth:`tick` should be called next. Duties are checked ten times a second while something is amiss."""
        settled = self.node_state in ("active", "inactive") and not self._removals and not self._waiters
        return self._ticked_us + (200 * MS if settled else 50 * MS)

    def on_shard_info(self, now_us: int, index: int, info: dict[str, Any]) -> None:
        """The answer to ``shard_info``, asked when the connection to the shard came up, and then by the core itself."""
        self._now_us = now_us
        self._take_shard_info(self.shards[index], info)

    def on_shard_lost(self, now_us: int, index: int) -> None:
        """The connection to the shard broke: it is restarting, or has been."""
        self._now_us = now_us
        shard = self.shards[index]
        shard.instance = 0
        shard.fleet_leader = 0
        shard.watched = False

    def on_shard_answer(self, now_us: int, token: int, code: int, body: Any) -> None:
        """The answer to a :class:`ShardCall`. Late ones are ignored."""
        self._now_us = now_us
        pending = self._shard_calls.pop(token, None)
        if pending is not None:
            pending.then(code, body)

    def on_fleet_push(self, now_us: int, body: list[Any]) -> None:
        """``["fleet", index, [packed command, ...], epoch]`` or ``["fleet_reset", index, dump]`` from shard 0."""
        self._now_us = now_us
        if not self.fleet:
            return
        if body[0] == "fleet_reset":
            self._reset_state(body[1], body[2])
            return
        state = self.state
        if state is None:
            return
        if body[1] <= self.fleet_index:
            return
        self.fleet_index = body[1]
        for packed in body[2]:
            try:
                state.apply(msgpack.unpackb(packed, strict_map_key=False), body[3])
            except FleetRefused as refusal:  # only what took effect is pushed: this copy has gone astray
                self._log("error", f"this manager's copy of the fleet's state is wrong ({refusal}): it asks anew")
                self.state = None
                self.shards[0].watched = False
                return
        self._state_changed()

    def receive(self, now_us: int, message: Any) -> None:
        """A message from another manager (or this one). Malformed ones are dropped."""
        self._now_us = now_us
        try:
            message = shaped(message)
        except (ValueError, TypeError, IndexError):
            return
        if message.kind in _HANDLERS:
            _HANDLERS[message.kind](self, message)

    def tick(self, now_us: int, wall_us: int) -> None:
        """Do what is due."""
        self._now_us = self._ticked_us = now_us
        self._wall_us = wall_us
        self._expire()
        if self.is_ready:
            if self.fleet:
                self._tick_in_fleet()
            else:
                self._tick_without_fleet()
        if self.node_state != self._last_state:
            self._last_state = self.node_state
            self._outputs.append(StateChanged(self._last_state))

    @property
    def is_ready(self) -> bool:
        """Whether all shards are known: before that this node does not know itself what it is."""
        return all(shard.instance for shard in self.shards)

    @property
    def instances(self) -> tuple[int, ...]:
        """Present instances of the shards."""
        return tuple(shard.instance for shard in self.shards)

    @property
    def record(self) -> NodeRecord:
        """What this node says of itself."""
        s = self.settings
        zone = "" if self.zone is None or self._deactivating else self.zone
        store = self.founding.memory.store
        return NodeRecord(s.name, zone, s.host, s.port, s.public_key, self.instances, self._incarnation, store)

    @property
    def is_alone(self) -> bool:
        """Whether nobody else decides with this node, and nobody else ever was in its fleet."""
        fleet = self.founding.memory.fleet
        nodes = fleet.nodes if fleet is not None else ()
        mine = self.founding.address
        return self.founding.peers == (mine,) and all((host, port) == mine for _, host, port in nodes)

    @property
    def node_state(self) -> str:
        """inactive, activating, active or deactivating."""
        mine = self.state.nodes.get(self.settings.name) if self.state is not None else None
        if self._deactivating or self._leaving or (mine is not None and not mine.active and self.zone is None):
            return "deactivating"
        if self.zone is None:
            return "inactive"
        if mine is not None and mine.active and self.is_ready and mine.instances == self.instances:
            return "active"
        return "activating"

    @property
    def status_text(self) -> str:
        """What this node is waiting for, in a sentence; empty if for nothing."""
        if self._trouble:
            return self._trouble
        if self.node_state in ("active", "inactive"):
            return ""
        if not self.is_ready:
            missing = [str(index) for index, shard in enumerate(self.shards) if not shard.instance]
            return f"waiting for shard {', '.join(missing)} to start"
        return self._status or self.founding.status

    def public_key_at(self, address: Address) -> str:
        """The CURVE key of the node at that address, or "" if it is not known."""
        seen = self._seen.get(address)
        if seen is not None:
            return seen[0].public_key
        return next((n.public_key for n in self._known_nodes() if (n.host, n.port) == address), "")

    # -- without a fleet --------------------------------------------------------------------------------------------

    def _tick_without_fleet(self) -> None:
        for shard in self.shards:
            if shard.fleet:  # the manager was restarted; its shards were not
                memory = self.founding.memory.fleet
                nodes = memory.nodes if memory is not None and memory.fleet == shard.fleet else ()
                accepted = self.founding.memory.accepted
                self._value = accepted if accepted is not None and accepted.fleet == shard.fleet else None
                self._enter(shard.fleet, list(self._value.voters) if self._value is not None else [], nodes)
                return
        if self._due("poll", SECOND):
            self._poll_shards()
        if self._due("survey", SURVEY_INTERVAL_US):
            self._survey()
        if self.zone is None:
            return
        fleets = sorted(
            address
            for address, (_, fleet, when_us) in self._seen.items()
            if fleet and self._now_us - when_us < 3 * SECOND
        )
        if fleets:
            self.founding.stop(self._now_us)
            if self._due("join", SECOND):
                self._join_turn += 1
                self._ask_to_join(fleets[self._join_turn % len(fleets)])
        else:
            self._status = ""
            if not self.founding.is_acceptor:
                self._status = (
                    f"waiting for one of --peers to be in a fleet; this node's own address "
                    f"{self.settings.host}:{self.settings.port} is not among them, so it cannot found one"
                )
            self.founding.tick(self._now_us, self.record)

    def _survey(self) -> None:
        """Ask everyone who may be in a fleet."""
        addresses = set(self.founding.peers)
        memory = self.founding.memory.fleet
        if memory is not None:
            addresses.update((host, port) for _, host, port in memory.nodes)
        addresses.update((v.host, v.port) for v in (self._value.voters if self._value else ()))
        for address in sorted(addresses - {self.founding.address}):
            self._ping(address)

    def _ask_to_join(self, address: Address) -> None:
        where = f"{address[0]}:{address[1]}"
        record = self.record

        def answered(code: int, body: Any) -> None:
            if self.fleet or record != self.record:
                return
            if code == OK:
                try:
                    fleet, records = body["fleet"], [record_of(fields) for fields in body["nodes"]]
                except (KeyError, TypeError, ValueError):
                    return
                if type(fleet) is bytes and len(fleet) == 16:
                    self._log("info", f"joined fleet {fleet.hex()} through {where}")
                    self._enter(fleet, records, ())
                return
            text = f"the fleet that {where} is in did not let this node in yet: {_text(body)}"
            if self._status != text:
                self._log("warning" if code == REFUSED else "info", text)
            self._status = text

        self._rpc(address, "join", {}, RPC_TIMEOUT_US, answered)

    def _on_founded(self, value: FoundingValue) -> None:
        if self.fleet or not self.is_ready:
            return
        mine = self.instances[0]
        if not any(voter.instances[0] == mine and voter.name == self.settings.name for voter in value.voters):
            self._value = value  # its voters are worth a question
            return
        self._log("info", f"founded fleet {value.fleet.hex()} with {', '.join(v.name for v in value.voters)}")
        self._value = value
        self._enter(value.fleet, list(value.voters), ())
        self._start_fleet()

    def _start_fleet(self) -> None:
        """Start this node's first member of the fleet group, whose leader makes the founding its first command."""
        value = self._value
        if value is None or not self.fleet or value.fleet != self.fleet:
            return
        voters = [voter.instances[0] for voter in value.voters]
        if self.instances[0] not in voters:
            return
        founders = [_node_fields(voter) for voter in value.voters]
        args = {
            "voters": voters,
            "state": msgpack.packb([["found", value.fleet, founders]]),
            "campaign": voters[0] == self.instances[0],
        }

        def answered(code: int, body: Any) -> None:
            if code in (UNANSWERED, OUTCOME_UNKNOWN) and self.fleet == value.fleet and self.state is None:
                self._start_fleet()
            elif code != OK:
                self._log("error", f"shard 0 could not start the fleet group: {_text(body)}")

        self._call_shard(0, "start_fleet", args, 5 * SECOND, answered)

    def _propose_founding(self) -> None:
        """The first command of the fleet's log: its id and first nodes. Every founder proposes it; one is enough."""
        value = self._value
        assert value is not None
        command = ["found", value.fleet, [_node_fields(voter) for voter in value.voters]]
        self._call_shard(0, "fleet_command", {"command": command, "timeout_ms": 1000}, 1500 * MS, _ignore)

    # -- entering and leaving ---------------------------------------------------------------------------------------

    def _enter(self, fleet: bytes, records: list[NodeRecord], nodes: Iterable[tuple[str, str, int]]) -> None:
        self.fleet = fleet
        self._incarnation = self._rng.getrandbits(62) + 1
        self._records = {(record.host, record.port): record for record in records}
        self._sponsored = {(host, port): name for name, host, port in nodes}
        self._leaderless_since_us = self._now_us
        self._status = f"waiting for the leader of fleet {fleet.hex()}"
        self._tasks.clear()
        self.founding.stop(self._now_us)
        self._remember_nodes()
        for shard in self.shards:
            shard.addresses_version = -1
        self._set_fleet()

    def _leave(self, why: str) -> None:
        """Have all shards start afresh, with new instances, outside of any fleet."""
        self._log("warning" if why != "left" else "info", f"leaving fleet {self.fleet.hex()}: {why}")
        self.fleet = b""
        self.state = None
        self.fleet_index = 0
        self._value = None
        self._incarnation = self._rng.getrandbits(62) + 1
        self._records.clear()
        self._sponsored.clear()
        self._seen.clear()
        self._heard_us.clear()
        self.unreachable.clear()
        self._removals.clear()
        self._tasks.clear()
        self._deactivating = False
        self._leaving = False
        self._status = ""
        self._trouble = ""
        for index, shard in enumerate(self.shards):
            self._reset_shard(index, shard)

    def _reset_shard(self, index: int, shard: _Shard) -> None:
        old = shard.instance or shard.stale_instance
        shard.stale_instance = old
        shard.instance = 0
        shard.fleet = b""
        shard.watched = False
        shard.info = {}

        def answered(code: int, body: Any) -> None:
            if code != OK and shard.stale_instance == old and shard.instance == 0:
                self._reset_shard(index, shard)

        self._call_shard(index, "leave_fleet", {}, 2 * SECOND, answered)

    def _remember_nodes(self) -> None:
        """Put on disk which nodes this fleet has, those being let in included (the proofs of founding rest on it)."""
        nodes = {(self.settings.host, self.settings.port): self.settings.name}
        nodes.update({address: record.name for address, record in self._records.items()})
        nodes.update(self._sponsored)
        if self.state is not None:
            nodes.update({(node.host, node.port): node.name for node in self.state.nodes.values()})
        self.founding.remember_fleet(
            FleetMemory(self.fleet, tuple(sorted((name, host, port) for (host, port), name in nodes.items())))
        )
        self._pull_founding()

    # -- in a fleet -------------------------------------------------------------------------------------------------

    def _tick_in_fleet(self) -> None:
        if self._due("poll", 300 * MS if not self.shards[0].fleet_leader else SECOND):
            self._poll_shards()
        self._set_fleet()
        if not self.shards[0].watched and self._due("watch", 300 * MS):
            self._watch()
        self._ping_nodes()
        if self.shards[0].fleet_leader:
            self._leaderless_since_us = self._now_us
            self._trouble = ""
        elif self._now_us - self._leaderless_since_us > ABANDON_AFTER_US and self._due("abandon", 500 * MS):
            self._consider_abandoning()
        if not self.fleet:
            return
        if self.state is not None and self.state.fleet_id:
            self._status = ""
            self._tend_membership(self.state)
        elif self._is_first_voter():
            if self.shards[0].fleet_leader and self._due("found", 300 * MS):
                self._propose_founding()
        elif self.zone is not None and self._due("join", SECOND):
            # Entered, but no feed comes: the fleet may know this node by instances that are no more.
            self._join_through_another()
        if self.state is not None and self.fleet:
            self._tend_removals(self.state)

    def _tend_membership(self, state: FleetState) -> None:
        mine = state.nodes.get(self.settings.name)
        gone = [instance for instance in self.instances if instance in state.gone]
        if gone:
            reason = state.gone[gone[0]]
            if reason == "left":
                self.zone = None
            self._leave("left" if reason == "left" else f"this node was removed from it ({reason}); it joins as new")
            return
        if mine is None or (mine.host, mine.port) != (self.settings.host, self.settings.port):
            if self.zone is not None and self._due("join", SECOND):
                self._propose_join()
            return
        if mine.instances != self.instances:
            if self._due("instances", SECOND):
                self._propose(["instances", mine.name, list(self.instances), list(mine.instances)], self._replaced)
            return
        if self._deactivating:
            self._tend_deactivation(state, mine)
        elif self.zone is None and mine.active:
            self.zone = mine.zone  # the manager was restarted after an activate
        elif self.zone is None:
            self._deactivating = True
        elif (not mine.active or mine.zone != self.zone) and self._due("join", SECOND):
            self._propose_join()

    def _replaced(self, code: int, body: Any) -> None:
        """Answer to "these are my instances now". Refused: the state here is older than the fleet's, and as long as
        the fleet does not know this node's worker 0 no feed will mend it. Another node knows what is to be replaced."""
        if code == REFUSED:
            self._join_through_another()

    def _propose_join(self) -> None:
        """Ask to be in the fleet, through shard 0 or, if it finds no leader, through another node."""

        def answered(code: int, body: Any) -> None:
            if code in TRY_ELSEWHERE:
                self._join_through_another()
            elif code != OK:
                self._status = f"the fleet refused the join: {_text(body)}"

        args = {"command": ["join", self._join_fields(self.record)], "timeout_ms": 1000}
        self._call_shard(0, "fleet_command", args, 1500 * MS, answered)

    def _join_through_another(self) -> None:
        others = self._reachable()
        if others and self.fleet:
            address = others[self._rng.randrange(len(others))]
            self._rpc(address, "join", {"fleet": self.fleet}, RPC_TIMEOUT_US, _ignore)

    def _is_first_voter(self) -> bool:
        """Whether this node's shard 0 is one of those that founded the fleet, and so its feed will come."""
        value = self._value
        return (
            value is not None
            and value.fleet == self.fleet
            and any(voter.instances == self.instances for voter in value.voters)
        )

    def _join_fields(self, record: NodeRecord) -> dict[str, Any]:
        known = [node for node in self._known_nodes() if node.name == record.name]
        return _node_fields(record) | {"replaces": list(known[0].instances) if known else []}

    def _tend_deactivation(self, state: FleetState, mine: Node) -> None:
        if mine.active:
            if self._due("deactivate", SECOND):
                self._propose(["deactivate", mine.name])
            return
        if not self._due("drained", 400 * MS):
            return
        rows: list[list[Any]] = []
        waiting = set(range(len(self.shards)))

        def collected(index: int) -> Answer:
            def answered(code: int, body: Any) -> None:
                if code != OK:
                    return
                waiting.discard(index)
                rows.extend(body)
                if not waiting and not any(row[1] != 0 for row in rows):
                    self._leave_if_no_voter(state, mine)

            return answered

        for index in range(len(self.shards)):
            self._call_shard(index, "local_groups", {}, SECOND, collected(index))

    def _leave_if_no_voter(self, state: FleetState, mine: Node) -> None:
        def left(code: int, body: Any) -> None:
            if self.fleet and (code == OK or "has no node" in _text(body)):
                self.zone = None
                self._leave("left")

        def answered(code: int, body: Any) -> None:
            members = body.get("members", []) if code == OK and isinstance(body, dict) else None
            if members is None and len(state.nodes) > 1:
                return
            if len(state.nodes) > 1 and any(
                member.get("instance") == mine.instances[0] and member.get("role") != "learner"
                for member in members or ()
            ):
                return
            self._propose(["leave", mine.name], left)

        self._call_shard(0, "group_status", {"name": FLEET_GROUP}, SECOND, answered)

    def _tend_removals(self, state: FleetState) -> None:
        for name, instances in list(self._removals.items()):
            node = state.nodes.get(name)
            if node is None or sorted(node.instances) != sorted(instances):
                del self._removals[name]
            elif self._due(f"remove {name}", SECOND):
                self._propose(["remove_node", name, "operator", instances])
        if not self.leads_fleet:
            return
        for name in list(self.unreachable):
            node = state.nodes.get(name)
            silent_us = self._now_us - self._heard_us.get(name, self._now_us)
            if node is not None and silent_us > self.settings.purge_window_us and self._due(f"purge {name}", SECOND):
                self._log("warning", f"node {name} has been unreachable for {silent_us // SECOND} s: it is removed")
                self._propose(["remove_node", name, "purged", list(node.instances)])

    @property
    def leads_fleet(self) -> bool:
        """Whether this node's shard 0 leads the fleet group, as far as is known."""
        return bool(self.shards[0].instance and self.shards[0].info.get("fleet_leads"))

    def _consider_abandoning(self) -> None:
        """Leave a fleet that is empty and whose voters are provably gone for more than its quorum can spare."""
        if self.state is not None and self.state.counter:
            if not self._trouble:
                self._trouble = (
                    "the fleet group has no leader: start the nodes that are missing, or, if they are gone for good, "
                    "run 'raftfleet-node remove-dead-node NODE' for each"
                )
                self._log("warning", self._trouble)
            return

        # Without a copy of the state, members of groups on this node's shards tell that the fleet holds groups.
        if any(shard.info.get("members", 0) > (index == 0) for index, shard in enumerate(self.shards)):
            return
        value = self._value
        voters = self.shards[0].info.get("fleet_voters") or []
        if not voters and value is not None and value.fleet == self.fleet:
            voters = [voter.instances[0] for voter in value.voters]
        nodes = [node.instances[0] for node in self._known_nodes()]
        here = self._all_here()
        gone = self._provably_gone()
        losses = [
            (len(members), sum(i in gone or (here is not None and i not in here) for i in members))
            for members in (voters, nodes)
        ]
        memory = self.founding.memory.fleet
        if here is not None and memory is not None:
            losses.append((len(memory.nodes), len(memory.nodes) - len(here)))
        # A guess that is wrong costs what a crash of this node would: the fleet, if it lives, lets it in again.
        if any(size and lost > (size - 1) // 2 for size, lost in losses):
            self._leave("it never held a group, and too many of its nodes are gone for it to go on")

    def _all_here(self) -> set[int] | None:
        """Instances of those in this fleet, if everyone who could be in it answers; None if someone is silent."""
        here = {self.instances[0]}
        memory = self.founding.memory.fleet
        nodes = memory.nodes if memory is not None else ()
        for address in {*self.founding.peers, *((host, port) for _, host, port in nodes)} - {self.founding.address}:
            seen = self._seen.get(address)
            if seen is None or self._now_us - seen[2] > 2 * SECOND:
                return None
            if seen[1] == self.fleet:
                here.add(seen[0].instances[0])
        return here

    def _provably_gone(self) -> set[int]:
        """Instances of nodes at whose address another instance has answered since, and those declared dead."""
        gone = set(self._declared)
        if self.state is not None:
            gone.update(self.state.gone)
        for node in self._known_nodes():
            seen = self._seen.get((node.host, node.port))
            if seen is not None and seen[0].instances[0] != node.instances[0]:
                gone.add(node.instances[0])
            if self.settings.name == node.name and node.instances[0] != self.instances[0]:
                gone.add(node.instances[0])
        return gone

    def _known_nodes(self) -> list[Node] | list[NodeRecord]:
        if self.state is not None and self.state.fleet_id:
            return list(self.state.nodes.values())
        return list(self._records.values())

    # -- shards -----------------------------------------------------------------------------------------------------

    def _poll_shards(self) -> None:
        for index, shard in enumerate(self.shards):
            self._ask_info(index, shard)

    def _ask_info(self, index: int, shard: _Shard) -> None:
        def answered(code: int, body: Any) -> None:
            if code == OK:
                self._take_shard_info(shard, body)

        self._call_shard(index, "shard_info", {}, SECOND, answered)

    def _take_shard_info(self, shard: _Shard, info: dict[str, Any]) -> None:
        instance = info["instance"]
        if instance == shard.stale_instance:
            return  # it is about to start afresh
        if instance != shard.instance:
            shard.instance = instance
            shard.stale_instance = 0
            shard.addresses_version = -1
            shard.watched = False
            self._incarnation = self._rng.getrandbits(62) + 1
        shard.fleet = info.get("fleet") or b""
        shard.fleet_leader = info.get("fleet_leader") or 0
        shard.info = info

    def _set_fleet(self) -> None:
        """Tell each shard the fleet and where the others are, whenever that has changed."""
        version = self.state.node_version + self._node_version_base if self.state is not None else 0
        for index, shard in enumerate(self.shards):
            if shard.addresses_version == version or not shard.instance:
                continue
            addresses = [
                [instance, f"tcp://{node.host}:{node.port + 1 + i}", node.public_key, node.name]
                for node in self._known_nodes()
                for i, instance in enumerate(node.instances)
            ]
            shard.addresses_version = version
            self._call_shard(
                index, "set_fleet", {"fleet": self.fleet, "addresses": addresses}, SECOND, self._fleet_set(shard)
            )

    def _fleet_set(self, shard: _Shard) -> Answer:
        def answered(code: int, body: Any) -> None:
            if code != OK:
                shard.addresses_version = -1

        return answered

    def _watch(self) -> None:
        shard, instance = self.shards[0], self.shards[0].instance

        def answered(code: int, body: Any) -> None:
            if code != OK or not self.fleet or shard.instance != instance or body.get("state") is None:
                return
            shard.watched = True
            self._reset_state(body["index"], body["state"])

        self._call_shard(0, "watch_fleet", {}, SECOND, answered)

    def _reset_state(self, index: int, dump: Any) -> None:
        if type(dump) is not bytes or (self.state is not None and index < self.fleet_index):
            return
        try:
            state = FleetState.load(dump)
        except ValueError as error:
            self._log("error", f"shard 0 sent a fleet state that cannot be read: {error}")
            return
        if self.state is not None:
            self._node_version_base += self.state.node_version + 1
        self.state = state
        self.fleet_index = index
        self._state_changed()

    def _state_changed(self) -> None:
        assert self.state is not None
        if not self.state.fleet_id:
            return
        for node in self.state.nodes.values():
            self._sponsored.pop((node.host, node.port), None)
        self._records.clear()
        self._remember_nodes()
        self._declared &= set(self.state.gone) | {i for node in self.state.nodes.values() for i in node.instances}

    # -- proposing --------------------------------------------------------------------------------------------------

    def _propose(self, command: list[Any], then: Answer | None = None) -> None:
        """Propose a fleet command through shard 0; if it finds no leader, through another node's."""

        def answered(code: int, body: Any) -> None:
            others = self._reachable()
            if code in TRY_ELSEWHERE and others:
                address = others[self._rng.randrange(len(others))]
                args = {"fleet": self.fleet, "command": msgpack.packb(command)}
                self._rpc(address, "propose", args, 2 * SECOND, finished)
            else:
                finished(code, body)

        def finished(code: int, body: Any) -> None:
            if code != OK:
                self._status = f"the fleet refused {command[0]}: {_text(body)}"
            if then is not None:
                then(code, body)

        self._call_shard(0, "fleet_command", {"command": command, "timeout_ms": 1000}, 1500 * MS, answered)

    def _reachable(self) -> list[Address]:
        """Managers of this fleet that answered lately, but this one."""
        return sorted(
            address
            for address, (_, fleet, when_us) in self._seen.items()
            if fleet == self.fleet and self._now_us - when_us < 3 * self._ping_interval_us() + SECOND
        )

    # -- pings ------------------------------------------------------------------------------------------------------

    def _ping_interval_us(self) -> int:
        count = len(self.state.nodes) if self.state is not None else len(self._records)
        interval_us = min(self.settings.ping_interval_us, self.settings.purge_window_us // 5)
        return interval_us * max(PING_NODES, count) // PING_NODES

    def _ping_nodes(self) -> None:
        if not self._due("ping", self._ping_interval_us() if self.shards[0].fleet_leader else SURVEY_INTERVAL_US):
            return
        nodes = self._known_nodes()
        for node in nodes:
            if node.name != self.settings.name:
                self._ping((node.host, node.port))
        if not self.shards[0].fleet_leader:
            self._survey()
        silence_us = 3 * self._ping_interval_us()
        names = {node.name for node in nodes}
        for name in [name for name in self._heard_us if name not in names]:
            del self._heard_us[name]
        for name in [name for name in self.unreachable if name not in names]:
            del self.unreachable[name]
        for node in nodes:
            if node.name == self.settings.name:
                continue
            heard_us = self._heard_us.setdefault(node.name, self._now_us)
            if self._now_us - heard_us <= silence_us:
                if self.unreachable.pop(node.name, None) is not None:
                    self._log("info", f"node {node.name} is reachable again")
            elif node.name not in self.unreachable:
                self.unreachable[node.name] = (self._wall_us - (self._now_us - heard_us)) // SECOND
                self._log("warning", f"node {node.name} at {node.host}:{node.port} is unreachable")

    def _ping(self, address: Address) -> None:
        seq = self._rng.getrandbits(62)
        self._pings[address] = seq
        self._outputs.append(Send(address, Ping(PING, seq, self.record, self.fleet)))

    def _on_ping(self, message: Ping) -> None:
        if not self.is_ready:
            return
        sender = message.sender
        removed: tuple[int, ...] = ()
        if self.fleet:
            memory: tuple[FleetMemory, ...] = ()
            if self.state is not None:
                removed = tuple(i for i in sender.instances if i in self.state.gone)
        else:
            memory = (self.founding.memory.fleet,) if self.founding.memory.fleet else ()
        address = (sender.host, sender.port)
        self._outputs.append(Send(address, Pong(PONG, message.seq, self.record, self.fleet, memory, removed)))
        if self.fleet and not message.fleet and self._value is not None and self._value.fleet == self.fleet:
            if any(voter.instances == sender.instances for voter in self._value.voters):
                self._outputs.append(Send(address, Founded(FOUNDED, self.record, self._value)))

    def _on_pong(self, message: Pong) -> None:
        sender = message.sender
        address = (sender.host, sender.port)
        if not self.is_ready:
            return
        if self._pings.get(address) == message.seq:
            del self._pings[address]
            self._seen[address] = (sender, message.fleet, self._now_us)
            if self.fleet and message.fleet == self.fleet:
                for node in self._known_nodes():
                    if node.name == sender.name and (node.host, node.port) == address:
                        self._heard_us[node.name] = self._now_us
            elif self.fleet and message.fleet and self._due(f"other fleet {address}", 60 * SECOND):
                self._log(
                    "error",
                    f"node {sender.name} at {address[0]}:{address[1]} is in another fleet, {message.fleet.hex()}; this "
                    f"node is in {self.fleet.hex()}: the two cannot work together, check --peers",
                )
            if set(message.removed) & set(self.instances) and message.fleet == (self.fleet or message.fleet):
                self._leave("this node was removed from it; it joins as new")
                return
        if not self.fleet:
            if message.fleet and self.zone is not None:
                self.founding.stop(self._now_us)
            self.founding.on_pong(self._now_us, message, self.record)

    # -- founding messages ------------------------------------------------------------------------------------------

    def _on_candidate(self, message: Any) -> None:
        """A prepare or an accept: only nodes outside of any fleet are acceptors."""
        if not self.is_ready:
            return
        if self.fleet or any(shard.fleet for shard in self.shards):
            self._on_ping(Ping(PING, 0, message.sender, b""))
        elif message.kind == PREPARE:
            self.founding.on_prepare(self._now_us, message, self.record)
        else:
            self.founding.on_accept(self._now_us, message, self.record)

    def _on_promise(self, message: Any) -> None:
        if self.is_ready and not self.fleet:
            self.founding.on_promise(self._now_us, message, self.record)

    def _on_accepted(self, message: Any) -> None:
        if not self.fleet:
            self.founding.on_accepted(self._now_us, message)

    def _on_founded_message(self, message: Founded) -> None:
        self._on_founded(message.value)

    def _pull_founding(self) -> None:
        """Take over what founding wants done; messages to this node itself are delivered at once."""
        while True:
            outputs = self.founding.take_outputs()
            if not outputs:
                return
            for output in outputs:
                if isinstance(output, Chosen):
                    self._announce(output.value)
                elif isinstance(output, Send) and output.address == self.founding.address:
                    _HANDLERS[output.message.kind](self, output.message)
                else:
                    self._outputs.append(output)

    def _announce(self, value: FoundingValue) -> None:
        addresses = {*self.founding.peers, *((voter.host, voter.port) for voter in value.voters)}
        for address in sorted(addresses - {self.founding.address}):
            self._outputs.append(Send(address, Founded(FOUNDED, self.record, value)))
        self._on_founded(value)

    # -- calls between managers -------------------------------------------------------------------------------------

    def _on_rpc(self, message: ManagerRpc) -> None:
        address = (message.sender.host, message.sender.port)

        def answer(code: int, body: Any) -> None:
            self._outputs.append(Send(address, ManagerRpcAnswer(MANAGER_RPC_ANSWER, message.request_id, code, body)))

        if not self.fleet or not self.is_ready:
            answer(NOT_ACTIVE, "this node is in no fleet")
        elif message.args.get("fleet", self.fleet) != self.fleet:
            answer(REFUSED, f"this node is in another fleet, {self.fleet.hex()}")
        elif message.method == "join":
            self._sponsor(message.sender, answer)
        elif message.method == "propose":
            self._propose_for(message.args, answer)
        elif message.method == "local_groups":
            self._local_groups(lambda rows: answer(OK, rows))
        elif message.method == "declare_dead":
            instances = message.args.get("instances")
            if not isinstance(instances, list) or not all(type(i) is int for i in instances):
                answer(BAD_REQUEST, "instances is a list of numbers")
                return
            self._log("warning", f"{message.sender.name}: the operator declared instances {instances} dead")
            self._tell_shards_dead(instances)
            answer(OK, {})
        else:
            answer(BAD_REQUEST, f"there is no method {message.method:.100}")

    def _on_rpc_answer(self, message: ManagerRpcAnswer) -> None:
        pending = self._rpc_calls.pop(message.request_id, None)
        if pending is not None:
            pending.then(message.code, message.body)

    def _sponsor(self, record: NodeRecord, answer: Answer) -> None:
        """Let a node in, if it still is who it said it is: its request may be older than its present life."""
        address = (record.host, record.port)
        if not record.zone:
            answer(BAD_REQUEST, "a node that joins names its zone")
            return
        asked_us = self._now_us
        self._ping(address)

        def is_here() -> bool:
            return address in self._seen and self._seen[address][2] > asked_us

        def looked(done: bool) -> None:
            if not done:
                answer(UNANSWERED, f"{address[0]}:{address[1]} does not answer this node")
            elif self._seen[address][0].instances != record.instances:
                answer(NOT_ACTIVE, "the node has other instances by now")
            elif not self.fleet:
                answer(NOT_ACTIVE, "this node is in no fleet")
            else:
                self._let_in(record, answer)

        self._wait_for(SECOND, is_here, looked)

    def _let_in(self, record: NodeRecord, answer: Answer) -> None:
        """Propose the join. The node is remembered on disk first: see the second proof of raftfleet.fleet.founding."""
        address = (record.host, record.port)
        fleet = self.fleet

        def answered(code: int, body: Any) -> None:
            if self.fleet != fleet:
                answer(NOT_ACTIVE, "this node has left its fleet")
            elif code == OK:
                nodes = [list(_as_record(node)) for node in self._known_nodes()]
                answer(OK, {"fleet": self.fleet, "nodes": nodes})
            else:
                answer(code, _text(body))

        if address not in self._sponsored:
            self._sponsored[address] = record.name
            self._remember_nodes()
        args = {"command": ["join", self._join_fields(record)], "timeout_ms": 1500}
        self._call_shard(0, "fleet_command", args, 2 * SECOND, answered)

    def _propose_for(self, args: dict[str, Any], answer: Answer) -> None:
        try:
            command = msgpack.unpackb(args["command"], strict_map_key=False)
            if command[0] not in ("instances", "deactivate", "leave", "remove_node"):
                raise ValueError(f"{command[0]} is not passed on")
        except Exception as error:  # bytes from outside: msgpack has many ways to say no
            answer(BAD_REQUEST, f"not a fleet command to pass on: {error!r:.200}")
            return
        self._call_shard(0, "fleet_command", {"command": command, "timeout_ms": 1000}, 1500 * MS, answer)

    def _tell_shards_dead(self, instances: list[int]) -> None:
        self._declared.update(instances)
        for index in range(len(self.shards)):
            self._call_shard(index, "declare_dead", {"instances": instances}, 2 * SECOND, _ignore)

    # -- calls of clients -------------------------------------------------------------------------------------------

    def call(self, now_us: int, token: object, method: str, args: dict[str, Any], timeout_us: int) -> None:
        """A call from the control socket; answered once with a :class:`Reply` of the same token."""
        self._now_us = now_us

        def answer(code: int, body: Any) -> None:
            self._outputs.append(Reply(token, code, body))

        handler = _CALLS.get(method)
        if handler is None:
            answer(BAD_REQUEST, f"there is no method {method!r:.100}")
            return
        try:
            handler(self, args, max(timeout_us, 100 * MS), answer)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            answer(BAD_REQUEST, f"{method}: bad arguments: {error!r:.200}")

    def _call_activate(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        zone = args["zone"]
        if not isinstance(zone, str) or not 1 <= len(zone.encode()) <= 255 or "\0" in zone:
            answer(BAD_REQUEST, "a zone is a str of 1 to 255 bytes of UTF-8")
            return
        if self._leaving:
            answer(REFUSED, "this node is leaving its fleet: wait until it is inactive")
            return
        self.zone = zone
        self._deactivating = False

        def is_active() -> bool:
            mine = self.state.nodes.get(self.settings.name) if self.state is not None else None
            return self.node_state == "active" and mine is not None and mine.zone == zone

        def finished(done: bool) -> None:
            answer(OK if done else NOT_ACTIVE, {} if done else f"still activating: {self.status_text}")

        self._wait_for(timeout_us, is_active, finished)

    def _call_deactivate(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        if not self.fleet:
            self.zone = None
            self.founding.stop(self._now_us)
            answer(OK, {})
            return

        def answered(code: int, body: Any) -> None:
            if code != OK:
                answer(code, body)
            else:
                self._deactivating = True
                if args.get("wait"):
                    self._wait_for(timeout_us, lambda: self.node_state == "inactive", finished)
                else:
                    answer(OK, {})

        def finished(done: bool) -> None:
            answer(OK if done else UNANSWERED, {} if done else "members are still moving away: it goes on")

        self._propose(["deactivate", self.settings.name], answered)

    def _call_active_nodes(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        answer(OK, self.state.active_nodes() if self.state is not None else {})

    def _call_groups(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        self._pass_to_shard(0, "fleet_query", {"query": ["groups"]}, timeout_us, answer, reads=True)

    def _call_unreachable(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        answer(OK, dict(self.unreachable))

    def _pass_to_shard(
        self, index: int, method: str, args: dict[str, Any], timeout_us: int, answer: Answer, *, reads: bool = False
    ) -> None:
        """Have a shard answer. ``reads``: the call changes nothing, so that no answer leaves no doubt."""

        def answered(code: int, body: Any) -> None:
            answer(UNANSWERED if reads and code == OUTCOME_UNKNOWN else code, body)

        if not self.fleet or not self.is_ready:
            answer(NOT_ACTIVE, self._why_not_active())
            return
        # A little less time than the caller has, so that the shard's own answer is the one that arrives.
        self._call_shard(index, method, args, max(timeout_us - 50 * MS, timeout_us // 2), answered)

    def _why_not_active(self) -> str:
        if self.zone is None:
            return "this node is inactive: run 'raftfleet-node activate --zone ZONE'"
        return f"this node is in no fleet yet: {self.status_text}"

    def _call_group_change(self, method: str, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        self._pass_to_shard(0, method, args, timeout_us, answer)

    def _call_of_group(self, method: str, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        index = shard_of(args["name"], len(self.shards))
        self._pass_to_shard(index, method, args, timeout_us, answer, reads=method == "group_status")

    def _call_members(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        name = args["name"]
        state = self.state
        group = state.by_name.get(name) if state is not None else None
        if state is None or group is None:
            code = NOT_ACTIVE if state is None else GROUP_NOT_FOUND
            answer(code, self._why_not_active() if state is None else f"there is no group {name!r}")
            return

        def answered(code: int, body: Any) -> None:
            known = body if code == OK and isinstance(body, dict) else {}
            roles = {m["node"]: m["role"] for m in known.get("members", ())}
            order = [
                row._asdict() | {"role": roles.pop(row.node, "-")}
                for row in state.explain(group)  # nodes that are not active any more come last
            ]
            for node, role in roles.items():
                zone = state.nodes[node].zone if node in state.nodes else "-"
                order.append({"node": node, "zone": zone, "rank": -1, "hash": 0, "desired": False, "role": role})
            answer(
                OK,
                {
                    "name": name,
                    "uid": group.uid,
                    "replicas": group.replicas,
                    "leader": known.get("leader"),
                    "term": known.get("term"),
                    "order": order,
                },
            )

        index = shard_of(name, len(self.shards))
        self._call_shard(index, "group_status", {"name": name}, min(timeout_us, 2 * SECOND), answered)

    def _call_groups_detail(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        state = self.state
        if state is None:
            answer(NOT_ACTIVE, self._why_not_active())
            return

        def gathered(rows: dict[str, list[list[Any]]]) -> None:
            found: dict[int, dict[str, Any]] = {
                group.uid: {
                    "replicas": group.replicas,
                    "uid": group.uid,
                    "leader": None,
                    "term": 0,
                    "members": [],
                    "desired": [node for node, _ in state.desired(group)],
                    "commit": 0,
                }
                for group in state.groups.values()
            }
            for node in sorted(rows):
                for _name, uid, role, leader, term, _last, commit, *_ in rows[node]:
                    group = found.get(uid)
                    if group is None:
                        continue
                    if role != "learner":
                        group["members"].append(node)
                    group["commit"] = max(group["commit"], commit)
                    home = state.instance_home(leader) if leader else None
                    if home is not None and term >= group["term"]:
                        group["leader"], group["term"] = home[0], term
            answer(OK, {group.name: found[group.uid] for group in state.groups.values() if group.uid in found})

        self._gather(min(timeout_us, 2 * SECOND), gathered)

    def _call_leaderless(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        if not self.fleet:
            answer(NOT_ACTIVE, self._why_not_active())
            return
        self._gather(min(timeout_us, 2 * SECOND), lambda rows: answer(OK, self._leaderless(rows)))

    def _leaderless(self, rows: dict[str, list[list[Any]]]) -> dict[str, dict[str, Any]]:
        """Groups that no reachable member knows a reachable leader of, with what each of them says."""
        led: set[int] = set()
        said: dict[int, dict[str, Any]] = {}
        names: dict[int, str] = {0: FLEET_GROUP}
        for node in sorted(rows):
            for name, uid, role, leader, term, last_index, *_ in rows[node]:
                names[uid] = name
                home = self.state.instance_home(leader) if leader and self.state is not None else None
                if role == "leader":
                    led.add(uid)
                said.setdefault(uid, {})[node] = {
                    "role": role,
                    "term": term,
                    "last_index": last_index,
                    "leader": home[0] if home else None,
                }
        result = {names[uid]: members for uid, members in sorted(said.items()) if uid not in led}
        if self.state is not None:
            for group in self.state.groups.values():
                if group.uid not in said:
                    result[group.name] = {}
        return result

    def _gather(self, timeout_us: int, then: Callable[[dict[str, list[list[Any]]]], None]) -> None:
        """Ask this node's shards and every reachable manager for their local groups; ``then`` gets node -> rows."""
        found: dict[str, list[list[Any]]] = {}
        others = {address: self._seen[address][0].name for address in self._reachable()}
        waiting = {self.settings.name, *others.values()}

        def came(node: str) -> Callable[[int, Any], None]:
            def answered(code: int, body: Any) -> None:
                if code == OK and isinstance(body, list):
                    found[node] = [row for row in body if isinstance(row, list) and len(row) >= 8]
                if node in waiting:
                    waiting.discard(node)
                    if not waiting:
                        then(found)

            return answered

        for address, node in others.items():
            self._rpc(address, "local_groups", {}, timeout_us, came(node))
        mine = came(self.settings.name)
        self._local_groups(lambda rows: mine(OK, rows), timeout_us)

    def _local_groups(self, then: Callable[[list[list[Any]]], None], timeout_us: int = SECOND) -> None:
        rows: list[list[Any]] = []
        waiting = set(range(len(self.shards)))

        def came(index: int) -> Answer:
            def answered(code: int, body: Any) -> None:
                if code == OK and isinstance(body, list):
                    rows.extend(body)
                waiting.discard(index)
                if not waiting:
                    then(rows)

            return answered

        for index in range(len(self.shards)):
            self._call_shard(index, "local_groups", {}, timeout_us, came(index))

    def _call_remove_dead_node(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        name = args["node"]
        if not self.fleet:
            self._declare_dead_while_founding(name, answer)
            return
        nodes = [node for node in self._known_nodes() if node.name == name]
        if not nodes:
            answer(REFUSED, f"the fleet has no node {name!r:.100}")
            return
        node = nodes[0]
        if name == self.settings.name:
            answer(REFUSED, "this node is not dead: it answers")
            return
        seen = self._seen.get((node.host, node.port))
        lately_us = 3 * self._ping_interval_us()
        if seen is not None and self._now_us - seen[2] < lately_us and seen[0].instances == tuple(node.instances):
            answer(REFUSED, f"node {name} is not dead: it answered {(self._now_us - seen[2]) / SECOND:.1f} s ago")
            return
        instances = list(node.instances)
        self._log("warning", f"the operator declared node {name} dead: instances {instances}")
        self._gather(SECOND, lambda rows: self._begin_removal(name, instances, rows, timeout_us, answer))

    def _begin_removal(
        self, name: str, instances: list[int], rows: dict[str, Any], timeout_us: int, answer: Answer
    ) -> None:
        before = set(self._leaderless(rows))
        self._removals[name] = instances
        self._tell_shards_dead(instances)
        for address in self._reachable():
            self._rpc(address, "declare_dead", {"instances": instances}, 2 * SECOND, _ignore)
        # Where more nodes are dead, nothing recovers before they are declared too: the operator is told so soon.
        deadline_us = self._now_us + min(timeout_us * 3 // 4, 2 * RECOVERY_WAIT_US)

        def is_removed() -> bool:
            return name not in self._removals

        def finished(done: bool) -> None:
            if not done:
                answer(
                    OK,
                    {
                        "recovered": [],
                        "waiting": sorted(before),
                        "message": f"{name} is declared dead, but the fleet group still has no leader: declare the "
                        "other dead nodes too, or start them again",
                    },
                )
                return
            check()

        def check() -> None:
            self._gather(SECOND, checked)

        def checked(now: dict[str, Any]) -> None:
            waiting = set(self._leaderless(now)) & before
            if waiting and self._now_us + 300 * MS < deadline_us:
                again_us = self._now_us + 300 * MS
                self._wait_for(timeout_us, lambda: self._now_us >= again_us, lambda _: check())
                return
            message = f"{name} was removed from the fleet"
            if waiting:
                message += f"; {len(waiting)} groups have no leader yet: if more nodes are dead, declare them too"
            answer(OK, {"recovered": sorted(before - waiting), "waiting": sorted(waiting), "message": message})

        self._wait_for(min(timeout_us // 2, RECOVERY_WAIT_US), is_removed, finished)

    def _declare_dead_while_founding(self, name: str, answer: Answer) -> None:
        memory = self.founding.memory
        nodes = list(memory.fleet.nodes) if memory.fleet is not None else []
        if memory.accepted is not None:
            nodes.extend((voter.name, voter.host, voter.port) for voter in memory.accepted.voters)
        found = [(host, port) for node, host, port in nodes if node == name]
        if not found:
            answer(NOT_ACTIVE, self._why_not_active())
            return
        self.founding.declared_dead.update(found)
        self._log("warning", f"the operator declared node {name} dead: founding does not wait for it any longer")
        answer(OK, {"recovered": [], "waiting": [], "message": f"founding does not wait for {name} any longer"})

    def _call_status(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        """The figures of shards that answer at once are fresh, those of others as they were last told."""
        waiting = {index for index, shard in enumerate(self.shards) if shard.instance}
        if not waiting:
            answer(OK, self.status())

        def came(index: int) -> Answer:
            def answered(code: int, body: Any) -> None:
                if code == OK:
                    self._take_shard_info(self.shards[index], body)
                waiting.discard(index)
                if not waiting:
                    answer(OK, self.status())

            return answered

        for index in sorted(waiting):
            self._call_shard(index, "shard_info", {}, min(timeout_us // 2, 300 * MS), came(index))

    def status(self) -> dict[str, Any]:
        """``status --json`` but for the processes' figures, which the driver adds to each of ``workers``."""
        state = self.state
        return {
            "node": self.settings.name,
            "instance": self.shards[0].instance,
            "zone": self.zone,
            "state": self.node_state,
            "waiting": self.status_text,
            "fleet": self.fleet.hex() or None,
            "endpoint": f"tcp://{self.settings.host}:{self.settings.port}",
            "durable": self.settings.durable,
            "nodes": state.active_nodes() if state is not None else {},
            "unreachable": dict(self.unreachable),
            "groups": len(state.groups) if state is not None else 0,
            "workers": [
                {
                    "index": index,
                    "instance": shard.instance,
                    "members": shard.info.get("members", 0),
                    "leaders": shard.info.get("leaders", 0),
                }
                for index, shard in enumerate(self.shards)
            ],
        }

    def _call_stop(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        answer(OK, {})
        if not args.get("drain"):
            self._outputs.append(StopNode())
            return
        waiting = set(range(len(self.shards)))

        def drained(index: int) -> Answer:
            def answered(code: int, body: Any) -> None:
                waiting.discard(index)
                if not waiting:
                    self._outputs.append(StopNode())

            return answered

        for index in range(len(self.shards)):
            self._call_shard(index, "drain", {}, min(timeout_us, 5 * SECOND), drained(index))

    # -- parts ------------------------------------------------------------------------------------------------------

    def _due(self, duty: str, interval_us: int) -> bool:
        """Whether it is time for a duty that is done at most once per interval; True means that it is done now."""
        if self._now_us < self._tasks.get(duty, 0):
            return False
        self._tasks[duty] = self._now_us + interval_us
        return True

    def _call_shard(self, index: int, method: str, args: dict[str, Any], timeout_us: int, then: Answer) -> None:
        self._tokens += 1
        # The driver's channel gives up by itself a tenth of a second late, and knows whether the call was sent.
        self._shard_calls[self._tokens] = _Pending(self._now_us + timeout_us + 300 * MS, then)
        self._outputs.append(ShardCall(index, method, args, timeout_us // MS, self._tokens))

    def _rpc(self, address: Address, method: str, args: dict[str, Any], timeout_us: int, then: Answer) -> None:
        self._tokens += 1
        self._rpc_calls[self._tokens] = _Pending(self._now_us + timeout_us, then)
        self._outputs.append(Send(address, ManagerRpc(MANAGER_RPC, self._tokens, self.record, method, args)))

    def _wait_for(self, timeout_us: int, is_done: Callable[[], bool], then: Callable[[bool], None]) -> None:
        self._waiters.append((self._now_us + timeout_us, is_done, then))

    def _expire(self) -> None:
        for calls in (self._shard_calls, self._rpc_calls):
            for token in [token for token, pending in calls.items() if pending.deadline_us <= self._now_us]:
                pending = calls.pop(token, None)
                if pending is not None:
                    pending.then(OUTCOME_UNKNOWN, "no answer in time")
        waiters, self._waiters = self._waiters, []
        for deadline_us, is_done, then in waiters:
            done = is_done()
            if done or deadline_us <= self._now_us:
                then(done)
            else:
                self._waiters.append((deadline_us, is_done, then))

    def _log(self, level: str, text: str) -> None:
        self._outputs.append(Log(level, text))


def _ignore(code: int, body: Any) -> None:
    """The answer to a call whose effect shows elsewhere."""


def _node_fields(record: NodeRecord) -> dict[str, Any]:
    """What the fleet command ``join`` wants of a node."""
    fields = record._asdict()
    del fields["incarnation"], fields["store"]
    fields["instances"] = list(record.instances)
    return fields


def _as_record(node: Node | NodeRecord) -> NodeRecord:
    if isinstance(node, NodeRecord):
        return node
    return NodeRecord(node.name, node.zone, node.host, node.port, node.public_key, node.instances, 0, 0)


def _text(body: Any) -> str:
    """A reply's body in words: a str, or ``[type, message]`` of a failed command."""
    return str(body[1]) if isinstance(body, (list, tuple)) and len(body) == 2 else str(body)


def _group_change(method: str) -> Callable[..., None]:
    def call(self: ManagerCore, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        self._call_group_change(method, args, timeout_us, answer)

    return call


def _of_group(method: str) -> Callable[..., None]:
    def call(self: ManagerCore, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        self._call_of_group(method, args, timeout_us, answer)

    return call


_HANDLERS: dict[int, Callable[[ManagerCore, Any], None]] = {
    PING: ManagerCore._on_ping,
    PONG: ManagerCore._on_pong,
    PREPARE: ManagerCore._on_candidate,
    ACCEPT: ManagerCore._on_candidate,
    PROMISE: ManagerCore._on_promise,
    ACCEPTED: ManagerCore._on_accepted,
    FOUNDED: ManagerCore._on_founded_message,
    MANAGER_RPC: ManagerCore._on_rpc,
    MANAGER_RPC_ANSWER: ManagerCore._on_rpc_answer,
}

_CALLS: dict[str, Callable[..., None]] = {
    "activate": ManagerCore._call_activate,
    "deactivate": ManagerCore._call_deactivate,
    "active_nodes": ManagerCore._call_active_nodes,
    "add_group": _group_change("add_group"),
    "remove_group": _group_change("remove_group"),
    "change_config": _group_change("change_config"),
    "groups": ManagerCore._call_groups,
    "groups_detail": ManagerCore._call_groups_detail,
    "members": ManagerCore._call_members,
    "group_status": _of_group("group_status"),
    "replace_leader": _of_group("replace_leader"),
    "unreachable_nodes": ManagerCore._call_unreachable,
    "leaderless_groups": ManagerCore._call_leaderless,
    "remove_dead_node": ManagerCore._call_remove_dead_node,
    "status": ManagerCore._call_status,
    "stop": ManagerCore._call_stop,
}

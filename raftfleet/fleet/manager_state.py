"""The state of a node's manager, and the few tools by which all its parts work.

A manager's core is one object with one state; its rules are told in a chain of classes, one file each, in which a part
knows those before it and none behind it (:mod:`raftfleet.fleet.manager_core` lists them). This is the first: the
fields, what follows from them at once (is the node active? what does it wait for? whom does it know?), and the tools.

The tools, and what a caller may rely on:

* A call (of a shard, of another manager) is answered exactly once, by an answer or, at its deadline, by
  OUTCOME_UNKNOWN. The answer arrives in a later step: whoever handles it looks first whether the world is still the
  one in which it asked.
* A fleet command goes through this node's shard 0 and, if that finds no leader, through another node. It may take
  effect twice: every fleet command is idempotent.
* A duty that is due (``_due``) is done at most once per interval and needs no timer: every tick asks again.
* What may have to be known after a death is handed out as a :class:`~raftfleet.fleet.founding.Persist` before anything
  that rests on it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack

from raftfleet.core.codes import NO_LEADER, NOT_ACTIVE, OK, OUTCOME_UNKNOWN, OVERLOADED, UNANSWERED
from raftfleet.core.manager_messages import MANAGER_RPC, FleetMemory, FoundingValue, ManagerRpc, NodeRecord
from raftfleet.fleet.founding import Address, Founding, Memory, Send
from raftfleet.fleet.machine import FleetState, Node
from raftfleet.fleet.manager_outputs import MS, SECOND, Answer, Log, ManagerSettings, Output, ShardCall

if TYPE_CHECKING:
    from random import Random

TRY_ELSEWHERE = (NO_LEADER, OVERLOADED, NOT_ACTIVE, UNANSWERED, OUTCOME_UNKNOWN)
"""Shard 0 has not got a fleet command through: another node may know the leader (every fleet command is idempotent)."""
SURVEY_INTERVAL_US = 400 * MS
RPC_TIMEOUT_US = 3 * SECOND
PING_NODES = 20
"""Up to so many nodes are pinged once per interval; above, the interval grows with the nodes."""


class ShardView:
    """What the manager knows of one of its shards. ``instance`` 0: not known (yet, or it is restarting)."""

    __slots__ = (
        "addresses_version",
        "fleet",
        "fleet_leader",
        "info",
        "is_retired",
        "is_retiring",
        "instance",
        "stale_instance",
        "watched",
    )

    def __init__(self) -> None:
        self.instance = 0
        self.stale_instance = 0
        self.fleet = b""
        self.fleet_leader = 0
        self.addresses_version = -1
        self.watched = False
        self.is_retiring = False  # it was told to end for good
        self.is_retired = False  # it has
        self.info: dict[str, Any] = {}


class PendingAnswer(NamedTuple):
    deadline_us: int
    then: Answer


class ManagerState(ABC):
    """Fields and tools of a manager; made as :class:`raftfleet.fleet.manager_core.ManagerCore`, never alone."""

    def __init__(self, settings: ManagerSettings, memory: Memory, rng: Random, now_us: int = 0) -> None:
        self.settings = settings
        self.zone = settings.zone
        self.fleet = b""
        self.state: FleetState | None = None
        self.fleet_index = 0
        self.unreachable: dict[str, int] = {}
        self.shards = [ShardView() for _ in range(settings.workers)]
        self.founding = Founding((settings.host, settings.port), settings.peers, memory, rng, rng.getrandbits(62) + 1)
        self._rng = rng
        self._now_us = now_us
        self._ticked_us = now_us
        self._wall_us = 0
        self._outputs: list[Output] = []
        self._incarnation = rng.getrandbits(62) + 1
        self._tokens = rng.getrandbits(40)
        self._shard_calls: dict[int, PendingAnswer] = {}
        self._rpc_calls: dict[int, PendingAnswer] = {}
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

    # Steps that other steps need before they are defined, further up the chain.

    @abstractmethod
    def _leave(self, why: str) -> None:
        """Have all shards start afresh, outside of any fleet: :mod:`raftfleet.fleet.manager_entry`."""

    @abstractmethod
    def _reset_shard(self, index: int, shard: ShardView) -> None:
        """Have a shard start afresh: :mod:`raftfleet.fleet.manager_entry`."""

    @abstractmethod
    def _pull_founding(self) -> None:
        """Take over what founding wants done: :class:`raftfleet.fleet.manager_core.ManagerCore`."""

    # -- what follows from the state --------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Whether all shards are known: before that this node does not know itself what it is."""
        return all(shard.instance or shard.is_retiring for shard in self.shards)

    @property
    def instances(self) -> tuple[int, ...]:
        """Present instances of the shards."""
        return tuple(shard.instance for shard in self.shards if shard.instance or not shard.is_retiring)

    @property
    def surplus(self) -> list[ShardView]:
        """Shards that are there only until their members have moved (:mod:`raftfleet.fleet.manager_resharding`)."""
        return self.shards[self.settings.placing :]

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

    @property
    def leads_fleet(self) -> bool:
        """Whether this node's shard 0 leads the fleet group, as far as is known."""
        return bool(self.shards[0].instance and self.shards[0].info.get("fleet_leads"))

    def _why_not_active(self) -> str:
        if self.zone is None:
            return "this node is inactive: run 'raftfleet-node activate --zone ZONE'"
        return f"this node is in no fleet yet: {self.status_text}"

    def _known_nodes(self) -> list[Node] | list[NodeRecord]:
        if self.state is not None and self.state.fleet_id:
            return list(self.state.nodes.values())
        return list(self._records.values())

    def _reachable(self) -> list[Address]:
        """Managers of this fleet that answered lately, but this one."""
        return sorted(
            address
            for address, (_, fleet, when_us) in self._seen.items()
            if fleet == self.fleet and self._now_us - when_us < 3 * self._ping_interval_us() + SECOND
        )

    def _ping_interval_us(self) -> int:
        count = len(self.state.nodes) if self.state is not None else len(self._records)
        interval_us = min(self.settings.ping_interval_us, self.settings.purge_window_us // 5)
        return interval_us * max(PING_NODES, count) // PING_NODES

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

    # -- tools ------------------------------------------------------------------------------------------------------

    def _due(self, duty: str, interval_us: int) -> bool:
        """Whether it is time for a duty that is done at most once per interval; True means that it is done now."""
        if self._now_us < self._tasks.get(duty, 0):
            return False
        self._tasks[duty] = self._now_us + interval_us
        return True

    def _call_shard(self, index: int, method: str, args: dict[str, Any], timeout_us: int, then: Answer) -> None:
        self._tokens += 1
        # The driver's channel gives up by itself a tenth of a second late, and knows whether the call was sent.
        self._shard_calls[self._tokens] = PendingAnswer(self._now_us + timeout_us + 300 * MS, then)
        self._outputs.append(ShardCall(index, method, args, timeout_us // MS, self._tokens))

    def _rpc(self, address: Address, method: str, args: dict[str, Any], timeout_us: int, then: Answer) -> None:
        self._tokens += 1
        self._rpc_calls[self._tokens] = PendingAnswer(self._now_us + timeout_us, then)
        self._outputs.append(Send(address, ManagerRpc(MANAGER_RPC, self._tokens, self.record, method, args)))

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
                self._status = f"the fleet refused {command[0]}: {text_of(body)}"
            if then is not None:
                then(code, body)

        self._call_shard(0, "fleet_command", {"command": command, "timeout_ms": 1000}, 1500 * MS, answered)

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


def ignore_answer(code: int, body: Any) -> None:
    """The answer to a call whose effect shows elsewhere."""


def node_fields(record: NodeRecord) -> dict[str, Any]:
    """What the fleet command ``join`` wants of a node."""
    fields = record._asdict()
    del fields["incarnation"], fields["store"]
    fields["instances"] = list(record.instances)
    return fields


def as_record(node: Node | NodeRecord) -> NodeRecord:
    if isinstance(node, NodeRecord):
        return node
    return NodeRecord(node.name, node.zone, node.host, node.port, node.public_key, node.instances, 0, 0)


def text_of(body: Any) -> str:
    """A reply's body in words: a str, or ``[type, message]`` of a failed command."""
    return str(body[1]) if isinstance(body, (list, tuple)) and len(body) == 2 else str(body)

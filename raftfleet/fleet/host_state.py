"""What a host knows and remembers, and what its loop is told to carry out: the lowest of the host's layers.

This module decides nothing (:mod:`raftfleet.fleet.host` lists the layers). All state is in one place,
:meth:`HostState.__init__`, because the layers above share it: a leader learned in one sets requests free in another. A
layer calls only those below it; the three calls that go upward are declared here, as abstract methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from raftfleet.core.config import GroupConfig
from raftfleet.core.durable import Disk, DurableShard
from raftfleet.core.host_messages import ForwardReply, ForwardRequest, Leadership
from raftfleet.core.shard import Shard, ShardSettings
from raftfleet.fleet.machine import FleetState, RecordingFleetMachine
from raftfleet.fleet.pace import Pace
from raftfleet.fleet.requests import Request

if TYPE_CHECKING:
    import random

RETRY_PARKED_US = 50_000
"""How often requests that wait without an event to wake them are tried again."""
MachineFactory = Callable[[GroupConfig], tuple[Any, Any]]


class HostDisk(Disk, Protocol):
    """The disk of a durable worker (:class:`raftfleet.storage.keeper.Keeper`)."""

    def save_note(self, key: str, value: bytes) -> None:
        """Remember a small fact of the worker."""

    def archived_snapshot(self, uid: int) -> tuple[str, int]:
        """Where the newest snapshot of a member that is no more lies, and its index; an empty str if there is none."""

    def status(self) -> dict[str, Any]:
        """How it is, for people."""


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
        exit_retired: this worker is not needed any more: end for good.
    """

    sends: dict[int, list[Any]] = field(default_factory=dict)
    replies: dict[int, list[Any]] = field(default_factory=dict)
    table: list[tuple[Any, ...]] = field(default_factory=list)
    addresses: dict[int, tuple[str, str]] = field(default_factory=dict)
    forgotten: list[int] = field(default_factory=list)
    upcalls: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    exit_fresh: bool = False
    exit_retired: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to carry out, sends aside."""
        return not (
            self.replies
            or self.table
            or self.addresses
            or self.forgotten
            or self.upcalls
            or self.notes
            or self.exit_fresh
            or self.exit_retired
        )


@dataclass(frozen=True)
class HostSettings:
    """Who this worker is.

    Attributes:
        node: this node's name. index: of this worker. workers: among how many the names of groups are shared out; a
            worker whose index is not below it owns none (:mod:`raftfleet.fleet.manager_resharding`).
        endpoint, public_key: how other shards reach this one.
        beat_interval_us: see :class:`raftfleet.core.shard.ShardSettings`.
    """

    node: str
    index: int
    workers: int
    endpoint: str
    public_key: str = ""
    beat_interval_us: int = 200_000


class HostState(ABC):
    """The lowest layer: all state, and what every layer above may use."""

    def __init__(
        self,
        instance: int,
        settings: HostSettings,
        rng: random.Random,
        make_machine: MachineFactory,
        disk: HostDisk | None = None,
    ) -> None:
        # Who this is.
        self.instance = instance
        self.settings = settings
        self.rng = rng
        self.make_machine = make_machine
        self.disk = disk
        shard_settings = ShardSettings(beat_interval_us=settings.beat_interval_us)
        self.shard: Shard
        if disk is None:
            self.shard = Shard(instance, rng, shard_settings)
        else:
            self.shard = DurableShard(instance, rng, shard_settings, disk)
        self.shard.may_create = self._recipe
        self.shard.is_dead = self._is_dead
        self.shard.holders = self._holders
        self.shard.node_of = self._node_of
        self.client_id = rng.getrandbits(128).to_bytes(16, "big")
        self.counters: dict[str, int] = {}
        # What is known of the fleet, its leaders and its shards.
        self.fleet_id = b""
        self.fleet = FleetState()
        self.fleet_index = 0
        self.fleet_known = False  # whether self.fleet holds a fleet's state at all
        self.leaders: dict[int, tuple[int, int]] = {}  # uid -> (term, instance)
        self._leaderships: dict[tuple[int, int], tuple[int, int]] = {}  # one object for equal ones
        self.addresses: dict[int, tuple[str, str]] = {}
        # The fleet's log.
        self._fleet_machine: RecordingFleetMachine | None = None
        self._founding_commands: list[Any] = []
        self._seen_node_version = -1
        self._unstarted: dict[int, None] = {}  # groups whose member here could not start yet
        self._watchers: dict[int, None] = {}
        self._known: dict[str, int] = {}  # name -> uid, of the groups whose name this worker owns
        self._guests: dict[int, None] = {}  # uids of members whose group's name another worker owns
        self._dead_early: set[int] = set()
        self._removed: set[int] = set()  # the last removals that were acted upon here; see host_following
        self._removed_before: tuple[int, set[int]] = (0, set())  # as found on the disk, with the fleet's epoch
        # Requests, and where they wait.
        self._open: dict[Request, None] = {}
        self._open_count = 0  # of their commands and queries: a run is one request of many
        self._open_bytes = 0
        self._parked: dict[int, list[Request]] = {}
        self._checking: dict[str, list[Request]] = {}
        self._awaiting_feed: dict[str, list[Request]] = {}
        self._forwarded: dict[int, Request] = {}
        self._newest_forward: dict[int, int] = {}
        self._copies: dict[int, list[Any]] = {}  # id -> [bytes of a state, when a piece was last fetched]
        # Leaders: who moved, who is asked, who has none.
        self._moved: dict[int, None] = {}
        self._asking: dict[int, None] = {}
        self._leaderless: dict[int, None] = {}
        self._guess_count = 0
        self._counted: tuple[int, list[str]] | None = None
        self._counted_us = 0
        self._asked_for_leaders = False
        self._elected: dict[int, None] = {}  # here since the last sweep
        self._sweep_left: list[int] = []
        # What leaves with the next collection, and what is called.
        self._next_id = 1
        self._forwards: dict[int, list[ForwardRequest]] = {}
        self._answers: dict[int, list[ForwardReply]] = {}
        self._notices: dict[int, dict[int, Leadership]] = {}
        self._rpcs: dict[int, tuple[int, Callable[[int, Any], None]]] = {}
        self._upcalls: dict[int, Callable[[int, Any], None]] = {}
        self._introduced: dict[int, int] = {}
        self._out = Outputs()
        # This host's own commands to the fleet group, each exactly once.
        self._seq = 0
        self._acked = 0
        self._acked_ahead: set[int] = set()
        # Reconciling, and changing the fleet.
        self._reconcile: dict[int, None] = {}
        self._reconcile_later: dict[int, None] = {}
        self._pinned: dict[int, int] = {}
        self._catching_up: dict[int, int] = {}  # uid -> since when
        self._pace = Pace()
        self._import_ok: dict[tuple[int, str, str | None, int | None], int] = {}  # -> machine's version there
        # Members on the disk that the code here cannot work with (yet).
        self._resting: dict[int, Any] = {}
        self._load_state: Callable[[Any], bytes] = lambda info: b""
        # Timers.
        self._delayed: list[tuple[int, Callable[[], None]]] = []
        self._next_retry_us = 0
        self._next_sweep_us = 0
        self._next_reconcile_us = 0
        self._next_pace_us = 0
        self._next_drain_us = 0
        self._transfer_failed_us: dict[int, int] = {}  # uid -> when a leadership could not be handed over

    @property
    def now_us(self) -> int:
        """The iteration's monotonic time."""
        return self.shard.now_us

    def note(self, level: str, text: str) -> None:
        """A line for the log."""
        self._out.notes.append((level, text))

    def count(self, what: str) -> None:
        """Count an occurrence."""
        self.counters[what] = self.counters.get(what, 0) + 1

    def _set_address(self, instance: int, endpoint: str, public_key: str) -> None:
        if instance != self.instance and self.addresses.get(instance) != (endpoint, public_key):
            self.addresses[instance] = (endpoint, public_key)
            self._out.addresses[instance] = (endpoint, public_key)

    def _send(self, peer: int, message: Any) -> None:
        self._out.sends.setdefault(peer, []).append(message)

    def _is_dead(self, uid: int) -> bool:
        return uid in self._dead_early or (self.fleet_known and self.fleet.is_dead_uid(uid))

    def _holders(self, uid: int) -> list[int]:
        """Whom to ask about a group if those that its member here knows are silent: where it should be by now."""
        group = self.fleet.group_of_uid(uid)
        return [instance for _, instance in self.fleet.desired(group)] if group is not None else []

    def _node_of(self, instance: int) -> str:
        home = self.fleet.instance_home(instance)
        if home is not None:
            return home[0]
        return self.fleet.former.get(instance) or f"instance {instance:x}"

    def _name(self, uid: int) -> str:
        member = self.shard.members.get(uid)
        return member.name if member is not None else f"uid {uid}"

    # ------------------------------------------------------------------ what the layers above provide

    @abstractmethod
    def _remember_removed(self, uids: list[int]) -> None:
        """These groups are being removed here: saved, so that they stay so."""

    @abstractmethod
    def _route(self, request: Request, *, guess: bool = False) -> None:
        """See :meth:`raftfleet.fleet.host_routing.RoutingLayer._route`."""

    @abstractmethod
    def _announce_all_to(self, instance: int) -> bool:
        """See :meth:`raftfleet.fleet.host_leaders.LeaderLayer._announce_all_to`."""

    @abstractmethod
    def _recipe(self, uid: int) -> tuple[str, GroupConfig, Any, Any] | None:
        """See :meth:`raftfleet.fleet.host_following.FollowingLayer._recipe`."""

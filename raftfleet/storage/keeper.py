"""A shard's disk, with the judgement that the loop needs: what is tried again, when a snapshot is due, when to tidy up.

:class:`Keeper` is what a :class:`raftfleet.core.durable.DurableShard` saves to. Around it, once per loop and in this
order::

    shard.persist()               one write and one fdatasync for all that changed; False: no room
    keeper.work(now_us)           one bounded piece of housekeeping, now and then a snapshot
    keeper.rest(now_us)           instead of the above, where the loop found nothing to do

Rules:

* No room (FULL) is tried again a few times a second and ends by itself. Everything else that a disk refuses is final:
  :class:`~raftfleet.storage.base.StoragePoisoned` comes out of ``persist``, ``work`` and ``rest``, and whoever owns the
  shard must end it without sending anything more that rests on it (DESIGN 5.14).
* A member's state is snapshotted when its log has grown to twice the newest snapshot (and to ``SNAPSHOT_LOG_BYTES_MIN``
  at least), or when the store wants the room. What may be large is given to ``begin_snapshot``, which writes it in
  another process; the rest is written here, one per loop.
* When nothing has happened for a while, a mark proves the last batch: only then is damage to it told from a torn tail.

For simulations: everything here goes through :class:`raftfleet.storage.files.Files`, and time is an argument. A whole
node's shard on a simulated disk is::

    keeper, found = open_keeper("/n1/shard-0", node="n1", new_instance=..., files=FakeFiles())
    host = Host(found.instance, settings, rng, make_machine, disk=keeper)
    host.begin(now_us, wall_us); keeper.shard = host.shard
    restore(host, keeper, found)
    ... host.begin / receive / tick / out = host.finish() ...

``host.finish()`` saves between the appends and everything else. A crash is ``PowerLoss`` or ``StoragePoisoned`` out of
``finish()``: drop host and keeper, ``files.crash(rng)``, and open again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from raftfleet.core.failures import describe
from raftfleet.core.sending import INLINE_BYTES_MAX
from raftfleet.storage.arrival import ArrivalFile, StoredSource
from raftfleet.storage.base import DiskState, RecoveredShard, SnapshotInfo, StorageDamaged, StorageFull
from raftfleet.storage.store import ShardStore

if TYPE_CHECKING:
    from raftfleet.core.durable import DurableShard
    from raftfleet.core.incoming import Arrival, Key
    from raftfleet.core.member import Member
    from raftfleet.core.messages import Entry

FULL_RETRY_US = 250_000
MARK_AFTER_US = 100_000
"""A shard that changed nothing for so long marks its log: longer than the pauses within a client's conversation."""
SNAPSHOT_LOG_BYTES_MIN = 4 << 20
"""No snapshot for less log than this unless the store asks: it costs three fsyncs and replays in a moment."""
LOOK_US = 200_000
RETRY_SNAPSHOT_US = 10_000_000
NOTES_KEPT_MAX = 100
SAY_AGAIN_US = 300_000_000
"""A problem that goes on is said when it begins and once in five minutes: it is met a few times a second."""
LOOK_AT_SPACE_US = 5_000_000
NEVER_US = 1 << 62

BeginSnapshot = Callable[["Member", int], bool]
"""``begin(member, generation)``: start writing its snapshot elsewhere; False if none can be begun now."""


class Keeper:
    """See the module's text. Satisfies :class:`raftfleet.core.durable.Disk`.

    Attributes:
        shard: whose disk this is; set by the owner before anything is saved.
        inline_bytes_max: a member whose newest snapshot, and log since, are at most this is written in the loop.
        begin_snapshot: writes large snapshots elsewhere; None: all are written here.
        begin_last_state: the same for a member that is removed at the next moment.
        notes: lines for the log, ``(level, text)``; the owner takes them.
        fork_us_max: how long the longest fork for a snapshot took.
        watch: called with True before a call that may wait for the disk, with False after it.
    """

    def __init__(self, store: ShardStore) -> None:
        self.store = store
        self.shard: DurableShard | None = None
        self.begin_snapshot: BeginSnapshot | None = None
        self.begin_last_state: BeginSnapshot | None = None
        self.notes: list[tuple[str, str]] = []
        self.watch: Callable[[bool], None] = lambda waits: None
        self.snapshot_count = 0
        self.fork_us_max = 0
        self.now_us = 0
        self.inline_bytes_max = INLINE_BYTES_MAX
        self._wanted: dict[int, None] = {}  # members whose snapshot somebody waits for, the first one first
        self._retry_us = 0
        self._look_us = 0
        self._looked_at_us = 0
        self._changed_us = 0
        self._is_marked = True
        self._failed_us: dict[int, int] = {}  # uid -> when its snapshot, which came to nothing, is tried again
        self._failed_due_us = NEVER_US
        self._has_more_work = False
        self._state = store.state
        self._said_us: dict[str, int] = {}  # problem -> when it was last said
        self._space_us = 0

    # ------------------------------------------------------------------ what the shard saves: collected by the store

    def save_group(
        self,
        uid: int,
        name: str,
        config: dict[str, Any],
        first_voters: Sequence[int] | None,
        life: int,
        facts: Any = None,
    ) -> None:
        """See :class:`raftfleet.core.durable.Disk`."""
        self.store.save_group(uid, name, config, first_voters, life, facts)

    def save_vote(self, uid: int, term: int, vote: int) -> None:
        """See :class:`raftfleet.core.durable.Disk`."""
        self.store.save_vote(uid, term, vote)

    def append(self, uid: int, first: int, entries: Sequence[Entry]) -> None:
        """See :class:`raftfleet.core.durable.Disk`."""
        self.store.append(uid, first, entries)

    def reset(self, uid: int, index: int, term: int) -> None:
        """See :class:`raftfleet.core.durable.Disk`."""
        self.store.reset(uid, index, term)

    def forget_group(self, uid: int) -> None:
        """See :class:`raftfleet.core.durable.Disk`."""
        self.store.forget_group(uid)

    def bury(self, uid: int, term: int, vote: int, life: int, facts: Any = None) -> None:
        """See :class:`raftfleet.core.durable.Disk`."""
        self.store.bury(uid, term, vote, life, facts)

    def save_note(self, key: str, value: bytes) -> None:
        """Remember a small fact of the shard, with the next sync."""
        self.store.save_note(key, value)

    # ------------------------------------------------------------------ what waits for the disk

    def set_fleet(self, fleet: bytes) -> bool:
        """Whether the disk says now whose it is. False: no room for that, ask again; until then it is nobody's."""
        if self.now_us < self._retry_us:
            return False
        self.watch(True)
        try:
            self.store.set_fleet(fleet)
            return True
        except StorageFull as error:
            self.store.problems.append(str(error))
            self._retry_us = self.now_us + FULL_RETRY_US
            return False
        finally:
            self.watch(False)

    def save_snapshot(self, uid: int, index: int, term: int, data: bytes) -> bool:
        """See :class:`raftfleet.core.durable.Disk`."""
        self.watch(True)
        try:
            self.store.save_snapshot(uid, index, term, data)
            self.snapshot_count += 1
            return True
        except StorageFull:
            self._retry_us = self.now_us + FULL_RETRY_US
            return False
        finally:
            self.watch(False)

    def keep_last_state(self, member: Member) -> bool:
        """See :class:`raftfleet.core.durable.Disk`. Until it is done, the newest stored snapshot is what is left."""
        if self.begin_last_state is None:
            return False
        return self.begin_last_state(member, self.store.reserve_generation())

    def open_snapshot(self, uid: int, index_min: int) -> StoredSource | None:
        """See :class:`raftfleet.core.durable.Disk`."""
        return self.store.open_source(uid, index_min)

    def want_snapshot(self, uid: int) -> None:
        """See :class:`raftfleet.core.durable.Disk`. It is begun by :meth:`work`."""
        if uid not in self._wanted:
            self._wanted[uid] = None
            self._look_us = self._looked_at_us = 0

    def put_aside(self, uid: int, index: int) -> None:
        """See :class:`raftfleet.core.durable.Disk`."""
        group = self.store.groups.get(uid)
        for info in list(group.snapshots) if group is not None else ():
            if info.index == index:
                self.store.put_aside(info, "found while it was sent")

    def arrival(self, uid: int, key: Key) -> ArrivalFile:
        """See :class:`raftfleet.core.durable.Disk`."""
        return self.store.arrival(uid, key)

    def write_arrival(self, file: Arrival, data: bytes) -> bool:
        """See :class:`raftfleet.core.durable.Disk`."""
        assert isinstance(file, ArrivalFile)
        self.watch(True)
        try:
            self.store.write_arrival(file, data)
            return True
        except StorageFull as error:
            self.store.problems.append(str(error))
            return False
        finally:
            self.watch(False)

    def finish_arrival(self, file: Arrival, data: bytes, uid: int, index: int, term: int) -> bool:
        """See :class:`raftfleet.core.durable.Disk`."""
        assert isinstance(file, ArrivalFile)
        self.watch(True)
        try:
            self.store.finish_arrival(file, data, uid, index, term)
            self.snapshot_count += 1
            return True
        except StorageFull:
            self._retry_us = self.now_us + FULL_RETRY_US
            return False
        finally:
            self.watch(False)

    def sync(self) -> bool:
        """See :class:`raftfleet.core.durable.Disk`. While there is no room it tries a few times a second."""
        store = self.store
        if store.state is DiskState.FULL and self.now_us < self._retry_us:
            return False
        self.watch(True)
        try:
            store.sync()
        except StorageFull:
            self._retry_us = self.now_us + FULL_RETRY_US
            return False
        finally:
            self.watch(False)
        self._is_marked = False
        self._changed_us = self.now_us
        return True

    # ------------------------------------------------------------------ housekeeping

    def work(self, now_us: int) -> None:
        """After ``persist``: a bounded piece of what is to be tidied up, and a snapshot that is due.

        Raises:
            StoragePoisoned: final.
        """
        self.now_us = now_us
        store = self.store
        is_retry_due = store.state is DiskState.FULL and now_us >= self._retry_us
        if now_us < self._look_us and not self._has_more_work and not is_retry_due:
            return
        if now_us >= self._look_us:
            self._look_us = now_us + LOOK_US
            if self._looked_at_us <= self._changed_us or now_us >= self._failed_due_us:
                self._looked_at_us = now_us
                self._failed_due_us = min((us for us in self._failed_us.values() if us > now_us), default=NEVER_US)
                self._make_snapshots(now_us)
        if store.state is not DiskState.FULL or now_us >= self._retry_us:
            self.watch(True)
            try:
                self._has_more_work = store.work()
            finally:
                self.watch(False)
            if store.state is DiskState.FULL:
                self._retry_us = now_us + FULL_RETRY_US
        if now_us >= self._space_us:
            # Others fill a disk too, long before this shard wants its next segment.
            self._space_us = now_us + LOOK_AT_SPACE_US
            store.look_at_space()
        self._say_problems(now_us)
        if store.state is not self._state:
            self._say_state(store.state)

    def rest(self, now_us: int) -> None:
        """The loop has nothing to do: housekeeping, and a mark if nothing changed for a while.

        Raises:
            StoragePoisoned: final.
        """
        self.work(now_us)
        if self.store.is_dirty and self.store.state is not DiskState.FULL:
            self.sync()  # what no message waits for: a note, records copied forward
        if self._is_marked or now_us - self._changed_us < MARK_AFTER_US:
            return
        self._is_marked = True
        try:
            self.store.mark()
        except StorageFull:
            self._is_marked = False
            self._changed_us = now_us

    def next_deadline_us(self) -> int:
        """When :meth:`rest` or a save should be tried next, if nothing else happens."""
        deadline_us = max(self._failed_due_us, self._look_us)
        if self._looked_at_us <= self._changed_us:
            deadline_us = self._look_us
        if self.store.state is DiskState.FULL:
            deadline_us = min(deadline_us, self._retry_us)
        if not self._is_marked:
            deadline_us = min(deadline_us, self._changed_us + MARK_AFTER_US)
        return self.now_us if self._has_more_work and self.store.state is not DiskState.FULL else deadline_us

    def _say_problems(self, now_us: int) -> None:
        said_us = self._said_us
        for problem in self.store.problems:
            if now_us >= said_us.get(problem, -SAY_AGAIN_US) + SAY_AGAIN_US:
                if len(said_us) >= NOTES_KEPT_MAX:
                    said_us.clear()
                said_us[problem] = now_us
                self._note("warning", problem)
        self.store.problems.clear()

    def _say_state(self, state: DiskState) -> None:
        self._state = state
        path = self.store.path
        if state is DiskState.LOW:
            self._note("warning", f"{path}: space runs out; snapshots are made to free some of the log")
        elif state is DiskState.FULL:
            self._note("error", f"{path}: no space left: commands are refused until there is; free some or add some")
        elif state is DiskState.OK:
            self._said_us.clear()  # what begins anew is said anew
            self._note("info", f"{path}: there is space again")

    def _note(self, level: str, text: str) -> None:
        if len(self.notes) < NOTES_KEPT_MAX:
            self.notes.append((level, text))

    # ------------------------------------------------------------------ snapshots

    def _make_snapshots(self, now_us: int) -> None:
        shard = self.shard
        if shard is None or shard.is_full:
            return
        for uid in [*self._wanted, *self._due()]:
            member = shard.members.get(uid)
            if member is None or member.is_quarantined:
                self._wanted.pop(uid, None)
                continue  # what differs from its peers' is not to outlive its log
            if now_us < self._failed_us.get(uid, 0):
                continue
            newest = self.store.snapshot_of(uid)
            if newest is not None and newest.index >= member.applied:
                self._wanted.pop(uid, None)
                continue
            size_bytes = self.store.log_bytes(uid) + (newest.size_bytes if newest is not None else 0)
            if size_bytes <= self.inline_bytes_max or self.begin_snapshot is None:
                self._wanted.pop(uid, None)
                self._make_here(member, now_us)
                self._look_us = self._looked_at_us = now_us  # the next one with the next loop
                self._changed_us = now_us
                return
            if self.begin_snapshot(member, self.store.reserve_generation()):
                self._wanted.pop(uid, None)
                return

    def _due(self) -> list[int]:
        """Members that should be snapshotted, the most urgent first."""
        store = self.store
        wanted = store.wants_snapshot()
        if wanted:
            return wanted
        due = [
            (group.log_bytes, uid)
            for uid, group in store.groups.items()
            if group.log_bytes > SNAPSHOT_LOG_BYTES_MIN
            and (not group.snapshots or group.log_bytes > 2 * group.snapshots[-1].size_bytes)
        ]
        return [uid for _, uid in sorted(due, reverse=True)]

    def _make_here(self, member: Member, now_us: int) -> None:
        try:
            index, term, data = member.make_snapshot()
        except BaseException as error:  # of the user's ``dump``
            self.snapshot_failed(member.uid, now_us, ": ".join(describe(error)))
            return
        if not self.save_snapshot(member.uid, index, term, data):
            self._try_later(member.uid, now_us)

    def snapshot_failed(self, uid: int, now_us: int, why: str) -> None:
        """A snapshot came to nothing: it is tried again after a while."""
        self._try_later(uid, now_us)
        self._looked_at_us = 0  # others may have waited for their turn
        group = self.store.groups.get(uid)
        self._note("error", f"group {group.name if group else uid}: no snapshot could be made: {why}")

    def _try_later(self, uid: int, now_us: int) -> None:
        self._failed_us[uid] = now_us + RETRY_SNAPSHOT_US
        self._failed_due_us = min(self._failed_due_us, now_us + RETRY_SNAPSHOT_US)

    def snapshot_made(self, info: SnapshotInfo) -> None:
        """A snapshot begun by :attr:`begin_snapshot` is in its place, durable."""
        self._looked_at_us = 0  # others may have waited for their turn
        member = self.shard.members.get(info.uid) if self.shard is not None else None
        if member is not None:
            member.dump_known = (info.size_bytes, member.log.total_bytes)
        if self.store.adopt_if_newer(info):
            self.snapshot_count += 1
            self._failed_us.pop(info.uid, None)

    def last_state_made(self, info: SnapshotInfo) -> None:
        """A snapshot begun by :attr:`begin_last_state` is in its place, durable."""
        self._looked_at_us = 0
        self.store.archive(info)

    def last_state_failed(self, name: str, why: str) -> None:
        """A snapshot begun by :attr:`begin_last_state` came to nothing."""
        self._looked_at_us = 0
        self._note("error", f"group {name} was removed, and its last state could not be kept: {why}")

    # ------------------------------------------------------------------ facts

    def archived_snapshot(self, uid: int) -> tuple[str, int]:
        """See :class:`raftfleet.fleet.host_state.HostDisk`."""
        return self.store.archived_snapshot(uid)

    def status(self) -> dict[str, Any]:
        """What ``status`` shows of this disk."""
        store = self.store
        return {
            "state": store.state.value,
            "why": store.why,
            "log_bytes": sum(segment.end for segment in store.segments),
            "segments": store.segment_count,
            "snapshots_made": self.snapshot_count,
            "fork_us_max": self.fork_us_max,
        }

    def close(self) -> None:
        """Save what is collected, if it can be, and give the directory back."""
        self.store.close()


def open_keeper(path: str, **options: Any) -> tuple[Keeper, RecoveredShard]:
    """Open a shard's directory; arguments and errors of :meth:`ShardStore.open`."""
    store, found = ShardStore.open(path, **options)
    return Keeper(store), found


def load_state(store: ShardStore, info: SnapshotInfo | None) -> bytes:
    """The data of a recovered member's snapshot; empty if it has none.

    Raises:
        StorageDamaged: it was whole a moment ago, and is not any more.
    """
    if info is None:
        return b""
    try:
        return store.load_snapshot(info)
    except StorageDamaged as error:
        raise StorageDamaged(f"{info.path}: {error}") from error

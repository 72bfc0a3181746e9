"""What a shard may ask of its storage, and what storage promises.

One storage serves all members of one shard. Calls between two :meth:`Storage.sync` only collect; ``sync`` makes
everything collected durable at once, in order, all or nothing:

* after ``sync`` returned, whatever was collected before it survives a crash of the process, the node, the power;
* if the process dies in ``sync``, the batch is there whole or not at all (a batch is read back only if its mark is);
* if ``sync`` raised :class:`StorageFull`, nothing is lost and nothing is durable: the batch stays collected, and the
  next ``sync`` tries again with whatever came meanwhile;
* if ``sync`` raised :class:`StoragePoisoned`, this object is finished. Whether the batch is durable is known only to
  the next process that opens the directory (DESIGN 5.14). fsync is never called again on a file where it failed.

The order of duties for the caller (rules 4 and 6 of DESIGN 5): make messages, ``sync``, and only then send what speaks
of durable things. Nothing here knows of Raft beyond "an append at index i replaces everything from i on".
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from raftfleet.core.messages import Entry
from raftfleet.errors import NodeError

NO_FLEET = bytes(16)
"""The fleet id of a node that is in no fleet yet."""


class StorageError(NodeError):
    """The data directory cannot be used."""


class StorageLocked(StorageError):
    """Another process uses this data directory."""


class ForeignStorage(StorageError):
    """The data directory belongs to another fleet, node or shard. It was left as it is."""


class StorageTooNew(StorageError):
    """The data directory was written by a newer version of raftfleet. It was left as it is."""


class StorageFull(StorageError):
    """No space left on the disk: nothing was made durable, nothing is lost; sync can be tried again."""


class StoragePoisoned(StorageError):
    """A write or fsync failed: this process must not use the storage any more. Recovery will read it again."""


class StorageDamaged(StorageError):
    """What was once durable cannot be read back."""


class DiskState(enum.Enum):
    """How the disk is. The values are what ``status`` shows."""

    OK = "ok"
    LOW = "low"
    """Space runs out: make snapshots, compact."""
    FULL = "full"
    """The last sync found no space: reads only, hand leaderships over. Leaves by itself when a sync succeeds."""
    POISONED = "poisoned"
    """Final for this process."""


@dataclass(frozen=True)
class Tombstone:
    """A member that was here once: term and vote it must remember, and the life it must never resume.

    ``facts``: what else its owner wanted kept, a msgpack value.
    """

    term: int
    vote: int
    life: int
    facts: Any = None


@dataclass(frozen=True)
class SnapshotInfo:
    """A stored snapshot. ``generation`` rises with every snapshot that a shard saves; ``size_bytes``: of the data."""

    uid: int
    index: int
    term: int
    generation: int
    size_bytes: int
    path: str


@dataclass
class RecoveredGroup:
    """One member as it was at its last acknowledged change (or, where its last batch came through whole, after it).

    Attributes:
        first_voters: instances of the first membership; None: the member began empty, filled by its leader.
        term, vote: never below any that an answer was given for.
        snapshot: the newest that is whole and fits the log; None: the log begins at index 1.
        first_index: index of ``entries[0]`` (or of the entry that would come): ``snapshot.index + 1``, or 1.
        facts: what else the member's owner wanted kept, a msgpack value.
    """

    uid: int
    name: str
    config: dict[str, Any]
    first_voters: tuple[int, ...] | None
    life: int
    term: int = 0
    vote: int = 0
    snapshot: SnapshotInfo | None = None
    first_index: int = 1
    entries: list[Entry] = field(default_factory=list)
    facts: Any = None

    @property
    def last_index(self) -> int:
        """Index of the last entry, or of the snapshot."""
        return self.first_index + len(self.entries) - 1


@dataclass(frozen=True)
class Damage:
    """Something that was durable and is not readable.

    ``uid`` is None where it cost no member anything (a spare copy did the job); otherwise the member of that uid is
    refused: it must be buried and rejoin as new. ``life``: the highest known to have been its, -1 if none is known.
    ``cost``: what it means, where ``uid`` is None.
    """

    uid: int | None
    where: str
    what: str
    term: int = 0
    vote: int = 0
    life: int = -1
    cost: str = "no group is affected"

    def __str__(self) -> str:
        whom = self.cost if self.uid is None else f"group {self.uid:#x} is refused"
        return f"{self.where}: {self.what}; {whom}"


@dataclass
class RecoveredShard:
    """What a directory holds. ``created``: it was empty, and ``instance`` is the new one that was offered."""

    instance: int
    created: bool
    fleet: bytes
    groups: list[RecoveredGroup] = field(default_factory=list)
    tombstones: dict[int, Tombstone] = field(default_factory=dict)
    notes: dict[str, bytes] = field(default_factory=dict)
    damaged: list[Damage] = field(default_factory=list)
    cut_bytes: int = 0
    """Size of the torn tail that was cut: written by a sync that never returned."""


class Storage(Protocol):
    """One shard's storage. Not thread-safe: the shard's loop owns it."""

    state: DiskState

    def save_group(
        self,
        uid: int,
        name: str,
        config: dict[str, Any],
        first_voters: Sequence[int] | None,
        life: int,
        facts: Any = None,
    ) -> None:
        """Create the member, or replace its record (config, life or facts changed); its log, term and vote stay.

        Ends the uid's tombstone; its term and vote are the caller's to carry over with :meth:`save_vote`.

        Args:
            first_voters: of a member that is created; one that is there keeps its own.
            facts: a msgpack value that comes back with the member.
        """

    def save_vote(self, uid: int, term: int, vote: int) -> None:
        """Remember term and vote (0: none). The last call before a sync counts."""

    def append(self, uid: int, first: int, entries: Sequence[Entry]) -> None:
        """The log from ``first`` on is now ``entries``: whatever was stored from there on is gone.

        Terms must not fall along the log. Entries are kept by reference until the sync.
        """

    def reset(self, uid: int, index: int, term: int) -> None:
        """A snapshot of (index, term) replaced the whole log: nothing is stored, the next entry is ``index + 1``.

        The snapshot must have been saved before (:meth:`save_snapshot`).
        """

    def save_snapshot(self, uid: int, index: int, term: int, data: bytes) -> None:
        """Write a snapshot, durable when this returns. The last two are kept, older ones removed.

        Raises:
            StorageFull: nothing changed.
            StoragePoisoned: final.
        """

    def load_snapshot(self, info: SnapshotInfo) -> bytes:
        """The data, checked.

        Raises:
            StorageDamaged: it is not what was written.
        """

    def forget_group(self, uid: int) -> None:
        """The group is no more: drop its member. Its last snapshot goes to the archive once this is durable."""

    def bury(self, uid: int, term: int, vote: int, life: int, facts: Any = None) -> None:
        """Drop the member and keep a tombstone. Also for a uid that is unknown or was reported as damaged."""

    def save_note(self, key: str, value: bytes) -> None:
        """Remember a small fact of the shard under ``key``; empty forgets it."""

    @property
    def is_dirty(self) -> bool:
        """Whether something waits for :meth:`sync`."""

    def sync(self) -> None:
        """Make everything collected so far durable. Does nothing if nothing was collected."""

    def work(self, bytes_max: int = 256 << 10) -> bool:
        """Do a bounded piece of housekeeping (free, write forward, prepare space). Returns whether more waits.

        What it writes forward is only collected: the next sync writes it. Raises only :class:`StoragePoisoned`.
        """

    def wants_snapshot(self) -> Iterable[int]:
        """Uids of members whose snapshot would free log space, those with the most to free first."""

    def close(self) -> None:
        """Sync what is collected, mark it as durable, release the lock. Safe to call twice."""

"""Storage that keeps nothing: for nodes without ``--data-dir``, whose members live in memory only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from raftfleet.core.messages import Entry
from raftfleet.storage.base import DiskState, SnapshotInfo, StorageDamaged


class MemoryStorage:
    """Does nothing, at once. Satisfies :class:`raftfleet.storage.base.Storage`."""

    state = DiskState.OK
    is_dirty = False

    def save_group(
        self, uid: int, name: str, config: dict[str, Any], first_voters: Sequence[int] | None, life: int
    ) -> None:
        """Nothing."""

    def save_vote(self, uid: int, term: int, vote: int) -> None:
        """Nothing."""

    def append(self, uid: int, first: int, entries: Sequence[Entry]) -> None:
        """Nothing."""

    def reset(self, uid: int, index: int, term: int) -> None:
        """Nothing."""

    def save_snapshot(self, uid: int, index: int, term: int, data: bytes) -> None:
        """Nothing."""

    def load_snapshot(self, info: SnapshotInfo) -> bytes:
        """There is none."""
        raise StorageDamaged(f"a node without a data directory holds no snapshot of {info.uid:#x}")

    def forget_group(self, uid: int) -> None:
        """Nothing."""

    def bury(self, uid: int, term: int, vote: int, life: int) -> None:
        """Nothing."""

    def save_note(self, key: str, value: bytes) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def work(self, bytes_max: int = 256 << 10) -> bool:
        """Nothing to do."""
        return False

    def wants_snapshot(self) -> Iterable[int]:
        """None."""
        return ()

    def close(self) -> None:
        """Nothing."""

"""What a store should hold, kept as plain dicts, and the comparison with what it gives back after a restart."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from raftfleet.core.messages import Entry
from raftfleet.storage.base import RecoveredShard, StorageFull, Tombstone
from raftfleet.storage.store import ShardStore


def payload(uid: int, index: int, size_bytes: int = 60) -> bytes:
    """What a snapshot of (uid, index) holds, so that it can be checked."""
    return (b"%d/%d " % (uid, index) * 40)[:size_bytes]


@dataclass
class ModelGroup:
    name: str
    config: dict[str, Any]
    voters: tuple[int, ...] | None
    life: int
    term: int = 0
    vote: int = 0
    base: tuple[int, int] = (0, 0)  # index and term at which a snapshot replaced the log
    entries: dict[int, Entry] = field(default_factory=dict)

    @property
    def last(self) -> int:
        return max(self.entries, default=self.base[0])

    def term_at(self, index: int) -> int | None:
        if index == self.base[0]:
            return self.base[1]
        return self.entries[index].term if index in self.entries else None


@dataclass
class Model:
    groups: dict[int, ModelGroup] = field(default_factory=dict)
    tombstones: dict[int, Tombstone] = field(default_factory=dict)
    notes: dict[str, bytes] = field(default_factory=dict)


class Driver:
    """Does the same to a store and to the model; knows what was acknowledged and what else may be found."""

    def __init__(self) -> None:
        self.acked = Model()
        self.now = Model()
        self.installs: list[tuple[int, int, int]] = []  # snapshots for a reset that is not acknowledged yet
        self.full_count = 0

    # ------------------------------------------------------------------ steps

    def step(self, store: ShardStore, step: tuple[Any, ...]) -> None:
        getattr(self, step[0])(store, *step[1:])

    def group(self, store: ShardStore, uid: int, life: int = 0, voters: tuple[int, ...] | None = (1, 2, 3)) -> None:
        config = {"machine": "m:M", "life": life}
        old = self.now.groups.get(uid)
        made = ModelGroup(f"g{uid}", config, voters, life)
        if old is not None:
            made.term, made.vote, made.base, made.entries = old.term, old.vote, old.base, old.entries
            made.voters = old.voters  # of the first record
        self.now.groups[uid] = made
        self.now.tombstones.pop(uid, None)
        store.save_group(uid, f"g{uid}", config, voters, life)

    def vote(self, store: ShardStore, uid: int, term: int, vote: int) -> None:
        group = self.now.groups[uid]
        group.term, group.vote = term, vote
        store.save_vote(uid, term, vote)

    def append(self, store: ShardStore, uid: int, back: int, count: int, term: int, size_bytes: int = 30) -> None:
        """Append ``count`` entries after going ``back`` that many (a conflict)."""
        group = self.now.groups[uid]
        first = max(group.last + 1 - back, group.base[0] + 1)
        term = max(term, group.term_at(first - 1) or 0)
        entries = [Entry(term, 1, b"%d-%d-%d " % (uid, first + i, term) * (size_bytes // 8)) for i in range(count)]
        for index in [index for index in group.entries if index >= first]:
            del group.entries[index]
        for offset, entry in enumerate(entries):
            group.entries[first + offset] = entry
        store.append(uid, first, entries)

    def install(self, store: ShardStore, uid: int, ahead: int, term: int) -> None:
        """A leader's snapshot replaces the log."""
        group = self.now.groups[uid]
        index = group.last + ahead
        term = max(term, group.term_at(group.last) or 0)
        self.installs.append((uid, index, term))
        self.snap(store, uid, index, term)
        group.base, group.entries = (index, term), {}
        store.reset(uid, index, term)

    def snapshot(self, store: ShardStore, uid: int, behind: int = 0) -> None:
        """A snapshot of what is applied: only of what is acknowledged."""
        group = self.acked.groups.get(uid)
        now = self.now.groups.get(uid)
        if group is None or now is None:
            return
        index = max(group.last - behind, group.base[0])
        term = group.term_at(index)
        if index and term is not None and now.term_at(index) == term:
            self.snap(store, uid, index, term)

    def snap(self, store: ShardStore, uid: int, index: int, term: int) -> None:
        for _ in range(3):
            try:
                store.save_snapshot(uid, index, term, payload(uid, index))
                return
            except StorageFull:
                self.full_count += 1
        raise AssertionError("full for ever")

    def forget(self, store: ShardStore, uid: int) -> None:
        self.now.groups.pop(uid, None)
        self.now.tombstones.pop(uid, None)
        store.forget_group(uid)

    def bury(self, store: ShardStore, uid: int, life: int) -> None:
        group = self.now.groups.pop(uid, None)
        stone = Tombstone(group.term if group else 1, group.vote if group else 2, life)
        self.now.tombstones[uid] = stone
        store.bury(uid, stone.term, stone.vote, life)

    def note(self, store: ShardStore, key: str, value: bytes) -> None:
        self.now.notes.pop(key, None)
        if value:
            self.now.notes[key] = value
        store.save_note(key, value)

    def sync(self, store: ShardStore) -> None:
        for _ in range(4):
            try:
                store.sync()
            except StorageFull:
                self.full_count += 1
                continue
            self.acked = copy.deepcopy(self.now)
            self.installs = []
            return
        raise AssertionError("full for ever")

    def work(self, store: ShardStore, times: int = 1, bytes_max: int = 600) -> None:
        for _ in range(times):
            store.work(bytes_max)

    def mark(self, store: ShardStore) -> None:
        store.mark()

    # ------------------------------------------------------------------ judgement

    def settle(self, store: ShardStore, found: RecoveredShard) -> None:
        """After a restart: what was found must be what was acknowledged, or that with the last batch whole."""
        complaints = []
        candidates = [self.acked, self.now]
        if self.installs:
            installed = copy.deepcopy(self.acked)
            for uid, index, term in self.installs:
                if uid in installed.groups:
                    group = installed.groups[uid]
                    group.base, group.entries = (index, term), {}
            candidates.append(installed)
        for model in candidates:
            try:
                check(store, found, model)
            except AssertionError as error:
                complaints.append(str(error))
                continue
            self.acked = model
            for group in found.groups:
                # A term that only the log or a snapshot proves is taken over, with no vote in it.
                model.groups[group.uid].term, model.groups[group.uid].vote = group.term, group.vote
            self.now = copy.deepcopy(model)
            self.installs = []
            return
        raise AssertionError("neither what was acknowledged nor that plus the last batch:\n" + "\n".join(complaints))


def check(store: ShardStore, found: RecoveredShard, model: Model) -> None:
    """Raise AssertionError unless ``found`` is what ``model`` says."""
    assert [str(damage) for damage in found.damaged if damage.uid is not None] == []
    groups = {group.uid: group for group in found.groups}
    assert groups.keys() == model.groups.keys(), (sorted(groups), sorted(model.groups))
    assert found.tombstones == model.tombstones, (found.tombstones, model.tombstones)
    assert found.notes == model.notes, (found.notes, model.notes)
    for uid, group in groups.items():
        expected = model.groups[uid]
        assert (group.name, group.config, group.first_voters, group.life) == (
            expected.name,
            expected.config,
            expected.voters,
            expected.life,
        )
        last_term = expected.term_at(expected.last) or 0
        if last_term > expected.term:
            assert (group.term, group.vote) == (last_term, 0)
        else:
            assert (group.term, group.vote) == (expected.term, expected.vote), uid
        assert group.last_index == expected.last, (uid, group.last_index, expected.last)
        for offset, entry in enumerate(group.entries):
            assert entry == expected.entries[group.first_index + offset], (uid, group.first_index + offset)
        info = group.snapshot
        if info is None:
            assert group.first_index == 1
        else:
            assert group.first_index == info.index + 1
            assert info.index >= expected.base[0]
            assert expected.term_at(info.index) == info.term, (uid, info, expected.base)
            assert store.load_snapshot(info) == payload(uid, info.index)

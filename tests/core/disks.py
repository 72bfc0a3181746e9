"""Shards on simulated disks, driven by hand as in :mod:`core.harness`."""

from __future__ import annotations

import random
from typing import Any

from core.harness import START_US, WALL_US, Answer, Cluster, Journal, Lone, config

from raftfleet.core.config import GroupConfig
from raftfleet.core.durable import DurableShard
from raftfleet.core.shard import Effects, Shard, ShardSettings
from raftfleet.storage.keeper import Keeper, load_state, open_keeper
from raftfleet.testing.disk import FakeFiles

SEGMENT_BYTES = 64 << 10


def open_disk(files: FakeFiles, instance: int, shard_rng: random.Random, now_us: int) -> tuple[DurableShard, Keeper]:
    """The shard that lies on a disk; one with that instance if the disk is new."""
    keeper, found = open_keeper(
        "/data", node=f"n{instance}", new_instance=instance, files=files, segment_bytes=SEGMENT_BYTES, low_bytes=0
    )
    shard = DurableShard(found.instance, shard_rng, ShardSettings(), keeper)
    keeper.shard = shard
    shard.begin(now_us, WALL_US)
    for uid, stone in found.tombstones.items():
        shard.restore_tombstone(uid, stone.term, stone.vote, stone.life, stone.facts)
    for damage in found.damaged:
        if damage.uid is not None:
            shard.bury_lost(damage.uid, damage.term, damage.vote, damage.life)
    for group in found.groups:
        data = load_state(keeper.store, group.snapshot)
        settings = GroupConfig.from_dict(group.config)
        shard.restore_group(group, settings, Journal(), None, group.snapshot, data)
    return shard, keeper


class DurableCluster(Cluster):
    """A cluster whose shards have disks. ``crash`` takes the power from one, ``restart`` gives it back."""

    def __init__(self, count: int = 3, **fields: Any) -> None:
        self.files: dict[int, FakeFiles] = {}
        self.keepers: dict[int, Keeper] = {}
        super().__init__(count, **fields)

    def add_shard(self, instance: int) -> Shard:
        self.files.setdefault(instance, FakeFiles())
        shard, keeper = open_disk(
            self.files[instance], instance, random.Random(self._rng.getrandbits(64)), self.local_us(instance)
        )
        shard.may_create = lambda uid: (f"group-{uid}", self.config, Journal(), None)
        self.shards[instance] = shard
        self.keepers[instance] = keeper
        return shard

    def turn(self, instance: int, work: Any = None) -> Effects:
        self.keepers[instance].now_us = self.local_us(instance)
        return super().turn(instance, work)

    def crash(self, *instances: int, keep: float = 0.0) -> None:
        """Lose power: what no fsync covered survives with probability ``keep``, sector by sector."""
        for instance in instances:
            super().crash(instance)
            self.keepers.pop(instance)
            self.files[instance].crash(random.Random(self._rng.getrandbits(64)), keep=keep)

    def restart(self, *instances: int) -> None:
        for instance in instances:
            self.add_shard(instance)

    def durable(self, shard: int) -> DurableShard:
        found = self.shards[shard]
        assert isinstance(found, DurableShard)
        return found


class DurableLone(Lone):
    """Shard 1 on a disk; the test is everyone else. ``full``: whether the disk has no room."""

    def __init__(self, voters: tuple[int, ...] | None = (1, 2, 3), **fields: Any) -> None:
        self.files = FakeFiles()
        self.fields = fields
        self.now_us = START_US
        self.sends: list[tuple[int, Any]] = []
        self.answers: list[tuple[object, int, Any]] = []
        self.open()
        if voters is not None:
            self.shard.create_group(1, "group-1", config(**fields), Journal(), voters)
        self.turn()

    def open(self) -> None:
        self.shard, self.keeper = open_disk(self.files, 1, random.Random(1), self.now_us)
        self.shard.may_create = lambda uid: (f"group-{uid}", config(**self.fields), Journal(), None)

    def turn(self, work: Any = None, *, tick: bool = False) -> list[tuple[int, Any]]:
        self.keeper.now_us = self.now_us + 1000
        return super().turn(work, tick=tick)

    def power_cycle(self, keep: float = 0.0) -> None:
        """Crash between two turns, and come back."""
        self.files.crash(keep=keep)
        self.open()

    def fill(self) -> None:
        """From now on every write finds no room."""
        self.files.plan = lambda number, name: 28 if name in ("pwrite", "fallocate") else None

    def free(self) -> None:
        """There is room again; it is noticed when the next retry is due."""
        self.files.plan = lambda number, name: None
        self.now_us += 1_000_000

    def break_disk(self, call: str = "fdatasync") -> None:
        """From now on that call fails."""
        self.files.plan = lambda number, name: 5 if name == call else None


__all__ = ["Answer", "DurableCluster", "DurableLone"]

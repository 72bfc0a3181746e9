"""A simulated shard on a simulated disk: the production core and storage, crashing together.

This module does not know when a disk fails; the simulation arms the faults. The turn is the durable loop of a worker:
appends leave before anything is saved, everything else after. Power may go in any call to the disk (``PowerLoss``), and
a call may fail (``StoragePoisoned``): either way the process ends there, in the middle of its turn, and what lies on
the disk then is what the next process of this instance finds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from raftfleet.core.config import GroupConfig
from raftfleet.core.durable import FINISH_ROUNDS_MAX, DurableShard
from raftfleet.core.member import Member
from raftfleet.core.shard import ShardSettings
from raftfleet.storage.base import StoragePoisoned
from raftfleet.storage.keeper import load_state, open_keeper
from raftfleet.storage.snapshots import TEMPORARY, snapshot_name, write_snapshot
from raftfleet.testing.clock import DriftingClock, EventQueue
from raftfleet.testing.disk import FakeFiles, PowerLoss
from raftfleet.testing.shards import WALL_EPOCH_US, SimShard

SEGMENT_BYTES = 32 << 10
"""Small, so that segments are freed and written forward within a minute."""
OPEN_PATH = "/data"


class DurableSimShard(SimShard):
    """One process of a durable instance.

    Attributes:
        files: its disk, which outlives it.
        restored: the members that it found there, by uid.
        started_us: when it came up, by its own clock.
        keep: how much of what is not synced survives if its power goes in a call.
        on_death: called when the disk ends it, with the reason.
    """

    core: DurableShard

    def __init__(
        self,
        owner: Any,
        queue: EventQueue,
        place: int,
        instance: int,
        rng: random.Random,
        settings: ShardSettings,
        clock: DriftingClock,
        wall_offset_us: int,
        files: FakeFiles,
        make_machine: Callable[[int], Any],
    ) -> None:
        self.files = files
        self.keeper, found = open_keeper(
            OPEN_PATH,
            node=f"n{place}",
            new_instance=instance,
            files=files,
            segment_bytes=SEGMENT_BYTES,
            low_bytes=0,
        )
        assert found.instance == instance, "the disk is another instance's"
        core = DurableShard(instance, rng, settings, self.keeper)
        super().__init__(owner, queue, place, instance, rng, settings, clock, wall_offset_us, core)
        self.keeper.shard = core
        self.keeper.inline_bytes_max = settings.inline_bytes_max
        self.keeper.begin_snapshot = self._begin_snapshot
        self.started_us = clock.local_us(queue.now_us)
        core.begin(self.started_us, WALL_EPOCH_US + queue.now_us + wall_offset_us)
        for uid, stone in found.tombstones.items():
            core.restore_tombstone(uid, stone.term, stone.vote, stone.life, stone.facts)
        assert not any(damage.uid is not None for damage in found.damaged), found.damaged
        self.restored: dict[int, Member] = {}
        for group in found.groups:
            snapshot: Any = group.snapshot
            data = load_state(self.keeper.store, snapshot)
            settings_of = GroupConfig.from_dict(group.config)
            machine = make_machine(group.uid)
            self.restored[group.uid] = core.restore_group(
                group, settings_of, machine, None, snapshot, data, count=len(found.groups)
            )
        self.keep = 0.5
        self.on_death: Callable[[DurableSimShard, str], None] = lambda shard, reason: None

    def _begin_snapshot(self, member: Member, generation: int) -> bool:
        keeper, uid = self.keeper, member.uid
        folder = f"{OPEN_PATH}/snapshots"

        def write(index: int, term: int, data: bytes) -> None:
            try:
                info = write_snapshot(self.files, folder, uid, index, term, generation, {"name": member.name}, data)
            except OSError as error:
                fail(str(error))
            else:
                keeper.snapshot_made(info)

        def fail(why: str) -> None:
            path = f"{folder}/{snapshot_name(uid, generation)}{TEMPORARY}"
            if path in self.files.names:
                self.files.unlink(path)
            keeper.snapshot_failed(uid, keeper.now_us, why)

        return self.child.begin(member, write, fail)

    def turn(self) -> None:
        """One turn of the loop; the disk may end it."""
        self.keeper.now_us = self.clock.local_us(self._queue.now_us)
        try:
            super().turn()
        except PowerLoss:
            self._die("its power goes")
        except StoragePoisoned as error:
            self._die(f"its disk fails: {error}")

    @property
    def is_between_turns(self) -> bool:
        """Whether it has done all that a turn begins, with the disk too."""
        return not (self.is_dead or self._is_mid_turn)

    def resume(self) -> None:
        """See :class:`SimShard`."""
        try:
            super().resume()
        except PowerLoss:
            self._die("its power goes")
        except StoragePoisoned as error:
            self._die(f"its disk fails: {error}")

    def _die(self, reason: str) -> None:
        self.kill()
        self.on_death(self, reason)

    def _stop_within_turn(self) -> None:
        """Appends have left; nothing is saved, applied or said."""
        self.core.flush()
        self._emit_sends(self.core.take_sends())

    def _finish(self) -> None:
        core, keeper = self.core, self.keeper
        for _ in range(FINISH_ROUNDS_MAX):
            core.flush()
            self._emit_sends(core.take_sends())
            core.persist()
            core.apply()
            core.settle(self.clock.local_us(self._queue.now_us))
            self._emit_sends(core.take_sends())
            self._emit_sends(core.take_saved_sends())
            for token, code, body in core.take_replies():
                self._owner.shard_replied(self, token, code, body)
            for event in core.take_events():
                self._owner.shard_event(self, event)
            if not core.has_work:
                break
        if core.has_work:
            keeper.work(keeper.now_us)
        else:
            keeper.rest(keeper.now_us)

    def _emit_sends(self, sends: dict[int, list[Any]]) -> None:
        for to_instance, messages in sends.items():
            self._owner.shard_sent(self, to_instance, messages)

    def _next_deadline_us(self) -> int:
        return min(super()._next_deadline_us(), self.keeper.next_deadline_us())

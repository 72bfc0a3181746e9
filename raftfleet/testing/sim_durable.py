"""A durable worker of a simulated fleet: the production host on the production storage, on a disk in memory.

This module does not know when a disk fails; the simulation arms the faults. The turn is the one of
``workers/shard.py``: what need not wait for the disk leaves before anything is saved, everything else after. Power may
go in any call to the disk, and a call may fail: either way the process ends there, in the middle of its turn, and what
lies on the disk then is what the next process of this instance finds.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from raftfleet.core.durable import DurableShard
from raftfleet.fleet.host import Host, HostSettings, Outputs
from raftfleet.storage.base import StoragePoisoned
from raftfleet.storage.keeper import load_state, open_keeper
from raftfleet.testing.disk import FakeFiles, PowerLoss
from raftfleet.testing.sim_worker import SimWorker

if TYPE_CHECKING:
    from raftfleet.testing.fleet import SimFleet, SimNode

PATH = "/data"
SEGMENT_BYTES = 64 << 10
"""Small, so that segments are freed and written forward within a minute."""


class DurableSimWorker(SimWorker):
    """One process of a durable instance.

    Args:
        instance: for the case that nothing lies on the disk yet.

    Raises:
        PowerLoss, StorageError: the disk failed while it was read; there is no such process.

    Attributes:
        files: its disk, which outlives it.
        keep: how much of what is not synced survives if its power goes in a call.
    """

    def __init__(
        self,
        fleet: SimFleet,
        node: SimNode,
        index: int,
        instance: int,
        rng: random.Random,
        files: FakeFiles,
    ) -> None:
        self.files = files
        self.keep = 0.5
        self._is_fleet_saved = False
        self.keeper, self._found = open_keeper(
            PATH, node=node.name, new_instance=instance, files=files, segment_bytes=SEGMENT_BYTES, low_bytes=0
        )
        super().__init__(fleet, node, index, self._found.instance, rng)

    def _new_host(self, settings: HostSettings, rng: random.Random) -> Host:
        host = Host(self.instance, settings, rng, self.node.make_machine, self.keeper)
        assert isinstance(host.shard, DurableShard)
        self.keeper.shard = host.shard
        true_us = self.fleet.queue.now_us
        self.keeper.now_us = self.clock.local_us(true_us)
        host.begin(self.keeper.now_us, self.node.wall_us(true_us))
        assert not any(damage.uid is not None for damage in self._found.damaged), self._found.damaged
        host.restore(self._found, lambda info: load_state(self.keeper.store, info))
        self._is_fleet_saved = bool(host.fleet_id)
        return host

    def _turn(self) -> None:
        self.keeper.now_us = self.clock.local_us(self.fleet.queue.now_us)
        try:
            super()._turn()
        except PowerLoss:
            self.node.disk_ended(self, "its power goes in a call to the disk")
        except StoragePoisoned as error:
            self.node.disk_ended(self, f"its disk fails: {error}")

    def _end_turn(self) -> None:
        host, keeper = self.host, self.keeper
        host.flush()
        self._send(host.collect_sends())
        self._send(host.persist())
        host.apply()
        out = host.settle(host.now_us)
        self._send(host.collect_answers())
        if host.fleet_id and not self._is_fleet_saved:
            self._is_fleet_saved = keeper.set_fleet(host.fleet_id)
        self._carry_out(out)
        if host.has_work:
            keeper.work(keeper.now_us)
        else:
            keeper.rest(keeper.now_us)
        self.notes.extend(keeper.notes)
        keeper.notes = []

    def _send(self, sends: dict[int, list[Any]]) -> None:
        if sends:
            self._carry_out(Outputs(sends=sends))

    def next_deadline_us(self) -> int:
        """Of the host, or of its disk."""
        return min(super().next_deadline_us(), self.keeper.next_deadline_us())

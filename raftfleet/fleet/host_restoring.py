"""Coming back from a disk: the members that lie there, and the addresses of those whom they need for an election.

This module reads no file: what was found is handed in. Rules:

* The fleet's group comes last: its state would begin groups anew that are not brought back yet. Its snapshot may be
  older than they are; a group that it does not know of is not gone.
* What the code here cannot work with stays on the disk as it is (it *rests*), and is tried again now and then.
* A member whose data are damaged is given up, and said to be lost: its group's leader removes it, and adds it again if
  it is wanted here.
* The instance is the same, its memory is not: numbers by which others know its messages (requests, beats) begin above
  all that it ever used, or an answer to its former self would be taken for one to a new request.
* Who is where was known before: without it, nobody could be asked for a vote.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack

from raftfleet.core.config import GroupConfig
from raftfleet.core.durable import DurableShard
from raftfleet.core.failures import describe
from raftfleet.core.names import FLEET_UID
from raftfleet.fleet.host_calls import CallLayer
from raftfleet.fleet.host_following import REMOVED_NOTE

ADDRESSES_NOTE = "addresses"
STARTS_NOTE = "starts"
LoadState = Callable[[Any], bytes]
"""Snapshot info (or None) -> its data."""


class RestoringLayer(CallLayer):
    """Brings members back. See the module's text."""

    def restore(self, found: Any, load: LoadState) -> None:
        """Take over what a disk holds. Call it once, after the first :meth:`begin` and before anything else.

        Args:
            found: a :class:`raftfleet.storage.base.RecoveredShard`.
            load: gives the data of a snapshot of it.
        """
        shard = self.shard
        assert isinstance(shard, DurableShard)
        self._begin_above(1 + msgpack.unpackb(found.notes.get(STARTS_NOTE, b"\x00")))
        epoch, removed = msgpack.unpackb(found.notes.get(REMOVED_NOTE, b"\x92\x00\x90"))
        self._removed = set(removed)
        self._removed_before = (epoch, set(removed))
        if any(found.fleet):
            self.set_fleet(found.fleet)
        for instance, endpoint, public_key in msgpack.unpackb(found.notes.get(ADDRESSES_NOTE, b"\x90")):
            self._set_address(instance, endpoint, public_key)
        for uid, stone in found.tombstones.items():
            shard.restore_tombstone(uid, stone.term, stone.vote, stone.life, stone.facts)
        for damage in found.damaged:
            self.note("error" if damage.uid is not None else "warning", f"damaged: {damage}")
            if damage.uid is not None:
                self.count("members_lost")
                shard.bury_lost(damage.uid, damage.term, damage.vote, damage.life)
        self._load_state = load
        for stored in sorted(found.groups, key=lambda group: group.uid == FLEET_UID):
            self._restore_group(stored, len(found.groups))

    def _begin_above(self, starts: int) -> None:
        """Number requests and beats as the ``starts``-th process of this instance. Saved before any of them leaves.

        Should there be no room for that, the next process counts from the same start: the random part tells them apart.
        """
        assert self.disk is not None
        self.disk.save_note(STARTS_NOTE, bytes(msgpack.packb(starts)))
        self.disk.sync()
        self._next_id = starts << 40 | self.rng.getrandbits(20) << 20 | 1
        self.shard.first_seq = starts << 40 | self.rng.getrandbits(20) << 20

    def _restore_group(self, stored: Any, count: int) -> None:
        shard = self.shard
        assert isinstance(shard, DurableShard)
        uid = stored.uid
        try:
            config = GroupConfig.from_dict(stored.config)
            if uid == FLEET_UID:
                self._listen_to_fleet()
                machine, hook = self._new_fleet_machine(), None
            else:
                machine, hook = self.make_machine(config)
            data = self._load_state(stored.snapshot)
            shard.restore_group(stored, config, machine, hook, stored.snapshot, data, count=count)
        except BaseException as error:  # of the user's code, SystemExit too
            if uid not in self._resting:
                self.count("members_resting")
                self.note(
                    "error",
                    f"group {stored.name}: its member here cannot be brought back and rests on the disk, untouched, "
                    f"until it can: {': '.join(describe(error))}",
                )
            shard.resting.add(uid)
            self._resting[uid] = stored
            return
        if uid != FLEET_UID and not self._owns(stored.name):
            self._guests[uid] = None
        if self._resting.pop(uid, None) is not None:
            self.note("info", f"group {stored.name}: its member here is brought back")
        if uid == FLEET_UID and stored.snapshot is not None:
            self._on_fleet_restored()

    def _retry_resting(self) -> None:
        shard = self.shard
        assert isinstance(shard, DurableShard)
        for uid, stored in list(self._resting.items()):
            if uid in shard.resting:
                self._restore_group(stored, 1)
            else:
                del self._resting[uid]  # the group was removed meanwhile

    def _save_addresses(self) -> None:
        assert self.disk is not None
        rows = [[instance, *address] for instance, address in self.addresses.items()]
        self.disk.save_note(ADDRESSES_NOTE, bytes(msgpack.packb(rows)))

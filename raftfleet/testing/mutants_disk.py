"""Mutants of what a shard with a disk obeys besides (DESIGN 5: rules 4 to 7, 9, 13 and 14), on simulated disks."""

from __future__ import annotations

from raftfleet.testing.mutants_table import Mutant, mutant

_STORMS = "durable storms"

MUTANTS: tuple[Mutant, ...] = (
    mutant(
        "snapshot-told-before-saved",
        "5.4",
        "a snapshot is acknowledged as done, and not saved",
        ("core.durable:DurableShard.save_snapshot", "self._installed[uid] = ", "_ = "),
        profile="durable snapshots",
    ),
    mutant(
        "checksums-ignored",
        "5.5",
        "a record counts though its checksum is wrong",
        (
            "storage.records:read_record",
            "if crc_extend(length, data[offset + 8 : offset + length]) != crc:",
            "if crc < 0:",
        ),
        profile="durable torn",
    ),
    mutant(
        "vote-not-saved",
        "5.6",
        "term and vote are told and never saved",
        ("core.durable:DurableShard.save_vote", "self._voted[member.uid] = member", "pass"),
        profile=_STORMS,
    ),
    mutant(
        "told-before-saved",
        "5.6",
        "votes and acknowledgements leave before what they rest on is saved",
        ("core.shard:Shard.send_saved", "messages = self._saved_sends.get(peer)", "messages = self._sends.get(peer)"),
        ("core.shard:Shard.send_saved", "self._saved_sends[peer] = [message]", "self._sends[peer] = [message]"),
        profile=_STORMS,
    ),
    mutant(
        "conflict-not-saved",
        "5.6",
        "of two changes of a log in one turn only the first one's place is remembered",
        ("core.durable:DurableShard.save_entries", "if low is None or first < low:", "if low is None:"),
        profile="durable stranded",
    ),
    mutant(
        "removed-life-not-saved",
        "5.7",
        "a removed member's term, vote and log end do not outlive the process",
        ("core.durable:DurableShard.save_tombstone", "self.disk.bury(", "(lambda *row: None)("),
        ("core.durable:DurableShard.save_tombstone", "facts = [", "self.disk.forget_group(uid)\n    facts = ["),
        profile="durable changes",
    ),
    mutant(
        "vote-right-after-restart",
        "5.9",
        "a voter votes as soon as it is back from its disk",
        ("core.durable:DurableShard.refuses_votes", "if self.now_us < until_us:", "if False:"),
        profile="durable leases",
    ),
    mutant(
        "leader-counts-unsaved",
        "5.13",
        "a leader counts itself before its own write is durable",
        (
            "core.durable:DurableShard.saved_index",
            "    if self._unsaved:",
            "    return last_index\n    if self._unsaved:",
        ),
        profile=_STORMS,
    ),
    mutant(
        "failed-sync-ignored",
        "5.14",
        "an fdatasync that failed is taken for one that did its work",
        (
            "storage.wal:Wal._write_batch",
            "        self.poison(",
            "        return\n        self.poison(",
        ),
        profile=_STORMS,
    ),
    mutant(
        "failed-sync-tried-again",
        "5.14",
        "an fdatasync that failed is called again, and succeeds",
        (
            "storage.wal:Wal._write_batch",
            "        self.poison(",
            "        self.files.fdatasync(handle)\n        return\n        self.poison(",
        ),
        profile=_STORMS,
    ),
    mutant(
        "told-though-the-disk-is-full",
        "9",
        "what could not be saved for lack of room is told all the same",
        ("core.durable:DurableShard._must_wait", "kind = message[0]", "return False\n    kind = message[0]"),
        profile="durable full",
    ),
)

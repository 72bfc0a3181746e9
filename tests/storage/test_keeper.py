"""The keeper: what it tries again, when it marks, when and how snapshots are made."""

from __future__ import annotations

import random
from typing import Any

import msgpack
import pytest
from core.harness import WALL_US, Journal, append, config, pack

from raftfleet.core.durable import DurableShard
from raftfleet.core.member import Member
from raftfleet.core.messages import COMMANDS, Append, Entry
from raftfleet.core.sessions import pack_batch
from raftfleet.storage import keeper as keeper_rules
from raftfleet.storage.base import StoragePoisoned
from raftfleet.storage.keeper import Keeper, load_state, open_keeper
from raftfleet.storage.snapshots import write_snapshot
from raftfleet.testing.disk import EIO, ENOSPC, FakeFiles

SEGMENT_BYTES = 64 << 10
NOW_US = 1_000_000_000


class Node:
    """Shard 1 with group 1, which shard 2 leads, on a simulated disk."""

    def __init__(self, files: FakeFiles | None = None) -> None:
        self.files = files or FakeFiles()
        self.now_us = NOW_US
        self.keeper, self.found = open_keeper(
            "/d", node="n1", new_instance=1, files=self.files, segment_bytes=SEGMENT_BYTES, low_bytes=0
        )
        self.shard = DurableShard(1, random.Random(1), None, self.keeper)
        self.keeper.shard = self.shard
        self.keeper.now_us = self.now_us
        self.shard.begin(self.now_us, WALL_US)
        for group in self.found.groups:
            data = load_state(self.keeper.store, group.snapshot)
            self.shard.restore_group(group, config(), Journal(), None, group.snapshot, data)
        if not self.found.groups:
            self.shard.create_group(1, "group-1", config(), Journal(), (1, 2, 3))
        self.turn()

    @property
    def member(self) -> Member:
        return self.shard.members[1]

    def turn(self, *messages: Any, rest: bool = False, us: int = 1000) -> None:
        self.now_us += us
        self.keeper.now_us = self.now_us
        self.shard.begin(self.now_us, WALL_US)
        self.shard.receive(2, list(messages))
        self.shard.finish()
        (self.keeper.rest if rest else self.keeper.work)(self.now_us)

    def write(self, count: int, size_bytes: int = 1000) -> None:
        """The leader appends and commits entries with one command each."""
        for _ in range(count):
            last, term = self.member.log.last_index, self.member.log.last_term
            data = pack_batch(WALL_US, [pack("x" * size_bytes, last + 1, acked=last)])
            self.turn(Append(1, 1, 1, last, term, last + 1, 1, 0, [Entry(1, COMMANDS, data)]), us=50_000)

    @property
    def snapshot_index(self) -> int:
        info = self.keeper.store.snapshot_of(1)
        return info.index if info is not None else 0


def test_a_disk_without_room_for_the_name_of_the_fleet_takes_it_later() -> None:
    node = Node()
    node.files.plan = lambda number, name: ENOSPC if name == "pwrite" else None
    assert not node.keeper.set_fleet(b"f" * 16)
    node.files.plan = lambda number, name: None
    assert not node.keeper.set_fleet(b"f" * 16), "a few times a second is often enough"
    node.turn(us=1_000_000)
    assert node.keeper.set_fleet(b"f" * 16)
    node.files.kill()
    again = Node(node.files)
    assert again.found.fleet == b"f" * 16


def test_a_log_that_grows_is_snapshotted_and_its_segments_are_freed() -> None:
    node = Node()
    node.write(1000)
    assert node.snapshot_index > 0
    assert node.keeper.store.segment_count <= 6
    assert len([name for name in node.files.names if name.endswith(".snap")]) <= 2
    state = node.member.state
    node.files.crash(keep=0.0)
    again = Node(node.files)
    assert again.member.state == state[: again.member.applied], "the snapshot and no more: the rest waits for a leader"
    assert again.member.log.last_index == 1000


def test_a_large_state_is_given_to_another_process_and_counts_when_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper_rules, "INLINE_BYTES_MAX", 10_000)
    node = Node()
    begun: list[tuple[int, int, int, bytes]] = []

    def begin(member: Member, generation: int) -> bool:
        if not begun:
            begun.append((generation, *member.make_snapshot()))
            return True
        return False

    node.keeper.begin_snapshot = begin
    node.write(200)
    assert len(begun) == 1
    assert node.snapshot_index == 0
    generation, index, term, data = begun[0]
    info = write_snapshot(node.files, "/d/snapshots", 1, index, term, generation, {"name": "group-1"}, data)
    node.keeper.snapshot_made(info)
    assert node.snapshot_index == index


def test_a_snapshot_made_elsewhere_is_removed_if_its_member_is_gone_by_then() -> None:
    node = Node()
    node.write(3)
    index, term, data = node.member.make_snapshot()
    generation = node.keeper.store.reserve_generation()
    info = write_snapshot(node.files, "/d/snapshots", 1, index, term, generation, {"name": "group-1"}, data)
    node.shard.remove_group(1)
    node.turn()
    node.keeper.snapshot_made(info)
    assert [name for name in node.files.names if name.startswith("/d/snapshots/")] == []


def test_a_dump_that_raises_is_told_and_tried_again_later() -> None:
    node = Node()

    def dump(state: Any) -> bytes:
        raise RuntimeError("cannot dump")

    node.member.machine.dump = dump  # type: ignore[method-assign]
    node.write(300)
    said = [text for _, text in node.keeper.notes if "cannot dump" in text]
    assert 1 <= len(said) <= 3, "once in ten seconds"
    assert "group-1" in said[0]
    del node.member.machine.dump  # type: ignore[method-assign]
    node.write(1)
    for _ in range(12):
        node.turn(rest=True, us=1_000_000)
    assert node.snapshot_index > 0, "though nothing was written meanwhile"


def test_a_snapshot_for_which_there_is_no_room_costs_nothing() -> None:
    node = Node()
    node.write(60)
    node.files.plan = lambda number, name: ENOSPC if name == "pwrite" and "snap" in node.files.log[-1] else None
    node.write(60)
    assert node.snapshot_index == 0
    assert not [name for name in node.files.names if name.endswith(".tmp")]
    assert node.member.applied == 120
    node.files.plan = lambda number, name: None
    node.write(300)
    assert node.snapshot_index > 0


@pytest.mark.parametrize("call", ["fdatasync", "rename", "sync_dir", "pwrite"])
def test_a_disk_that_fails_ends_it_whichever_call_it_was(call: str) -> None:
    node = Node()
    node.write(2)
    node.files.plan = lambda number, name: EIO if name == call else None
    with pytest.raises(StoragePoisoned):
        node.write(1000)
    node.files.plan = lambda number, name: None
    with pytest.raises(StoragePoisoned):
        node.turn(append(1, (node.member.last_index, 1), [1]))
    node.files.crash(keep=0.0)
    assert Node(node.files).member.log.last_index > 0


def test_a_shard_at_rest_marks_its_log_once() -> None:
    node = Node()
    node.write(1)
    node.files.log.clear()
    node.turn(rest=True, us=50_000)
    assert node.files.log == [], "it was busy a moment ago"
    node.turn(rest=True, us=100_000)
    assert [line.split()[0] for line in node.files.log] == ["pwrite", "fdatasync"]
    node.files.log.clear()
    for _ in range(10):
        node.turn(rest=True, us=1_000_000)
    assert not [line for line in node.files.log if not line.startswith("free_bytes")]
    assert node.keeper.next_deadline_us() > node.now_us + 3_600_000_000, "nothing wakes it"


def test_damage_to_the_last_batch_is_told_from_a_torn_tail_after_a_rest() -> None:
    node = Node()
    data = pack_batch(WALL_US, [pack("precious", 1)])
    node.turn(Append(1, 1, 1, 0, 0, 0, 1, 0, [Entry(1, COMMANDS, data)]))
    node.turn(rest=True, us=200_000)
    file = next(f for name, f in node.files.names.items() if name.endswith(".wal"))
    assert file is not None
    at = file.now.index(b"precious")
    for content in (file.now, file.durable):
        content[at] ^= 1
    node.files.crash(keep=0.0)
    _, found = open_keeper("/d", node="n1", new_instance=1, files=node.files, segment_bytes=SEGMENT_BYTES)
    assert [damage.uid for damage in found.damaged] == [1]


def test_a_note_that_no_message_waits_for_is_saved_at_rest() -> None:
    node = Node()
    node.keeper.save_note("addresses", msgpack.packb([1]))
    node.turn(rest=True)
    node.files.crash(keep=0.0)
    _, found = open_keeper("/d", node="n1", new_instance=1, files=node.files, segment_bytes=SEGMENT_BYTES)
    assert found.notes == {"addresses": msgpack.packb([1])}


def test_room_is_looked_for_a_few_times_a_second_and_what_waited_is_saved() -> None:
    node = Node()
    node.write(1)
    node.files.plan = lambda number, name: ENOSPC if name in ("pwrite", "fallocate") else None
    node.turn(append(1, (1, 1), [1]))
    assert node.shard.is_full
    before = node.files.calls
    for _ in range(100):
        node.turn()
    assert node.files.calls - before <= 4
    assert node.keeper.next_deadline_us() <= node.now_us + keeper_rules.FULL_RETRY_US
    node.files.plan = lambda number, name: None
    node.turn(us=keeper_rules.FULL_RETRY_US)
    assert not node.shard.is_full
    node.files.crash(keep=0.0)
    assert Node(node.files).member.log.last_index == 2


def test_a_disk_without_room_for_a_segment_is_said_once_and_not_with_every_try() -> None:
    node = Node()
    node.files.plan = lambda number, name: ENOSPC if name == "fallocate" else None
    node.write(40)
    node.keeper.store._wal._spare = None

    def said(turns: int) -> list[str]:
        node.keeper.notes.clear()
        for _ in range(turns):
            node.turn(rest=True, us=keeper_rules.FULL_RETRY_US)
        return [text for _, text in node.keeper.notes]

    first, refused = said(100), node.files.calls
    assert len([text for text in first if text.startswith("no space left in /d/wal")]) <= 1
    assert node.keeper.status()["state"] == "low"
    assert said(100) == []
    assert node.files.calls - refused >= 100, "it is tried all the same"
    node.now_us += keeper_rules.SAY_AGAIN_US
    (again,) = said(1)
    assert again.startswith("no space left in /d/wal"), "so that it is not forgotten"
    node.files.plan = lambda number, name: None
    said(4)
    assert node.keeper.status()["state"] == "ok"
    node.files.plan = lambda number, name: ENOSPC if name == "fallocate" else None
    node.keeper.store._wal._spare = None
    assert len([text for text in said(10) if text.startswith("no space left in /d/wal")]) == 1, "it begins anew"


def test_a_disk_that_others_fill_is_low_though_this_shard_wants_no_segment() -> None:
    node = Node()
    node.keeper.store._low_bytes = 1 << 20
    node.write(1)
    for _ in range(3):
        node.turn(rest=True, us=keeper_rules.LOOK_AT_SPACE_US)
    assert node.keeper.status()["state"] == "ok"
    node.files.capacity_bytes = node.files.used_bytes() + 1000
    node.turn(rest=True, us=keeper_rules.LOOK_AT_SPACE_US)
    assert node.keeper.status()["state"] == "low"
    assert any("space runs out" in text for _, text in node.keeper.notes)
    before = node.files.calls
    for _ in range(100):
        node.turn(rest=True)
    assert node.files.calls - before <= 8, "it is looked at now and then, not with every turn"
    node.files.capacity_bytes = 1 << 40
    node.turn(rest=True, us=keeper_rules.LOOK_AT_SPACE_US)
    assert node.keeper.status()["state"] == "ok"


def test_the_watch_is_told_around_every_wait_for_the_disk() -> None:
    node = Node()
    told: list[bool] = []
    node.keeper.watch = told.append
    node.write(1)
    assert told[:2] == [True, False]
    assert told.count(True) == told.count(False)


def test_status_says_how_the_disk_is() -> None:
    keeper: Keeper = Node().keeper
    status = keeper.status()
    assert (status["state"], status["why"], status["segments"]) == ("ok", "", 1)
    assert status["log_bytes"] > 0

"""The leader table: what readers may and may not see, whatever writers and supervisors do."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from raftfleet.core.names import shard_of
from raftfleet.errors import NodeError, NodeNotRunning
from raftfleet.node import leader_table
from raftfleet.node.leader_table import LeaderSlot, LeaderTable, LeaderTableReader, RegionWriter, create_table


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    assert segments_of(tmp_path) == [], "a table's file was left behind"


def segments_of(run_dir: Path) -> list[Path]:
    return sorted(leader_table.SHM_DIR.glob(leader_table._segment_prefix(run_dir) + "*"))


@pytest.fixture
def table(run_dir: Path) -> Iterator[LeaderTable]:
    table = create_table(run_dir, "n1", 2, slots_per_region=8, endpoints_per_region=2)
    yield table
    table.close()


def names_of(shard: int, count: int, workers: int = 2) -> list[str]:
    found: list[str] = []
    number = 0
    while len(found) < count:
        name = f"group {number}"
        if shard_of(name, workers) == shard:
            found.append(name)
        number += 1
    return found


def test_a_reader_finds_what_was_written(run_dir: Path, table: LeaderTable) -> None:
    writers = [RegionWriter(run_dir, 0), RegionWriter(run_dir, 1)]
    reader = LeaderTableReader(run_dir)
    assert (reader.node, reader.workers, reader.generation, reader.is_alive) == ("n1", 2, 1, True)
    for shard, writer in enumerate(writers):
        name = names_of(shard, 1)[0]
        assert reader.lookup(name) is None
        writer.set_leader(name, 1 << 40 | 5, 1 << 32 | 3, "n2", (1 << 63) - 1)
        expected = LeaderSlot(1 << 40 | 5, 1 << 32 | 3, "n2", (1 << 63) - 1)
        assert reader.lookup(name) == expected
        assert reader.lookup(name) is reader.lookup(name), "the second look-up goes through the kept slot"
        writer.set_leaderless(name, 1 << 40 | 5)
        assert reader.lookup(name) == LeaderSlot(1 << 40 | 5, 1 << 32 | 3, None, 0)
        writer.remove(name)
        assert reader.lookup(name) is None


def test_older_news_never_replaces_newer(run_dir: Path, table: LeaderTable) -> None:
    writer, reader = RegionWriter(run_dir, 0), LeaderTableReader(run_dir)
    name = names_of(0, 1)[0]
    writer.set_leader(name, 7, 5, "n2", 1)
    writer.set_leader(name, 7, 4, "n3", 2)
    writer.set_leader(name, 6, 9, "n3", 2)
    writer.set_leaderless(name, 7, 4)
    writer.set_leaderless(name, 6)
    writer.remove(name, 6)
    assert reader.lookup(name) == LeaderSlot(7, 5, "n2", 1)
    writer.set_leader(name, 8, 1, "n3", 2)
    assert reader.lookup(name) == LeaderSlot(8, 1, "n3", 2)


def test_a_reader_cannot_write(run_dir: Path, table: LeaderTable) -> None:
    reader = LeaderTableReader(run_dir)
    with pytest.raises(TypeError):
        reader._newest.words[0] = 1
    assert table.path.stat().st_mode & 0o777 == 0o600


def test_a_restarted_shard_clears_its_region_and_no_other(run_dir: Path, table: LeaderTable) -> None:
    first, other = RegionWriter(run_dir, 0), RegionWriter(run_dir, 1)
    reader = LeaderTableReader(run_dir)
    mine, others = names_of(0, 1)[0], names_of(1, 1)[0]
    first.set_leader(mine, 7, 5, "n2", 1)
    other.set_leader(others, 8, 5, "n2", 1)
    assert reader.lookup(mine)
    second = RegionWriter(run_dir, 0)
    assert reader.lookup(mine) is None
    assert reader.lookup(others) == LeaderSlot(8, 5, "n2", 1)
    second.set_leader(mine, 7, 6, "n3", 2)
    second.set_leader(names_of(0, 2)[1], 9, 6, "n2", 2)
    assert reader.lookup(mine) == LeaderSlot(7, 6, "n3", 2)
    assert reader.lookup(names_of(0, 2)[1]) == LeaderSlot(9, 6, "n2", 2)


def test_a_slot_left_half_written_is_unknown_until_the_successor_clears_it(run_dir: Path, table: LeaderTable) -> None:
    writer, reader = RegionWriter(run_dir, 0), LeaderTableReader(run_dir)
    name = names_of(0, 1)[0]
    writer.set_leader(name, 7, 5, "n2", 1)
    assert reader.lookup(name)
    word = writer._rows[name].word
    writer._segment.words[word] += 1  # as a writer killed after its first store leaves it
    writer._segment.words[word + 3] = 12345
    assert reader.lookup(name) is None  # a reader does not wait for a dead writer
    successor = RegionWriter(run_dir, 0)
    assert writer._segment.words[word] % 2 == 0
    assert reader.lookup(name) is None
    successor.set_leader(name, 7, 6, "n2", 1)
    assert reader.lookup(name) == LeaderSlot(7, 6, "n2", 1)


def test_a_slot_with_a_wrong_crc_is_unknown(run_dir: Path, table: LeaderTable) -> None:
    writer = RegionWriter(run_dir, 0)
    name = names_of(0, 1)[0]
    writer.set_leader(name, 7, 5, "n2", 1)
    writer._segment.words[writer._rows[name].word + 3] = 8  # uid, under the same sequence
    assert LeaderTableReader(run_dir).lookup(name) is None


def test_a_full_region_wants_growth_and_loses_nothing(run_dir: Path, table: LeaderTable) -> None:
    writer, idle = RegionWriter(run_dir, 0), RegionWriter(run_dir, 1)
    reader = LeaderTableReader(run_dir)
    idle.set_leader(names_of(1, 1)[0], 3, 3, "n1", 3)
    names = names_of(0, 30)
    for number, name in enumerate(names):
        writer.set_leader(name, number + 1, 2, f"n{number % 5}", number)
    assert writer.needs_growth and table.wants_growth
    known = [name for name in names if reader.lookup(name)]
    assert 1 <= len(known) < 8
    old_path = table.path
    table.grow()
    assert not old_path.exists()
    assert [name for name in names if reader.lookup(name)] == known, "until a shard has moved, its old region serves"
    assert reader.generation == 2
    assert writer.follow()
    assert not writer.follow()
    while writer.needs_growth:  # endpoints double by generation
        table.grow()
        writer.follow()
    for number, name in enumerate(names):
        assert reader.lookup(name) == LeaderSlot(number + 1, 2, f"n{number % 5}", number)
    assert reader.lookup(names_of(1, 1)[0]) == LeaderSlot(3, 3, "n1", 3), "the idle shard's old region still serves"
    idle.follow()
    assert reader.lookup(names_of(1, 1)[0]) == LeaderSlot(3, 3, "n1", 3)
    assert not table.wants_growth


def test_a_stopped_node_knows_no_leader_and_leaves_nothing(run_dir: Path) -> None:
    table = create_table(run_dir, "n1", 1)
    writer, reader = RegionWriter(run_dir, 0), LeaderTableReader(run_dir)
    writer.set_leader("g", 7, 5, "n2", 1)
    assert reader.lookup("g")
    table.close()
    table.close()
    assert reader.lookup("g") is None
    assert not reader.is_alive
    assert list(run_dir.iterdir()) == []
    writer.set_leader("g", 7, 6, "n2", 1)  # the shard may live a little longer than the table
    with pytest.raises(NodeNotRunning, match="raftfleet-node start"):
        LeaderTableReader(run_dir)


def test_a_reader_follows_a_node_that_is_started_again(run_dir: Path) -> None:
    table = create_table(run_dir, "n1", 1)
    RegionWriter(run_dir, 0).set_leader("g", 7, 5, "n2", 1)
    reader = LeaderTableReader(run_dir)
    assert reader.lookup("g")
    table.close()
    table = create_table(run_dir, "n1b", 3)
    assert reader.lookup("g") is None
    assert (reader.node, reader.workers) == ("n1b", 3)
    RegionWriter(run_dir, shard_of("g", 3)).set_leader("g", 8, 1, "n3", 1)
    assert reader.lookup("g") == LeaderSlot(8, 1, "n3", 1)
    table.close()


CRASHING_SUPERVISOR = """
import os, signal, sys
from raftfleet.node.leader_table import RegionWriter, create_table
table = create_table(sys.argv[1], "n1", 1)
RegionWriter(sys.argv[1], 0).set_leader("g", 7, 5, "n2", 1)
print("ready", flush=True)
sys.stdin.read()
"""


def test_leftovers_of_a_crashed_node_are_taken_over(run_dir: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CRASHING_SUPERVISOR, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin and process.stdout
    with process.stdin, process.stdout:
        assert process.stdout.readline() == b"ready\n"
        reader = LeaderTableReader(run_dir)
        assert reader.is_alive
        assert reader.lookup("g")
        with pytest.raises(NodeError, match=f"process {process.pid}"):
            create_table(run_dir, "n1", 1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not reader.is_alive
    assert len(segments_of(run_dir)) == 1
    table = create_table(run_dir, "n1", 1)
    assert table.generation == 2
    assert segments_of(run_dir) == [table.path]
    assert reader.lookup("g") is None, "what the dead node said is void"
    assert reader.is_alive
    RegionWriter(run_dir, 0).set_leader("g", 7, 6, "n3", 1)
    assert reader.lookup("g") == LeaderSlot(7, 6, "n3", 1)
    table.close()


def test_a_table_whose_link_was_lost_is_replaced_and_found_by_refresh(run_dir: Path) -> None:
    first = create_table(run_dir, "n1", 1)
    RegionWriter(run_dir, 0).set_leader("g", 7, 5, "n2", 1)
    reader = LeaderTableReader(run_dir)
    assert reader.lookup("g")
    (run_dir / leader_table.LINK_NAME).unlink()
    second = create_table(run_dir, "n1", 1)
    assert not first.path.exists()
    assert reader.lookup("g"), "nothing told the reader"
    assert reader.refresh()
    assert not reader.refresh()
    assert reader.lookup("g") is None
    second.close()
    first.close()


@pytest.mark.parametrize("content", [b"", b"x" * 100, bytes(8192), struct.pack("=Q", 1) * 1024])
def test_a_file_that_is_no_table_is_refused(run_dir: Path, content: bytes) -> None:
    (run_dir / "other").write_bytes(content)
    (run_dir / leader_table.LINK_NAME).symlink_to(run_dir / "other")
    with pytest.raises(NodeError, match="not a leader table"):
        LeaderTableReader(run_dir)


@pytest.mark.parametrize("slots", [0, 1, 3, 100])
def test_the_number_of_slots_is_a_power_of_two(run_dir: Path, slots: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        create_table(run_dir, "n1", 1, slots_per_region=slots)


def test_a_reader_survives_closing_while_others_read(run_dir: Path, table: LeaderTable) -> None:
    RegionWriter(run_dir, 0).set_leader(names_of(0, 1)[0], 7, 5, "n2", 1)
    reader = LeaderTableReader(run_dir)
    stop = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                reader.lookup(names_of(0, 1)[0])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    reader.close()
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert reader.lookup(names_of(0, 1)[0]) is None


HAMMERING_WRITER = """
import itertools, sys
from raftfleet.node.leader_table import RegionWriter
writer = RegionWriter(sys.argv[1], 0)
print("ready", flush=True)
for k in itertools.count(1):
    writer.set_leader("a", k, 3 * k, f"n{k % 3}", 7 * k)
    writer.set_leader("b", k, 5 * k, f"n{k % 3}", 11 * k)
    writer.set_leader("c", k, 5 * k, f"n{k % 3}", 11 * k)
    writer.remove("b")
    writer.remove("c")
"""


def test_no_read_is_ever_torn_by_a_hammering_writer(run_dir: Path) -> None:
    table = create_table(run_dir, "n1", 1, slots_per_region=4)
    process = subprocess.Popen([sys.executable, "-c", HAMMERING_WRITER, str(run_dir)], stdout=subprocess.PIPE)
    try:
        assert process.stdout
        with process.stdout:
            assert process.stdout.readline() == b"ready\n"
        reader = LeaderTableReader(run_dir)
        found, latest = 0, 0
        enough, deadline = time.monotonic() + 1.5, time.monotonic() + 60
        while time.monotonic() < enough or (min(found, latest) <= 1000 and time.monotonic() < deadline):
            for name, factor, instance in (("a", 3, 7), ("b", 5, 11), ("c", 5, 11)):
                slot = reader.lookup(name)
                if slot is not None:
                    k = slot.uid
                    assert slot == LeaderSlot(k, factor * k, f"n{k % 3}", instance * k)
                    found += 1
                    if name == "a":
                        assert k >= latest, "a reader never goes back"
                        latest = k
        assert found > 1000
        assert latest > 1000
    finally:
        process.kill()
        process.wait()
        table.close()


class Model(RuleBasedStateMachine):
    """One region of eight slots, a dozen names: the reader agrees with a dict whenever nothing is short of room."""

    names = names_of(0, 12, workers=1)

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.table = create_table(self.folder.name, "n1", 1, slots_per_region=8, endpoints_per_region=3)
        self.writer = RegionWriter(self.folder.name, 0)
        self.reader = LeaderTableReader(self.folder.name)
        self.model: dict[str, LeaderSlot] = {}

    def teardown(self) -> None:
        self.reader.close()
        self.writer.close()
        self.table.close()
        self.folder.cleanup()

    @rule(
        name=st.sampled_from(names),
        uid=st.integers(1, 3),
        term=st.integers(0, 3),
        node=st.sampled_from(["n1", "n2", "n3", "n4"]),
        instance=st.integers(1, (1 << 63) - 1),
    )
    def set_leader(self, name: str, uid: int, term: int, node: str, instance: int) -> None:
        self.writer.set_leader(name, uid, term, node, instance)
        known = self.model.get(name)
        if known is None or (uid, term) >= known[:2]:
            self.model[name] = LeaderSlot(uid, term, node, instance)

    @rule(name=st.sampled_from(names), uid=st.integers(1, 3))
    def set_leaderless(self, name: str, uid: int) -> None:
        self.writer.set_leaderless(name, uid)
        known = self.model.get(name)
        if known is None or uid >= known.uid:
            self.model[name] = LeaderSlot(uid, known.term if known and known.uid == uid else 0, None, 0)

    @rule(name=st.sampled_from(names))
    def remove(self, name: str) -> None:
        self.writer.remove(name)
        self.model.pop(name, None)

    @rule()
    def restart_the_writer(self) -> None:
        self.writer.close()
        self.writer = RegionWriter(self.folder.name, 0)
        self.model.clear()

    @rule(seed=st.integers(0, 100))
    def replace_all(self, seed: int) -> None:
        rng = random.Random(seed)
        rows = [(name, 3, 3 + seed, rng.choice(["n1", None]), 0) for name in rng.sample(self.names, 5)]
        self.writer.replace_all(rows)
        self.model = {name: LeaderSlot(uid, term, node, number) for name, uid, term, node, number in rows}

    @rule()
    def grow(self) -> None:
        self.table.grow()
        self.writer.follow()

    @invariant()
    def the_writer_knows_all(self) -> None:
        assert self.writer.known() == self.model

    @invariant()
    def the_reader_knows_all_that_has_room(self) -> None:
        for name in self.names:
            found = self.reader.lookup(name)
            if not self.writer.needs_growth:
                assert found == self.model.get(name)
            elif found is not None:
                expected = self.model[name]
                assert found in (expected, expected._replace(node=None, instance=0))

    @invariant()
    def every_search_ends(self) -> None:
        words, writer = self.writer._segment.words, self.writer
        used = range(writer._first, writer._end, leader_table._SLOT_WORDS)
        states = [words[word + leader_table._STATE_WORD] for word in used]
        removed = [word for word, state in zip(used, states, strict=True) if state and word not in writer._owned]
        assert len(removed) == writer._removed_count
        assert set(writer._owned) == {row.word for row in writer._rows.values() if row.word >= 0}


Model.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestModel = Model.TestCase


def test_start_times_tell_processes_apart() -> None:
    mine = leader_table.process_start_time(os.getpid())
    assert mine is not None
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process.stdin
    other = leader_table.process_start_time(process.pid)
    assert other is not None and other > mine
    process.stdin.close()
    process.wait()
    assert leader_table.process_start_time(process.pid) is None

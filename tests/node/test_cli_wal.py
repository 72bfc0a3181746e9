"""``raftfleet-node wal``: real files, whole and damaged, without a node."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from raftfleet.core.messages import COMMANDS, Entry
from raftfleet.node import cli
from raftfleet.node.data_dir import write_layout
from raftfleet.storage import inspect
from raftfleet.storage.base import ForeignStorage
from raftfleet.storage.records import DATA_START, MARK_MAGIC, SegmentHeader, pack_header
from raftfleet.storage.store import ShardStore

SEGMENT_BYTES = 1 << 14


def run(*words: object) -> Result:
    return CliRunner().invoke(cli.main, ["wal", *map(str, words)])


def rows_of(done: Result) -> list[dict[str, Any]]:
    assert done.exit_code in (0, 1), done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def make_shard(path: Path, instance: int, first_uid: int, shard: int | None = None) -> ShardStore:
    """Two groups with ten entries each, a vote, a note, and a snapshot of the first; not closed."""
    store, _ = ShardStore.open(str(path), node="n1", new_instance=instance, shard=shard, segment_bytes=SEGMENT_BYTES)
    for uid, name in ((first_uid, "lamps"), (first_uid + 1, "doors")):
        store.save_group(uid, name, {"machine": "m:M"}, (instance,), 0)
        store.save_vote(uid, 3, instance)
        for index in range(1, 11):
            store.append(uid, index, [Entry(3, COMMANDS, b"secret-%d-%d" % (uid, index))])
            store.sync()
    store.save_note("fleet", b"\x01")
    store.save_snapshot(first_uid, 8, 3, b"a state")
    store.sync()
    store.mark()
    return store


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    for index in range(2):
        (tmp_path / "data").mkdir(exist_ok=True)
        make_shard(tmp_path / "data" / f"shard-{index}", 70 + index, 0x100 * (index + 1)).close()
    return tmp_path / "data"


def segment_in(shard: Path) -> Path:
    (path,) = [path for path in (shard / "wal").iterdir() if path.read_bytes().strip(b"\0")]
    return path


def flip(path: Path, what: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(what)] ^= 1
    path.write_bytes(data)


def contents(top: Path) -> dict[str, bytes]:
    return {str(path.relative_to(top)): path.read_bytes() for path in sorted(top.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["ls", "dump", "verify"])
def test_help_names_an_environment_variable_for_every_option(name: str) -> None:
    assert isinstance(cli.main.commands["wal"], click.Group)
    text = re.sub(r"\s+", " ", CliRunner().invoke(cli.main, ["wal", name, "--help"], terminal_width=200).output)
    command = cli.main.commands["wal"].commands[name]
    for option in [parameter for parameter in command.params if isinstance(parameter, click.Option)]:
        assert re.search(rf"{option.opts[0]}\b.*?\[env var: RAFTFLEET_[A-Z_]+\]", text), option.opts


def test_ls_lists_segments_and_snapshots_of_every_shard(data_dir: Path) -> None:
    rows = rows_of(run("ls", data_dir, "--json"))
    assert {row["shard"] for row in rows} == {"shard-0", "shard-1"}
    used = [row for row in rows if row["type"] == "segment" and row["state"] == "in use"]
    assert [(row["shard"], row["instance"]) for row in used] == [("shard-0", 70), ("shard-1", 71)]
    snapshots = [row for row in rows if row["type"] == "snapshot"]
    assert [(row["name"], row["index"], row["term"]) for row in snapshots] == [("lamps", 8, 3)] * 2
    shown = run("ls", data_dir).stdout
    assert shown.splitlines()[0].split() == ["SHARD", "FILE", "STATE", "BYTES", "WHAT"]
    assert "group lamps (0x100) up to index 8, term 3" in shown


def test_dump_prints_one_json_object_per_record_in_the_order_of_writing(data_dir: Path) -> None:
    rows = rows_of(run("dump", data_dir / "shard-0", "--json"))
    assert {row["shard"] for row in rows} == {"."}
    entries = [(row["uid"], row["first_index"]) for row in rows if row["kind"] == "entries"]
    assert entries == [(uid, index) for uid in (0x100, 0x101) for index in range(1, 11)]
    assert [row["batch"] for row in rows] == sorted(row["batch"] for row in rows)
    assert {"group", "vote", "note"} < {row["kind"] for row in rows}


def test_dump_keeps_users_data_to_itself_unless_it_is_asked_for(data_dir: Path) -> None:
    assert not any("entries" in row for row in rows_of(run("dump", data_dir, "--json")))
    (last,) = [
        row for row in rows_of(run("dump", data_dir, "--json", "--data", "--group", "0x201"))
        if row["kind"] == "entries" and row["first_index"] == 10
    ]  # fmt: skip
    assert last["entries"] == [[COMMANDS, "c2VjcmV0LTUxMy0xMA=="]]


@pytest.mark.parametrize("group", ["doors", "0x101", "257"])
def test_dump_of_one_group_takes_a_name_or_a_uid(data_dir: Path, group: str) -> None:
    rows = rows_of(run("dump", data_dir / "shard-0", "--json", "--group", group))
    assert {row.get("uid") for row in rows} == {0x101}
    assert len(rows) == 12


def test_a_group_that_is_nowhere_is_a_usage_error(data_dir: Path) -> None:
    done = run("dump", data_dir, "--group", "nobody")
    assert done.exit_code == 2
    assert "wal verify" in done.stderr


def test_verify_of_whole_directories_exits_with_0(data_dir: Path) -> None:
    done = run("verify", data_dir, "--json")
    assert done.exit_code == 0
    reports = rows_of(done)
    assert [(report["shard"], report["ok"], report["torn_tail_bytes"]) for report in reports] == [
        ("shard-0", True, 0),
        ("shard-1", True, 0),
    ]
    assert [(row["name"], row["last_index"]) for row in reports[0]["groups"]] == [("lamps", 10), ("doors", 10)]
    shown = run("verify", data_dir)
    assert shown.exit_code == 0
    assert "shard shard-0: whole, instance 0000000000000046, 2 groups" in shown.stdout


def test_verify_says_which_group_a_flipped_bit_costs_and_exits_with_1(data_dir: Path) -> None:
    flip(segment_in(data_dir / "shard-1"), b"secret-513-4")
    done = run("verify", data_dir, "--json")
    assert done.exit_code == 1
    whole, damaged = rows_of(done)
    assert whole["ok"]
    assert [row["uid"] for row in damaged["damaged"]] == [0x201]
    assert [row["name"] for row in damaged["groups"]] == ["lamps"]
    shown = run("verify", data_dir)
    assert shown.exit_code == 1
    assert "group 0x201 is refused" in shown.stdout
    assert "Next:" in shown.stderr
    assert [row["uid"] for row in rows_of(run("dump", data_dir, "--json")) if row["kind"] == "damaged"] == [0x201]


def test_verify_judges_as_a_start_does(data_dir: Path) -> None:
    shard = data_dir / "shard-0"
    flip(segment_in(shard), b"secret-256-9")
    (snapshot,) = (shard / "snapshots").iterdir()
    flip(snapshot, b"a state")
    (report,) = rows_of(run("verify", shard, "--json"))
    store, found = ShardStore.open(str(shard), node="n1", new_instance=1, segment_bytes=SEGMENT_BYTES)
    store.close()
    assert [row["what"] for row in report["damaged"]] == [str(damage) for damage in found.damaged]
    assert [row["uid"] for row in report["groups"]] == [group.uid for group in found.groups] == [0x101]


def exchange(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def test_shards_that_were_exchanged_are_refused_and_found_by_verify(tmp_path: Path) -> None:
    top = tmp_path / "data"
    top.mkdir()
    for index in range(2):
        make_shard(top / f"shard-{index}", 70 + index, 0x100 * (index + 1), shard=index).close()
    assert run("verify", top).exit_code == 0
    exchange(top / "shard-0", top / "shard-1")
    before = contents(top)
    with pytest.raises(ForeignStorage, match="is that of shard 1, not of shard 0: .* give them back their names"):
        ShardStore.open(str(top / "shard-0"), node="n1", new_instance=1, shard=0, segment_bytes=SEGMENT_BYTES)
    assert contents(top) == before
    done = run("verify", top)
    assert done.exit_code == 1
    assert "shard-0 is that of shard 1" in done.stdout and "shard-1 is that of shard 0" in done.stdout
    exchange(top / "shard-0", top / "shard-1")
    for index in range(2):
        path = str(top / f"shard-{index}")
        store, _ = ShardStore.open(path, node="n1", new_instance=1, shard=index, segment_bytes=SEGMENT_BYTES)
        assert store.instance == 70 + index
        store.close()


def test_a_shard_from_before_shards_were_noted_opens_and_is_noted(data_dir: Path) -> None:
    path = str(data_dir / "shard-1")
    ShardStore.open(path, node="n1", new_instance=1, shard=1, segment_bytes=SEGMENT_BYTES)[0].close()
    with pytest.raises(ForeignStorage, match="is that of shard 1, not of shard 4"):
        ShardStore.open(path, node="n1", new_instance=1, shard=4, segment_bytes=SEGMENT_BYTES)


@pytest.mark.parametrize("shards", [0, 2])
def test_verify_misses_a_shard_that_the_layout_names(data_dir: Path, shards: int) -> None:
    write_layout(data_dir, node="n1", workers=2, shards=shards)
    (data_dir / "founding").write_bytes(b"a memory")
    assert run("verify", data_dir).exit_code == 0
    shutil.rmtree(data_dir / "shard-1")
    done = run("verify", data_dir, "--json")
    assert done.exit_code == 1
    assert [(row["shard"], row["ok"]) for row in rows_of(done)] == [("shard-1", False), ("shard-0", True)]
    assert "shard-1 is missing" in run("verify", data_dir).stdout
    shutil.rmtree(data_dir / "shard-0")
    none_left = run("verify", data_dir)
    assert none_left.exit_code == 1
    assert "shard-0 is missing" in none_left.stdout and "shard-1 is missing" in none_left.stdout


def test_verify_does_not_miss_shards_that_never_began(data_dir: Path) -> None:
    write_layout(data_dir, node="n1", workers=4, shards=2)
    assert run("verify", data_dir).exit_code == 0


def test_a_damaged_layout_is_damage(data_dir: Path) -> None:
    (data_dir / "layout").write_text("{")
    done = run("verify", data_dir)
    assert done.exit_code == 1
    assert "layout is damaged" in done.stdout


def test_damage_that_costs_no_group_is_not_said_to_refuse_one(data_dir: Path) -> None:
    flip(segment_in(data_dir / "shard-0"), MARK_MAGIC)
    done = run("verify", data_dir)
    assert done.exit_code == 1
    assert "no group is affected" in done.stdout
    assert "No group is named" in done.stderr and "refuses the groups that are named" not in done.stderr


def test_lost_batches_are_not_said_to_refuse_groups_and_to_affect_none(data_dir: Path) -> None:
    path = segment_in(data_dir / "shard-0")
    data = bytearray(path.read_bytes())
    at = data.index(b"secret-256-3")
    data[at - 60 : at + 300] = bytes(360)
    path.write_bytes(data)
    (lost,) = [
        row["what"]
        for report in rows_of(run("verify", data_dir, "--json"))
        for row in report["damaged"]
        if "beyond telling" in row["what"] and row["uid"] is None
    ]
    assert "are refused, and named besides" in lost and "no group is affected" not in lost


def test_a_torn_tail_is_no_damage(tmp_path: Path) -> None:
    store = make_shard(tmp_path / "s", 70, 1)
    store.append(1, 11, [Entry(3, COMMANDS, b"the last words")])
    store.sync()
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "s", copy)
    store.close()
    flip(segment_in(copy), b"the last words")
    done = run("verify", copy, "--json")
    assert done.exit_code == 0
    (report,) = rows_of(done)
    assert report["torn_tail_bytes"] > 0
    assert report["groups"][0]["last_index"] == 10


def test_a_damaged_snapshot_of_a_removed_group_is_noticed(tmp_path: Path) -> None:
    store = make_shard(tmp_path / "s", 70, 1)
    store.forget_group(1)
    store.sync()
    store.close()
    assert run("verify", tmp_path / "s").exit_code == 0
    (archived,) = (tmp_path / "s" / "archive").iterdir()
    flip(archived, b"a state")
    done = run("verify", tmp_path / "s")
    assert done.exit_code == 1
    assert "it is of a group that was removed" in done.stdout


def test_a_directory_that_a_process_holds_open_can_be_looked_at(tmp_path: Path) -> None:
    store = make_shard(tmp_path / "s", 70, 1)
    try:
        for name in ("ls", "dump", "verify"):
            assert run(name, tmp_path / "s", "--json").exit_code == 0
        store.append(1, 11, [Entry(3, COMMANDS, b"more")])
        store.sync()
    finally:
        store.close()


def test_nothing_is_changed_by_looking(data_dir: Path) -> None:
    flip(segment_in(data_dir / "shard-1"), b"secret-513-4")
    before = contents(data_dir)
    for name in ("ls", "dump", "verify"):
        run(name, data_dir)
        run(name, data_dir, "--json")
    assert contents(data_dir) == before


def test_a_copy_without_the_lock_and_without_snapshots_can_be_looked_at(data_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data_dir / "shard-0" / "wal", copy / "wal")
    (report,) = rows_of(run("verify", copy, "--json"))
    assert report["ok"]
    assert [row["snapshot_index"] for row in report["groups"]] == [0, 0]


@pytest.mark.parametrize("name", ["ls", "dump", "verify"])
def test_what_is_no_data_directory_is_a_usage_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        done = run(name, path)
        assert done.exit_code == 2
        assert str(path) in done.stderr


def test_a_newer_format_is_said_and_not_guessed_at(data_dir: Path) -> None:
    path = segment_in(data_dir / "shard-0")
    data = path.read_bytes()
    path.write_bytes(pack_header(SegmentHeader(99, 70, 1, 1, bytes(16), bytes(64))) + data[DATA_START:])
    done = run("verify", data_dir / "shard-0")
    assert done.exit_code == 1
    assert "format 99" in done.stdout and "of a newer raftfleet" in done.stdout and "DAMAGED" not in done.stdout
    assert "use the newer raftfleet" in done.stdout and "nothing is known to be damaged" in done.stderr
    done = run("dump", data_dir / "shard-0")
    assert done.exit_code == 1
    assert "format 99" in done.stderr


def test_headers_that_are_all_unreadable_are_an_error_in_a_sentence(data_dir: Path) -> None:
    path = segment_in(data_dir / "shard-0")
    path.write_bytes(b"\xff" * DATA_START + path.read_bytes()[DATA_START:])
    done = run("dump", data_dir / "shard-0")
    assert done.exit_code == 1
    assert "no segment whose header can be read" in done.stderr
    assert "Next:" in done.stderr


def test_a_log_is_judged_without_its_data_in_memory(tmp_path: Path) -> None:
    store, _ = ShardStore.open(str(tmp_path / "s"), node="n1", new_instance=7, segment_bytes=1 << 20)
    store.save_group(1, "g", {}, (7,), 0)
    for index in range(1, 101):
        store.append(1, index, [Entry(1, COMMANDS, bytes(40_000))])
        store.sync()
    store.close()
    assert len(list((tmp_path / "s" / "wal").iterdir())) >= 4
    import tracemalloc

    tracemalloc.start()
    try:
        report = inspect.verify(str(tmp_path / "s"))
        assert sum(1 for _ in inspect.dump(str(tmp_path / "s"))) == 101
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report["ok"]
    assert report["groups"][0]["last_index"] == 100
    assert peak_bytes < 3 << 20, "more than a few segments of a log of four megabytes"

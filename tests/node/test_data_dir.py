"""A node's data directory: whose it is, and that a refused one is left as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from raftfleet.node.data_dir import (
    DataDir,
    DataDirRefused,
    read_layout,
    retire_shard,
    shard_dir,
    was_there,
    write_layout,
)
from raftfleet.storage.records import DATA_START, SegmentHeader, node_hash, pack_header


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_new_directory_is_made_for_its_owner_only_and_knows_its_node(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "data"
    DataDir.acquire(path, node="n1", workers=3).release()
    assert path.stat().st_mode & 0o777 == 0o700
    assert read_layout(path) == {"format": 1, "node": "n1", "workers": 3, "shards": 0}


def test_it_opens_again_for_the_same_node(tmp_path: Path) -> None:
    for _ in range(2):
        DataDir.acquire(tmp_path / "d", node="n1", workers=2).release()


def test_another_node_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    DataDir.acquire(tmp_path / "d", node="n1", workers=2).release()
    before = contents(tmp_path)
    with pytest.raises(DataDirRefused, match="belongs to node 'n1'"):
        DataDir.acquire(tmp_path / "d", node="n2", workers=3)
    assert contents(tmp_path) == before


def started(path: Path, workers: int) -> tuple[int, int, list[bool]]:
    """Start and stop a node: shards that must run, workers before, and which of the shards are known to have been."""
    data = DataDir.acquire(path, node="n1", workers=workers)
    known = [was_there(path, index) for index in range(data.shard_count)]
    for index in range(data.shard_count):
        shard_dir(path, index).mkdir(exist_ok=True)
    data.release()
    return data.shard_count, data.workers_before, known


def test_more_workers_get_new_shards_beside_those_that_are_there(tmp_path: Path) -> None:
    assert started(tmp_path, 2) == (2, 0, [False, False])
    assert started(tmp_path, 2) == (2, 2, [True, True])
    assert started(tmp_path, 4) == (4, 2, [True, True, False, False])
    assert started(tmp_path, 4) == (4, 4, [True] * 4)


def test_fewer_workers_leave_every_shard_that_has_a_directory_to_run(tmp_path: Path) -> None:
    started(tmp_path, 3)
    assert started(tmp_path, 1) == (3, 3, [True] * 3)
    assert started(tmp_path, 1)[:2] == (3, 1), "as long as its directory is there"
    for index in (1, 2):
        retire_shard(tmp_path, index, 70 + index)
    assert started(tmp_path, 1) == (1, 1, [True])
    assert started(tmp_path, 2) == (2, 1, [True, False])


def test_a_start_that_was_cut_short_changes_nothing_about_which_shards_are_new(tmp_path: Path) -> None:
    started(tmp_path, 2)
    for _ in range(2):  # killed before its shards have begun
        data = DataDir.acquire(tmp_path, node="n1", workers=4)
        assert [was_there(tmp_path, index) for index in range(data.shard_count)] == [True, True, False, False]
        data.release()


def test_a_shard_whose_directory_was_lost_is_told_from_a_new_one(tmp_path: Path) -> None:
    started(tmp_path, 2)
    started(tmp_path, 2)
    retire_shard(tmp_path, 1, 7)
    assert started(tmp_path, 2) == (2, 2, [True, True])


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(DataDirRefused, match=r"it holds thesis\.tex"):
        DataDir.acquire(tmp_path, node="n1", workers=1)
    assert contents(tmp_path) == {"thesis.tex": b"precious"}


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "layout").write_text(json.dumps({"format": 2, "node": "n1", "workers": 1}))
    with pytest.raises(DataDirRefused, match="newer raftfleet"):
        DataDir.acquire(tmp_path, node="n1", workers=1)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (pack_header(SegmentHeader(2, 70, 1, 1, bytes(16), node_hash("n1"))), "install the newer one again"),
        (pack_header(SegmentHeader(1, 70, 1, 1, bytes(16), node_hash("n2"))), "give the node its former --name"),
    ],
)
def test_a_shard_that_would_be_refused_is_refused_before_anything_is_changed(
    tmp_path: Path, header: bytes, says: str
) -> None:
    started(tmp_path, 2)
    wal = shard_dir(tmp_path, 1) / "wal"
    wal.mkdir()
    (wal / "0000000000000001.wal").write_bytes(header + bytes(DATA_START))
    before = contents(tmp_path)
    with pytest.raises(DataDirRefused, match=says):
        DataDir.acquire(tmp_path, node="n1", workers=4)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "node": 1, "workers": 1}'])
def test_a_damaged_layout_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "layout").write_text(text)
    with pytest.raises(DataDirRefused, match="layout is damaged"):
        DataDir.acquire(tmp_path, node="n1", workers=1)


def test_a_lost_layout_is_made_again_from_the_shards_that_are_there(tmp_path: Path) -> None:
    shard_dir(tmp_path, 0).mkdir()
    shard_dir(tmp_path, 1).mkdir()
    assert started(tmp_path, 1)[0] == 2
    assert read_layout(tmp_path) == {"format": 1, "node": "n1", "workers": 1, "shards": 2}


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    first = DataDir.acquire(tmp_path, node="n1", workers=1)
    with pytest.raises(DataDirRefused, match="another node uses"):
        DataDir.acquire(tmp_path, node="n1", workers=1, wait_s=0.0)
    first.release()
    DataDir.acquire(tmp_path, node="n1", workers=1).release()


def test_a_directory_that_others_can_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d"
    path.mkdir()
    path.chmod(0o777)
    with pytest.raises(DataDirRefused, match="can be written by others"):
        DataDir.acquire(path, node="n1", workers=1)


def test_a_file_is_no_data_directory(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(DataDirRefused, match="cannot be used"):
        DataDir.acquire(tmp_path / "f", node="n1", workers=1)


def test_a_shard_that_left_is_put_aside_and_only_the_newest_is_kept(tmp_path: Path) -> None:
    write_layout(tmp_path, node="n1", workers=1, shards=1)
    for instance in (1, 2):
        shard_dir(tmp_path, 0).mkdir()
        (shard_dir(tmp_path, 0) / "x").write_text(str(instance))
        put_at = retire_shard(tmp_path, 0, instance)
        assert (put_at / "x").read_text() == str(instance)
        assert not shard_dir(tmp_path, 0).exists()
    assert os.listdir(tmp_path / "former") == ["shard-0-0000000000000002"]


def test_a_shard_that_was_wiped_after_the_nodes_first_life_is_known_to_have_been_there(tmp_path: Path) -> None:
    DataDir.acquire(tmp_path, node="n1", workers=2).release()
    assert not was_there(tmp_path, 0), "a first start has lost nothing"
    (tmp_path / "founding").write_bytes(b"written when all shards were up")
    shard_dir(tmp_path, 1).mkdir()
    DataDir.acquire(tmp_path, node="n1", workers=2).release()
    assert was_there(tmp_path, 0)

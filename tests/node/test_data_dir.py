"""A node's data directory: whose it is, and that a refused one is left as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from raftfleet.node.data_dir import DataDir, DataDirRefused, read_layout, retire_shard, shard_dir, write_layout


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_new_directory_is_made_for_its_owner_only_and_knows_its_node(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "data"
    DataDir.acquire(path, node="n1", workers=3).release()
    assert path.stat().st_mode & 0o777 == 0o700
    assert read_layout(path) == {"format": 1, "node": "n1", "workers": 3}


def test_it_opens_again_for_the_same_node(tmp_path: Path) -> None:
    for _ in range(2):
        DataDir.acquire(tmp_path / "d", node="n1", workers=2).release()


@pytest.mark.parametrize(
    ("node", "workers", "words"),
    [("n2", 2, "belongs to node 'n1'"), ("n1", 3, "was written by 2 workers, this node is to have 3")],
)
def test_another_node_or_shape_is_refused_and_nothing_changes(
    tmp_path: Path, node: str, workers: int, words: str
) -> None:
    DataDir.acquire(tmp_path / "d", node="n1", workers=2).release()
    before = contents(tmp_path)
    with pytest.raises(DataDirRefused, match=words):
        DataDir.acquire(tmp_path / "d", node=node, workers=workers)
    assert contents(tmp_path) == before


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(DataDirRefused, match=r"it holds thesis\.tex"):
        DataDir.acquire(tmp_path, node="n1", workers=1)
    assert contents(tmp_path) == {"thesis.tex": b"precious"}


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "layout").write_text(json.dumps({"format": 2, "node": "n1", "workers": 1}))
    with pytest.raises(DataDirRefused, match="newer raftfleet"):
        DataDir.acquire(tmp_path, node="n1", workers=1)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "node": 1, "workers": 1}'])
def test_a_damaged_layout_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "layout").write_text(text)
    with pytest.raises(DataDirRefused, match="layout is damaged"):
        DataDir.acquire(tmp_path, node="n1", workers=1)


def test_a_lost_layout_is_made_again_from_the_shards_that_are_there(tmp_path: Path) -> None:
    shard_dir(tmp_path, 0).mkdir()
    shard_dir(tmp_path, 1).mkdir()
    with pytest.raises(DataDirRefused, match="was written by 2 workers"):
        DataDir.acquire(tmp_path, node="n1", workers=1)
    DataDir.acquire(tmp_path, node="n1", workers=2).release()


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
    write_layout(tmp_path, node="n1", workers=1)
    for instance in (1, 2):
        shard_dir(tmp_path, 0).mkdir()
        (shard_dir(tmp_path, 0) / "x").write_text(str(instance))
        put_at = retire_shard(tmp_path, 0, instance)
        assert (put_at / "x").read_text() == str(instance)
        assert not shard_dir(tmp_path, 0).exists()
    assert os.listdir(tmp_path / "former") == ["shard-0-0000000000000002"]

"""A shard that hangs on its disk is named from outside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from raftfleet.node.context import ChildTable
from raftfleet.node.disk_watch import DISK_HUNG_US, DiskWatch


@pytest.fixture
def children() -> Iterator[ChildTable]:
    table = ChildTable(2)
    for row in range(3):
        table.write(row, pid=100 + row, restarts=0, started_us=1)
    yield table
    table.close()


def test_a_shard_that_waits_for_long_is_named_once_and_so_is_its_return(children: ChildTable) -> None:
    watch = DiskWatch(children)
    children.write_disk_since(1, 5_000_000)
    assert watch.look(5_000_000 + DISK_HUNG_US) == []
    assert watch.look(5_000_001 + DISK_HUNG_US) == [("error", "shard 1 has been waiting for its disk for 2.0 s")]
    assert watch.look(9_000_000) == []
    assert watch.hung == {1}
    children.write_disk_since(1, 0)
    assert watch.look(9_000_001) == [("info", "shard 1's disk answers again")]
    assert watch.hung == set()


def test_a_shard_that_died_waiting_does_not_hang(children: ChildTable) -> None:
    watch = DiskWatch(children)
    children.write_disk_since(0, 1)
    watch.look(10_000_000)
    children.write(1, pid=0, restarts=0, started_us=1)
    assert watch.look(11_000_000) == [("info", "shard 0's disk answers again")]
    children.write(1, pid=200, restarts=1, started_us=12_000_000)
    assert watch.look(20_000_000) == [], "what its predecessor waited for is forgotten with its start"


def test_the_others_words_are_left_alone(children: ChildTable) -> None:
    children.write_disk_since(0, 7)
    assert [row.disk_since_us for row in children.shards] == [7, 0]
    assert children.shard(0).pid == 101

"""A group that begins with a state: it serves nobody before, and then all replicas have the same."""

from __future__ import annotations

import zlib
from typing import Any

import msgpack
import pytest
from core.harness import Answer, Cluster, pack

from raftfleet.core import codes
from raftfleet.core.reads import STATE_WANTED
from raftfleet.core.restoring import PIECE_BYTES_MAX

STATE = ["one", "two", "x" * 600_000]
DUMPED = bytes(msgpack.packb(STATE))
PIECE = PIECE_BYTES_MAX


def waiting_cluster(data: bytes = DUMPED, *, crc: int | None = None, **fields: Any) -> Cluster:
    cluster = Cluster(restore=(len(data), zlib.crc32(data) if crc is None else crc), **fields)
    cluster.settle()
    return cluster


def send_piece(cluster: Cluster, leader: int, offset: int, data: bytes = DUMPED) -> Answer:
    answer = Answer()
    piece = data[offset : offset + PIECE]
    cluster.turn(leader, lambda shard: shard.members[1].propose_piece(offset, piece, answer))
    take_replies(cluster, answer)
    return answer


def take_replies(cluster: Cluster, answer: Answer) -> None:
    for _ in range(200):
        if answer.code is not None:
            return
        cluster.run_for(0.05)


def send_all(cluster: Cluster, data: bytes = DUMPED) -> Answer:
    offset = 0
    while True:
        answer = send_piece(cluster, cluster.leader(), offset, data)
        if answer.code != 0 or answer.body[1]:
            return answer
        assert answer.body[0] > offset
        offset = answer.body[0]


def ask(cluster: Cluster, instance: int, *, stale: bool = False) -> Answer:
    answer = Answer()
    cluster.turn(instance, lambda shard: shard.query(1, msgpack.packb("get"), answer, stale=stale))
    take_replies(cluster, answer)
    return answer


def test_every_replica_begins_with_the_state() -> None:
    cluster = waiting_cluster()
    assert send_all(cluster).body == [len(DUMPED), True]
    cluster.run_for(1)
    for instance in cluster.shards:
        assert cluster.state(instance) == STATE
        assert cluster.member(instance).restoring is None
    assert cluster.command("next") == 4


def test_nobody_is_served_before_the_state_is_there() -> None:
    cluster = waiting_cluster()
    leader = cluster.leader()
    send_piece(cluster, leader, 0)
    answer = Answer()
    cluster.turn(leader, lambda shard: shard.propose(1, pack("too early", 1), answer))
    take_replies(cluster, answer)
    assert answer.code == codes.RESTORING
    assert f"{PIECE} of {len(DUMPED)} bytes" in answer.body
    assert ask(cluster, leader).code == codes.RESTORING
    for instance in cluster.shards:
        assert ask(cluster, instance, stale=True).code == codes.RESTORING, "an empty state would be a wrong answer"
    send_all(cluster)
    assert ask(cluster, leader).value == STATE
    assert cluster.state(leader) == STATE, "what was refused was not done"


def test_a_piece_that_comes_twice_counts_once_and_one_that_does_not_fit_says_where_to_go_on() -> None:
    cluster = waiting_cluster()
    leader = cluster.leader()
    assert send_piece(cluster, leader, PIECE).body == [0, False]
    assert send_piece(cluster, leader, 0).body == [PIECE, False]
    assert send_piece(cluster, leader, 0).body == [PIECE, False]
    assert send_all(cluster).body == [len(DUMPED), True]
    assert cluster.state(leader) == STATE
    assert send_piece(cluster, leader, 0).body[1], "the state is there: it is not made anew"
    cluster.command("after")
    assert send_piece(cluster, leader, 2 * PIECE).body[1]
    assert cluster.state(leader) == [*STATE, "after"]


def test_a_duplicate_that_got_into_the_log_has_no_effect() -> None:
    cluster = waiting_cluster()
    leader = cluster.leader()
    first, second = Answer(), Answer()
    member = cluster.member(leader)

    def twice(shard: Any) -> None:
        member.propose_piece(0, DUMPED[:PIECE], first)
        member.restoring.asked_index = 0  # as after a change of leaders: nobody remembers that it was sent
        member.propose_piece(0, DUMPED[:PIECE], second)

    cluster.turn(leader, twice)
    cluster.run_for(1)
    assert (first.body, second.body) == ([PIECE, False], [PIECE, False])
    assert {bytes(cluster.member(i).restoring.received) for i in cluster.shards} == {DUMPED[:PIECE]}


def test_another_leader_goes_on_where_the_first_one_fell() -> None:
    cluster = waiting_cluster()
    leader = cluster.leader()
    send_piece(cluster, leader, 0)
    cluster.run_for(0.5)
    cluster.crash(leader)
    cluster.run_for(5)
    assert cluster.leader() not in (0, leader)
    assert send_all(cluster).body == [len(DUMPED), True]
    assert cluster.state(cluster.leader()) == STATE


def test_only_one_piece_is_under_way_at_a_time() -> None:
    cluster = waiting_cluster()
    leader = cluster.leader()
    for other in cluster.shards:
        if other != leader:
            cluster.cut((leader, other))
    answers = [Answer(), Answer()]
    member = cluster.member(leader)
    cluster.turn(leader, lambda shard: [member.propose_piece(0, DUMPED[:PIECE], answer) for answer in answers])
    assert [answer.code for answer in answers] == [None, codes.OVERLOADED]


def test_a_state_whose_crc_is_not_what_was_announced_is_dropped_and_can_be_sent_again() -> None:
    cluster = waiting_cluster()
    wrong = b"\0" + DUMPED[1:]
    answer = send_all(cluster, wrong)
    assert (answer.code, "CRC32" in answer.body) == (codes.REFUSED, True)
    cluster.run_for(1)
    assert {len(cluster.member(i).restoring.received) for i in cluster.shards} == {0}
    assert send_all(cluster).body == [len(DUMPED), True]


def test_a_state_that_the_machine_cannot_load_leaves_the_group_waiting_everywhere() -> None:
    cluster = waiting_cluster(b"\xc1" * 10)
    answer = send_all(cluster, b"\xc1" * 10)
    assert answer.code == codes.COMMAND_FAILED
    cluster.run_for(1)
    for instance in cluster.shards:
        assert cluster.member(instance).restoring is not None
        assert ask(cluster, instance, stale=True).code == codes.RESTORING


def test_an_empty_state_is_a_state() -> None:
    class Nothing:
        def load(self, data: bytes) -> list[Any]:
            assert data == b""
            return ["from nothing"]

    cluster = waiting_cluster(b"")
    for instance in cluster.shards:
        cluster.member(instance).machine.load = Nothing().load
    assert send_all(cluster, b"").body == [0, True]
    assert cluster.state(cluster.leader()) == ["from nothing"]


@pytest.mark.parametrize("complete", [False, True])
def test_a_snapshot_carries_how_far_it_has_come(complete: bool) -> None:
    cluster = waiting_cluster(log_entries_kept=1)
    leader = cluster.leader()
    late = next(instance for instance in cluster.shards if instance != leader)
    cluster.isolate(late)
    send_piece(cluster, leader, 0)
    if complete:
        send_all(cluster)
        for seq in range(1, 5):
            cluster.command(f"c{seq}", seq=seq)
    member = cluster.member(leader)
    member.log.compact_to(member.applied)
    cluster.heal()
    cluster.run_for(5)
    if complete:
        assert cluster.member(late).restoring is None
        assert cluster.state(late) == cluster.state(leader)
    else:
        assert bytes(cluster.member(late).restoring.received) == DUMPED[:PIECE]
        send_all(cluster)
        cluster.run_for(1)
        assert cluster.state(late) == STATE


def test_the_state_itself_is_given_to_this_process_alone() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    cluster.command("a")
    answer = Answer()
    cluster.turn(leader, lambda shard: shard.members[1].read(STATE_WANTED, answer))
    take_replies(cluster, answer)
    index, term, version, data = answer.body
    assert (index, term, version) == (cluster.member(leader).applied, cluster.member(leader).term, 1)
    assert msgpack.unpackb(data) == ["a"]
    same_bytes = bytes(bytearray(STATE_WANTED))
    answer = Answer()
    cluster.turn(leader, lambda shard: shard.query(1, same_bytes, answer))
    take_replies(cluster, answer)
    assert answer.code == codes.QUERY_FAILED, "what a client sends is a query, whatever its bytes are"

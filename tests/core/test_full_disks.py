"""All disks are full, or will be in a moment: no group loses its leader by a handing over that nobody has room for.

Each disk fills up at another moment, and members find out only when they write, which those of idle groups do not.
"""

from __future__ import annotations

import contextlib
import random

import pytest
from core.disks import DurableCluster, DurableLone
from core.harness import Answer, append

from raftfleet.core.change import ConfigChangeRefused
from raftfleet.core.codes import OK
from raftfleet.core.messages import TIMEOUT_NOW, VOTE, VOTE_ANSWER, TimeoutNow, Vote, VoteAnswer

UIDS = (1, 2, 3, 4)
NO_SPACE = 28


def no_room(number: int, name: str) -> int | None:
    """A plan for :class:`~raftfleet.testing.disk.FakeFiles`."""
    return NO_SPACE if name in ("pwrite", "fallocate") else None


def read(cluster: DurableCluster, uid: int) -> Answer:
    leader = cluster.leader(uid)
    assert leader, f"group {uid} has no leader"
    answer = cluster.query(leader, uid=uid)
    cluster.run_for(1)
    return answer


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("seed", range(12))
def test_while_all_disks_are_full_every_group_keeps_a_leader_that_answers_reads(seed: int, count: int) -> None:
    rng = random.Random(seed)
    cluster = DurableCluster(count, uids=UIDS)
    for uid in UIDS:
        cluster.settle(uid)
        cluster.command("kept", uid)
    cluster.run_for(1)
    left = list(cluster.files.values())
    rng.shuffle(left)
    for _ in range(30):
        while left and rng.random() < 0.4:
            left.pop().plan = no_room
        uid = rng.choice(UIDS)
        leader = cluster.leader(uid)
        if leader and rng.random() < 0.3:
            cluster.propose(leader, "more", uid)
        elif leader:
            with contextlib.suppress(ConfigChangeRefused):
                cluster.change("transfer", rng.randrange(1, count + 1), uid)
        cluster.run_for(rng.choice((0.01, 0.5, 2.0)))
    assert not left, "all disks are full"
    cluster.run_for(5)
    for uid in UIDS:
        assert read(cluster, uid).code == OK, f"group {uid}"
    for files in cluster.files.values():
        files.plan = lambda number, name: None
    cluster.run_for(5)
    for uid in UIDS:
        cluster.settle(uid)
        cluster.command("after", uid)
        state = cluster.state(cluster.leader(uid), uid)
        assert (state[0], state[-1]) == ("kept", "after")
        assert len({repr(cluster.state(i, uid)[: len(state) - 1]) for i in range(1, count + 1)}) == 1


def follow(lone: DurableLone) -> None:
    """In term 1 the leader is 2."""
    lone.receive(2, append(1, (0, 0), [1]))
    assert (lone.member.leader, lone.member.term) == (2, 1)


def test_a_target_without_room_asks_nobody_and_follows_on() -> None:
    lone = DurableLone()
    follow(lone)
    lone.fill()
    assert lone.receive(2, TimeoutNow(TIMEOUT_NOW, 1, lone.member.term)) == []
    assert (lone.member.leader, lone.member.vote, lone.shard.is_full) == (2, 2, True)
    lone.now_us += 60_000_000  # the leader waits no longer
    lone.free()
    asked = [m for _, m in lone.turn() if isinstance(m, Vote)]
    assert [m.pre for m in asked] == [True, True], "what was to be said is said, and is of no use any more"
    for peer in (2, 3):
        lone.receive(peer, VoteAnswer(VOTE_ANSWER, 1, lone.member.term + 1, True, True))
    assert (lone.member.leader, lone.member.role) == (2, "follower")


def test_a_voter_without_room_promises_no_vote_to_the_target_of_a_transfer() -> None:
    lone = DurableLone()
    follow(lone)
    request = Vote(VOTE, 1, lone.member.term + 1, True, lone.member.last_index, lone.member.log.last_term, True)
    assert [m.granted for m in lone.receive(3, request) if isinstance(m, VoteAnswer)] == [True]
    lone.fill()
    assert lone.receive(3, request) == []
    assert lone.member.leader == 2, "it follows its leader on"
    lone.free()
    assert [m.granted for _, m in lone.turn() if isinstance(m, VoteAnswer)] == [True]
    lone.power_cycle()
    assert (lone.member.term, lone.member.vote) == (1, 2), "what was written to see whether there is room"


def test_a_leadership_is_handed_over_where_there_is_room() -> None:
    cluster = DurableCluster()
    leader = cluster.settle()
    cluster.command("x")
    target = leader % 3 + 1
    cluster.change("transfer", target)
    cluster.run_for(0.2)
    assert cluster.leader() == target

"""What a user's code may do to a group: fail its own call, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from core.harness import Cluster

from raftfleet.core import failures
from raftfleet.core.codes import COMMAND_FAILED, QUERY_FAILED

FATAL = [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, RecursionError]


def break_machines(cluster: Cluster, method: str, broken: Any) -> None:
    for instance in cluster.shards:
        setattr(cluster.member(instance).machine, method, broken)


@pytest.mark.parametrize("exception", FATAL)
def test_a_command_that_ends_the_interpreter_fails_alone(exception: type[BaseException]) -> None:
    cluster = Cluster()
    leader = cluster.settle()
    cluster.command("first")
    whole = cluster.member(leader).machine.command

    def command(state: Any, arg: Any) -> Any:
        if arg == "fatal":
            raise exception("on purpose")
        return whole(state, arg)

    break_machines(cluster, "command", command)
    answer = cluster.propose(leader, "fatal", seq=2)
    cluster.run_for(1)
    assert (answer.code, answer.body) == (COMMAND_FAILED, [exception.__name__, "on purpose"])
    cluster.propose(leader, "second", seq=3)
    cluster.run_for(1)
    for instance in cluster.shards:
        assert cluster.state(instance) == ["first", "second"]


@pytest.mark.parametrize("exception", FATAL)
def test_a_query_that_ends_the_interpreter_fails_alone(exception: type[BaseException]) -> None:
    cluster = Cluster()
    leader = cluster.settle()

    def query(state: Any, arg: Any) -> Any:
        raise exception("on purpose")

    break_machines(cluster, "query", query)
    answer = cluster.query(leader)
    cluster.run_for(1)
    assert (answer.code, answer.body) == (QUERY_FAILED, [exception.__name__, "on purpose"])
    assert cluster.leader() == leader


def test_a_command_whose_result_is_too_large_changes_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "RESULT_BYTES_MAX", 1000)
    cluster = Cluster()
    leader = cluster.settle()
    break_machines(cluster, "command", lambda state, arg: (b"x" * arg, [*state, arg]))
    answers = [cluster.propose(leader, size, seq=seq) for seq, size in enumerate((900, 1100), start=1)]
    cluster.run_for(1)
    assert answers[0].value == b"x" * 900
    assert answers[1].code == COMMAND_FAILED
    assert answers[1].body[0] == "ResultTooLarge" and "at most 1000" in answers[1].body[1]
    for instance in cluster.shards:
        assert cluster.state(instance) == [900]


def test_a_query_whose_result_is_too_large_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "RESULT_BYTES_MAX", 1000)
    cluster = Cluster()
    leader = cluster.settle()
    break_machines(cluster, "query", lambda state, arg: b"x" * 1100)
    answer = cluster.query(leader)
    cluster.run_for(1)
    assert answer.code == QUERY_FAILED
    assert answer.body[0] == "ResultTooLarge"


def test_a_machine_that_cannot_start_on_one_shard_does_no_harm_to_it() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    cluster.add_shard(4)

    class Broken:
        def new(self) -> Any:
            raise SystemExit(3)

    shard = cluster.shards[4]
    recipe = shard.may_create(1)
    assert recipe is not None
    name, config, _, hook = recipe
    shard.may_create = lambda uid: (name, config, Broken(), hook)
    cluster.change("add_learner", 4)
    cluster.run_for(2)
    assert 1 not in shard.members
    assert cluster.happened("cannot_start")
    assert cluster.leader() == leader

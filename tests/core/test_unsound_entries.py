"""Entries that no leader of ours makes: refused or passed over, told, and never a reason to stop the worker."""

from __future__ import annotations

import msgpack
import pytest
from core.harness import Lone, append

from raftfleet.core.messages import COMMANDS, CONFIG, VERSION, AppendAnswer, Entry


def lone_with_two() -> Lone:
    lone = Lone()
    lone.receive(2, append(1, (0, 0), [1, 1], commit=2))
    return lone


@pytest.mark.parametrize("kind", [CONFIG, VERSION])
@pytest.mark.parametrize("data", [b"", b"\xc1", msgpack.packb("text"), msgpack.packb([1, 2])])
def test_an_entry_that_makes_no_sense_is_not_taken_and_not_acknowledged(kind: int, data: bytes) -> None:
    lone = lone_with_two()
    message = append(1, (2, 1), [1], commit=3)._replace(entries=[Entry(1, kind, data)])
    lone.shard.check_invariants = lambda: None  # type: ignore[method-assign]
    assert lone.receive(2, message) == []
    assert (lone.member.last_index, lone.member.commit) == (2, 2)
    assert "makes no sense" in lone.shard.violations[0]
    (answer,) = lone.receive(2, append(1, (2, 1), [1], commit=3))
    assert isinstance(answer, AppendAnswer) and answer.accepted, "the next one is taken"


@pytest.mark.parametrize("data", [b"", b"\xc1", msgpack.packb(5), msgpack.packb(["now", []]), msgpack.packb([5, b""])])
def test_a_batch_that_makes_no_sense_is_applied_as_nothing(data: bytes) -> None:
    lone = lone_with_two()
    lone.shard.check_invariants = lambda: None  # type: ignore[method-assign]
    message = append(1, (2, 1), [1], commit=3)._replace(entries=[Entry(1, COMMANDS, data)])
    lone.receive(2, message)
    assert (lone.member.applied, lone.member.state) == (3, [])
    assert "cannot be applied" in lone.shard.violations[0]


def test_commands_within_a_batch_that_make_no_sense_change_nothing() -> None:
    lone = lone_with_two()
    data = msgpack.packb([5, [b"", 7, None, b"\xc1", msgpack.packb([b"short", 1, 0, 0, b""])]])
    message = append(1, (2, 1), [1], commit=3)._replace(entries=[Entry(1, COMMANDS, data)])
    lone.receive(2, message)
    assert (lone.member.applied, lone.member.state) == (3, [])


def test_what_conflicts_with_the_committed_is_not_acknowledged() -> None:
    lone = lone_with_two()
    lone.shard.check_invariants = lambda: None  # type: ignore[method-assign]
    assert lone.receive(2, append(3, (0, 0), [3, 3, 3], stamp=2)) == []
    assert (lone.member.last_index, lone.member.log.term_at(2)) == (2, 1)
    assert "conflicts" in lone.shard.violations[0]

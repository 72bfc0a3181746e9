"""Each rule of founding by itself: one acceptor or candidate, and messages made by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftfleet.core.manager_messages import (
    ACCEPT,
    ACCEPTED,
    PONG,
    PREPARE,
    PROMISE,
    Accept,
    Accepted,
    FleetMemory,
    FoundingValue,
    NodeRecord,
    Ping,
    Pong,
    Prepare,
    Promise,
)
from raftfleet.fleet.founding import NO_BALLOT, Chosen, Founding, Memory, Persist, Send

PEERS = (("h", 1), ("h", 2), ("h", 3))
SECOND = 1_000_000


def record(port: int, instance: int | None = None, store: int | None = None, incarnation: int = 1) -> NodeRecord:
    return NodeRecord(f"n{port}", "z", "h", port, "", (instance or port * 10,), incarnation, store or port)


def founding(port: int = 1, memory: Memory | None = None, patience_us: int = 0) -> Founding:
    rng = random.Random(port)
    return Founding(("h", port), PEERS, memory or Memory(port), rng, port, patience_us=patience_us)


def value(*voters: NodeRecord, fleet: bytes = b"f" * 16) -> FoundingValue:
    return FoundingValue(fleet, (1, 9), voters)


def sent(candidate: Founding, kind: int) -> list[Any]:
    outputs = candidate.take_outputs()
    return [output.message for output in outputs if isinstance(output, Send) and output.message.kind == kind]


def prepare(candidate: Founding, now_us: int = 10 * SECOND) -> Prepare:
    candidate._next_attempt_us = 0
    candidate.tick(now_us, record(candidate.address[1]))
    return sent(candidate, PREPARE)[0]  # type: ignore[no-any-return]


def promise(
    asked: Prepare,
    sender: NodeRecord,
    accepted: FoundingValue | None = None,
    memory: FleetMemory | None = None,
    at: int = 1,
) -> Promise:
    ballot = (asked.round, asked.proposer)
    accepted_ballot = (at, 9) if accepted else NO_BALLOT
    values = (accepted,) if accepted else ()
    memories = (memory,) if memory else ()
    return Promise(PROMISE, sender, *ballot, True, ballot, accepted_ballot, values, memories)


def proposed(candidate: Founding, *promises: Promise, now_us: int = 10 * SECOND + 500_000) -> list[FoundingValue]:
    for message in promises:
        candidate.on_promise(now_us, message, record(1))
    return [accept.value for accept in sent(candidate, ACCEPT)][:1]


def test_a_promise_and_an_acceptance_are_persisted_before_they_are_said() -> None:
    acceptor = founding(2)
    asked = prepare(founding(1))
    acceptor.on_prepare(0, asked, record(2))
    first, second = acceptor.take_outputs()
    assert isinstance(first, Persist) and isinstance(second, Send) and second.message.granted
    accept = Accept(ACCEPT, record(1), asked.round, asked.proposer, asked.peers, value(record(1)))
    acceptor.on_accept(0, accept, record(2))
    first, second = acceptor.take_outputs()
    assert isinstance(first, Persist) and isinstance(second, Send) and second.message.accepted
    assert Memory.unpack(first.data) == acceptor.memory and acceptor.memory.accepted == value(record(1))


def test_nothing_below_the_promise_is_accepted() -> None:
    acceptor = founding(2, Memory(2, promised=(5, 5)))
    acceptor.on_accept(0, Accept(ACCEPT, record(1), 5, 4, acceptor._digest, value(record(1))), record(2))
    (output,) = acceptor.take_outputs()
    assert isinstance(output, Send) and not output.message.accepted and acceptor.memory.accepted is None


def test_one_candidate_at_a_time_has_the_grant_and_for_a_bounded_time() -> None:
    acceptor = founding(2)
    digest = acceptor._digest
    for now_us, proposer, ballot, granted in [
        (0, 1, 1, True),
        (1, 3, 2, False),
        (2, 1, 3, True),
        (2 * SECOND, 3, 4, True),
    ]:
        acceptor.on_prepare(now_us, Prepare(PREPARE, record(proposer), ballot, proposer, digest), record(2))
        answer = acceptor.take_outputs()[-1]
        assert isinstance(answer, Send) and answer.message.granted is granted


def test_those_who_have_another_list_of_peers_do_not_vote_together() -> None:
    acceptor = founding(2)
    acceptor.on_prepare(0, Prepare(PREPARE, record(1), 1, 1, acceptor._digest ^ 1), record(2))
    assert acceptor.take_outputs() == [] and "another list of --peers" in acceptor.status


def test_no_new_fleet_is_proposed_while_a_peer_is_silent_that_may_still_answer() -> None:
    """Two of three that lost their memories would found a second fleet, and the third is in the first."""
    candidate = founding(patience_us=3 * SECOND)
    asked = prepare(candidate)
    assert proposed(candidate, promise(asked, record(1)), promise(asked, record(2))) == []
    candidate.tick(11 * SECOND + 900_000, record(1))
    assert sent(candidate, ACCEPT) == []
    candidate.tick(12 * SECOND + 100_000, record(1))  # that round is over; patience is counted from its beginning
    asked = prepare(candidate, 13 * SECOND)
    (chosen,) = proposed(candidate, promise(asked, record(1)), promise(asked, record(2)), now_us=13 * SECOND + 500_000)
    assert [voter.port for voter in chosen.voters] == [1, 2]


def test_patience_is_not_needed_where_all_answer_or_a_value_was_accepted_before() -> None:
    candidate = founding(patience_us=3 * SECOND)
    asked = prepare(candidate)
    assert proposed(candidate, *(promise(asked, record(port)) for port in (1, 2, 3)))
    candidate = founding(patience_us=3 * SECOND)
    asked = prepare(candidate)
    old = value(record(1), record(2))
    assert proposed(candidate, promise(asked, record(1), old), promise(asked, record(2))) == [old]


def test_a_majority_of_promises_is_needed() -> None:
    candidate = founding()
    asked = prepare(candidate)
    assert proposed(candidate, promise(asked, record(1))) == []
    (chosen,) = proposed(candidate, promise(asked, record(2)))
    assert [voter.name for voter in chosen.voters] == ["n1", "n2"]


def test_only_a_majority_of_acceptances_chooses() -> None:
    candidate = founding()
    asked = prepare(candidate)
    proposed(candidate, promise(asked, record(1)), promise(asked, record(2)))
    ballot = (asked.round, asked.proposer)
    for sender, good in [(1, True), (1, True), (3, False)]:
        candidate.on_accepted(0, Accepted(ACCEPTED, record(sender), *ballot, good, ballot))
        assert candidate.take_outputs() == []
    candidate.on_accepted(0, Accepted(ACCEPTED, record(2), *ballot, True, ballot))
    (output,) = candidate.take_outputs()
    assert isinstance(output, Chosen)


def test_a_value_that_was_accepted_is_proposed_again() -> None:
    candidate = founding()
    asked = prepare(candidate)
    old, older = value(record(1), record(2)), value(record(1), record(2), fleet=b"g" * 16)
    promises = [promise(asked, record(1), older, at=1), promise(asked, record(2), old, at=2)]
    assert proposed(candidate, *promises) == [old]


def test_a_value_whose_voters_died_before_they_entered_is_void() -> None:
    candidate = founding()
    asked = prepare(candidate)
    stillborn = value(record(1), record(2))
    reborn = record(2, instance=99)
    (new,) = proposed(candidate, promise(asked, record(1), stillborn), promise(asked, reborn, stillborn))
    assert new.fleet != stillborn.fleet and reborn in new.voters


def test_the_word_of_a_node_that_lost_its_file_voids_nothing() -> None:
    candidate = founding()
    asked = prepare(candidate)
    old = value(record(1), record(2))
    assert proposed(candidate, promise(asked, record(1), old), promise(asked, record(2, 99, store=77))) == []


def test_a_value_that_someone_entered_is_void_only_when_all_its_nodes_are_out_at_one_moment() -> None:
    candidate = founding()
    asked = prepare(candidate)
    old = value(record(1), record(2))
    memory = FleetMemory(old.fleet, (("n1", "h", 1), ("n2", "h", 2), ("guest", "h", 50)))
    ours, theirs = record(1, 91), record(2, 92)
    first, second = promise(asked, ours, old, memory), promise(asked, theirs, old, memory)
    candidate.on_promise(10 * SECOND + 500_000, first, record(1))
    candidate.on_promise(10 * SECOND + 500_000, second, record(1))
    (survey,) = candidate.take_outputs()
    assert isinstance(survey, Send) and isinstance(survey.message, Ping) and survey.address == ("h", 50)

    def pong(seq: int, sender: NodeRecord) -> list[Any]:
        candidate.on_pong(10 * SECOND + 600_000, Pong(PONG, seq, sender, b"", (), ()), record(1))
        return candidate.take_outputs()

    confirm = pong(survey.message.seq, record(50, 5))
    assert {output.address for output in confirm} == {("h", 1), ("h", 2), ("h", 50)}
    seq = confirm[0].message.seq
    assert pong(seq, ours) == [] and pong(seq, theirs) == []
    assert pong(seq, record(50, 5, incarnation=2)) == [], "it was in some fleet in between"
    assert pong(seq, record(50, 5)) != [], "now all were out at one moment"


def test_an_operators_word_stands_in_for_a_node_that_cannot_answer() -> None:
    candidate = founding()
    candidate.declared_dead.add(("h", 50))
    asked = prepare(candidate)
    memory = FleetMemory(b"f" * 16, (("guest", "h", 50),))
    (new,) = proposed(candidate, promise(asked, record(1), None, memory), promise(asked, record(2)))
    assert len(new.voters) == 2


@given(st.integers(1, 2**62), st.tuples(st.integers(0, 2**62), st.integers(0, 2**62)), st.booleans(), st.booleans())
def test_the_memory_survives_its_file(store: int, promised: tuple[int, int], accepted: bool, entered: bool) -> None:
    memory = Memory(
        store,
        promised,
        (1, 2) if accepted else NO_BALLOT,
        value(record(1), record(2)) if accepted else None,
        FleetMemory(b"f" * 16, (("n1", "h", 1),)) if entered else None,
    )
    assert Memory.unpack(memory.pack()) == memory


@given(st.binary(max_size=60))
def test_a_damaged_memory_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        Memory.unpack(data)

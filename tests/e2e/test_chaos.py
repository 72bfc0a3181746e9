"""Real nodes, each in a network namespace of its own: links go down, processes stop and die, clients keep a history.

``RAFTFLEET_TEST_CHAOS_SECONDS`` (default 10) says how long faults go on in each test, ``RAFTFLEET_TEST_CHAOS_SEED``
which are drawn; ``tox -e chaos`` plays ten minutes of each. Processes are not the seed's to command: the same faults
come in the same order, at about the same moments.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

import pytest
from e2e.chaos import SETTLE_DEADLINE_S, Chaos, Clients, Event, judge
from e2e.conftest import APPS

import raftfleet
from raftfleet.testing import namespaces
from raftfleet.testing.model import Violation
from raftfleet.testing.namespaces import NamespaceFleet

SECONDS = float(os.environ.get("RAFTFLEET_TEST_CHAOS_SECONDS", "10"))
SEED = int(os.environ.get("RAFTFLEET_TEST_CHAOS_SEED", "1"))
NODES = {"n1": "z1", "n2": "z2", "n3": "z3", "n4": "z1", "n5": "z2"}
GROUPS = ["red", "green", "blue"]
REGISTERS = raftfleet.GroupConfig("registers:Registers", divergence_check_entries=50, log_entries_kept=100)


@pytest.fixture(scope="module")
def allowed() -> None:
    reason = namespaces.why_no_namespaces()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def no_namespace_is_left(allowed: None) -> Iterator[None]:
    before = namespaces.namespaces()
    yield
    assert namespaces.namespaces() == before


@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("durable", [False, True], ids=["in memory", "durable"])
def test_promises_are_kept_while_links_go_down_and_processes_stop_and_die(
    durable: bool, no_namespace_is_left: None
) -> None:
    with NamespaceFleet(app_dirs=[APPS], durable=durable) as fleet:
        fleet.start_nodes(NODES, deadline_s=60.0)
        client = fleet.connect("n1")
        for name in GROUPS:
            client.add_consensus_group(name, 3, REGISTERS, timeout=30.0)
        clients = Clients(fleet, GROUPS, 6, SEED)
        chaos = Chaos(fleet, random.Random(SEED), durable=durable)
        try:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end and not clients.strange:
                chaos.step()
                time.sleep(chaos.rng.uniform(0.2, 1.2))
            chaos.end()
            fleet.wait_settled(deadline_s=SETTLE_DEADLINE_S)
            served = clients.answered_count()
            fleet.wait_until(lambda: clients.answered_count() > served, 60.0, "clients to be served again")
        finally:
            clients.finish()
            print("\n".join([f"seed {SEED}, faults {chaos.counts}:", *chaos.story]))
        assert not clients.strange
        acknowledged = 0
        for name in GROUPS:
            answer = fleet.wait_until(
                lambda name=name: fleet.connect("n1").query(name, ["journal"], retry=5),  # type: ignore[misc]
                60.0,
                f"{name} to be read",
            )
            acknowledged += judge(clients.events, name, answer[2]).acknowledged_count()
        assert acknowledged > 0
        outcomes = [event.outcome for event in clients.events]
        print({outcome: outcomes.count(outcome) for outcome in set(outcomes)}, "acknowledged", acknowledged)
        assert not any(worker["divergences"] for name in NODES for worker in fleet.status(name)["workers"])


# -- the judge can condemn ------------------------------------------------------------------------------------------


def told(operation: int, arg: list[object], at: int, answer: list[object] | None, outcome: str = "ok") -> Event:
    return Event("red", operation, arg, at, at + 5, outcome, answer or [])


def chain_after(*args: list[object]) -> list[list[object]]:
    """Answers of a machine alone in the world."""
    from raftfleet.testing.model import GroupRecord, RegistersMachine

    machine = RegistersMachine(GroupRecord(1))
    state = machine.new()
    answers = []
    for arg in args:
        answer, state = machine.command(state, arg)
        answers.append(answer)
    return answers


ADD, SET = [1, "add", 0, 5], [2, "set", 0, 7]


def test_a_right_history_is_acquitted() -> None:
    first, second = chain_after(ADD, SET)
    events = [told(1, ADD, 0, first), told(2, SET, 10, second), told(3, ["get", 0], 20, [*second[:2], 7])]
    assert judge(events, "red", [1, 2]).acknowledged_count() == 2


@pytest.mark.parametrize(
    ("journal", "outcome", "read", "words"),
    [
        ([2], "ok", 7, "never was"),
        ([1, 2, 1], "ok", 7, "exactly-once"),
        ([1, 2], "refused", 7, "was refused as not applied, and took effect"),
        ([1, 2], "ok", 5, "not linearizable"),
        ([1, 2, 9], "ok", 7, "no client asked for it"),
    ],
)
def test_a_wrong_history_is_condemned(journal: list[int], outcome: str, read: int, words: str) -> None:
    first, second = chain_after(ADD, SET)
    events = [told(1, ADD, 0, first, outcome), told(2, SET, 10, second), told(3, ["get", 0], 20, [*second[:2], read])]
    with pytest.raises((Violation, AssertionError), match=words):
        judge(events, "red", journal)


def test_a_stale_read_is_condemned() -> None:
    first, second = chain_after(ADD, SET)
    events = [told(1, ADD, 0, first), told(2, SET, 10, second), told(3, ["get", 0], 20, [*first[:2], 5])]
    with pytest.raises(Violation, match="stale read"):
        judge(events, "red", [1, 2])

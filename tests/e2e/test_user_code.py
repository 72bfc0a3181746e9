"""State machines that raise, return what cannot be sent, or take long: only the affected call notices."""

from __future__ import annotations

import threading

import pytest
from e2e.load import JUST_AN_INT, Load

import raftfleet
from raftfleet import errors
from raftfleet.core.names import shard_of
from raftfleet.testing import LocalFleet

WORKERS = 2


@pytest.fixture
def awkward(fleet: LocalFleet) -> LocalFleet:
    """Three nodes of two workers; ``awkward`` on all of them, at 1 after one increment."""
    fleet.start_nodes({"n1": "z1", "n2": "z2", "n3": "z3"}, workers=WORKERS)
    client = fleet.connect("n1")
    client.add_consensus_group("awkward", 3, raftfleet.GroupConfig("awkward:Awkward"))
    assert client.command("awkward", "inc") == 0
    return fleet


@pytest.mark.parametrize(
    ("arg", "exception_type"), [("raise", "ZeroDivisionError"), ("unpackable", "TypeError"), ("no pair", "TypeError")]
)
def test_a_command_that_fails_changes_nothing_and_says_why(awkward: LocalFleet, arg: str, exception_type: str) -> None:
    client = awkward.connect("n2")
    with pytest.raises(errors.CommandFailed) as raised:
        client.command("awkward", arg)
    assert raised.value.exception_type == exception_type
    assert client.query("awkward", "get") == 1
    for name in ("n1", "n2", "n3"):
        assert awkward.connect(name).command("awkward", "inc") >= 1
    assert all(worker["restarts"] == 0 for worker in awkward.status("n1")["workers"])


@pytest.mark.parametrize("arg", ["raise", "unpackable"])
def test_a_query_that_fails_says_why(awkward: LocalFleet, arg: str) -> None:
    with pytest.raises(errors.QueryFailed):
        awkward.connect("n3").query("awkward", arg)
    assert awkward.connect("n3").query("awkward", "get") == 1


def test_a_command_of_two_seconds_stops_only_its_own_shard_and_is_warned_of(awkward: LocalFleet) -> None:
    """Every member applies it, so on each node one worker is away for two seconds; the other one must not notice."""
    slow_shard = shard_of("awkward", WORKERS)
    names = [name for name in (f"other{number}" for number in range(20)) if shard_of(name, WORKERS) != slow_shard]
    client = awkward.connect("n1")
    for name in names:
        client.add_consensus_group(name, 3, JUST_AN_INT)
    awkward.wait_settled()
    answers: list[object] = []
    slow = threading.Thread(
        target=lambda: answers.append(client.command("awkward", ["sleep", 2.0], timeout=10.0, retry=5))
    )
    terms = {name: group["term"] for name, group in awkward.groups().items() if name in names}
    with Load(awkward, names, via=["n2", "n3"], pause_s_max=0.02) as load:
        load.await_progress()
        slow.start()
        rounds = 0
        while slow.is_alive():
            load.await_progress(1)
            rounds += 1
        slow.join(30.0)
    load.check()
    assert rounds > 3, "groups of the other shard waited for the slow command"
    assert answers == ["slept"]
    assert client.query("awkward", "get", retry=10) == 1
    assert {name: group["term"] for name, group in awkward.groups().items() if name in names} == terms, "elections"
    warned = [line for line in awkward.nodes["n1"].log().splitlines() if "awkward" in line and "warn" in line.lower()]
    assert warned, "the log does not name the slow group"

"""``check_under_faults`` passes what is right under faults, tells what is wrong, and repeats it from the seed."""

from __future__ import annotations

import random
from typing import Any

import pytest
from testing import machines_to_check as machines

from raftfleet.core.config import GroupConfig
from raftfleet.testing import FaultReport, FaultsNotSurvived, check_under_faults, seeds
from raftfleet.testing.machines import KeyValue

WORDS = ["a", "b", "c", "delta", 7, "roll", "clear"]


def refusal(machine: Any, commands: Any = ("a", "b", "c", "clear"), **options: Any) -> str:
    options = {"seeds": range(1, 6), "queries": ["all"], **options}
    with pytest.raises(FaultsNotSurvived) as caught:
        check_under_faults(machine, commands, **options)
    return str(caught.value)


def some_command(rng: random.Random) -> Any:
    key = rng.choice("ab")
    return rng.choice([["add", key, rng.randrange(10)], ["put", key, rng.randrange(100)], ["delete", key], "nonsense"])


def test_a_right_machine_passes_and_every_kind_of_fault_was_there() -> None:
    report = check_under_faults(KeyValue, some_command, queries=[["get", "a"], ["get", "b"]], seeds=range(1, 9))
    assert report.seeds == 8
    assert {"cut", "one-way cut", "lossy network", "worker killed", "node killed", "node led out"} == set(report.faults)
    assert report.outcomes["ok"] > 500
    assert report.outcomes["raised"] > 50
    assert report.snapshots > 0
    assert "8 seeds, " in str(report)


def test_a_machine_that_takes_time_and_dice_from_its_context_passes() -> None:
    check_under_faults(machines.Tags, WORDS, queries=["all"], seeds=range(1, 4))


def test_lease_reads_are_checked_with_a_config_that_asks_for_them() -> None:
    config = GroupConfig("any:Machine", clock_drift_margin=0.1, log_entries_kept=8)
    check_under_faults(KeyValue, some_command, queries=[["get", "a"]], seeds=range(1, 3), config=config)


@pytest.mark.parametrize("machine", [machines.Clock, machines.Dice, machines.Uuids, machines.InItself])
def test_replicas_that_differ_are_told_with_the_command_and_the_seed(machine: Any) -> None:
    told = refusal(machine)
    assert "with seed 1: two replicas differ after the command" in told
    assert "seeds=[1]" in told


def test_a_command_that_raises_half_way_through_its_change_is_told() -> None:
    assert "after it had changed its state" in refusal(machines.HalfDone)


def test_a_query_that_changes_the_state_is_told() -> None:
    assert "a query reads only" in refusal(machines.ChangesByQuery)


def test_a_snapshot_that_loses_the_state_is_told() -> None:
    assert "differ" in refusal(machines.Forgetful, ["a", "b", "c", "d"])


def test_a_digest_that_depends_on_more_than_the_state_is_told() -> None:
    assert "does the machine's digest(state) depend on anything" in refusal(machines.WrongDigest)


def test_answers_from_an_old_state_are_not_linearizable() -> None:
    told = refusal(machines.Memory)
    assert "the answers fit no order of the calls" in told
    assert "query 'all' -> " in told or "query 'all'" in told


def test_a_failure_is_repeated_by_its_seed_to_the_microsecond() -> None:
    first = refusal(machines.Memory, seeds=[3])
    assert refusal(machines.Memory, seeds=[3]) == first


def test_the_seed_that_was_asked_for_is_the_only_one_played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "only_seed", 4)
    assert "with seed 4" in refusal(machines.Memory, seeds=range(1, 3))


def test_no_commands_are_refused() -> None:
    with pytest.raises(ValueError, match="no command"):
        check_under_faults(KeyValue, [], seeds=[1])


def test_a_report_of_nothing_is_readable() -> None:
    assert str(FaultReport()).startswith("0 seeds")

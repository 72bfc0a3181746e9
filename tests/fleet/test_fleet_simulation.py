"""Whole fleets from seeds: every promise kept, every group back in its place; and the checks can fail."""

from __future__ import annotations

import pytest

from raftfleet.testing.fleet_simulation import FleetSimulation, SimulationFailure
from raftfleet.testing.mutants import MUTANTS, play

QUICK = ("removed-before-replaced", "silent-voter-removed", "steps-while-one-is-under-way")


@pytest.mark.simulation
@pytest.mark.parametrize("first", range(1, 201, 25))
def test_a_fleet_keeps_its_promises_while_workers_die_and_nodes_come_and_go(first: int) -> None:
    for seed in range(first, first + 25):
        counts = FleetSimulation(seed).run()
        assert counts["ok"] > 50, (seed, counts)


def test_the_same_seed_gives_the_same_run() -> None:
    runs = [FleetSimulation(3) for _ in range(2)]
    assert runs[0].run() == runs[1].run()
    assert runs[0].fleet.queue.event_count == runs[1].fleet.queue.event_count


@pytest.mark.parametrize("name", QUICK)
def test_a_broken_rule_of_reconciling_is_noticed(name: str) -> None:
    verdict = play(name, 20)
    assert verdict.noticed_by, f"{name} survived twenty fleets: {MUTANTS[name].text}"


def test_a_failure_says_its_seed_and_where_everything_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FleetSimulation, "_finish", lambda self: 1 / 0)
    with pytest.raises(SimulationFailure, match="seed 4 of a simulated fleet") as failure:
        FleetSimulation(4).run()
    assert "ZeroDivisionError" in failure.value.told
    assert "instance" in str(failure.value)

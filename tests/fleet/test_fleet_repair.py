"""Lost majorities in whole simulated fleets: what an operator brings back, and that a wrong repair would be noticed."""

from __future__ import annotations

import pytest

from raftfleet.testing.fleet_repair import FleetRepair
from raftfleet.testing.mutation import Change, broken
from raftfleet.testing.simulation import SimulationFailure


@pytest.mark.simulation
@pytest.mark.parametrize("first", range(1, 49, 12))
def test_a_repaired_fleet_has_all_that_its_survivors_had_and_serves_again(first: int) -> None:
    repaired = 0
    for seed in range(first, first + 12):
        counts = FleetRepair(seed).run()
        assert counts["acknowledged"] > 50, (seed, counts)
        repaired += counts.get("groups repaired", 0)
    assert repaired > 5


def test_the_same_seed_repairs_the_same_groups_in_the_same_steps() -> None:
    runs = [FleetRepair(13) for _ in range(2)]
    assert runs[0].run() == runs[1].run()
    assert runs[0].repaired == runs[1].repaired
    assert runs[0].fleet.queue.event_count == runs[1].fleet.queue.event_count


def test_a_node_that_was_given_up_and_lives_is_not_brought_in_before_the_fleets_log_has_it() -> None:
    """Its members hold what their groups have gone on without."""
    FleetRepair(51).run()
    change = Change("raftfleet.fleet.reconcile:_add_missing", "and instance not in given_up", "")
    with broken((change,)), pytest.raises(SimulationFailure, match="a committed entry conflicts"):
        FleetRepair(51).run()


@pytest.mark.parametrize(
    ("old", "new", "seeds"),
    [
        ("best = max(survivors", "best = min(survivors", range(10, 20)),
        (">> EPOCH_SHIFT) + 1", ">> EPOCH_SHIFT)", range(1, 5)),
    ],
    ids=("not-the-most-complete", "same-epoch"),
)
def test_a_broken_rule_of_repairs_is_noticed(old: str, new: str, seeds: range) -> None:
    def play() -> None:
        for seed in seeds:
            FleetRepair(seed).run()

    change = Change("raftfleet.core.repair:_finish_recovery", old, new)
    with broken((change,)), pytest.raises(SimulationFailure):
        play()

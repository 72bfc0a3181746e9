"""Whole fleets with disks under storms of faults: every promise kept, every group back in its place, from a seed."""

from __future__ import annotations

import pytest

from raftfleet.testing import simulate
from raftfleet.testing.fleet import REGISTERS, SimFleet, SimFleetOptions
from raftfleet.testing.fleet_profiles import FLEET_PROFILES, draw_fleet_schedule, fleet_options_of
from raftfleet.testing.fleet_storm import FleetStorm, SimulationFailure
from raftfleet.testing.shrink import shrink, transcript
from raftfleet.testing.simulation import Simulation
from raftfleet.testing.worlds import FLEETS, SHARDS, new_world

KEPT = {
    69: "a member whose name another worker owns was given up and begun anew: worker 0 had not read of its group yet",
    115: "the same, with more workers than before",
}
"""Seeds that found a fault of the product."""


@pytest.mark.simulation
@pytest.mark.parametrize("first", range(1, 17, 4))
def test_a_fleet_keeps_its_promises_through_crashes_lost_disks_resharding_and_all_else(first: int) -> None:
    for seed in range(first, first + 4):
        assert FleetStorm(seed).run().counts["acknowledged"] > 10, seed


@pytest.mark.simulation
@pytest.mark.parametrize("seed", KEPT)
def test_a_kept_seed_passes(seed: int) -> None:
    assert FleetStorm(seed).run().counts["acknowledged"] > 10


def test_every_profile_strikes_with_what_it_says() -> None:
    for profile in FLEET_PROFILES.values():
        kinds = {fault.kind for seed in range(30) for fault in draw_fleet_schedule(seed, profile)}
        for kind in kinds:
            assert callable(getattr(FleetStorm, f"_fault_{kind}")), kind
        assert {"node_crash", "reshard", "disk_lost", "transfer", "add", "remove", "join"} <= kinds
    assert {fleet_options_of(seed).name for seed in range(200)} == set(FLEET_PROFILES)


@pytest.mark.simulation
def test_the_same_seed_ends_in_the_same_state() -> None:
    runs = [FleetStorm(5).run() for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.simulation
def test_a_failure_tells_its_seed_its_state_and_the_command_that_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FleetStorm, "_finish", lambda self: 1 / 0)
    failures = []
    for _ in range(2):
        with pytest.raises(SimulationFailure, match=r"simulate --seed 4( --world fleets)? --shrink") as failure:
            FleetStorm(4).run()
        failures.append(failure.value)
    assert f"state {failures[0].state:012x}" in str(failures[0])
    assert (failures[0].step_count, failures[0].state) == (failures[1].step_count, failures[1].state)


@pytest.mark.simulation
def test_a_failing_fleet_is_cut_to_the_faults_that_matter_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that is removed is what "fails" here: it takes the fault that removes it, and nothing else."""
    monkeypatch.setattr(FleetStorm, "_finish", _no_group_was_removed)
    seed = 40
    schedule = draw_fleet_schedule(seed, fleet_options_of(seed))
    first = next(fault for fault in schedule if fault.kind == "remove")
    shrunk = shrink(seed, world=FLEETS)
    assert [fault.number for fault in shrunk.schedule] == [first.number]
    assert shrunk.is_minimal
    told = transcript(shrunk)
    assert f"--faults {first.number}\n" in told and "group removed" in told and "Append(" in told
    assert simulate.main(["--seed", str(seed), "--world", FLEETS, "--faults", str(first.number)]) == 1
    assert simulate.main(["--seed", str(seed), "--world", FLEETS, "--faults", "none"]) == 0


def _no_group_was_removed(storm: FleetStorm) -> None:
    assert not storm.fleet.counts.get("group removed"), "a group was removed"


@pytest.mark.simulation
def test_plain_seeds_play_shards_or_fleets_and_end_with_what_was_played(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {type(new_world(seed)) for seed in range(1, 60)}
    assert kinds == {Simulation, FleetStorm}
    assert isinstance(new_world(1, world=FLEETS), FleetStorm)
    assert isinstance(new_world(1, FLEET_PROFILES["fleet"]), FleetStorm)
    assert isinstance(new_world(1, world=SHARDS), Simulation)
    assert simulate.main(["--seeds", "1-2", "--world", FLEETS, "--processes", "1"]) == 0
    out = capsys.readouterr().out
    for what in ("elections", "membership changes", "crashes", "commands", "reads"):
        assert int(out.split(f" {what} in all")[0].split()[-1]) > 0, what
    assert "virtual hours per real one" in out


def test_a_fleet_on_disks_comes_back_when_the_power_fails_everywhere() -> None:
    fleet = SimFleet(1, SimFleetOptions(is_durable=True))
    fleet.start({"n1": "z1", "n2": "z2", "n3": "z3"})
    uid = fleet.add_group("group", 3, REGISTERS)
    before = [worker.instance for worker in fleet.live_workers()]
    fleet.client("n1").result(fleet.client("n1").command("group", [1, "add", 0, 5]))
    for name in fleet.nodes:
        fleet.kill_node(name, keep=0.0)
    assert fleet.live_workers() == []
    for name in fleet.nodes:
        fleet.restart_node(name)
    fleet.wait_settled()
    assert [worker.instance for worker in fleet.live_workers()] == before
    fleet.run_until(
        lambda: [list(member.state.seen) for _, member in fleet.members_of(uid)] == [[1]] * 3, "what was acknowledged"
    )


def test_a_node_that_is_resharded_keeps_its_instances_and_gives_up_the_surplus_ones_when_they_are_empty() -> None:
    fleet = SimFleet(2, SimFleetOptions(workers=1, is_durable=True))
    fleet.start({"n1": "z1", "n2": "z2", "n3": "z3"})
    for number in range(4):
        fleet.add_group(f"group{number}", 3, REGISTERS)
    node = fleet.nodes["n2"]
    (first,) = node.instances
    for workers in (3, 2, 1):
        fleet.kill_node("n2")
        fleet.restart_node("n2", workers)
        fleet.wait_settled()
        fleet.run_until(lambda wanted=workers: len(node.workers) == wanted, "the surplus workers are gone")
        assert node.instances[0] == first
        assert fleet.any_state().nodes["n2"].workers == workers  # type: ignore[union-attr]

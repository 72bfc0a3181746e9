"""What a seed may play: bare shards, or a whole fleet. For those who play many seeds, repeat one, or cut one short.

This module plays nothing. Both worlds are made of a seed, options and a schedule of faults, and end with a summary or a
:class:`~raftfleet.testing.simulation.SimulationFailure`.
"""

from __future__ import annotations

from collections.abc import Sequence

from raftfleet.testing.fleet_profiles import FleetOptions, is_fleet_seed
from raftfleet.testing.fleet_storm import FleetStorm
from raftfleet.testing.profiles import SimulationOptions
from raftfleet.testing.schedule import Fault
from raftfleet.testing.simulation import Simulation

SHARDS, FLEETS = WORLDS = ("shards", "fleets")

Options = SimulationOptions | FleetOptions


def new_world(
    seed: int, options: Options | None = None, schedule: Sequence[Fault] | None = None, world: str = ""
) -> Simulation | FleetStorm:
    """What is to be played.

    Args:
        options: of a profile; they say which world it is. None: as the seed draws them.
        schedule: the faults; None: as the seed draws them.
        world: one of WORLDS, where there are no options; empty: as the seed draws it.
    """
    if isinstance(options, FleetOptions):
        return FleetStorm(seed, options, schedule)
    if options is None and (world == FLEETS or (not world and is_fleet_seed(seed))):
        return FleetStorm(seed, None, schedule)
    return Simulation(seed, options, schedule)

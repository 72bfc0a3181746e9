"""How rough the life of a whole simulated fleet is: rates of faults, named kinds of trouble, and what goes wrong when.

This module plays nothing; :mod:`raftfleet.testing.fleet_storm` does. It is to whole fleets what
:mod:`raftfleet.testing.profiles` and :mod:`raftfleet.testing.schedule` are to bare shards.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from raftfleet.testing.clock import SECOND_US
from raftfleet.testing.schedule import Fault

FLEET_SHARE = 0.15
"""Of the seeds that a person plays without naming a profile: a fleet takes several times as long as bare shards."""


@dataclass(frozen=True)
class FleetOptions:
    """How long and how rough. Rates are events per virtual second, of the whole fleet.

    Attributes:
        name: of the profile, for the command that repeats a failure; empty if it is none.
        fault_us: length of the time with faults.
        is_durable: workers have disks, and come back from a crash with what was saved.
        drift: how far apart the rates of two clocks may be.
        drift_margin: what groups with leases are told of it; None: no leases.
        worker_kill_rate, node_crash_rate, crash_all_rate: a process is killed; a machine, or all, lose their power.
        disk_lost_rate, node_lost_rate: one worker's disk, or all of a node, are another, empty one afterwards.
        disk_error_rate, disk_full_rate: a call to a disk fails, or is the last before the power goes; no room.
        reshard_rate: a node starts again with another number of workers (durable only).
        join_rate: a node comes, or leaves. add_rate, remove_rate: of groups.
    """

    name: str = ""
    fault_us: int = 30 * SECOND_US
    is_durable: bool = True
    drift: float = 0.09
    drift_margin: float | None = 0.1
    frames_rate: float = 0.1
    cut_rate: float = 0.1
    slow_rate: float = 0.04
    worker_kill_rate: float = 0.08
    node_crash_rate: float = 0.05
    crash_all_rate: float = 0.01
    disk_lost_rate: float = 0.03
    node_lost_rate: float = 0.02
    disk_error_rate: float = 0.05
    disk_full_rate: float = 0.03
    pause_rate: float = 0.06
    clock_rate: float = 0.03
    transfer_rate: float = 0.05
    reshard_rate: float = 0.04
    join_rate: float = 0.04
    add_rate: float = 0.05
    remove_rate: float = 0.03


_PLAIN = FleetOptions()
_ALL = (
    dataclasses.replace(_PLAIN, name="fleet"),
    dataclasses.replace(_PLAIN, name="fleet in memory", is_durable=False),
    dataclasses.replace(
        _PLAIN,
        name="fleet of failing disks",
        node_crash_rate=0.2,
        crash_all_rate=0.06,
        disk_error_rate=0.2,
        disk_full_rate=0.15,
        disk_lost_rate=0.06,
    ),
    dataclasses.replace(_PLAIN, name="fleet re-sharding", reshard_rate=0.25, node_crash_rate=0.1, cut_rate=0.05),
    dataclasses.replace(
        _PLAIN, name="fleet of passing groups", add_rate=0.4, remove_rate=0.3, node_crash_rate=0.15, join_rate=0.08
    ),
    dataclasses.replace(_PLAIN, name="fleet of wild clocks", drift=1.0, drift_margin=None, clock_rate=0.2),
)
FLEET_PROFILES: dict[str, FleetOptions] = {profile.name: profile for profile in _ALL}
"""Kinds of trouble of whole fleets. ``fleet`` has a little of each."""

_DRAWN = ("fleet",) * 2 + tuple(FLEET_PROFILES)


def fleet_options_of(seed: int) -> FleetOptions:
    """What ``FleetStorm(seed)`` plays: one profile, for half of its time to all of it."""
    rng = random.Random((seed << 8) + 21)
    profile = FLEET_PROFILES[rng.choice(_DRAWN)]
    return dataclasses.replace(profile, fault_us=profile.fault_us * rng.choice((5, 7, 10)) // 10)


def is_fleet_seed(seed: int) -> bool:
    """Whether a plain seed, of which nothing else is said, plays a whole fleet."""
    return random.Random((seed << 8) + 22).random() < FLEET_SHARE


def draw_fleet_schedule(seed: int, options: FleetOptions) -> list[Fault]:
    """All faults of a run, in order of time. Each has dice of its own (:mod:`raftfleet.testing.schedule`)."""
    rng = random.Random((seed << 8) + 23)
    faults: list[Fault] = []
    for field in dataclasses.fields(options):
        kind = field.name.removesuffix("_rate")
        if kind == field.name:
            continue
        rate = getattr(options, field.name)
        at_us = 0
        while rate > 0:
            at_us += int(rng.expovariate(rate) * SECOND_US)
            if at_us >= options.fault_us:
                break
            until_us = at_us + SECOND_US + int(rng.random() * 6 * SECOND_US)
            faults.append(Fault(0, at_us, kind, rng.getrandbits(32), until_us))
    faults.sort(key=lambda fault: (fault.at_us, fault.kind))
    return [fault._replace(number=number) for number, fault in enumerate(faults)]

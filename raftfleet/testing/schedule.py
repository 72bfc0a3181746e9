"""What goes wrong when: a list of faults, drawn from a seed before anything runs.

This module does not know what the faults do to a cluster. Each has a moment, a kind and dice of its own, so that
leaving one out leaves all others as they are: that is what makes a failing schedule cut to a short one
(:mod:`raftfleet.testing.shrink`) the same story with less in it.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from raftfleet.testing.clock import SECOND_US
from raftfleet.testing.profiles import SimulationOptions

NETWORK_KINDS = ("frames", "cut", "slow")


class Fault(NamedTuple):
    """One fault.

    Attributes:
        number: its place in the schedule.
        at_us: when it strikes.
        kind: what it is; :class:`raftfleet.testing.sim_faults.FaultLayer` has a method for each.
        seed: of the dice with which its details are drawn.
        until_us: when it ends; 0 for what ends by itself.
        detail: a variant, for network weather.
    """

    number: int
    at_us: int
    kind: str
    seed: int
    until_us: int = 0
    detail: str = ""


def draw_schedule(seed: int, options: SimulationOptions) -> list[Fault]:
    """All faults of a run, in order of time."""
    rng = random.Random((seed << 8) + 2)
    faults = _weather(rng, options) if options.network_faults else []
    rates = [
        ("crash", options.crash_rate),
        ("pause", options.pause_rate),
        ("isolate", options.isolate_rate),
        ("transfer", options.transfer_rate),
        ("move", options.move_rate),
        ("replace_group", options.replace_group_rate),
        ("clock", options.clock_rate),
        ("usurp", options.usurp_rate),
        ("strand", options.strand_rate),
        ("abandon", options.abandon_rate),
        ("rebirth", options.rebirth_rate),
    ]
    if options.is_durable:
        rates += [
            ("lose_disk", options.lose_disk_rate),
            ("crash_all", options.crash_all_rate),
            ("disk_full", options.disk_full_rate),
            ("disk_error", options.disk_error_rate),
        ]
    for kind, rate in rates:
        at_us = 0
        while rate > 0:
            at_us += int(rng.expovariate(rate) * SECOND_US)
            if at_us >= options.fault_us:
                break
            faults.append(Fault(0, at_us, kind, rng.getrandbits(32)))
    faults.sort(key=lambda fault: (fault.at_us, fault.kind))
    return [fault._replace(number=number) for number, fault in enumerate(faults)]


def _weather(rng: random.Random, options: SimulationOptions) -> list[Fault]:
    """The network's phases follow one another; a quarter of them are calm."""
    low, high = (int(seconds * SECOND_US) for seconds in options.phase_s)
    faults: list[Fault] = []
    at_us = int(rng.random() * min(high, 5 * SECOND_US))
    while at_us < options.fault_us:
        until_us = at_us + low + int(rng.random() * (high - low))
        weather = rng.choice(options.weathers)
        if rng.random() >= 0.25:
            draws = [rng.random(), rng.random(), rng.random()]
            chosen = {
                "lossy": [("frames", "")],
                "unordered": [("frames", "unordered")],
                "cuts": [("cut", "")],
                "slow": [("slow", "")],
                "quarrel": [("frames", "unordered"), ("cut", "")],
                "mixed": [row for row, limit, draw in zip(_MIXED, (0.6, 0.6, 0.3), draws, strict=True) if draw < limit],
            }[weather]
            faults += [Fault(0, at_us, kind, rng.getrandbits(32), until_us, detail) for kind, detail in chosen]
        at_us = until_us
    return faults


_MIXED = (("frames", ""), ("cut", ""), ("slow", ""))

"""Cutting a failing run short: which few of its faults are enough?

``shrink(seed)`` plays the seed, and then again and again with fewer of the faults that struck before the failure, as
long as the same checker speaks up (delta debugging: Zeller & Hildebrandt, "Simplifying and isolating failure-inducing
input", 2002). Faults have dice of their own, so one that is left out leaves the others what they were; what comes of
them may differ, and a cut after which another checker speaks is not taken.

The result is one-minimal if the tries sufficed: without any single one of its faults this failure does not happen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from raftfleet.testing.clock import SECOND_US
from raftfleet.testing.schedule import Fault
from raftfleet.testing.simulation import SimulationFailure
from raftfleet.testing.worlds import Options, new_world

TRIES_MAX = 400
TRANSCRIPT_LINES_MAX = 400
FRAMES_TOLD = 60


class NothingFails(ValueError):
    """The seed passes: there is nothing to cut short."""


@dataclass(frozen=True)
class Shrunk:
    """A short schedule and what comes of it. ``is_minimal``: every single fault of it was tried without."""

    seed: int
    options: Options | None
    schedule: list[Fault]
    struck_count: int
    failure: SimulationFailure
    tries: int
    is_minimal: bool
    world: str = ""


def shrink(
    seed: int,
    options: Options | None = None,
    *,
    world: str = "",
    tries_max: int = TRIES_MAX,
    tell: Callable[[int, int], None] = lambda tries, faults: None,
) -> Shrunk:
    """Cut a failing seed's schedule short. ``tell`` is called after each try with (tries, faults that are left).

    Raises:
        NothingFails: the seed passes.
    """
    failure = _play(seed, options, None, world)
    if failure is None:
        raise NothingFails(f"seed {seed} passes; there is nothing to cut short")
    left = failure.struck
    struck_count = len(left)
    tries = 0
    pieces = 2
    while left and tries < tries_max:
        size = max(1, -(-len(left) // pieces))
        shorter = None
        for start in range(0, len(left), size):
            rest = left[:start] + left[start + size :]
            tries += 1
            shorter = _same_failure(seed, options, rest, failure.checker, world)
            tell(tries, len(left))
            if shorter is not None or tries >= tries_max:
                break
        if shorter is not None:
            # What the shorter run did not live to see is cut too.
            failure, left = shorter, shorter.struck
            pieces = max(2, pieces - 1)
        elif size == 1:
            return Shrunk(seed, options, left, struck_count, failure, tries, True, world)
        else:
            pieces = min(len(left), pieces * 2)
    return Shrunk(seed, options, left, struck_count, failure, tries, not left, world)


def _play(seed: int, options: Options | None, schedule: list[Fault] | None, world: str) -> SimulationFailure | None:
    try:
        new_world(seed, options, schedule, world).run()
    except SimulationFailure as failure:
        return failure
    return None


def _same_failure(
    seed: int, options: Options | None, schedule: list[Fault], checker: str, world: str
) -> SimulationFailure | None:
    failure = _play(seed, options, schedule, world)
    return failure if failure is not None and failure.checker == checker else None


def transcript(shrunk: Shrunk) -> str:
    """The short run as prose: its faults, everything that happened, the last frames, where the members stand."""
    simulation = new_world(shrunk.seed, shrunk.options, shrunk.schedule, shrunk.world)
    simulation.tell_more(TRANSCRIPT_LINES_MAX, FRAMES_TOLD)
    told = "it passes now"
    try:
        simulation.run()
    except SimulationFailure as failure:
        told = failure.told
    numbers = ",".join(str(fault.number) for fault in shrunk.schedule) or "none"
    repeat = simulation.arguments()
    lines = [
        told,
        "",
        f"{len(shrunk.schedule)} of the {shrunk.struck_count} faults that struck are enough"
        f" ({shrunk.tries} tries{'' if shrunk.is_minimal else '; more tries may find fewer'}):",
        *(f"    {_fault_line(fault)}" for fault in shrunk.schedule),
        "repeat it with:",
        f"    python -m raftfleet.testing.simulate {repeat} --faults {numbers}",
        "",
        f"what happens, in seconds (the last {TRANSCRIPT_LINES_MAX} lines):",
        *(f"    {line}" for line in list(simulation.story)[-TRANSCRIPT_LINES_MAX:]),
        "",
        f"the last frames (at most {FRAMES_TOLD}):",
        *(f"    {line}" for line in simulation.frames_told()),
        "",
        "where everyone stands:",
        *(f"    {line}" for line in simulation.members_told()),
    ]
    return "\n".join(lines)


def _fault_line(fault: Fault) -> str:
    until = f", until {fault.until_us / SECOND_US:.3f} s" if fault.until_us else ""
    detail = f" ({fault.detail})" if fault.detail else ""
    return f"number {fault.number}: at {fault.at_us / SECOND_US:.3f} s {fault.kind}{detail}{until}"

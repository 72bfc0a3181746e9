"""``python -m raftfleet.testing.simulate``: play simulations by seed, one or very many, on all cores.

A seed plays bare shards (:mod:`raftfleet.testing.simulation`) or, one in seven, a whole fleet
(:mod:`raftfleet.testing.fleet_storm`), as it draws. A failure prints its seed and the command that repeats it;
``--shrink`` cuts its schedule of faults to a short one and tells that as a transcript. Results go to stdout, progress
to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from raftfleet.testing.fleet_profiles import FLEET_PROFILES
from raftfleet.testing.profiles import PROFILES
from raftfleet.testing.schedule import Fault
from raftfleet.testing.shrink import NothingFails, shrink, transcript
from raftfleet.testing.simulation import SimulationFailure, Summary
from raftfleet.testing.worlds import WORLDS, Options, new_world

_TOTALS: dict[str, tuple[str, ...]] = {
    "elections": ("elections",),
    "membership changes": ("configurations",),
    "crashes": ("crash",),
    "commands": ("command ",),
    "reads": ("query ", "stale query "),
}
"""What is told in one number each at the end, and the names of the counts that make it up, by their beginnings."""

Play = Callable[[int], "Summary | str"]


def run_seed(
    seed: int, options: Options | None = None, schedule: list[Fault] | None = None, world: str = ""
) -> Summary | str:
    """Play one seed; the report if it fails."""
    try:
        return new_world(seed, options, schedule, world).run()
    except SimulationFailure as failure:
        return str(failure)


def run_seeds(seeds: Iterable[int], processes: int, play: Play = run_seed) -> Iterator[tuple[int, Summary | str]]:
    """Play many, in as many processes; yields ``(seed, summary or report)`` as they end."""
    waiting = iter(seeds)
    with ProcessPoolExecutor(processes) as pool:
        running: dict[Future[Summary | str], int] = {}
        exhausted = False
        while running or not exhausted:
            while not exhausted and len(running) < 4 * processes:
                seed = next(waiting, None)
                if seed is None:
                    exhausted = True
                else:
                    running[pool.submit(play, seed)] = seed
            if running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()


def _seeds(first: int, last: int | None, minutes: float | None) -> Iterator[int]:
    start = time.monotonic()
    seed = first
    while last is None or seed <= last:
        if minutes is not None and time.monotonic() - start > minutes * 60:
            return
        yield seed
        seed += 1


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 1 if a seed failed."""
    parser = argparse.ArgumentParser(prog="python -m raftfleet.testing.simulate", description=__doc__)
    parser.add_argument("--seed", type=int, help="play this one and print what happened")
    parser.add_argument(
        "--profile",
        choices=sorted({**PROFILES, **FLEET_PROFILES}),
        help="the kind of trouble (default: as the seed draws)",
    )
    parser.add_argument("--world", choices=WORLDS, default="", help="only bare shards, or only whole fleets")
    parser.add_argument("--faults", metavar="N,N,…", help="with --seed: only these numbers of its schedule, or none")
    parser.add_argument("--shrink", action="store_true", help="with --seed: cut a failing schedule short, and tell it")
    parser.add_argument("--seeds", metavar="A-B", help="play these (default 1-1000)")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes; without --seeds go on until then")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    profile: Options | None = FLEET_PROFILES.get(options.profile) or PROFILES.get(options.profile)
    world = options.world
    if options.seed is not None:
        if options.shrink:
            return _shrink(options.seed, profile, world)
        try:
            wanted = _numbers(options.faults)
        except ValueError:
            parser.error(f"--faults is numbers such as 3,17,20, or none, not {options.faults!r}")
        return _one(options.seed, profile, wanted, world)
    if options.shrink or options.faults:
        parser.error("--shrink and --faults need --seed")
    first, last = 1, (None if options.minutes is not None else 1000)
    if options.seeds:
        first_text, _, last_text = options.seeds.partition("-")
        try:
            first, last = int(first_text), int(last_text or first_text)
        except ValueError:
            parser.error(f"--seeds is two numbers such as 1-1000, not {options.seeds!r}")
    return _many(first, last, options.minutes, options.processes, _Profiled(profile, world))


def _numbers(text: str | None) -> set[int] | None:
    if text is None:
        return None
    return set() if text == "none" else {int(number) for number in text.split(",")}


def _one(seed: int, options: Options | None, wanted: set[int] | None, world: str) -> int:
    schedule = None
    if wanted is not None:
        drawn = new_world(seed, options, None, world).schedule
        schedule = [fault for fault in drawn if fault.number in wanted]
    result = run_seed(seed, options, schedule, world)
    if isinstance(result, str):
        print(result)
        return 1
    for name, count in result.counts.items():
        print(f"{count:10} {name}")
    print(
        f"seed {seed}: {result.virtual_us / 1e6:.1f} virtual seconds, {result.counts['steps']} steps,"
        f" state {result.trace:012x}"
    )
    return 0


def _shrink(seed: int, options: Options | None, world: str) -> int:
    console = Console(stderr=True)
    with console.status(f"seed {seed}: playing it") as status:

        def tell(tries: int, faults: int) -> None:
            status.update(f"seed {seed}: {faults} faults left after {tries} tries")

        try:
            shrunk = shrink(seed, options, world=world, tell=tell)
        except NothingFails as error:
            print(error)
            return 0
    print(transcript(shrunk))
    return 1


class _Profiled:
    """Plays seeds under one profile; a class, since a process pool must be able to send it."""

    def __init__(self, options: Options | None, world: str) -> None:
        self.options = options
        self.world = world

    def __call__(self, seed: int) -> Summary | str:
        return run_seed(seed, self.options, None, self.world)


def _many(first: int, last: int | None, minutes: float | None, processes: int, play: Play) -> int:
    start = time.monotonic()
    counts: dict[str, int] = {}
    seed_count = virtual_us = 0
    failures: list[tuple[int, str]] = []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        total = minutes * 60 if minutes is not None else float((last or first) - first + 1)
        task = progress.add_task("simulating", total=total)
        for seed, result in run_seeds(_seeds(first, last, minutes), processes, play):
            seed_count += 1
            if isinstance(result, str):
                failures.append((seed, result))
                print(result, flush=True)
            else:
                virtual_us += result.virtual_us
                for name, count in result.counts.items():
                    counts[name] = counts.get(name, 0) + count
            elapsed_s = time.monotonic() - start
            progress.update(
                task,
                completed=elapsed_s if minutes is not None else seed_count,
                description=f"{seed_count} seeds, {virtual_us / 3.6e9:.1f} virtual hours, {len(failures)} failures,"
                f" {seed_count / max(elapsed_s, 0.001):.1f} seeds/s",
            )
    _tell(counts, seed_count, virtual_us, time.monotonic() - start, failures)
    return 1 if failures else 0


def _tell(
    counts: dict[str, int], seed_count: int, virtual_us: int, elapsed_s: float, failures: list[tuple[int, str]]
) -> None:
    for name, count in sorted(counts.items()):
        print(f"{count:12} {name}")
    for title, prefixes in _TOTALS.items():
        total = sum(count for name, count in counts.items() if name.startswith(prefixes))
        print(f"{total:12} {title} in all")
    hours = virtual_us / 3.6e9
    rate = virtual_us / 1e6 / elapsed_s if elapsed_s else 0.0
    print(f"{seed_count} seeds, {hours:.2f} virtual hours in {elapsed_s:.0f} s ({rate:.0f} virtual hours per real one)")
    if failures:
        print(f"{len(failures)} failed: {', '.join(str(seed) for seed, _ in sorted(failures)[:50])}")


if __name__ == "__main__":
    sys.exit(main())

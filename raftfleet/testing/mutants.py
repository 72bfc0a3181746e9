"""``python -m raftfleet.testing.mutants``: break every rule in turn; the simulations must notice each.

For each mutant seeds are played, one after the other, until a checker speaks up. The table says which checker did and
how many seeds it took; a mutant that survives all its seeds fails the run, for then a rule could be lost and no test
would tell. Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from raftfleet.testing import mutants_core, mutants_disk, mutants_fleet
from raftfleet.testing.fleet_simulation import FleetSimulation
from raftfleet.testing.mutants_table import Mutant
from raftfleet.testing.mutation import broken
from raftfleet.testing.profiles import PROFILES
from raftfleet.testing.simulation import Simulation, SimulationFailure

SEEDS_MAX = 400
"""Seeds after which a mutant counts as a survivor: four times what the hardest one needs."""

MUTANTS: dict[str, Mutant] = {
    mutant.name: mutant for mutant in (*mutants_core.MUTANTS, *mutants_disk.MUTANTS, *mutants_fleet.MUTANTS)
}


@dataclass(frozen=True)
class Verdict:
    """How a mutant fared. ``noticed_by`` is empty for a survivor; ``report``: of the seed that noticed."""

    name: str
    seed_count: int
    noticed_by: str
    report: str
    seconds: float


def play(name: str, seeds_max: int = SEEDS_MAX) -> Verdict:
    """Play seeds against one mutant until it is noticed."""
    mutant = MUTANTS[name]
    start = time.monotonic()
    with broken(mutant.changes):
        for seed in range(1, seeds_max + 1):
            failure = _failure(mutant, seed)
            if failure is not None:
                return Verdict(name, seed, failure.checker, str(failure), time.monotonic() - start)
    return Verdict(name, seeds_max, "", "", time.monotonic() - start)


def _failure(mutant: Mutant, seed: int) -> SimulationFailure | None:
    try:
        if mutant.world == "fleet":
            FleetSimulation(seed).run()
        else:
            Simulation(seed, PROFILES[mutant.profile]).run()
    except SimulationFailure as failure:
        return failure
    return None


def play_all(names: Iterable[str], processes: int, seeds_max: int = SEEDS_MAX) -> Iterator[Verdict]:
    """Play many, in as many processes; yields verdicts as they come."""
    with ProcessPoolExecutor(processes) as pool:
        for future in as_completed([pool.submit(play, name, seeds_max) for name in names]):
            yield future.result()


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 1 if a mutant survived."""
    parser = argparse.ArgumentParser(prog="python -m raftfleet.testing.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to play (default: all)")
    parser.add_argument("--list", action="store_true", help="only list them")
    parser.add_argument("--seeds", type=int, default=SEEDS_MAX, help="most seeds per mutant (default %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--reports", action="store_true", help="print what each checker said")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in MUTANTS]
    if unknown:
        parser.error(f"there is no mutant {', '.join(unknown)}; --list names them all")
    names = options.names or list(MUTANTS)
    if options.list:
        for name in names:
            mutant = MUTANTS[name]
            print(f"{name:40} {mutant.rule:12} {mutant.text}")
        return 0
    start = time.monotonic()
    verdicts = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task("mutants", total=len(names))
        for verdict in play_all(names, options.processes, options.seeds):
            verdicts[verdict.name] = verdict
            progress.advance(task)
            noticed = verdict.noticed_by or "SURVIVED"
            progress.console.print(f"{verdict.name}: {noticed}, {verdict.seed_count} seeds, {verdict.seconds:.0f} s")
            if options.reports:
                print(f"{verdict.name}: {verdict.report or 'survived'}\n", flush=True)
    return _tell([verdicts[name] for name in names], time.monotonic() - start)


def _tell(verdicts: list[Verdict], seconds: float) -> int:
    table = Table("mutant", "rule", "what is broken", "noticed by", "seeds", "s")
    for verdict in verdicts:
        mutant = MUTANTS[verdict.name]
        noticed = verdict.noticed_by or "NOBODY"
        table.add_row(
            verdict.name, mutant.rule, mutant.text, noticed, str(verdict.seed_count), f"{verdict.seconds:.1f}"
        )
    width = None if sys.stdout.isatty() else 180
    Console(width=width).print(table)
    survivors = [verdict.name for verdict in verdicts if not verdict.noticed_by]
    print(f"{len(verdicts)} mutants, {len(verdicts) - len(survivors)} noticed, in {seconds:.0f} s")
    if survivors:
        print(f"survived: {', '.join(survivors)}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

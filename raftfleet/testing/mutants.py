"""``python -m raftfleet.testing.mutants``: break every rule in turn; the simulations must notice each.

For each mutant seeds are played, one after the other, until checkers have spoken up in three of them, or in fewer and
twice as many were played as the first one took. The table says in how many of how many seeds, and which checkers; a
mutant that survives all its seeds fails the run, for then a rule could be lost and no test would tell. Results go to
stdout (``--json``: for programs), progress to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
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
"""Seeds after which a mutant counts as a survivor: twice what the hardest one needs."""

NOTICES = 3
"""Seeds in which a mutant is noticed before the next one's turn; and, after the first, not many more are played."""
SEEDS_AFTER_FIRST = 6

MUTANTS: dict[str, Mutant] = {
    mutant.name: mutant for mutant in (*mutants_core.MUTANTS, *mutants_disk.MUTANTS, *mutants_fleet.MUTANTS)
}


@dataclass(frozen=True)
class Verdict:
    """How a mutant fared.

    Attributes:
        seed_count: seeds played.
        noticed_by: the checkers, the most frequent first, with their counts; empty for a survivor.
        report: of the first seed that noticed.
        noticed_count: seeds in which it was noticed.
        first_seed: the first of these; 0 if there is none.
    """

    name: str
    seed_count: int
    noticed_by: str
    report: str
    seconds: float
    noticed_count: int = 0
    first_seed: int = 0


def play(name: str, seeds_max: int = SEEDS_MAX, notices: int = 1) -> Verdict:
    """Play seeds against one mutant until it is noticed in ``notices`` of them, or that would take long."""
    mutant = MUTANTS[name]
    start = time.monotonic()
    checkers: Counter[str] = Counter()
    report, first_seed, seed, stop = "", 0, 0, seeds_max
    with broken(mutant.changes):
        while seed < stop and checkers.total() < notices:
            seed += 1
            failure = _failure(mutant, seed)
            if failure is None:
                continue
            checkers[failure.checker] += 1
            if not first_seed:
                report, first_seed = str(failure), seed
                stop = min(seeds_max, max(2 * seed, seed + SEEDS_AFTER_FIRST))
    told = ", ".join(
        f"{checker} {count}" if len(checkers) > 1 else checker for checker, count in checkers.most_common()
    )
    return Verdict(name, seed, told, report, time.monotonic() - start, checkers.total(), first_seed)


def _failure(mutant: Mutant, seed: int) -> SimulationFailure | None:
    try:
        if mutant.world == "fleet":
            FleetSimulation(seed).run()
        else:
            Simulation(seed, PROFILES[mutant.profile]).run()
    except SimulationFailure as failure:
        return failure
    return None


def play_all(
    names: Iterable[str], processes: int, seeds_max: int = SEEDS_MAX, notices: int = NOTICES
) -> Iterator[Verdict]:
    """Play many, in as many processes; yields verdicts as they come."""
    with ProcessPoolExecutor(processes) as pool:
        for future in as_completed([pool.submit(play, name, seeds_max, notices) for name in names]):
            yield future.result()


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 1 if a mutant survived."""
    parser = argparse.ArgumentParser(prog="python -m raftfleet.testing.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to play (default: all)")
    parser.add_argument("--list", action="store_true", help="only list them")
    parser.add_argument("--seeds", type=int, default=SEEDS_MAX, help="most seeds per mutant (default %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--notices", type=int, default=NOTICES, help="noticing seeds that suffice (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
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
        for verdict in play_all(names, options.processes, options.seeds, options.notices):
            verdicts[verdict.name] = verdict
            progress.advance(task)
            noticed = verdict.noticed_by or "SURVIVED"
            progress.console.print(
                f"{verdict.name}: {noticed}, {verdict.noticed_count} of {verdict.seed_count} seeds,"
                f" {verdict.seconds:.0f} s"
            )
            if options.reports:
                print(f"{verdict.name}: {verdict.report or 'survived'}\n", flush=True)
    if options.json:
        return _tell_json([verdicts[name] for name in names])
    return _tell([verdicts[name] for name in names], time.monotonic() - start)


def _tell_json(verdicts: list[Verdict]) -> int:
    rows = []
    for verdict in verdicts:
        mutant = MUTANTS[verdict.name]
        rows.append(
            {
                "name": verdict.name,
                "rule": mutant.rule,
                "text": mutant.text,
                "world": mutant.world,
                "profile": mutant.profile,
                "noticed_by": verdict.noticed_by,
                "noticed": verdict.noticed_count,
                "seeds": verdict.seed_count,
                "first_seed": verdict.first_seed,
                "seconds": round(verdict.seconds, 1),
            }
        )
    print(json.dumps(rows, indent=1))
    return 0 if all(verdict.noticed_by for verdict in verdicts) else 1


def _tell(verdicts: list[Verdict], seconds: float) -> int:
    table = Table("mutant", "rule", "what is broken", "noticed by", "seeds", "s")
    for verdict in verdicts:
        mutant = MUTANTS[verdict.name]
        noticed = verdict.noticed_by or "NOBODY"
        seeds = f"{verdict.noticed_count} of {verdict.seed_count}"
        table.add_row(verdict.name, mutant.rule, mutant.text, noticed, seeds, f"{verdict.seconds:.1f}")
    width = None if sys.stdout.isatty() else 180
    Console(width=width).print(table)
    survivors = [verdict.name for verdict in verdicts if not verdict.noticed_by]
    print(f"{len(verdicts)} mutants, {len(verdicts) - len(survivors)} noticed, in {seconds:.0f} s")
    if survivors:
        print(f"survived: {', '.join(survivors)}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

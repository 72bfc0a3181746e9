"""``python -m raftfleet.testing.simulate``: play simulations by seed, one or very many, on all cores.

A failure prints its seed and the command that repeats it. Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

from raftfleet.testing.simulation import Simulation, SimulationFailure, Summary


def run_seed(seed: int) -> Summary | str:
    """Play one seed; the report if it fails."""
    try:
        return Simulation(seed).run()
    except SimulationFailure as failure:
        return str(failure)


def run_seeds(seeds: Iterable[int], processes: int) -> Iterator[tuple[int, Summary | str]]:
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
                    running[pool.submit(run_seed, seed)] = seed
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
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m raftfleet.testing.simulate", description=__doc__)
    parser.add_argument("--seed", type=int, help="play this one and print what happened")
    parser.add_argument("--seeds", metavar="A-B", help="play these (default 1-1000)")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes; without --seeds go on until then")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return _one(options.seed)
    first, last = 1, (None if options.minutes is not None else 1000)
    if options.seeds:
        first_text, _, last_text = options.seeds.partition("-")
        try:
            first, last = int(first_text), int(last_text or first_text)
        except ValueError:
            parser.error(f"--seeds is two numbers such as 1-1000, not {options.seeds!r}")
    return _many(first, last, options.minutes, options.processes)


def _one(seed: int) -> int:
    result = run_seed(seed)
    if isinstance(result, str):
        print(result)
        return 1
    for name, count in result.counts.items():
        print(f"{count:10} {name}")
    print(f"seed {seed}: {result.virtual_us / 1e6:.1f} virtual seconds, trace {result.trace:012x}")
    return 0


def _many(first: int, last: int | None, minutes: float | None, processes: int) -> int:
    start = time.monotonic()
    counts: dict[str, int] = {}
    seed_count = virtual_us = 0
    failures: list[tuple[int, str]] = []
    told = start
    for seed, result in run_seeds(_seeds(first, last, minutes), processes):
        seed_count += 1
        if isinstance(result, str):
            failures.append((seed, result))
            print(result, flush=True)
        else:
            virtual_us += result.virtual_us
            for name, count in result.counts.items():
                counts[name] = counts.get(name, 0) + count
        now = time.monotonic()
        if now - told > 5:
            told = now
            print(
                f"{seed_count} seeds, {virtual_us / 3.6e9:.1f} virtual hours, {len(failures)} failures,"
                f" {seed_count / (now - start):.1f} seeds/s",
                file=sys.stderr,
                flush=True,
            )
    elapsed_s = time.monotonic() - start
    for name, count in sorted(counts.items()):
        print(f"{count:12} {name}")
    rate = virtual_us / 1e6 / elapsed_s if elapsed_s else 0.0
    print(f"{seed_count} seeds, {virtual_us / 3.6e9:.2f} virtual hours in {elapsed_s:.0f} s ({rate:.0f} per real one)")
    if failures:
        print(f"{len(failures)} failed: {', '.join(str(seed) for seed, _ in sorted(failures)[:50])}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""The benchmark suite.

    python benchmarks [--only PART,...] [--rounds 3] [--seconds 2] [--quick] [--out FOLDER]

Parts: commands, idle, life, tail, overload, table. ``--systems`` picks what the commands part compares. Progress goes
to stderr, the page to stdout; ``result.json``, ``result.md`` and SVG plots go to the folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import timeit
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import idle  # noqa: E402
import lifecycle  # noqa: E402
import overload  # noqa: E402
import report  # noqa: E402
import tail  # noqa: E402
import workloads  # noqa: E402
from measuring import say  # noqa: E402
from systems import ALL, Raftfleet, wait_for  # noqa: E402

from raftfleet.node.leader_table import LeaderTableReader  # noqa: E402

PARTS = ("commands", "idle", "life", "tail", "overload", "table")


def look_up_us() -> float:
    """Microseconds of a look-up of a known group in a node's leader table, as a client's routing makes it."""
    with Raftfleet() as system, closing(LeaderTableReader(system.fleet.nodes["n1"].run_dir)) as reader:
        name = system.groups(60)[0]
        wait_for(lambda: (slot := reader.lookup(name)) is not None and slot.node, f"{name} in the leader table")
        count = 100_000
        return min(timeit.repeat(lambda: reader.lookup(name), number=count, repeat=3)) / count * 1e6


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All parts that were asked for."""
    quick = arguments.quick
    result: dict[str, Any] = {
        "machine": report.machine(),
        "settings": {"rounds": arguments.rounds, "seconds": arguments.seconds, "nodes": 3, "workers_per_node": 1},
        "versions": {},
        "skipped": {},
        "failed": {},
        "rows": [],
    }
    if "commands" in arguments.only:
        systems = [ALL[key] for key in arguments.systems]
        for kind, value in workloads.run_rounds(systems, arguments.rounds, arguments.seconds, quick, arguments.rows):
            if kind == "row":
                result["rows"].append(value)
            else:
                result["versions" if kind == "version" else kind][value[0]] = value[1]
    if "table" in arguments.only:
        say("leader table")
        result["leader_table"] = {"us": look_up_us()}
    if "idle" in arguments.only:
        say("idle groups")
        counts = [10, 100] if quick else arguments.idle_groups
        result["idle"] = list(idle.measure_idle(counts, 2.0 if quick else 10.0))
    if "life" in arguments.only:
        say("life cycle")
        result["life_cycle"] = life_cycle(quick)
    if "tail" in arguments.only:
        say("tail")
        result["tail"] = tail.measure_tail(3.0 if quick else arguments.tail_seconds)
    if "overload" in arguments.only:
        say("overload")
        result["overload"] = overload.measure_overload(1.0 if quick else 10.0)
    return result


def life_cycle(quick: bool) -> list[dict[str, Any]]:
    """The rows of all scenarios."""
    if quick:
        return [*lifecycle.adding([20]), *lifecycle.failover(20, 20), *lifecycle.growing(10, 6, 3)]
    return [
        *lifecycle.adding([1000]),
        *lifecycle.failover(60, 60),
        *lifecycle.failover(10_000, 256),
        *lifecycle.growing(60, 15, 10),
        *lifecycle.growing(1000, 75, 40),
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", type=words(PARTS), default=list(PARTS), metavar="PART,...", help=", ".join(PARTS))
    parser.add_argument("--systems", type=words(tuple(ALL)), default=list(ALL), metavar="KEY,...", help=", ".join(ALL))
    rows_help = "only these rows of the commands part, such as command/64/1g/here"
    parser.add_argument("--rows", type=lambda text: text.split(","), metavar="ROW,...", help=rows_help)
    parser.add_argument("--rounds", type=int, help="of the commands part (default: 3; quick: 1)")
    parser.add_argument("--seconds", type=float, help="of each row in each round (default: 2; quick: 0.3)")
    parser.add_argument("--idle-groups", type=numbers, default=[10, 1000, 10_000, 100_000], metavar="N,...")
    parser.add_argument("--tail-seconds", type=float, default=60.0)
    parser.add_argument("--quick", action="store_true", help="everything once and short: whether it works, no figures")
    parser.add_argument("--out", type=Path, default=Path("benchmark-result"), metavar="FOLDER")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    arguments.seconds = arguments.seconds or (0.3 if arguments.quick else 2.0)
    return arguments


def words(known: tuple[str, ...]) -> Any:
    """A parser of comma-separated words out of ``known``."""

    def parse_words(text: str) -> list[str]:
        given = text.split(",")
        unknown = [word for word in given if word not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(known)}")
        return given

    return parse_words


def numbers(text: str) -> list[int]:
    """Comma-separated numbers, ascending."""
    return sorted(int(word) for word in text.split(","))


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = run(arguments)
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    page = report.markdown(result)
    (arguments.out / "result.md").write_text(page)
    print(page)
    for path in report.plots(result, arguments.out):
        say(f"plot: {path}")


if __name__ == "__main__":
    main()

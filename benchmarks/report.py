"""What comes out: facts about the machine, medians over the rounds, a Markdown page, a JSON file, SVG plots."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from systems import ALL

Row = dict[str, Any]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": models[0] if models else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "raftfleet": importlib.metadata.version("raftfleet"),
        "pyzmq": importlib.metadata.version("pyzmq"),
        "msgpack": importlib.metadata.version("msgpack"),
        "load_before": round(os.getloadavg()[0], 2),
    }


def medians(rows: list[Row]) -> list[Row]:
    """One row per system and workload: the median of each figure over the rounds, and the range of the rates."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["system"], row["workload"]), []).append(row)
    result = []
    for (system, workload), same in found.items():
        figures = ("per_second", "p50_us", "p99_us", "p999_us", "max_us")
        merged: Row = {"system": system, "workload": workload, "rounds": len(same)}
        merged |= {name: statistics.median(row[name] for row in same) for name in figures}
        merged["per_second_range"] = [min(r["per_second"] for r in same), max(r["per_second"] for r in same)]
        merged["cpu_us"] = {role: statistics.median(r["cpu_us"][role] for r in same) for role in same[0]["cpu_us"]}
        result.append(merged)
    return result


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]

    def row(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([row(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(row, lines)])


def ratio(rows: list[Row], figure: str, of: tuple[str, str], to: tuple[str, str]) -> float | None:
    """One system's figure over another's, round by round (they ran one after the other), then the median."""
    tops = {r["round"]: r[figure] for r in rows if (r["system"], r["workload"]) == of}
    bottoms = {r["round"]: r[figure] for r in rows if (r["system"], r["workload"]) == to}
    shared = [tops[number] / bottoms[number] for number in tops if bottoms.get(number)]
    return statistics.median(shared) if shared else None


RF, ECHO = "raftfleet", "echo"
ECHO_64 = (ECHO, "command/64/1g/here")
RATIO_GOALS: list[tuple[str, str, tuple[str, str], tuple[str, str], str, float]] = [
    ("sequential, leader here, p50", "p50_us", (RF, "command/1/1g/here/sync"), (ECHO, "command/1/1g/here"), "≤", 1.7),
    ("sequential, leader elsewhere, p50", "p50_us", (RF, "command/1/1g/elsewhere/sync"), (ECHO, "command/1/1g/here"),
     "≤", 2.7),
    ("64 in flight, 1 group, of the echo at 64", "per_second", (RF, "command/64/1g/here"), ECHO_64, "≥", 0.7),
    ("64 in flight, 1 group, of JetStream", "per_second", (RF, "command/64/1g/here"), ("nats", "command/64/1g/here"),
     "≥", 3.0),
    ("64 in flight, 1 group, of PySyncObj", "per_second", (RF, "command/64/1g/here"),
     ("pysyncobj", "command/64/1g/here"), "≥", 5.0),
    ("256 in flight, 1 group, of the echo at 64", "per_second", (RF, "command/256/1g/here"), ECHO_64, "≥", 1.2),
    ("256 in flight, 60 groups, of the echo at 64", "per_second", (RF, "command/256/60g/here"), ECHO_64, "≥", 0.9),
    ("queries (ReadIndex), 64, of commands", "per_second", (RF, "query/64/1g/here"), (RF, "command/64/1g/here"),
     "≥", 1.5),
    ("queries (lease), 64, of commands", "per_second", (RF, "lease/64/1g/here"), (RF, "command/64/1g/here"), "≥", 2.5),
    ("durable, 256, of in memory", "per_second", ("raftfleet-disk", "command/256/1g/here"),
     (RF, "command/256/1g/here"), "≥", 0.6),
]  # fmt: skip


def goals(result: dict[str, Any]) -> list[list[str]]:
    """Every goal that this run has figures for: what, goal, measured, met or not."""
    lines = []

    def add(what: str, value: float, sign: str, goal: float, unit: str) -> None:
        met = value <= goal if sign == "≤" else value >= goal
        lines.append([what, f"{sign} {goal:g}{unit}", f"{value:,.2f}{unit}", "met" if met else "not met"])

    for what, figure, of, to, sign, goal in RATIO_GOALS:
        value = ratio(result["rows"], figure, of, to)
        if value is not None:
            add(what, value, sign, goal, " ×")
    for row in result.get("idle", []):
        if row["groups"] in (10_000, 100_000):
            percent = 3 if row["groups"] == 10_000 else 5
            add(
                f"{row['groups']:,} idle groups, CPU",
                row["cpu_percent"],
                "≤",
                percent,
                " %",
            )
            if row["groups"] == 10_000 and row["member_bytes"]:
                add("10,000 idle groups, memory of a member", row["member_bytes"] / 1024, "≤", 3, " KiB")
    for row in result.get("life_cycle", []):
        for what, goal in LIFE_CYCLE_GOALS.items():
            if row["what"] == what:
                add(what, row["value"], "≤", goal, " " + row["unit"])
    if "leader_table" in result:
        add("leader table, known group", result["leader_table"]["us"], "≤", 0.5, " µs")
    if "tail" in result:
        add("tail at half load, p99.9 over p50", result["tail"]["p999_us"] / result["tail"]["p50_us"], "≤", 10, " ×")
    if "overload" in result:
        add("overload, done, of the peak", result["overload"]["part_of_peak"], "≥", 0.8, " ×")
        add("overload, groups with an election", result["overload"]["elections"], "≤", 0, "")
    return lines


LIFE_CYCLE_GOALS = {
    "adding one group, p50": 5.0,
    "adding 1,000 groups at once": 2.0,
    "failover, 60 groups all answer after": 2.5,
    "failover, 10,000 groups all answer after": 6.0,
    "3 to 6 nodes, 60 groups settled after": 5.0,
    "3 to 6 nodes, 1,000 groups settled after": 60.0,
    "3 to 6 nodes, 60 groups, p99 meanwhile": 3.0,
    "3 to 6 nodes, 1,000 groups, p99 meanwhile": 3.0,
}


def markdown(result: dict[str, Any]) -> str:
    """The whole result as a page."""
    parts = ["# raftfleet: benchmark", "", ", ".join(f"{name} {value}" for name, value in result["machine"].items())]
    parts += ["", f"settings: {', '.join(f'{name} {value}' for name, value in result['settings'].items())}", ""]
    parts += [f"- {ALL[key].title}: {version}" for key, version in result["versions"].items()]
    parts += [f"- {ALL[key].title}: not measured, {why}" for key, why in result["skipped"].items()]
    parts += [f"- failed: {what}: {why}" for what, why in result["failed"].items()]
    for title, make in SECTIONS:
        text = make(result)
        if text:
            parts += ["", f"## {title}", "", text]
    return "\n".join(parts) + "\n"


def _goals_text(result: dict[str, Any]) -> str:
    lines = goals(result)
    return table(["what", "goal", "measured", ""], lines) if lines else ""


def _rows_text(result: dict[str, Any]) -> str:
    echo = {row["workload"]: row["per_second"] for row in medians(result["rows"]) if row["system"] == ECHO}
    lines = []
    for row in medians(result["rows"]):
        low, high = row["per_second_range"]
        of_echo = echo.get(f"command/{row['workload'].split('/')[1]}/1g/here")
        cpu = ", ".join(f"{role} {us:.1f}" for role, us in row["cpu_us"].items())
        part = f"{row['per_second'] / of_echo:.2f}" if of_echo else ""
        lines.append(
            [
                ALL[row["system"]].title, row["workload"], f"{row['per_second']:,.0f}", f"{low:,.0f} – {high:,.0f}",
                f"{row['p50_us']:,.0f}", f"{row['p99_us']:,.0f}", cpu, part,
            ]
        )  # fmt: skip
    head = ["system", "operation/in flight/groups/leader", "per second", "range", "p50 µs", "p99 µs"]
    return table([*head, "µs CPU per operation", "of echo"], lines) if lines else ""


def _idle_text(result: dict[str, Any]) -> str:
    lines = [
        [
            f"{row['groups']:,}", f"{row['cpu_percent']:.2f}", f"{row['memory_bytes'] / 1e6:,.0f}",
            f"{row['member_bytes']:,.0f}" if row["member_bytes"] else "", f"{row['bytes_per_s']:,.0f}",
            f"{row['segments_per_s']:,.0f}", f"{row['added_s']:.1f}",
        ]
        for row in result.get("idle", [])
    ]  # fmt: skip
    head = ["groups", "% of a core, all processes", "MB, all processes", "bytes per member", "bytes/s", "segments/s"]
    return table([*head, "s to add them"], lines) if lines else ""


def _life_cycle_text(result: dict[str, Any]) -> str:
    lines = []
    for row in result.get("life_cycle", []):
        more = ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("what", "value", "unit"))
        lines.append([row["what"], f"{row['value']:,.2f} {row['unit']}", more])
    if "leader_table" in result:
        lines.append(["leader table, a look-up of a known group", f"{result['leader_table']['us']:.2f} µs", ""])
    return table(["what", "took", ""], lines) if lines else ""


def _tail_text(result: dict[str, Any]) -> str:
    tail = result.get("tail")
    if not tail:
        return ""
    figures = ", ".join(f"{n} {tail[f'{n}_us']:,.0f} µs" for n in ("p50", "p99", "p999", "max"))
    head = (
        f"{tail['per_second']:,.0f} commands/s on {tail['groups']} groups (half of {tail['peak_per_second']:,.0f}/s) "
        f"for {tail['seconds']:g} s: {figures}; errors: {tail['errors'] or 'none'}. The worst pauses:"
    )
    lines = [[f"{p['at_s']:.2f}", f"{p['ms']:.1f}", "; ".join(p["causes"])] for p in tail["pauses"]]
    return head + "\n\n" + table(["at s", "ms", "what happened in it"], lines)


def _overload_text(result: dict[str, Any]) -> str:
    both = result.get("overload")
    if not both:
        return ""
    lines = [
        [
            what, f"{row['in_flight']:,}", f"{row['done_per_second']:,.0f}",
            ", ".join(f"{outcome} {count:,}" for outcome, count in sorted(row["outcomes"].items())),
            f"{row['rss_max_bytes'] / 2**20:,.0f}",
        ]
        for what, row in (("peak", both["peak"]), ("overload", both["overload"]))
    ]  # fmt: skip
    head = (
        f"{both['overload']['offered_per_second'] / both['peak']['done_per_second']:.1f} × the peak was offered, "
        f"{both['part_of_peak']:.2f} × the peak was done; "
        f"groups that had an election: {both['elections']}."
    )
    return head + "\n\n" + table(["", "under way", "done per second", "outcomes", "largest process MiB"], lines)


SECTIONS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("Goals", _goals_text),
    ("Commands and queries", _rows_text),
    ("Idle groups", _idle_text),
    ("Life cycle", _life_cycle_text),
    ("Tail", _tail_text),
    ("Overload", _overload_text),
]


def plots(result: dict[str, Any], folder: Path) -> list[Path]:
    """SVG files in ``folder``; none where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    made = []
    if result["rows"]:
        figure, axes = pyplot.subplots(figsize=(8, 4.5))
        for key, system in ALL.items():
            points = sorted(
                (int(row["workload"].split("/")[1]), row["per_second"])
                for row in medians(result["rows"])
                if row["system"] == key and row["workload"].count("/") == 3 and "/1g/here" in row["workload"]
                and row["workload"].startswith("command/")
            )  # fmt: skip
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=system.title)
        axes.set(xscale="log", yscale="log", xlabel="commands in flight, one group", ylabel="commands per second")
        axes.legend(fontsize=7)
        made.append((figure, "commands.svg"))
    if len(result.get("idle", [])) > 1:
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.5))
        counts = [row["groups"] for row in result["idle"]]
        left.plot(counts, [row["cpu_percent"] for row in result["idle"]], marker="o")
        left.set(xscale="log", ylim=(0, None), xlabel="idle groups", ylabel="% of a core, all processes")
        right.plot(counts, [row["memory_bytes"] / 1e6 for row in result["idle"]], marker="o")
        right.set(xscale="log", yscale="log", xlabel="idle groups", ylabel="MB, all processes")
        made.append((figure, "idle.svg"))
    paths = []
    for figure, name in made:
        figure.tight_layout()
        figure.savefig(folder / name)
        pyplot.close(figure)
        paths.append(folder / name)
    return paths

"""What the command line prints: tables and JSON on stdout, narration, progress and errors on stderr.

Nothing here talks to a node. Values come as the manager's answers (see :mod:`raftfleet.node.cli`).
"""

from __future__ import annotations

import base64
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click

from raftfleet import errors
from raftfleet.storage.base import StorageError

NEXT_STEPS: tuple[tuple[type[BaseException], str], ...] = (
    (errors.NodeNotRunning, "Start a node with `raftfleet-node start`, or name its run directory with --run-dir."),
    (errors.GroupNotFound, "`raftfleet-node groups` lists the groups there are; `add-group` adds one."),
    (errors.AlreadyAdded, "Choose another name, or remove that group first with `raftfleet-node remove-group`."),
    (errors.StateMachineNotImportable, "Put the module where that node's --app-dir points, then try again."),
    (errors.NoActiveNode, "Activate nodes with `raftfleet-node activate --zone ZONE`, or start them with --zone."),
    (errors.NotActive, "See `raftfleet-node status`; activate this node with `raftfleet-node activate --zone ZONE`."),
    (errors.NoLeader, "`raftfleet-node leaderless` says which members are there; try again, or with more --timeout."),
    (errors.Unanswered, "Try again, or with more --timeout; `query --stale` asks any member."),
    (errors.Overloaded, "Try again a little later, and offer less load."),
    (errors.BeingRestored, "Wait, or run the same `raftfleet-node restore` again: it goes on where it was cut short."),
    (errors.CommandTooLarge, "Send less, or raise command_bytes_max in the group's config."),
    (errors.SessionExpired, "Look with `raftfleet-node query` whether it was applied before you send it again."),
    (errors.OutcomeUnknown, "Look with `raftfleet-node query` whether it was applied before you send it again."),
    (errors.CommandFailed, "The state is what it was; the message is the state machine's own."),
    (errors.QueryFailed, "The message is the state machine's own."),
    (errors.ConfigError, "`raftfleet-node start --help` explains every option."),
    (errors.ProtocolError, "Compare `raftfleet-node --version` on both sides: they may be of different versions."),
    (StorageError, "`raftfleet-node wal verify DIR` says what lies in a data directory; docs/storage.md explains."),
    (PermissionError, "Run as the node's user, or as a member of its --socket-group."),
    (
        errors.RaftFleetError,
        "`raftfleet-node status` shows the state of this node; RAFTFLEET_DEBUG=1 shows a traceback.",
    ),
    (OSError, "RAFTFLEET_DEBUG=1 shows a traceback."),
)
"""What to do next, by the first class that fits."""


def say(text: str) -> None:
    """Narrate on stderr."""
    click.echo(text, err=True)


def say_error(error: BaseException, *, command: str = "") -> None:
    """Tell an error and its causes in sentences on stderr, and what to do next."""
    told = [_sentence(error)]
    cause = error.__cause__
    while cause is not None:
        if str(cause) and str(cause) not in told[-1]:
            told.append("Because: " + _sentence(cause))
        cause = cause.__cause__
    click.echo(f"raftfleet-node {command}: ".replace(" :", ":") + "\n  ".join(told), err=True)
    click.echo(f"Next: {next_step(error)}", err=True)


def next_step(error: BaseException) -> str:
    """The sentence that tells the caller what to do about ``error``."""
    return next(sentence for kind, sentence in NEXT_STEPS if isinstance(error, kind))


def _sentence(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."


# -------------------------------------------------------------------- JSON


def print_json(value: Any) -> None:
    """Print ``value`` as one JSON document on stdout."""
    click.echo(json.dumps(json_ready(value), ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))


def json_ready(value: Any) -> Any:
    """What msgpack carries, as JSON can: bytes become ``{"base64": "…"}``, keys that are not str their ``repr``."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else repr(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, (bytes, bytearray)):
        return {"base64": base64.b64encode(value).decode("ascii")}
    return value


# -------------------------------------------------------------------- tables


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]], *, err: bool = False) -> None:
    """Print a table on stdout (``err``: on stderr): columns parted by two spaces, as ``awk`` and people read them."""
    texts = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(head))]
    for row in texts:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), err=err)


def print_status(status: Mapping[str, Any]) -> None:
    """The answer of ``status`` for people."""
    zone = f", zone {status['zone']}" if status.get("zone") else ""
    kept = "durable" if status.get("durable") else "in memory"
    click.echo(f"node {status['node']}: {status['state']}{zone}, {kept}, {status['endpoint']}")
    fleet = status.get("fleet")
    if not fleet:
        click.echo("fleet: none yet")
    else:
        count = sum(len(names) for names in status["nodes"].values())
        click.echo(f"fleet {fleet}: {count} active nodes, {status['groups']} groups")
    for name, since in sorted(status.get("unreachable", {}).items()):
        click.echo(f"unreachable: {name}, since {_clock(since)}")
    for name in status.get("divergent", ()):
        click.echo(f"members differ in group {name}: see 'raftfleet-node members {name}' and this node's log")
    print_table(
        ("WORKER", "PID", "MEMBERS", "LEADERS", "CPU %", "MEMORY", "RESTARTS", "DISK"),
        (
            (
                worker["index"],
                worker["pid"],
                worker["members"],
                worker["leaders"],
                f"{worker['cpu_percent']:.1f}",
                _size(worker["rss_bytes"]),
                worker["restarts"],
                (worker.get("disk") or {}).get("state", "-"),
            )
            for worker in status["workers"]
        ),
    )


def print_groups(groups: Mapping[str, Mapping[str, Any]]) -> None:
    """The answer of ``groups`` for people."""
    print_table(
        ("GROUP", "REPLICAS", "LEADER", "TERM", "COMMIT", "MEMBERS", "SETTLED"),
        (
            (
                name,
                group["replicas"],
                group["leader"] or "-",
                term_text(group["term"]),
                "-" if group["commit"] is None else group["commit"],
                ",".join(group["members"]),
                "yes" if sorted(group["members"]) == sorted(group["desired"]) else "moving",
            )
            for name, group in sorted(groups.items())
        ),
    )


def print_nodes(answer: Mapping[str, Any]) -> None:
    """The answer of ``nodes`` for people."""
    unreachable = answer["unreachable"]
    rows = []
    for zone, names in sorted(answer["nodes"].items()):
        for name in sorted(names):
            state = f"unreachable since {_clock(unreachable[name])}" if name in unreachable else "active"
            rows.append((zone, name, state))
    print_table(("ZONE", "NODE", "STATE"), rows)


def print_members(answer: Mapping[str, Any]) -> None:
    """The answer of ``members`` for people."""
    click.echo(
        f"group {answer['name']} (uid {answer['uid']}): {answer['replicas']} replicas, "
        f"leader {answer['leader'] or 'none'}, term {term_text(answer['term'])}"
    )
    print_table(
        ("NODE", "ZONE", "RANK", "HASH", "DESIRED", "ROLE"),
        (
            (row["node"], row["zone"], row["rank"], _hash(row["hash"]), "yes" if row["desired"] else "-", row["role"])
            for row in answer["order"]
        ),
    )


def print_leaderless(groups: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """The answer of ``leaderless`` for people."""
    if not groups:
        say("every group has a leader")
        return
    rows = [
        (name, node, seen["role"], term_text(seen["term"]), seen["last_index"], seen.get("leader") or "-")
        for name, by_node in sorted(groups.items())
        for node, seen in (sorted(by_node.items()) or [("none reachable", {"role": "-", "term": 0, "last_index": "-"})])
    ]
    print_table(("GROUP", "NODE", "ROLE", "TERM", "LAST INDEX", "FOLLOWS"), rows)


def print_removed_node(node: str, answer: Mapping[str, Any]) -> None:
    """The answer of ``remove-dead-node`` for people."""
    for name in answer.get("recovered") or ():
        click.echo(f"recovered: {name}")
    for name in answer.get("waiting") or ():
        click.echo(f"waiting: {name}")
    say(answer.get("message") or f"node {node} is removed")


def show_draining(ask_status: Callable[[], Mapping[str, Any]]) -> None:
    """Show a progress bar on stderr until this node hosts no member any more.

    Args:
        ask_status: asks the node for its ``status``; errors of raftfleet mean "not now", for up to half a minute.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("members moved away"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        total: int | None = None
        task = progress.add_task("drain", total=None)
        heard_at = time.monotonic()
        while True:
            try:
                status = ask_status()
                heard_at = time.monotonic()
            except errors.RaftFleetError:
                if time.monotonic() - heard_at > 30.0:
                    raise
                time.sleep(0.2)
                continue
            left = sum(worker["members"] for worker in status["workers"])
            total = max(total or 0, left)
            progress.update(task, total=total, completed=total - left)
            if status["state"] == "inactive":
                return
            time.sleep(0.2)


def term_text(term: int) -> str:
    """A term as ``election`` or, once an operator repaired a lost majority, ``epoch/election``."""
    epoch, election = term >> 32, term & 0xFFFFFFFF
    return f"{epoch}/{election}" if epoch else str(election)


def _clock(unix_s: float) -> str:
    return datetime.datetime.fromtimestamp(unix_s).astimezone().isoformat(sep=" ", timespec="seconds")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"


def _hash(value: object) -> str:
    return f"{value:016x}" if isinstance(value, int) else str(value)

"""``raftfleet-node wal ls|dump|verify DIR``: what lies in a data directory, without a node.

Everything here only reads, takes no lock and writes rows as they are found, so it works on the directory of a node that
runs, of one that will not start, or on a copy, however large. DIR is a node's data directory (all shards, one after the
other) or one shard's. What the rows say is in :mod:`raftfleet.storage.inspect`.

Exit codes: 0 done; 1 damage was found, or a directory cannot be read; 2 DIR is no data directory, or a wrong option.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from raftfleet.node.cli_common import EXIT_FAILED
from raftfleet.node.cli_output import json_ready, print_table, say, term_text


@click.group()
def wal() -> None:
    """Look into a data directory: reads only, needs no node, works on a copy.

    \b
    raftfleet-node wal ls /var/lib/raftfleet
    raftfleet-node wal dump /var/lib/raftfleet --group counter --json | jq .
    raftfleet-node wal verify /var/lib/raftfleet
    """


def _wal_command(function: Callable[..., None]) -> click.Command:
    function = click.option(
        "--json", "as_json", is_flag=True, envvar="RAFTFLEET_JSON", show_envvar=True, help="One JSON object per line."
    )(function)
    function = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))(function)
    return wal.command(name=function.__name__)(function)


def _shards(directory: Path) -> list[tuple[str, str]]:
    """``(name, path)`` of the shards in DIR; a usage error if it holds none."""
    from raftfleet.storage import inspect

    if not directory.is_dir():
        raise click.UsageError(f"{directory} is not a directory: name a node's --data-dir, or a copy of one")
    shards = inspect.shard_directories(str(directory))
    if not shards:
        raise click.UsageError(
            f"{directory} is not a data directory: neither it nor a directory in it has a `wal`; "
            "name a node's --data-dir, one shard's directory in it, or a copy of either"
        )
    return shards


def _print_line(row: dict[str, Any]) -> None:
    click.echo(json.dumps(json_ready(row), ensure_ascii=False))


@_wal_command
def ls(directory: Path, as_json: bool) -> None:
    """List the log segments and snapshots in DIR, and whose they are."""
    from raftfleet.storage import inspect

    shards = _shards(directory)
    rows: Iterator[dict[str, Any]] = (
        {"shard": name, **row} for name, path in shards for row in inspect.list_directory(path)
    )
    if as_json:
        for row in rows:
            _print_line(row)
        return
    print_table(
        ("SHARD", "FILE", "STATE", "BYTES", "WHAT"),
        ((row["shard"], row["file"], row["state"], row.get("size_bytes", "-"), _what(row)) for row in rows),
    )


def _what(row: dict[str, Any]) -> str:
    if "first_batch" in row:
        return f"instance {row['instance']:016x}, from batch {row['first_batch']}"
    if "index" in row:
        return f"group {row['name']} ({row['uid']:#x}) up to index {row['index']}, term {term_text(row['term'])}"
    return str(row.get("why", ""))


@_wal_command
@click.option(
    "--group",
    envvar="RAFTFLEET_GROUP",
    show_envvar=True,
    help="Only this group's records: its name, or its uid (0x10000000001).",
)
@click.option(
    "--data",
    is_flag=True,
    envvar="RAFTFLEET_DATA",
    show_envvar=True,
    help="With the bytes of entries, in base64. They are your users' data.",
)
def dump(directory: Path, as_json: bool, group: str | None, data: bool) -> None:
    """Print every record in DIR, in the order in which it was written.

    Damaged and lost places are records of the kinds `damaged` and `lost`; `tail` is what a write that never ended left.
    """
    from raftfleet.storage import inspect

    shards = _shards(directory)
    wanted: list[tuple[str, str, int | None]] = [(name, path, None) for name, path in shards]
    if group is not None:
        wanted = [(name, path, uid) for name, path in shards for uid in _uids(path, group)]
        if not wanted:
            raise click.UsageError(
                f"no record in {directory} is of a group {group!r}: "
                f"`raftfleet-node wal verify {directory}` lists the groups"
            )
    for name, path, uid in wanted:
        for row in inspect.dump(path, uid=uid, data=data):
            row = {"shard": name, **row}
            _print_line(row) if as_json else click.echo(_record_text(row))


def _uids(path: str, group: str) -> list[int]:
    """Uids of all groups that have, or had, this name; or the one that is named as a number."""
    from raftfleet.storage import inspect

    uids = sorted(uid for uid, name in inspect.names(path).items() if name == group)
    if not uids:
        try:
            uid = int(group, 0)
        except ValueError:
            return []
        uids = [uid] if any(row.get("uid") == uid for row in inspect.dump(path)) else []
    return uids


def _record_text(row: dict[str, Any]) -> str:
    place = f"{row.pop('shard')} {row.pop('segment')[:16].lstrip('0')}:{row.pop('offset')}"
    batch, kind = row.pop("batch", "-"), row.pop("kind")
    if "uid" in row:
        row["uid"] = f"{row['uid']:#x}"
    if "term" in row:
        row["term"] = term_text(row["term"])
    rest = " ".join(f"{key}={json.dumps(json_ready(value), ensure_ascii=False)}" for key, value in row.items())
    return f"{place} batch {batch} {kind} {rest}"


@_wal_command
def verify(directory: Path, as_json: bool) -> None:
    """Read all of DIR as a start would, and say what is damaged.

    Exit code 0: nothing. 1: something; it is said where and what, and which group's member here is refused by a start.
    A torn tail is no damage: it is what a write that never ended left, and nobody was told that it had.
    """
    from raftfleet.storage import inspect
    from raftfleet.storage.base import StorageError, StorageTooNew

    reports: list[dict[str, Any]] = []
    missing = _missing(directory)
    for row in missing:
        _print_line(row) if as_json else _print_report(row)
    for name, path in _shards(directory) if not missing or inspect.shard_directories(str(directory)) else ():
        try:
            report = inspect.verify(path)
        except StorageError as error:
            report = {"ok": False, "damaged": [{"uid": None, "what": str(error)}], "groups": [], "torn_tail_bytes": 0}
            if isinstance(error, StorageTooNew):
                report["too_new"] = True
        report = {"shard": name, **report}
        reports.append(report)
        _print_line(report) if as_json else _print_report(report)
    if missing or not all(report["ok"] for report in reports):
        if any(report.get("too_new") for report in reports):
            say("Next: nothing is known to be damaged: look at it with the newer raftfleet that wrote it.")
            click.get_current_context().exit(EXIT_FAILED)
        refused = any(damage["uid"] is not None for report in reports for damage in report["damaged"])
        what_then = (
            "A start refuses the groups that are named, and their members come back from the other nodes"
            if refused
            else "No group is named, so no member is refused because of its own records"
        )
        say(f"Next: keep a copy of the directory. {what_then}: see docs/storage.md.")
        click.get_current_context().exit(EXIT_FAILED)


def _missing(directory: Path) -> list[dict[str, Any]]:
    """Reports of the shards whose directories should be there by the word of the node's layout."""
    from raftfleet.node.data_dir import LAYOUT_NAME, DataDirRefused, read_layout, shard_indexes

    if not directory.is_dir() or not (directory / LAYOUT_NAME).is_file():
        return []  # one shard, or a copy of some
    try:
        layout = read_layout(directory)
    except DataDirRefused as error:
        return [_lost_report(LAYOUT_NAME, str(error))]
    assert layout is not None
    # Noted at the second start; but no node remembers a fleet before all of its shards have begun.
    count = layout["shards"] or (layout["workers"] if (directory / "founding").exists() else 0)
    return [
        _lost_report(
            f"shard-{index}",
            f"{directory}/shard-{index} is missing; a start makes an empty one, and what it held comes back only from "
            "the other nodes",
        )
        for index in sorted(set(range(count)) - set(shard_indexes(directory)))
    ]


def _lost_report(name: str, what: str) -> dict[str, Any]:
    return {"shard": name, "ok": False, "damaged": [{"uid": None, "what": what}], "groups": [], "torn_tail_bytes": 0}


def _print_report(report: dict[str, Any]) -> None:
    verdict = "whole" if report["ok"] else ("of a newer raftfleet" if report.get("too_new") else "DAMAGED")
    instance = f", instance {report['instance']:016x}" if "instance" in report else ""
    torn = f", torn tail of {report['torn_tail_bytes']} bytes" if report["torn_tail_bytes"] else ""
    click.echo(f"shard {report['shard']}: {verdict}{instance}, {len(report['groups'])} groups{torn}")
    for damage in report["damaged"]:
        click.echo(f"  {damage['what']}")
    if report["groups"]:
        print_table(
            ("  GROUP", "UID", "TERM", "ENTRIES", "SNAPSHOT"),
            (
                (
                    f"  {row['name']}",
                    f"{row['uid']:#x}",
                    term_text(row["term"]),
                    f"{row['first_index']}-{row['last_index']}" if row["last_index"] >= row["first_index"] else "none",
                    row["snapshot_index"] or "-",
                )
                for row in report["groups"]
            ),
        )

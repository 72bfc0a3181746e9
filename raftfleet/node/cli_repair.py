"""``raftfleet-node repair`` and ``audit``: the loss of a majority, shown, confirmed, repaired, and remembered.

``repair`` shows first what every reachable member of the groups without a majority has, and whom it would give up. It
acts on exactly that, after a yes: if the picture has changed meanwhile, the node refuses and nothing is given up.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from shlex import quote
from typing import Any

import click

from raftfleet.core.names import FLEET_GROUP
from raftfleet.node.cli_common import EXIT_FAILED, connected, node_command, timeout_option
from raftfleet.node.cli_output import print_json, print_table, say, term_text

_commands = click.Group()

VERDICTS = {
    "electing": "has a majority: it needs no repair, only time",
    "repairable": "has lost its majority; it can go on with what is left",
    "blocked": "has lost its majority; a node answers that should have a member and shows none: look into its log",
    "extinct": "no reachable node has a member that could go on",
}


@node_command(_commands, as_json=True)
@click.option("--yes", is_flag=True, envvar="RAFTFLEET_YES", show_envvar=True, help="Do not ask.")
@click.option(
    "--dry-run", is_flag=True, envvar="RAFTFLEET_DRY_RUN", show_envvar=True, help="Only show what would be done."
)
@timeout_option(60.0)
def repair(run_dir: Path | None, as_json: bool, yes: bool, dry_run: bool, timeout: float) -> None:
    """Bring groups back that have lost the majority of their members for good.

    \b
    Shows what every reachable member of these groups has (term, last index), and what would be given up: nodes that do
    not answer, what nodes had that run again without it, and members whose records are damaged on nodes that run. After
    a yes, the members that are left go on from the most complete of them, in a new epoch. What only those had that are
    given up is lost, acknowledged commands too. A node that was given up and comes back is refused and must be started
    anew; damaged members come back as new ones by themselves.

    Start whatever can still be started before you run this. The record of it stays in each group: see `audit`.
    """
    with connected(run_dir) as fleet:
        plan = fleet.call("repair_plan", {}, min(timeout, 10.0))
        if not as_json or not yes:
            _show_plan(plan)
        if not plan["dead"] and not plan["former"] and not plan["damaged"]:
            say("there is nothing to give up: " + _nothing_to_do(plan))
            if as_json:
                print_json({"plan": plan, "done": None})
            click.get_current_context().exit(0 if _is_well(plan) else EXIT_FAILED)
        if dry_run:
            say("nothing was done")
            if as_json:
                print_json({"plan": plan, "done": None})
            return
        if not yes:
            click.confirm("Give them up for good?", abort=True, err=True)
        word = {part: plan[part] for part in ("dead", "former", "damaged")}
        done = fleet.call("repair", word, timeout)
    if as_json:
        print_json({"plan": plan, "done": done})
    else:
        for name in done["recovered"]:
            term = done["terms"].get(name)
            click.echo(f"recovered: {name}" + (f", term {term_text(term)}" if term else ""))
        for name in done["waiting"]:
            click.echo(f"waiting: {name}")
    say(done["message"])
    if done["waiting"]:
        click.get_current_context().exit(EXIT_FAILED)


def _is_well(plan: dict[str, Any]) -> bool:
    return all(group["verdict"] == "electing" for group in plan["groups"])


def _nothing_to_do(plan: dict[str, Any]) -> str:
    if not plan["groups"]:
        return "every group has a leader"
    if _is_well(plan):
        return "every group has a majority; those without a leader elect one: look again in a few seconds"
    return "no group that lost its majority can be brought back by giving nodes up"


def _show_plan(plan: dict[str, Any]) -> None:
    """On stderr: stdout is for what was done."""
    rows = []
    for group in plan["groups"]:
        say(f"{group['name']}: {VERDICTS.get(group['verdict'], group['verdict'])}")
        for member in sorted(group["members"], key=lambda member: (not member["is_voter"], member["node"])):
            known = member["state"] == "answers"
            term, last_index = (term_text(member["term"]), member["last_index"]) if known else ("-", "-")
            role = "voter" if member["is_voter"] else "learner"
            state = "damaged: lost what it had" if member["state"] == "damaged" else member["state"]
            rows.append((group["name"], member["node"], role, state, term, last_index))
    if rows:
        print_table(("GROUP", "NODE", "MEMBER", "STATE", "TERM", "LAST INDEX"), rows, err=True)
    for name in plan["dead"]:
        since = plan["unreachable"].get(name)
        silent = f"silent since {_clock(since)}" if since else "it answers no more as what it was"
        say(f"would be given up: node {name}, {silent}")
    for name in plan["former"]:
        say(f"would be given up: what node {name} had before it was started again without it")
    for group in plan["groups"]:
        nodes = sorted(m["node"] for m in group["members"] if m["instance"] in group["damaged"])
        if nodes:
            say(f"would be given up: the damaged members of {group['name']} on {', '.join(nodes)}")
        if group["verdict"] == "extinct":
            for line in _ways_out(group):
                say(line)


def _ways_out(group: dict[str, Any]) -> list[str]:
    """What an operator can do for a group of which nobody can go on."""
    name = group["name"]
    if name == FLEET_GROUP:
        return [
            "start the nodes that are missing. If none has these records any more, the fleet cannot go on: save what "
            "each group still has (`raftfleet-node export --stale --all DIR`), stop all nodes, move their data "
            "directories away, start the nodes anew, and put the states back with `raftfleet-node restore DIR`"
        ]
    lines = [f"{name}: start the nodes that are missing: one with a whole member brings the group back"]
    left = [member for member in group["members"] if member["archived"]]
    for member in sorted(left, key=lambda member: -member["last_index"]):
        lines.append(
            f"{name}: node {member['node']} kept a snapshot as of index {member['last_index']}: {member['archived']}"
        )
    file = max(left, key=lambda member: member["last_index"])["archived"] if left else "FILE"
    where = "copy that file away, then" if left else "with a file of `raftfleet-node export`, or of an archive/ folder:"
    lines.append(
        f"{name}: else, {where} `raftfleet-node remove-group {quote(name)}` and "
        f"`raftfleet-node restore {quote(file)} --name {quote(name)} --machine MODULE:CLASS`; without any copy, "
        f"`raftfleet-node add-group {quote(name)} --machine MODULE:CLASS` begins it anew and empty"
    )
    return lines


@node_command(_commands, as_json=True)
@click.argument("group")
def audit(group: str, run_dir: Path | None, as_json: bool) -> None:
    """Show every repair that GROUP has been through: when, with whom, without whom.

    \b
    `$fleet` is the group that keeps the fleet's own records:
        raftfleet-node audit '$fleet'
    """
    with connected(run_dir) as fleet:
        records = fleet.call("group_status", {"name": group}, 5.0)["audit"]
    if as_json:
        print_json(records)
        return
    if not records:
        say(f"group {group} was never repaired")
        return
    print_table(
        ("WHEN", "EPOCH", "INDEX", "WENT ON WITH", "GAVE UP", "WENT ON FROM"),
        (
            (
                _clock(record["wall_us"] / 1e6),
                record["epoch"],
                record["index"],
                ",".join(record["voter_nodes"]),
                ",".join(record["dead_nodes"]),
                f"term {term_text(record['went_on_from'][0])}, index {record['went_on_from'][1]}",
            )
            for record in records
        ),
    )


def _clock(unix_s: float) -> str:
    return datetime.datetime.fromtimestamp(unix_s).astimezone().isoformat(sep=" ", timespec="seconds")

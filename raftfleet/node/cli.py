"""The command line: ``raftfleet-node``.

Rules for every command: results go to stdout, narration and progress to stderr; the exit code is 0, 1 (it failed) or
2 (it was called wrongly); an error is told in sentences, outermost first, and ends with what to do next. Every option
has an environment variable, which its help names.

This module holds no logic of the runtime. ``start`` (:mod:`raftfleet.node.cli_start`) hands a configuration to the
supervisor; ``wal`` (:mod:`raftfleet.node.cli_wal`), ``keygen`` and ``demo`` need no node; everything else asks the
local node through :func:`raftfleet.connect`. Modules are imported inside the commands: ``--help`` and ``status`` must
not pay for the runtime.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raftfleet.errors import ConfigError, OutcomeUnknown, RaftFleetError
from raftfleet.node import cli_output
from raftfleet.node.cli_common import EXIT_FAILED, EXIT_USAGE, connected, node_command, timeout_option
from raftfleet.node.cli_repair import audit, repair
from raftfleet.node.cli_start import start
from raftfleet.node.cli_states import export, read_state, restore
from raftfleet.node.cli_wal import wal

if TYPE_CHECKING:
    pass

STOP_DEADLINE_S = 60.0
"""A drain hands over every leadership first; a node kills its own children five seconds after they were told to end."""


class _Commands(click.Group):
    """A group of commands in which errors of raftfleet end the process in sentences and with the right code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # who read the results has seen enough: click ends the process
        except (RaftFleetError, OSError) as error:
            if os.environ.get("RAFTFLEET_DEBUG"):
                raise
            cli_output.say_error(error, command=ctx.invoked_subcommand or "")
            ctx.exit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED)


def _version() -> str:
    try:
        return version("raftfleet")
    except PackageNotFoundError:
        return "(not installed)"


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(_version(), prog_name="raftfleet-node")
def main() -> None:
    """Run and inspect a node of a raftfleet: many Raft consensus groups on a few machines.

    New here? `raftfleet-node demo` shows the whole story in a minute and needs nothing configured.

    Results go to stdout, narration to stderr. Exit codes: 0 done, 1 failed, 2 called wrongly. With RAFTFLEET_DEBUG=1
    an error shows its traceback.
    """


main.add_command(start)
main.add_command(wal)
main.add_command(repair)
main.add_command(audit)
main.add_command(export)
main.add_command(restore)


# -------------------------------------------------------------------- asking the local node


def _node_command(*, as_json: bool = False) -> Callable[[Callable[..., None]], click.Command]:
    return node_command(main, as_json=as_json)


@_node_command(as_json=True)
def status(run_dir: Path | None, as_json: bool) -> None:
    """Show this node: its state, the fleet it sees, its workers."""
    with connected(run_dir) as fleet:
        answer = fleet.call("status", {}, 5.0)
    cli_output.print_json(answer) if as_json else cli_output.print_status(answer)


@_node_command(as_json=True)
def groups(run_dir: Path | None, as_json: bool) -> None:
    """List all consensus groups with their leaders and members."""
    with connected(run_dir) as fleet:
        answer = fleet.call("groups_detail", {}, 10.0)
    cli_output.print_json(answer) if as_json else cli_output.print_groups(answer)


@_node_command(as_json=True)
def nodes(run_dir: Path | None, as_json: bool) -> None:
    """List the active nodes by zone, and those that cannot be reached."""
    with connected(run_dir) as fleet:
        answer = {
            "nodes": fleet.call("active_nodes", {}, 5.0),
            "unreachable": fleet.call("unreachable_nodes", {}, 5.0),
        }
    cli_output.print_json(answer) if as_json else cli_output.print_nodes(answer)


@_node_command(as_json=True)
@click.argument("group")
def members(group: str, run_dir: Path | None, as_json: bool) -> None:
    """Show where GROUP's members are, where they should be, and why: the order of the nodes for it."""
    with connected(run_dir) as fleet:
        answer = fleet.call("members", {"name": group}, 5.0)
    cli_output.print_json(answer) if as_json else cli_output.print_members(answer)


@_node_command(as_json=True)
def leaderless(run_dir: Path | None, as_json: bool) -> None:
    """List the groups without a leader, with what each reachable member says of them."""
    with connected(run_dir) as fleet:
        answer = fleet.call("leaderless_groups", {}, 10.0)
    cli_output.print_json(answer) if as_json else cli_output.print_leaderless(answer)


# -------------------------------------------------------------------- the node in its fleet


@_node_command()
@click.option("--zone", required=True, envvar="RAFTFLEET_ZONE", show_envvar=True, help="Failure domain of this node.")
def activate(zone: str, run_dir: Path | None) -> None:
    """Let this node take part in the fleet and host members."""
    with connected(run_dir) as fleet:
        fleet.call("activate", {"zone": zone}, 30.0)
    cli_output.say(f"this node is active in zone {zone}")


@_node_command()
@click.option(
    "--wait",
    is_flag=True,
    envvar="RAFTFLEET_WAIT",
    show_envvar=True,
    help="Return when no member is left here: the node can then be stopped without loss.",
)
def deactivate(wait: bool, run_dir: Path | None) -> None:
    """Take this node out of the fleet: its members move to other nodes."""
    with connected(run_dir) as fleet:
        fleet.call("deactivate", {"wait": False}, 30.0)
        if wait:
            cli_output.show_draining(lambda: fleet.call("status", {}, 5.0))
    cli_output.say("this node hosts no member any more" if wait else "this node is deactivating: see `status`")


@_node_command()
@click.option(
    "--drain",
    is_flag=True,
    envvar="RAFTFLEET_DRAIN",
    show_envvar=True,
    help="First move all members to other nodes, as `deactivate --wait` does.",
)
def stop(drain: bool, run_dir: Path | None) -> None:
    """Stop this machine's node and return when it is gone."""
    with connected(run_dir) as fleet:
        node_dir = fleet.run_dir
        if drain:
            fleet.call("deactivate", {"wait": False}, 30.0)
            cli_output.show_draining(lambda: fleet.call("status", {}, 5.0))
        # Its last answer may be overtaken by its end, which is what is waited for anyway.
        with contextlib.suppress(OutcomeUnknown):
            fleet.call("stop", {"drain": drain}, 10.0)
    _wait_gone(node_dir)
    cli_output.say("the node has stopped")


def _wait_gone(run_dir: Path) -> None:
    import psutil

    from raftfleet.node import rundir

    deadline = time.monotonic() + STOP_DEADLINE_S
    while (holder := rundir.lock_holder(run_dir)) is not None and psutil.pid_exists(holder):
        if time.monotonic() > deadline:
            raise RaftFleetError(
                f"the node was told to stop, but process {holder} is there after {STOP_DEADLINE_S:g} s"
            )
        time.sleep(0.05)


@_node_command()
@click.argument("node")
def remove_dead_node(node: str, run_dir: Path | None) -> None:
    """Declare NODE gone for good: its members are replaced, even where a majority was lost.

    This is the operator's word, and nothing checks it: a node that still runs is shut out and must be restarted.
    """
    with connected(run_dir) as fleet:
        answer = fleet.call("remove_dead_node", {"node": node}, 60.0)
    cli_output.print_removed_node(node, answer)


# -------------------------------------------------------------------- groups


@_node_command()
@click.argument("name")
@click.option(
    "--replicas",
    type=click.IntRange(min=1),
    default=3,
    envvar="RAFTFLEET_REPLICAS",
    show_envvar=True,
    help="Members to keep, on as many nodes.",
)
@click.option(
    "--machine",
    required=True,
    envvar="RAFTFLEET_MACHINE",
    show_envvar=True,
    metavar="MODULE:CLASS",
    help="State machine, as the nodes import it from their --app-dir.",
)
@click.option("--hook", envvar="RAFTFLEET_HOOK", show_envvar=True, metavar="MODULE:CLASS", help="Leader hook.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    envvar="RAFTFLEET_SET",
    show_envvar=True,
    metavar="FIELD=JSON",
    help="Any other field of GroupConfig, such as election_timeout_s=2; repeatable.",
)
@click.option(
    "--restore",
    "restore_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="RAFTFLEET_RESTORE",
    show_envvar=True,
    help="Begin with the state in this file, which `export` wrote or which lies in an archive.",
)
@timeout_option(5.0)
def add_group(
    name: str,
    replicas: int,
    machine: str,
    hook: str | None,
    settings: tuple[str, ...],
    restore_file: Path | None,
    timeout: float,
    run_dir: Path | None,
) -> None:
    """Add consensus group NAME and return when it has a leader."""
    from raftfleet.core.config import GroupConfig

    state = read_state(restore_file) if restore_file is not None else None
    fields: dict[str, Any] = {"machine": machine, "hook": hook}
    fields.update(_parse_setting(setting) for setting in settings)
    try:
        config = GroupConfig.from_dict(fields)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with connected(run_dir) as fleet:
        fleet.add_consensus_group(name, replicas, config, restore=state, timeout=timeout)
        leader = fleet.whereis_leader(name)
    cli_output.say(f"group {name} is there" + (f", led by node {leader.node}" if leader else ""))


def _parse_setting(setting: str) -> tuple[str, Any]:
    field, separator, text = setting.partition("=")
    if not separator:
        raise click.UsageError(f"--set takes FIELD=JSON, such as election_timeout_s=2, not {setting!r}")
    return field, _parse_json(text, f"--set {field}")


@_node_command()
@click.argument("name")
def remove_group(name: str, run_dir: Path | None) -> None:
    """Remove consensus group NAME and its state from all nodes."""
    with connected(run_dir) as fleet:
        fleet.remove_consensus_group(name)
    cli_output.say(f"group {name} is removed")


@_node_command()
@click.argument("name")
@click.argument("json_argument", metavar="JSON")
@timeout_option(0.5)
def command_command(name: str, json_argument: str, timeout: float, run_dir: Path | None) -> None:
    """Send a command to group NAME and print its result as JSON.

    \b
    JSON is the argument, quoted for the shell:
        raftfleet-node command counter '"inc"'
        raftfleet-node command counter '["set", 5]'
    """
    argument = _parse_json(json_argument, "JSON")
    with connected(run_dir) as fleet:
        result = fleet.command(name, argument, timeout=timeout)
    cli_output.print_json(result)


@_node_command()
@click.argument("name")
@click.argument("json_argument", metavar="JSON")
@click.option(
    "--stale",
    is_flag=True,
    envvar="RAFTFLEET_STALE",
    show_envvar=True,
    help="Ask any member: works without a leader, and the answer may be old.",
)
@timeout_option(0.5)
def query_command(name: str, json_argument: str, stale: bool, timeout: float, run_dir: Path | None) -> None:
    """Ask group NAME and print the answer as JSON. The argument is as for `command`."""
    argument = _parse_json(json_argument, "JSON")
    consistency = "stale" if stale else "linearizable"
    with connected(run_dir) as fleet:
        answer = fleet.query(name, argument, consistency=consistency, timeout=timeout)
    cli_output.print_json(answer)


@_node_command()
@click.argument("name")
@click.argument("node")
def transfer(name: str, node: str, run_dir: Path | None) -> None:
    """Make the member on NODE the leader of group NAME."""
    with connected(run_dir) as fleet:
        fleet.replace_leader(name, node)
    cli_output.say(f"group {name} is led by node {node}")


def _parse_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = f"; a string needs quotes of its own: '\"{text}\"'" if text.isidentifier() else ""
        raise click.UsageError(f"{what} is not valid JSON ({error}): {text!r}{hint}") from error


# -------------------------------------------------------------------- keys and demo


@main.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def keygen(file: Path) -> None:
    """Make this node's CURVE key pair: the secret key goes to FILE, the public key to stdout.

    \b
    FILE is new and only its owner can read it: an existing one is never overwritten. The public key belongs into
    the list of all nodes' public keys, a line of its own, the same file on every node:
        raftfleet-node keygen /etc/raftfleet/secret.key
    """
    from raftfleet.transport.curve import generate_keys, write_secret_key

    keys = generate_keys()
    try:
        write_secret_key(file, keys)
    except FileExistsError as error:
        raise ConfigError(f"{file} is there already, and a secret key is never overwritten: name a new file") from error
    click.echo(keys.public_key)
    cli_output.say(f"the secret key is in {file}: give it to --curve-secret-file, and chown it to the node's user")


@main.command()
@click.option("--no-color", is_flag=True, envvar="NO_COLOR", show_envvar=True, help="Plain text.")
def demo(no_color: bool) -> None:
    """The whole story in a minute on this machine, with nothing to configure.

    Four nodes in two zones, five groups, a node killed, a node added. It narrates on stderr, verifies what it claims,
    and ends with what it verified on stdout.
    """
    from raftfleet.node.demo import run_demo

    sys.exit(0 if run_demo(plain=no_color) else EXIT_FAILED)


if __name__ == "__main__":
    main(prog_name="raftfleet-node")

"""``raftfleet-node start``: its options, and nothing else.

Each may also stand in a variable or in a TOML file. They are resolved, with their defaults, by
:mod:`raftfleet.node.config`; here they are only named and explained.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def _start_option(*names: str, help: str, envvar: str, **attributes: Any) -> Callable[[Any], Any]:
    """An option of ``start``: its variable is only named here and read, with the TOML file, by node.config."""
    return click.option(*names, default=None, help=f"{help}  [env: {envvar}]", show_default=False, **attributes)


@click.command()
@_start_option(
    "--name", envvar="RAFTFLEET_NAME", help="The node's name, unique in the fleet. Default: the host's name."
)
@_start_option(
    "--zone",
    envvar="RAFTFLEET_ZONE",
    help="Failure domain; members of a group are spread over zones. "
    "With it the node activates by itself, without it it waits for `activate`.",
)
@_start_option(
    "--bind",
    envvar="RAFTFLEET_BIND",
    metavar="HOST:PORT",
    help="The manager's address. Shard i listens on PORT + 1 + i.",
)
@_start_option(
    "--peers",
    envvar="RAFTFLEET_PEERS",
    metavar="HOST:PORT,…",
    help="Managers of nodes to meet. If none is in a fleet yet, a majority of them founds one.",
)
@_start_option(
    "--workers",
    envvar="RAFTFLEET_WORKERS",
    type=int,
    help="Shard processes. Default: the CPUs that this process may use.",
)
@_start_option(
    "--data-dir",
    envvar="RAFTFLEET_DATA_DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep logs and snapshots here. Without it groups live in memory.",
)
@_start_option(
    "--run-dir",
    envvar="RAFTFLEET_RUN_DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Sockets and leader table. Default: $XDG_RUNTIME_DIR/raftfleet/NAME or /run/raftfleet/NAME.",
)
@_start_option(
    "--app-dir",
    "app_dirs",
    envvar="RAFTFLEET_APP_DIR",
    multiple=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder from which state machines are imported; repeatable.",
)
@_start_option(
    "--config",
    "config_file",
    envvar="RAFTFLEET_CONFIG",
    metavar="FILE.toml",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Any of these options. A flag wins over a variable, a variable over the file.",
)
@_start_option(
    "--socket-group",
    envvar="RAFTFLEET_SOCKET_GROUP",
    metavar="GROUP",
    help="Unix group whose members may use this node. Default: only this user.",
)
@_start_option(
    "--insecure",
    is_flag=True,
    envvar="RAFTFLEET_INSECURE",
    help="Allow an address that is not loopback without CURVE keys. Anyone who reaches it is trusted.",
)
@_start_option(
    "--curve-secret-file",
    envvar="RAFTFLEET_CURVE_SECRET_FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="This node's CURVE secret key.",
)
@_start_option(
    "--curve-public-keys-file",
    envvar="RAFTFLEET_CURVE_PUBLIC_KEYS_FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Public keys of all nodes of the fleet.",
)
@_start_option(
    "--transport",
    envvar="RAFTFLEET_TRANSPORT",
    type=click.Choice(["auto", "zeromq", "tcp"], case_sensitive=False),
    help="What nodes speak to each other; all nodes of a fleet the same. Default: auto, which is zeromq (encrypted) "
    "with CURVE keys and tcp (faster) without.",
)
@_start_option(
    "--node-purge-failure-time-window",
    "node_purge_failure_time_window_s",
    type=float,
    metavar="SECONDS",
    envvar="RAFTFLEET_NODE_PURGE_FAILURE_TIME_WINDOW",
    help="A node that is unreachable for so long is removed and its members are replaced. Default: 600.",
)
@_start_option(
    "--beat-interval",
    "beat_interval_s",
    type=float,
    metavar="SECONDS",
    envvar="RAFTFLEET_BEAT_INTERVAL",
    help="Time between beats on each link. Default: 0.2.",
)
@_start_option(
    "--log-level",
    envvar="RAFTFLEET_LOG_LEVEL",
    help="debug, info, warning or error. Default: info.",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
)
@_start_option(
    "--log-format",
    envvar="RAFTFLEET_LOG_FORMAT",
    type=click.Choice(["text", "json"]),
    help="How log lines look. Default: text.",
)
def start(**flags: Any) -> None:
    """Run a node in the foreground, until SIGTERM or Ctrl-C.

    Logs to stderr; prints one line `ready` with its endpoint when it serves, and says so to systemd.

    \b
    One node alone:  raftfleet-node start --name n1 --zone z1 --bind 127.0.0.1:7400
    Three hosts:     raftfleet-node start --name n1 --zone z1 --bind 10.0.0.1:7400 \\
                         --peers 10.0.0.1:7400,10.0.0.2:7400,10.0.0.3:7400
    """
    from raftfleet.node import config, supervisor

    # By identity where it can be: 0 equals False, and --workers 0 is to be refused, not to be taken for "not given".
    given = {name: value for name, value in flags.items() if value is not None and value is not False and value != ()}
    config_file = given.pop("config_file", None)
    sys.exit(supervisor.run(config.load(given, os.environ, config_file)))

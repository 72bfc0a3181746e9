"""What all commands that ask a node have in common: how they find it, how long they wait, how they print.

Modules of the runtime are imported inside the functions: ``--help`` must not pay for them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from raftfleet.client.sync import Fleet

EXIT_FAILED = 1
EXIT_USAGE = 2


def node_command(group: click.Group, *, as_json: bool = False) -> Callable[[Callable[..., None]], click.Command]:
    """A command of ``group`` that asks the local node: takes ``--run-dir`` and, if it prints data, ``--json``."""

    def decorate(function: Callable[..., None]) -> click.Command:
        if as_json:
            function = click.option(
                "--json", "as_json", is_flag=True, envvar="RAFTFLEET_JSON", show_envvar=True, help="Print JSON."
            )(function)
        function = click.option(
            "--run-dir",
            type=click.Path(file_okay=False, path_type=Path),
            envvar="RAFTFLEET_RUN_DIR",
            show_envvar=True,
            help="Run directory of the node to ask. Default: that of this machine's only node.",
        )(function)
        name = function.__name__.removesuffix("_command").replace("_", "-")
        return group.command(name)(function)

    return decorate


def timeout_option(default: float) -> Callable[[Any], Any]:
    """``--timeout SECONDS``."""
    return click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=default,
        envvar="RAFTFLEET_TIMEOUT",
        show_envvar=True,
        metavar="SECONDS",
        help="How long to wait for an answer.",
    )


@contextlib.contextmanager
def connected(run_dir: Path | None) -> Iterator[Fleet]:
    """A client of the node. What it says of an argument that is of no use (ValueError, TypeError) is a usage error."""
    import raftfleet

    with raftfleet.connect(run_dir) as fleet:
        try:
            yield fleet
        except (ValueError, TypeError) as error:
            if os.environ.get("RAFTFLEET_DEBUG"):
                raise
            raise click.UsageError(str(error)) from error

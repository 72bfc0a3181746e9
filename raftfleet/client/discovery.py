"""Which node a client means, and whether it is there."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from raftfleet.errors import NodeNotRunning
from raftfleet.node import rundir
from raftfleet.node.leader_table import LeaderTableReader


def find_run_dir(run_dir: str | os.PathLike[str] | None = None, environ: Mapping[str, str] | None = None) -> Path:
    """The run directory of the node that a client means, as an absolute path.

    The one given; else ``$RAFTFLEET_RUN_DIR``; else that of the only node that runs at a default place
    (``$XDG_RUNTIME_DIR/raftfleet`` or ``/run/raftfleet``), or, of several, of the one named ``$RAFTFLEET_NAME``.

    Raises:
        NodeNotRunning: no node was named and none was found, or several were: the message lists them.
    """
    environ = os.environ if environ is None else environ
    chosen = os.fspath(run_dir) if run_dir is not None else environ.get(rundir.RUN_DIR_VARIABLE)
    if chosen:
        return Path(os.path.abspath(chosen))
    places = list(dict.fromkeys((rundir.base_dir(environ), rundir.base_dir({}))))
    running = [path for place in places for path in _folders(place) if is_answering(path)]
    named = [path for path in running if path.name == environ.get("RAFTFLEET_NAME")]
    if len(running) == 1 or named:
        return (named or running)[0]
    if running:
        raise NodeNotRunning(
            f"several nodes run on this machine: {', '.join(map(str, running))}; choose one by its run directory "
            f"(connect's argument, --run-dir, or ${rundir.RUN_DIR_VARIABLE})"
        )
    raise NodeNotRunning(
        f"no node runs at a default place ({', '.join(map(str, places))}): start one with `raftfleet-node start`, or "
        f"name its run directory (connect's argument, --run-dir, or ${rundir.RUN_DIR_VARIABLE})"
    )


def open_table(run_dir: Path) -> LeaderTableReader:
    """The leader table of the node in ``run_dir``, after making sure that the node is there.

    Raises:
        NodeNotRunning: it is not.
        NodeError: the table cannot be read.
    """
    reader = LeaderTableReader(run_dir)
    if not reader.is_alive and not is_answering(run_dir):
        reader.close()
        raise NodeNotRunning(
            f"the node in {run_dir} has ended without a clean stop: start it again with "
            f"`raftfleet-node start --run-dir {run_dir}`"
        )
    return reader


def is_answering(run_dir: Path) -> bool:
    """Whether a process of a node accepts connections in this run directory."""
    return _accepts(rundir.control_socket(run_dir)) or _accepts(rundir.shard_socket(run_dir, 0))


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if path.is_dir())
    except OSError:
        return []


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
        return True

"""``raftfleet-node export`` and ``restore``: groups' states to files and back, one or all of them.

A file appears under its name when it is whole: written beside, synced, renamed. Where many groups are done, one that
fails is told and does not keep the others; the exit code says that something is missing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from raftfleet.errors import AlreadyAdded, ConfigError, RaftFleetError
from raftfleet.node.cli_common import EXIT_FAILED, connected, node_command, timeout_option
from raftfleet.node.cli_output import say

if TYPE_CHECKING:
    from raftfleet.client.sync import Fleet
    from raftfleet.core.config import GroupConfig
    from raftfleet.wire.exported import ExportedState

SUFFIX = ".raftstate"
NAME_CHARACTERS_MAX = 120

_commands = click.Group()


# -------------------------------------------------------------------- out


@node_command(_commands)
@click.argument("names", nargs=-1, metavar="GROUP FILE | --all DIR")
@click.option(
    "--all", "all_groups", is_flag=True, envvar="RAFTFLEET_ALL", show_envvar=True, help="Every group, into DIR."
)
@click.option(
    "--stale",
    is_flag=True,
    envvar="RAFTFLEET_STALE",
    show_envvar=True,
    help="What any member has: works without a leader, and may lack the newest commands.",
)
@click.option("--force", is_flag=True, envvar="RAFTFLEET_FORCE", show_envvar=True, help="Replace files that are there.")
@timeout_option(30.0)
def export(
    names: tuple[str, ...], all_groups: bool, stale: bool, force: bool, timeout: float, run_dir: Path | None
) -> None:
    """Write the state of GROUP to FILE, or those of all groups into the directory DIR.

    \b
    raftfleet-node export counter counter.raftstate
    raftfleet-node export --all /var/backups/raftfleet/2026-11-25

    A state contains everything that was acknowledged when the export began (with --stale: what one member had). The
    sessions of clients are not part of it. DIR is made if it is not there.
    """
    if len(names) != (1 if all_groups else 2):
        raise click.UsageError("name GROUP and FILE, or --all and DIR")
    consistency = "stale" if stale else "linearizable"
    with connected(run_dir) as fleet:
        if not all_groups:
            name, target = names
            _export_one(fleet, name, Path(target), consistency, force, timeout)
            return
        folder = Path(names[0])
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        groups = sorted(fleet.consensus_groups(timeout=timeout))
        with _failures_told(f"of {len(groups)} groups") as attempt:
            for name in groups:
                attempt(
                    name,
                    lambda name=name: _export_one(  # type: ignore[misc]
                        fleet, name, folder / file_name(name), consistency, force, timeout
                    ),
                )


def file_name(group: str) -> str:
    """A file name for a group whatever its name is; those that are cut get a hash of the whole name."""
    from raftfleet.core.names import hash64

    plain = quote(group, safe=" !#$&'()+,;=@[]{}~^-_.")
    if len(plain) > NAME_CHARACTERS_MAX or plain.startswith("."):
        plain = f"{plain[:NAME_CHARACTERS_MAX].lstrip('.')}-{hash64(group.encode()):016x}"
    return plain + SUFFIX


def _export_one(fleet: Fleet, name: str, path: Path, consistency: str, force: bool, timeout: float) -> None:
    if path.exists() and not force:
        raise ConfigError(f"{path} is there already: name another file, or replace it with --force")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is not a directory: make it, or name a file elsewhere")
    state = fleet.export_group(name, consistency=consistency, timeout=timeout)
    write_whole(path, state.pack())
    say(f"{name}: {len(state.state)} bytes, as of index {state.index}, from node {state.node}: {path}")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there as a whole or not at all, for its owner only."""
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# -------------------------------------------------------------------- back


@node_command(_commands)
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path), metavar="FILE|DIR…")
@click.option(
    "--name", envvar="RAFTFLEET_GROUP", show_envvar=True, help="Name of the group. Default: that of the exported one."
)
@click.option(
    "--replicas", type=click.IntRange(min=1), envvar="RAFTFLEET_REPLICAS", show_envvar=True, help="Default: as it was."
)
@click.option(
    "--machine",
    envvar="RAFTFLEET_MACHINE",
    show_envvar=True,
    metavar="MODULE:CLASS",
    help="State machine. Default: as it was; a snapshot from an archive does not say which.",
)
@timeout_option(30.0)
def restore(
    files: tuple[Path, ...],
    name: str | None,
    replicas: int | None,
    machine: str | None,
    timeout: float,
    run_dir: Path | None,
) -> None:
    """Add groups that begin with the states in FILE…, or in all files that `export --all` wrote into DIR.

    \b
    raftfleet-node restore counter.raftstate
    raftfleet-node restore /var/backups/raftfleet/2026-11-25
    raftfleet-node restore /var/lib/raftfleet/shard-0/archive/0000010000000003-0000000000000007.snap --machine m:C

    Nobody is served by such a group before all of its state is there. A restore that was cut short goes on when it is
    run again. A group that is there already is left as it is: of a single FILE the exit code is 1 then; where there are
    several, they are named at the end, and the others are added.
    """
    paths = [path for given in files for path in _state_files(given)]
    if name is not None and len(paths) != 1:
        raise click.UsageError(f"--name is for one file, and there are {len(paths)}")
    with connected(run_dir) as fleet:
        if len(paths) == 1:
            _restore_one(fleet, paths[0], name, replicas, machine, timeout)
            return
        there: list[str] = []

        def restore_missing(path: Path) -> None:
            try:
                _restore_one(fleet, path, name, replicas, machine, timeout)
            except AlreadyAdded:
                there.append(str(path))

        with _failures_told(f"of {len(paths)} files") as attempt:
            for path in paths:
                attempt(str(path), lambda path=path: restore_missing(path))  # type: ignore[misc]
            if there:
                say(f"the groups of {len(there)} files were there already and are left as they are: {', '.join(there)}")


def _state_files(given: Path) -> list[Path]:
    if not given.is_dir():
        return [given]
    found = sorted(given.glob(f"*{SUFFIX}"))
    if not found:
        raise click.UsageError(f"{given} holds no file that `raftfleet-node export --all` wrote (*{SUFFIX})")
    return found


def read_state(path: Path) -> ExportedState:
    """The state in a file: one that ``export`` wrote, or a snapshot of a data directory.

    Raises:
        ConfigError: it is neither, or damaged.
    """
    from raftfleet.storage.base import StorageError
    from raftfleet.storage.files import OsFiles
    from raftfleet.storage.snapshots import read_info
    from raftfleet.wire.exported import SNAPSHOT_MAGIC, ExportedState

    data = path.read_bytes()
    try:
        if data.startswith(SNAPSHOT_MAGIC):
            read_info(OsFiles(), str(path))  # checks what the snapshot's own CRC covers
        return ExportedState.unpack(data)
    except (ValueError, StorageError) as error:
        raise ConfigError(f"{path} cannot be restored from: {error}") from error


def config_for(state: ExportedState, path: Path, machine: str | None) -> GroupConfig | None:
    """None where the state itself knows its group's config.

    Raises:
        ConfigError: nobody says which machine it is.
    """
    from raftfleet.core.config import GroupConfig

    if state.config:
        if machine is None:
            return None
        return GroupConfig.from_dict({**state.config, "machine": machine, "machine_version": None, "restore": None})
    if machine is None:
        raise ConfigError(f"{path} does not say which state machine it is of: name it with --machine MODULE:CLASS")
    return GroupConfig(machine)


def _restore_one(
    fleet: Fleet, path: Path, name: str | None, replicas: int | None, machine: str | None, timeout: float
) -> None:
    state = read_state(path)
    group = name or state.name
    config = config_for(state, path, machine)
    try:
        fleet.add_consensus_group(group, replicas or state.replicas or 3, config, restore=state, timeout=timeout)
    except AlreadyAdded as error:
        raise AlreadyAdded(f"{error}; {path} was not restored") from error
    say(f"{group}: restored from {path}, {len(state.state)} bytes")


Attempt = Callable[[str, Callable[[], None]], None]


@contextlib.contextmanager
def _failures_told(of_how_many: str) -> Iterator[Attempt]:
    """One failure does not keep the others from being done; at the end the exit code tells."""
    failed: list[str] = []

    def attempt(what: str, work: Callable[[], Any]) -> None:
        try:
            work()
        except (RaftFleetError, OSError, ValueError) as error:
            failed.append(what)
            say(f"{what}: {error}")

    yield attempt
    if failed:
        say(f"{len(failed)} {of_how_many} failed: {', '.join(failed)}")
        click.get_current_context().exit(EXIT_FAILED)

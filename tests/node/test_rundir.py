"""The run directory: who may own it, what is taken over, what is left."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raftfleet.errors import ConfigError
from raftfleet.node import rundir
from raftfleet.node.rundir import RunDir, RunDirBusy, lock_holder
from raftfleet.transport.poller import Poller
from raftfleet.transport.unix import UnixServer


@pytest.fixture
def parent() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="rf-"))
    yield folder
    shutil.rmtree(folder)


def leave_socket(path: Path) -> None:
    """A socket file as a process that died leaves it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_made_private_and_leaves_nothing(parent: Path) -> None:
    run_dir = RunDir.acquire(parent / "a" / "run", name="n1")
    assert mode(run_dir.path) == 0o700
    assert mode(run_dir.path / rundir.LOCK_NAME) == 0o600
    assert (run_dir.path / rundir.LOCK_NAME).read_text() == f"{os.getpid()}\nn1\nmade\n"
    assert lock_holder(run_dir.path) == os.getpid()
    leave_socket(rundir.control_socket(run_dir.path))
    run_dir.release()
    assert not (parent / "a" / "run").exists()


def test_a_folder_that_was_there_stays(parent: Path) -> None:
    RunDir.acquire(parent, name="n1").release()
    assert list(parent.iterdir()) == []


def test_two_nodes_cannot_share_it(parent: Path) -> None:
    run_dir = RunDir.acquire(parent, name="n1")
    try:
        with pytest.raises(RunDirBusy, match=f"process {os.getpid()}"):
            RunDir.acquire(parent, name="n2")
    finally:
        run_dir.release()


def test_sockets_of_a_crashed_node_are_removed(parent: Path) -> None:
    leave_socket(rundir.shard_socket(parent, 3))
    (parent / rundir.LOCK_NAME).write_text("999999999\nold\nfound\n")
    RunDir.acquire(parent, name="n1").release()
    assert list(parent.iterdir()) == []


def test_the_lock_is_waited_for_while_orphans_of_a_dead_node_still_hold_it(
    parent: Path, eventually: Callable[..., None]
) -> None:
    hold_r, hold_w = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        os.close(hold_w)
        RunDir.acquire(parent, name="old")
        if os.fork() == 0:
            os.read(hold_r, 1)  # the orphan ends when the test closes its end
        os._exit(0)
    os.waitpid(supervisor, 0)
    with pytest.raises(RunDirBusy):
        RunDir.acquire(parent, name="new", wait_s=0.2)
    os.close(hold_r)
    os.close(hold_w)
    RunDir.acquire(parent, name="new", wait_s=10.0).release()


@pytest.mark.parametrize("unsafe", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_can_write_is_refused(parent: Path, unsafe: int) -> None:
    folder = parent / "open"
    folder.mkdir()
    folder.chmod(unsafe)
    with pytest.raises(ConfigError, match="can be written by others"):
        RunDir.acquire(folder, name="n1")
    assert list(folder.iterdir()) == []


def test_a_file_in_its_place_is_refused(parent: Path) -> None:
    (parent / "file").touch()
    with pytest.raises(ConfigError, match="not a directory"):
        RunDir.acquire(parent / "file", name="n1")
    with pytest.raises(ConfigError, match="--run-dir"):
        RunDir.acquire(parent / "file" / "below", name="n1")


def test_a_link_in_place_of_the_lock_is_refused(parent: Path) -> None:
    target = parent / "target"
    target.touch()
    (parent / rundir.LOCK_NAME).symlink_to(target)
    with pytest.raises(ConfigError, match="cannot open"):
        RunDir.acquire(parent, name="n1")


def test_a_socket_group_opens_folder_and_sockets_to_it(parent: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give files to any group")
    run_dir = RunDir.acquire(parent / "run", name="n1", socket_group="daemon")
    path = rundir.control_socket(run_dir.path)
    poller = Poller()
    server = UnixServer(path, poller, dict, mode=0o660, group="daemon")
    assert (mode(run_dir.path), mode(path)) == (0o750, 0o660)
    assert path.stat().st_gid == run_dir.path.stat().st_gid == rundir.group_id("daemon")
    server.close()
    poller.close()
    run_dir.release()

"""LocalFleet without nodes, and how it ends; what it does with nodes is shown by the tests in e2e/."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from raftfleet.errors import NoLeader
from raftfleet.testing import LocalFleet, LocalFleetError
from raftfleet.testing.local_fleet import is_settled
from raftfleet.testing.ports import PortBlocks
from raftfleet.testing.reaper import node_processes


def test_two_users_never_get_the_same_ports() -> None:
    first, second = PortBlocks(), PortBlocks()
    try:
        starts = [users.take_block(3) for users in (first, second) for _ in range(20)]
    finally:
        first.release()
        second.release()
    assert len({port for start in starts for port in range(start, start + 3)}) == 120


def test_a_port_that_somebody_listens_on_is_not_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = PortBlocks()
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            monkeypatch.setattr("raftfleet.testing.ports.PORTS_FIRST", port - 1)
            monkeypatch.setattr("raftfleet.testing.ports.PORTS_LAST", port + PortBlocks.STEP)
            with pytest.raises(OSError, match="no 2 consecutive free ports"):
                blocks.take_block(2)
    finally:
        blocks.release()


def test_the_command_line_of_a_node_says_everything(tmp_path: Path) -> None:
    with LocalFleet(app_dirs=[tmp_path], options={"beat_interval": 0.05, "log_level": "debug"}) as fleet:
        node = fleet.define_node("n1", "z1", workers=3, log_level="info", insecure=True, app_dir=["a", "b"])
        node.peers = ("127.0.0.1:1", node.endpoint)
        line = fleet.command_line("n1")
        assert line[:4] == [sys.executable, "-m", "raftfleet.node.cli", "start"]
        options = " ".join(line[4:])
        for part in (
            "--name n1",
            "--zone z1",
            f"--bind 127.0.0.1:{node.port}",
            f"--peers 127.0.0.1:1,{node.endpoint}",
            "--workers 3",
            f"--run-dir {fleet.folder}/n1",
            f"--app-dir {tmp_path} --beat-interval 0.05 --log-level info --insecure --app-dir a --app-dir b",
        ):
            assert part in options
    assert not fleet.folder.exists()


def test_a_wait_in_vain_says_for_what_and_what_was_seen_last() -> None:
    def no_leader() -> bool:
        raise NoLeader("nobody leads")

    with LocalFleet() as fleet:
        with pytest.raises(
            LocalFleetError, match=r"0\.05 s in vain for a leader; last seen: NoLeader\('nobody leads'\)"
        ):
            fleet.wait_until(no_leader, 0.05, "a leader")
        assert fleet.wait_until(lambda: "something", 0.05, "anything") == "something"


def test_a_node_that_cannot_start_shows_its_log() -> None:
    with LocalFleet() as fleet, pytest.raises(LocalFleetError) as raised:
        fleet.start_node("n1", "z1", no_such_option=1)
    assert "exit code 2" in str(raised.value)
    assert "--no-such-option" in str(raised.value), "the node's own words"


def test_a_name_is_used_once() -> None:
    with LocalFleet() as fleet:
        fleet.define_node("n1", "z1")
        with pytest.raises(ValueError, match="restart_node"):
            fleet.define_node("n1", "z2")


# A paused node, and a fork of the test's process that lives on, as a test may have them.
KILLED_TEST = """
import os, signal, sys, time
from raftfleet.testing import LocalFleet
fleet = LocalFleet()
fleet.start_node("n1", "z1")
deadline = time.monotonic() + 60
if "fork" in sys.argv and os.fork() == 0:
    while fleet.folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os._exit(0)
fleet.pause_node("n1")
print(fleet.folder, fleet.nodes["n1"].port, os.path.realpath(fleet.nodes["n1"].run_dir / "leader_table"), flush=True)
signal.pause()
"""


@pytest.mark.parametrize(("number", "fork"), [(signal.SIGTERM, ""), (signal.SIGKILL, "fork")])
def test_a_killed_test_leaves_nothing_of_its_fleet(number: int, fork: str, eventually: Callable[..., None]) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED_TEST, fork], stdout=subprocess.PIPE, text=True) as test:
        assert test.stdout is not None
        folder, port, table = test.stdout.readline().split()
        assert node_processes(folder) and Path(folder).exists() and Path(table).exists()
        test.send_signal(number)
        test.wait()
    assert test.returncode == -number
    eventually(lambda: not Path(folder).exists(), "the fleet's folder is gone", 20.0)
    assert not node_processes(folder) and not Path(table).exists()
    lock = Path(tempfile.gettempdir(), f"raftfleet-ports-{os.getuid()}", port)
    if not fork:  # which keeps the lock as long as it lives
        eventually(lambda: not lock.exists(), "its ports are free", 20.0)


@pytest.mark.parametrize(
    ("members", "desired", "leader", "settled"),
    [
        (["n2", "n1"], ["n1", "n2"], "n1", True),
        (["n1", "n2"], ["n1", "n2"], "n2", False),
        (["n1", "n2", "n3"], ["n1", "n2"], "n1", False),
        (["n1"], ["n1", "n2"], "n1", False),
        ([], [], None, False),
    ],
)
def test_settled_means_the_desired_members_and_the_first_of_them_leads(
    members: list[str], desired: list[str], leader: str | None, settled: bool
) -> None:
    assert is_settled({"members": members, "desired": desired, "leader": leader}) is settled

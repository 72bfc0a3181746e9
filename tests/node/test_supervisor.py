"""The supervisor with real forks and signals. The children's bodies are stand-ins: what they do is in each test.

A child tells that it runs by a file ``TITLE-PID`` in the test's folder, written when its SIGTERM handler is in place.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from leaks import running_processes

from raftfleet.errors import ConfigError
from raftfleet.node import rundir, supervisor
from raftfleet.node.config import NodeConfig
from raftfleet.node.context import ChildContext, monotonic_us
from raftfleet.node.exit_codes import ExitCode
from raftfleet.node.restart import RestartLimits

WORKERS = 2
CHILDREN = 1 + WORKERS
LIMITS = RestartLimits(delay_us_first=10_000, delay_us_max=40_000, budget_count=5)

Body = Callable[[ChildContext], None]
Eventually = Callable[..., None]


def serve_until_sigterm(context: ChildContext) -> None:
    """What a well-behaved child does."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, leave)
    tell(context)
    while True:
        signal.pause()


def ignore_sigterm(context: ChildContext) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tell(context)
    while True:
        signal.pause()


def tell(context: ChildContext) -> None:
    (context.config.run_dir.parent / f"{context.title}-{os.getpid()}").touch()


class Node:
    """A supervisor in a process of its own, forked from the test."""

    def __init__(self, folder: Path, eventually: Eventually) -> None:
        self.folder = folder
        self.eventually = eventually
        self.pid = 0
        self.exit_code: int | None = None
        self.lingers_s = 0.0
        """How long its process takes to end after the node has."""
        self.config = NodeConfig(name="n1", run_dir=folder / "run", workers=WORKERS, log_level="debug")

    def start(
        self,
        manager: Body = serve_until_sigterm,
        shard: Body = serve_until_sigterm,
        *,
        wait: bool = True,
        **options: Any,
    ) -> None:
        if self.pid:  # started before: those of its children that are still dying must not be taken for new ones
            for path in self.folder.glob("*-*"):
                path.unlink()
        self.pid, self.exit_code = os.fork(), None
        if self.pid == 0:
            code = 99
            try:
                sys.stdout = sys.stderr = open(self.folder / "log", "a", buffering=1)  # pytest has its own
                options.setdefault("limits", LIMITS)
                for number in (signal.SIGINT, signal.SIGHUP):  # ignored where the tests run in a shell's background
                    signal.signal(number, signal.SIG_DFL)
                code = supervisor.run(self.config, bodies={"manager": manager, "shard": shard}, **options)
                time.sleep(self.lingers_s)
            finally:
                os._exit(code)
        if wait:
            self.eventually(lambda: len(self.children()) == CHILDREN, "all children run")

    def children(self) -> dict[str, int]:
        """Those that have told that they run and do: title to pid."""
        found = {}
        for path in self.folder.glob("*-*"):
            title, pid = path.name.rsplit("-", 1)
            if is_running(int(pid)):
                found[title] = int(pid)
        return found

    def started(self, title: str) -> int:
        """How many processes of that title have ever run."""
        return len(list(self.folder.glob(f"{title}-*")))

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, within_s: float = 10.0) -> int:
        """The exit code, or minus the signal."""

        def ended() -> bool:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
            return bool(pid)

        self.eventually(ended, "the supervisor ends", within_s)
        assert self.exit_code is not None
        return self.exit_code

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def assert_nothing_is_left(self) -> None:
        assert not self.config.run_dir.exists()
        assert not self.children()


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@pytest.fixture
def node(eventually: Eventually, request: pytest.FixtureRequest) -> Iterator[Node]:
    folder = Path(tempfile.mkdtemp(prefix="rf-"))  # not tmp_path: a Unix socket's path is short
    before = set(running_processes())
    node = Node(folder, eventually)
    yield node
    if node.pid and node.exit_code is None:  # the test failed half-way
        os.kill(node.pid, signal.SIGKILL)
        os.waitpid(node.pid, 0)
    log = node.folder / "log"
    if log.exists():
        print(log.read_text())
    shutil.rmtree(folder)
    assert not set(running_processes()) - before, "children outlived their node"


def test_a_stop_ends_every_child_and_leaves_nothing(node: Node) -> None:
    node.start()
    assert set(node.children()) == {"manager", "shard-0", "shard-1"}
    assert rundir.lock_holder(node.config.run_dir) == node.pid
    assert (node.config.run_dir / rundir.LEADER_TABLE_NAME).resolve().exists()
    segment = (node.config.run_dir / rundir.LEADER_TABLE_NAME).resolve()
    assert node.stop() == ExitCode.OK
    assert not segment.exists()
    node.assert_nothing_is_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_terminal_stops_the_node_through_its_supervisor(node: Node, number: int) -> None:
    node.start()
    for pid in node.children().values():
        os.kill(pid, number)  # a terminal signals the whole process group; the children leave it to their parent
    time.sleep(0.05)
    assert len(node.children()) == CHILDREN
    node.signal(number)
    node.signal(signal.SIGHUP)  # the kernel and the shell both may send this one: no reason for haste
    assert node.wait() == ExitCode.OK
    assert "killing" not in node.log


def test_a_killed_child_is_started_again_alone(node: Node, eventually: Eventually) -> None:
    node.start()
    before = node.children()
    os.kill(before["shard-1"], signal.SIGKILL)
    eventually(lambda: node.started("shard-1") == 2 and len(node.children()) == CHILDREN, "shard 1 runs again")
    after = node.children()
    assert after["shard-1"] != before["shard-1"]
    assert (after["manager"], after["shard-0"]) == (before["manager"], before["shard-0"])
    assert "shard-1" in node.log
    assert "was killed by SIGKILL" in node.log
    assert node.stop() == ExitCode.OK


def test_children_see_pids_and_restarts_of_all(node: Node, eventually: Eventually) -> None:
    def manager(context: ChildContext) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
        tell(context)
        while True:
            rows = [context.children.manager, *context.children.shards]
            path = node.folder / "table"
            path.with_suffix(".new").write_text(json.dumps(rows))
            path.with_suffix(".new").replace(path)
            time.sleep(0.01)

    def table() -> list[list[int]]:
        path = node.folder / "table"
        return json.loads(path.read_text()) if path.exists() else []

    node.start(manager=manager)
    os.kill(node.children()["shard-0"], signal.SIGKILL)
    eventually(lambda: node.started("shard-0") == 2 and len(node.children()) == CHILDREN, "shard 0 runs again")
    children = node.children()
    pids = [children["manager"], children["shard-0"], children["shard-1"]]
    eventually(lambda: [row[0] for row in table()] == pids, "the table shows the pids")
    assert [row[1] for row in table()] == [0, 1, 0]
    assert table()[1][2] > table()[2][2] > 0
    assert node.stop() == ExitCode.OK


def test_killing_the_supervisor_leaves_no_orphan(node: Node, eventually: Eventually) -> None:
    node.start(shard=ignore_sigterm)
    os.kill(node.children()["shard-0"], signal.SIGSTOP)  # a stopped process dies like any other
    node.signal(signal.SIGKILL)
    assert node.wait() == -signal.SIGKILL
    eventually(lambda: not node.children(), "the children die with their supervisor")
    node.start()  # takes the segment in /dev/shm over, which nobody else would remove
    assert node.stop() == ExitCode.OK


def test_what_a_killed_supervisor_left_is_taken_over(node: Node) -> None:
    def listens(context: ChildContext) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(rundir.shard_socket(context.config.run_dir, context.index)))
        serve_until_sigterm(context)
        listener.close()

    run_dir = node.config.run_dir
    node.start(shard=listens)
    old_segment = (run_dir / rundir.LEADER_TABLE_NAME).resolve()
    node.signal(signal.SIGKILL)
    node.wait()
    node.start()  # at once: its children may still be dying
    assert (run_dir / rundir.LEADER_TABLE_NAME).resolve() != old_segment
    assert not old_segment.exists()
    assert not list(run_dir.glob("*.sock"))
    assert node.stop() == ExitCode.OK
    node.assert_nothing_is_left()


def test_a_dead_childs_socket_is_removed(node: Node, eventually: Eventually) -> None:
    def listens_first(context: ChildContext) -> None:
        if node.started(context.title) == 0:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(rundir.shard_socket(context.config.run_dir, context.index)))
            tell(context)
            while True:
                listener.fileno()
                signal.pause()
        serve_until_sigterm(context)

    node.start(shard=listens_first)
    os.kill(node.children()["shard-0"], signal.SIGKILL)
    eventually(lambda: not rundir.shard_socket(node.config.run_dir, 0).exists(), "the socket is gone")
    assert rundir.shard_socket(node.config.run_dir, 1).exists()
    assert node.stop() == ExitCode.OK


def test_a_child_that_ignores_sigterm_is_killed_when_its_time_is_up(node: Node) -> None:
    node.start(shard=ignore_sigterm, stop_grace_us=200_000)
    started = time.monotonic()
    assert node.stop() == ExitCode.OK
    assert time.monotonic() - started >= 0.2
    assert "killing: shard-0, shard-1" in node.log
    node.assert_nothing_is_left()


def test_a_second_signal_ends_it_at_once(node: Node, eventually: Eventually) -> None:
    node.start(shard=ignore_sigterm, stop_grace_us=60_000_000, same_wish_us=0)
    node.signal(signal.SIGTERM)
    eventually(lambda: "manager" not in node.children(), "the stop is under way")
    node.signal(signal.SIGTERM)
    assert node.wait(5.0) == ExitCode.OK
    node.assert_nothing_is_left()


def test_a_second_signal_right_after_the_first_is_the_same_wish(node: Node, eventually: Eventually) -> None:
    node.start(shard=ignore_sigterm, stop_grace_us=1_000_000, same_wish_us=60_000_000)
    node.signal(signal.SIGTERM)
    eventually(lambda: "manager" not in node.children(), "the stop is under way")
    node.signal(signal.SIGTERM)
    node.signal(signal.SIGINT)
    assert node.wait(5.0) == ExitCode.OK
    assert "killing: shard-0, shard-1" in node.log, "they had all their time"
    assert "killing all children" not in node.log


def test_impatience_is_measured_from_the_first_signal(node: Node, eventually: Eventually) -> None:
    node.start(shard=ignore_sigterm, stop_grace_us=60_000_000)
    started_us = monotonic_us()

    def is_killed() -> bool:
        node.signal(signal.SIGTERM)
        return "killing all children" in node.log

    eventually(is_killed, "signals without a pause end it", 5.0)
    assert monotonic_us() - started_us >= supervisor.SAME_WISH_US
    assert node.wait(5.0) == ExitCode.OK


def test_a_signal_in_the_last_moment_of_a_stop_is_no_death_by_signal(node: Node, eventually: Eventually) -> None:
    node.lingers_s = 0.3
    node.start()
    node.signal(signal.SIGTERM)
    eventually(lambda: not (node.config.run_dir / rundir.LOCK_NAME).exists(), "the node has ended, its process has not")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        node.signal(number)
    assert node.wait(5.0) == ExitCode.OK


def test_a_child_that_dies_during_a_stop_is_not_started_again(node: Node) -> None:
    def fails_on_sigterm(context: ChildContext) -> None:
        def fail(number: int, frame: object) -> None:
            raise RuntimeError("while stopping")

        signal.signal(signal.SIGTERM, fail)
        tell(context)
        while True:
            signal.pause()

    node.start(shard=fails_on_sigterm)
    assert node.stop() == ExitCode.OK
    assert node.started("shard-0") == 1


def test_a_child_that_cannot_boot_ends_the_node_with_that_code(node: Node) -> None:
    def cannot_boot(context: ChildContext) -> None:
        raise ConfigError("zone: there is no such zone on the moon")

    node.start(shard=cannot_boot, wait=False)
    assert node.wait() == ExitCode.CANNOT_BOOT
    assert "no such zone on the moon" in node.log
    node.assert_nothing_is_left()


def test_an_address_in_use_ends_the_node_with_that_code(node: Node) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()

        def binds(context: ChildContext) -> None:
            with socket.socket() as mine:
                mine.bind(taken.getsockname())

        node.start(manager=binds, wait=False)
        assert node.wait() == ExitCode.ADDRESS_IN_USE
    node.assert_nothing_is_left()


def test_a_child_that_dies_again_and_again_ends_the_node(node: Node) -> None:
    def dies(context: ChildContext) -> None:
        tell(context)
        raise RuntimeError("a fault in every life")

    node.start(shard=dies, wait=False)
    assert node.wait() == ExitCode.BUDGET_EXCEEDED
    assert max(node.started("shard-0"), node.started("shard-1")) == 1 + LIMITS.budget_count
    assert "RuntimeError: a fault in every life" in node.log
    assert f"ended {1 + LIMITS.budget_count} times within 60 s" in node.log
    node.assert_nothing_is_left()


def test_a_fresh_start_comes_at_once(node: Node, eventually: Eventually) -> None:
    def leaves_fleet_once(context: ChildContext) -> None:
        if node.started(context.title) == 0:
            tell(context)
            time.sleep(0.05)
            raise SystemExit(ExitCode.RESTART_FRESH)
        serve_until_sigterm(context)

    patient = RestartLimits(delay_us_first=60_000_000, delay_us_max=60_000_000, fresh_life_us=10_000)
    node.start(shard=leaves_fleet_once, limits=patient, wait=False)
    eventually(lambda: node.started("shard-0") == node.started("shard-1") == 2, "both shards run again")
    eventually(lambda: len(node.children()) == CHILDREN, "all children run")
    assert node.stop() == ExitCode.OK


def test_a_second_node_in_the_same_run_directory_is_refused(node: Node, eventually: Eventually) -> None:
    node.start()
    second = Node(node.folder, eventually)
    second.start(wait=False)
    assert second.wait() == ExitCode.RUN_DIR_BUSY
    assert f"process {node.pid}" in node.log
    assert len(node.children()) == CHILDREN
    assert node.stop() == ExitCode.OK


def test_a_run_directory_that_cannot_be_used_is_an_error_of_the_caller(node: Node) -> None:
    node.config.run_dir.touch()
    with pytest.raises(ConfigError, match="not a directory"):
        supervisor.run(node.config, bodies={"manager": serve_until_sigterm, "shard": serve_until_sigterm})
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


class GrowingTable:
    """Stands for a leader table; notes in a file what is asked of it."""

    def __init__(self, notes: Path) -> None:
        self._notes = notes

    @property
    def wants_growth(self) -> bool:
        return True

    def grow(self) -> None:
        self._note("grow")

    def close(self) -> None:
        self._note("close")

    def _note(self, what: str) -> None:
        with open(self._notes, "a") as file:
            file.write(what + "\n")


def test_a_shard_can_ask_for_a_larger_leader_table_and_for_a_stop(node: Node, eventually: Eventually) -> None:
    notes = node.folder / "notes"

    def asks(context: ChildContext) -> None:
        if context.index == 0:
            context.grow_leader_table()
            eventually(lambda: notes.exists() and "grow" in notes.read_text(), "the table has grown")
            context.stop_node()
            context.stop_node()  # a child may repeat itself; that is not an impatient operator
        serve_until_sigterm(context)

    node.start(shard=asks, make_table=lambda run_dir, config: GrowingTable(notes), wait=False)
    assert node.wait() == ExitCode.OK
    assert notes.read_text() == "grow\nclose\n"
    assert "killing" not in node.log


def test_the_supervisor_has_one_thread_and_no_socket(node: Node) -> None:
    node.start()
    own = os.listdir("/proc/self/fd")
    assert len(os.listdir(f"/proc/{node.pid}/task")) == 1
    opened = [
        os.readlink(f"/proc/{node.pid}/fd/{number}")
        for number in os.listdir(f"/proc/{node.pid}/fd")
        if number not in own
    ]
    assert not [name for name in opened if name.startswith(("socket:", "anon_inode:", "pipe:"))]
    assert node.stop() == ExitCode.OK


def test_a_child_is_a_process_of_its_own(node: Node, eventually: Eventually) -> None:
    def shows(context: ChildContext) -> None:
        facts = {
            "comm": Path("/proc/self/comm").read_text().strip(),
            "stdin": os.readlink("/proc/self/fd/0"),
            "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
            "term_is_default": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
            "dice": random.random(),
        }
        (node.folder / f"facts.{context.index}.new").write_text(json.dumps(facts))
        (node.folder / f"facts.{context.index}.new").rename(node.folder / f"facts.{context.index}")
        serve_until_sigterm(context)

    node.start(shard=shows)
    facts = [json.loads((node.folder / f"facts.{index}").read_text()) for index in range(WORKERS)]
    assert [fact["comm"] for fact in facts] == ["rf-shard-0", "rf-shard-1"]
    assert all(fact["stdin"] == "/dev/null" for fact in facts)
    assert all(fact["blocked"] == [] and fact["term_is_default"] for fact in facts)
    assert facts[0]["dice"] != facts[1]["dice"]
    assert node.stop() == ExitCode.OK


def test_a_stop_at_any_moment_of_the_start_is_clean(node: Node) -> None:
    dice = random.Random(7)
    for _ in range(25):
        node.start(wait=False)
        time.sleep(dice.uniform(0, 0.03))
        code = node.stop()
        assert code in (ExitCode.OK, -signal.SIGTERM)  # the latter: before run() had blocked its signals
        if code == ExitCode.OK:
            node.assert_nothing_is_left()


def test_children_killed_in_a_storm_all_come_back(node: Node, eventually: Eventually) -> None:
    node.start(limits=RestartLimits(delay_us_first=1_000, delay_us_max=2_000, budget_count=1_000))
    dice = random.Random(11)
    for _ in range(30):
        for pid in node.children().values():
            if dice.random() < 0.7:
                with contextlib.suppress(ProcessLookupError):  # killed in the round before, and reaped just now
                    os.kill(pid, signal.SIGKILL)
        time.sleep(dice.uniform(0, 0.02))
    eventually(lambda: len(node.children()) == CHILDREN, "all children run")
    assert node.stop() == ExitCode.OK
    node.assert_nothing_is_left()

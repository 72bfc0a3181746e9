"""The synchronous client against a real Unix-socket server: threads, forks, restarts, what the user sees."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import pytest
from client.fake_node import CONTROL, HANG_UP, FakeNode

import raftfleet
from raftfleet import errors
from raftfleet.client import discovery, sync
from raftfleet.core.names import shard_of
from raftfleet.node.leader_table import RegionWriter
from raftfleet.wire import ipc

CONFIG = raftfleet.GroupConfig("m:C")
QUICK: dict[str, Any] = {"timeout": 0.05, "retry": 2, "retry_interval": 0.01}


# -------------------------------------------------------------------- the calls


def test_the_example_of_the_readme(node: FakeNode) -> None:
    with raftfleet.connect(node.run_dir) as fleet:
        fleet.add_consensus_group("consensus1", 3, raftfleet.GroupConfig("just_an_int:JustAnInt"))
        assert fleet.query("consensus1", "get") == 0
        assert fleet.command("consensus1", "inc") == 0
        assert fleet.query("consensus1", "get") == 1
        assert fleet.whereis_leader("consensus1") == raftfleet.Leader("n1", 1)
        assert fleet.consensus_groups() == {"consensus1": 3}


def test_every_control_call_reaches_the_manager_with_its_arguments(node: FakeNode) -> None:
    with raftfleet.connect(node.run_dir) as fleet:
        fleet.activate("z1")
        fleet.deactivate()
        fleet.deactivate(wait=True)
        fleet.active_nodes()
        fleet.unreachable_nodes()
        fleet.leaderless_groups()
        fleet.remove_dead_node("n2")
        fleet.add_consensus_group("g", config=CONFIG)
        fleet.change_config("g", CONFIG)
        fleet.status("g")
        fleet.replace_leader("g", "n2")
        fleet.remove_consensus_group("g")
        assert fleet.call("status") == ["status", {}]
        assert fleet.call("groups_detail", {}, 10.0) == ["groups_detail", {}]
    assert [tuple(request[2:4]) for request in node.requests(ipc.CALL)] == [
        ("activate", {"zone": "z1"}),
        ("deactivate", {"wait": False}),
        ("deactivate", {"wait": True}),
        ("active_nodes", {}),
        ("unreachable_nodes", {}),
        ("leaderless_groups", {}),
        ("remove_dead_node", {"node": "n2"}),
        ("add_group", {"name": "g", "replicas": 3, "config": CONFIG.to_dict()}),
        ("change_config", {"name": "g", "config": CONFIG.to_dict()}),
        ("group_status", {"name": "g"}),
        ("replace_leader", {"name": "g", "node": "n2"}),
        ("remove_group", {"name": "g"}),
        ("status", {}),
        ("groups_detail", {}),
    ]
    assert all(where == CONTROL for where, request in node.received if request[1] == ipc.CALL)


def test_adding_a_group_waits_for_its_leader_in_the_table(node: FakeNode) -> None:
    node.set_leader("g", uid=3)

    def add(node: FakeNode, where: int, request: list[Any]) -> Any:
        threading.Timer(0.05, lambda: node.set_leader("g", uid=9, term=2, node="n3")).start()
        return [request[0], ipc.OK, {"uid": 9}]

    node.script = add
    with raftfleet.connect(node.run_dir) as fleet:
        fleet.add_consensus_group("g", 3, CONFIG)
        assert fleet.whereis_leader("g") == ("n3", 2), "the leader of the old group of that name does not count"


def test_adding_a_group_that_gets_no_leader_in_time_says_that_it_was_added(node: FakeNode) -> None:
    node.script = lambda node, where, request: [request[0], ipc.OK, {"uid": 9}]
    with raftfleet.connect(node.run_dir) as fleet, pytest.raises(errors.NoLeader, match="was added"):
        fleet.add_consensus_group("g", 3, CONFIG, timeout=0.05)


def test_many_groups_are_added_a_thousand_at_a_time(node: FakeNode) -> None:
    names = [f"g{number}" for number in range(2500)]
    with raftfleet.connect(node.run_dir) as fleet:
        fleet.add_consensus_groups(iter(names), 3, CONFIG)
        assert set(fleet.consensus_groups()) == set(names)
        with pytest.raises(errors.AlreadyAdded, match="g7"):
            fleet.add_consensus_groups(["new", "g7"], 3, CONFIG)
        fleet.add_consensus_groups([], 3, CONFIG)
    calls = [request[3] for request in node.requests(ipc.CALL) if request[2] == "add_groups"]
    assert [call["names"] for call in calls[:3]] == [names[:1000], names[1000:2000], names[2000:]]
    assert all(call["replicas"] == 3 and call["config"] == CONFIG.to_dict() for call in calls) and len(calls) == 4


def test_of_many_groups_one_that_gets_no_leader_in_time_is_named(node: FakeNode) -> None:
    def add_without_leader(node: FakeNode, where: int, request: list[Any]) -> list[Any]:
        node.set_leader("led", 1)
        return [request[0], ipc.OK, {"uids": [1, 2, 3]}]

    node.script = add_without_leader
    with raftfleet.connect(node.run_dir) as fleet, pytest.raises(errors.NoLeader, match="'a' and 1 others was added"):
        fleet.add_consensus_groups(["led", "a", "b"], 3, CONFIG, timeout=0.3)


@pytest.mark.parametrize("names", ["abc", b"abc", ["a", "a"], ["a", ""], ["a", 7], 7])
def test_names_that_cannot_be_added_together_are_refused_at_once(node: FakeNode, names: Any) -> None:
    with raftfleet.connect(node.run_dir) as fleet, pytest.raises((TypeError, ValueError)):
        fleet.add_consensus_groups(names, 3, CONFIG)
    assert node.requests(ipc.CALL) == []


@pytest.mark.parametrize("arguments", [("g",), ("g", 3), ("g", 3, "m:C"), ("g", 3, {"machine": "m:C"})])
def test_a_group_needs_a_config(node: FakeNode, arguments: tuple[Any, ...]) -> None:
    with raftfleet.connect(node.run_dir) as fleet:
        with pytest.raises(TypeError, match="GroupConfig"):
            fleet.add_consensus_group(*arguments)
        for replicas in (0, -1, 1.5, "3"):
            with pytest.raises(ValueError, match="replicas"):
                fleet.add_consensus_group("g", replicas, CONFIG)  # type: ignore[arg-type]
    assert node.received == []


@pytest.mark.parametrize(
    ("code", "body", "expected"),
    [
        (ipc.ALREADY_ADDED, "there is one", errors.AlreadyAdded),
        (ipc.NO_ACTIVE_NODE, "none", errors.NoActiveNode),
        (ipc.REFUSED, "no", errors.Refused),
    ],
)
def test_a_refusal_is_raised_as_its_class(node: FakeNode, code: int, body: Any, expected: type[Exception]) -> None:
    node.script = lambda node, where, request: [request[0], code, body]
    with raftfleet.connect(node.run_dir) as fleet, pytest.raises(expected, match=body):
        fleet.add_consensus_group("g", 3, CONFIG)


def test_a_machine_that_cannot_be_imported_names_node_and_reason(node: FakeNode) -> None:
    node.script = lambda node, where, request: [request[0], ipc.NOT_IMPORTABLE, ["n2", "No module named m"]]
    with raftfleet.connect(node.run_dir) as fleet, pytest.raises(errors.StateMachineNotImportable) as caught:
        fleet.add_consensus_group("g", 3, CONFIG)
    assert (caught.value.node, caught.value.reason) == ("n2", "No module named m")


def test_an_exception_of_the_users_code_comes_back_with_type_and_message(node: FakeNode) -> None:
    with raftfleet.connect(node.run_dir) as fleet, pytest.raises(errors.CommandFailed) as caught:
        fleet.command("g", "fail")
    assert (caught.value.exception_type, caught.value.exception_message) == ("ValueError", "no")


def test_where_a_leader_is_takes_no_request_if_the_table_knows_the_group(node: FakeNode) -> None:
    node.set_leader("g", node="n2", term=5)
    with raftfleet.connect(node.run_dir) as fleet:
        assert fleet.whereis_leader("g") == ("n2", 5)
        node.writers[shard_of("g", 2)].set_leaderless("g", 7)
        assert fleet.whereis_leader("g") is None
        assert node.received == []
        node.uids["h"] = 8
        assert fleet.whereis_leader("h") == ("n2", 4), "a group that the table does not know is asked for"
        assert fleet.whereis_leader("nowhere") is None


# -------------------------------------------------------------------- outcomes


def test_a_retry_is_the_same_command_and_is_applied_once(node: FakeNode) -> None:
    fates = iter(["apply silently", "apply and hang up", "answer"])

    def awkward(node: FakeNode, where: int, request: list[Any]) -> Any:
        fate = next(fates, "answer")
        answer = node.serve(where, request)
        return {"apply silently": None, "apply and hang up": HANG_UP, "answer": answer}[fate]

    node.script = awkward
    with raftfleet.connect(node.run_dir) as fleet:
        assert fleet.command("g", "inc", **QUICK) == 0
        assert fleet.command("g", "inc", **QUICK) == 1
    commands = node.commands()
    assert [command[1] for command in commands] == [1, 1, 1, 2]
    assert [command[2] for command in commands] == [0, 0, 0, 1]
    assert len({command[3] for command in commands[:3]}) == 1, "retries carry the time of the first attempt"


def test_silence_is_an_unknown_outcome_for_a_command_and_none_for_a_query(node: FakeNode) -> None:
    node.script = lambda node, where, request: None
    with raftfleet.connect(node.run_dir) as fleet:
        with pytest.raises(errors.OutcomeUnknown, match="3 attempts"):
            fleet.command("g", "inc", **QUICK)
        with pytest.raises(errors.Unanswered, match="3 attempts"):
            fleet.query("g", "get", **QUICK)
        with pytest.raises(errors.Unanswered):
            fleet.call("groups", {}, 0.05)
        with pytest.raises(errors.OutcomeUnknown):
            fleet.call("remove_group", {"name": "g"}, 0.05)
    assert len(node.requests(ipc.CALL)) == 2


def test_no_leader_at_every_attempt_was_not_applied(node: FakeNode) -> None:
    node.script = lambda node, where, request: [request[0], ipc.NO_LEADER, "no leader"]
    with raftfleet.connect(node.run_dir) as fleet, pytest.raises(errors.NoLeader):
        fleet.command("g", "inc", **QUICK)
    assert len(node.commands()) == 3


def test_a_group_that_does_not_exist_is_known_at_once(node: FakeNode) -> None:
    with raftfleet.connect(node.run_dir) as fleet, pytest.raises(errors.GroupNotFound):
        fleet.command("no such group", "inc")
    assert len(node.commands()) == 1


def test_a_late_answer_to_an_attempt_given_up_is_used_by_its_retry(node: FakeNode) -> None:
    held: list[Any] = []

    def late(node: FakeNode, where: int, request: list[Any]) -> Any:
        held.append(node.serve(where, request))
        return None if len(held) == 1 else [held[0]]

    node.script = late
    with raftfleet.connect(node.run_dir) as fleet:
        assert fleet.command("g", "inc", timeout=0.05, retry=1, retry_interval=0.01) == 0
        node.script = FakeNode.serve
        assert fleet.command("g", "inc") == 1


def test_a_late_answer_never_becomes_the_answer_of_another_call(node: FakeNode) -> None:
    held: list[Any] = []

    def hold(node: FakeNode, where: int, request: list[Any]) -> Any:
        reply = node.serve(where, request)
        if request[1] == ipc.QUERY and not held:
            held.append([request[0], ipc.OK, msgpack.packb("late")])
            return None
        return [*held, reply]

    node.script = hold
    with raftfleet.connect(node.run_dir) as fleet:
        with pytest.raises(errors.Unanswered):
            fleet.query("g", "get", timeout=0.05, retry=0)
        assert fleet.command("g", "inc") == 0
        assert fleet.query("g", "get") == 1
    assert node.accepted == 1, "the connection is still good"


def test_a_node_that_speaks_nonsense_costs_the_connection_only(node: FakeNode) -> None:
    count = 0

    def nonsense(node: FakeNode, where: int, request: list[Any]) -> Any:
        nonlocal count
        count += 1
        return ["x"] if count == 1 else node.serve(where, request)

    node.script = nonsense
    with raftfleet.connect(node.run_dir) as fleet:
        assert fleet.command("g", "inc", retry_interval=0.01) == 0


def test_bad_arguments_send_nothing(node: FakeNode) -> None:
    with raftfleet.connect(node.run_dir) as fleet:
        for arg, error in (({1, 2}, TypeError), (1 << 70, ValueError)):
            with pytest.raises(error):
                fleet.command("g", arg)
        with pytest.raises(errors.CommandTooLarge):
            fleet.command("g", b"x" * (17 << 20))
        with pytest.raises(TypeError):
            fleet.call("groups", {"a": {1}})
        with pytest.raises(TypeError):
            fleet.call("groups", {1: 2})  # type: ignore[dict-item]
    assert node.received == []


@pytest.mark.parametrize("name", [5, None, ["g"], "", "\ud800", "$fleet", "a\0b", "x" * 256], ids=ascii)
def test_every_call_about_a_group_refuses_a_name_that_none_can_have(node: FakeNode, name: Any) -> None:
    with raftfleet.connect(node.run_dir) as fleet:
        for call in (
            lambda: fleet.add_consensus_group(name, config=CONFIG),
            lambda: fleet.change_config(name, CONFIG),
            lambda: fleet.remove_consensus_group(name),
            lambda: fleet.whereis_leader(name),
            lambda: fleet.status(name),
            lambda: fleet.replace_leader(name, "n2"),
            lambda: fleet.command(name, "inc"),
            lambda: fleet.query(name, "get"),
        ):
            with pytest.raises(ValueError, match="name"):
                call()
    assert node.received == []


def test_large_arguments_and_results_pass(node: FakeNode) -> None:
    blob = os.urandom(5 << 20)
    with raftfleet.connect(node.run_dir) as fleet:
        assert fleet.command("g", blob, timeout=5.0) == blob


# -------------------------------------------------------------------- threads, forks, signals


def test_threads_share_a_client_and_every_increment_counts_once(node: FakeNode) -> None:
    with raftfleet.connect(node.run_dir) as fleet:
        with ThreadPoolExecutor(16) as pool:
            results = list(pool.map(lambda _: fleet.command("g", "inc", timeout=5.0), range(500)))
        assert sorted(results) == list(range(500))
        assert node.accepted <= 16
        assert len(node.client_ids) == 1
        assert fleet.command("g", "inc") == 500
        assert node.commands()[-1][1:3] == [501, 500], "all that ended is acknowledged"


def increment_in_child(fleet: sync.Fleet, queue: Any, count: int) -> None:
    queue.put([fleet.command("g", "inc", timeout=5.0) for _ in range(count)])


def test_a_forked_child_has_an_id_and_connections_of_its_own(node: FakeNode) -> None:
    with raftfleet.connect(node.run_dir) as fleet:
        assert fleet.command("g", "inc") == 0
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        children = [context.Process(target=increment_in_child, args=(fleet, queue, 20)) for _ in range(2)]
        for child in children:
            child.start()
        mine = [fleet.command("g", "inc", timeout=5.0) for _ in range(20)]
        theirs = [result for _ in children for result in queue.get()]
        for child in children:
            child.join(10)
            assert child.exitcode == 0
            child.close()
        queue.close()
        assert sorted(mine + theirs) == list(range(1, 61))
        assert len(node.client_ids) == 3
        assert fleet.command("g", "inc") == 61
    assert max(Counter(command[0] for command in node.commands()).values()) == 22


def test_a_fork_while_other_threads_use_the_client_leaves_the_child_a_working_one(node: FakeNode) -> None:
    with raftfleet.connect(node.run_dir) as fleet:
        stop = threading.Event()

        def hammer() -> None:
            while not stop.is_set():
                fleet.query("g", "get", timeout=5.0)

        threads = [threading.Thread(target=hammer) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(10):
                pid = os.fork()
                if pid == 0:
                    try:
                        signal.alarm(10)
                        os._exit(0 if fleet.query("g", "get", timeout=5.0) == 0 else 1)
                    finally:
                        os._exit(2)
                assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_more_threads_than_the_window_wait_their_turn(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raftfleet.client.core.WINDOW", 4)
    most = 0

    def watch(node: FakeNode, where: int, request: list[Any]) -> Any:
        nonlocal most
        _client, seq, acked, _issued, _arg = msgpack.unpackb(request[5])
        most = max(most, seq - acked)
        return node.serve(where, request)

    node.script = watch
    with raftfleet.connect(node.run_dir) as fleet, ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda _: fleet.command("g", "inc", timeout=5.0), range(200)))
    assert sorted(results) == list(range(200))
    assert most <= 4


class Interrupted(Exception):
    pass


def test_an_exception_from_a_signal_handler_leaves_no_half_used_connection(node: FakeNode) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupted

    node.script = lambda node, where, request: None
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with raftfleet.connect(node.run_dir) as fleet:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Interrupted):
                fleet.command("g", "inc", timeout=5.0)
            node.script = FakeNode.serve
            assert fleet.command("g", "inc") == 0
            assert node.commands()[-1][1:3] == [2, 1], "nobody waits for the interrupted one any more"
    finally:
        signal.signal(signal.SIGALRM, previous)


# -------------------------------------------------------------------- the node's life


def test_the_node_restarts_under_the_client_and_sessions_go_on(node: FakeNode) -> None:
    node.set_leader("g")
    with raftfleet.connect(node.run_dir) as fleet:
        assert [fleet.command("g", "inc") for _ in range(3)] == [0, 1, 2]
        node.stop()
        assert fleet.whereis_leader("g") is None or not node.received
        node.start()
        assert fleet.command("g", "inc", retry=0) == 3, "a dead idle connection costs no attempt"
        assert fleet.whereis_leader("g") == ("n1", 1)
        assert node.commands()[-1][1:3] == [4, 3]
        assert len(node.client_ids) == 1


def test_the_node_may_come_back_with_another_number_of_workers(node: FakeNode) -> None:
    with raftfleet.connect(node.run_dir) as fleet:
        names = [f"group {number}" for number in range(8)]
        for workers in (2, 5, 1, 3):
            node.stop()
            node.start(workers)
            for name in names:
                fleet.command(name, "inc")
        assert node.counters == dict.fromkeys(names, 4)


def test_a_command_waits_for_its_node_to_come_back(node: FakeNode) -> None:
    with raftfleet.connect(node.run_dir) as fleet:
        fleet.command("g", "inc")
        node.stop()
        timer = threading.Timer(0.3, node.start)
        timer.start()
        try:
            assert fleet.command("g", "inc", retry=100, retry_interval=0.02) == 1
        finally:
            timer.join()


def test_a_node_that_is_gone_was_certainly_not_asked(node: FakeNode) -> None:
    with raftfleet.connect(node.run_dir) as fleet:
        fleet.command("g", "inc")
        node.stop()
        with pytest.raises(errors.NodeNotRunning, match="raftfleet-node start"):
            fleet.command("g", "inc", **QUICK)
        with pytest.raises(errors.NodeNotRunning):
            fleet.call("groups", {}, 0.2)


def test_threads_see_no_error_and_no_wrong_number_while_the_node_restarts(node: FakeNode) -> None:
    stop = threading.Event()
    results: dict[str, list[int]] = {f"group {number}": [] for number in range(4)}

    def count(name: str) -> None:
        while not stop.is_set():
            results[name].append(fleet.command(name, "inc", timeout=0.2, retry=200, retry_interval=0.02))

    with raftfleet.connect(node.run_dir) as fleet:
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(count, name) for name in results]
            try:
                for _ in range(3):
                    wait_for_progress(results)
                    node.stop()
                    node.start()
                wait_for_progress(results)
            finally:
                stop.set()
            for future in futures:
                future.result()
    for name, seen in results.items():
        assert seen == list(range(len(seen))), name


def wait_for_progress(results: dict[str, list[int]]) -> None:
    goals = {name: len(seen) + 10 for name, seen in results.items()}
    deadline = time.monotonic() + 10
    while any(len(results[name]) < goal for name, goal in goals.items()):
        assert time.monotonic() < deadline, "the counts stand still"
        time.sleep(0.005)


def test_a_new_generation_of_the_table_is_followed(node: FakeNode) -> None:
    node.set_leader("g")
    with raftfleet.connect(node.run_dir) as fleet:
        assert fleet.whereis_leader("g") == ("n1", 1)
        assert node.table is not None
        node.table.grow()
        for writer in node.writers:
            writer.follow()
        node.set_leader("g", term=2, node="n2")
        assert fleet.whereis_leader("g") == ("n2", 2)


def test_a_closed_client_says_so(node: FakeNode) -> None:
    fleet = raftfleet.connect(node.run_dir)
    fleet.command("g", "inc")
    fleet.close()
    fleet.close()
    for call in (lambda: fleet.command("g", "inc"), lambda: fleet.whereis_leader("g"), fleet.active_nodes):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    assert "closed" in repr(fleet)


# -------------------------------------------------------------------- which node


def test_a_run_dir_without_a_node_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(errors.NodeNotRunning, match=f"{tmp_path}.*raftfleet-node start"):
        raftfleet.connect(tmp_path)


def test_the_environment_names_the_run_dir(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAFTFLEET_RUN_DIR", str(node.run_dir))
    with raftfleet.connect() as fleet:
        assert fleet.run_dir == node.run_dir


def test_without_a_name_the_only_running_node_is_meant(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    place = tmp_path / "raftfleet"
    for name in ("a", "b", "dead"):
        (place / name).mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as leftover:
        leftover.bind(str(place / "dead" / "control.sock"))
    with pytest.raises(errors.NodeNotRunning, match=str(place)):
        discovery.find_run_dir(None, environ)
    with FakeNode(place / "a", workers=1):
        assert discovery.find_run_dir(None, environ) == place / "a"
        assert discovery.find_run_dir("x", environ) == Path.cwd() / "x"
        with FakeNode(place / "b", workers=1):
            with pytest.raises(errors.NodeNotRunning, match=f"{place / 'a'}, {place / 'b'}"):
                discovery.find_run_dir(None, environ)
            assert discovery.find_run_dir(None, {**environ, "RAFTFLEET_NAME": "b"}) == place / "b"


def test_the_package_offers_what_its_docstring_says() -> None:
    assert set(raftfleet.__all__) <= set(dir(raftfleet))
    for name in raftfleet.__all__:
        assert getattr(raftfleet, name)
    with pytest.raises(AttributeError, match="nothing"):
        raftfleet.nothing  # noqa: B018


def test_a_look_up_of_a_known_group_asks_nobody(node: FakeNode) -> None:
    node.set_leader("g")
    with raftfleet.connect(node.run_dir) as fleet:
        for _ in range(100):
            assert fleet.whereis_leader("g")
    assert not node.received
    RegionWriter(node.run_dir, 0).close()

"""The asyncio client against a real Unix-socket server: many in flight, restarts, cancellation."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import msgpack
import pytest
from client.fake_node import HANG_UP, FakeNode

import raftfleet
from raftfleet import errors
from raftfleet.client import aio
from raftfleet.core.names import shard_of
from raftfleet.wire import ipc

CONFIG = raftfleet.GroupConfig("m:C")
QUICK: dict[str, Any] = {"timeout": 0.05, "retry": 2, "retry_interval": 0.01}


def run(node: FakeNode, body: Callable[[aio.Fleet], Awaitable[None]]) -> None:
    """Run ``body`` with a client of ``node``; no task may be left when it returns."""

    async def main() -> None:
        async with raftfleet.aio.connect(node.run_dir) as fleet:
            await body(fleet)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_the_example_of_the_readme(node: FakeNode) -> None:
    async def body(fleet: aio.Fleet) -> None:
        await fleet.add_consensus_group("consensus1", 3, CONFIG)
        assert await fleet.query("consensus1", "get") == 0
        assert await fleet.command("consensus1", "inc") == 0
        assert await fleet.query("consensus1", "get", consistency="stale") == 1
        assert await fleet.whereis_leader("consensus1") == raftfleet.Leader("n1", 1)
        assert await fleet.consensus_groups() == {"consensus1": 3}
        assert await fleet.whereis_leader("nowhere") is None
        await fleet.add_consensus_groups(["consensus2", "consensus3"], 3, CONFIG)
        assert await fleet.command("consensus3", "inc") == 0
        with pytest.raises(errors.AlreadyAdded):
            await fleet.add_consensus_groups(["consensus4", "consensus2"], 3, CONFIG)

    run(node, body)


@pytest.mark.parametrize("name", [5, None, ["g"], "", "\ud800", "$fleet", "a\0b", "x" * 256], ids=ascii)
def test_every_call_about_a_group_refuses_a_name_that_none_can_have(node: FakeNode, name: Any) -> None:
    async def body(fleet: aio.Fleet) -> None:
        for call in (
            fleet.add_consensus_group(name, config=CONFIG),
            fleet.change_config(name, CONFIG),
            fleet.remove_consensus_group(name),
            fleet.whereis_leader(name),
            fleet.status(name),
            fleet.replace_leader(name, "n2"),
            fleet.command(name, "inc"),
            fleet.query(name, "get"),
        ):
            with pytest.raises(ValueError, match="name"):
                await call

    run(node, body)
    assert node.received == []


def test_every_control_call_reaches_the_manager_with_its_arguments(node: FakeNode) -> None:
    async def body(fleet: aio.Fleet) -> None:
        await fleet.activate("z1")
        await fleet.deactivate()
        await fleet.deactivate(wait=True)
        await fleet.active_nodes()
        await fleet.unreachable_nodes()
        await fleet.leaderless_groups()
        await fleet.remove_dead_node("n2")
        await fleet.add_consensus_group("g", config=CONFIG)
        await fleet.change_config("g", CONFIG)
        await fleet.status("g")
        await fleet.replace_leader("g", "n2")
        await fleet.remove_consensus_group("g")
        assert await fleet.call("status") == ["status", {}]

    run(node, body)
    methods = "activate deactivate deactivate active_nodes unreachable_nodes leaderless_groups remove_dead_node".split()
    methods += "add_group change_config group_status replace_leader remove_group status".split()
    assert [request[2] for request in node.requests(ipc.CALL)] == methods


def test_the_two_clients_offer_the_same_calls() -> None:
    def calls(client: type) -> set[str]:
        return {name for name in vars(client) if not name.startswith("_")}

    assert calls(aio.Fleet) == calls(raftfleet.Fleet)
    for name in calls(aio.Fleet):
        assert getattr(aio.Fleet, name).__doc__, name


def test_a_thousand_commands_in_flight_are_each_answered_once(node: FakeNode) -> None:
    async def body(fleet: aio.Fleet) -> None:
        results = await asyncio.gather(*(fleet.command("g", "inc", timeout=5.0) for _ in range(1000)))
        assert sorted(results) == list(range(1000))

    run(node, body)
    assert node.accepted == 1, "one connection carries them all"
    assert len(node.commands()) == 1000


def test_more_commands_than_the_window_wait_in_the_client(node: FakeNode) -> None:
    most = 0

    def watch(node: FakeNode, where: int, request: list[Any]) -> Any:
        nonlocal most
        _client, seq, acked, _issued, _arg = msgpack.unpackb(request[5])
        most = max(most, seq - acked)
        return node.serve(where, request)

    node.script = watch

    async def body(fleet: aio.Fleet) -> None:
        results = await asyncio.gather(*(fleet.command("g", "inc", timeout=5.0) for _ in range(3000)))
        assert sorted(results) == list(range(3000))

    run(node, body)
    assert most <= 1024


def test_commands_asked_for_together_go_out_in_one_frame(node: FakeNode) -> None:
    frames: list[int] = []
    original = node._answer
    counts: dict[int, int] = {}

    def count(where: int, request: list[Any]) -> Any:
        counts[threading.get_ident()] = counts.get(threading.get_ident(), 0) + 1
        return original(where, request)

    node._answer = count  # type: ignore[method-assign]
    written: list[int] = []
    pack_frame = ipc.pack_frame

    def record(items: list[Any]) -> bytes:
        if threading.current_thread() is threading.main_thread():
            written.append(len(items))
        return pack_frame(items)

    async def body(fleet: aio.Fleet) -> None:
        await fleet.query("g", "get")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ipc, "pack_frame", record)
            await asyncio.gather(*(fleet.command("g", "inc") for _ in range(64)))
        frames.extend(written)

    run(node, body)
    assert (frames, node.run_counts) == ([1], [64]), "one frame, and in it one run"


class _Withheld:
    """Answers to nothing until :meth:`answer_all`; then to all of it, and at once to what comes later."""

    def __init__(self, node: FakeNode) -> None:
        # All belong to the shard of "answer", so that they share a connection.
        self.names = [name for name in map("g{}".format, range(1000)) if shard_of(name, 2) == shard_of("answer", 2)]
        self.node = node
        self.replies: list[Any] = []
        node.script = self._script

    def _script(self, node: FakeNode, where: int, request: list[Any]) -> Any:
        reply = node.serve(where, request)
        if request[2] != "answer":
            self.replies.append(reply)
            return None
        node.script = FakeNode.serve
        return [*self.replies, reply]

    def begin(self, fleet: aio.Fleet, names: list[str]) -> list[asyncio.Task[Any]]:
        return [asyncio.create_task(fleet.command(name, "inc", timeout=60.0)) for name in names]

    async def received(self, count: int) -> None:
        deadline_s = asyncio.get_running_loop().time() + 60
        while len(self.node.requests()) < count:
            assert asyncio.get_running_loop().time() < deadline_s
            await asyncio.sleep(0.005)

    async def answer_all(self, fleet: aio.Fleet) -> None:
        await fleet.command("answer", "now", timeout=60.0)


def test_with_many_runs_under_way_a_group_has_one_and_what_comes_meanwhile_leaves_together(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio, "HOLD_US_MAX", 600_000_000)
    withheld = _Withheld(node)
    names = withheld.names[: aio.RUNS_UNHELD_MAX + 1]

    async def body(fleet: aio.Fleet) -> None:
        first = withheld.begin(fleet, names)
        await withheld.received(len(names))
        for _ in range(3):  # one after the other, and still one run
            first += withheld.begin(fleet, names[:1])
            await asyncio.sleep(0.02)
        assert node.run_counts == [] and len(node.requests()) == len(names)
        await withheld.answer_all(fleet)
        assert await asyncio.gather(*first) == [0] * len(names) + [1, 2, 3]

    run(node, body)
    assert node.run_counts == [3]


def test_with_few_runs_under_way_nothing_waits_for_another(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "HOLD_US_MAX", 600_000_000)
    withheld = _Withheld(node)
    names = withheld.names[: aio.RUNS_UNHELD_MAX]

    async def body(fleet: aio.Fleet) -> None:
        first = withheld.begin(fleet, names)
        await withheld.received(len(names))
        first += withheld.begin(fleet, names[:1])
        await withheld.received(len(names) + 1)
        await withheld.answer_all(fleet)
        assert await asyncio.gather(*first) == [0] * len(names) + [1]

    run(node, body)


def test_a_group_that_does_not_answer_holds_nothing_for_long(node: FakeNode) -> None:
    withheld = _Withheld(node)
    names = withheld.names[: aio.RUNS_UNHELD_MAX + 1]

    async def body(fleet: aio.Fleet) -> None:
        first = withheld.begin(fleet, names)
        await withheld.received(len(names))
        first += withheld.begin(fleet, names[:1])
        await withheld.received(len(names) + 1)
        await withheld.answer_all(fleet)
        assert await asyncio.gather(*first) == [0] * len(names) + [1]

    run(node, body)


def test_what_is_held_when_the_connection_breaks_goes_out_on_the_next_one(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio, "HOLD_US_MAX", 600_000_000)
    withheld = _Withheld(node)
    names = withheld.names[: aio.RUNS_UNHELD_MAX + 1]

    async def body(fleet: aio.Fleet) -> None:
        first = withheld.begin(fleet, names)
        await withheld.received(len(names))
        first += withheld.begin(fleet, names[:1])
        await asyncio.sleep(0.02)
        node.script = FakeNode.serve
        node.hang_up()
        assert await asyncio.gather(*first) == [0] * len(names) + [1]

    run(node, body)


def test_a_retry_is_the_same_command_and_is_applied_once(node: FakeNode) -> None:
    fates = iter(["silence", "hang up", "answer"])

    def awkward(node: FakeNode, where: int, request: list[Any]) -> Any:
        answer = node.serve(where, request)
        return {"silence": None, "hang up": HANG_UP}.get(next(fates, "answer"), answer)

    node.script = awkward

    async def body(fleet: aio.Fleet) -> None:
        assert await fleet.command("g", "inc", **QUICK) == 0
        assert await fleet.command("g", "inc", **QUICK) == 1

    run(node, body)
    assert [command[1:3] for command in node.commands()] == [[1, 0], [1, 0], [1, 0], [2, 1]]


def test_outcomes_are_classified_as_the_core_says(node: FakeNode) -> None:
    async def body(fleet: aio.Fleet) -> None:
        node.script = lambda node, where, request: None
        with pytest.raises(errors.OutcomeUnknown):
            await fleet.command("g", "inc", **QUICK)
        with pytest.raises(errors.Unanswered):
            await fleet.query("g", "get", **QUICK)
        node.script = lambda node, where, request: [request[0], ipc.NO_LEADER, "no leader"]
        with pytest.raises(errors.NoLeader):
            await fleet.command("g", "inc", **QUICK)
        node.script = FakeNode.serve
        with pytest.raises(errors.CommandFailed):
            await fleet.command("g", "fail")
        with pytest.raises(errors.GroupNotFound):
            await fleet.command("no such group", "inc")
        with pytest.raises(TypeError):
            await fleet.command("g", {1, 2})

    run(node, body)


def test_a_late_answer_is_used_by_its_own_call_and_by_no_other(node: FakeNode) -> None:
    held: list[Any] = []

    def hold(node: FakeNode, where: int, request: list[Any]) -> Any:
        reply = node.serve(where, request)
        if not held:
            held.append(reply)
            return None
        return [held[0], held[0], reply]

    node.script = hold

    async def body(fleet: aio.Fleet) -> None:
        with pytest.raises(errors.Unanswered):
            await fleet.query("g", "get", timeout=0.05, retry=0)
        assert await fleet.command("g", "inc") == 0
        held.clear()
        assert await fleet.command("g", "inc", **QUICK) == 1
        assert await fleet.query("g", "get") == 2

    run(node, body)
    assert node.accepted == 1


def test_commands_in_flight_survive_the_restart_of_their_node(node: FakeNode) -> None:
    async def body(fleet: aio.Fleet) -> None:
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {"retry": 500, "retry_interval": 0.02, "timeout": 1.0}
        results: list[int] = []

        async def count() -> None:
            for _ in range(20):
                results.append(await fleet.command("g", "inc", **options))

        tasks = [asyncio.create_task(count()) for _ in range(50)]
        while len(results) < 100:
            await asyncio.sleep(0)
        await loop.run_in_executor(None, node.stop)
        await asyncio.sleep(0.05)
        await loop.run_in_executor(None, node.start)
        await asyncio.gather(*tasks)
        assert sorted(results) == list(range(1000))

    run(node, body)
    assert len(node.client_ids) == 1
    assert {command[0] for command in node.commands()} == node.client_ids


def test_a_node_that_is_gone_was_certainly_not_asked(node: FakeNode) -> None:
    async def body(fleet: aio.Fleet) -> None:
        await fleet.command("g", "inc")
        await asyncio.get_running_loop().run_in_executor(None, node.stop)
        with pytest.raises(errors.NotApplied):
            await fleet.command("g", "inc", **QUICK)
        with pytest.raises(errors.NodeNotRunning, match="raftfleet-node start"):
            await fleet.command("g", "inc", **QUICK)
        await asyncio.get_running_loop().run_in_executor(None, node.start, 5)
        assert await fleet.command("g", "inc") == 1, "the node came back with another number of workers"

    run(node, body)


def test_a_cancelled_command_is_given_up_and_its_seq_ends(node: FakeNode) -> None:
    async def body(fleet: aio.Fleet) -> None:
        node.script = lambda node, where, request: None
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(fleet.command("g", "inc", timeout=60.0), 0.05)
        node.script = FakeNode.serve
        assert await fleet.command("g", "inc") == 0

    run(node, body)
    assert [command[1:3] for command in node.commands()] == [[1, 0], [2, 1]]


def test_closing_gives_up_what_is_under_way(node: FakeNode) -> None:
    node.script = lambda node, where, request: None
    outcomes: list[BaseException | None] = []

    async def main() -> None:
        fleet = await raftfleet.aio.connect(node.run_dir)
        tasks = [asyncio.create_task(fleet.command("g", "inc")), asyncio.create_task(fleet.query("g", "get"))]
        while len(node.received) < 2:
            await asyncio.sleep(0.001)
        await fleet.close()
        await fleet.close()
        await asyncio.wait(tasks)
        outcomes.extend(task.exception() for task in tasks)
        with pytest.raises(RuntimeError, match="closed"):
            await fleet.command("g", "inc")

    asyncio.run(main())
    assert [type(outcome) for outcome in outcomes] == [errors.OutcomeUnknown, errors.NotApplied]


def test_a_client_belongs_to_the_loop_in_which_it_was_entered(node: FakeNode) -> None:
    with pytest.raises(RuntimeError, match="async with"):
        asyncio.run(raftfleet.aio.connect(node.run_dir).command("g", "inc"))

    async def body(fleet: aio.Fleet) -> None:
        def elsewhere() -> str:
            try:
                asyncio.run(fleet.command("g", "inc"))
            except RuntimeError as error:
                return str(error)
            return "no error"

        assert "event loop" in await asyncio.get_running_loop().run_in_executor(None, elsewhere)
        with pytest.raises(RuntimeError, match="entered already"):
            await fleet.__aenter__()

    run(node, body)


def test_a_node_that_does_not_read_stops_neither_loop_nor_memory(node: FakeNode) -> None:
    gate = threading.Event()

    def blocked(node: FakeNode, where: int, request: list[Any]) -> Any:
        gate.wait(10)
        return node.serve(where, request)

    node.script = blocked

    async def body(fleet: aio.Fleet) -> None:
        blob = os.urandom(1 << 20)
        tasks = [asyncio.create_task(fleet.command("g", blob, timeout=30.0)) for _ in range(20)]
        for _ in range(20):
            await asyncio.sleep(0.001)
        with pytest.raises(errors.NotApplied):
            await fleet.command("g", "inc", timeout=0.05, retry=0)
        gate.set()
        assert await asyncio.gather(*tasks) == [blob] * 20

    run(node, body)


def test_a_node_that_speaks_nonsense_costs_the_connection_only(node: FakeNode) -> None:
    count = 0

    def nonsense(node: FakeNode, where: int, request: list[Any]) -> Any:
        nonlocal count
        count += 1
        return ["x"] if count == 1 else node.serve(where, request)

    node.script = nonsense

    async def body(fleet: aio.Fleet) -> None:
        assert await fleet.command("g", "inc", retry_interval=0.01) == 0

    run(node, body)


def test_no_node_is_said_on_entering(tmp_path: Any) -> None:
    async def main() -> None:
        with pytest.raises(errors.NodeNotRunning, match="raftfleet-node start"):
            async with raftfleet.aio.connect(tmp_path):
                pass

    asyncio.run(main())


def test_in_a_run_every_command_ends_as_its_own_answer_says(node: FakeNode) -> None:
    def answer(node: FakeNode, where: int, request: list[Any]) -> Any:
        number = msgpack.unpackb(msgpack.unpackb(request[5])[4])
        return (
            None if number % 3 == 2 else [request[0], ipc.OVERLOADED, "full"] if number % 3 else node.serve(0, request)
        )

    node.script = answer

    async def body(fleet: aio.Fleet) -> None:
        calls = [fleet.command("g", number, timeout=0.05, retry=0) for number in range(30)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [outcome for outcome in outcomes if isinstance(outcome, int)] == list(range(0, 30, 3))
        assert {type(outcome) for outcome in outcomes[1::3]} == {errors.Overloaded}
        assert {type(outcome) for outcome in outcomes[2::3]} == {errors.OutcomeUnknown}

    run(node, body)
    assert node.run_counts == [30]


def test_an_answer_to_a_run_that_does_not_fit_costs_the_connection_and_the_commands_are_tried_again(
    node: FakeNode,
) -> None:
    original = node._answer_run
    nonsense = iter([[[1, ipc.OK, [0, 0, b"\x90"]]], [[1, ipc.OK, b"\x01"]]])
    node._answer_run = lambda where, request: next(nonsense, None) or original(where, request)  # type: ignore[method-assign]

    async def body(fleet: aio.Fleet) -> None:
        calls = [fleet.command("g", "inc", timeout=0.2, retry=5, retry_interval=0.01) for _ in range(20)]
        assert sorted(await asyncio.gather(*calls)) == list(range(20))

    run(node, body)

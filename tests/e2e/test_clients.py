"""One client object from several threads, after fork, with a thousand commands in flight, and over a node's restart."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from e2e.load import JUST_AN_INT, THREE_NODES_IN_THREE_ZONES

import raftfleet
from raftfleet.testing import LocalFleet


@pytest.fixture
def counting(fleet: LocalFleet) -> LocalFleet:
    """Three nodes and one group ``counter`` on all of them."""
    fleet.start_nodes(THREE_NODES_IN_THREE_ZONES)
    fleet.connect("n1").add_consensus_group("counter", 3, JUST_AN_INT)
    return fleet


def test_threads_share_a_client_and_every_increment_counts_once(counting: LocalFleet) -> None:
    client = counting.connect("n2")
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: client.command("counter", "inc"), range(400)))
    assert sorted(results) == list(range(400))


def test_a_forked_child_uses_its_parents_client(counting: LocalFleet) -> None:
    client = counting.connect("n2")
    assert client.command("counter", "inc") == 0
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    children = [context.Process(target=_increment, args=(client, queue)) for _ in range(2)]
    for child in children:
        child.start()
    mine = [client.command("counter", "inc") for _ in range(50)]
    theirs = [result for _ in children for result in queue.get()]
    for child in children:
        child.join(10.0)
        assert child.exitcode == 0
    queue.close()
    assert sorted(mine + theirs) == list(range(1, 151))
    assert client.command("counter", "inc") == 151, "the parent's connections still work"


def _increment(client: raftfleet.client.sync.Fleet, queue: multiprocessing.SimpleQueue) -> None:
    queue.put([client.command("counter", "inc") for _ in range(50)])


def test_a_thousand_commands_in_flight_are_each_answered_once(counting: LocalFleet) -> None:
    async def increment_all() -> list[int]:
        async with raftfleet.aio.connect(counting.nodes["n3"].run_dir) as client:
            return await asyncio.gather(*(client.command("counter", "inc", timeout=5.0) for _ in range(1000)))

    assert sorted(asyncio.run(increment_all())) == list(range(1000))


def test_commands_go_on_while_the_clients_node_restarts(counting: LocalFleet) -> None:
    """In memory a restarted node hosts new members; its clients notice a pause and nothing else."""
    results: list[int] = []
    errors: list[Exception] = []
    stop = threading.Event()

    def count(client: raftfleet.client.sync.Fleet) -> None:
        try:
            while not stop.is_set():
                results.append(client.command("counter", "inc", retry=30))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=count, args=(counting.connect("n1"),))
    thread.start()
    try:
        counting.wait_until(lambda: len(results) > 20 or errors, 10.0, "the first increments")
        assert counting.stop_node("n1") == 0
        counting.restart_node("n1")
        mark = len(results)
        counting.wait_until(lambda: len(results) > mark + 20 or errors, 20.0, "increments after the restart")
    finally:
        stop.set()
        thread.join()
    assert not errors, errors
    assert results == list(range(len(results)))


def test_asyncio_commands_in_flight_survive_the_restart_of_their_node(counting: LocalFleet) -> None:
    async def increment_all() -> list[int]:
        loop = asyncio.get_running_loop()
        async with raftfleet.aio.connect(counting.nodes["n1"].run_dir) as client:
            commands = [asyncio.create_task(client.command("counter", "inc", retry=30)) for _ in range(200)]
            await loop.run_in_executor(None, counting.stop_node, "n1")
            commands += [asyncio.create_task(client.command("counter", "inc", retry=30)) for _ in range(200)]
            await loop.run_in_executor(None, counting.restart_node, "n1")
            return await asyncio.gather(*commands)

    assert sorted(asyncio.run(increment_all())) == list(range(400))

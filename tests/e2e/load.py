"""Clients that count, and what must be true of a fleet when it has come to rest."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any

import raftfleet
from raftfleet.errors import RaftFleetError
from raftfleet.testing import LocalFleet

JUST_AN_INT = raftfleet.GroupConfig("raftfleet.testing.machines:JustAnInt")

THREE_NODES_IN_THREE_ZONES = {"n1": "z1", "n2": "z2", "n3": "z3"}
FOUR_NODES_IN_TWO_ZONES = {"n1": "z1", "n2": "z2", "n3": "z1", "n4": "z2"}


def add_groups(fleet: LocalFleet, count: int, *, replicas: int = 3, via: str | None = None) -> list[str]:
    """Add ``count`` groups of :class:`JustAnInt` and return their names."""
    client = fleet.connect(via or fleet.running()[0].name)
    names = [f"group{number}" for number in range(count)]
    for name in names:
        client.add_consensus_group(name, replicas, JUST_AN_INT)
    return names


class Load:
    """One client per group that increments at random moments and asserts that its n-th ``inc`` returned n.

    All run in one thread with an event loop. They go through the nodes named by ``via``, each increment through one at
    random; a test takes a node out (:meth:`leave`) before it stops or kills it, since a real client would live on
    that machine and go with it. ``groups`` may say what each counter holds already; 0 if not. A client that gives up
    or sees a wrong number is noted in :attr:`wrong` and ends. ``retry``: how often a call is tried again.
    """

    def __init__(
        self,
        fleet: LocalFleet,
        groups: Iterable[str] | Mapping[str, int],
        via: Iterable[str],
        *,
        pause_s_max: float = 0.3,
        retry: int = 10,
    ) -> None:
        self._fleet = fleet
        self._via = list(via)
        self._pause_s_max = pause_s_max
        self._retry = retry
        self._clients: dict[str, Any] = {}
        self._under_way: Counter[str] = Counter()
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")
        self._loop: asyncio.AbstractEventLoop | None = None
        self.counts = dict(groups) if isinstance(groups, Mapping) else dict.fromkeys(groups, 0)
        self.wrong: list[str] = []

    def __enter__(self) -> Load:
        self._thread.start()
        assert self._ready.wait(10.0), "the load did not start"
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    # ---------------------------------------------------------------- for the test's thread

    def join(self, names: Iterable[str]) -> None:
        """Go through these nodes too from now on."""
        self._in_loop(self._join(list(names)))

    def leave(self, name: str) -> None:
        """Go through node ``name`` no more; returns when nothing is under way through it."""
        self._in_loop(self._leave(name))

    def check(self) -> None:
        """Assert that no client saw a wrong number or gave up so far."""
        assert not self.wrong, "\n".join(self.wrong[:10])

    def await_progress(self, increments: int = 2, deadline_s: float = 20.0) -> None:
        """Wait until every client has got ``increments`` more answers, or one saw something wrong."""
        mark = dict(self.counts)

        def all_went_on() -> bool:
            return bool(self.wrong) or all(self.counts[name] >= mark[name] + increments for name in mark)

        self._fleet.wait_until(all_went_on, deadline_s, f"{increments} more increments of every group")
        self.check()

    # ---------------------------------------------------------------- in the loop

    def _in_loop(self, coroutine: Coroutine[Any, Any, None]) -> None:
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30.0)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._join(self._via)
        tasks = [asyncio.create_task(self._count(name)) for name in self.counts]
        self._ready.set()
        try:
            while not self._stop.is_set():
                await asyncio.sleep(0.05)
            await asyncio.wait_for(asyncio.gather(*tasks), 60.0)
        finally:
            for client in self._clients.values():
                await client.__aexit__(None, None, None)

    async def _join(self, names: list[str]) -> None:
        for name in names:
            if name not in self._clients:
                client = raftfleet.aio.connect(self._fleet.nodes[name].run_dir)
                self._clients[name] = await client.__aenter__()
        self._via = list(dict.fromkeys((*self._via, *names)))

    async def _leave(self, name: str) -> None:
        self._via.remove(name)
        while self._under_way[name]:
            await asyncio.sleep(0.01)
        await self._clients.pop(name).__aexit__(None, None, None)

    async def _count(self, group: str) -> None:
        rng = random.Random(group)
        while not self._stop.is_set():
            await asyncio.sleep(rng.uniform(0.0, self._pause_s_max))
            node = rng.choice(self._via)
            expected = self.counts[group]
            self._under_way[node] += 1
            try:
                seen = await self._clients[node].command(group, "inc", retry=self._retry)
            except RaftFleetError as error:
                self.wrong.append(f"{group}, increment {expected + 1} via {node}: {type(error).__name__}: {error}")
                return
            finally:
                self._under_way[node] -= 1
            if seen != expected:
                self.wrong.append(f"{group}, increment {expected + 1} via {node} returned {seen}, not {expected}")
                return
            self.counts[group] = expected + 1


def instances(fleet: LocalFleet) -> dict[str, list[int]]:
    """Of each node's workers, once all have said who they are: a status may be older than a worker that just began."""

    def known() -> dict[str, list[int]] | None:
        found = {name: [worker["instance"] for worker in fleet.status(name)["workers"]] for name in fleet.nodes}
        return found if all(map(all, found.values())) else None

    found = fleet.wait_until(known, 60.0, "every worker to be known")
    assert found is not None
    return found


def assert_at_rest(fleet: LocalFleet, zones: Mapping[str, str], replicas: int, load: Load | None = None) -> None:
    """Every group on its desired members and leader, spread over zones, with no node overloaded; counts intact.

    Args:
        fleet: the fleet.
        zones: node -> zone of exactly the nodes that should be active.
        replicas: of each group.
        load: clients whose counts the groups must hold.
    """
    fleet.wait_active(len(zones))
    groups = fleet.wait_settled(deadline_s=60.0)
    for name, group in groups.items():
        assert len(group["members"]) == min(replicas, len(zones)), f"{name}: {group}"
        assert set(group["members"]) <= set(zones), f"{name} has a member on a node that is not active: {group}"
        assert_spread_over_zones(name, group["members"], zones)
    assert_balanced(groups, zones)
    if load is not None:
        load.check()
        client = fleet.connect(fleet.running()[-1].name)
        assert {name: client.query(name, "get") for name in load.counts} == load.counts


def assert_spread_over_zones(name: str, members: Iterable[str], zones: Mapping[str, str]) -> None:
    """No zone holds two members while another holds none."""
    in_zone = Counter(zones[node] for node in members)
    if max(in_zone.values()) >= 2:
        empty = set(zones.values()) - set(in_zone)
        assert not empty, f"{name}: {dict(in_zone)}, but none in {empty}"


def assert_balanced(groups: Mapping[str, Mapping[str, Any]], zones: Mapping[str, str]) -> None:
    """No node holds more than four times the average of members, nor of leaders."""
    _assert_few_each("members", Counter(node for group in groups.values() for node in group["members"]), zones)
    _assert_few_each("leaders", Counter(group["leader"] for group in groups.values()), zones)


def _assert_few_each(what: str, count: Counter[str], zones: Mapping[str, str]) -> None:
    average = sum(count.values()) / len(zones)
    assert max(count.values()) <= 4 * average, f"{what} per node: {dict(count)}, on average {average:.1f}"


def fleet_group_leader(fleet: LocalFleet) -> str:
    """The node that leads the group with the fleet's own metadata."""

    def leader() -> str | None:
        return fleet.call(fleet.running()[0].name, "group_status", {"name": "$fleet"})["leader"]

    found = fleet.wait_until(leader, 10.0, "a leader of the fleet group")
    assert isinstance(found, str)
    return found

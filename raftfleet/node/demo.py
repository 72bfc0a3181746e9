"""``raftfleet-node demo``: the whole story of a fleet in a minute, on one machine, with nothing to configure.

Four nodes in two zones host five groups; clients count without a pause while one node is killed, the groups heal, a
node is added and members move. Every claim is checked where it is made: a :class:`Facts` keeps what was verified and
what was not, and the facts are all that goes to stdout. The narration on stderr is for people only.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import raftfleet
from raftfleet.errors import RaftFleetError
from raftfleet.testing.local_fleet import LocalFleet, LocalFleetError

ZONES = {"n1": "zone-a", "n2": "zone-a", "n3": "zone-b", "n4": "zone-b"}
GROUPS = [f"consensus{number}" for number in range(1, 6)]
REPLICAS = 3
MACHINE = "raftfleet.testing.machines:JustAnInt"

VICTIM = "n2"
NEWCOMER, NEWCOMER_ZONE = "n5", "zone-a"

PURGE_WINDOW_S = 4.0
"""Ten minutes by default; the demo has one."""

COUNT_PAUSE_S_MAX = 0.04


class Facts:
    """What the demo claims, each with whether it held."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.told: list[tuple[bool, str]] = []

    def claim(self, holds: bool, text: str) -> None:
        """Note and narrate that ``text`` was verified, or that it was not."""
        self.told.append((holds, text))
        self._console.print(f"   [green]✓[/] {text}" if holds else f"   [bold red]✗ NOT SO:[/] {text}")

    @property
    def all_hold(self) -> bool:
        return bool(self.told) and all(holds for holds, _ in self.told)


class Counting:
    """One thread per group that increments at random moments and checks that its n-th ``inc`` returned n.

    The clients use the nodes ``via`` in turn; the story takes a node that it is about to kill out first, as its own
    clients would die with it.
    """

    def __init__(self, fleet: LocalFleet, via: list[str], first: dict[str, int]) -> None:
        self._clients = [fleet.connect(name) for name in via]
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.counts = dict(first)
        self.wrong: list[str] = []
        self.slowest_s = 0.0
        self._threads = [threading.Thread(target=self._count, args=(name,), name=f"count {name}") for name in first]

    def __enter__(self) -> Counting:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def total(self) -> int:
        return sum(self.counts.values())

    def take_slowest(self) -> float:
        """The longest that any increment took since the last call, in seconds."""
        with self._lock:
            slowest, self.slowest_s = self.slowest_s, 0.0
        return slowest

    def _count(self, group: str) -> None:
        rng = random.Random(group)
        while not self._stop.wait(rng.uniform(0.0, COUNT_PAUSE_S_MAX)):
            expected = self.counts[group]
            began = time.monotonic()
            try:
                seen = rng.choice(self._clients).command(group, "inc", timeout=1.0, retry=10)
            except RaftFleetError as error:
                self.wrong.append(f"{group}: increment {expected + 1} failed: {error}")
                return
            if seen != expected:
                self.wrong.append(f"{group}: increment {expected + 1} returned {seen} instead of {expected}")
                return
            with self._lock:
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self.counts[group] = expected + 1


def run_demo(*, plain: bool = False) -> bool:
    """Tell the story; return whether all that was claimed held."""
    console = Console(stderr=True, no_color=plain, highlight=False)
    facts = Facts(console)
    began = time.monotonic()
    try:
        with LocalFleet(options={"node_purge_failure_time_window": PURGE_WINDOW_S}, show_logs=True) as fleet:
            _tell(fleet, console, facts)
    except (RaftFleetError, LocalFleetError) as error:
        facts.claim(False, f"the demo ran to its end: {error}")
    console.print(f"[dim]{time.monotonic() - began:.0f} s, and nothing is left behind.[/]\n")
    for holds, text in facts.told:
        click.echo(f"{'verified' if holds else 'NOT SO  '}  {text}")
    return facts.all_hold


def _tell(fleet: LocalFleet, console: Console, facts: Facts) -> None:
    with _chapter(console, "Four nodes in two zones found a fleet by their vote"):
        fleet.start_nodes(ZONES)
        fleet.wait_active(len(ZONES))
        facts.claim(_one_fleet(fleet), f"{len(ZONES)} nodes in 2 zones are one fleet")

    with _chapter(
        console, f"Five consensus groups with {REPLICAS} members each, every one an integer that starts at 0"
    ):
        for name in GROUPS:
            fleet.connect("n1").add_consensus_group(name, REPLICAS, raftfleet.GroupConfig(MACHINE))
        groups = fleet.wait_settled()
        console.print(_placement(groups))
        facts.claim(len(groups) == len(GROUPS), f"{len(GROUPS)} groups have {REPLICAS} members and a leader each")
        facts.claim(_spread(groups), "every group has members in both zones")

    with _chapter(console, "Any node answers for any group, wherever its leader is"):
        one, two, three = (fleet.connect(name) for name in ("n1", "n2", "n3"))
        facts.claim(one.query(GROUPS[0], "get") == 0, f'query {GROUPS[0]} "get" on n1 gives 0')
        facts.claim(two.command(GROUPS[0], "inc") == 0, f'command {GROUPS[0]} "inc" on n2 returns 0')
        facts.claim(three.query(GROUPS[0], "get") == 1, f'query {GROUPS[0]} "get" on n3 gives 1')

    first = {name: int(name == GROUPS[0]) for name in GROUPS}
    with Counting(fleet, ["n1", "n3", "n4"], first) as counting:
        _kill(fleet, console, facts, counting)
        _grow(fleet, console, facts, counting)
        before = counting.total()
        fleet.wait_until(lambda: counting.wrong or counting.total() > before + 100, 10.0, "a hundred more increments")
    with _chapter(console, "What the clients saw, through all of this"):
        total = counting.total()
        for wrong in counting.wrong:
            facts.claim(False, wrong)
        facts.claim(not counting.wrong, f"{total:,} increments: each was applied exactly once, none was lost")
        values = {name: fleet.connect(NEWCOMER).query(name, "get") for name in GROUPS}
        facts.claim(values == counting.counts, f"the new node {NEWCOMER} answers with the same five numbers")


def _kill(fleet: LocalFleet, console: Console, facts: Facts, counting: Counting) -> None:
    with _chapter(console, f"kill -9 of node {VICTIM}, while clients count on all groups"):
        fleet.wait_until(lambda: counting.wrong or min(counting.counts.values()) > 10, 10.0, "clients to count")
        led = sorted(name for name, group in fleet.groups("n1").items() if group["leader"] == VICTIM)
        console.print(f"   {VICTIM} leads {', '.join(led) or 'no group'}")
        counting.take_slowest()
        fleet.kill_node(VICTIM)
        mark = dict(counting.counts)
        fleet.wait_until(
            lambda: counting.wrong or all(counting.counts[name] > mark[name] + 1 for name in GROUPS),
            20.0,
            "all groups to answer again",
        )
        facts.claim(
            not counting.wrong,
            f"after the kill all groups answer; the longest pause was {counting.take_slowest():.1f} s",
        )

    with _chapter(
        console, f"{VICTIM} stays away: the fleet purges it and replaces its members (after {PURGE_WINDOW_S:g} s)"
    ):
        fleet.wait_active(len(ZONES) - 1)
        groups = fleet.wait_settled(of="n1")
        console.print(_placement(groups))
        healed = all(len(group["members"]) == REPLICAS and VICTIM not in group["members"] for group in groups.values())
        facts.claim(healed, f"every group has {REPLICAS} members again, none of them on {VICTIM}")


def _grow(fleet: LocalFleet, console: Console, facts: Facts, counting: Counting) -> None:
    with _chapter(console, f"A new node {NEWCOMER} joins in {NEWCOMER_ZONE}, and members move to it"):
        counting.take_slowest()
        before = fleet.groups("n1")
        fleet.start_node(NEWCOMER, NEWCOMER_ZONE)
        fleet.wait_active(len(ZONES))
        groups = fleet.wait_settled(of="n1")
        console.print(_placement(groups, before))
        moved = sum(NEWCOMER in group["members"] for group in groups.values())
        facts.claim(
            moved > 0, f"{moved} of {len(GROUPS)} groups have a member on {NEWCOMER}; nobody was asked to do it"
        )
        facts.claim(_spread(groups), "every group still has members in both zones")
        facts.claim(
            not counting.wrong, f"while members moved, no increment took longer than {counting.take_slowest():.1f} s"
        )


@contextlib.contextmanager
def _chapter(console: Console, title: str) -> Iterator[None]:
    console.print(f"[bold cyan]▶[/] [bold]{title}[/]")
    began = time.monotonic()
    with console.status("[dim]…[/]"):
        yield
    console.print(f"   [dim]{time.monotonic() - began:.1f} s[/]")


def _one_fleet(fleet: LocalFleet) -> bool:
    return len({fleet.status(node.name)["fleet"] for node in fleet.running()}) == 1


def _zone_of(node: str) -> str:
    return NEWCOMER_ZONE if node == NEWCOMER else ZONES[node]


def _spread(groups: dict[str, dict[str, Any]]) -> bool:
    return all(len({_zone_of(node) for node in group["members"]}) == 2 for group in groups.values())


def _placement(groups: dict[str, dict[str, Any]], before: dict[str, dict[str, Any]] | None = None) -> Table:
    """Groups against nodes: ``L`` leads, ``m`` is a member, ``+`` came just now."""
    nodes = sorted({node for group in groups.values() for node in group["members"]})
    table = Table(box=None, padding=(0, 2), pad_edge=True)
    table.add_column("")
    for node in nodes:
        table.add_column(f"{node} ({_zone_of(node)})", justify="center")
    for name, group in sorted(groups.items()):
        known = set(before[name]["members"]) if before else set(nodes)
        marks = {node: "L" if node == group["leader"] else "m" for node in group["members"]}
        cells = [marks.get(node, "·") + ("+" if node in marks and node not in known else "") for node in nodes]
        table.add_row(name, *(f"[bold]{cell}[/]" if "L" in cell else cell for cell in cells))
    return table

"""Lost majorities in whole simulated fleets, repaired by an operator, from a seed: what is kept, and what may be lost.

``FleetRepair(seed).run()`` plays a fleet of five nodes whose groups are written to on all of them. Then so many nodes
are gone that groups lose their majority, now and then the fleet's own among them: machines without power for good, or
processes that come back having forgotten everything, or nodes that are only cut off, and that the operator gives up by
mistake: they live, serve those who can reach them, and come back later.

The operator acts as ``raftfleet-node repair`` does: the production code judges what the reachable members say
(:mod:`raftfleet.fleet.repair_plan`), and exactly what the plan gives up is declared. What this must come to, within a
bound: every group serves and is where it should be, every replica is equal, and

* a group that kept its majority has lost nothing: it is in its first epoch, and all that was acknowledged is there, in
  the place that was told;
* a group that was repaired has all that its most complete survivor had, in that order, and all that was acknowledged to
  those on this side afterwards; it is in a later epoch, and remembers the repair;
* no command ran twice or in another place than was told, none that was refused ran at all;
* of a group that lost its majority nobody was told of a success before the repair (but by those who are cut off).

What a manager does about repairs besides (its rounds of questions, what it refuses) has tests of its own
(``tests/fleet/test_repair_plan.py``, ``tests/e2e``).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from raftfleet import errors
from raftfleet.client.core import Call
from raftfleet.core.config import GroupConfig
from raftfleet.core.names import FLEET_GROUP, FLEET_UID
from raftfleet.fleet.machine import FleetState
from raftfleet.fleet.repair_plan import ABSENT, EXTINCT, GIVEN_UP, LOST, REPAIRABLE, SILENT, GroupCase, judge, report_of
from raftfleet.machine import StateMachine
from raftfleet.testing.clock import SECOND_US
from raftfleet.testing.fleet import SimFleet, SimFleetOptions
from raftfleet.testing.model import Violation
from raftfleet.testing.network import NetworkFaults
from raftfleet.testing.simulation import SimulationFailure, checker_of
from raftfleet.wire import ipc

NODES = {"n1": "z1", "n2": "z2", "n3": "z3", "n4": "z1", "n5": "z2"}
GROUP_COUNT = 5
JOURNAL = "sim:Journal"
SETTLE_WITHIN_S = 120
POWER, MEMORY, CUT = "power", "memory", "cut off"


class Journal(StateMachine):
    """The list of all operations, in order; a command returns the place that its operation got."""

    def new(self) -> list[int]:
        return []

    def command(self, state: list[int], arg: Any) -> tuple[int, list[int]]:
        state.append(arg)
        return len(state) - 1, state

    def query(self, state: list[int], arg: Any) -> int:
        return len(state)


@dataclass
class Told:
    """What clients were told of one group: ``(operation, place, when the call began, the client's node)``."""

    done: list[tuple[int, int, int, str]] = field(default_factory=list)
    refused: set[int] = field(default_factory=set)


class Writer:
    """One client on one node, writing to one group."""

    def __init__(self, fleet: SimFleet, node: str, name: str, told: Told, rng: random.Random) -> None:
        self.fleet = fleet
        self.node = node
        self.name = name
        self.told = told
        self.rng = rng
        self.client = fleet.client(node)
        self.ident = rng.getrandbits(40)
        self.count = 0
        self.is_open = self.is_stopped = False
        fleet.queue.after(rng.randrange(SECOND_US), self._write)

    def _write(self) -> None:
        if self.is_stopped:
            return
        self.count += 1
        self.is_open = True
        operation, began_us = self.ident << 20 | self.count, self.fleet.queue.now_us
        options: dict[str, Any] = {"timeout": self.rng.choice((0.3, 0.5, 2.0)), "retry": self.rng.choice((0, 1, 3))}
        self.client.command(self.name, operation, then=lambda call: self._written(call, operation, began_us), **options)

    def _written(self, call: Call, operation: int, began_us: int) -> None:
        if call.error is None:
            self.told.done.append((operation, call.result, began_us, self.node))
        elif isinstance(call.error, errors.NotApplied):
            self.told.refused.add(operation)
        else:
            assert isinstance(call.error, errors.OutcomeUnknown), call.error
        self.is_open = False
        self.fleet.queue.after(self.rng.randrange(SECOND_US // 3), self._write)


class FleetRepair:
    """One fleet; see the module's text.

    Attributes:
        kind: how nodes are lost. victims: which.
        repaired: names of the groups that were, with what their most complete survivor had.
        counts: how often what happened.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = rng = random.Random((seed << 8) + 15)
        options = SimFleetOptions(
            workers=rng.choice((1, 2)), slow_turn=rng.choice((0, 0.01, 0.1)), is_checked=False, restart_us=SECOND_US
        )
        self.fleet = SimFleet(seed, options)
        self.fleet.machines[JOURNAL] = Journal
        self.kind = rng.choice((POWER, POWER, MEMORY, CUT))
        # Of the fleet's five voters two may be given up by mistake, not three: then the others would be the fleet.
        self.victims = rng.sample(list(NODES), rng.choice((2, 2, 3)) if self.kind == POWER else 2)
        self.told: dict[str, Told] = {}
        self.writers: list[Writer] = []
        self.uids: dict[str, int] = {}
        self.repaired: dict[str, list[int]] = {}
        self.extinct: set[str] = set()
        self.repaired_us = 0
        self.log_delay_us = rng.choice((0, rng.randrange(4 * SECOND_US)))
        self.counts: dict[str, int] = {}

    def run(self) -> dict[str, int]:
        """Play it; returns how often what happened.

        Raises:
            SimulationFailure: a promise was broken (or the code raised).
        """
        try:
            self._play()
        except (Violation, Exception) as error:
            checker = checker_of(error)
            if isinstance(error, AssertionError) and "did not come about" in str(error):
                checker = "liveness"
            told = f"{type(error).__name__}: {error}"
            report = f"{told}\nseed {self.seed} of repairs in a simulated fleet\n{self.fleet.report()}"
            raise SimulationFailure(report, checker, told, self.fleet.queue.event_count, 0, []) from error
        return self.counts

    def _count(self, what: str, number: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + number

    # -- the course of a run ---------------------------------------------------------------------------------------

    def _play(self) -> None:
        fleet, rng = self.fleet, self.rng
        fleet.start(NODES)
        config = GroupConfig(JOURNAL, log_entries_kept=rng.choice((4, 1000)))
        for number in range(GROUP_COUNT):
            name = f"group-{number}-{rng.randrange(1000)}"  # where it is placed depends on its name
            # The leader of two takes the other one out as soon as its memory is known to be lost: that is a quorum.
            replicas = rng.choice((3, 3, 5, 1) if self.kind == MEMORY else (3, 3, 4, 4, 5, 2, 1))
            self.uids[name] = fleet.add_group(name, replicas, config)
            self.told[name] = Told()
            self.writers += [
                Writer(fleet, node, name, self.told[name], random.Random(rng.getrandbits(64))) for node in NODES
            ]
        fleet.wait_settled()
        fleet.network.set_faults(NetworkFaults(loss=0.1 * rng.random(), duplicate=0.05, reorder=0.05, hold=0.01))
        fleet.run_for(1 + 4 * rng.random())
        self._lose()
        fleet.network.set_faults(None)
        lost = self._majorities_lost()
        fleet.run_for(4)
        silent_us = fleet.queue.now_us
        fleet.run_for(6 + 4 * rng.random())
        self._check_silence(lost, silent_us)
        self._repair(lost)
        self._come_back()
        self._finish()

    def _lose(self) -> None:
        fleet = self.fleet
        self._count(f"nodes lost: {self.kind}", len(self.victims))
        if self.kind == CUT:
            fleet.cut_off(*self.victims)
            return
        for name in self.victims:
            fleet.kill_node(name)
            if self.rng.random() < 0.5:
                fleet.run_for(0.2 * self.rng.random())
        if self.kind == MEMORY:
            for name in self.victims:
                fleet.restart_node(name)

    def _reachable(self) -> list[str]:
        """Where the operator is, and whom that node reaches."""
        if self.kind == MEMORY:
            return list(NODES)
        return [name for name in NODES if name not in self.victims]

    def _majorities_lost(self) -> dict[str, int]:
        """Groups of whose voters, as the members here know them, no quorum is left here: name -> how many are."""
        lost = {}
        for name, uid in {FLEET_GROUP: FLEET_UID, **self.uids}.items():
            members = [m for w, m in self.fleet.members_of(uid) if w.node.name in self._reachable()]
            if not members:
                lost[name] = 0
                continue
            newest = max(members, key=lambda member: (member.log.last_term, member.last_index))
            here = {member.id for member in members if member.membership.lives}
            left = len(here & set(newest.voters))
            if left < newest.membership.quorum:
                lost[name] = left
        return lost

    def _check_silence(self, lost: dict[str, int], since_us: int) -> None:
        for name in lost:
            for operation, place, began_us, node in self.told[name].done if name in self.told else ():
                if began_us > since_us and not (self.kind == CUT and node in self.victims):
                    raise Violation(
                        f"majority: group {name} has lost it, and {operation:x} was done at {place} for {node}"
                    )

    # -- the operator ----------------------------------------------------------------------------------------------

    def _judged(self) -> list[GroupCase]:
        """What ``repair`` shows: the groups without a leader among those who can be reached."""
        fleet, state = self.fleet, self._state()
        rows: dict[int, tuple[str, list[Any]]] = {}
        led: set[int] = set()
        for name in self._reachable():
            for index in range(len(fleet.nodes[name].workers)):
                for row in fleet.call(name, "local_groups", index=index):
                    rows.setdefault(row[1], (row[0], []))[1].append(report_of(name, row))
                    led.update({row[1]} if row[2] == "leader" else ())
        homes = {instance: node.name for node in state.nodes.values() for instance in node.instances}
        for group in state.groups.values():
            rows.setdefault(group.uid, (group.name, []))
        return [
            judge(
                *(name, uid, reports, lambda instance: self._fate(state, homes, instance)),
                lambda instance: homes.get(instance) or state.former.get(instance, ""),
            )
            for uid, (name, reports) in sorted(rows.items())
            if uid not in led and (uid == FLEET_UID or uid in state.groups)
        ]

    def _state(self) -> FleetState:
        """The fleet as the best informed of the reachable nodes knows it."""
        workers = [
            worker
            for worker in self.fleet.live_workers()
            if worker.node.name in self._reachable() and worker.host.fleet_known
        ]
        return max(workers, key=lambda worker: worker.host.fleet_index).host.fleet

    def _fate(self, state: FleetState, homes: dict[int, str], instance: int) -> str:
        why = state.gone.get(instance)
        if why is not None:
            return GIVEN_UP if why == "operator" else LOST
        return ABSENT if homes.get(instance) in self._reachable() else SILENT

    def _repair(self, lost: dict[str, int]) -> None:
        cases = {case.name: case for case in self._judged()}
        for name, left in lost.items():
            verdict = cases[name].verdict if name in cases else "not shown"
            if verdict != (REPAIRABLE if left else EXTINCT):
                raise Violation(f"plan: {left} voters of group {name} are left, and the plan says: {verdict}")
        dead: dict[str, None] = {}
        former: dict[str, None] = {}
        for case in cases.values():
            if case.verdict == REPAIRABLE:
                self._remember(case)
                dead.update(dict.fromkeys(case.dead))
                former.update(dict.fromkeys(case.former))
        self._count("groups repaired", len(self.repaired))
        self.fleet.tell(f"the operator gives up {list(dead)}, and what {list(former)} had")
        for name in dead:
            self._give_up(name)
        for name in former:
            self._propose(["declare_lost", name])
        self._await_repair()
        self.extinct = {name for name, left in lost.items() if not left}
        for name in self.extinct:
            self._count("groups extinct")
            self.fleet.remove_group(name, node=self._operators_node())
            del self.uids[name]
        # Who is gone without having been given up is removed as any dead node is, so that all can settle.
        for name in self.victims if self.kind != MEMORY else ():
            if name not in dead:
                self._give_up(name)

    def _give_up(self, name: str) -> None:
        """The operator's word that a node is gone: told to every shard that can be reached, proposed until it took."""
        instances = list(self._state().nodes[name].instances)
        for other in self._reachable():
            for index in range(len(self.fleet.nodes[other].workers)):
                self.fleet.nodes[other].call(index, "declare_dead", {"instances": instances}, 2000, _ignore)
        # The fleet may have to be repaired first: its log has it later. Those who were given up may be back by then.
        self.fleet.queue.after(self.log_delay_us, self._propose, ["remove_node", name, "operator", instances])

    def _propose(self, command: list[Any]) -> None:
        def answered(code: int, body: Any) -> None:
            if code != ipc.OK:
                self.fleet.queue.after(SECOND_US, self._propose, command)

        self.fleet.nodes[self._operators_node()].propose(command, answered)

    def _operators_node(self) -> str:
        return next(name for name in NODES if name not in self.victims)

    def _remember(self, case: GroupCase) -> None:
        """What the most complete survivor has is what must be there afterwards."""
        survivors = [m for w, m in self.fleet.members_of(case.uid) if w.node.name in self._reachable()]
        survivors = [member for member in survivors if member.id in {row.instance for row in case.members}]
        best = max(survivors, key=lambda member: (member.log.last_term, member.last_index))
        self.repaired[case.name] = list(best.state) if case.uid != FLEET_UID else []

    def _await_repair(self) -> None:
        def serve() -> bool:
            return all(self._epoch_leader(name) for name in self.repaired)

        self.fleet.run_until(serve, f"leaders of a later epoch for {list(self.repaired)}", 60)
        self.repaired_us = self.fleet.queue.now_us

    def _epoch_leader(self, name: str) -> bool:
        uid = FLEET_UID if name == FLEET_GROUP else self.uids[name]
        return any(m.is_established and m.term >> 32 for _, m in self.fleet.members_of(uid))

    def _come_back(self) -> None:
        """Those who were cut off are heard again; of the machines without power some are started after all."""
        fleet = self.fleet
        fleet.run_for(self.rng.choice((0, 5)) * self.rng.random())
        if self.kind == CUT:
            fleet.heal()
            self._tell_the_gone()
        elif self.kind == POWER:
            for name in self.victims:
                if self.rng.random() < 0.5:
                    self._count("nodes back")
                    fleet.restart_node(name)

    def _tell_the_gone(self) -> None:
        """As managers do by their pings: who was removed is told, leaves, and joins again."""
        fleet = self.fleet
        state = self._state()
        for name in self.victims:
            node = fleet.nodes[name]
            if any(instance in state.gone for instance in node.instances):
                self._count("nodes told that they are gone")
                node.leave(joins_again=True)
        fleet.queue.after(SECOND_US, self._tell_the_gone)

    # -- the end ---------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        fleet = self.fleet
        fleet.wait_settled(SETTLE_WITHIN_S)
        fleet.run_for(5)
        for writer in self.writers:
            writer.is_stopped = True
        writing = [writer for writer in self.writers if fleet.nodes[writer.node].is_up]
        fleet.run_until(lambda: not any(writer.is_open for writer in writing), "an end of all calls", 30)
        fleet.wait_settled(SETTLE_WITHIN_S)
        fleet.run_for(12)
        fleet.check_at_rest()
        for name, uid in self.uids.items():
            self._check_group(name, uid)

    def _check_group(self, name: str, uid: int) -> None:
        rows = self.fleet.members_of(uid)
        journal, told = rows[0][1].state, self.told[name]
        places = {operation: place for place, operation in enumerate(journal)}
        if len(places) != len(journal):
            raise Violation(f"exactly once: group {name} ran something twice")
        twice = told.refused & places.keys()
        if twice:
            raise Violation(f"refused: group {name} ran {len(twice)} commands that it had refused")
        kept = 0
        for operation, place, began_us, node in told.done:
            if places.get(operation, place) != place:
                raise Violation(f"exactly once: {operation:x} of {name} is at {places[operation]}, told was {place}")
            kept += operation in places
            may_be_lost = name in self.repaired and (began_us < self.repaired_us or node in self.victims)
            if operation not in places and not may_be_lost:
                raise Violation(f"durability: {operation:x} of {name} was done for {node} at {place}, and is gone")
        self._count("acknowledged", len(told.done))
        self._count("acknowledged and lost with a majority", len(told.done) - kept)
        self._check_epoch(name, journal, [member for _, member in rows])

    def _check_epoch(self, name: str, journal: list[int], members: list[Any]) -> None:
        had = self.repaired.get(name)
        for member in members:
            if bool(member.term >> 32) != (had is not None) or bool(member.membership.audit) != (had is not None):
                raise Violation(
                    f"repair: group {name} {'was' if had is not None else 'was not'} repaired, and is in term"
                    f" {member.term:x} with the records {member.membership.audit}"
                )
        if had is not None and journal[: len(had)] != had:
            raise Violation(f"repair: what the most complete survivor of {name} had is not what it begins with")


def _ignore(code: int, body: Any) -> None:
    """Those who do not hear it are told by the fleet's log."""

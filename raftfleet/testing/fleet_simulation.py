"""Whole simulated fleets under random faults, from a seed: placement, reconciling, forwarding, the leader table.

``FleetSimulation(seed).run()`` plays a fleet of four nodes (:mod:`raftfleet.testing.fleet`: production code from the
client's call down, the wire's bytes too) through cuts, lost frames, killed workers, and nodes that join and leave,
while clients work. Then all heals, and within a bound every group has its desired members and leader, every node's
table knows it, all that was acknowledged is there and nothing that was refused has happened.

What is checked of reconciling at every step, besides (:class:`FleetRules`): no voter that may be alive is removed
before its replacement votes (DESIGN 5.3, 7).

A stand-in plays the manager and founding (``SimNode``, ``SimFleet.found``); they have simulations of their own in
tests/fleet.
"""

from __future__ import annotations

import random
from typing import Any

from raftfleet.core.membership import Membership
from raftfleet.core.names import FLEET_UID
from raftfleet.testing.fleet import REGISTERS, SimFleet, SimFleetOptions
from raftfleet.testing.fleet_clients import Historian
from raftfleet.testing.model import Violation
from raftfleet.testing.network import NetworkFaults
from raftfleet.testing.rules import RuleChecker
from raftfleet.testing.simulation import SimulationFailure, checker_of

NODES = {"n1": "z1", "n2": "z2", "n3": "z1", "n4": "z2"}
SETTLE_WITHIN_S = 120


class FleetRules(RuleChecker):
    """The core's rules, and those of reconciling."""

    fleet: SimFleet

    def _check_config(self, instance: int, member: Any, index: int) -> None:
        super()._check_config(instance, member, index)
        worker = self.fleet.worker_of(instance)
        if member.uid == FLEET_UID or worker is None or len(member.memberships) < 2:
            return
        state = worker.host.fleet
        group = state.group_of_uid(member.uid)
        if group is None:
            return
        new = Membership.unpack(member.log.entry(index).data, index)
        before = [row for at, row in member.memberships if at < index][-1]
        removed = set(before.voters) - set(new.voters)
        wanted = len(state.desired(group))
        if any(state.is_current(voter) for voter in removed) and len(before.voters) <= wanted:
            raise Violation(
                f"reconciling: {sorted(removed)} may be alive, and is removed from group {member.uid} while"
                f" {len(before.voters)} of {wanted} wanted voters are there"
            )


class FleetSimulation:
    """One fleet; see the module's text."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = rng = random.Random((seed << 8) + 9)
        options = SimFleetOptions(workers=rng.choice((1, 2)), slow_turn=rng.choice((0, 0.01, 0.1)))
        self.fleet = SimFleet(seed, options)
        rules = FleetRules(self.fleet.member_of, self.fleet.is_lost, self.fleet._local_us)
        rules.fleet = self.fleet
        self.fleet.rules = rules
        self.clients: list[Historian] = []
        self.uids: dict[str, int] = {}
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
            report = f"{told}\nseed {self.seed} of a simulated fleet\n{self.fleet.report()}"
            raise SimulationFailure(report, checker, told, self.fleet.queue.event_count, 0, []) from error
        return self.counts

    def _play(self) -> None:
        fleet, rng = self.fleet, self.rng
        fleet.start(NODES)
        for name in ("a", "b"):
            self._add_group(name)
        faults = NetworkFaults(
            loss=0.15 * rng.random(), duplicate=0.05 * rng.random(), reorder=0.05 * rng.random(), hold=0.01
        )
        fleet.network.set_faults(faults)
        for _ in range(8):
            fleet.run_for(rng.random() * 3)
            self._strike(faults)
        self._finish()

    def _add_group(self, name: str) -> None:
        self.uids[name] = uid = self.fleet.add_group(name, 3, REGISTERS)
        self.clients += [Historian(self.fleet, node, name, uid) for node in NODES]

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def _strike(self, faults: NetworkFaults) -> None:
        fleet, rng = self.fleet, self.rng
        chance = rng.random()
        if chance < 0.25:
            self._count("cut")
            fleet.cut_off(*rng.sample(list(NODES), rng.choice((1, 1, 2))))
        elif chance < 0.5:
            fleet.heal()
            fleet.network.set_faults(faults)
        elif chance < 0.65:
            self._come_or_go()
        if rng.random() < 0.5 and not fleet.unsettled():
            self._count("worker killed")
            fleet.kill_worker(rng.choice(list(NODES)), rng.randrange(fleet.options.workers))

    def _come_or_go(self) -> None:
        """A fifth node joins; later the first one leaves, and members move each time."""
        fleet = self.fleet
        if "n5" not in fleet.nodes:
            self._count("join")
            fleet.join("n5", "z1")
        elif fleet.nodes["n4"].wants_in and not fleet.nodes["n4"].is_deactivating:
            self._count("deactivate")
            fleet.deactivate("n4")

    def _finish(self) -> None:
        """Peace: all calls end, nothing refused has happened, all that was acknowledged is there and in its place."""
        fleet = self.fleet
        fleet.heal()
        fleet.run_for(1)
        for client in self.clients:
            client.is_stopped = True
        fleet.run_for(12)
        fleet.run_until(lambda: not any(client.open_count for client in self.clients), "an end of all calls", 30)
        fleet.history.check_refused()
        fleet.wait_settled(SETTLE_WITHIN_S)
        fleet.run_for(12)
        fleet.check_at_rest()
        for uid in self.uids.values():
            for worker, member in fleet.members_of(uid):
                fleet.history.check_state(uid, member.state.seen, worker.instance)
        for client in self.clients:
            for outcome, count in client.outcomes.items():
                self.counts[outcome] = self.counts.get(outcome, 0) + count

"""Whole simulated fleets, on disks too, under a schedule of faults: all that can go wrong with machines, from a seed.

``FleetStorm(seed).run()`` plays a fleet of four nodes or five (:mod:`raftfleet.testing.fleet`: production code from the
client's call down to the storage) while clients work on groups that come and go. Faults, each with its own rate: lost,
doubled, reordered and held frames, cuts, slow links; killed workers; power lost by a node or by all; disks that fail,
are full, or are another, empty one after a restart; nodes started with another number of workers; stopped processes;
clocks; transfers; nodes that join and leave; groups added and removed. Then all heals, and within a bound

* every call has ended and every group serves,
* every group has its desired members and leader, every node's table knows it, surplus workers are gone,
* all that was acknowledged is there, nothing that was refused has happened, and nothing waits anywhere.

At every step the core's rules and reconciling's are checked, and what clients were told (``FleetRules``, the fleet's
own checkers). What destroys memories (a lost disk; in memory, any crash) strikes only where every group has all of its
members: what an operator must do about lost majorities is not played here.

Re-sharding, joining and leaving are played by a manager in small (``SimNode``).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from raftfleet.core.names import shard_of
from raftfleet.testing.clock import MILLISECOND_US, SECOND_US
from raftfleet.testing.disk import CRASH, EIO, ENOSPC, TEAR
from raftfleet.testing.fleet import REGISTERS, SimFleet, SimFleetOptions, SimNode
from raftfleet.testing.fleet_clients import Historian
from raftfleet.testing.fleet_profiles import (
    FLEET_PROFILES,
    FleetOptions,
    draw_fleet_schedule,
    fleet_options_of,
    is_fleet_seed,
)
from raftfleet.testing.fleet_simulation import FleetRules
from raftfleet.testing.model import Violation
from raftfleet.testing.network import DROP, STALL, NetworkFaults
from raftfleet.testing.schedule import Fault
from raftfleet.testing.sim_durable import DurableSimWorker
from raftfleet.testing.sim_worker import SimWorker
from raftfleet.testing.simulation import SimulationFailure, Summary, checker_of
from raftfleet.wire import ipc

ZONES = {"n1": "z1", "n2": "z2", "n3": "z1", "n4": "z2", "n5": "z3"}
CALLS_END_WITHIN_S = 40
SETTLE_WITHIN_S = 180
"""After healing: nodes may have to leave and to join, and groups to move twice."""
REST_S = 15
_MASK = (1 << 48) - 1


class FleetStorm:
    """One fleet; see the module's text.

    Args:
        seed: of everything.
        options: how rough; None: as the seed draws it.
        schedule: the faults; None: as the seed draws them.
    """

    def __init__(self, seed: int, options: FleetOptions | None = None, schedule: Sequence[Fault] | None = None) -> None:
        self.seed = seed
        self.options = options = options or fleet_options_of(seed)
        self.schedule = list(schedule) if schedule is not None else draw_fleet_schedule(seed, options)
        self.rng = rng = random.Random((seed << 8) + 24)
        self.fleet = SimFleet(
            seed,
            SimFleetOptions(
                workers=rng.choice((1, 2)), slow_turn=rng.choice((0, 0.01, 0.1)), is_durable=options.is_durable
            ),
        )
        rules = FleetRules(self.fleet.member_of, self.fleet.is_lost, self.fleet._local_us)
        rules.fleet = self.fleet
        rules.are_leases_safe = options.drift_margin is None or options.drift <= options.drift_margin
        self.fleet.rules = rules
        self.founders = list(ZONES)[: rng.choice((4, 4, 5))]
        self.clients: list[Historian] = []
        self.uids: dict[str, int] = {}
        self.struck: list[Fault] = []
        self.faults_on = True
        self._group_number = 0
        self._moved: set[str] = set()

    # -- the course of a run ---------------------------------------------------------------------------------------

    def run(self) -> Summary:
        """Play it.

        Raises:
            SimulationFailure: a promise was broken (or the code raised).
        """
        fleet = self.fleet
        try:
            self._set_up()
            fleet.queue.run_until(self._start_us + self.options.fault_us)
            self._heal()
            self._finish()
        except (Violation, Exception) as error:
            raise self._failure(error) from error
        return Summary(self.seed, fleet.queue.now_us, self.state_hash(), self._counted())

    def _counted(self) -> dict[str, int]:
        fleet = self.fleet
        counts = dict(fleet.counts)
        counts.update({f"frames {name}": count for name, count in fleet.network.counts.items()})
        for client in self.clients:
            for outcome, count in client.counts.items():
                counts[outcome] = counts.get(outcome, 0) + count
        counts["steps"] = fleet.step_count
        counts["elections"] = len(fleet.cluster.leaders)
        counts["configurations"] = fleet.cluster.config_count
        counts["acknowledged"] = fleet.history.acknowledged_count()
        counts[f"profile: {self.options.name or 'none'}"] = 1
        return dict(sorted(counts.items()))

    def _set_up(self) -> None:
        fleet = self.fleet
        fleet.start({name: ZONES[name] for name in self.founders})
        for _ in range(2):
            name = self._next_name()
            self._serve(name, fleet.add_group(name, 3, self._config()))
        self._start_us = fleet.queue.now_us
        for fault in self.schedule:
            fleet.queue.at(self._start_us + fault.at_us, self._strike, fault)

    def _next_name(self) -> str:
        self._group_number += 1
        return f"group-{self._group_number}"

    def _config(self) -> Any:
        options = self.options
        margin = options.drift_margin if self.rng.random() < 0.5 else None
        return dataclasses.replace(
            REGISTERS, clock_drift_margin=margin, log_entries_kept=self.rng.choice((4, 20, 1000))
        )

    def _serve(self, name: str, uid: int) -> None:
        self.uids[name] = uid
        self.clients += [Historian(self.fleet, node, name, uid, think_s_max=0.6) for node in self.founders]

    def _strike(self, fault: Fault) -> None:
        if not self.faults_on:
            return
        self.struck.append(fault)
        getattr(self, f"_fault_{fault.kind}")(random.Random(fault.seed), fault)

    def _tell(self, what: str, text: str) -> None:
        self.fleet.count(what)
        self.fleet.tell(f"{what}: {text}")

    # -- the network -----------------------------------------------------------------------------------------------

    def _until(self, fault: Fault, function: Any, *args: Any) -> None:
        self.fleet.queue.at(self._start_us + fault.until_us, function, *args)

    def _fault_frames(self, rng: random.Random, fault: Fault) -> None:
        faults = NetworkFaults(
            loss=rng.choice((0.0, 0.02, 0.1, 0.3)),
            duplicate=rng.choice((0.0, 0.05, 0.2)),
            reorder=rng.choice((0.0, 0.1, 0.3)),
            hold=rng.choice((0.0, 0.02, 0.1)),
            hold_us_max=rng.choice((1, 5)) * SECOND_US,
        )
        self._tell("lossy network", str(faults))
        self.fleet.network.set_faults(faults)
        self._until(fault, self.fleet.network.set_faults, None)

    def _fault_cut(self, rng: random.Random, fault: Fault) -> None:
        network = self.fleet.network
        places = [node.place for node in self.fleet.nodes.values()]
        pairs = [(a, b) for a, b in network.pairs() if a in places and b in places]
        kind = rng.choice(("node", "halves", "one way"))
        if kind == "one way":
            chosen = rng.sample(pairs, rng.randrange(1, 4))
        else:
            side = set(rng.sample(places, 1 if kind == "node" else rng.randrange(1, len(places))))
            chosen = [(a, b) for a, b in pairs if (a in side) != (b in side)]
        state = STALL if rng.random() < 0.3 else DROP
        self._tell(f"cut: {kind}", str(chosen))
        for a, b in chosen:
            network.cut(a, b, state)
        self._until(fault, self._mend, chosen)

    def _mend(self, pairs: list[tuple[int, int]]) -> None:
        for a, b in pairs:
            self.fleet.network.mend(a, b)

    def _fault_slow(self, rng: random.Random, fault: Fault) -> None:
        network = self.fleet.network
        for a, b in network.pairs():
            if rng.random() < 0.4:
                delay_us = rng.choice((20, 100, 400)) * MILLISECOND_US
                network.set_delay(a, b, delay_us // 2, delay_us)
        self._tell("slow links", "some")
        self._until(fault, network.reset_delays)

    # -- processes and machines ------------------------------------------------------------------------------------

    def _pick_node(self, rng: random.Random) -> SimNode | None:
        node = self.fleet.nodes[rng.choice(list(self.fleet.nodes))]
        return node if node.is_up else None

    def _pick_worker(self, rng: random.Random) -> SimWorker | None:
        node = self._pick_node(rng)
        draw = rng.random()
        return node.workers[int(draw * len(node.workers))] if node is not None else None

    def _may_destroy(self) -> bool:
        """Whether every group has all of its members, with all that they remember."""
        nodes = self.fleet.nodes.values()
        is_whole = all(node.is_up and 0 not in node.instances and not node.is_deactivating for node in nodes)
        return is_whole and not self.fleet.unsettled()

    def _fault_worker_kill(self, rng: random.Random, fault: Fault) -> None:
        worker = self._pick_worker(rng)
        if worker is not None and (self.options.is_durable or self._may_destroy()):
            self.fleet.count("crash: worker killed")
            self.fleet.kill_worker(worker.node.name, worker.index)

    def _fault_node_crash(self, rng: random.Random, fault: Fault) -> None:
        node = self._pick_node(rng)
        if node is not None and (self.options.is_durable or self._may_destroy()):
            self.fleet.count("crash: power of a node")
            self._power_off(node, rng)

    def _power_off(self, node: SimNode, rng: random.Random, workers: int | None = None) -> None:
        self.fleet.kill_node(node.name, keep=rng.choice((0.0, 0.5, 1.0)))
        self.fleet.queue.after(int(rng.random() * 4 * SECOND_US), self._power_on, node, workers)

    def _power_on(self, node: SimNode, workers: int | None = None) -> None:
        if not node.is_up:
            self.fleet.restart_node(node.name, workers)

    def _fault_crash_all(self, rng: random.Random, fault: Fault) -> None:
        if self.options.is_durable:
            self.fleet.count("crash of all")
            for node in self.fleet.nodes.values():
                if node.is_up:
                    self._power_off(node, rng)

    def _fault_disk_lost(self, rng: random.Random, fault: Fault) -> None:
        worker = self._pick_worker(rng)
        if worker is not None and self.options.is_durable and self._may_destroy():
            self._tell("disk lost", f"worker {worker.index} of {worker.node.name}")
            worker.node.lose_disk(worker.index)

    def _fault_node_lost(self, rng: random.Random, fault: Fault) -> None:
        node = self._pick_node(rng)
        if node is not None and self.options.is_durable and self._may_destroy():
            self._tell("node wiped", node.name)
            for index in range(len(node.workers)):
                node.lose_disk(index)
            self._power_off(node, rng)

    def _fault_disk_error(self, rng: random.Random, fault: Fault) -> None:
        """One of the next calls that change the disk fails, or is the last before the power goes."""
        worker = self._pick_worker(rng)
        if not isinstance(worker, DurableSimWorker):
            return
        files = worker.files
        count = rng.randrange(1, 30)
        worker.keep = rng.choice((0.0, 0.5, 1.0))
        kinds = ("pwrite", "fdatasync", "rename", "sync_dir", "unlink")
        only = rng.choice((kinds, ("fdatasync",)))
        error = rng.choice((CRASH, CRASH, EIO, TEAR))
        self._tell("disk error armed", f"worker {worker.index} of {worker.node.name}")

        def plan(number: int, name: str) -> int | None:
            nonlocal count
            if name not in only:
                return None
            count -= 1
            if count > 0:
                return None
            files.plan = lambda number, name: None
            return error if name == "pwrite" or error != TEAR else EIO

        files.plan = plan

    def _fault_disk_full(self, rng: random.Random, fault: Fault) -> None:
        worker = self._pick_worker(rng)
        if isinstance(worker, DurableSimWorker):
            files = worker.files
            self._tell("disk full", f"worker {worker.index} of {worker.node.name}")
            files.plan = lambda number, name: ENOSPC if name in ("pwrite", "fallocate") else None
            self._until(fault, _free, files)

    def _fault_reshard(self, rng: random.Random, fault: Fault) -> None:
        node = self._pick_node(rng)
        workers = rng.choice((1, 2, 3))
        if node is not None and self.options.is_durable and workers != node.workers_count:
            self._tell("re-sharding", f"{node.name} from {node.workers_count} workers to {workers}")
            self._power_off(node, rng, workers)

    def _fault_pause(self, rng: random.Random, fault: Fault) -> None:
        worker = self._pick_worker(rng)
        if worker is not None:
            length_us = int(rng.choice((0.2, 1.0, 3.0, 8.0)) * rng.random() * SECOND_US)
            self._tell("pause", f"worker {worker.index} of {worker.node.name}, {length_us / SECOND_US:.3f} s")
            worker.pause()
            self.fleet.queue.after(length_us, worker.resume)

    def _fault_clock(self, rng: random.Random, fault: Fault) -> None:
        self._tell("clock rates", "change")
        half = self.options.drift / 2
        for worker in self.fleet.live_workers():
            worker.clock.set_rate(self.fleet.queue.now_us, int(1_000_000 * (1 + rng.uniform(-half, half))))

    # -- people's whims --------------------------------------------------------------------------------------------

    def _ask(self, rng: random.Random, method: str, args: dict[str, Any], name: str, answer: Any) -> None:
        up = [node for node in self.fleet.nodes.values() if node.is_up and node.wants_in]
        if up:
            node = rng.choice(up)
            owner = shard_of(name, node.workers_count) if method == "replace_leader" else 0
            node.call(owner, method, args, 5000, answer)

    def _pick_group(self, rng: random.Random) -> str:
        return rng.choice(list(self.uids))

    def _fault_transfer(self, rng: random.Random, fault: Fault) -> None:
        name, node = self._pick_group(rng), rng.choice(list(self.fleet.nodes))
        self._tell("transfer asked", f"{name} to {node}")
        self._moved.add(name)
        self._ask(rng, "replace_leader", {"name": name, "node": node}, name, lambda code, body: None)

    def _fault_add(self, rng: random.Random, fault: Fault) -> None:
        name = self._next_name()
        self._tell("group added", name)

        def added(code: int, body: Any) -> None:
            if code == ipc.OK and self.faults_on and name not in self.uids:
                self._serve(name, body["uid"])

        replicas = rng.choice((3, 3, 5, 4))
        args = {"name": name, "replicas": replicas, "config": self._config().to_dict()}
        self._ask(rng, "add_group", args, name, added)

    def _fault_remove(self, rng: random.Random, fault: Fault) -> None:
        if len(self.uids) > 1:
            name = self._pick_group(rng)
            self._tell("group removed", name)
            del self.uids[name]
            self._moved.discard(name)
            for client in self.clients:
                client.is_stopped |= client.name == name
            self._ask(rng, "remove_group", {"name": name}, name, lambda code, body: None)

    def _fault_join(self, rng: random.Random, fault: Fault) -> None:
        """A node more joins, or the last one leaves; while one leaves nothing more is asked."""
        fleet = self.fleet
        last = list(fleet.nodes.values())[-1]
        if any(node.is_deactivating for node in fleet.nodes.values()) or not last.is_up:
            return
        if last.name in self.founders:
            self._tell("node joins", "n6")
            fleet.join("n6", rng.choice(("z1", "z2", "z3")))
        elif last.wants_in:
            self._tell("node leaves", last.name)
            fleet.deactivate(last.name)
        else:
            self._tell("node joins again", last.name)
            fleet.join(last.name, last.zone)

    # -- peace -----------------------------------------------------------------------------------------------------

    def _heal(self) -> None:
        self.faults_on = False
        fleet = self.fleet
        fleet.heal()
        for node in fleet.nodes.values():
            for files in node.disks:
                if files is not None:
                    _free(files)
            for worker in node.workers:
                if worker is not None:
                    worker.resume()

    def _finish(self) -> None:
        fleet = self.fleet
        fleet.run_for(6)  # machines that were down are up by now
        for client in self.clients:
            client.is_stopped = True
        fleet.run_for(12)
        fleet.run_until(
            lambda: not any(client.open_count for client in self.clients), "an end of all calls", CALLS_END_WITHIN_S
        )
        fleet.history.check_refused()
        fleet.run_until(self._is_settled, "settled", SETTLE_WITHIN_S, detail=lambda: "\n".join(self._unsettled()))
        fleet.run_for(REST_S)
        fleet.check_at_rest()
        for name, uid in self.uids.items():
            members = fleet.members_of(uid)
            if not members:
                raise Violation(f"durability: group {name} is nowhere")
            for worker, member in members:
                fleet.history.check_state(uid, member.state.seen, worker.instance)

    def _is_settled(self) -> bool:
        self._bring_home()
        return not self._unsettled()

    def _unsettled(self) -> list[str]:
        fleet = self.fleet
        found = fleet.unsettled()
        for node in fleet.nodes.values():
            if node.wants_in and len(node.workers) != node.workers_count:
                found.append(f"{node.name} still runs {len(node.workers)} workers, wanted are {node.workers_count}")
            if node.is_deactivating:
                found.append(f"{node.name} has not left")
        return found

    def _bring_home(self) -> None:
        """Leaders that were chosen by hand stay where they are: hand them back."""
        fleet = self.fleet
        if fleet.queue.now_us < self._home_due_us:
            return
        self._home_due_us = fleet.queue.now_us + 3 * SECOND_US
        state = fleet.any_state()
        for name in sorted(self._moved):
            group = state.by_name.get(name) if state is not None else None
            leader = fleet.leader_of(name)
            if state is None or group is None or leader is None:
                continue
            home, instance = state.desired(group)[0]
            if leader.instance != instance:
                self._ask(self.rng, "replace_leader", {"name": name, "node": home}, name, lambda code, body: None)

    _home_due_us = 0
    _start_us = 0

    # -- a failure -------------------------------------------------------------------------------------------------

    def state_hash(self) -> int:
        """One number for what all members are now: two runs that share it are at the same point."""
        value = self.fleet.trace
        for worker in self.fleet.live_workers():
            for uid, m in worker.host.shard.members.items():
                for part in (uid, m.term, m.commit, m.applied, m.last_index, m.log.last_term):
                    value = (value * 0x5DEECE66D + part) & _MASK
        return value

    def _failure(self, error: BaseException) -> SimulationFailure:
        told = f"{type(error).__name__}: {error}"
        checker = checker_of(error)
        if isinstance(error, AssertionError) and "did not come about" in str(error):
            checker = "liveness"
            told = f"{type(error).__name__}: {str(error).partition(f'{chr(10)}seed ')[0]}"
        fleet, state = self.fleet, self.state_hash()
        lines = [
            told,
            f"seed {self.seed} of a simulated fleet, at {fleet.queue.now_us / SECOND_US:.6f} s, step"
            f" {fleet.step_count}, state {state:012x}; repeat it, or cut it short, with:",
            f"    python -m raftfleet.testing.simulate {self.arguments()}",
            f"    python -m raftfleet.testing.simulate {self.arguments()} --shrink",
            fleet.report(),
        ]
        return SimulationFailure("\n".join(lines), checker, told, fleet.step_count, state, list(self.struck))

    @property
    def story(self) -> list[str]:
        """What happened."""
        return self.fleet.story

    def tell_more(self, story_lines: int, frames: int) -> None:
        """Remember so many of the last frames, for a transcript (of the story nothing is forgotten)."""
        self.fleet.keep_frames(frames)

    def frames_told(self) -> list[str]:
        """The last frames that arrived, one line for each message."""
        return self.fleet.frames_told()

    def members_told(self) -> list[str]:
        """Where every member stands."""
        return self.fleet.members_told()

    def arguments(self) -> str:
        """What the command needs to play this again."""
        options = self.options
        if options == fleet_options_of(self.seed):
            return f"--seed {self.seed}" + ("" if is_fleet_seed(self.seed) else " --world fleets")
        if options == FLEET_PROFILES.get(options.name):
            return f"--seed {self.seed} --profile '{options.name}'"
        return f"--seed {self.seed}  (with options of its own: {options})"


def _free(files: Any) -> None:
    files.plan = lambda number, name: None

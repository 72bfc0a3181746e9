"""A simulated cluster of shards with many groups, clients, an operator and faults, all from one seed.

``Simulation(seed).run()`` plays a minute or so: faults strike as a schedule says that was drawn beforehand
(:mod:`raftfleet.testing.schedule`: loss, duplication, reordering, held frames, cuts in one or both directions, slow
links, crashes with all memory lost or with a disk as it was, pauses of seconds, drifting clocks, full and failing
disks, membership changes, leader transfers, groups removed and added) while clients work; then everything heals, and
every group must serve within :data:`SERVE_WITHIN_US`, reach the members that the operator wants, and come to rest with
equal logs and states. After every step of a shard its own ``check_invariants()`` and the checkers run.

What is random is drawn from generators seeded by the seed alone, and nothing iterates over a set of str or bytes, so a
seed gives the same run on any machine, with any supported Python and any PYTHONHASHSEED; :attr:`Simulation.trace` tells
two runs apart.

In memory an instance that crashes is lost for ever: the next one at its place is a stranger that must be brought in by
membership change. On a disk it comes back with what was saved. The simulation never destroys so many memories that a
quorum of any group is gone (that is a matter for the operator, DESIGN 5.15, and not for consensus); it does stop, pause
and cut off as many as it likes.

The parts, each standing on the one before: ``sim_cluster`` (shards, network, checks), ``sim_operator`` (groups and
their members), ``sim_faults`` (what faults do), and here the course of a run.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from raftfleet.core.sending import RETRY_US
from raftfleet.testing.clients import Call, SimClient
from raftfleet.testing.clock import MILLISECOND_US, SECOND_US
from raftfleet.testing.fleet_profiles import is_fleet_seed
from raftfleet.testing.linearizability import SearchTooLarge, find_violation, register_model
from raftfleet.testing.model import Violation
from raftfleet.testing.profiles import PROFILES, SimulationOptions, options_of
from raftfleet.testing.schedule import Fault, draw_schedule
from raftfleet.testing.sim_child import LONGEST_US
from raftfleet.testing.sim_faults import FaultLayer

SERVE_WITHIN_US = 20 * SECOND_US
"""After healing every group must answer a command and a linearizable query within this: twenty election timeouts, for
several dead members may have to be replaced first, one change at a time."""

REST_US = 6 * SECOND_US + RETRY_US + LONGEST_US
"""... and be at rest after this more: a snapshot may have come to nothing at the very end of the faults."""

LINK_CONFIRMS_WITHIN_BEATS = 6
"""Three that differ, a list, what it leads to, and the next one."""

SETTLE_WITHIN_US = 40 * SECOND_US
"""... and have exactly the members that the operator wants, all equal, within this."""


class SimulationFailure(AssertionError):
    """A promise was broken; the message holds the seed, the command that repeats it, and the last events.

    Attributes:
        checker: which checker spoke.
        told: what it said.
        step_count, state: where the run ended; a repetition ends at the same.
        struck: the faults that had struck by then.
    """

    def __init__(self, report: str, checker: str, told: str, step_count: int, state: int, struck: list[Fault]) -> None:
        super().__init__(report)
        self.checker = checker
        self.told = told
        self.step_count = step_count
        self.state = state
        self.struck = struck


@dataclass
class Summary:
    """What a run was made of."""

    seed: int
    virtual_us: int
    trace: int
    counts: dict[str, int] = field(default_factory=dict)


class Simulation(FaultLayer):
    """One cluster; see the module's text.

    Args:
        seed: of everything.
        options: how rough; None: as the seed draws it.
        schedule: the faults; None: as the seed draws them.
    """

    def __init__(
        self, seed: int, options: SimulationOptions | None = None, schedule: Sequence[Fault] | None = None
    ) -> None:
        super().__init__(seed, options or options_of(seed))
        self.schedule = list(schedule) if schedule is not None else draw_schedule(seed, self.options)
        self.clients: list[SimClient] = []

    def run(self) -> Summary:
        """Play the whole run.

        Raises:
            SimulationFailure: a promise was broken (or the code raised).
        """
        try:
            self._set_up()
            self.queue.run_until(self.options.fault_us)
            self._heal()
        except (Violation, Exception) as error:
            raise self._failure(error) from error
        self.counts.update({f"frames {name}": count for name, count in self.network.counts.items()})
        self.counts["steps"] = self.step_count
        self.counts["elections"] = len(self.cluster.leaders)
        self.counts["configurations"] = self.cluster.config_count
        self.counts["acknowledged"] = self.history.acknowledged_count()
        self.counts[f"profile: {self.options.name or 'none'}"] = 1
        return Summary(self.seed, self.queue.now_us, self.state_hash(), dict(sorted(self.counts.items())))

    def _set_up(self) -> None:
        rng = self.rng
        for place in range(self.place_count):
            self.start_shard(place)
        for _ in range(rng.choice((1, 2, 3))):
            self._add_group(rng)
        for _ in range(rng.choice((2, 3, 5))):
            client = SimClient(self, random.Random(rng.getrandbits(64)))
            self.clients.append(client)
            client.start()
        self.queue.after(SECOND_US, self._operate)
        self.queue.after(SECOND_US, self._check_silence)
        for fault in self.schedule:
            self.queue.at(fault.at_us, self.strike, fault)

    # -- a failure -------------------------------------------------------------------------------------------------

    def _failure(self, error: BaseException) -> SimulationFailure:
        told = f"{type(error).__name__}: {error}"
        state = self.state_hash()
        checker = checker_of(error)
        lines = [
            told,
            f"seed {self.seed}, at {self.queue.now_us / SECOND_US:.6f} s, step {self.step_count}, state {state:012x};"
            " repeat it, or cut it short, with:",
            f"    python -m raftfleet.testing.simulate {self.arguments()}",
            f"    python -m raftfleet.testing.simulate {self.arguments()} --shrink",
            "last events:",
            *(f"    {line}" for line in self.story),
            "last frames:",
            *(f"    {line}" for line in self.frames_told()),
            "members:",
            *(f"    {line}" for line in self.members_told()),
        ]
        return SimulationFailure("\n".join(lines), checker, told, self.step_count, state, list(self.struck))

    def arguments(self) -> str:
        """What the command needs to play this again."""
        options = self.options
        if options == options_of(self.seed):
            return f"--seed {self.seed}" + (" --world shards" if is_fleet_seed(self.seed) else "")
        if options == PROFILES.get(options.name):
            return f"--seed {self.seed} --profile '{options.name}'"
        return f"--seed {self.seed}  (with options of its own: {options})"

    def tell_more(self, story_lines: int, frames: int) -> None:
        """Remember so many lines and frames, clients' calls too, for a transcript. Call it before :meth:`run`."""
        self.story = deque(maxlen=story_lines)
        self.tells_clients = True
        self.keep_frames(frames)

    def frames_told(self) -> list[str]:
        """The last frames that arrived, one line for each message."""
        return [
            f"{now_us / SECOND_US:10.6f} {a} -> {b}: {message}"
            for now_us, a, b, frame in self._frames
            for message in frame
        ]

    def members_told(self) -> list[str]:
        """Where every member stands."""
        return [
            f"{shard.instance} group {uid}: {m.role} term {m.term} leader {m.leader} commit {m.commit}"
            f" applied {m.applied} log {m.log.first_index}..{m.last_index} voters {m.voters} learners {m.learners}"
            f"{' paused' if shard.is_paused else ''}"
            for shard in self.live_shards()
            for uid, m in shard.core.members.items()
        ]

    # -- healing ---------------------------------------------------------------------------------------------------

    def _heal(self) -> None:
        """Peace: everyone is up, the network is good; every group must serve, settle and agree."""
        self.faults_on = False
        self.client_loss = 0.0
        self.network.heal()
        self.tell("healed")
        for files in self._disks:
            if files is not None:
                files.plan = lambda number, name: None
        for shard in self.live_shards():
            shard.resume()
        if self.options.calm_us:
            self.queue.run_until(self.queue.now_us + self.options.calm_us)
            self._check_links()
        deadline_us = self.queue.now_us + SERVE_WITHIN_US
        probes: dict[int, tuple[Call, Call]] = {uid: self._probe(uid) for uid in self.group_uids}

        def is_waiting() -> bool:
            for uid, calls in probes.items():
                if all(call.is_done for call in calls) and any(call.outcome != "ok" for call in calls):
                    probes[uid] = self._probe(uid)  # a clock that was set may have made its session expire
            return any(call.outcome != "ok" for calls in probes.values() for call in calls)

        self._run_while(is_waiting, deadline_us)
        for call in (call for calls in probes.values() for call in calls):
            if call.outcome != "ok":
                raise Violation(
                    f"liveness: group {call.uid} did not serve within {SERVE_WITHIN_US // SECOND_US} s of healing"
                )
        for client in self.clients:
            client.is_stopped = True
        deadline_us = self.queue.now_us + SETTLE_WITHIN_US
        self._run_while(lambda: not all(self.is_settled(uid) for uid in self.group_uids), deadline_us)
        for uid in self.group_uids:
            if not self.is_settled(uid):
                raise Violation(f"liveness: group {uid} did not get the members that are wanted")
        self.queue.run_until(self.queue.now_us + REST_US)
        self._check_rest()

    def _probe(self, uid: int) -> tuple[Call, Call]:
        """A command and a query of a client of their own."""
        client = SimClient(self, random.Random(self.client_rng.getrandbits(64)))
        client.is_stopped = True
        return (
            client.command(uid, "add", 0, 1, attempts_max=100),
            client.query(uid, 0, is_stale=False, attempts_max=100),
        )

    def _check_links(self) -> None:
        """All is well: who leads over a link is told by each answer that it is followed there (DESIGN 6)."""
        for shard in self.live_shards():
            for link in shard.core.links.values():
                silent_us = shard.clock.local_us(self.queue.now_us) - link.ok_stamp
                if link.led and self.place_of_instance(link.peer) >= 0:
                    if silent_us > LINK_CONFIRMS_WITHIN_BEATS * self.options.beat_interval_us:
                        raise Violation(
                            f"links: in peace {link.peer} has not confirmed the groups that {shard.instance} leads for"
                            f" {silent_us / SECOND_US:.1f} s"
                        )

    def _run_while(self, condition: Any, deadline_us: int) -> None:
        while condition() and self.queue.now_us < deadline_us:
            self.queue.run_until(min(deadline_us, self.queue.now_us + 100 * MILLISECOND_US))

    def _check_rest(self) -> None:
        """All is quiet: members are equal, no request is left without an answer, histories hold."""
        for shard in self.live_shards():
            for token in self._tokens[shard.instance]:
                age_us = self.queue.now_us - token.taken_us
                raise Violation(
                    f"answers: instance {shard.instance} left a request for group {token.call.uid} {token.call.input}"
                    f" unanswered for {age_us / SECOND_US:.1f} s"
                )
            for uid in shard.core.members:
                if uid not in self.groups:
                    raise Violation(f"removal: instance {shard.instance} still hosts group {uid}, which was removed")
                if shard.place not in self.groups[uid].places:
                    raise Violation(
                        f"removal: instance {shard.instance} still hosts group {uid}, whose member it is no more"
                    )
        for uid in self.group_uids:
            members = [
                (shard.instance, shard.core.members[uid])
                for shard in self.live_shards()
                if shard.place in self.groups[uid].places
            ]
            self.cluster.check_equal_members(uid, members)
            for instance, member in members:
                state = member.state
                self.history.check_state(uid, state.seen, f"instance {instance}")
        self.history.check_refused()
        self._check_linearizability()

    def _check_linearizability(self) -> None:
        """The same histories once more, by the general search, which knows nothing of versions."""
        try:
            wrong = find_violation(self.operations, register_model(), self.options.linearizability_steps_max)
        except SearchTooLarge:
            self.count("linearizability: search given up")
            return
        if wrong is not None:
            lines = "\n".join(f"    {operation}" for operation in wrong[-30:])
            raise Violation(f"linearizability: no order explains\n{lines}")
        self.count("linearizability: histories checked")


def checker_of(error: BaseException) -> str:
    """Which checker raised: the first words of what it says."""
    if not isinstance(error, Violation):
        return f"the code's own checks ({type(error).__name__})"
    return str(error).partition(":")[0]

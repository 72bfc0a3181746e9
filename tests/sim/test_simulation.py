"""A thousand seeds of simulated clusters under faults; and the simulation itself: it repeats, and it notices."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest

from raftfleet.core import own_log
from raftfleet.core.member import Member
from raftfleet.core.messages import Append
from raftfleet.core.sessions import Session, Sessions
from raftfleet.testing import simulate
from raftfleet.testing.simulation import Simulation, SimulationFailure, SimulationOptions

SEED_COUNT = int(os.environ.get("RAFTFLEET_TEST_SEEDS", "1000"))
KEPT_SEEDS = (
    48,  # a read on a slow link bred beats without end
    127,  # a leader fell while removing itself: nobody could lead
    131,  # a voter slept through the removal of everybody it knew
    235,  # as 127
    5187,  # an instance that had forgotten its log voted for a shorter one
    5366,  # a removed voter asked only those that were removed after it
)


def _play(seed: int) -> tuple[int, int, str]:
    result = simulate.run_seed(seed)
    return (seed, 0, result) if isinstance(result, str) else (seed, result.counts["acknowledged"], "")


@pytest.mark.slow
@pytest.mark.simulation
@pytest.mark.timeout(1800)
def test_every_seed_keeps_every_promise_and_serves_after_healing() -> None:
    acknowledged = 0
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for seed, count, failure in pool.map(_play, range(1, SEED_COUNT + 1), chunksize=8):
            assert not failure, f"seed {seed}\n{failure}"
            acknowledged += count
    assert acknowledged > 300 * SEED_COUNT, "the simulation is to do work, not only to survive"


@pytest.mark.parametrize("seed", KEPT_SEEDS)
def test_a_seed_that_once_failed_still_passes(seed: int) -> None:
    _, _, failure = _play(seed)
    assert not failure, failure


@pytest.mark.parametrize("seed", range(20_001, 20_011))
def test_a_few_seeds_pass_in_every_run(seed: int) -> None:
    _, acknowledged, failure = _play(seed)
    assert not failure, failure
    assert acknowledged > 0


def _trace_in_fresh_interpreter(hash_seed: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "raftfleet.testing.simulate", "--seed", "3"],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout


def test_a_seed_plays_the_same_whatever_the_hash_seed() -> None:
    first = _trace_in_fresh_interpreter("1")
    assert "trace" in first
    assert first == _trace_in_fresh_interpreter("4242")


def test_a_seed_plays_the_same_twice_in_one_process() -> None:
    first, second = Simulation(5).run(), Simulation(5).run()
    assert first == second
    assert first.trace != Simulation(6).run().trace


def test_faults_of_every_kind_happen() -> None:
    total: dict[str, int] = {}
    for seed in range(1, 13):
        for name, count in Simulation(seed).run().counts.items():
            total[name] = total.get(name, 0) + count
    for name in (
        "crash",
        "pause",
        "move",
        "group replaced",
        "transfer",
        "promote",
        "remove_member",
        "frames lost",
        "frames duplicated",
        "frames reordered",
        "frames held",
        "frames cut",
        "frames stalled",
        "command ok",
        "command unknown",
        "query ok",
        "stale query ok",
        "linearizability: histories checked",
    ):
        assert total.get(name, 0) > 0, f"{name} never happened in twelve seeds: {total}"


def test_a_failure_prints_its_seed_and_the_command_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Simulation, "_check_rest", lambda self: 1 / 0)
    assert simulate.main(["--seed", "7"]) == 1
    told = capsys.readouterr().out
    assert "ZeroDivisionError" in told
    assert "python -m raftfleet.testing.simulate --seed 7" in told


def test_the_command_counts_what_it_played(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["--seeds", "1-2", "--processes", "1"]) == 0
    told = capsys.readouterr().out
    assert "2 seeds" in told
    assert "elections" in told


# -- broken on purpose: the simulation must notice --------------------------------------------------------------------


def _seeds_that_notice(count: int = 40, options: SimulationOptions | None = None) -> list[str]:
    """The first line of the failure of each seed that noticed; stops at the first."""
    for seed in range(1, count + 1):
        try:
            Simulation(seed, options).run()
        except SimulationFailure as failure:
            return [str(failure).split("\n")[0]]
    return []


def test_a_follower_that_deletes_beyond_the_conflict_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 1 broken: every append cuts the log behind it."""
    original = Member.on_append

    def on_append(self: Member, sender: int, m: Append) -> None:
        end = m.prev_index + len(m.entries)
        if m.term >= self.term and self.lead is None and self.commit <= end < self.log.last_index:
            if end >= self.log.snapshot_index:
                self.log.truncate_from(end + 1)
                own_log.forget_memberships(self, end + 1)
        original(self, sender, m)

    monkeypatch.setattr(Member, "on_append", on_append)
    assert _seeds_that_notice(120)


def test_a_leader_that_answers_reads_without_a_quorum_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 2 broken: a leader believes itself."""
    monkeypatch.setattr(Member, "quorum_stamp", lambda self: self.shard.stamp)
    assert any("stale read" in line for line in _seeds_that_notice())


def test_votes_for_shorter_logs_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paper 5.4.1 broken: a candidate always looks up to date."""
    original = Member.on_vote
    monkeypatch.setattr(
        Member, "on_vote", lambda self, sender, m: original(self, sender, m._replace(last_term=1 << 40))
    )
    assert _seeds_that_notice()


def test_a_vote_that_is_forgotten_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member gives its vote to whoever asks."""
    original = Member.on_vote

    def on_vote(self: Member, sender: int, m: object) -> None:
        self.vote = 0
        original(self, sender, m)  # type: ignore[arg-type]

    monkeypatch.setattr(Member, "on_vote", on_vote)
    assert any("voted" in line or "election safety" in line for line in _seeds_that_notice(80))


def test_sessions_that_forget_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule of DESIGN 11 broken: a repeated command runs again."""
    original = Sessions.admit

    def admit(self: Sessions, client_id: bytes, seq: int, *rest: int) -> Session | tuple[int, bytes]:
        session = self.by_client.get(client_id)
        if session is not None:
            session.results.pop(seq, None)
            session.acked = 0
        return original(self, client_id, seq, *rest)

    monkeypatch.setattr(Sessions, "admit", admit)
    assert any("exactly-once" in line for line in _seeds_that_notice())


def test_a_lease_longer_than_the_promise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """DESIGN 5.10 broken: the leader believes in its lease for three election timeouts."""
    original = Member.lease_until_us

    def lease_until_us(self: Member) -> int:
        until_us = original(self)
        return until_us and until_us + 2 * self.election_timeout_us

    monkeypatch.setattr(Member, "lease_until_us", lease_until_us)
    monkeypatch.setattr(Member, "check_quorum", lambda self: self.lead is not None)
    assert any("stale read" in line for line in _seeds_that_notice(110))

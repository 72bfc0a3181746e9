"""The mutants: every one still fits the code that it breaks, and the quick ones are noticed in every run."""

from __future__ import annotations

import json

import pytest

from raftfleet.core.membership import Membership
from raftfleet.testing import mutants, simulate
from raftfleet.testing.mutants import MUTANTS, Verdict, play
from raftfleet.testing.mutation import Change, MutantOutdated, broken
from raftfleet.testing.profiles import PROFILES
from raftfleet.testing.shrink import NothingFails, shrink, transcript

QUORUM = "raftfleet.core.membership:Membership.__init__"
QUICK = (
    "learners-count",
    "half-is-a-quorum",
    "newcomer-votes-at-once",
    "promoted-before-caught-up",
    "pre-vote-raises-the-term",
    "lease-clock-read-once",
    "vote-by-the-present-log-only",
    "leader-counts-unsaved",
)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_fits_the_code_that_it_breaks(name: str) -> None:
    with broken(MUTANTS[name].changes):
        pass


@pytest.mark.parametrize("name", QUICK)
def test_a_broken_rule_is_noticed(name: str) -> None:
    verdict = play(name, 40)
    assert verdict.noticed_by, f"{name} survived forty seeds: {MUTANTS[name].text}"


def test_every_mutant_names_a_profile_that_there_is() -> None:
    assert {mutant.profile for mutant in MUTANTS.values() if mutant.world == "cluster"} <= set(PROFILES)


def test_a_function_is_broken_wherever_it_is_known_and_whole_again_afterwards() -> None:
    known_elsewhere = Membership.first
    with broken((Change(QUORUM, "len(voters) // 2 + 1", "17"),)):
        assert known_elsewhere((1, 2, 3)).quorum == 17
    assert known_elsewhere((1, 2, 3)).quorum == 2


def test_a_mutant_whose_text_is_not_there_says_so_and_breaks_nothing() -> None:
    good = Change(QUORUM, "len(voters) // 2 + 1", "17")
    with pytest.raises(MutantOutdated, match="0 times"):
        with broken((good, Change("raftfleet.core.log:Log.append", "no such text", ""))):
            pass
    assert Membership.first((1, 2, 3)).quorum == 2


def test_a_survivor_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = [Verdict("learners-count", 3, "quorum", "", 0.5), Verdict("half-is-a-quorum", 9, "", "", 1.0)]
    monkeypatch.setattr(mutants, "play_all", lambda names, processes, seeds, notices: iter(verdicts))
    assert mutants.main(["learners-count", "half-is-a-quorum"]) == 1
    told = capsys.readouterr().out
    assert "NOBODY" in told
    assert "survived: half-is-a-quorum" in told


def test_results_are_told_to_programs_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutants.main(["learners-count", "--json", "--notices", "2", "--processes", "1"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["noticed"]) == ("learners-count", 2)
    assert 0 < row["first_seed"] < row["seeds"] and row["noticed_by"]


# -- cutting short ----------------------------------------------------------------------------------------------------


def test_a_failing_schedule_is_cut_to_a_short_one_that_fails_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    mutant = MUTANTS["half-is-a-quorum"]
    profile = PROFILES[mutant.profile]
    with broken(mutant.changes):
        seed = play(mutant.name, 40).seed_count
        shrunk = shrink(seed, profile, tries_max=150)
        assert len(shrunk.schedule) < shrunk.struck_count or shrunk.struck_count <= 2
        told = transcript(shrunk)
        assert told.startswith(shrunk.failure.told)
        numbers = ",".join(str(fault.number) for fault in shrunk.schedule) or "none"
        command = ["--seed", str(seed), "--profile", profile.name, "--faults", numbers]
        assert f"--profile '{profile.name}' --faults {numbers}" in told
        assert simulate.main(command) == 1
        again = capsys.readouterr().out
        assert again.startswith(shrunk.failure.told)
        assert f"step {shrunk.failure.step_count}, state {shrunk.failure.state:012x}" in again


def test_a_seed_that_passes_cannot_be_cut_short() -> None:
    with pytest.raises(NothingFails):
        shrink(1, PROFILES["mixed"], tries_max=1)

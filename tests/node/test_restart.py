"""The restart policy: ends in, decisions out."""

from __future__ import annotations

import signal

import pytest

from raftfleet.node.exit_codes import ExitCode, describe_status
from raftfleet.node.restart import GiveUp, RestartLimits, RestartPolicy, StartAgain

SECOND_US = 1_000_000
LIMITS = RestartLimits(
    delay_us_first=100,
    delay_us_max=1_000,
    healthy_us=10_000,
    budget_count=5,
    budget_window_us=100_000,
    fresh_life_us=50,
)


@pytest.fixture
def policy() -> RestartPolicy:
    return RestartPolicy("shard 1", LIMITS)


def ended(policy: RestartPolicy, now_us: int, lived_us: int, status: int = -signal.SIGKILL) -> StartAgain | GiveUp:
    return policy.child_ended(now_us=now_us, started_us=now_us - lived_us, status=status)


def test_a_killed_child_is_started_again_after_the_first_delay(policy: RestartPolicy) -> None:
    assert ended(policy, 50_000, lived_us=20_000) == StartAgain(50_100, counted=True)


def test_a_clean_exit_that_nobody_asked_for_is_counted(policy: RestartPolicy) -> None:
    assert ended(policy, 50_000, lived_us=20_000, status=ExitCode.OK) == StartAgain(50_100, counted=True)


def test_delays_double_up_to_the_longest() -> None:
    policy = RestartPolicy("shard 1", RestartLimits(delay_us_first=100, delay_us_max=500, budget_count=99))
    due_us = [ended(policy, 0, lived_us=5) for _ in range(5)]
    assert [decision.due_us for decision in due_us if isinstance(decision, StartAgain)] == [100, 200, 400, 500, 500]


def test_a_healthy_life_starts_the_delays_over(policy: RestartPolicy) -> None:
    for now_us in (0, 1, 2):
        ended(policy, now_us, lived_us=5)
    assert ended(policy, 20_000, lived_us=10_000) == StartAgain(20_100, counted=True)


def test_one_end_more_than_the_budget_ends_the_node(policy: RestartPolicy) -> None:
    for now_us in range(5):
        assert isinstance(ended(policy, now_us, lived_us=5), StartAgain)
    decision = ended(policy, 5, lived_us=5)
    assert isinstance(decision, GiveUp)
    assert decision.code == ExitCode.BUDGET_EXCEEDED
    assert "shard 1 ended 6 times" in decision.reason
    assert "SIGKILL" in decision.reason


def test_ends_that_left_the_window_are_forgotten(policy: RestartPolicy) -> None:
    for now_us in range(5):
        ended(policy, now_us, lived_us=5)
    # the oldest end, at 0, is out of the window; the one at 1 is out a microsecond later
    assert isinstance(ended(policy, 100_000, lived_us=5), StartAgain)
    assert isinstance(ended(policy, 100_001, lived_us=5), StartAgain)
    assert isinstance(ended(policy, 100_001, lived_us=5), GiveUp)


def test_a_fresh_start_is_given_at_once_and_not_counted(policy: RestartPolicy) -> None:
    for now_us in range(0, 10_000, 1_000):
        decision = ended(policy, now_us, lived_us=60, status=ExitCode.RESTART_FRESH)
        assert decision == StartAgain(now_us, counted=False)


def test_a_child_that_only_asks_for_fresh_starts_is_counted(policy: RestartPolicy) -> None:
    decisions = [ended(policy, now_us, lived_us=40, status=ExitCode.RESTART_FRESH) for now_us in range(6)]
    assert isinstance(decisions[-1], GiveUp)


@pytest.mark.parametrize("code", [ExitCode.CANNOT_BOOT, ExitCode.DATA_DIR_REFUSED])
def test_a_child_that_cannot_boot_is_believed_at_any_time(policy: RestartPolicy, code: ExitCode) -> None:
    ended(policy, 0, lived_us=20_000)
    decision = ended(policy, 30_000, lived_us=20_000, status=code)
    assert isinstance(decision, GiveUp)
    assert decision.code == code


def test_a_child_whose_disk_failed_is_started_again(policy: RestartPolicy) -> None:
    assert isinstance(ended(policy, 30_000, lived_us=20_000, status=ExitCode.DISK_FAILED), StartAgain)


def test_an_address_in_use_at_the_first_start_ends_the_node(policy: RestartPolicy) -> None:
    decision = ended(policy, 10, lived_us=5, status=ExitCode.ADDRESS_IN_USE)
    assert isinstance(decision, GiveUp)
    assert decision.code == ExitCode.ADDRESS_IN_USE


@pytest.mark.parametrize("before", [-signal.SIGKILL, ExitCode.RESTART_FRESH])
def test_an_address_in_use_at_a_restart_is_tried_again(policy: RestartPolicy, before: int) -> None:
    ended(policy, 0, lived_us=60, status=before)
    assert isinstance(ended(policy, 10, lived_us=5, status=ExitCode.ADDRESS_IN_USE), StartAgain)


def test_the_default_budget_takes_about_half_a_minute_of_instant_deaths() -> None:
    policy = RestartPolicy("shard 1")
    now_us = 0
    while isinstance(decision := ended(policy, now_us, lived_us=0), StartAgain):
        now_us = decision.due_us
    assert 20 * SECOND_US < now_us < 45 * SECOND_US


def test_every_exit_code_has_its_sentence_and_its_number() -> None:
    assert len({code.value for code in ExitCode}) == len(ExitCode)
    assert all(0 <= code < 64 and code.sentence for code in ExitCode)


@pytest.mark.parametrize(
    ("status", "words"),
    [(-9, "killed by SIGKILL"), (-63, "killed by signal 63"), (6, "ADDRESS_IN_USE"), (77, "exited with code 77")],
)
def test_a_status_is_told_in_words(status: int, words: str) -> None:
    assert words in describe_status(status)

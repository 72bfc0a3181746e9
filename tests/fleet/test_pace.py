"""The pace of moves: few at once go at once, many in turn, and however many there are, they get through in time."""

from __future__ import annotations

from raftfleet.fleet.pace import MOVES_AT_ONCE, MOVES_PER_S, SPREAD_S, TICK_US, Pace

SECOND_US = 1_000_000


def ask(pace: Pace, uids: range, now_us: int) -> list[int]:
    return [uid for uid in uids if pace.may_move(uid, now_us, has_begun=False)]


def through_s(pace: Pace, now_us: int) -> float:
    """How long it takes until nobody waits."""
    start_us = now_us
    while pace:
        now_us += TICK_US
        for uid in pace.due(now_us):
            assert pace.may_move(uid, now_us, has_begun=False)
    return (now_us - start_us) / SECOND_US


def test_a_few_groups_begin_at_once_and_the_rest_in_the_order_in_which_they_asked() -> None:
    pace = Pace()
    assert ask(pace, range(20), 0) == list(range(MOVES_AT_ONCE))
    assert pace.due(0) == []
    assert pace.due(2 * SECOND_US // MOVES_PER_S) == [MOVES_AT_ONCE, MOVES_AT_ONCE + 1]
    assert len(pace) == 20 - MOVES_AT_ONCE - 2


def test_sixty_groups_are_through_in_less_than_three_seconds() -> None:
    pace = Pace()
    ask(pace, range(60), 0)
    assert through_s(pace, 0) < 3


def test_a_large_backlog_goes_faster_and_is_through_within_a_few_spreads() -> None:
    pace = Pace()
    ask(pace, range(100_000), 0)
    assert len(pace.due(SECOND_US)) <= 100_000 / SPREAD_S
    assert through_s(pace, SECOND_US) < 8 * SPREAD_S


def test_a_quiet_time_is_not_saved_up_for_a_burst() -> None:
    pace = Pace()
    assert len(ask(pace, range(100), 3600 * SECOND_US)) == MOVES_AT_ONCE


def test_whoever_is_half_way_goes_first() -> None:
    pace = Pace()
    ask(pace, range(20), 0)
    assert not pace.may_move(19, 0, has_begun=True)
    assert pace.due(SECOND_US // MOVES_PER_S) == [19]
    assert pace.may_move(19, SECOND_US, has_begun=True)


def test_a_permission_is_for_one_step_and_void_when_it_was_not_needed() -> None:
    pace = Pace()
    ask(pace, range(20), 0)
    first, second = pace.due(2 * SECOND_US // MOVES_PER_S)
    assert pace.may_move(first, 0, has_begun=False) and not pace.may_move(first, 0, has_begun=False)
    pace.looked_at(second)
    assert not pace.may_move(second, 0, has_begun=False)


def test_a_group_that_is_gone_waits_for_nothing() -> None:
    pace = Pace()
    ask(pace, range(MOVES_AT_ONCE + 1), 0)
    pace.forget(MOVES_AT_ONCE)
    assert not pace and pace.due(SECOND_US) == []

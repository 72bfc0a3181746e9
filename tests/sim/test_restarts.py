"""The checker of restarts can fail: what a disk may not lose, and what it may."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raftfleet.core.log import Log
from raftfleet.core.messages import NOOP, Entry
from raftfleet.testing.model import Violation
from raftfleet.testing.restarts import RestartChecker


def _member(terms: list[int], *, term: int = 3, vote: int = 2) -> Any:
    log = Log()
    log.extend([Entry(t, NOOP, b"") for t in terms])
    return SimpleNamespace(log=log, term=term, vote=vote)


def _come_back(before: Any, after: Any, *, saved: int = 3, is_saved: bool = True) -> None:
    checker = RestartChecker()
    shard = SimpleNamespace(members={7: before}, saved_index=lambda member: saved, is_saved=is_saved)
    checker.ended(1001, shard)
    checker.came_back(1001, {7: after} if after is not None else {})


def test_what_was_saved_is_there() -> None:
    _come_back(_member([1, 1, 2]), _member([1, 1, 2]))


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (None, "without its member of group 7"),
        (_member([1, 1, 2], vote=4), "in term 3 of group 7, with vote 2, and comes back with 3 and 4"),
        (_member([1, 1, 2], term=2), "comes back with 2 and 2"),
        (_member([1, 1]), "comes back ending at 2"),
        (_member([1, 1, 2, 2]), "comes back ending at 4"),
        (_member([1, 1, 1]), "entry 3 of group 7 was of term 2 at 1001, and comes back as one of term 1"),
    ],
)
def test_what_was_saved_and_is_not_there_is_noticed(after: Any, told: str) -> None:
    with pytest.raises(Violation, match=told):
        _come_back(_member([1, 1, 2]), after)


def test_what_was_not_saved_may_be_lost() -> None:
    _come_back(_member([1, 1, 2]), _member([1, 1]), saved=2)
    _come_back(_member([1, 1, 2]), _member([1], term=2), is_saved=False)
    _come_back(_member([1, 1, 2]), None, is_saved=False)


def test_who_ended_in_the_middle_of_something_is_not_judged() -> None:
    checker = RestartChecker()
    checker.ended(1001, SimpleNamespace(members={7: _member([1])}, saved_index=lambda member: 1, is_saved=True))
    checker.forget(1001)
    checker.came_back(1001, {7: _member([])})

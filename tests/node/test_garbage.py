"""The care of a worker's garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from raftfleet.node import garbage
from raftfleet.node.garbage import FULL_INTERVAL_US, FULL_INTERVAL_US_MAX, Garbage


class Knot:
    """Holds itself."""

    def __init__(self) -> None:
        self.knot = self


@pytest.fixture
def care() -> Iterator[Garbage]:
    care = Garbage()
    care.start()
    care.tick(0, True)
    yield care
    care.stop()


def late_garbage() -> weakref.ref[Knot]:
    """A cycle that becomes garbage only after it has survived a full collection."""
    knot = Knot()
    gc.collect()
    return weakref.ref(knot)


def test_what_survives_a_full_collection_is_not_walked_again(care: Garbage) -> None:
    before = gc.get_freeze_count()
    kept = [Knot() for _ in range(1000)]
    gc.collect()
    assert gc.get_freeze_count() >= before + len(kept)
    gone = late_garbage()
    gc.collect()
    assert gone() is not None


def test_a_cycle_that_is_dropped_late_is_found_when_the_worker_rests(care: Garbage) -> None:
    gone = late_garbage()
    care.tick(FULL_INTERVAL_US - 1, True)
    care.tick(FULL_INTERVAL_US + 1, False)
    assert gone() is not None, "too early, or somebody waits"
    care.tick(FULL_INTERVAL_US + 2, True)
    assert gone() is None
    gone = late_garbage()
    care.tick(FULL_INTERVAL_US + 3, True)
    assert gone() is not None, "that was a moment ago"


def test_a_worker_that_never_rests_is_cleaned_too(care: Garbage) -> None:
    gone = late_garbage()
    care.tick(FULL_INTERVAL_US_MAX, False)
    assert gone() is None


def test_a_heap_too_large_to_be_walked_in_time_is_left_alone(care: Garbage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "THAWED_OBJECTS_MAX", 10)
    gone = late_garbage()
    care.tick(FULL_INTERVAL_US_MAX, True)
    assert gone() is not None
    assert care.full_count == 0


def test_the_collector_is_given_back_as_it_was() -> None:
    callbacks = list(gc.callbacks)
    care = Garbage()
    care.start()
    assert gc.get_freeze_count() > 0
    care.stop()
    care.stop()
    assert gc.callbacks == callbacks
    assert gc.get_freeze_count() == 0

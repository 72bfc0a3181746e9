"""Which seeds a test plays: its own, or the one that a person asked for to repeat a failure.

``pytest --raftfleet-seed N`` (:mod:`raftfleet.testing.plugin`) sets :data:`only_seed` for its run.
"""

from __future__ import annotations

from collections.abc import Iterable

only_seed: int | None = None


def chosen_seeds(seeds: Iterable[int]) -> list[int]:
    """The seeds to play."""
    return list(seeds) if only_seed is None else [only_seed]

"""What a mutant is; the rows are in :mod:`raftfleet.testing.mutants_core` and its neighbours."""

from __future__ import annotations

from typing import NamedTuple

from raftfleet.testing.mutation import Change


class Mutant(NamedTuple):
    """One way to break one rule.

    Attributes:
        name: short, for the command line.
        rule: the section of docs/design.md (or of the Raft paper) that it breaks.
        text: what is broken, as a sentence.
        changes: of the source.
        profile: which kind of trouble shows it soonest; see ``PROFILES`` of the world that plays it.
        world: what plays it: ``"cluster"`` (:mod:`raftfleet.testing.simulation`) or ``"fleet"``
            (:mod:`raftfleet.testing.fleet_simulation`).
    """

    name: str
    rule: str
    text: str
    changes: tuple[Change, ...]
    profile: str = "mixed"
    world: str = "cluster"


def mutant(name: str, rule: str, text: str, *changes: tuple[str, str, str], profile: str = "mixed") -> Mutant:
    """One row. A change's place is told without the package's name."""
    return Mutant(
        name, rule, text, tuple(Change("raftfleet." + place, old, new) for place, old, new in changes), profile
    )

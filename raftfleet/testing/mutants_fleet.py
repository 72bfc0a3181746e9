"""Mutants of placement, reconciling and the leader table (DESIGN 7 and 8), played by whole simulated fleets."""

from __future__ import annotations

from raftfleet.testing.mutants_table import Mutant, mutant

_ROWS = (
    mutant(
        "removed-before-replaced",
        "5.3, 7",
        "a surplus voter is removed before its replacement votes",
        ("fleet.reconcile:_remove_surplus", "if len(view.voters) <= len(desired):", "if False:"),
    ),
    mutant(
        "silent-voter-removed",
        "5.15, 7",
        "a voter that is silent is removed as if it were gone for good",
        (
            "fleet.reconcile:_remove_gone",
            "for voter in view.voters if not known(voter)",
            "for voter in view.voters if voter not in view.live",
        ),
    ),
    mutant(
        "steps-while-one-is-under-way",
        "5.3, 7",
        "reconciling takes a step while another is under way, and the core lets it",
        ("fleet.reconcile:next_step", "if view.pending or not desired:", "if not desired:"),
        ("core.change:check_change", "    if lead.config_index:\n", "    if False:\n"),
    ),
    mutant(
        "learner-never-promoted",
        "7",
        "a learner that has caught up is not promoted",
        ("fleet.reconcile:_promote_caught_up", "    for instance in desired:", "    for instance in ():"),
    ),
    mutant(
        "leadership-stays-away",
        "7",
        "leadership does not go home to the first desired member",
        ("fleet.reconcile:_bring_leadership_home", "home in view.voters and", "False and"),
    ),
    mutant(
        "leader-not-announced",
        "8",
        "a new leader is not told to the other nodes' tables",
        ("fleet.host_leaders:LeaderLayer._announce", "if instance != self.instance:", "if False:"),
    ),
)
MUTANTS: tuple[Mutant, ...] = tuple(row._replace(world="fleet") for row in _ROWS)

"""How long and how rough a simulated cluster's life is: options, named kinds of trouble, and what a plain seed draws.

This module plays nothing. A *profile* is a set of rates that looks where one family of faults lies; a mutant is played
under the one that shows it soonest, and ``Simulation(seed)`` draws its own from the seed (:func:`options_of`).
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from raftfleet.testing.clock import MILLISECOND_US, SECOND_US


@dataclass(frozen=True)
class SimulationOptions:
    """How long and how rough. Rates are events per virtual second.

    Attributes:
        name: of the profile, for the command that repeats a failure; empty if it is none.
        fault_us: length of the time with faults.
        beat_interval_us: of every shard.
        election_timeout_s: of every group.
        is_durable: shards have disks: they come back from a crash as who they were, with what was saved.
        crash_rate: an instance goes down. In memory it is lost for ever; on a disk it loses power, or is killed.
        lose_disk_rate: a disk is lost, and with it its instance.
        crash_all_rate: power fails everywhere at once (durable only).
        disk_full_rate, disk_error_rate: a disk has no room for a while; a call of it fails (durable only).
        isolate_rate: a leader is stopped in the middle of a turn and cut off from the others.
        usurp_rate: a new leader falls for good right after its election, and its only voter's log lacks entries.
        strand_rate: a follower that alone heard a cut-off leader takes the next one's word in the same turn, and dies.
        abandon_rate: a learner is removed before it has anything, while it is cut off.
        rebirth_rate: a voter is removed and added again, and has only a part of its log when one that lags asks for it.
        place_counts: how many places there may be; each as likely.
        replicas: how many voters a group may begin with; each as likely.
        pad_bytes: added to each command.
        calm_us: after healing nobody writes for so long; then every link must confirm.
        weathers: kinds of the network's phases: ``mixed``, ``lossy``, ``unordered``, ``cuts``, ``slow``, ``quarrel``.
        phase_s: shortest and longest phase.
        drift: how far apart the rates of two clocks may be.
        drift_margin: what groups with leases are told of it.
        eagerness: probability that a draw of a shard's own dice is the lowest: elections without their random delay.
        lease_share: of the groups that read under a lease.
        entries_kept: a group keeps one of these behind the applied ones; few mean many snapshots.
        session_ttls_s: of a group's sessions.
        think_us: the longest pause of a client between two bursts.
        query_share: of the clients' operations.
        chunk_bytes: of a snapshot on its way.
        inline_bytes_max: larger states are dumped by children that take their time, and received into files.
        steps_max: a run that takes more is taken to breed messages.
    """

    name: str = ""
    fault_us: int = 120 * SECOND_US
    beat_interval_us: int = 200 * MILLISECOND_US
    election_timeout_s: float = 1.0
    is_durable: bool = False
    crash_rate: float = 0.06
    lose_disk_rate: float = 0.02
    crash_all_rate: float = 0.01
    disk_full_rate: float = 0.02
    disk_error_rate: float = 0.03
    pause_rate: float = 0.08
    isolate_rate: float = 0.01
    usurp_rate: float = 0.0
    strand_rate: float = 0.0
    abandon_rate: float = 0.0
    rebirth_rate: float = 0.0
    place_counts: tuple[int, ...] = (3, 3, 3, 4, 4, 5)
    replicas: tuple[int, ...] = (3, 3, 3, 3, 5, 1)
    pad_bytes: int = 0
    calm_us: int = 0
    transfer_rate: float = 0.08
    move_rate: float = 0.08
    replace_group_rate: float = 0.015
    clock_rate: float = 0.05
    network_faults: bool = True
    weathers: tuple[str, ...] = ("mixed",)
    phase_s: tuple[float, float] = (1.0, 13.0)
    drift: float = 0.09
    drift_margin: float = 0.1
    eagerness: float = 0.0
    lease_share: float = 0.5
    entries_kept: tuple[int, ...] = (4, 20, 1000)
    session_ttls_s: tuple[float, ...] = (15.0, 60.0, 600.0)
    think_us: tuple[int, ...] = (200_000, 800_000, 3_000_000)
    query_share: float = 0.3
    chunk_bytes: int = 256 << 10
    inline_bytes_max: int = 256 << 10
    linearizability_steps_max: int = 100_000
    steps_max: int = 400_000


_BUSY = (50_000, 300_000)
_PLAIN = SimulationOptions(fault_us=60 * SECOND_US)


def _profile(name: str, **changes: object) -> SimulationOptions:
    return dataclasses.replace(_PLAIN, name=name, **changes)  # type: ignore[arg-type]


_ALL = (
    _profile("mixed"),
    _profile("long", fault_us=180 * SECOND_US, crash_rate=0.04),
    _profile("unordered", weathers=("unordered",), crash_rate=0.1, chunk_bytes=150),
    _profile("partitions", weathers=("cuts",), crash_rate=0.02, move_rate=0.02, eagerness=0.5, think_us=_BUSY),
    _profile(
        "quarrels",
        fault_us=30 * SECOND_US,
        weathers=("quarrel",),
        phase_s=(0.1, 1.0),
        crash_rate=0.0,
        move_rate=0.02,
        election_timeout_s=0.25,
        beat_interval_us=50 * MILLISECOND_US,
        eagerness=0.3,
        think_us=(20_000, 50_000),
        entries_kept=(1000,),
    ),
    _profile(
        "reads",
        fault_us=30 * SECOND_US,
        weathers=("cuts",),
        phase_s=(0.5, 3.0),
        crash_rate=0.0,
        move_rate=0.02,
        lease_share=0.0,
        drift=1.0,
        eagerness=0.9,
        query_share=0.7,
        think_us=(20_000, 50_000),
    ),
    _profile(
        "unordered reads",
        fault_us=30 * SECOND_US,
        weathers=("unordered", "unordered", "quarrel"),
        phase_s=(0.5, 3.0),
        crash_rate=0.1,
        transfer_rate=0.5,
        eagerness=0.5,
        query_share=0.6,
        think_us=(50_000, 200_000),
    ),
    _profile(
        "lease quarrels",
        fault_us=30 * SECOND_US,
        weathers=("quarrel", "cuts"),
        phase_s=(0.2, 2.0),
        lease_share=1.0,
        drift=0.099,
        transfer_rate=0.2,
        eagerness=0.8,
    ),
    _profile("slow links", weathers=("slow", "cuts"), lease_share=0.3, eagerness=0.5, think_us=_BUSY),
    _profile(
        "leases",
        weathers=("cuts", "cuts", "slow"),
        lease_share=1.0,
        drift=0.099,
        pause_rate=0.3,
        eagerness=0.8,
        query_share=0.6,
    ),
    _profile(
        "stopped",
        weathers=("cuts", "slow"),
        phase_s=(1.0, 5.0),
        crash_rate=0.0,
        move_rate=0.0,
        lease_share=1.0,
        drift=0.0,
        pause_rate=0.1,
        isolate_rate=0.3,
        eagerness=0.9,
        query_share=0.6,
        think_us=(300_000, 1_500_000),
    ),
    _profile("wild clocks", weathers=("cuts",), lease_share=0.0, drift=1.2, eagerness=0.8),
    _profile("transfers", transfer_rate=0.6, lease_share=0.8, think_us=_BUSY),
    _profile("changes", crash_rate=0.15, move_rate=0.3, transfer_rate=0.15, pause_rate=0.15),
    _profile(
        "snapshots",
        crash_rate=0.15,
        move_rate=0.3,
        transfer_rate=0.15,
        weathers=("unordered", "cuts", "mixed"),
        entries_kept=(1, 2, 4),
        chunk_bytes=200,
        inline_bytes_max=400,
    ),
    _profile("sessions", session_ttls_s=(2.0, 4.0), weathers=("lossy", "mixed"), entries_kept=(4,)),
    _profile("durable", is_durable=True),
    _profile(
        "durable storms",
        is_durable=True,
        fault_us=40 * SECOND_US,
        crash_rate=0.4,
        crash_all_rate=0.06,
        disk_full_rate=0.05,
        disk_error_rate=0.15,
        weathers=("cuts", "lossy"),
        phase_s=(0.5, 4.0),
        eagerness=0.3,
    ),
    _profile(
        "durable snapshots",
        is_durable=True,
        crash_rate=0.2,
        move_rate=0.2,
        weathers=("cuts", "mixed"),
        entries_kept=(1, 2, 4),
        chunk_bytes=200,
        inline_bytes_max=400,
    ),
    _profile(
        "durable quarrels",
        is_durable=True,
        fault_us=40 * SECOND_US,
        weathers=("quarrel",),
        phase_s=(0.1, 1.0),
        election_timeout_s=0.25,
        beat_interval_us=50 * MILLISECOND_US,
        crash_rate=0.3,
        move_rate=0.02,
        eagerness=0.3,
    ),
    _profile("durable changes", is_durable=True, crash_rate=0.3, move_rate=0.5, transfer_rate=0.15),
    _profile("durable full", is_durable=True, crash_rate=0.3, disk_full_rate=0.4, move_rate=0.02),
    _profile("durable leases", is_durable=True, crash_rate=0.5, lease_share=1.0, eagerness=0.9, weathers=("cuts",)),
)
_PEACE: dict[str, object] = {
    "crash_rate": 0.0,
    "pause_rate": 0.0,
    "isolate_rate": 0.0,
    "transfer_rate": 0.0,
    "move_rate": 0.0,
    "replace_group_rate": 0.0,
    "lose_disk_rate": 0.0,
    "crash_all_rate": 0.0,
    "disk_full_rate": 0.0,
    "disk_error_rate": 0.0,
}
DIRECTED = (
    _profile(
        "usurpers",
        **{**_PEACE, "network_faults": False, "usurp_rate": 0.15, "place_counts": (3,), "replicas": (3,)},
        fault_us=30 * SECOND_US,
        think_us=(100_000, 200_000),
    ),
    _profile(
        "durable stranded",
        **{**_PEACE, "network_faults": False, "strand_rate": 0.3, "place_counts": (5,), "replicas": (5,)},
        is_durable=True,
        fault_us=20 * SECOND_US,
        think_us=(50_000, 100_000),
        entries_kept=(1000,),
    ),
    _profile(
        "abandoned",
        **{**_PEACE, "network_faults": False, "abandon_rate": 0.2, "place_counts": (5,), "replicas": (3,)},
        fault_us=30 * SECOND_US,
        think_us=(100_000, 200_000),
        entries_kept=(1,),
        chunk_bytes=100,
    ),
    _profile(
        "reborn",
        **{**_PEACE, "network_faults": False, "rebirth_rate": 0.4, "place_counts": (5,), "replicas": (5,)},
        fault_us=40 * SECOND_US,
        think_us=(50_000, 100_000),
        entries_kept=(1000,),
        pad_bytes=4_000,
    ),
    _profile(
        "durable torn",
        **{**_PEACE, "crash_rate": 1.0, "crash_all_rate": 0.1},
        is_durable=True,
        fault_us=30 * SECOND_US,
        weathers=("lossy",),
        think_us=(50_000, 100_000),
        pad_bytes=2_500,
    ),
    _profile(
        "durable idle",
        **{**_PEACE, "crash_rate": 0.3, "crash_all_rate": 0.05},
        is_durable=True,
        weathers=("lossy", "cuts"),
        think_us=(60_000_000,),
        calm_us=5 * SECOND_US,
    ),
)
"""Each leads straight to one rare meeting of faults, which the others find by chance or not at all."""
PROFILES: dict[str, SimulationOptions] = {profile.name: profile for profile in (*_ALL, *DIRECTED)}
"""Kinds of trouble. ``mixed`` has a little of each."""

_DRAWN = ("mixed",) * 4 + ("durable",) * 3 + tuple(profile.name for profile in _ALL)


def options_of(seed: int) -> SimulationOptions:
    """What ``Simulation(seed)`` plays: one profile, for half a minute to a minute and a half of its faults."""
    rng = random.Random((seed << 8) + 1)
    profile = PROFILES[rng.choice(_DRAWN)]
    return dataclasses.replace(profile, fault_us=profile.fault_us * rng.choice((5, 7, 10)) // 10)

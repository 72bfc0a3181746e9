"""Tools for testing what runs on raftfleet, and raftfleet itself.

* ``LocalFleet``: real nodes on this machine, to be used, killed and paused by a test.
* ``NamespaceFleet``: the same, each node in a network namespace of its own, whose links a test takes down.
* ``SimFleet``: whole nodes, their managers apart, on a virtual clock and network; a hundred times faster than time.
* ``check_deterministic``: does a state machine do the same in every process?
* ``check_under_faults``: does it keep its promises while nodes die and messages are lost?
* pytest fixtures ``fleet`` and ``local_fleet``, there wherever raftfleet is installed (``raftfleet.testing.plugin``).
* ``raftfleet.testing.simulation``: a simulated cluster, checkers, a history search. Nothing there opens a socket or
  reads a clock. ``Simulation(seed).run()`` plays a cluster with faults; a failure says how to repeat it.

Names are imported when they are first used: nodes import their example machines from this package and must not pay for
a harness that they never run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raftfleet.testing.determinism import NotDeterministic, check_deterministic
    from raftfleet.testing.faults import FaultReport, FaultsNotSurvived, check_under_faults
    from raftfleet.testing.fleet import SimFleet, SimFleetOptions
    from raftfleet.testing.local_fleet import LocalFleet, LocalFleetError, LocalNode
    from raftfleet.testing.namespaces import NamespaceFleet

__all__ = [
    "FaultReport",
    "FaultsNotSurvived",
    "LocalFleet",
    "LocalFleetError",
    "LocalNode",
    "NamespaceFleet",
    "NotDeterministic",
    "SimFleet",
    "SimFleetOptions",
    "check_deterministic",
    "check_under_faults",
]

_HOME = {
    "FaultReport": "raftfleet.testing.faults",
    "FaultsNotSurvived": "raftfleet.testing.faults",
    "LocalFleet": "raftfleet.testing.local_fleet",
    "LocalFleetError": "raftfleet.testing.local_fleet",
    "LocalNode": "raftfleet.testing.local_fleet",
    "NamespaceFleet": "raftfleet.testing.namespaces",
    "NotDeterministic": "raftfleet.testing.determinism",
    "SimFleet": "raftfleet.testing.fleet",
    "SimFleetOptions": "raftfleet.testing.fleet",
    "check_deterministic": "raftfleet.testing.determinism",
    "check_under_faults": "raftfleet.testing.faults",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)

"""For tests of raftfleet and of applications on it: simulated clock, network and fleet; local fleets of real nodes.

Names are imported when they are first used, because nodes import the example machines from this package and must not
pay for a simulator that they never run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raftfleet.testing.local_fleet import LocalFleet, LocalFleetError, LocalNode

__all__ = ["LocalFleet", "LocalFleetError", "LocalNode"]

_HOME = {
    "LocalFleet": "raftfleet.testing.local_fleet",
    "LocalFleetError": "raftfleet.testing.local_fleet",
    "LocalNode": "raftfleet.testing.local_fleet",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)

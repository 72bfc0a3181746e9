"""Many Raft consensus groups on a fleet of nodes.

What a user needs is here: :func:`connect` (or :mod:`raftfleet.aio`) to use a fleet, :class:`GroupConfig` to add groups
to it, :class:`StateMachine` and :class:`LeaderHook` to write what they replicate, :mod:`raftfleet.errors` to tell
outcomes apart, :class:`ExportedState` to keep a group's state beyond the group. Each is imported when it is first used,
since a node's processes need few of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raftfleet import aio, errors
    from raftfleet.client.core import Leader
    from raftfleet.client.sync import Fleet, connect
    from raftfleet.core.config import GroupConfig
    from raftfleet.machine import LeaderHook, StateMachine
    from raftfleet.wire.exported import ExportedState

__all__ = [
    "ExportedState",
    "Fleet",
    "GroupConfig",
    "Leader",
    "LeaderHook",
    "StateMachine",
    "__version__",
    "aio",
    "connect",
    "errors",
]

__version__ = "0.1.0"

_HOMES = {
    "ExportedState": "raftfleet.wire.exported",
    "Fleet": "raftfleet.client.sync",
    "GroupConfig": "raftfleet.core.config",
    "Leader": "raftfleet.client.core",
    "LeaderHook": "raftfleet.machine",
    "StateMachine": "raftfleet.machine",
    "connect": "raftfleet.client.sync",
}
_MODULES = {"aio": "raftfleet.aio", "errors": "raftfleet.errors"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = import_module(_MODULES[name])
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

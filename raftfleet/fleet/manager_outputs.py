"""What a manager's core says to its driver, and what it is told at its start.

Nothing here does anything. Each :data:`Output` is a command to the driver (:mod:`raftfleet.workers.manager` in a node,
a simulated world in tests), named for what is to be done; :class:`ManagerSettings` is what does not change in a life.
The codes of answers are those of the client protocol, for that is where most of them end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from raftfleet.fleet.founding import Address, Persist, Send

MS = 1_000
SECOND = 1_000_000


class ShardCall(NamedTuple):
    """Call a method of a shard; its answer comes back through :meth:`ManagerCore.on_shard_answer`."""

    shard: int
    method: str
    args: dict[str, Any]
    timeout_ms: int
    token: int


class Reply(NamedTuple):
    """Answer a call that came in through :meth:`ManagerCore.call`."""

    token: object
    code: int
    body: Any


class Log(NamedTuple):
    """Say this in the log. ``level``: "info", "warning" or "error"."""

    level: str
    text: str


class StopNode(NamedTuple):
    """End the node."""


class DropShards(NamedTuple):
    """Only the first ``kept`` shards are left: do not look for the others."""

    kept: int


class StateChanged(NamedTuple):
    """The node's state (active, ...) is another one now."""

    state: str


Output: TypeAlias = Send | Persist | ShardCall | Reply | Log | StopNode | StateChanged | DropShards
Answer: TypeAlias = Callable[[int, Any], None]
"""Takes the code and the body of an answer, once."""


@dataclass(frozen=True)
class ManagerSettings:
    """What a manager is told at its start. ``zone`` None: inactive until ``activate``."""

    name: str
    host: str
    port: int
    public_key: str
    workers: int
    peers: tuple[Address, ...] = ()
    zone: str | None = None
    purge_window_us: int = 600 * SECOND
    ping_interval_us: int = SECOND
    durable: bool = False
    placing_count: int = 0

    @property
    def placing(self) -> int:
        """How many of the workers names and members are shared out among; the others are surplus."""
        return self.placing_count or self.workers

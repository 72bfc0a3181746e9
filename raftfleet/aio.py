"""The asyncio client: the calls of :mod:`raftfleet`'s client, awaitable, many in flight on one connection.

``async with raftfleet.aio.connect() as fleet: await fleet.command("counter", "inc")``
"""

from __future__ import annotations

from raftfleet.client.aio import Fleet, connect

__all__ = ["Fleet", "connect"]

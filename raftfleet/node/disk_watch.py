"""Noticing that a shard hangs on its disk, from outside: it cannot say so itself.

This module reads no clock. A shard notes in the table of children since when it has been waiting for its disk
(:meth:`raftfleet.node.context.ChildTable.write_disk_since`); whoever watches looks at that now and then. Nothing is
decided here: a shard that waits sends no beats, so what it leads goes elsewhere by itself.
"""

from __future__ import annotations

from raftfleet.node.context import ChildTable

DISK_HUNG_US = 2_000_000
"""A shard that waits for its disk for longer is named: most fdatasyncs take a fraction of a millisecond."""


class DiskWatch:
    """What the manager knows of its shards' disks. ``hung``: indexes of those that hang."""

    def __init__(self, children: ChildTable) -> None:
        self.hung: set[int] = set()
        self._children = children

    def look(self, now_us: int) -> list[tuple[str, str]]:
        """Lines for the log, ``(level, text)``, about what changed since the last look."""
        lines = []
        for index, row in enumerate(self._children.shards):
            waits_us = now_us - row.disk_since_us if row.disk_since_us and row.pid else 0
            if waits_us > DISK_HUNG_US and index not in self.hung:
                self.hung.add(index)
                lines.append(("error", f"shard {index} has been waiting for its disk for {waits_us / 1e6:.1f} s"))
            elif waits_us <= DISK_HUNG_US and index in self.hung:
                self.hung.discard(index)
                lines.append(("info", f"shard {index}'s disk answers again"))
        return lines

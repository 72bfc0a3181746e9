"""A group's log in memory: entries after a snapshot point, with the rules of deletion kept in one place.

This module knows nothing of disks or clocks. Indexes count from 1; ``snapshot_index`` is the last index that is no
longer held, and ``snapshot_term`` its term.
"""

from __future__ import annotations

from raftfleet.core.messages import Entry


class Log:
    """Entries ``[first_index, last_index]``; ``first_index = snapshot_index + 1``."""

    __slots__ = ("dropped_bytes", "entries", "last_index", "last_term", "size_bytes", "snapshot_index", "snapshot_term")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.snapshot_index = 0
        self.snapshot_term = 0
        self.last_index = 0
        self.last_term = 0
        self.size_bytes = 0
        self.dropped_bytes = 0  # of entries compacted away, ever

    @property
    def first_index(self) -> int:
        """Index of the first entry held (or that would be)."""
        return self.snapshot_index + 1

    @property
    def total_bytes(self) -> int:
        """Bytes of all entries that were ever here and still count: how much a state may have grown since a moment."""
        return self.dropped_bytes + self.size_bytes

    def term_at(self, index: int) -> int:
        """The entry's term, or -1 if the log does not know (compacted away, or beyond the end)."""
        if index == self.last_index:
            return self.last_term
        offset = index - self.snapshot_index
        if offset == 0:
            return self.snapshot_term
        if offset < 0 or index > self.last_index:
            return -1
        return self.entries[offset - 1].term

    def entry(self, index: int) -> Entry:
        """The entry at ``index``; it must be held."""
        assert self.snapshot_index < index <= self.last_index, (index, self.snapshot_index, self.last_index)
        return self.entries[index - self.snapshot_index - 1]

    def slice(self, first: int, stop: int) -> list[Entry]:
        """Entries with ``first <= index < stop``."""
        base = self.snapshot_index + 1
        return self.entries[first - base : stop - base]

    def append(self, entry: Entry) -> int:
        """Add one entry at the end; returns its index."""
        self.entries.append(entry)
        self.last_index += 1
        self.last_term = entry.term
        self.size_bytes += len(entry.data)
        return self.last_index

    def extend(self, entries: list[Entry]) -> None:
        """Add a run of entries at the end."""
        if entries:
            self.entries.extend(entries)
            self.last_index += len(entries)
            self.last_term = entries[-1].term
            for entry in entries:
                self.size_bytes += len(entry.data)

    def truncate_from(self, index: int) -> None:
        """Delete ``index`` and all after it. Only for a conflict that was seen (DESIGN 5.1)."""
        assert self.snapshot_index < index <= self.last_index + 1
        offset = index - self.snapshot_index - 1
        for entry in self.entries[offset:]:
            self.size_bytes -= len(entry.data)
        del self.entries[offset:]
        self.last_index = index - 1
        self.last_term = self.entries[-1].term if self.entries else self.snapshot_term

    def compact_to(self, index: int) -> None:
        """Forget entries up to and with ``index``, which must be applied."""
        if index <= self.snapshot_index:
            return
        assert index <= self.last_index
        term = self.term_at(index)
        count = index - self.snapshot_index
        before = self.size_bytes
        for entry in self.entries[:count]:
            self.size_bytes -= len(entry.data)
        self.dropped_bytes += before - self.size_bytes
        del self.entries[:count]
        self.snapshot_index = index
        self.snapshot_term = term

    def reset_to(self, index: int, term: int) -> None:
        """Start again after a snapshot that replaces everything."""
        self.entries.clear()
        self.size_bytes = 0
        self.snapshot_index = self.last_index = index
        self.snapshot_term = self.last_term = term

    def highest_agreeing(self, index: int, term: int) -> int:
        """The largest index ``<= index`` whose term is ``<= term``, where that can be told from the entries held.

        The conflict hint of etcd: terms never fall along a log, so nothing above can agree with (index, term).
        """
        index = min(index, self.last_index)
        while index > self.snapshot_index and self.term_at(index) > term:
            index -= 1
        return index

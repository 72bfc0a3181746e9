"""What a member holds only while it leads.

This module knows nothing of messages: it is a record. Its existence is what "is leader" means (``member.lead``), so
nothing in it can outlive the leadership: it is made in :mod:`raftfleet.core.election` and dropped in
:mod:`raftfleet.core.roles`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raftfleet.core.progress import Progress
    from raftfleet.core.sending import Source


class Leading:
    """What a member holds only while it leads."""

    __slots__ = (
        "batch",
        "batch_bytes",
        "config_index",
        "elected_us",
        "hold_index",
        "hold_until_us",
        "lease_void",
        "noop_index",
        "pending",
        "progress",
        "reads",
        "removed",
        "snapshot",
        "transfer_deadline_us",
        "transfer_target",
        "version_asked",
    )

    def __init__(self, elected_us: int) -> None:
        self.progress: dict[int, Progress] = {}
        self.noop_index = 0
        self.elected_us = elected_us
        self.config_index = 0  # of a CONFIG entry that is not committed yet
        self.version_asked = 0  # of the newest VERSION entry appended here
        self.batch: list[tuple[bytes, object]] = []  # (command or run, token) not in the log yet
        self.batch_bytes = 0
        self.pending: dict[int, list[object]] = {}  # index -> tokens of its commands and runs
        self.reads: list[tuple[int, int, object, bytes | list[bytes]]] = []  # (stamp, read index, token, arg or args)
        self.transfer_target = 0
        self.transfer_deadline_us = 0
        self.lease_void = False
        self.removed: list[int] = []  # to be told so when the configuration is committed
        self.snapshot: Source | None = None  # the newest, shared by all that need one
        self.hold_index = 0  # the log after it is kept, for whoever gets a snapshot, until then
        self.hold_until_us = 0

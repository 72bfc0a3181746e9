"""A group that begins with a state that was exported: it comes through the log, in pieces, before anything else.

This module knows nothing of files, nor where the bytes come from. Rules:

* The group's config says from its creation on how many bytes will come and what their CRC is (``restore``), so every
  member knows before the first entry that its state is not there yet. Until it is, commands and queries, stale ones
  too, are refused, and it is certain that nothing was done. No command can slip in before the state.
* A piece is an entry: replicated, committed and applied like any other, so what was acknowledged of the state is held
  by a quorum, whoever leads or dies meanwhile. It counts only if it begins where the bytes so far end. Sent twice, it
  has no effect the second time; so whoever sends pieces may try again, through any leader, and be replaced by another.
* The entry of the last piece makes the state, on every replica at the same index. If the CRC is wrong, or the user's
  ``load`` raises, the bytes are dropped on every replica alike, the group still waits, and it may be tried again.
* A snapshot that is made meanwhile carries the bytes so far.

Why not a snapshot for each first member: then the state would have to reach a quorum by other means than the log, and
be saved, before any of them may vote, or an election could be won by one that has nothing. The log is that means.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import msgpack

from raftfleet.core import own_log
from raftfleet.core.codes import COMMAND_FAILED, DISK_FULL, NOT_LEADER, OK, OVERLOADED, REFUSED
from raftfleet.core.failures import describe
from raftfleet.core.messages import RESTORE

if TYPE_CHECKING:
    from raftfleet.core.config import GroupConfig
    from raftfleet.core.member import Member
    from raftfleet.core.messages import Entry

PIECE_BYTES_MAX = 256 << 10
"""As a snapshot's chunk: small enough that beats and other groups' entries pass between two of them."""


class Restoring:
    """What a member still waits for.

    ``received``: the bytes so far. ``asked_index``: of the newest piece that this member appended as leader.
    """

    __slots__ = ("asked_index", "crc", "received", "size_bytes")

    def __init__(self, size_bytes: int, crc: int, received: bytes = b"") -> None:
        self.size_bytes = size_bytes
        self.crc = crc
        self.received = bytearray(received)
        self.asked_index = 0

    def dump(self) -> list[Any]:
        """For a snapshot."""
        return [self.size_bytes, self.crc, bytes(self.received)]


def begin(config: GroupConfig) -> Restoring | None:
    """What a member that begins with this config waits for."""
    return Restoring(*config.restore) if config.restore is not None else None


def refusal(member: Member) -> str:
    """What whoever wants something of the group is told meanwhile."""
    restoring = member.restoring
    assert restoring is not None
    return (
        f"group {member.name} is being restored and does not serve yet: "
        f"{len(restoring.received)} of {restoring.size_bytes} bytes are there"
    )


def propose_piece(member: Member, offset: int, data: bytes, token: object) -> None:
    """As leader: append a piece. Answered with ``OK [bytes that are there, whether the state is made]``.

    A piece that does not fit is no error: the answer says where to go on.
    """
    shard = member.shard
    lead = member.lead
    restoring = member.restoring
    if lead is None:
        shard.reply(token, NOT_LEADER, (member.leader, member.term))
    elif restoring is None:
        shard.reply(token, OK, [offset + len(data), True])
    elif member.commit < lead.noop_index or lead.transfer_target:
        shard.reply(token, OVERLOADED, "the leader has just begun, or hands over: try again")
    elif shard.is_full:
        shard.reply(token, DISK_FULL, f"the node that leads group {member.name} has no room on its disk")
    elif member.applied < restoring.asked_index <= member.last_index:
        shard.reply(token, OVERLOADED, "another piece is under way: one at a time")
    elif offset != len(restoring.received) or len(data) > PIECE_BYTES_MAX:
        shard.reply(token, OK, [len(restoring.received), False])
    else:
        restoring.asked_index = own_log.append(member, RESTORE, bytes(msgpack.packb([offset, data])))
        lead.pending[restoring.asked_index] = [token]
        shard.set_dirty(member)


def apply_piece(member: Member, entry: Entry) -> tuple[int, Any]:
    """Apply a RESTORE entry; the answer for whoever sent it."""
    offset, data = msgpack.unpackb(entry.data)
    restoring = member.restoring
    if restoring is None:
        return OK, [offset + len(data), True]
    received = restoring.received
    if offset == len(received) and offset + len(data) <= restoring.size_bytes:
        received += data
    if len(received) < restoring.size_bytes:
        return OK, [len(received), False]
    return _make_state(member, restoring)


def _make_state(member: Member, restoring: Restoring) -> tuple[int, Any]:
    data = bytes(restoring.received)
    crc = zlib.crc32(data)
    if crc != restoring.crc:
        restoring.received.clear()
        return REFUSED, f"the state's CRC32 is {crc:08x}, not {restoring.crc:08x} as was announced"
    try:
        with member.shard.user_code(member):
            member.machine.context.version = member.active_version
            state = member.machine.load(data)
    except BaseException as error:  # of the user's code, SystemExit too; on every replica alike
        restoring.received.clear()
        member.shard.event("snapshot_failed", member.uid, ": ".join(describe(error)))
        return COMMAND_FAILED, describe(error)
    member.state = state
    member.restoring = None
    member.shard.event("restored", member.uid, len(data))
    return OK, [len(data), True]

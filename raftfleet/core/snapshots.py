"""Snapshots: made of what is applied, taken over by whoever lacks the log.

This module knows nothing of files: a shard saves what is installed here. How a leader sends them is in
:mod:`raftfleet.core.sending`.

Rules (paper 7, thesis 5.1; DESIGN 5.4):

* A snapshot is installed only if it is ahead of what is committed here; the term is checked first.
* It is saved before it is acknowledged as done. Membership and client sessions travel inside, and the membership has an
  index of its own.
* A log that agrees with the snapshot's last entry keeps what comes after it; any other log is replaced.
* Chunks of another index, term, length or CRC are never put together (:mod:`raftfleet.core.incoming`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack

from raftfleet.core import apply, own_log, roles
from raftfleet.core.failures import describe
from raftfleet.core.incoming import Incoming, Key, drop_incoming
from raftfleet.core.membership import Membership
from raftfleet.core.messages import SNAPSHOT_ANSWER, Snapshot, SnapshotAnswer
from raftfleet.core.restoring import Restoring
from raftfleet.core.sending import RETRY_US
from raftfleet.core.sessions import Sessions

if TYPE_CHECKING:
    from raftfleet.core.member import Member


def make_snapshot(member: Member) -> tuple[int, int, bytes]:
    """``(index, term, bytes)`` of everything applied here.

    The bytes are msgpack ``[format = 1, membership index, membership, last time, sessions, machine version,
    state]``, and of a group that waits for its state ``[size, CRC, bytes so far]`` after that.
    """
    index = member.applied
    at, membership = member.memberships[0]
    for row in member.memberships:
        if row[0] <= index:
            at, membership = row
    with member.shard.user_code(member):
        state = member.machine.dump(member.state)
    parts = [1, at, membership.pack(), member.last_time_us, member.session_table.dump(), member.active_version, state]
    if member.restoring is not None:
        parts.append(member.restoring.dump())
    data = bytes(msgpack.packb(parts, use_bin_type=True))
    member.dump_known = (len(data), member.log.total_bytes)
    return index, member.log.term_at(index), data


def dump_bytes_guess(member: Member) -> int:
    """What a dump may take: as much as the last one known here, and all that came into the log since."""
    size_bytes, at_bytes = member.dump_known
    looked_at = member.audit.state_bytes if member.audit is not None else 0
    return max(size_bytes + max(member.log.total_bytes - at_bytes, 0), looked_at)


def on_snapshot(member: Member, sender: int, m: Snapshot) -> None:
    """A chunk. The snapshot counts only if it is ahead of what is committed here (DESIGN 5.4)."""
    if m.term < member.term:
        own_log.teach_term(member, sender, m.index, m.life)
        return
    if not roles.is_present_life(member, m.life, m.term):
        return
    if member.lead is not None and m.term == member.term:
        member.shard.violation(member, f"two leaders in term {m.term}: {sender} and {member.id}")
        return
    if member.leader != sender or m.term != member.term:
        roles.follow(member, m.term, sender)
    else:
        member.heard_us = member.shard.now_us
        member.timer_us = 0
    if m.index <= member.commit:
        if member.incoming is not None and member.incoming.index <= member.commit:
            drop_incoming(member)  # a late chunk of the one before takes nothing from what is still of use
        _answer_snapshot(member, sender, m, m.total, True)
        return
    key = Key(m.index, m.index_term, m.total, m.crc)
    incoming = member.incoming
    if incoming is None or incoming.key != key:
        incoming = _begin(member, key)
    elif incoming.failed_us:
        if member.shard.now_us - incoming.failed_us < RETRY_US:
            return
        incoming = _begin(member, key)
    if m.offset == incoming.received and m.offset + len(m.data) <= m.total:
        incoming.take(m.data)
        member.shard.chunk_arrived(member)
    done = incoming.is_complete
    if done and not _install_snapshot(member, incoming):
        return
    _answer_snapshot(member, sender, m, m.total if done else incoming.received, done)


def _begin(member: Member, key: Key) -> Incoming:
    drop_incoming(member)
    is_large = key.size_bytes > member.shard.settings.inline_bytes_max
    member.incoming = Incoming(key, member.shard.arrival(member, key) if is_large else None)
    return member.incoming


def _answer_snapshot(member: Member, sender: int, m: Snapshot, next_offset: int, done: bool) -> None:
    member.shard.send_saved(
        sender,
        SnapshotAnswer(
            SNAPSHOT_ANSWER, member.uid, member.term, m.index, m.index_term, next_offset, done, m.stamp, m.life
        ),
    )


class Unpacked(NamedTuple):
    """A snapshot's parts, ready to be taken over."""

    membership_index: int
    membership: Membership
    time_us: int
    sessions: Sessions
    version: int
    state: Any
    restoring: Restoring | None


def unpack(member: Member, data: bytes) -> Unpacked:
    """Read what :func:`make_snapshot` gave. Raises whatever is wrong with it; the member stays as it is."""
    form, at, membership_data, time_us, session_rows, version, state_data, *waits = msgpack.unpackb(
        data, raw=False, strict_map_key=False
    )
    if form != 1:
        raise ValueError(f"snapshot format {form} is not known here")
    membership = Membership.unpack(membership_data, at)
    if version > member.machine.version:
        raise ValueError(f"the group works as version {version}; the code here knows {member.machine.version}")
    with member.shard.user_code(member):
        member.machine.context.version = version
        state = member.machine.load(state_data)
    table = Sessions(member.session_table.ttl_us, member.session_table.count_max)
    table.load(session_rows)
    return Unpacked(at, membership, time_us, table, version, state, Restoring(*waits[0]) if waits else None)


def take_over(member: Member, index: int, unpacked: Unpacked) -> None:
    """Be as the snapshot of ``index`` says; the log and the later memberships are the caller's."""
    member.state = unpacked.state
    member.restoring = unpacked.restoring
    member.session_table = unpacked.sessions
    member.active_version = unpacked.version
    member.last_time_us = max(unpacked.time_us, member.last_time_us)
    member.commit = member.applied = member.checked_index = index


def _came_to_nothing(member: Member, incoming: Incoming, why: str) -> bool:
    member.shard.event("snapshot_failed", member.uid, why)
    incoming.fail(member.shard.now_us)
    return False


def _install_snapshot(member: Member, incoming: Incoming) -> bool:
    """Take over state, sessions and membership; returns False (and says so) if the bytes are of no use."""
    _, _, size_bytes, crc = incoming.key
    if not incoming.is_whole:
        return _came_to_nothing(member, incoming, f"a snapshot came with CRC {incoming.crc:08x}, not {crc:08x}")
    try:
        data = incoming.data()
    except OSError as error:
        return _came_to_nothing(member, incoming, f"what arrived of a snapshot cannot be read: {error}")
    try:
        unpacked = unpack(member, data)
    except BaseException as error:  # of the user's ``load``
        return _came_to_nothing(member, incoming, ": ".join(describe(error)))
    del data  # it may be as large as the state
    member.incoming = None
    index, term = incoming.key[:2]
    log = member.log
    replaces_log = log.term_at(index) != term
    if replaces_log:
        log.reset_to(index, term)
        later = []
    else:
        log.compact_to(index)  # the rest of the log agrees up to here and stays
        later = [row for row in member.memberships if row[0] > index]
    member.memberships = [(unpacked.membership_index, unpacked.membership), *later]
    take_over(member, index, unpacked)
    member.dump_known = (size_bytes, log.total_bytes)
    member.shard.save_snapshot(member, incoming, replaces_log=replaces_log)
    if member.hook is not None:
        apply.call_hook(member, "on_restored", member.state)
    member.shard.on_restored(member)
    return True

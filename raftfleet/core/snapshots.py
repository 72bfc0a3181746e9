"""Snapshots: made of what is applied, sent in chunks, taken over by whoever lacks the log.

This module knows nothing of files: a shard saves what is installed here. What a leader does with the answers is in
:mod:`raftfleet.core.replication`.

Rules (paper 7, thesis 5.1; DESIGN 5.4):

* A snapshot is installed only if it is ahead of what is committed here; the term is checked first.
* It is saved before it is acknowledged as done. Membership and client sessions travel inside, and the membership has an
  index of its own.
* A log that agrees with the snapshot's last entry keeps what comes after it; any other log is replaced.
* Chunks of another leader, index, term or length are never put together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack

from raftfleet.core import apply, own_log, roles
from raftfleet.core.failures import describe
from raftfleet.core.membership import Membership
from raftfleet.core.messages import SNAPSHOT, SNAPSHOT_ANSWER, Snapshot, SnapshotAnswer
from raftfleet.core.progress import CHUNKS_IN_FLIGHT_MAX, Transfer
from raftfleet.core.restoring import Restoring
from raftfleet.core.sessions import Sessions

if TYPE_CHECKING:
    from raftfleet.core.member import Member
    from raftfleet.core.progress import Progress


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
    return index, member.log.term_at(index), bytes(msgpack.packb(parts, use_bin_type=True))


def start_snapshot(member: Member, peer: int, progress: Progress) -> None:
    """``peer`` needs what is compacted away: send it a snapshot, made now unless a fit one is at hand."""
    lead = member.lead
    assert lead is not None
    shared = lead.snapshot
    if shared is None or shared.index < member.log.snapshot_index:
        try:
            index, term, data = member.make_snapshot()
        except BaseException as error:
            member.shard.event("snapshot_failed", member.uid, ": ".join(describe(error)))
            progress.paused = True
            progress.sent_stamp = member.shard.stamp
            return
        shared = lead.snapshot = Transfer(index, term, data)
    progress.to_snapshot(Transfer(shared.index, shared.term, shared.data))
    send_chunks(member, peer, progress)


def send_chunks(member: Member, peer: int, progress: Progress) -> None:
    """Send ``peer`` the next chunks, as far as the window allows."""
    transfer = progress.transfer
    assert transfer is not None
    stamp = member.shard.stamp
    total = len(transfer.data)
    chunk_bytes = member.shard.settings.chunk_bytes
    while transfer.sent < total and transfer.sent - transfer.acked < CHUNKS_IN_FLIGHT_MAX * chunk_bytes:
        data = transfer.data[transfer.sent : transfer.sent + chunk_bytes]
        member.shard.send(
            peer,
            Snapshot(
                SNAPSHOT,
                member.uid,
                member.term,
                transfer.index,
                transfer.term,
                transfer.sent,
                total,
                stamp,
                progress.life,
                data,
            ),
        )
        transfer.sent += len(data)
        progress.sent_stamp = stamp


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
        if member.incoming is not None and member.incoming[0] <= member.commit:
            member.incoming = None  # a late chunk of the one before takes nothing from what is still of use
        _answer_snapshot(member, sender, m, m.total, True)
        return
    incoming = member.incoming
    if incoming is None or incoming[:3] != (m.index, m.index_term, m.total):
        incoming = member.incoming = (m.index, m.index_term, m.total, bytearray())
    received = incoming[3]
    if m.offset == len(received) and m.offset + len(m.data) <= m.total:
        received += m.data
    done = len(received) == m.total
    if done:
        member.incoming = None
        if not _install_snapshot(member, m.index, m.index_term, bytes(received)):
            return
    _answer_snapshot(member, sender, m, len(received), done)


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


def _install_snapshot(member: Member, index: int, term: int, data: bytes) -> bool:
    """Take over state, sessions and membership; returns False (and says so) if the bytes are of no use."""
    try:
        unpacked = unpack(member, data)
    except BaseException as error:
        member.shard.event("snapshot_failed", member.uid, ": ".join(describe(error)))
        return False
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
    member.shard.save_snapshot(member, data, replaces_log=replaces_log)
    if member.hook is not None:
        apply.call_hook(member, "on_restored", member.state)
    member.shard.on_restored(member)
    return True

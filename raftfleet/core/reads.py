"""Linearizable queries, without an entry in the log: ReadIndex, and the lease.

This module reads no clock: stamps and the time are the shard's.

Rules (thesis 6.4; DESIGN 5.2, 5.10):

* A query is answered when an entry of this leader's term is committed, a quorum has confirmed this leader by answers to
  messages sent *after* the query came, and the read index is applied.
* The lease, only where ``clock_drift_margin`` allows it, counts from the stamp of what a quorum answered, is shorter
  than the followers' refusal to vote by that margin, and is void from the start of a transfer. Its answers are offers:
  the shard reads the clock again before it hands them out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack

from raftfleet.core import apply, replication, restoring
from raftfleet.core.codes import NOT_LEADER, OK, QUERY_FAILED, RESTORING
from raftfleet.core.failures import describe, pack_result
from raftfleet.core.progress import SNAPSHOT as SENDING_SNAPSHOT

if TYPE_CHECKING:
    from raftfleet.core.member import Member

_unpack = msgpack.unpackb

STATE_WANTED = bytes(bytearray(b"the state itself"))
"""Known by its identity, so that nothing that comes over a wire is ever taken for it."""


def read(member: Member, arg: bytes | list[bytes], token: object) -> None:
    """A linearizable query, or a run: answered when a quorum has confirmed a message sent after now (thesis 6.4)."""
    lead = member.lead
    shard = member.shard
    if lead is None:
        shard.reply(token, NOT_LEADER, (member.leader, member.term))
        return
    lead.reads.append((shard.stamp, max(member.commit, lead.noop_index), token, arg))
    shard.reading[member.uid] = member


def lease_until_us(member: Member) -> int:
    """End of the lease by this clock, 0 where there is none (DESIGN 5.10)."""
    lead = member.lead
    margin = member.config.clock_drift_margin
    if lead is None or margin is None or lead.lease_void or member.commit < lead.noop_index:
        return 0
    return member.quorum_stamp() + int(member.election_timeout_us * (1.0 - margin))


def ask_for_confirmation(member: Member) -> None:
    """Reads wait: make sure that a message sent from now on will be answered by every voter.

    Nobody is asked while the lease holds: it answers them, and the periodic beats renew it.
    """
    lead = member.lead
    if lead is None or not lead.reads or member.lease_until_us() > member.shard.now_us:
        return
    newest = lead.reads[-1][0]
    for voter in member.membership.voters:
        if voter == member.id:
            continue
        progress = lead.progress[voter]
        if progress.sent_stamp >= newest and progress.state != SENDING_SNAPSHOT:
            continue
        link = member.shard.links[voter]
        if progress.led and not link.mismatch_count:
            # One beat after the newest read is enough: asking again in each turn, on a slow link, makes every
            # answer breed new beats. A lost one is made good by the periodic beat.
            if link.beat_stamp < newest or link.seq < progress.led_seq:
                member.shard.want_beat(voter)
        elif progress.state != SENDING_SNAPSHOT:
            replication.send_probe(member, voter, progress)


def answer_reads(member: Member) -> bool:
    """Answer the reads that are confirmed and applied; returns whether some still wait."""
    lead = member.lead
    if lead is None:
        return False
    reads = lead.reads
    if member.commit < lead.noop_index or member.is_quarantined:
        return bool(reads)
    confirmed = member.quorum_stamp()
    lease_until_us = member.lease_until_us()
    done = 0
    for stamp, read_index, token, arg in reads:
        if member.applied < read_index:
            break
        if stamp <= confirmed:
            member.shard.reply(token, *member.evaluate(arg, hooked=True))
        elif lease_until_us > member.shard.now_us:
            # Only an offer: the caller reads the clock again before it hands the answer out.
            code, body = member.evaluate(arg, hooked=True)
            member.shard.offer_lease_answer(member, lease_until_us, token, arg, code, body)
        else:
            break
        done += 1
    if done:
        del reads[:done]
    return bool(reads)


def evaluate(member: Member, arg: bytes | list[bytes], *, hooked: bool = False) -> tuple[int, Any]:
    """Run the user's query on the present state; of a run, all of them: OK, and the list of what came of each.

    :data:`STATE_WANTED` in place of an argument: the answer is ``(index, term, version, dumped state)``.
    """
    if member.restoring is not None:
        return RESTORING, restoring.refusal(member)
    if arg is STATE_WANTED:
        return _dump(member)
    shard = member.shard
    is_watched = shard.begin_user_code(member)
    try:
        if isinstance(arg, list):
            rows = [_evaluate(member, one, hooked) for one in arg]
            return OK, [body if code == OK else [code, body] for code, body in rows]
        return _evaluate(member, arg, hooked)
    finally:
        if is_watched:
            shard.end_user_code()


def _evaluate(member: Member, arg: bytes, hooked: bool) -> tuple[int, Any]:
    try:
        value = _unpack(arg, raw=False, strict_map_key=False)
        result = member.machine.query(member.state, value)
        packed = pack_result(result)
    except BaseException as error:  # SystemExit too: a user's code ends its query, never the worker
        return QUERY_FAILED, describe(error)
    if hooked and member.hook is not None:
        apply.call_hook(member, "on_query_answered", member.state, value, result)
    return OK, packed


def _dump(member: Member) -> tuple[int, Any]:
    try:
        with member.shard.user_code(member):
            data = member.machine.dump(member.state)
        if not isinstance(data, bytes):
            raise TypeError(f"dump gave {type(data).__name__}, not bytes")
    except BaseException as error:
        return QUERY_FAILED, describe(error)
    return OK, (member.applied, member.log.term_at(member.applied), member.active_version, data)

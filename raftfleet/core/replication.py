"""The leader's side of replication: commands into the log, appends out, answers in, the commit index.

This module knows nothing of the disk or of user code. What a leader knows of each peer, and the states PROBE, REPLICATE
and SNAPSHOT, are in :mod:`raftfleet.core.progress`.

Rules (paper 5.3, 5.4.2):

* ``match`` moves only by an answer that carries this term, this life of the answerer, and what the append itself
  covered.
* An entry commits when a quorum of voters of the newest configuration holds it and it is of this term; the leader
  counts itself only as far as its own log is saved (DESIGN 5.13).
* Commands that come within one loop share an entry. While the leadership is handed over they wait, and so they do while
  too much is not applied.
* Nothing is sent again on a timer of its own: an answered beat proves that what was sent before it and has no answer is
  lost (:func:`on_beat_answered`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raftfleet.core import own_log, restoring, roles, sending
from raftfleet.core import sessions as session_rules
from raftfleet.core.codes import DISK_FULL, NOT_LEADER, RESTORING, TOO_LARGE
from raftfleet.core.messages import APPEND, COMMANDS, TIMEOUT_NOW, Append, TimeoutNow
from raftfleet.core.progress import APPEND_BYTES_MAX, APPENDS_IN_FLIGHT_MAX, PROBE, REPLICATE
from raftfleet.core.progress import SNAPSHOT as SENDING_SNAPSHOT

if TYPE_CHECKING:
    from raftfleet.core.leading import Leading
    from raftfleet.core.member import Member
    from raftfleet.core.messages import AppendAnswer, Entry, SnapshotAnswer
    from raftfleet.core.progress import Progress

BATCH_COMMANDS_MAX = 4096
BATCH_BYTES_MAX = 4 << 20
"""One log entry holds at most so many commands (or runs) and bytes; more goes into the next."""
UNAPPLIED_ENTRIES_MAX = 4096
"""A leader appends no more while so many of its entries are not applied: the queue in front of it fills instead."""


def propose(member: Member, command: bytes, token: object) -> None:
    """Take a command, or a run. It enters the log at the next flush, with all others that came meanwhile."""
    lead = member.lead
    if lead is None:
        member.shard.reply(token, NOT_LEADER, (member.leader, member.term))
        return
    if member.restoring is not None:
        member.shard.reply(token, RESTORING, restoring.refusal(member))
        return
    size_bytes = len(command)
    if size_bytes > member.config.command_bytes_max:
        refusal = session_rules.size_refusal(member.name, command, member.config.command_bytes_max)
        if refusal is not None:
            member.shard.reply(token, TOO_LARGE, refusal)
            return
    lead.batch.append((command, token))
    lead.batch_bytes += size_bytes
    member.shard.set_dirty(member)


def flush(member: Member) -> None:
    """As leader: put waiting commands into the log and send what each peer lacks."""
    lead = member.lead
    if lead is None:
        return
    if lead.batch and not lead.transfer_target and member.log.last_index - member.applied < UNAPPLIED_ENTRIES_MAX:
        if member.shard.is_full:
            _refuse_batch(member, lead)
        else:
            _append_batch(member, lead)
    last_index = member.log.last_index
    if member.membership.quorum == 1:
        advance_commit(member)
    if member.lead is not lead:
        return
    for peer, progress in lead.progress.items():
        if progress.next <= last_index or (member.eager_commit and progress.told_commit < member.commit):
            _send_appends(member, peer, progress)


def _refuse_batch(member: Member, lead: Leading) -> None:
    """What cannot be saved here is not begun: it stays certain that nothing was done."""
    for _, token in lead.batch:
        member.shard.reply(token, DISK_FULL, f"the node that leads group {member.name} has no room on its disk")
    lead.batch = []
    lead.batch_bytes = 0


def _append_batch(member: Member, lead: Leading) -> None:
    time_us = max(member.shard.wall_us, member.last_time_us)
    member.last_time_us = time_us
    batch = lead.batch
    if len(batch) <= BATCH_COMMANDS_MAX and lead.batch_bytes <= BATCH_BYTES_MAX:
        lead.batch = []
        lead.batch_bytes = 0
        data = session_rules.pack_batch(time_us, [command for command, _ in batch])
        lead.pending[own_log.append(member, COMMANDS, data)] = [token for _, token in batch]
        return
    lead.batch = []
    lead.batch_bytes = 0
    start = 0
    while start < len(batch):
        size_bytes = 0
        stop = start
        while stop < len(batch) and stop - start < BATCH_COMMANDS_MAX:
            size_bytes += len(batch[stop][0])
            if size_bytes > BATCH_BYTES_MAX and stop > start:
                break
            stop += 1
        part = batch[start:stop]
        data = session_rules.pack_batch(time_us, [command for command, _ in part])
        lead.pending[own_log.append(member, COMMANDS, data)] = [token for _, token in part]
        start = stop


def _send_appends(member: Member, peer: int, progress: Progress, *, empty: bool = False) -> None:
    """Send ``peer`` what it lacks, as far as its state allows; with ``empty`` at least one message in any case."""
    log = member.log
    shard = member.shard
    if progress.state == SENDING_SNAPSHOT:
        sending.send_chunks(member, peer, progress)
        return
    if progress.paused and not empty:
        return
    while True:
        first = progress.next
        if first <= log.snapshot_index:
            sending.start_snapshot(member, peer, progress)
            return
        if first <= log.last_index and progress.in_flight >= APPENDS_IN_FLIGHT_MAX and not empty:
            # The commit index waits too, and goes with what is sent when the next answer comes. An append for it alone
            # at each turn would be answered, and each answer of one peer gives a turn, with an append to every other.
            return
        entries: list[Entry] = []
        if first <= log.last_index and progress.in_flight < APPENDS_IN_FLIGHT_MAX:
            stop = log.last_index + 1
            entries = log.slice(first, stop)
            size_bytes = 0
            for count, entry in enumerate(entries):
                size_bytes += len(entry.data)
                if size_bytes > APPEND_BYTES_MAX and count:
                    entries = entries[:count]
                    break
        if not entries and not empty and progress.told_commit >= member.commit:
            return
        prev = first - 1
        prev_term = log.term_at(prev)
        shard.send(
            peer,
            Append(
                APPEND, member.uid, member.term, prev, prev_term, member.commit, shard.stamp, progress.life, entries
            ),
        )
        progress.sent_stamp = shard.stamp
        told = min(member.commit, prev + len(entries))
        if told > progress.told_commit:
            progress.told_commit = told
            progress.told_stamp = shard.stamp
        empty = False
        if progress.state == PROBE:
            progress.paused = True
            return
        if not entries:
            return
        progress.next = first + len(entries)
        progress.in_flight += 1
        if progress.next > log.last_index:
            return


def send_probe(member: Member, peer: int, progress: Progress) -> None:
    """An append without new entries at the proven point: asks "do you follow me?" and tells the commit index."""
    _send_appends(member, peer, progress, empty=True)


def _answerer(member: Member, sender: int, m: AppendAnswer | SnapshotAnswer) -> Progress | None:
    """What this leader knows of the peer that answered, or None if the answer does not count for it.

    A later term ends this leadership. An answer that counts says by itself that the peer follows since ``m.stamp``.
    """
    if m.term > member.term:
        roles.follow(member, m.term, 0)
        return None
    lead = member.lead
    if lead is None or m.term < member.term or m.stamp == own_log.NO_STAMP:
        return None
    progress = lead.progress.get(sender)
    if progress is None or m.life != progress.life:
        return None
    if m.stamp > progress.ack_stamp:
        progress.ack_stamp = m.stamp
    if not progress.led:
        progress.led = True
        progress.led_seq = member.shard.link(sender).lead(member)
    return progress


def on_append_answer(member: Member, sender: int, m: AppendAnswer) -> None:
    """A peer's answer. Only this term's, this life's, and only what the append covered counts."""
    progress = _answerer(member, sender, m)
    lead = member.lead
    if progress is None or lead is None:
        return
    if m.accepted:
        _on_accepted(member, sender, lead, progress, m.index, m.stamp)
    else:
        _on_rejected(member, sender, progress, m)
    if lead.reads:
        member.shard.reading[member.uid] = member


def on_snapshot_answer(member: Member, sender: int, m: SnapshotAnswer) -> None:
    """Progress of a transfer."""
    progress = _answerer(member, sender, m)
    lead = member.lead
    if progress is None or lead is None:
        return
    transfer = progress.transfer
    if m.done:
        if transfer is not None and transfer.index == m.index:
            progress.to_replicate()
        _on_accepted(member, sender, lead, progress, m.index, m.stamp)
        sending.release(member, lead)
        member.shard.active[member.uid] = member
        member.shard.set_dirty(member)
    elif transfer is not None and (transfer.index, transfer.term) == (m.index, m.index_term):
        sending.on_progress(member, sender, progress, m.next_offset, m.stamp)


def _on_accepted(member: Member, sender: int, lead: Leading, progress: Progress, index: int, stamp: int) -> None:
    if index > member.log.last_index:
        member.shard.violation(member, f"{sender} acknowledges {index}, beyond the log's end {member.log.last_index}")
        return
    if stamp >= progress.told_stamp:
        progress.known_commit = progress.told_commit
    if index > progress.match:
        progress.match = index
        progress.in_flight = progress.in_flight - 1 if index < progress.next - 1 and progress.in_flight else 0
        if progress.next <= index:
            progress.next = index + 1
        if progress.state == SENDING_SNAPSHOT:
            if index >= member.log.snapshot_index:
                progress.to_replicate()
        elif progress.state == PROBE:
            progress.to_replicate()
        if index > member.commit:
            advance_commit(member)
    elif progress.state == PROBE and index == progress.next - 1:
        progress.to_replicate()
    if progress.next <= member.log.last_index:
        member.shard.set_dirty(member)
    if not progress.caught_up and progress.match >= member.commit and member.commit >= lead.noop_index:
        progress.caught_up = True
        member.shard.event("caught_up", member.uid, sender)
    if lead.transfer_target == sender and progress.match == member.log.last_index:
        member.shard.send(sender, TimeoutNow(TIMEOUT_NOW, member.uid, member.term))


def _on_rejected(member: Member, sender: int, progress: Progress, m: AppendAnswer) -> None:
    if progress.state == SENDING_SNAPSHOT or m.index <= progress.match:
        return
    if progress.state == PROBE and m.index != progress.next - 1:
        return
    agreeing = member.log.highest_agreeing(m.hint_index, m.hint_term)
    progress.to_probe()
    progress.next = max(progress.match, min(agreeing, m.index - 1)) + 1
    _send_appends(member, sender, progress, empty=True)


def advance_commit(member: Member) -> None:
    """Commit what a quorum of voters holds, if it is of this term (paper 5.4.2)."""
    lead = member.lead
    assert lead is not None
    membership = member.membership
    progress = lead.progress
    matches = [
        member.shard.saved_index(member) if voter == member.id else progress[voter].match for voter in membership.voters
    ]
    matches.sort(reverse=True)
    index = matches[membership.quorum - 1]
    if index > member.commit and member.log.term_at(index) == member.term:
        own_log.set_commit(member, index)


def on_tick(member: Member) -> bool:
    """As leader of a group with something open, at each beat: returns whether something is still open."""
    if not member.check_quorum():
        return False
    lead = member.lead
    assert lead is not None
    if lead.transfer_target and member.shard.now_us >= lead.transfer_deadline_us:
        lead.transfer_target = 0
        member.shard.event("transfer_failed", member.uid)
        member.shard.set_dirty(member)
    if lead.snapshot is not None or lead.hold_index:
        sending.release(member, lead)
    is_open = bool(lead.batch or lead.pending or lead.transfer_target or lead.reads or lead.config_index)
    last_index = member.log.last_index
    for peer, progress in lead.progress.items():
        if progress.match < last_index or not progress.led or progress.known_commit < member.commit:
            is_open = True
            member.shard.want_beat(peer)
        if progress.told_commit < member.commit and progress.state == REPLICATE and progress.next > last_index:
            send_probe(member, peer, progress)
    return is_open


def on_beat_answered(member: Member, peer: int, beat_stamp: int) -> None:
    """``peer`` answered a beat made at ``beat_stamp``: what was sent before and is not answered is lost."""
    lead = member.lead
    if lead is None:
        return
    progress = lead.progress.get(peer)
    if progress is None or progress.sent_stamp >= beat_stamp:
        return
    if progress.state == SENDING_SNAPSHOT:
        sending.on_lost(member, peer, progress)
        return
    if (
        progress.match < member.log.last_index
        or not progress.led
        or progress.paused
        or progress.known_commit < progress.told_commit
    ):
        progress.to_probe()
        _send_appends(member, peer, progress, empty=True)


def not_followed(member: Member, peer: int, term: int) -> None:
    """``peer`` says that it does not follow this leader: leave it out of the digest until it does."""
    lead = member.lead
    if lead is None:
        return
    if term > member.term:
        member.step_down()
        roles.follow(member, term, 0)
        return
    progress = lead.progress.get(peer)
    if progress is not None and progress.led:
        progress.led = False
        member.shard.links[peer].unlead(member, member.term)
        if progress.state != SENDING_SNAPSHOT:
            progress.to_probe()
            _send_appends(member, peer, progress, empty=True)
        member.shard.active[member.uid] = member

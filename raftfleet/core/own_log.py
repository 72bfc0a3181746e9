"""The member's own log: adding to it as leader, making it like the leader's as follower, and the commit index.

This module does not know how a quorum is found (:mod:`raftfleet.core.replication`) nor what entries do
(:mod:`raftfleet.core.apply`).

Rules (paper 5.3, thesis 4.1; DESIGN 5.1):

* A follower deletes a suffix only from the first entry that really conflicts, acknowledges ``prev + len(entries)``,
  never its own last index, and commits ``min(leader's commit, prev + len(entries))``. A late or repeated append thus
  takes nothing back.
* A configuration is in force as soon as it is in the log, committed or not, and out of force when it is deleted.
* What is committed is never deleted: a conflict there is a violation, not a repair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgpack

from raftfleet.core import roles
from raftfleet.core.membership import Membership
from raftfleet.core.messages import APPEND_ANSWER, COMMANDS, CONFIG, GONE, VERSION, AppendAnswer, Entry, Gone

if TYPE_CHECKING:
    from raftfleet.core.leading import Leading
    from raftfleet.core.member import Member
    from raftfleet.core.messages import Append

NO_STAMP = 0
"""In an answer: it says nothing of whom the sender follows. A message's stamp is above 0."""


def append(member: Member, kind: int, data: bytes) -> int:
    """As leader: add one entry of this term; returns its index."""
    index = member.log.append(Entry(member.term, kind, data))
    member.shard.save_entries(member, index)
    if kind == CONFIG:
        take_membership(member, index, data)
    member.shard.active[member.uid] = member
    return index


def on_append(member: Member, sender: int, m: Append) -> None:
    """AppendEntries, receiver's side (paper 5.3; DESIGN 5.1)."""
    shard = member.shard
    if m.term < member.term:
        teach_term(member, sender, m.prev_index, m.life)
        return
    if not roles.is_present_life(member, m.life, m.term):
        return
    if member.lead is not None and m.term == member.term:
        shard.violation(member, f"two leaders in term {m.term}: {sender} and {member.id}")
        return
    if member.leader != sender or m.term != member.term:
        if member.leader and m.term == member.term and member.leader != sender:
            shard.violation(member, f"two leaders in term {m.term}: {sender} and {member.leader}")
            return
        roles.follow(member, m.term, sender)
    else:
        member.heard_us = shard.now_us
        member.timer_us = 0
    log = member.log
    prev, entries = m.prev_index, m.entries
    end = prev + len(entries)
    if prev < log.snapshot_index:
        # What is compacted was committed, so it agrees; only the rest is news.
        cut = min(log.snapshot_index - prev, len(entries))
        entries = entries[cut:]
        prev += cut
        if prev < log.snapshot_index:
            _answer_append(member, sender, m, True, end, 0, 0)
            return
    elif log.term_at(prev) != m.prev_term:
        hint = log.highest_agreeing(prev, m.prev_term)
        _answer_append(member, sender, m, False, m.prev_index, hint, max(log.term_at(hint), 0))
        return
    if entries and not _take_entries(member, prev, entries):
        return
    _answer_append(member, sender, m, True, end, 0, 0)
    commit = min(m.commit, end)
    if commit > member.commit:
        set_commit(member, commit)


def teach_term(member: Member, sender: int, index: int, life: int) -> None:
    """Answer a leader of an earlier term: it learns the present one and nothing else; stamp 0 says that.

    By the time that it comes, the sender may lead the present term, in another process with another clock: the stamp
    of that former append would be a moment that never was, and could be one that is still to come.
    """
    member.shard.send_saved(
        sender, AppendAnswer(APPEND_ANSWER, member.uid, member.term, False, index, 0, 0, NO_STAMP, life)
    )


def _answer_append(
    member: Member, sender: int, m: Append, accepted: bool, index: int, hint_index: int, hint_term: int
) -> None:
    member.shard.send_saved(
        sender,
        AppendAnswer(APPEND_ANSWER, member.uid, member.term, accepted, index, hint_index, hint_term, m.stamp, m.life),
    )


def _take_entries(member: Member, prev: int, entries: list[Entry]) -> bool:
    """Append what is new after ``prev``; delete only from the first entry that really conflicts.

    Returns whether all is there now; if not, nothing may be acknowledged.
    """
    log = member.log
    unsound = [entry.kind for entry in entries if entry.kind != COMMANDS and not _is_sound(entry)]
    if unsound:
        member.shard.violation(member, f"an entry of kind {unsound[0]} after index {prev} makes no sense")
        return False
    if prev < log.last_index:
        same = 0
        for entry in entries:
            index = prev + same + 1
            if index > log.last_index:
                break
            if log.term_at(index) != entry.term:
                if index <= member.commit:
                    member.shard.violation(member, f"a committed entry conflicts at index {index}")
                    return False
                log.truncate_from(index)
                forget_memberships(member, index)
                break
            same += 1
        entries = entries[same:]
        prev += same
    if not entries:
        return True
    log.extend(entries)
    member.shard.save_entries(member, prev + 1)
    for offset, entry in enumerate(entries):
        if entry.kind == CONFIG:
            take_membership(member, prev + 1 + offset, entry.data)
    return True


def _is_sound(entry: Entry) -> bool:
    """Whether an entry that is not a batch can be taken apart when its time comes; a batch is looked at by then."""
    try:
        if entry.kind == CONFIG:
            Membership.unpack(entry.data, 1)
        elif entry.kind == VERSION:
            return type(msgpack.unpackb(entry.data)) is int
    except (ValueError, TypeError, msgpack.UnpackException):
        return False
    return True


def take_membership(member: Member, index: int, data: bytes) -> None:
    """The CONFIG entry at ``index`` is in the log: its configuration is in force."""
    member.memberships.append((index, Membership.unpack(data, index)))
    if len(member.memberships) > 8:
        # The one in force at ``applied`` goes into the next snapshot: committed is not enough to forget it.
        needed = max((row[0] for row in member.memberships if row[0] <= member.applied), default=0)
        member.memberships = [row for row in member.memberships if row[0] >= needed]


def forget_memberships(member: Member, index: int) -> None:
    """Entries from ``index`` on were deleted: a configuration among them is no longer in force."""
    if member.memberships[-1][0] >= index:
        member.memberships = [row for row in member.memberships if row[0] < index]
        assert member.memberships


def set_commit(member: Member, index: int) -> None:
    """Commit up to ``index``, and see to what waited for it."""
    was = member.commit
    member.commit = index
    shard = member.shard
    shard.set_applying(member)
    lead = member.lead
    if lead is None:
        return
    shard.active[member.uid] = member
    if member.eager_commit:
        shard.set_dirty(member)
    if was < lead.noop_index <= index:
        shard.event("leader", member.uid, member.term)
        if lead.reads:
            shard.reading[member.uid] = member
    if lead.config_index and lead.config_index <= index:
        _on_config_committed(member, lead)


def _on_config_committed(member: Member, lead: Leading) -> None:
    config_index = lead.config_index
    lead.config_index = 0
    membership = member.membership
    for peer in lead.removed:
        member.shard.send(peer, Gone(GONE, member.uid, member.term, config_index))
    lead.removed = []
    member.shard.event("config", member.uid, membership.voters, membership.learners)
    if member.id not in membership.voters:
        member.shard.leave_later(member)

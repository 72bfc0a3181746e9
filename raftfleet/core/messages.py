"""What members and shards say to each other: plain tuples with names, ready for the wire.

This module knows nothing of sockets or clocks. Every message is a NamedTuple whose first field is its kind, so that
msgpack packs it as it stands and a receiver dispatches on ``message[0]`` (measured: a dataclass costs three times as
much to make and must be taken apart before packing).

Units: ``term`` = ``epoch << 32 | election number``; an operator's repair of a lost majority raises the epoch, so that
stragglers of the old epoch always carry a lower term (DESIGN 5.15). ``stamp`` is the sender's monotonic clock in
microseconds when the message was made; the receiver echoes it and never interprets it. It rises strictly from one
flush to the next, so it orders "sent before" and "sent after" too. ``life`` is the log index of the configuration
entry that added the receiver (0 for a first member): an answer of an earlier life of the same instance is never
counted for the present one.
"""

from __future__ import annotations

from typing import NamedTuple

# Entry kinds.
NOOP = 0
"""The first entry of a term. Data: empty."""
COMMANDS = 1
"""A batch of commands. Data: msgpack ``[time_us, [command: bin, ...]]``; see :mod:`raftfleet.core.sessions`."""
CONFIG = 2
"""A membership. Data: see :mod:`raftfleet.core.membership`."""
VERSION = 3
"""From here on the state machine works as this version. Data: msgpack int; see :mod:`raftfleet.core.versions`."""
CHECK = 4
"""Members compare what they have come to. Data: msgpack bool; see :mod:`raftfleet.core.divergence`."""
RESTORE = 5
"""A piece of the state that the group begins with. Data: msgpack ``[offset, bin]``; see
:mod:`raftfleet.core.restoring`."""
ENTRY_KINDS = (NOOP, COMMANDS, CONFIG, VERSION, CHECK, RESTORE)

# Message kinds. Those below 32 concern one group, 32 to 63 a link, 64 and above the hosts (raftfleet.fleet.host).
APPEND = 1
APPEND_ANSWER = 2
VOTE = 3
VOTE_ANSWER = 4
SNAPSHOT = 5
SNAPSHOT_ANSWER = 6
TIMEOUT_NOW = 7
STEP_DOWN = 8
GONE = 9
RECOVER_QUERY = 10
RECOVER_ANSWER = 11
FORCE_CONFIG = 12
LOST = 13
LOSS_QUERY = 14
DIGEST = 16
BEAT = 32
BEAT_ANSWER = 33
LINK_LIST = 34
LINK_LIST_ANSWER = 35


class Entry(NamedTuple):
    """One entry of a group's log."""

    term: int
    kind: int
    data: bytes


class Append(NamedTuple):
    """AppendEntries (Raft paper, figure 2). ``entries`` are ``[term, kind, data]`` for indexes after ``prev_index``."""

    kind: int
    uid: int
    term: int
    prev_index: int
    prev_term: int
    commit: int
    stamp: int
    life: int
    entries: list[Entry]


class AppendAnswer(NamedTuple):
    """Accepted: ``index`` = prev + len(entries) of the append answered, never the answerer's own last index.

    Rejected: ``index`` = the append's prev_index; ``hint_index`` / ``hint_term``: the highest entry of the answerer at
    or below prev_index that can still agree (etcd's conflict hint).
    """

    kind: int
    uid: int
    term: int
    accepted: bool
    index: int  # type: ignore[assignment]
    hint_index: int
    hint_term: int
    stamp: int
    life: int


class Vote(NamedTuple):
    """RequestVote. ``pre``: a pre-vote for ``term``, which changes nothing at the receiver (thesis 9.6).

    ``transfer``: the leader itself asked for this election, so stickiness does not apply.
    """

    kind: int
    uid: int
    term: int
    pre: bool
    last_index: int
    last_term: int
    transfer: bool


class VoteAnswer(NamedTuple):
    """``term``: for a granted (pre-)vote, the term that was asked for; for a refusal, the answerer's own term."""

    kind: int
    uid: int
    term: int
    pre: bool
    granted: bool


class Snapshot(NamedTuple):
    """One chunk of a snapshot. ``index``/``index_term``: the last entry that the snapshot contains.

    ``total`` and ``crc``: bytes and CRC-32 of the whole, by which it is known again; ``offset``: where ``data`` begins.
    """

    kind: int
    uid: int
    term: int
    index: int  # type: ignore[assignment]
    index_term: int
    offset: int
    total: int
    stamp: int
    life: int
    data: bytes
    crc: int


class SnapshotAnswer(NamedTuple):
    """``next_offset``: bytes received without a gap. ``done``: the snapshot (or more) is in place."""

    kind: int
    uid: int
    term: int
    index: int  # type: ignore[assignment]
    index_term: int
    next_offset: int
    done: bool
    stamp: int
    life: int


class TimeoutNow(NamedTuple):
    """Leader to a caught-up voter: campaign at once (thesis 3.10)."""

    kind: int
    uid: int
    term: int


class StepDown(NamedTuple):
    """The sender was leader in ``term`` and is no more."""

    kind: int
    uid: int
    term: int


class Gone(NamedTuple):
    """The receiver's member was removed by the configuration at ``index``, or (``index`` = -1) the group is no more."""

    kind: int
    uid: int
    term: int
    index: int  # type: ignore[assignment]


class Lost(NamedTuple):
    """What this life of the sender's member held is damaged: remove it, and add it again if it is wanted.

    ``term``: of the message that is answered. Lives below this one are lost too.
    """

    kind: int
    uid: int
    term: int
    life: int


class LossQuery(NamedTuple):
    """Of a member without a leader, to one that told the loss of an earlier life: is this life of it lost as well?"""

    kind: int
    uid: int
    term: int
    life: int


class RecoverQuery(NamedTuple):
    """Repair of a lost majority: what do you have? ``dead``: instances that an operator declared gone for good."""

    kind: int
    uid: int
    term: int
    dead: list[int]


class RecoverAnswer(NamedTuple):
    """A survivor's term and the end of its log."""

    kind: int
    uid: int
    term: int
    last_index: int
    last_term: int


class ForceConfig(NamedTuple):
    """To the survivor with the most complete log: go on with these voters, at this (higher) epoch's first term."""

    kind: int
    uid: int
    term: int
    voters: list[int]
    dead: list[int]


class Digest(NamedTuple):
    """What the sender's member (this ``life`` of it) had come to at the CHECK entry at ``index``; 0: not known."""

    kind: int
    uid: int
    term: int
    index: int  # type: ignore[assignment]
    life: int
    state: int
    log: int


class Beat(NamedTuple):
    """One per interval and link. ``digest``: XOR of the hashes of (uid, term) that the sender leads here."""

    kind: int
    seq: int
    digest: int
    stamp: int


class BeatAnswer(NamedTuple):
    """``digest``: XOR over the groups in which the answerer follows the asker."""

    kind: int
    seq: int
    digest: int


class LinkList(NamedTuple):
    """After digests differed: all ``[uid, term]`` that the sender leads on this link, in parts.

    ``part`` of ``parts`` (0-based). A receiver acts on it when it has all parts of one ``seq``.
    """

    kind: int
    seq: int
    stamp: int
    part: int
    parts: int
    groups: list[tuple[int, int]]


class LinkListAnswer(NamedTuple):
    """The groups of that list which the answerer does not follow, as ``[uid, the answerer's term]`` (0: unknown)."""

    kind: int
    seq: int
    stamp: int
    exceptions: list[tuple[int, int]]


MESSAGE_TYPES: dict[int, type] = {
    APPEND: Append,
    APPEND_ANSWER: AppendAnswer,
    VOTE: Vote,
    VOTE_ANSWER: VoteAnswer,
    SNAPSHOT: Snapshot,
    SNAPSHOT_ANSWER: SnapshotAnswer,
    TIMEOUT_NOW: TimeoutNow,
    STEP_DOWN: StepDown,
    GONE: Gone,
    RECOVER_QUERY: RecoverQuery,
    RECOVER_ANSWER: RecoverAnswer,
    FORCE_CONFIG: ForceConfig,
    LOST: Lost,
    LOSS_QUERY: LossQuery,
    DIGEST: Digest,
    BEAT: Beat,
    BEAT_ANSWER: BeatAnswer,
    LINK_LIST: LinkList,
    LINK_LIST_ANSWER: LinkListAnswer,
}

"""Links: liveness for many groups at once (DESIGN 6).

This module does not know about sockets or clocks; time arrives as an argument. The rules:

* A link is a pair of shards. Its leading side keeps ``led``, the groups that it leads and in which the other shard has
  a member; the following side keeps ``followed``, the groups in which its member recognises the other as leader. Each
  side keeps the XOR of a 64-bit hash of (uid, term) over its set.
- A beat carries a sequence number and the led digest; its answer the number and the followed digest. Equal digests
  confirm "I follow you in this term" for every group that was in ``led`` when the beat was made, counted from the
  stamp of that beat. Different digests confirm nothing.
- A group joins ``led`` when its leader is elected (its first append leaves before the next beat, and links deliver in
  order, so digests agree at once), leaves when an answer to a list names it, and joins again with the next answer to
  an append. ``Progress.led_seq`` is the first beat that speaks for it.
- Digests that differ on three beats running are resolved by lists (see :meth:`raftfleet.core.shard.Shard`).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raftfleet.core.member import Member

MISMATCHES_BEFORE_LIST = 3
LIST_PART_GROUPS = 10_000
SENT_BEATS_MAX = 256
"""Beats remembered until answered; an answer to an older one confirms nothing."""

_MASK = (1 << 64) - 1


def group_hash(uid: int, term: int) -> int:
    """64-bit hash of (uid, term): two rounds of splitmix64."""
    z = (uid * 0x9E3779B97F4A7C15 + term * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class SentBeat:
    """A beat on its way: what it said, so that its answer can be judged."""

    __slots__ = ("digest", "periodic", "seq", "stamp")

    def __init__(self, seq: int, stamp: int, digest: int, periodic: bool) -> None:
        self.seq = seq
        self.stamp = stamp
        self.digest = digest
        self.periodic = periodic


class Link:
    """This shard's side of its link to the shard ``peer`` (an instance)."""

    __slots__ = (
        "answered_stamp",
        "beat_stamp",
        "checked_us",
        "election_timeout_us_min",
        "followed",
        "followed_digest",
        "heard_us",
        "led",
        "led_digest",
        "led_timeout_us_min",
        "list_done_seq",
        "list_seq",
        "list_sent_us",
        "mismatch_count",
        "ok_seq",
        "ok_stamp",
        "parts",
        "parts_seq",
        "peer",
        "sent",
        "seq",
    )

    def __init__(self, peer: int) -> None:
        self.peer = peer
        # Leading side.
        self.led: dict[int, Member] = {}
        self.led_digest = 0
        self.led_timeout_us_min = 1 << 62
        self.seq = 0
        self.sent: deque[SentBeat] = deque(maxlen=SENT_BEATS_MAX)
        self.beat_stamp = 0  # of the newest beat sent
        self.ok_seq = 0  # newest beat (or list) whose answer confirmed
        self.ok_stamp = 0  # when that one was made
        self.answered_stamp = 0  # newest beat answered at all: the peer lives
        self.mismatch_count = 0
        self.list_seq = 0  # the list that awaits its answer
        self.list_sent_us = 0
        self.checked_us = 0  # when its groups' quorums were last checked because it was silent
        # Following side.
        self.followed: dict[int, Member] = {}
        self.followed_digest = 0
        self.heard_us = 0
        self.election_timeout_us_min = 1 << 62
        self.parts: dict[int, list[tuple[int, int]]] = {}
        self.parts_seq = 0
        self.list_done_seq = 0  # the newest list that was acted on

    def lead(self, member: Member) -> int:
        """Count ``member``'s group among those led here; returns the first beat number that speaks for it."""
        assert member.uid not in self.led
        self.led[member.uid] = member
        self.led_digest ^= group_hash(member.uid, member.term)
        if member.election_timeout_us < self.led_timeout_us_min:
            self.led_timeout_us_min = member.election_timeout_us
        return self.seq + 1

    def unlead(self, member: Member, term: int) -> None:
        """The group is no longer led here, or not acknowledged as such; ``term`` as it was when it joined."""
        if self.led.pop(member.uid, None) is not None:
            self.led_digest ^= group_hash(member.uid, term)

    def follow(self, member: Member) -> None:
        """``member`` recognises the peer as leader in its present term."""
        self.followed[member.uid] = member
        self.followed_digest ^= group_hash(member.uid, member.term)
        if member.election_timeout_us < self.election_timeout_us_min:
            self.election_timeout_us_min = member.election_timeout_us

    def unfollow(self, member: Member) -> None:
        """``member`` no longer does; its term must be what it was when it began to follow."""
        if self.followed.pop(member.uid, None) is not None:
            self.followed_digest ^= group_hash(member.uid, member.term)

    def answer_is_ok(self, seq: int, digest: int) -> SentBeat | None:
        """Judge the answer to beat ``seq``; returns the beat if it is known, after updating what it confirms."""
        sent = self.sent
        while sent and sent[0].seq < seq:
            sent.popleft()
        if not sent or sent[0].seq != seq:
            return None
        beat = sent.popleft()
        if beat.stamp > self.answered_stamp:
            self.answered_stamp = beat.stamp
        if digest == beat.digest:
            self.mismatch_count = 0
            if seq > self.ok_seq:
                self.ok_seq = seq
                self.ok_stamp = beat.stamp
        else:
            self.mismatch_count += 1
        return beat

    @property
    def in_use(self) -> bool:
        """Whether any group stands on this link."""
        return bool(self.led or self.followed)

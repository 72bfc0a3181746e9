"""A shard: many members, their links and timers, as one object that does no I/O.

This module does not know about sockets, files, clocks or threads. The caller's loop, and the order of its duties
(etcd's Ready and Advance, for all groups at once)::

    shard.begin(now_us, wall_us)
    for sender, messages in everything that can be read: shard.clock_read(now_us); shard.receive(sender, messages)
    for every request of a client:                       shard.propose(...) / shard.query(...)
    shard.tick()                            when now_us >= shard.next_deadline_us()
    shard.flush()                           puts waiting commands into logs, makes the appends
    send shard.take_sends()                 appends may leave before anything is on disk
    shard.persist()                         only a durable shard (raftfleet.core.durable) has something to do here
    send shard.take_saved_sends()           votes and acknowledgements: a log on disk is written before these
    shard.apply()                           runs the users' code, answers
    shard.settle(clock again)               lease answers are handed out only if the lease still holds
    hand out shard.take_replies(), shard.take_events()

``finish()`` does the part from ``flush`` on and returns all that is to be sent.

An idle group costs nothing here: only members with a timer, with something unacknowledged (``active``), with waiting
reads (``reading``) or with entries to apply are ever looked at; the rest is the links' beats.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from raftfleet.core import repair, snapshots
from raftfleet.core.codes import GONE_UID, NOT_LEADER
from raftfleet.core.config import GroupConfig
from raftfleet.core.failures import describe
from raftfleet.core.incoming import drop_incoming
from raftfleet.core.links import LIST_PART_GROUPS, MISMATCHES_BEFORE_LIST, Link, SentBeat
from raftfleet.core.member import Member
from raftfleet.core.membership import Membership
from raftfleet.core.messages import (
    APPEND,
    APPEND_ANSWER,
    BEAT,
    BEAT_ANSWER,
    DIGEST,
    FORCE_CONFIG,
    GONE,
    LINK_LIST,
    LINK_LIST_ANSWER,
    LOSS_QUERY,
    LOST,
    RECOVER_ANSWER,
    RECOVER_QUERY,
    SNAPSHOT,
    SNAPSHOT_ANSWER,
    STEP_DOWN,
    TIMEOUT_NOW,
    VOTE,
    VOTE_ANSWER,
    Append,
    Beat,
    BeatAnswer,
    Gone,
    LinkList,
    LinkListAnswer,
    Lost,
    Snapshot,
)
from raftfleet.core.progress import CHUNK_BYTES
from raftfleet.core.sending import INLINE_BYTES_MAX, RETRY_US, BytesSource

if TYPE_CHECKING:
    import random

    from raftfleet.core.incoming import Arrival, Incoming, Key
    from raftfleet.core.sending import Source

HELD_VOTES_MAX = 4096
"""Vote requests kept for groups of which this shard has not been told yet."""
HELD_VOTE_US = 2_000_000
MEMBERSHIPS_SHARED_MAX = 10_000


@dataclass(frozen=True)
class ShardSettings:
    """What is the same for all groups of a shard.

    Attributes:
        beat_interval_us: one beat per linked shard each so many microseconds.
        chunk_bytes: a snapshot travels in pieces of this size.
        inline_bytes_max: states that are likely to be larger are dumped, written and taken in outside the loop's turn.
    """

    beat_interval_us: int = 200_000
    chunk_bytes: int = CHUNK_BYTES
    inline_bytes_max: int = INLINE_BYTES_MAX


class Tombstone(NamedTuple):
    """What stays known of a member that was removed from a group that lives on: it may be added again.

    ``members``: the configuration at ``commit``, as far as it was known here. ``log_end``: (term, index) of the last
    entry that it held: whoever has less gets no vote from this instance, though it holds nothing any more.
    ``is_lost``: it was not removed; what it held is damaged. Its leader has to end its life first.
    """

    term: int
    vote: int
    life: int
    life_term: int
    commit: int
    members: frozenset[int]
    log_end: tuple[int, int]
    is_lost: bool = False


@dataclass
class Effects:
    """What one loop gave: messages by receiver, answers ``(token, code, body)``, events (tuples, first the kind)."""

    sends: dict[int, list[Any]]
    replies: list[tuple[object, int, Any]]
    events: list[tuple[Any, ...]]


class Shard:
    """All members of one worker. ``instance`` is its identity and that of each of its members (DESIGN 1)."""

    is_full = False
    """Whether nothing more can be saved for lack of space (durable shards only): nothing new is taken on then."""
    asks_before_taking_over = False
    """Whether a vote may find no room to be saved in (durable shards only): see :mod:`raftfleet.core.election`."""
    first_seq = 0
    """Beats count from here: a shard that comes back as the same instance begins above all that it ever counted."""

    def __init__(self, instance: int, rng: random.Random, settings: ShardSettings | None = None) -> None:
        self.instance = instance
        self.rng = rng
        self.settings = settings or ShardSettings()
        self.now_us = 0
        self.wall_us = 0
        self.stamp = 0
        self.members: dict[int, Member] = {}
        self.links: dict[int, Link] = {}
        self.active: dict[int, Member] = {}
        self.reading: dict[int, Member] = {}
        self.tombstones: dict[int, Tombstone] = {}
        self.gone: dict[int, str] = {}  # instance -> why: "operator" or anything else that proves it
        self.violations: list[str] = []
        self.may_create: Callable[[int], tuple[str, GroupConfig, Any, Any] | None] = lambda uid: None
        self.is_dead: Callable[[int], bool] = lambda uid: False
        self.holders: Callable[[int], Iterable[int]] = lambda uid: ()
        self.node_of: Callable[[int], str] = str
        self.applied_listener: dict[int, Callable[[int, int, list[bytes]], None]] = {}
        self.restored_listener: dict[int, Callable[[], None]] = {}
        self.user_code_watch: Callable[[Member | None], None] | None = None
        self.begin_dump: Callable[[Member], bool] | None = None
        self._dirty: dict[int, Member] = {}
        self._applying: dict[int, Member] = {}
        self._sends: dict[int, list[Any]] = {}
        self._saved_sends: dict[int, list[Any]] = {}
        self._replies: list[tuple[object, int, Any]] = []
        self._events: list[tuple[Any, ...]] = []
        self._lease_offers: list[tuple[Member, int, object, bytes | list[bytes], int, Any]] = []
        self._want_beat: dict[int, bool] = {}
        self._timers: list[tuple[int, int]] = []
        self._next_beat_us = 0
        self._started_us = -1
        self._first_memberships: dict[Membership, tuple[int, Membership]] = {}
        self._held_votes: dict[int, dict[int, tuple[int, Any]]] = {}  # uid -> sender -> (until when, request)
        self._held_vote_count = 0
        self._established: list[Member] = []
        self._leaving: list[Member] = []
        self._lost_told: set[int] = set()
        self._is_in_user_code = False
        self._dump_retry_us: dict[int, int] = {}  # uid -> when a dump that failed is tried again
        self._handlers: dict[int, Callable[[Member, int, Any], None]] = {
            APPEND: Member.on_append,
            APPEND_ANSWER: Member.on_append_answer,
            VOTE: Member.on_vote,
            VOTE_ANSWER: Member.on_vote_answer,
            SNAPSHOT: Member.on_snapshot,
            SNAPSHOT_ANSWER: Member.on_snapshot_answer,
            TIMEOUT_NOW: Member.on_timeout_now,
            STEP_DOWN: Member.on_step_down,
            GONE: Member.on_gone,
            RECOVER_QUERY: Member.on_recover_query,
            RECOVER_ANSWER: Member.on_recover_answer,
            FORCE_CONFIG: Member.on_force_config,
            LOST: Member.on_lost,
            LOSS_QUERY: Member.on_loss_query,
            DIGEST: Member.on_digest,
        }
        self._link_handlers: dict[int, Callable[[Link, Any], None]] = {
            BEAT: self._on_beat,
            BEAT_ANSWER: self._on_beat_answer,
            LINK_LIST: self._on_link_list,
            LINK_LIST_ANSWER: self._on_link_list_answer,
        }

    # ------------------------------------------------------------------ the loop

    def begin(self, now_us: int, wall_us: int) -> None:
        """Start an iteration. ``now_us`` is monotonic; ``stamp`` rises even where the clock does not."""
        if now_us > self.now_us:
            self.now_us = now_us
        self.wall_us = wall_us
        self.stamp = max(self.now_us, self.stamp + 1)
        if self._started_us < 0:
            self._started_us = self.now_us
            self._next_beat_us = self.now_us

    def clock_read(self, now_us: int) -> None:
        """The clock was read again within an iteration. See :meth:`receive`."""
        if now_us > self.now_us:
            self.now_us = now_us

    def receive(self, sender: int, messages: list[Any]) -> None:
        """Take messages of the shard ``sender``. They were checked field by field when they were decoded.

        The clock must have been read (:meth:`begin` or :meth:`clock_read`) after they were taken from the socket. What
        is promised to a leader, not to vote for another, lasts from the last clock before; its lease from when it sent.
        Where the process stands still between a clock and the socket, a promise would end before the lease on it does.
        """
        members = self.members
        handlers = self._handlers
        for message in messages:
            kind = message[0]
            handler = handlers.get(kind)
            if handler is None:
                link_handler = self._link_handlers.get(kind)
                if link_handler is not None:
                    link_handler(self.link(sender), message)
                continue
            member = members.get(message[1])
            if member is None:
                member = self._unknown(sender, message)
                if member is None:
                    continue
            handler(member, sender, message)

    def tick(self) -> None:
        """Timers and beats that are due."""
        now_us = self.now_us
        timers = self._timers
        while timers and timers[0][0] <= now_us:
            at, uid = heapq.heappop(timers)
            member = self.members.get(uid)
            if member is not None and member.timer_us == at:
                member.timer_due()
        if now_us >= self._next_beat_us:
            self._next_beat_us = now_us + self.settings.beat_interval_us
            self._beat()

    def next_deadline_us(self) -> int:
        """When :meth:`tick` wants to be called next."""
        timers = self._timers
        members = self.members
        while timers:
            at, uid = timers[0]
            member = members.get(uid)
            if member is not None and member.timer_us == at:
                return min(at, self._next_beat_us)
            heapq.heappop(timers)
        return self._next_beat_us

    def flush(self) -> None:
        """Put waiting commands into the logs, send appends, ask for what reads need, send beats that were wanted."""
        if self._dirty:
            dirty = self._dirty
            self._dirty = {}
            for member in dirty.values():
                member.flush()
        if self.reading:
            for member in self.reading.values():
                member.ask_for_confirmation()
        if self._want_beat:
            for peer in self._want_beat:
                link = self.links[peer]
                if link.beat_stamp < self.stamp:
                    self._send_beat(link, periodic=self._want_beat[peer])
            self._want_beat = {}

    def apply(self) -> None:
        """Apply what is committed and answer what can be answered."""
        if self._applying:
            applying = self._applying
            self._applying = {}
            for member in applying.values():
                if self.members.get(member.uid) is member:
                    member.apply_committed()
                    if member.lead is not None and member.lead.reads:
                        self.reading[member.uid] = member
        if self._leaving:
            leaving = self._leaving
            self._leaving = []
            for member in leaving:
                if self.members.get(member.uid) is member:
                    member.leave()
        if self._established:
            established = self._established
            self._established = []
            for member in established:
                member.on_established()
        if self.reading:
            for member in list(self.reading.values()):
                if not member.answer_reads():
                    self.reading.pop(member.uid, None)

    def settle(self, now_us: int) -> None:
        """Hand out the lease answers whose lease holds at ``now_us``, read after the state was (DESIGN 5.10)."""
        if now_us > self.now_us:
            self.now_us = now_us
        offers = self._lease_offers
        if not offers:
            return
        self._lease_offers = []
        for member, until_us, token, arg, code, body in offers:
            if now_us < until_us and member.lease_until_us() >= until_us:
                self.reply(token, code, body)
            else:
                member.read(arg, token)

    def persist(self) -> bool:
        """Make durable what changed; False if it could not be. In memory there is nothing to do."""
        return True

    def finish(self) -> Effects:
        """Everything from :meth:`flush` on."""
        self.flush()
        self.apply()
        self.settle(self.now_us)
        if self._dirty:
            self.flush()
        sends = self.take_sends()
        for peer, messages in self.take_saved_sends().items():
            sends.setdefault(peer, []).extend(messages)
        return Effects(sends, self.take_replies(), self.take_events())

    @property
    def has_work(self) -> bool:
        """Whether another round of :meth:`flush` and :meth:`apply` would do something now."""
        return bool(self._dirty or self._applying or self._sends or self._saved_sends or self._want_beat)

    def take_sends(self) -> dict[int, list[Any]]:
        """Messages that may leave at once, by receiver, in order."""
        sends = self._sends
        self._sends = {}
        return sends

    def take_saved_sends(self) -> dict[int, list[Any]]:
        """Messages that may leave once everything so far is saved."""
        sends = self._saved_sends
        self._saved_sends = {}
        return sends

    def take_replies(self) -> list[tuple[object, int, Any]]:
        """Answers to requests: ``(token, code, body)``."""
        replies = self._replies
        self._replies = []
        return replies

    def take_events(self) -> list[tuple[Any, ...]]:
        """What the owner may want to know: tuples whose first item is the kind."""
        events = self._events
        self._events = []
        return events

    # ------------------------------------------------------------------ groups

    def create_group(
        self,
        uid: int,
        name: str,
        config: GroupConfig,
        machine: Any,
        voters: tuple[int, ...] | None,
        *,
        campaign: bool = False,
        hook: Any = None,
        life: int = 0,
        life_term: int = 0,
    ) -> Member:
        """Start a member: as one of the first ``voters``, or (None) empty, to be filled by its leader."""
        assert uid not in self.members, uid
        membership = Membership.first(voters) if voters is not None else Membership((), (), {})
        with self.user_code(None):
            member = Member(self, uid, name, config, machine, membership, life)
        member.hook = hook
        member.life_term = life_term
        self.members[uid] = member
        buried = self.tombstones.pop(uid, None)
        if buried is not None:
            member.term, member.vote, member.forgotten_end = buried.term, buried.vote, buried.log_end
        self.save_group(member, voters)
        if buried is not None:
            self.save_vote(member)
        if voters is not None:
            member.wait_to_campaign()
            if campaign:
                member.campaign(pre=True)
        held = self._held_votes.pop(uid, None)
        if held is not None:
            self._held_vote_count -= len(held)
            for sender, (until_us, message) in held.items():
                if until_us >= self.now_us:
                    member.on_vote(sender, message)
        return member

    def first_membership(self, membership: Membership) -> tuple[int, Membership]:
        """``(0, membership)``, one object for all members here that begin with an equal one."""
        if membership.audit:  # which does not count for equality
            return 0, membership
        row = self._first_memberships.get(membership)
        if row is None:
            if len(self._first_memberships) >= MEMBERSHIPS_SHARED_MAX:
                self._first_memberships.clear()
            row = self._first_memberships[membership] = (0, membership)
        return row

    def remove_group(self, uid: int) -> None:
        """The group is no more: answer what waits, forget everything."""
        member = self.members.get(uid)
        if member is not None:
            self._forget(member, GONE_UID)
        self.tombstones.pop(uid, None)
        self.save_removal(uid)

    def holds(self, uid: int) -> bool:
        """Whether there is, or was, a member of that group here: none may be begun as if for the first time."""
        return uid in self.members or uid in self.tombstones

    def stop_member(self, member: Member) -> None:
        """This member cannot go on with the code that is here. In memory it is given up; it may be added again."""
        self.drop_member(member)

    def drop_member(self, member: Member) -> None:
        """This member was removed from a group that lives on. Its term and vote stay known: it may be added again."""
        self._forget(member, NOT_LEADER)
        buried = self.tombstones[member.uid] = Tombstone(
            member.term,
            member.vote,
            member.life,
            member.life_term,
            member.commit,
            frozenset(member.committed_membership()[1].lives),
            max(member.forgotten_end, (member.log.last_term, member.log.last_index)),
        )
        self.save_tombstone(member.uid, buried)
        self.event("member_gone", member.uid)

    def _forget(self, member: Member, code: int) -> None:
        if member.lead is not None:
            first = len(self._replies)
            member.step_down()
            if code == GONE_UID:
                self._replies[first:] = [
                    (token, GONE_UID if was == NOT_LEADER else was, body) for token, was, body in self._replies[first:]
                ]
        if member.leader:
            self.link(member.leader).unfollow(member)
            member.leader = 0
        drop_incoming(member)
        uid = member.uid
        for table in (self.members, self.active, self.reading, self._dirty, self._applying):
            table.pop(uid, None)
        self._dump_retry_us.pop(uid, None)

    def _unknown(self, sender: int, message: Any) -> Member | None:
        """A message for a group that has no member here."""
        kind, uid = message[0], message[1]
        if self.is_dead(uid):
            if kind in (APPEND, SNAPSHOT, VOTE):
                self.send(sender, Gone(GONE, uid, message[2], -1))
            return None
        buried = self.tombstones.get(uid)
        if buried is not None and buried.is_lost and kind in (VOTE, LOSS_QUERY):
            self._tell_loss(sender, message, buried)
            return None
        if kind == VOTE:
            if buried is not None and sender not in buried.members:
                # It was removed before this member was, and those who remain may be unknown to it.
                self.send(sender, Gone(GONE, uid, buried.term, buried.commit))
                return None
            if self._held_vote_count >= HELD_VOTES_MAX:
                self._held_vote_count -= len(self._held_votes.pop(next(iter(self._held_votes))))
            held = self._held_votes.setdefault(uid, {})
            self._held_vote_count += sender not in held
            held[sender] = (self.now_us + HELD_VOTE_US, message)
            return None
        if kind not in (APPEND, SNAPSHOT):
            return None
        life = message.life
        if buried is not None:
            if buried.is_lost:
                if self._life_is_lost(sender, message, buried):
                    return None
            elif life <= buried.life and message.term <= buried.life_term:
                # What this instance once knew as that member is forgotten: it may not answer in that life's name.
                return None
        if life == 0:
            return None  # a first member is created from the fleet's log, with its voters
        recipe = self.may_create(uid)
        if recipe is None:
            return None
        name, config, machine, hook = recipe
        try:
            return self.create_group(uid, name, config, machine, None, hook=hook, life=life, life_term=message.term)
        except BaseException as error:  # of the user's ``new``: the leader will ask again
            self.event("cannot_start", uid, name, error)
            return None

    def _life_is_lost(self, sender: int, message: Any, buried: Tombstone) -> bool:
        """Whether the leader speaks of the life whose memory is damaged; it is told then.

        Which life that was may be damaged too: the first that a leader speaks of counts as lost, whatever its number.
        A leader that ended that life adds the member again at a later entry.
        """
        uid, life = message.uid, message.life
        if life > buried.life and uid in self._lost_told:
            return False
        self._lost_told.add(uid)
        if life > buried.life:
            buried = self.tombstones[uid] = buried._replace(life=life)
            self.save_tombstone(uid, buried)
        self.send_saved(sender, Lost(LOST, uid, message.term, life))
        return True

    def _tell_loss(self, sender: int, message: Any, buried: Tombstone) -> None:
        """To whoever has no leader: this member cannot help to elect one, and never will in the life asked about.

        A vote says nothing of lives, so it hears of the last one that is known here; the record of a later one may be
        damaged too. Whoever knows of such a life asks about it.
        """
        uid = message[1]
        if message[0] == LOSS_QUERY and message.life > buried.life:
            buried = self.tombstones[uid] = buried._replace(life=message.life)
            self.save_tombstone(uid, buried)
        self.send_saved(sender, Lost(LOST, uid, message.term, buried.life))

    # ------------------------------------------------------------------ requests

    def propose(self, uid: int, command: bytes, token: object) -> None:
        """A packed command, or run, for group ``uid``; answered once, with ``token``."""
        member = self.members.get(uid)
        if member is None:
            self.reply(token, GONE_UID if self.is_dead(uid) else NOT_LEADER, (0, 0))
            return
        member.propose(command, token)

    def query(self, uid: int, arg: bytes | list[bytes], token: object, *, stale: bool = False) -> None:
        """A packed query, or a run of them. ``stale``: answered from this member as it is, whoever leads."""
        member = self.members.get(uid)
        if member is None:
            self.reply(token, GONE_UID if self.is_dead(uid) else NOT_LEADER, (0, 0))
        elif stale and not member.is_quarantined:
            self.reply(token, *member.evaluate(arg))
        else:
            member.read(arg, token)

    def add_learner(self, uid: int, instance: int) -> None:
        """See :meth:`Member.add_learner`."""
        self.members[uid].add_learner(instance)

    def promote(self, uid: int, instance: int) -> None:
        """See :meth:`Member.promote`."""
        self.members[uid].promote(instance)

    def remove_member(self, uid: int, instance: int) -> None:
        """See :meth:`Member.remove`."""
        self.members[uid].remove(instance)

    def transfer(self, uid: int, instance: int) -> None:
        """See :meth:`Member.transfer`."""
        self.members[uid].transfer(instance)

    # ------------------------------------------------------------------ what members use

    def send(self, peer: int, message: Any) -> None:
        """To be sent with this loop's first frames."""
        messages = self._sends.get(peer)
        if messages is None:
            self._sends[peer] = [message]
        else:
            messages.append(message)

    def send_saved(self, peer: int, message: Any) -> None:
        """To be sent after everything of this loop is saved (rule 6)."""
        messages = self._saved_sends.get(peer)
        if messages is None:
            self._saved_sends[peer] = [message]
        else:
            messages.append(message)

    def reply(self, token: object, code: int, body: Any) -> None:
        """Answer a request."""
        self._replies.append((token, code, body))

    def event(self, *event: Any) -> None:
        """Tell the owner."""
        self._events.append(event)
        if event[0] == "leader":
            member = self.members[event[1]]
            if member.hook is not None:
                self._established.append(member)

    def leave_later(self, member: Member) -> None:
        """A leader that is no voter any more leaves when it has applied, and answered, what is committed."""
        self._leaving.append(member)

    def offer_lease_answer(
        self, member: Member, until_us: int, token: object, arg: bytes | list[bytes], code: int, body: Any
    ) -> None:
        """An answer under the lease, to be handed out by :meth:`settle`."""
        self._lease_offers.append((member, until_us, token, arg, code, body))

    def set_timer(self, member: Member) -> None:
        """``member.timer_us`` was set."""
        heapq.heappush(self._timers, (member.timer_us, member.uid))

    def set_dirty(self, member: Member) -> None:
        """The member has something to flush."""
        self._dirty[member.uid] = member

    def set_applying(self, member: Member) -> None:
        """The member has something to apply."""
        self._applying[member.uid] = member

    def want_beat(self, peer: int) -> None:
        """A beat to ``peer`` must leave in this loop."""
        self._want_beat.setdefault(peer, False)

    def link(self, peer: int) -> Link:
        """The link to ``peer``, made on first use."""
        link = self.links.get(peer)
        if link is None:
            link = self.links[peer] = Link(peer)
            link.seq = self.first_seq
        return link

    def violation(self, member: Member, what: str) -> None:
        """Something that must never be: refuse the message, keep the state, tell loudly."""
        self.violations.append(f"{member.name} (uid {member.uid}): {what}")
        self.event("violation", member.uid, what)

    def refuses_votes(self, member: Member) -> bool:
        """Whether the member may have promised a lease in a former process (DESIGN 5.9). Never in memory."""
        return False

    def gone_for(self, member: Member) -> set[int]:
        """Instances that count as lost for good when ``member``'s group has lost its majority."""
        if member.config.on_majority_loss != "wait":
            return {*self.gone, *repair.lost_instances(member)}
        return {instance for instance, why in self.gone.items() if why == "operator"} | repair.given_up(member)

    @contextlib.contextmanager
    def user_code(self, member: Member | None) -> Iterator[None]:
        """Around every call of a user's code: lets the owner watch how long it takes."""
        is_watched = self.begin_user_code(member)
        try:
            yield
        finally:
            if is_watched:
                self.end_user_code()

    def begin_user_code(self, member: Member | None) -> bool:
        """As :meth:`user_code`, for where a context manager costs too much; returns whether to end it, too."""
        if self.user_code_watch is None or self._is_in_user_code:
            return False
        self._is_in_user_code = True
        self.user_code_watch(member)
        return True

    def end_user_code(self) -> None:
        """The user's code has returned."""
        self._is_in_user_code = False
        assert self.user_code_watch is not None
        self.user_code_watch(None)

    def on_applied(self, member: Member, index: int, time_us: int, commands: list[bytes]) -> None:
        """A batch was applied: whoever listens to that group is told."""
        listener = self.applied_listener.get(member.uid)
        if listener is not None:
            listener(index, time_us, commands)

    def on_restored(self, member: Member) -> None:
        """A snapshot replaced the state."""
        listener = self.restored_listener.get(member.uid)
        if listener is not None:
            listener()

    # What is to be saved: in memory nothing is, and nothing waits (raftfleet.core.durable has the other answers).

    def save_group(self, member: Member, first_voters: tuple[int, ...] | None = None) -> None:
        """The member was made, or its life or config changed."""

    def save_vote(self, member: Member) -> None:
        """Term and vote changed."""

    def prove_room(self, member: Member) -> None:
        """What is said of a vote to come leaves only if that vote could be saved. In memory it always can."""

    def save_entries(self, member: Member, first: int) -> None:
        """The log changed from ``first`` on."""

    def save_snapshot(self, member: Member, incoming: Incoming, *, replaces_log: bool) -> None:
        """The leader's snapshot was installed; with ``replaces_log`` nothing of the log before it is left."""

    def arrival(self, member: Member, key: Key) -> Arrival | None:
        """Where a large snapshot is to be written while it arrives; None: it stays in memory."""
        return None

    def chunk_arrived(self, member: Member) -> None:
        """``member.incoming`` has grown."""

    def save_tombstone(self, uid: int, buried: Tombstone) -> None:
        """The member is no more, and this is to be remembered."""

    def save_removal(self, uid: int) -> None:
        """The group is no more."""

    def saved_index(self, member: Member) -> int:
        """Up to where the member's own log is safe."""
        return member.log.last_index

    def when_saved(self, candidate: Member) -> None:
        """The only voter voted for itself: it leads as soon as that is saved."""
        candidate.count_votes()

    # ------------------------------------------------------------------ snapshots to be sent

    def snapshot_source(self, member: Member) -> Source | None:
        """A snapshot from which ``member``'s log goes on; None: it is being made, ask again."""
        is_small = snapshots.dump_bytes_guess(member) <= self.settings.inline_bytes_max
        return self.dump_here(member) if is_small else self.dump_elsewhere(member)

    def dump_here(self, member: Member) -> Source | None:
        """Dump now. None if the user's code fails, which is told once in ``RETRY_US``."""
        if self.now_us < self._dump_retry_us.get(member.uid, self.now_us):
            return None
        try:
            return BytesSource(*member.make_snapshot())
        except BaseException as error:  # of the user's ``dump``
            self.dump_failed(member, ": ".join(describe(error)))
            return None

    def dump_elsewhere(self, member: Member) -> Source | None:
        """Have the state dumped by :attr:`begin_dump`, if the owner set it; None until :meth:`dump_made`."""
        if self.begin_dump is None:
            return self.dump_here(member)
        if self.now_us >= self._dump_retry_us.get(member.uid, self.now_us):
            self.begin_dump(member)
        return None

    def dump_made(self, member: Member, source: Source) -> None:
        """What :attr:`begin_dump` began is done."""
        self._dump_retry_us.pop(member.uid, None)
        if self.members.get(member.uid) is member:
            member.dump_known = (source.size_bytes, member.log.total_bytes)
            if member.lead is not None:
                member.lead.snapshot = source
                self.active[member.uid] = member

    def dump_failed(self, member: Member, why: str) -> None:
        """What :attr:`begin_dump` began came to nothing: it is tried again after a while."""
        if self.members.get(member.uid) is member:
            self._dump_retry_us[member.uid] = self.now_us + RETRY_US
            self.event("snapshot_failed", member.uid, why)

    def source_failed(self, member: Member, source: Source) -> None:
        """A source of snapshots turned out damaged: it is not offered again."""

    # ------------------------------------------------------------------ links

    def _beat(self) -> None:
        """Once per interval: beats to all whom this shard leads; silent links; groups with something open."""
        now_us = self.now_us
        for uid, member in list(self.active.items()):
            if not member.on_tick() and self.active.get(uid) is member:
                del self.active[uid]
        for member in self.reading.values():
            member.ask_for_confirmation()
        for link in list(self.links.values()):
            if link.led or link.peer in self._want_beat:
                self._want_beat[link.peer] = True
                self._check_led(link, now_us)
            if link.followed:
                self._check_followed(link, now_us)

    def _send_beat(self, link: Link, *, periodic: bool) -> None:
        link.seq += 1
        link.beat_stamp = self.stamp
        link.sent.append(SentBeat(link.seq, self.stamp, link.led_digest, periodic))
        self.send(link.peer, Beat(BEAT, link.seq, link.led_digest, self.stamp))

    def _check_led(self, link: Link, now_us: int) -> None:
        """A link whose peer has not confirmed for long: do its groups still have a quorum?"""
        if not link.led:
            return
        if now_us - max(link.ok_stamp, link.checked_us) > link.led_timeout_us_min:
            link.checked_us = now_us
            for member in list(link.led.values()):
                member.check_quorum()

    def _check_followed(self, link: Link, now_us: int) -> None:
        if now_us - link.heard_us >= link.election_timeout_us_min:
            for member in list(link.followed.values()):
                if not member.timer_us and now_us - link.heard_us >= member.election_timeout_us:
                    member.leader_silent(link.heard_us)

    def _on_beat(self, link: Link, m: Beat) -> None:
        link.heard_us = self.now_us
        self.send_saved(link.peer, BeatAnswer(BEAT_ANSWER, m.seq, link.followed_digest))

    def _on_beat_answer(self, link: Link, m: BeatAnswer) -> None:
        beat = link.answer_is_ok(m.seq, m.digest)
        if beat is None:
            return
        if beat.periodic and self.active:
            for member in list(self.active.values()):
                member.on_beat_answered(link.peer, beat.stamp)
        if link.mismatch_count >= MISMATCHES_BEFORE_LIST and (
            self.now_us - link.list_sent_us >= self.settings.beat_interval_us
        ):
            self._send_list(link)

    def _send_list(self, link: Link) -> None:
        link.seq += 1
        link.list_seq = link.seq
        link.list_sent_us = self.now_us
        groups = [(uid, member.term) for uid, member in link.led.items()]
        parts = max(1, -(-len(groups) // LIST_PART_GROUPS))
        for part in range(parts):
            rows = groups[part * LIST_PART_GROUPS : (part + 1) * LIST_PART_GROUPS]
            self.send(link.peer, LinkList(LINK_LIST, link.seq, self.stamp, part, parts, rows))

    def _on_link_list(self, link: Link, m: LinkList) -> None:
        if m.seq <= link.list_done_seq:
            return  # a list that came twice tells of the past
        if m.seq != link.parts_seq:
            if m.seq < link.parts_seq:
                return
            link.parts_seq = m.seq
            link.parts = {}
        link.parts[m.part] = m.groups
        if len(link.parts) < m.parts:
            return
        link.list_done_seq = m.seq
        listed: dict[int, int] = {}
        for rows in link.parts.values():
            listed.update(rows)
        link.parts = {}
        link.heard_us = self.now_us  # its answer confirms as a beat's does, from when the list was made
        exceptions = []
        for uid, term in listed.items():
            member = link.followed.get(uid)
            if member is None or member.term != term:
                known = self.members.get(uid)
                exceptions.append((uid, known.term if known is not None else 0))
        for uid, member in list(link.followed.items()):
            if listed.get(uid) != member.term:
                member.not_on_leaders_list()
        self.send_saved(link.peer, LinkListAnswer(LINK_LIST_ANSWER, m.seq, m.stamp, exceptions))

    def _on_link_list_answer(self, link: Link, m: LinkListAnswer) -> None:
        if m.seq != link.list_seq:
            return
        link.list_seq = 0
        for uid, term in m.exceptions:
            member = link.led.get(uid)
            if member is not None:
                member.not_followed(link.peer, term)
        # Every other group that was on the list is followed; those that joined later have a higher led_seq.
        link.mismatch_count = 0
        if m.seq > link.ok_seq:
            link.ok_seq = m.seq
            link.ok_stamp = m.stamp

    def pulse(self, now_us: int, sender: int, messages: list[Any]) -> list[Any]:
        """Take only beats and their answers while a user's code runs; returns the messages that must wait.

        Members do not change meanwhile, so what a beat's answer says (whom they follow) is true.
        """
        rest = []
        for message in messages:
            kind = message[0]
            if kind == BEAT:
                link = self.link(sender)
                link.heard_us = max(link.heard_us, now_us)
                self.send_saved(sender, BeatAnswer(BEAT_ANSWER, message.seq, link.followed_digest))
            elif kind == BEAT_ANSWER:
                self.link(sender).answer_is_ok(message.seq, message.digest)
            else:
                rest.append(message)
        return rest

    def pulse_beats(self, now_us: int) -> dict[int, list[Any]]:
        """Beats that are due while a user's code runs, with the answers collected by :meth:`pulse`."""
        self.stamp = max(now_us, self.stamp + 1)
        sends: dict[int, list[Any]] = {}
        for link in self.links.values():
            if link.led:
                link.seq += 1
                link.sent.append(SentBeat(link.seq, self.stamp, link.led_digest, False))
                sends.setdefault(link.peer, []).append(Beat(BEAT, link.seq, link.led_digest, self.stamp))
        return sends

    # ------------------------------------------------------------------ proof

    def check_invariants(self) -> None:
        """Raise AssertionError if the shard's parts contradict each other."""
        assert not self.violations, self.violations
        from raftfleet.core.links import group_hash

        for member in self.members.values():
            member.check_invariants()
        for link in self.links.values():
            digest = 0
            for uid, member in link.led.items():
                assert member.lead is not None and member.lead.progress[link.peer].led
                digest ^= group_hash(uid, member.term)
            assert digest == link.led_digest, "led digest"
            digest = 0
            for uid, member in link.followed.items():
                assert member.leader == link.peer
                digest ^= group_hash(uid, member.term)
            assert digest == link.followed_digest, "followed digest"


__all__ = ["Append", "Effects", "Shard", "ShardSettings", "Snapshot"]

"""A shard whose members survive it: what they promise is saved before it is said.

This module knows nothing of files: what is to be saved goes to a :class:`Disk`, which the owner brings (the node's is
:class:`raftfleet.storage.keeper.Keeper`). The rules (DESIGN 5; each number is a rule there):

* 6: Term, vote, log and life are saved before a message leaves that rests on them (``send_saved``). Appends are not of
  that kind and leave first, so that the followers' disks work while this one does.
* 13: A leader counts itself only as far as its own log is saved; its commit index is looked at again after each save.
  A voter that elects itself alone leads only when its vote is saved: its appends must not outrun its term.
* 4: A leader's snapshot is saved before it is acknowledged.
* 7: A member that was removed is remembered, with its term, vote, life and the end of its log.
* 9: A member that was restored gives no vote for one election timeout.
* What changed is collected and handed over once per loop: one run of entries for each member, from the lowest index
  that changed. Then everything is saved at once.

If there is no room (``persist`` returned False, ``is_full``), what was to be said stays here, of each member that has
something unsaved, and nothing new is taken on: messages that would change a log, a term or a vote are lost as if on the
way, no member campaigns, leaders refuse commands. Beats and reads go on. It ends by itself with the first save that
succeeds.

Bringing members back after a restart::

    shard = DurableShard(instance, rng, settings, disk)     the instance that lies with the data
    shard.begin(now_us, wall_us)
    shard.restore_tombstone(...) / restore_group(...)       before anything else
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from raftfleet.core import replication, roles, snapshots
from raftfleet.core.codes import NOT_LEADER
from raftfleet.core.failures import describe
from raftfleet.core.leaderless import CAMPAIGN_US_PER_GROUP
from raftfleet.core.member import Member
from raftfleet.core.membership import Membership
from raftfleet.core.messages import (
    APPEND,
    BEAT_ANSWER,
    CONFIG,
    FORCE_CONFIG,
    LINK_LIST_ANSWER,
    LOSS_QUERY,
    RECOVER_QUERY,
    SNAPSHOT,
    TIMEOUT_NOW,
    VOTE,
    VOTE_ANSWER,
)
from raftfleet.core.own_log import take_membership
from raftfleet.core.roles import CANDIDATE
from raftfleet.core.shard import Effects, Shard, ShardSettings, Tombstone

if TYPE_CHECKING:
    import random

    from raftfleet.core.config import GroupConfig
    from raftfleet.core.incoming import Arrival, Incoming, Key
    from raftfleet.core.messages import Entry
    from raftfleet.core.sending import Source

FINISH_ROUNDS_MAX = 16
"""A turn that :meth:`DurableShard.finish` does not end by then goes on in the next: nothing waits for it."""
_NEW_THINGS = frozenset((VOTE, VOTE_ANSWER, SNAPSHOT, TIMEOUT_NOW, RECOVER_QUERY, FORCE_CONFIG, LOSS_QUERY))


class Disk(Protocol):
    """What a shard needs of its storage. What is not about snapshots is only collected, until ``sync``."""

    def save_group(
        self,
        uid: int,
        name: str,
        config: dict[str, Any],
        first_voters: Sequence[int] | None,
        life: int,
        facts: Any = None,
    ) -> None:
        """The member begins, or (one that is there) goes on with another config, life or ``facts``."""

    def save_vote(self, uid: int, term: int, vote: int) -> None:
        """Its term and vote."""

    def append(self, uid: int, first: int, entries: Sequence[Entry]) -> None:
        """Its log from ``first`` on is now ``entries``."""

    def reset(self, uid: int, index: int, term: int) -> None:
        """Its log is empty and begins after ``index``, of which a snapshot was saved."""

    def forget_group(self, uid: int) -> None:
        """The group is no more."""

    def bury(self, uid: int, term: int, vote: int, life: int, facts: Any = None) -> None:
        """The member is no more, and this is remembered of it."""

    def save_snapshot(self, uid: int, index: int, term: int, data: bytes) -> bool:
        """Save a snapshot at once. False: there is no room, and nothing changed."""

    def keep_last_state(self, member: Member) -> bool:
        """Save the state of a member that is about to be no more, without holding anything up; False: it cannot be."""

    def open_snapshot(self, uid: int, index_min: int) -> Source | None:
        """The newest stored snapshot, if it is of ``index_min`` or later."""

    def want_snapshot(self, uid: int) -> None:
        """One is to be made, without holding anything up, and soon."""

    def put_aside(self, uid: int, index: int) -> None:
        """The stored snapshot of ``index`` is damaged."""

    def arrival(self, uid: int, key: Key) -> Arrival:
        """A file for a snapshot that is about to arrive. Nothing is done to the disk yet."""

    def write_arrival(self, file: Arrival, data: bytes) -> bool:
        """Write what came next. False: there is no room, and the file is of no use any more."""

    def finish_arrival(self, file: Arrival, data: bytes, uid: int, index: int, term: int) -> bool:
        """Write the last of it and count it as a snapshot. False: there is no room; to be called again."""

    def sync(self) -> bool:
        """Make everything collected durable. False: there is no room; it stays collected."""


class StoredSnapshot(Protocol):
    """The newest snapshot of a member, as it was found."""

    index: int
    term: int


class StoredGroup(Protocol):
    """A member as it was found (:class:`raftfleet.storage.base.RecoveredGroup`)."""

    uid: int
    name: str
    first_voters: tuple[int, ...] | None
    life: int
    term: int
    vote: int
    entries: list[Entry]
    facts: Any


class DurableShard(Shard):
    """A shard on a disk. See the module's text.

    Attributes:
        resting: uids of members that lie on the disk and cannot be worked with by the code that is here.
    """

    asks_before_taking_over = True

    def __init__(self, instance: int, rng: random.Random, settings: ShardSettings | None, disk: Disk) -> None:
        super().__init__(instance, rng, settings)
        self.disk = disk
        self.resting: set[int] = set()
        self._silent_until_us: dict[int, int] = {}  # restored members, which may have promised a lease
        # Not handed over to the disk yet.
        self._changed: dict[int, int] = {}  # uid -> lowest index of its log that changed
        self._voted: dict[int, Member] = {}
        self._probed: set[int] = set()  # term and vote are written once more, to see whether there is room
        self._recorded: set[int] = set()  # handed over at once, as they are rare, and not saved yet
        self._installed: dict[int, tuple[int, int, Incoming, bool]] = {}  # index, term, what, if the log begins anew
        self._arriving: dict[int, Incoming] = {}  # snapshots on their way, of which something is not written
        # Handed over, and the disk had no room.
        self._unsaved: dict[int, int] = {}  # uid -> lowest index
        self._unsaved_terms: set[int] = set()
        self._unsaved_probes: set[int] = set()
        self._held: dict[int, list[Any]] = {}  # sends that wait for it
        self._alone: list[Member] = []  # voted for themselves, and need no other vote

    # ------------------------------------------------------------------ what is to be saved

    def save_group(self, member: Member, first_voters: tuple[int, ...] | None = None) -> None:
        """See :class:`Shard`."""
        facts = [member.life_term, *member.forgotten_end]
        self.disk.save_group(member.uid, member.name, member.config.to_dict(), first_voters, member.life, facts)
        self._recorded.add(member.uid)

    def save_vote(self, member: Member) -> None:
        """See :class:`Shard`."""
        self._voted[member.uid] = member

    def prove_room(self, member: Member) -> None:
        """See :class:`Shard`."""
        self._probed.add(member.uid)

    def save_entries(self, member: Member, first: int) -> None:
        """See :class:`Shard`."""
        uid = member.uid
        low = self._changed.get(uid)
        if low is None or first < low:
            self._changed[uid] = first

    def save_snapshot(self, member: Member, incoming: Incoming, *, replaces_log: bool) -> None:
        """See :class:`Shard`. What is saved of the log must reach the snapshot, or begin anew after it."""
        uid, log = member.uid, member.log
        index = log.snapshot_index
        changed = self._changed.get(uid)
        waiting = self._installed.get(uid)
        anew = replaces_log or (changed is not None and changed <= index) or (waiting is not None and waiting[3])
        self._arriving.pop(uid, None)
        if waiting is not None:
            waiting[2].discard()
        self._installed[uid] = (index, log.snapshot_term, incoming, anew)
        if anew:
            self._changed.pop(uid, None)
            if log.last_index > index:
                self._changed[uid] = index + 1

    def arrival(self, member: Member, key: Key) -> Arrival | None:
        """See :class:`Shard`."""
        return self.disk.arrival(member.uid, key)

    def chunk_arrived(self, member: Member) -> None:
        """See :class:`Shard`. It is written, and answered, when the rest of this turn is."""
        incoming = member.incoming
        if incoming is not None and incoming.file is not None:
            self._arriving[member.uid] = incoming

    def snapshot_source(self, member: Member) -> Source | None:
        """See :class:`Shard`. What lies on the disk is sent from there, and what is large is written there first."""
        stored = self.disk.open_snapshot(member.uid, member.log.snapshot_index)
        return stored if stored is not None else super().snapshot_source(member)

    def dump_elsewhere(self, member: Member) -> Source | None:
        """See :class:`Shard`. It is stored then, and :meth:`snapshot_source` finds it."""
        self.disk.want_snapshot(member.uid)
        return None

    def source_failed(self, member: Member, source: Source) -> None:
        """See :class:`Shard`."""
        self.disk.put_aside(member.uid, source.index)

    def save_tombstone(self, uid: int, buried: Tombstone) -> None:
        """See :class:`Shard`."""
        facts = [buried.life_term, buried.commit, sorted(buried.members), *buried.log_end, buried.is_lost]
        self.disk.bury(uid, buried.term, buried.vote, buried.life, facts)
        self._recorded.add(uid)

    def remove_group(self, uid: int) -> None:
        """See :class:`Shard`. What the group had come to is saved first: a removed group's last snapshot is kept."""
        member = self.members.get(uid)
        if member is not None:
            self._keep_last_state(member)
        super().remove_group(uid)

    def _keep_last_state(self, member: Member) -> None:
        """Nothing where no command ever ran, or no room is left, or the state cannot be dumped (which is told)."""
        has_state = member.last_time_us or (member.config.restore is not None and member.restoring is None)
        if not has_state or self.is_full:
            return
        is_large = snapshots.dump_bytes_guess(member) > self.settings.inline_bytes_max
        if is_large and self.disk.keep_last_state(member):
            return
        try:
            index, term, data = member.make_snapshot()
        except BaseException as error:  # of the user's code
            self.event("snapshot_failed", member.uid, ": ".join(describe(error)))
            return
        self.disk.save_snapshot(member.uid, index, term, data)

    def save_removal(self, uid: int) -> None:
        """See :class:`Shard`."""
        self.resting.discard(uid)
        self.disk.forget_group(uid)
        self._recorded.add(uid)

    def saved_index(self, member: Member) -> int:
        """See :class:`Shard`."""
        last_index = member.log.last_index
        saved = min(last_index, self._changed.get(member.uid, last_index + 1) - 1)
        if self._unsaved:
            saved = min(saved, self._unsaved.get(member.uid, last_index + 1) - 1)
        return saved

    def when_saved(self, candidate: Member) -> None:
        """See :class:`Shard`."""
        if candidate.role == CANDIDATE:
            self._alone.append(candidate)
        else:
            candidate.count_votes()

    def stop_member(self, member: Member) -> None:
        """The code here is too old for it. It rests as it is until the node starts with newer code."""
        self._forget(member, NOT_LEADER)
        self.resting.add(member.uid)
        self.event("member_rests", member.uid)

    def holds(self, uid: int) -> bool:
        """See :class:`Shard`."""
        return uid in self.resting or super().holds(uid)

    def _forget(self, member: Member, code: int) -> None:
        super()._forget(member, code)
        waiting = self._installed.pop(member.uid, None)
        if waiting is not None:
            waiting[2].discard()
        for table in (self._changed, self._voted, self._arriving, self._unsaved, self._silent_until_us):
            table.pop(member.uid, None)
        self._probed.discard(member.uid)

    def _unknown(self, sender: int, message: Any) -> Member | None:
        return None if message[1] in self.resting else super()._unknown(sender, message)

    # ------------------------------------------------------------------ saving it

    @property
    def is_saved(self) -> bool:
        """Whether nothing here waits to be saved."""
        return not (
            (self._changed or self._voted or self._probed or self._recorded or self._installed or self._arriving)
            or (self._unsaved or self._unsaved_terms or self._unsaved_probes)
        )

    def persist(self) -> bool:
        """Save everything that changed; False if there is no room, and :attr:`is_full` is set. Tried again each time.

        Whatever else :attr:`disk` raises leaves this shard finished: nothing that it would still send may leave.
        """
        if not self.is_full and self.is_saved:
            return True
        self._hand_over()
        if self._installed or not self.disk.sync():
            if not self.is_full:
                self.is_full = True
                self.event("disk_full", 0)
            return False
        if self.is_full:
            self.is_full = False
            self.event("disk_has_room", 0)
        self._on_saved()
        return True

    def _hand_over(self) -> None:
        disk, members = self.disk, self.members
        if self._arriving:
            self._write_arrivals()
        for uid, (index, term, incoming, anew) in list(self._installed.items()):
            if not self._save_installed(uid, index, term, incoming):
                return  # the order matters for this member, and the others cannot be saved either
            if anew:
                disk.reset(uid, index, term)
            del self._installed[uid]
            self._unsaved.setdefault(uid, index + 1)
        unsaved = self._unsaved
        for uid, first in self._changed.items():
            log = members[uid].log
            disk.append(uid, first, log.slice(first, log.last_index + 1))
            if first < unsaved.get(uid, first + 1):
                unsaved[uid] = first
        self._changed = {}
        for uid, member in self._voted.items():
            disk.save_vote(uid, member.term, member.vote)
        for uid in self._probed:
            disk.save_vote(uid, members[uid].term, members[uid].vote)
        self._unsaved_probes |= self._probed
        self._probed = set()
        self._unsaved_terms.update(self._voted)
        self._unsaved_terms.update(self._recorded)
        self._voted = {}
        self._recorded = set()

    def _write_arrivals(self) -> None:
        """Chunks of large snapshots. Without room for them one arrival comes to nothing; nothing else waits for it."""
        arriving, self._arriving = self._arriving, {}
        for uid, incoming in arriving.items():
            file = incoming.file
            if file is None or self.disk.write_arrival(file, incoming.take_buffer()):
                continue
            incoming.fail(self.now_us)
            self.event("snapshot_failed", uid, f"no room for a snapshot of {incoming.key.size_bytes} bytes")

    def _save_installed(self, uid: int, index: int, term: int, incoming: Incoming) -> bool:
        file = incoming.file
        if file is None:
            return self.disk.save_snapshot(uid, index, term, incoming.data())
        return self.disk.finish_arrival(file, incoming.data_unwritten(), uid, index, term)

    def _on_saved(self) -> None:
        unsaved, self._unsaved = self._unsaved, {}
        self._unsaved_terms = set()
        self._unsaved_probes = set()
        members = self.members
        for uid in unsaved:
            member = members.get(uid)
            if member is not None and member.lead is not None:
                replication.advance_commit(member)
        if self._alone:
            alone, self._alone = self._alone, []
            for member in alone:
                if members.get(member.uid) is member and member.role == CANDIDATE:
                    member.count_votes()

    def take_saved_sends(self) -> dict[int, list[Any]]:
        """Messages all of whose grounds are saved. Others wait, and come with the first call after they are."""
        sends = super().take_saved_sends()
        if self.is_saved:
            if self._held:
                held, self._held = self._held, {}
                for peer, messages in sends.items():
                    held.setdefault(peer, []).extend(messages)
                return held
            return sends
        free: dict[int, list[Any]] = {}
        for peer, messages in sends.items():
            for message in messages:
                queue = self._held if self._must_wait(peer, message) else free
                queue.setdefault(peer, []).append(message)
        return free

    def _must_wait(self, peer: int, message: Any) -> bool:
        kind = message[0]
        if kind == BEAT_ANSWER or kind == LINK_LIST_ANSWER:
            # It says whom this shard follows, in which term.
            followed = self.link(peer).followed.keys()
            return not (followed.isdisjoint(self._unsaved_terms) and followed.isdisjoint(self._voted))
        uid = message[1]
        if (kind == VOTE or kind == VOTE_ANSWER) and (uid in self._probed or uid in self._unsaved_probes):
            return True
        return any(
            uid in table
            for table in (
                self._changed,
                self._voted,
                self._recorded,
                self._installed,
                self._arriving,
                self._unsaved,
                self._unsaved_terms,
            )
        )

    def finish(self) -> Effects:
        """See :class:`Shard`."""
        effects = Effects({}, [], [])
        for _ in range(FINISH_ROUNDS_MAX):
            self.flush()
            sends = self.take_sends()
            self.persist()
            self.apply()
            self.settle(self.now_us)
            for part in (sends, self.take_saved_sends()):
                for peer, messages in part.items():
                    effects.sends.setdefault(peer, []).extend(messages)
            effects.replies += self.take_replies()
            effects.events += self.take_events()
            if not self.has_work:
                break
        return effects

    @property
    def has_work(self) -> bool:
        """See :class:`Shard`. What waits for room on the disk is no work."""
        return super().has_work or not (self.is_full or self.is_saved)

    # ------------------------------------------------------------------ without room

    def receive(self, sender: int, messages: list[Any]) -> None:
        """See :class:`Shard`."""
        if self.is_full:
            messages = [message for message in messages if self._needs_no_room(message)]
        super().receive(sender, messages)

    def _needs_no_room(self, message: Any) -> bool:
        kind = message[0]
        if kind == APPEND:
            member = self.members.get(message.uid)
            return (
                member is not None
                and message.term == member.term
                and message.life == member.life
                and member.vote != 0
                and message.prev_index + len(message.entries) <= member.log.last_index
            )
        return kind not in _NEW_THINGS

    # ------------------------------------------------------------------ after a restart

    def refuses_votes(self, member: Member) -> bool:
        """See :class:`Shard`: for one election timeout after it was restored."""
        until_us = self._silent_until_us.get(member.uid)
        if until_us is None:
            return False
        if self.now_us < until_us:
            return True
        del self._silent_until_us[member.uid]
        return False

    def restore_tombstone(self, uid: int, term: int, vote: int, life: int, facts: Any) -> None:
        """Know again of a member that is no more."""
        life_term, commit, members, log_term, log_index, is_lost = facts
        self.tombstones[uid] = Tombstone(
            term, vote, life, life_term, commit, frozenset(members), (log_term, log_index), is_lost
        )

    def bury_lost(self, uid: int, term: int, vote: int, life: int) -> None:
        """What a member held is damaged: it is no more, and comes back only in another life."""
        buried = Tombstone(term, vote, max(life, 0), 0, 0, frozenset(), (0, 0), True)
        self.tombstones[uid] = buried
        self.save_tombstone(uid, buried)

    def restore_group(
        self,
        stored: StoredGroup,
        config: GroupConfig,
        machine: Any,
        hook: Any,
        snapshot: StoredSnapshot | None,
        data: bytes,
        *,
        count: int = 1,
    ) -> Member:
        """Bring a member back as it was.

        Args:
            snapshot: its newest snapshot with its ``data``, or None.
            count: how many members are being restored; their elections are spread accordingly.

        Raises:
            Exception: the user's code cannot make a state of it. Nothing changed here; :attr:`resting` is the
                caller's to add to.
        """
        voters = stored.first_voters
        membership = Membership.first(voters) if voters is not None else Membership((), (), {})
        with self.user_code(None):
            member = Member(self, stored.uid, stored.name, config, machine, membership, stored.life)
        member.hook = hook
        log = member.log
        if snapshot is not None:
            unpacked = snapshots.unpack(member, data)
            log.reset_to(snapshot.index, snapshot.term)
            member.memberships = [(unpacked.membership_index, unpacked.membership)]
            snapshots.take_over(member, snapshot.index, unpacked)
            member.dump_known = (len(data), 0)
        first = log.last_index + 1
        log.extend(stored.entries)
        for offset, entry in enumerate(stored.entries):
            if entry.kind == CONFIG:
                take_membership(member, first + offset, entry.data)
        member.term, member.vote = stored.term, stored.vote
        if stored.facts is not None:
            member.life_term, *log_end = stored.facts
            member.forgotten_end = tuple(log_end)
        self.resting.discard(member.uid)
        self.members[member.uid] = member
        self._silent_until_us[member.uid] = self.now_us + member.election_timeout_us
        # One that is empty has a timer, too: if it was removed meanwhile, nobody speaks to it, and it has to ask.
        roles.wait_to_campaign(member, spread_us_min=count * CAMPAIGN_US_PER_GROUP)
        return member

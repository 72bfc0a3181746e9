"""One replica of one group: Raft as in the paper and thesis, with the rules of DESIGN 5.

This module does not know about sockets, files, clocks or threads: messages and the time come in as arguments, messages
and results go out through the shard that owns the member. The caller's order of duties is in
:mod:`raftfleet.core.shard`.

States and what moves between them::

    FOLLOWER       --link to the leader silent, timer-->      PRE_CANDIDATE  (asks, changes nothing)
    PRE_CANDIDATE  --quorum would vote-->                     CANDIDATE      (term + 1, votes for itself)
    CANDIDATE      --quorum voted-->                          LEADER         (appends its NOOP)
    LEADER         --no quorum heard, removed, handed over--> FOLLOWER
    any            --a higher term, or an append of this-->   FOLLOWER
    FOLLOWER       --TimeoutNow from its leader-->            CANDIDATE

A learner stays FOLLOWER. Terms are ``epoch << 32 | n`` (see :mod:`raftfleet.core.messages`).

Two rules that are easily broken by a change here:

* A promise (lease, ReadIndex, check-quorum) counts from the *stamp* of the message that was answered, never from the
  answer's arrival; and only voters of the newest configuration count.
* ``match`` moves only by an answer that carries this term, this life of the answerer, and what the append itself
  covered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack

from raftfleet.core import sessions as session_rules
from raftfleet.core.config import GroupConfig
from raftfleet.core.log import Log
from raftfleet.core.membership import Membership
from raftfleet.core.messages import (
    APPEND,
    APPEND_ANSWER,
    COMMANDS,
    CONFIG,
    FORCE_CONFIG,
    GONE,
    NOOP,
    RECOVER_ANSWER,
    RECOVER_QUERY,
    SNAPSHOT,
    SNAPSHOT_ANSWER,
    STEP_DOWN,
    TIMEOUT_NOW,
    VOTE,
    VOTE_ANSWER,
    Append,
    AppendAnswer,
    Entry,
    ForceConfig,
    Gone,
    RecoverAnswer,
    RecoverQuery,
    Snapshot,
    SnapshotAnswer,
    StepDown,
    TimeoutNow,
    Vote,
    VoteAnswer,
)
from raftfleet.core.names import FLEET_UID
from raftfleet.core.progress import (
    APPEND_BYTES_MAX,
    APPENDS_IN_FLIGHT_MAX,
    CHUNK_BYTES,
    CHUNKS_IN_FLIGHT_MAX,
    PROBE,
    REPLICATE,
    Progress,
    Transfer,
)
from raftfleet.core.progress import SNAPSHOT as SENDING_SNAPSHOT
from raftfleet.core.sessions import COMMAND_FAILED, NIL, OK, Session, Sessions

if TYPE_CHECKING:
    from raftfleet.core.shard import Shard

FOLLOWER = "follower"
PRE_CANDIDATE = "pre_candidate"
CANDIDATE = "candidate"
LEADER = "leader"

QUERY_FAILED = 2
TOO_LARGE = 13
BAD_REQUEST = 17
REFUSED = 19
NOT_LEADER = 90
DROPPED = 91
GROUP_GONE = 92

EPOCH_SHIFT = 32
BATCH_COMMANDS_MAX = 4096
BATCH_BYTES_MAX = 4 << 20
"""One log entry holds at most this much; more goes into the next."""
LOG_BYTES_KEPT_MAX = 32 << 20
CAMPAIGN_US_PER_GROUP = 300
"""When a link with n groups falls silent their elections are spread over at least n times this."""
CAUGHT_UP_ENTRIES = 16
"""A learner so close behind the commit index (entries are batches) is caught up: under load none is ever level."""
UNAPPLIED_ENTRIES_MAX = 4096
"""A leader appends no more while so many of its entries are not applied: the queue in front of it fills instead."""
NEVER_US = -(1 << 62)


class ConfigChangeRefused(Exception):
    """A change of membership, or a transfer, that would not be safe now. The message says why."""


def describe(error: BaseException) -> list[str]:
    """``[type, message]`` of what user code raised, as text that always packs (its ``__str__`` may raise too)."""
    try:
        message = str(error)[:1000]
    except Exception:
        message = "(its message cannot be read)"
    return [type(error).__name__, message.encode("utf-8", "backslashreplace").decode("utf-8")]


def failure_body(code: int, body: Any) -> Any:
    """What the client is told with a code other than OK; stored results are packed."""
    if code == COMMAND_FAILED:
        return msgpack.unpackb(body)
    if body is not NIL:
        return body
    if code == session_rules.OVERLOADED:
        return "the group remembers session_count_max clients, or too many results of this one"
    return "the retry came too late to tell whether the first attempt was applied"


class Leading:
    """What a member holds only while it leads."""

    __slots__ = (
        "batch",
        "batch_bytes",
        "config_index",
        "elected_us",
        "lease_void",
        "noop_index",
        "pending",
        "progress",
        "reads",
        "removed",
        "snapshot",
        "transfer_deadline_us",
        "transfer_target",
    )

    def __init__(self, elected_us: int) -> None:
        self.progress: dict[int, Progress] = {}
        self.noop_index = 0
        self.elected_us = elected_us
        self.config_index = 0  # of a CONFIG entry that is not committed yet
        self.batch: list[tuple[bytes, object]] = []  # (command, token) not in the log yet
        self.batch_bytes = 0
        self.pending: dict[int, list[object]] = {}  # index -> tokens of its commands
        self.reads: list[tuple[int, int, object, bytes]] = []  # (stamp, read index, token, arg)
        self.transfer_target = 0
        self.transfer_deadline_us = 0
        self.lease_void = False
        self.removed: list[int] = []  # to be told so when the configuration is committed
        self.snapshot: Transfer | None = None  # the newest made, shared by all that need one


class Member:
    """One member. Owned by a :class:`~raftfleet.core.shard.Shard`, which calls everything here."""

    __slots__ = (
        "applied",
        "commit",
        "config",
        "eager_commit",
        "election_timeout_us",
        "forgotten_end",
        "heard_us",
        "hook",
        "id",
        "incoming",
        "last_time_us",
        "lead",
        "leader",
        "life",
        "life_term",
        "log",
        "machine",
        "memberships",
        "name",
        "recovery",
        "role",
        "session_table",
        "shard",
        "state",
        "term",
        "timer_us",
        "uid",
        "vote",
        "votes",
    )

    def __init__(
        self, shard: Shard, uid: int, name: str, config: GroupConfig, machine: Any, membership: Membership, life: int
    ) -> None:
        self.shard = shard
        self.id = shard.instance
        self.uid = uid
        self.name = name
        self.config = config
        self.machine = machine
        self.hook: Any = None
        self.life = life
        self.life_term = 0  # of the leader that told the life
        # (term, index) up to which this instance once held the log, before it was removed and added again: entries that
        # it acknowledged then may be committed by it, and candidates that count it as of then must have them.
        self.forgotten_end = (0, 0)
        self.eager_commit = uid == FLEET_UID
        self.election_timeout_us = int(config.election_timeout_s * 1_000_000)
        self.role = FOLLOWER
        self.term = 0
        self.vote = 0
        self.leader = 0
        self.log = Log()
        self.commit = 0
        self.applied = 0
        self.last_time_us = 0  # of the newest entry applied or appended here as leader
        self.memberships: list[tuple[int, Membership]] = [(0, membership)]
        self.heard_us = NEVER_US  # when a leader was last heard about this very group; outlives following it
        self.timer_us = 0
        self.votes: dict[int, bool] = {}
        self.lead: Leading | None = None
        self.incoming: tuple[int, int, int, bytearray] | None = None  # snapshot: index, term, total, bytes so far
        self.recovery: dict[int, tuple[int, int, int]] | None = None  # survivor -> (last term, last index, term)
        self.session_table = Sessions(int(config.session_ttl_s * 1_000_000), config.session_count_max)
        self.state: Any = machine.new()

    # ------------------------------------------------------------------ facts

    @property
    def membership(self) -> Membership:
        """The configuration in force: the newest in the log, committed or not (thesis 4.1)."""
        return self.memberships[-1][1]

    @property
    def voters(self) -> tuple[int, ...]:
        """Instances that vote."""
        return self.membership.voters

    @property
    def learners(self) -> tuple[int, ...]:
        """Instances that only follow."""
        return self.membership.learners

    @property
    def is_learner(self) -> bool:
        """Whether this member has no vote."""
        return self.id not in self.membership.voters

    @property
    def is_leader(self) -> bool:
        """Whether this member leads."""
        return self.lead is not None

    @property
    def is_established(self) -> bool:
        """Whether this member leads and has committed an entry of its own term."""
        return self.lead is not None and self.commit >= self.lead.noop_index

    @property
    def last_index(self) -> int:
        """Index of the last entry."""
        return self.log.last_index

    def committed_membership(self) -> tuple[int, Membership]:
        """The newest configuration at or below the commit index, with its index."""
        for index, membership in reversed(self.memberships):
            if index <= self.commit:
                return index, membership
        return self.memberships[0]

    def hears_leader(self) -> bool:
        """Whether a leader was heard within the election timeout: then no vote is given (DESIGN 5.8, 5.10).

        True even where that leader is not followed any more (a higher term was learned, its list lacked this group):
        it may hold a lease that rests on the answer it was given, and nothing but its own word (StepDown, a transfer)
        takes that promise back.
        """
        return self.lead is not None or self.shard.now_us - self._heard_leader_us() < self.election_timeout_us

    def _heard_leader_us(self) -> int:
        heard_us = self.heard_us
        if self.leader:
            link = self.shard.links.get(self.leader)
            if link is not None and link.heard_us > heard_us and self.uid in link.followed:
                heard_us = link.heard_us
        return heard_us

    # ------------------------------------------------------------------ term, role

    def _follow(self, term: int, leader: int) -> None:
        """Be a follower in ``term`` of ``leader`` (0: unknown)."""
        shard = self.shard
        if self.lead is not None:
            if term != self.term:
                # Deposed: whoever still follows must not wait for the link to fall silent, for it does not.
                self._say_step_down(self.lead)
            self._stop_leading()
        if term != self.term or leader != self.leader:
            self.incoming = None  # another leader's snapshot of the same index may differ in its bytes
        if self.leader and (term != self.term or leader != self.leader):
            self.heard_us = self._heard_leader_us()
            link = shard.links.get(self.leader)
            if link is not None:
                link.unfollow(self)
            if not leader:
                shard.event("leaderless", self.uid)
        if term != self.term:
            assert term > self.term, (term, self.term)
            self.term = term
            self.vote = 0
            shard.save_vote(self)
        changed = leader != self.leader or self.role != FOLLOWER
        self.role = FOLLOWER
        self.leader = leader
        self.votes = {}
        self.recovery = None
        if leader:
            if not self.vote:
                # The term has its leader. A member that lost its memory of this term (removed, added again) must not
                # give a second vote in it.
                self.vote = leader
                shard.save_vote(self)
            link = shard.link(leader)
            if self.uid not in link.followed:
                link.follow(self)
                if shard.now_us > link.heard_us:
                    link.heard_us = shard.now_us
            self.heard_us = shard.now_us
            if changed:
                self.timer_us = 0
        elif not self.timer_us:
            self._wait_to_campaign()

    def _wait_to_campaign(self, base_us: int = -1, spread_us_min: int = 0) -> None:
        """Start this member's own election clock: a full timeout, then a random part, so that few collide."""
        if base_us < 0:
            base_us = self.election_timeout_us
        spread_us = self.shard.rng.randrange(max(self.election_timeout_us // 2, spread_us_min) + 1)
        self.timer_us = self.shard.now_us + base_us + spread_us
        self.shard.set_timer(self)

    def leader_silent(self, silent_since_us: int) -> None:
        """The link to the leader is silent: campaign after what is left of the timeout and a random delay."""
        heard_us = max(self.heard_us, silent_since_us)
        if not self.timer_us:
            left_us = heard_us + self.election_timeout_us - self.shard.now_us
            self._wait_to_campaign(max(left_us, 0), len(self.shard.link(self.leader).followed) * CAMPAIGN_US_PER_GROUP)

    def leader_gone(self) -> None:
        """The leader says that it leads no more: its promise to us and ours to it are void."""
        self._follow(self.term, 0)
        self.heard_us = NEVER_US
        self._wait_to_campaign(0)

    def not_on_leaders_list(self) -> None:
        """The leader's list lacks this group: it is not followed any more; campaign after a full timeout."""
        self._follow(self.term, 0)
        self._wait_to_campaign()

    def timer_due(self) -> None:
        """The timer ran out."""
        self.timer_us = 0
        if self.lead is not None:
            return
        if self.hears_leader():
            if not self.leader:
                self._wait_to_campaign(self.heard_us + self.election_timeout_us - self.shard.now_us)
            return
        if self.leader:
            self._follow(self.term, 0)
        if not self.may_campaign:
            if self.incoming is None and not self._try_recovery():
                self._ask_whether_removed()
            self._wait_to_campaign()
            return
        if self._try_recovery():
            self._wait_to_campaign()
            return
        self.campaign(pre=True)

    @property
    def may_campaign(self) -> bool:
        """Whether this member is a voter, or was one before a removal that is not committed.

        The latter may hold the longest log of all: without its candidature a group whose leader was removing itself
        when it fell could have no leader ever again (thesis 4.2.2).
        """
        return self.id in self.membership.voters or self.id in self.committed_membership()[1].voters

    def _ask_whether_removed(self) -> None:
        """A learner that hears no leader asks the voters that it knows: a pre-vote, which changes nothing there.

        Whoever knows that it was removed says Gone; the one sent at its removal may have been lost.
        """
        message = Vote(VOTE, self.uid, self.term + 1, True, self.log.last_index, self.log.last_term, False)
        for peer in self.membership.voters:
            if peer != self.id:
                self.shard.send_saved(peer, message)

    def campaign(self, *, pre: bool, transfer: bool = False) -> None:
        """Ask for votes: first whether they would be given (thesis 9.6), then in earnest."""
        membership = self.membership
        if not self.may_campaign:
            return
        if self.leader:
            self._follow(self.term, 0)
        asked_before = self.role != FOLLOWER
        if pre:
            self.role = PRE_CANDIDATE
        else:
            self.role = CANDIDATE
            self.term += 1
            self.vote = self.id
            self.shard.save_vote(self)
        self.votes = {self.id: True}
        self._wait_to_campaign(self.election_timeout_us // 2)
        if membership.voters == (self.id,):
            self._count_votes()
            return
        term = self.term + 1 if pre else self.term
        message = Vote(VOTE, self.uid, term, pre, self.log.last_index, self.log.last_term, transfer)
        # Asked in vain before: ask learners too. They may be the only ones left that know of this member's removal.
        in_vain = pre and asked_before
        for peer in membership.lives if in_vain else membership.voters:
            if peer != self.id:
                # A vote request of a candidate speaks for its own, already saved, vote: it leaves after that is saved.
                self.shard.send_saved(peer, message)

    def _count_votes(self) -> None:
        voters = self.membership.voters
        quorum = self.membership.quorum
        granted = sum(1 for voter in voters if self.votes.get(voter))
        if granted >= quorum:
            if self.role == PRE_CANDIDATE:
                self.campaign(pre=False)
            elif self.role == CANDIDATE:
                self._start_leading()
        elif sum(1 for voter in voters if self.votes.get(voter) is False) >= len(voters) - quorum + 1:
            # Lost for sure: wait for the timer.
            self.role = FOLLOWER if self.role == PRE_CANDIDATE else self.role

    def _start_leading(self) -> None:
        shard = self.shard
        self.role = LEADER
        self.leader = self.id
        self.timer_us = 0
        self.votes = {}
        self.recovery = None
        self.incoming = None
        lead = self.lead = Leading(shard.now_us)
        for index, _ in self.memberships:
            if index > self.commit:
                lead.config_index = index
        self._sync_progress()
        for peer, progress in lead.progress.items():
            progress.led = True
            progress.led_seq = shard.link(peer).lead(self)
        lead.noop_index = self._append(NOOP, b"")
        shard.event("elected", self.uid, self.term)
        shard.set_dirty(self)

    def _stop_leading(self) -> None:
        """Leave everything that only a leader has. The term must still be the one that was led."""
        shard = self.shard
        lead = self.lead
        assert lead is not None
        self.lead = None
        self.role = FOLLOWER
        self.leader = 0
        self.timer_us = 0
        for peer, progress in lead.progress.items():
            if progress.led:
                shard.links[peer].unlead(self, self.term)
        shard.active.pop(self.uid, None)
        shard.reading.pop(self.uid, None)
        for _, token in lead.batch:
            shard.reply(token, NOT_LEADER, (0, self.term))
        for tokens in lead.pending.values():
            for token in tokens:
                shard.reply(token, DROPPED, (0, self.term))
        for _, _, token, _ in lead.reads:
            shard.reply(token, NOT_LEADER, (0, self.term))
        shard.event("stepped_down", self.uid, self.term)

    def step_down(self) -> None:
        """Lead no more, and say so at once."""
        lead = self.lead
        if lead is None:
            return
        self._say_step_down(lead)
        self._stop_leading()
        self._follow(self.term, 0)
        # Whoever steps down lets others try first.
        self._wait_to_campaign()

    def _say_step_down(self, lead: Leading) -> None:
        for peer in lead.progress:
            self.shard.send(peer, StepDown(STEP_DOWN, self.uid, self.term))

    # ------------------------------------------------------------------ leader: log and replication

    def _append(self, kind: int, data: bytes) -> int:
        index = self.log.append(Entry(self.term, kind, data))
        self.shard.save_entries(self, index)
        if kind == CONFIG:
            self._take_membership(index, data)
        self.shard.active[self.uid] = self
        return index

    def _take_membership(self, index: int, data: bytes) -> None:
        self.memberships.append((index, Membership.unpack(data, index)))
        if len(self.memberships) > 8:
            # The one in force at ``applied`` goes into the next snapshot: committed is not enough to forget it.
            needed = max((row[0] for row in self.memberships if row[0] <= self.applied), default=0)
            self.memberships = [row for row in self.memberships if row[0] >= needed]

    def _sync_progress(self) -> None:
        """Bring the table of peers in line with the newest membership."""
        lead = self.lead
        assert lead is not None
        lives = self.membership.lives
        for peer in [peer for peer in lead.progress if peer not in lives]:
            progress = lead.progress.pop(peer)
            if progress.led:
                self.shard.links[peer].unlead(self, self.term)
            lead.removed.append(peer)
        for peer, life in lives.items():
            if peer != self.id and peer not in lead.progress:
                lead.progress[peer] = Progress(self.log.last_index + 1, life)
                self.shard.link(peer)

    def propose(self, command: bytes, token: object) -> None:
        """Take a command. It enters the log at the next flush, with all others that came meanwhile."""
        lead = self.lead
        if lead is None:
            self.shard.reply(token, NOT_LEADER, (self.leader, self.term))
            return
        refusal = session_rules.size_refusal(self.name, len(command), self.config.command_bytes_max)
        if refusal is not None:
            self.shard.reply(token, TOO_LARGE, refusal)
            return
        lead.batch.append((command, token))
        lead.batch_bytes += len(command)
        self.shard.set_dirty(self)

    def flush(self) -> None:
        """As leader: put waiting commands into the log and send what each peer lacks."""
        lead = self.lead
        if lead is None:
            return
        if lead.batch and not lead.transfer_target and self.log.last_index - self.applied < UNAPPLIED_ENTRIES_MAX:
            self._append_batch(lead)
        last_index = self.log.last_index
        if self.membership.quorum == 1:
            self._advance_commit()
        if self.lead is not lead:
            return
        for peer, progress in lead.progress.items():
            if progress.next <= last_index or (self.eager_commit and progress.told_commit < self.commit):
                self._send_appends(peer, progress)

    def _append_batch(self, lead: Leading) -> None:
        time_us = max(self.shard.wall_us, self.last_time_us)
        self.last_time_us = time_us
        batch = lead.batch
        if len(batch) <= BATCH_COMMANDS_MAX and lead.batch_bytes <= BATCH_BYTES_MAX:
            lead.batch = []
            lead.batch_bytes = 0
            data = session_rules.pack_batch(time_us, [command for command, _ in batch])
            lead.pending[self._append(COMMANDS, data)] = [token for _, token in batch]
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
            lead.pending[self._append(COMMANDS, data)] = [token for _, token in part]
            start = stop

    def _send_appends(self, peer: int, progress: Progress, *, empty: bool = False) -> None:
        """Send ``peer`` what it lacks, as far as its state allows; with ``empty`` at least one message in any case."""
        log = self.log
        shard = self.shard
        if progress.state == SENDING_SNAPSHOT:
            self._send_chunks(peer, progress)
            return
        if progress.paused and not empty:
            return
        while True:
            first = progress.next
            if first <= log.snapshot_index:
                self._start_snapshot(peer, progress)
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
            if not entries and not empty and progress.told_commit >= self.commit:
                return
            prev = first - 1
            prev_term = log.term_at(prev)
            shard.send(
                peer,
                Append(APPEND, self.uid, self.term, prev, prev_term, self.commit, shard.stamp, progress.life, entries),
            )
            progress.sent_stamp = shard.stamp
            told = min(self.commit, prev + len(entries))
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

    def _send_probe(self, peer: int, progress: Progress) -> None:
        """An append without new entries at the proven point: asks "do you follow me?" and tells the commit index."""
        self._send_appends(peer, progress, empty=True)

    # ------------------------------------------------------------------ follower: append

    def on_append(self, sender: int, m: Append) -> None:
        """AppendEntries, receiver's side (paper 5.3; DESIGN 5.1)."""
        shard = self.shard
        if m.term < self.term:
            answer = AppendAnswer(APPEND_ANSWER, self.uid, self.term, False, m.prev_index, 0, 0, m.stamp, m.life)
            shard.send_saved(sender, answer)
            return
        if not self._is_present_life(m.life, m.term):
            return
        if self.lead is not None and m.term == self.term:
            shard.violation(self, f"two leaders in term {m.term}: {sender} and {self.id}")
            return
        if self.leader != sender or m.term != self.term:
            if self.leader and m.term == self.term and self.leader != sender:
                shard.violation(self, f"two leaders in term {m.term}: {sender} and {self.leader}")
                return
            self._follow(m.term, sender)
        else:
            self.heard_us = shard.now_us
            self.timer_us = 0
        log = self.log
        prev, entries = m.prev_index, m.entries
        end = prev + len(entries)
        if prev < log.snapshot_index:
            # What is compacted was committed, so it agrees; only the rest is news.
            cut = min(log.snapshot_index - prev, len(entries))
            entries = entries[cut:]
            prev += cut
            if prev < log.snapshot_index:
                self._answer_append(sender, m, True, end, 0, 0)
                return
        elif log.term_at(prev) != m.prev_term:
            hint = log.highest_agreeing(prev, m.prev_term)
            self._answer_append(sender, m, False, m.prev_index, hint, max(log.term_at(hint), 0))
            return
        if entries:
            self._take_entries(prev, entries)
        self._answer_append(sender, m, True, end, 0, 0)
        commit = min(m.commit, end)
        if commit > self.commit:
            self._set_commit(commit)

    def _is_present_life(self, life: int, term: int) -> bool:
        """Whether a leader of ``term`` speaks to this life of this member; a new life keeps all of the memory.

        Within a term lives only grow. A leader of a higher term is always right: its log may lack the uncommitted
        entry from which a higher number came, and add this instance again at a lower index.
        """
        if life < self.life and term <= self.life_term:
            return False
        self.life = life
        self.life_term = term
        return True

    def _answer_append(
        self, sender: int, m: Append, accepted: bool, index: int, hint_index: int, hint_term: int
    ) -> None:
        self.shard.send_saved(
            sender,
            AppendAnswer(APPEND_ANSWER, self.uid, self.term, accepted, index, hint_index, hint_term, m.stamp, m.life),
        )

    def _take_entries(self, prev: int, entries: list[Entry]) -> None:
        """Append what is new after ``prev``; delete only from the first entry that really conflicts."""
        log = self.log
        if prev < log.last_index:
            same = 0
            for entry in entries:
                index = prev + same + 1
                if index > log.last_index:
                    break
                if log.term_at(index) != entry.term:
                    if index <= self.commit:
                        self.shard.violation(self, f"a committed entry conflicts at index {index}")
                        return
                    log.truncate_from(index)
                    self._forget_memberships(index)
                    break
                same += 1
            entries = entries[same:]
            prev += same
        if not entries:
            return
        log.extend(entries)
        self.shard.save_entries(self, prev + 1)
        for offset, entry in enumerate(entries):
            if entry.kind == CONFIG:
                self._take_membership(prev + 1 + offset, entry.data)

    def _forget_memberships(self, index: int) -> None:
        """Entries from ``index`` on were deleted: a configuration among them is no longer in force."""
        if self.memberships[-1][0] >= index:
            self.memberships = [row for row in self.memberships if row[0] < index]
            assert self.memberships

    # ------------------------------------------------------------------ leader: answers

    def on_append_answer(self, sender: int, m: AppendAnswer) -> None:
        """A peer's answer. Only this term's, this life's, and only what the append covered counts."""
        if m.term > self.term:
            self._follow(m.term, 0)
            return
        lead = self.lead
        if lead is None or m.term < self.term:
            return
        progress = lead.progress.get(sender)
        if progress is None or m.life != progress.life:
            return
        if m.stamp > progress.ack_stamp:
            progress.ack_stamp = m.stamp
        if not progress.led:
            progress.led = True
            progress.led_seq = self.shard.link(sender).lead(self)
        if m.accepted:
            self._on_accepted(sender, lead, progress, m.index, m.stamp)
        else:
            self._on_rejected(sender, progress, m)
        if lead.reads:
            self.shard.reading[self.uid] = self

    def _on_accepted(self, sender: int, lead: Leading, progress: Progress, index: int, stamp: int) -> None:
        if index > self.log.last_index:
            self.shard.violation(self, f"{sender} acknowledges {index}, beyond the log's end {self.log.last_index}")
            return
        if stamp >= progress.told_stamp:
            progress.known_commit = progress.told_commit
        if index > progress.match:
            progress.match = index
            progress.in_flight = progress.in_flight - 1 if index < progress.next - 1 and progress.in_flight else 0
            if progress.next <= index:
                progress.next = index + 1
            if progress.state == SENDING_SNAPSHOT:
                if index >= self.log.snapshot_index:
                    progress.to_replicate()
            elif progress.state == PROBE:
                progress.to_replicate()
            if index > self.commit:
                self._advance_commit()
        elif progress.state == PROBE and index == progress.next - 1:
            progress.to_replicate()
        if progress.next <= self.log.last_index:
            self.shard.set_dirty(self)
        if not progress.caught_up and progress.match >= self.commit and self.commit >= lead.noop_index:
            progress.caught_up = True
            self.shard.event("caught_up", self.uid, sender)
        if lead.transfer_target == sender and progress.match == self.log.last_index:
            self.shard.send(sender, TimeoutNow(TIMEOUT_NOW, self.uid, self.term))

    def _on_rejected(self, sender: int, progress: Progress, m: AppendAnswer) -> None:
        if progress.state == SENDING_SNAPSHOT or m.index <= progress.match:
            return
        if progress.state == PROBE and m.index != progress.next - 1:
            return
        agreeing = self.log.highest_agreeing(m.hint_index, m.hint_term)
        progress.to_probe()
        progress.next = max(progress.match, min(agreeing, m.index - 1)) + 1
        self._send_appends(sender, progress, empty=True)

    def _advance_commit(self) -> None:
        """Commit what a quorum of voters holds, if it is of this term (paper 5.4.2)."""
        lead = self.lead
        assert lead is not None
        membership = self.membership
        progress = lead.progress
        matches = [
            self.shard.saved_index(self) if voter == self.id else progress[voter].match for voter in membership.voters
        ]
        matches.sort(reverse=True)
        index = matches[membership.quorum - 1]
        if index > self.commit and self.log.term_at(index) == self.term:
            self._set_commit(index)

    def _set_commit(self, index: int) -> None:
        was = self.commit
        self.commit = index
        shard = self.shard
        shard.set_applying(self)
        lead = self.lead
        if lead is None:
            return
        shard.active[self.uid] = self
        if self.eager_commit:
            shard.set_dirty(self)
        if was < lead.noop_index <= index:
            shard.event("leader", self.uid, self.term)
            if lead.reads:
                shard.reading[self.uid] = self
        if lead.config_index and lead.config_index <= index:
            self._on_config_committed(lead)

    def _on_config_committed(self, lead: Leading) -> None:
        config_index = lead.config_index
        lead.config_index = 0
        membership = self.membership
        for peer in lead.removed:
            self.shard.send(peer, Gone(GONE, self.uid, self.term, config_index))
        lead.removed = []
        self.shard.event("config", self.uid, membership.voters, membership.learners)
        if self.id not in membership.voters:
            self.shard.leave_later(self)

    def leave(self) -> None:
        """The configuration that ends this member's leadership is committed and applied (thesis 4.2.2)."""
        if self.lead is not None and self.id not in self.voters:
            self.step_down()
        if self.id not in self.committed_membership()[1] and self.id not in self.membership:
            self.shard.drop_member(self)

    # ------------------------------------------------------------------ votes

    def on_vote(self, sender: int, m: Vote) -> None:
        """RequestVote and pre-vote, receiver's side (paper 5.4.1; thesis 4.2.3, 9.6)."""
        log = self.log
        if not self.membership.lives:
            return  # nothing is known here yet: an empty log would find every candidate up to date
        up_to_date = (m.last_term, m.last_index) >= max((log.last_term, log.last_index), self.forgotten_end)
        if sender not in self.committed_membership()[1] and sender not in self.membership:
            # Removed, or added by an entry that has not come here yet: Gone tells how far we know, and the sender
            # knows which. (The commit index, not the configuration's: up to there the sender is no member, also if it
            # counts its life from an entry that was never committed.) A new voter's log is ahead of ours, and it must
            # be able to win.
            self.shard.send(sender, Gone(GONE, self.uid, self.term, self.commit))
            if not up_to_date:
                return
        if (not m.transfer or m.pre) and self.hears_leader():
            return
        if m.term < self.term or (m.pre and m.term == self.term):
            self.shard.send_saved(sender, VoteAnswer(VOTE_ANSWER, self.uid, self.term, m.pre, False))
            return
        if m.pre:
            if up_to_date and not self.shard.refuses_votes():
                self.shard.send_saved(sender, VoteAnswer(VOTE_ANSWER, self.uid, m.term, True, True))
            else:
                self.shard.send_saved(sender, VoteAnswer(VOTE_ANSWER, self.uid, self.term, True, False))
            return
        if m.term > self.term:
            self._follow(m.term, 0)
        granted = up_to_date and self.vote in (0, sender) and not self.leader and not self.shard.refuses_votes()
        if granted:
            if self.vote != sender:
                self.vote = sender
                self.shard.save_vote(self)
            self._wait_to_campaign()
        self.shard.send_saved(sender, VoteAnswer(VOTE_ANSWER, self.uid, self.term, False, granted))

    def on_vote_answer(self, sender: int, m: VoteAnswer) -> None:
        """Count it if it answers what is being asked now; a refusal teaches a higher term."""
        if not m.granted and m.term > self.term:
            self._follow(m.term, 0)
            return
        if m.pre:
            if self.role != PRE_CANDIDATE or (m.granted and m.term != self.term + 1):
                return
        elif self.role != CANDIDATE or m.term != self.term:
            return
        self.votes.setdefault(sender, m.granted)
        self._count_votes()

    def on_timeout_now(self, sender: int, m: TimeoutNow) -> None:
        """The leader hands over (thesis 3.10)."""
        if m.term == self.term and sender == self.leader and not self.is_learner:
            self.campaign(pre=False, transfer=True)

    def on_step_down(self, sender: int, m: StepDown) -> None:
        """The leader leads no more."""
        if m.term == self.term and sender == self.leader:
            self.leader_gone()

    def on_gone(self, sender: int, m: Gone) -> None:
        """This member was removed: stop, unless it was added again since."""
        if m.index > self.life or m.term >> EPOCH_SHIFT > self.term >> EPOCH_SHIFT:
            self.shard.drop_member(self)

    # ------------------------------------------------------------------ liveness of a leader

    def confirmed_stamp(self, peer: int, progress: Progress) -> int:
        """The newest moment (own clock) since when ``peer`` is known to have followed this leader in this term."""
        if progress.led:
            link = self.shard.links[peer]
            if link.ok_seq >= progress.led_seq and link.ok_stamp > progress.ack_stamp:
                return link.ok_stamp
        return progress.ack_stamp

    def quorum_stamp(self) -> int:
        """The newest moment at which a quorum of voters, this one included, followed this leader."""
        lead = self.lead
        assert lead is not None
        membership = self.membership
        stamps = []
        for voter in membership.voters:
            if voter == self.id:
                stamps.append(self.shard.stamp)
            else:
                stamps.append(self.confirmed_stamp(voter, lead.progress[voter]))
        stamps.sort(reverse=True)
        return stamps[membership.quorum - 1]

    def live_members(self) -> frozenset[int]:
        """Members heard within an election timeout, this one included. Only on a leader."""
        lead = self.lead
        assert lead is not None
        horizon_us = self.shard.now_us - self.election_timeout_us
        live = {self.id}
        for peer, progress in lead.progress.items():
            if self.confirmed_stamp(peer, progress) > horizon_us:
                live.add(peer)
        return frozenset(live)

    def check_quorum(self) -> bool:
        """Step down if no quorum was heard for an election timeout (thesis 6.2). Returns whether it still leads."""
        lead = self.lead
        if lead is None:
            return False
        heard_us = max(self.quorum_stamp(), lead.elected_us)
        if self.shard.now_us - heard_us > self.election_timeout_us:
            self.step_down()
            return False
        return True

    def on_tick(self) -> bool:
        """As leader of a group with something open, at each beat: returns whether something is still open."""
        if not self.check_quorum():
            return False
        lead = self.lead
        assert lead is not None
        if lead.transfer_target and self.shard.now_us >= lead.transfer_deadline_us:
            lead.transfer_target = 0
            self.shard.event("transfer_failed", self.uid)
            self.shard.set_dirty(self)
        is_open = bool(lead.batch or lead.pending or lead.transfer_target or lead.reads or lead.config_index)
        last_index = self.log.last_index
        for peer, progress in lead.progress.items():
            if progress.match < last_index or not progress.led or progress.known_commit < self.commit:
                is_open = True
                self.shard.want_beat(peer)
            if progress.told_commit < self.commit and progress.state == REPLICATE and progress.next > last_index:
                self._send_probe(peer, progress)
        return is_open

    def on_beat_answered(self, peer: int, beat_stamp: int) -> None:
        """``peer`` answered a beat made at ``beat_stamp``: what was sent before and is not answered is lost."""
        lead = self.lead
        if lead is None:
            return
        progress = lead.progress.get(peer)
        if progress is None or progress.sent_stamp >= beat_stamp:
            return
        if progress.state == SENDING_SNAPSHOT:
            transfer = progress.transfer
            assert transfer is not None
            transfer.sent = transfer.acked
            self._send_chunks(peer, progress)
            return
        if (
            progress.match < self.log.last_index
            or not progress.led
            or progress.paused
            or progress.known_commit < progress.told_commit
        ):
            progress.to_probe()
            self._send_appends(peer, progress, empty=True)

    def not_followed(self, peer: int, term: int) -> None:
        """``peer`` says that it does not follow this leader: leave it out of the digest until it does."""
        lead = self.lead
        if lead is None:
            return
        if term > self.term:
            self.step_down()
            self._follow(term, 0)
            return
        progress = lead.progress.get(peer)
        if progress is not None and progress.led:
            progress.led = False
            self.shard.links[peer].unlead(self, self.term)
            if progress.state != SENDING_SNAPSHOT:
                progress.to_probe()
                self._send_appends(peer, progress, empty=True)
            self.shard.active[self.uid] = self

    # ------------------------------------------------------------------ membership and transfer

    def _check_change(self) -> Leading:
        lead = self.lead
        if lead is None:
            raise ConfigChangeRefused("this member does not lead")
        if self.commit < lead.noop_index:
            raise ConfigChangeRefused("no entry of this leader's term is committed yet")
        if lead.config_index:
            raise ConfigChangeRefused("another change of membership is under way")
        if lead.transfer_target:
            raise ConfigChangeRefused("the leadership is being handed over")
        return lead

    def change_membership(self, membership: Membership) -> None:
        """Append a configuration that differs by one member (thesis 4.1; DESIGN 5.3).

        Raises:
            ConfigChangeRefused: not the leader, not established, another change is under way, or fewer live voters
                than a quorum would be left.
        """
        lead = self._check_change()
        now, new = set(self.membership.voters), set(membership.voters)
        assert len(now ^ new) <= 1, "one voter at a time"
        if not new:
            raise ConfigChangeRefused("the last voter cannot be removed")
        if now != new:
            live = self.live_members() & new
            if len(live) < membership.quorum:
                raise ConfigChangeRefused(f"only {len(live)} of the {len(new)} voters that this change leaves are live")
        lead.config_index = self._append(CONFIG, membership.pack())
        self._sync_progress()
        self.shard.set_dirty(self)

    def add_learner(self, instance: int) -> None:
        """Add a learner."""
        if instance in self.membership:
            raise ConfigChangeRefused(f"{instance} is a member already")
        self.change_membership(self.membership.with_learner(instance))

    def promote(self, instance: int) -> None:
        """Make a caught-up learner a voter."""
        lead = self._check_change()
        if instance not in self.membership.learners:
            raise ConfigChangeRefused(f"{instance} is not a learner")
        progress = lead.progress.get(instance)
        if progress is None or progress.state != REPLICATE or progress.match + CAUGHT_UP_ENTRIES < self.commit:
            raise ConfigChangeRefused(f"learner {instance} has not caught up")
        self.change_membership(self.membership.with_promoted(instance))

    def demote(self, instance: int) -> None:
        """Make a voter a learner."""
        self._check_change()
        if instance not in self.membership.voters:
            raise ConfigChangeRefused(f"{instance} is not a voter")
        self.change_membership(self.membership.demoted(instance))

    def remove(self, instance: int) -> None:
        """Remove a voter or learner."""
        self._check_change()
        if instance not in self.membership:
            raise ConfigChangeRefused(f"{instance} is not a member")
        self.change_membership(self.membership.without(instance))

    def transfer(self, target: int) -> None:
        """Hand the leadership over (thesis 3.10). New commands wait until it is done or the deadline has passed."""
        lead = self._check_change()
        if target == self.id:
            return
        progress = lead.progress.get(target)
        if target not in self.membership.voters or progress is None:
            raise ConfigChangeRefused(f"{target} is not a voter")
        if target not in self.live_members() or progress.state != REPLICATE:
            raise ConfigChangeRefused(f"{target} is not caught up, or not heard")
        lead.transfer_target = target
        lead.transfer_deadline_us = self.shard.now_us + self.election_timeout_us
        lead.lease_void = True  # for the rest of the term: a late TimeoutNow may come to effect at any time
        self.shard.active[self.uid] = self
        if progress.match == self.log.last_index:
            self.shard.send(target, TimeoutNow(TIMEOUT_NOW, self.uid, self.term))

    # ------------------------------------------------------------------ reads

    def read(self, arg: bytes, token: object) -> None:
        """A linearizable query: answered when a quorum has confirmed a message sent after now (thesis 6.4)."""
        lead = self.lead
        shard = self.shard
        if lead is None:
            shard.reply(token, NOT_LEADER, (self.leader, self.term))
            return
        lead.reads.append((shard.stamp, max(self.commit, lead.noop_index), token, arg))
        shard.reading[self.uid] = self

    def lease_until_us(self) -> int:
        """End of the lease by this clock, 0 where there is none (DESIGN 5.10)."""
        lead = self.lead
        margin = self.config.clock_drift_margin
        if lead is None or margin is None or lead.lease_void or self.commit < lead.noop_index:
            return 0
        return self.quorum_stamp() + int(self.election_timeout_us * (1.0 - margin))

    def ask_for_confirmation(self) -> None:
        """Reads wait: make sure that a message sent from now on will be answered by every voter."""
        lead = self.lead
        if lead is None or not lead.reads:
            return
        newest = lead.reads[-1][0]
        for voter in self.membership.voters:
            if voter == self.id:
                continue
            progress = lead.progress[voter]
            if progress.sent_stamp >= newest and progress.state != SENDING_SNAPSHOT:
                continue
            link = self.shard.links[voter]
            if progress.led and not link.mismatch_count:
                # One beat after the newest read is enough: asking again in each turn, on a slow link, makes every
                # answer breed new beats. A lost one is made good by the periodic beat.
                if link.beat_stamp < newest or link.seq < progress.led_seq:
                    self.shard.want_beat(voter)
            elif progress.state != SENDING_SNAPSHOT:
                self._send_probe(voter, progress)

    def answer_reads(self) -> bool:
        """Answer the reads that are confirmed and applied; returns whether some still wait."""
        lead = self.lead
        if lead is None:
            return False
        reads = lead.reads
        if self.commit < lead.noop_index:
            return bool(reads)
        confirmed = self.quorum_stamp()
        lease_until_us = self.lease_until_us()
        done = 0
        for stamp, read_index, token, arg in reads:
            if self.applied < read_index:
                break
            if stamp <= confirmed:
                self.shard.reply(token, *self.evaluate(arg, hooked=True))
            elif lease_until_us > self.shard.now_us:
                # Only an offer: the caller reads the clock again before it hands the answer out.
                code, body = self.evaluate(arg, hooked=True)
                self.shard.offer_lease_answer(self, lease_until_us, token, arg, code, body)
            else:
                break
            done += 1
        if done:
            del reads[:done]
        return bool(reads)

    def evaluate(self, arg: bytes, *, hooked: bool = False) -> tuple[int, Any]:
        """Run the user's query on the present state."""
        try:
            value = msgpack.unpackb(arg, raw=False, strict_map_key=False)
            with self.shard.user_code(self):
                result = self.machine.query(self.state, value)
            packed = msgpack.packb(result, use_bin_type=True)
        except Exception as error:
            return QUERY_FAILED, describe(error)
        if hooked and self.hook is not None:
            self._call_hook("on_query_answered", self.state, value, result)
        return OK, packed

    # ------------------------------------------------------------------ apply

    def apply_committed(self) -> None:
        """Apply what is committed, in order; as leader, answer."""
        log = self.log
        lead = self.lead
        while self.applied < self.commit:
            index = self.applied + 1
            entry = log.entry(index)
            if entry.kind == COMMANDS:
                tokens = lead.pending.pop(index, None) if lead is not None else None
                self._apply_batch(index, entry, tokens)
            elif entry.kind == CONFIG:
                self._apply_config(index)
            self.applied = index
        kept = self.config.log_entries_kept
        if self.applied - log.snapshot_index >= 2 * kept:
            log.compact_to(self.applied - kept)
        elif log.size_bytes > LOG_BYTES_KEPT_MAX:
            log.compact_to(self.applied)

    def _apply_config(self, index: int) -> None:
        if self.hook is None or self.lead is None:
            return
        before: Membership | None = None
        for at, membership in self.memberships:
            if at == index and before is not None:
                for instance in membership.lives.keys() - before.lives.keys():
                    self._call_hook("on_member_added", self.shard.node_of(instance))
                for instance in before.lives.keys() - membership.lives.keys():
                    self._call_hook("on_member_removed", self.shard.node_of(instance))
            before = membership

    def _apply_batch(self, index: int, entry: Entry, tokens: list[object] | None) -> None:
        time_us, commands = session_rules.unpack_batch(entry.data)
        if time_us > self.last_time_us:
            self.last_time_us = time_us
        table = self.session_table
        table.expire(time_us)
        context = self.machine.context
        context.uid = self.uid
        context.index = index
        context.term = entry.term
        context.time_us = time_us
        shard = self.shard
        with shard.user_code(self):
            for position, command in enumerate(commands):
                context.position = position
                outcome = self._apply_command(table, command, time_us, tokens is not None)
                if tokens is not None:
                    code, body = outcome
                    shard.reply(tokens[position], code, body if code == OK else failure_body(code, body))
        shard.on_applied(self, index, time_us, commands)

    def _apply_command(self, table: Sessions, command: bytes, time_us: int, leading: bool) -> tuple[int, Any]:
        try:
            client_id, seq, acked, issued_us, arg = session_rules.parse_command(command)
        except ValueError as error:
            return BAD_REQUEST, str(error)
        admitted = table.admit(client_id, seq, acked, issued_us, time_us)
        if type(admitted) is not Session:
            return admitted  # type: ignore[return-value]
        before = self.state
        try:
            value = msgpack.unpackb(arg, raw=False, strict_map_key=False)
            result, after = self.machine.command(before, value)
            packed = msgpack.packb(result, use_bin_type=True)
        except Exception as error:
            outcome = (COMMAND_FAILED, msgpack.packb(describe(error)))
        else:
            self.state = after
            outcome = (OK, packed)
            if leading and self.hook is not None:
                self._call_hook("on_command_committed", before, value, result, after)
        admitted.results[seq] = outcome
        return outcome

    def _call_hook(self, method: str, *args: Any) -> None:
        """Run a hook; what it raises is told and counted, and stops nothing."""
        try:
            with self.shard.user_code(self):
                getattr(self.hook, method)(self.name, *args)
        except Exception as error:
            self.shard.event("hook_failed", self.uid, method, ": ".join(describe(error)))

    def on_established(self) -> None:
        """Called by the shard when this leader's own term is committed and applied."""
        if self.hook is not None:
            self._call_hook("on_elected")

    # ------------------------------------------------------------------ snapshots

    def make_snapshot(self) -> tuple[int, int, bytes]:
        """``(index, term, bytes)`` of everything applied here.

        The bytes are msgpack ``[format = 1, membership index, membership, last time, sessions, machine version,
        state]``.
        """
        index = self.applied
        at, membership = self.memberships[0]
        for row in self.memberships:
            if row[0] <= index:
                at, membership = row
        with self.shard.user_code(self):
            state = self.machine.dump(self.state)
        parts = [1, at, membership.pack(), self.last_time_us, self.session_table.dump(), self.machine.version, state]
        return index, self.log.term_at(index), bytes(msgpack.packb(parts, use_bin_type=True))

    def _start_snapshot(self, peer: int, progress: Progress) -> None:
        lead = self.lead
        assert lead is not None
        shared = lead.snapshot
        if shared is None or shared.index < self.log.snapshot_index:
            try:
                index, term, data = self.make_snapshot()
            except Exception as error:
                self.shard.event("snapshot_failed", self.uid, ": ".join(describe(error)))
                progress.paused = True
                progress.sent_stamp = self.shard.stamp
                return
            shared = lead.snapshot = Transfer(index, term, data)
        progress.to_snapshot(Transfer(shared.index, shared.term, shared.data))
        self._send_chunks(peer, progress)

    def _send_chunks(self, peer: int, progress: Progress) -> None:
        transfer = progress.transfer
        assert transfer is not None
        stamp = self.shard.stamp
        total = len(transfer.data)
        while transfer.sent < total and transfer.sent - transfer.acked < CHUNKS_IN_FLIGHT_MAX * CHUNK_BYTES:
            data = transfer.data[transfer.sent : transfer.sent + CHUNK_BYTES]
            self.shard.send(
                peer,
                Snapshot(
                    SNAPSHOT,
                    self.uid,
                    self.term,
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

    def on_snapshot(self, sender: int, m: Snapshot) -> None:
        """A chunk. The snapshot counts only if it is ahead of what is committed here (DESIGN 5.4)."""
        if m.term < self.term:
            self.shard.send_saved(
                sender, AppendAnswer(APPEND_ANSWER, self.uid, self.term, False, m.index, 0, 0, m.stamp, m.life)
            )
            return
        if not self._is_present_life(m.life, m.term):
            return
        if self.lead is not None and m.term == self.term:
            self.shard.violation(self, f"two leaders in term {m.term}: {sender} and {self.id}")
            return
        if self.leader != sender or m.term != self.term:
            self._follow(m.term, sender)
        else:
            self.heard_us = self.shard.now_us
            self.timer_us = 0
        if m.index <= self.commit:
            self.incoming = None
            self._answer_snapshot(sender, m, m.total, True)
            return
        incoming = self.incoming
        if incoming is None or incoming[:3] != (m.index, m.index_term, m.total):
            incoming = self.incoming = (m.index, m.index_term, m.total, bytearray())
        received = incoming[3]
        if m.offset == len(received) and m.offset + len(m.data) <= m.total:
            received += m.data
        done = len(received) == m.total
        if done:
            self.incoming = None
            if not self._install_snapshot(m.index, m.index_term, bytes(received)):
                return
        self._answer_snapshot(sender, m, len(received), done)

    def _answer_snapshot(self, sender: int, m: Snapshot, next_offset: int, done: bool) -> None:
        self.shard.send_saved(
            sender,
            SnapshotAnswer(
                SNAPSHOT_ANSWER, self.uid, self.term, m.index, m.index_term, next_offset, done, m.stamp, m.life
            ),
        )

    def _install_snapshot(self, index: int, term: int, data: bytes) -> bool:
        """Take over state, sessions and membership; returns False (and says so) if the bytes are of no use."""
        try:
            form, at, membership_data, time_us, session_rows, version, state_data = msgpack.unpackb(
                data, raw=False, strict_map_key=False
            )
            if form != 1:
                raise ValueError(f"snapshot format {form} is not known here")
            membership = Membership.unpack(membership_data, at)
            with self.shard.user_code(self):
                state = self.machine.load(state_data)
                if version != self.machine.version:
                    state = self.machine.upgrade(state, version)
            table = Sessions(self.session_table.ttl_us, self.session_table.count_max)
            table.load(session_rows)
        except Exception as error:
            self.shard.event("snapshot_failed", self.uid, ": ".join(describe(error)))
            return False
        log = self.log
        if log.term_at(index) == term:
            log.compact_to(index)  # the rest of the log agrees up to here and stays
            later = [row for row in self.memberships if row[0] > index]
        else:
            log.reset_to(index, term)
            later = []
        self.memberships = [(at, membership), *later]
        self.state = state
        self.session_table = table
        self.last_time_us = max(time_us, self.last_time_us)
        self.commit = self.applied = index
        self.shard.save_snapshot(self, data)
        if self.hook is not None:
            self._call_hook("on_restored", state)
        self.shard.on_restored(self)
        return True

    def on_snapshot_answer(self, sender: int, m: SnapshotAnswer) -> None:
        """Progress of a transfer."""
        if m.term > self.term:
            self._follow(m.term, 0)
            return
        lead = self.lead
        if lead is None or m.term < self.term:
            return
        progress = lead.progress.get(sender)
        if progress is None or m.life != progress.life:
            return
        if m.stamp > progress.ack_stamp:
            progress.ack_stamp = m.stamp
        if not progress.led:
            progress.led = True
            progress.led_seq = self.shard.link(sender).lead(self)
        transfer = progress.transfer
        if m.done:
            if transfer is not None and transfer.index == m.index:
                progress.to_replicate()
            self._on_accepted(sender, lead, progress, m.index, m.stamp)
            if not any(p.state == SENDING_SNAPSHOT for p in lead.progress.values()):
                lead.snapshot = None
            self.shard.active[self.uid] = self
            self.shard.set_dirty(self)
        elif transfer is not None and (transfer.index, transfer.term) == (m.index, m.index_term):
            if m.next_offset > transfer.acked:
                transfer.acked = min(m.next_offset, len(transfer.data))
                transfer.sent = max(transfer.sent, transfer.acked)
            elif m.next_offset == 0:
                transfer.acked = transfer.sent = 0  # the receiver lost what it had: from the beginning
            self._send_chunks(sender, progress)

    # ------------------------------------------------------------------ repair of a lost majority

    def lost_majority(self) -> set[int] | None:
        """The dead voters, if so many are gone for good that the rest can never be a quorum; else None."""
        membership = self.membership
        gone = self.shard.gone_for(self)
        dead = {voter for voter in membership.voters if voter in gone}
        if dead and len(membership.voters) - len(dead) < membership.quorum:
            return dead
        return None

    def _try_recovery(self) -> bool:
        """Majority lost and declared so: the survivor with the smallest instance asks all others what they have.

        Nothing is taken from a group with a living quorum, and nothing happens until every survivor has answered, so
        the most complete log is found (DESIGN 5.15).
        """
        dead = self.lost_majority()
        if dead is None:
            return False
        if self.config.on_majority_loss == "new":
            self.shard.event("majority_lost", self.uid, sorted(dead))
            return True
        survivors = [voter for voter in self.membership.voters if voter not in dead]
        if not survivors:
            # Only learners are left: the one with the smallest instance goes on alone with what it has.
            survivors = [peer for peer in self.membership.learners if peer not in self.shard.gone_for(self)]
        if self.id not in survivors or self.id != min(survivors):
            return True
        self.recovery = {self.id: (self.log.last_term, self.log.last_index, self.term)}
        for peer in survivors:
            if peer != self.id:
                self.shard.send_saved(peer, RecoverQuery(RECOVER_QUERY, self.uid, self.term, sorted(dead)))
        self._finish_recovery(survivors, dead)
        return True

    def on_recover_query(self, sender: int, m: RecoverQuery) -> None:
        """Answer only without a leader, and only if the dead are known to be dead here too."""
        if self.hears_leader() or self.id in m.dead:
            return
        gone = self.shard.gone_for(self)
        if any(instance not in gone for instance in m.dead):
            return
        self.shard.send_saved(
            sender, RecoverAnswer(RECOVER_ANSWER, self.uid, self.term, self.log.last_index, self.log.last_term)
        )

    def on_recover_answer(self, sender: int, m: RecoverAnswer) -> None:
        """One survivor's word."""
        dead = self.lost_majority()
        if self.recovery is None or dead is None or self.leader:
            return
        survivors = [voter for voter in self.membership.voters if voter not in dead]
        if not survivors:
            survivors = [peer for peer in self.membership.learners if peer not in self.shard.gone_for(self)]
        if sender in survivors:
            self.recovery[sender] = (m.last_term, m.last_index, m.term)
            self._finish_recovery(survivors, dead)

    def _finish_recovery(self, survivors: list[int], dead: set[int]) -> None:
        recovery = self.recovery
        if recovery is None or any(peer not in recovery for peer in survivors):
            return
        best = max(survivors, key=lambda peer: (recovery[peer][:2], -peer))
        epoch = (max(row[2] for row in recovery.values()) >> EPOCH_SHIFT) + 1
        self.recovery = None
        message = ForceConfig(FORCE_CONFIG, self.uid, epoch << EPOCH_SHIFT, sorted(survivors), sorted(dead))
        if best == self.id:
            self.on_force_config(self.id, message)
        else:
            self.shard.send_saved(best, message)

    def on_force_config(self, sender: int, m: ForceConfig) -> None:
        """Go on with the survivors, in a new epoch, and leave a record of it in the log."""
        gone = self.shard.gone_for(self)
        if m.term >> EPOCH_SHIFT <= self.term >> EPOCH_SHIFT or self.id not in m.voters or self.hears_leader():
            return
        if any(instance not in gone for instance in m.dead):
            return
        self._follow(m.term, 0)
        self.vote = self.id
        self.shard.save_vote(self)
        lives = {i: life for i, life in self.membership.lives.items() if i in m.voters or i not in gone}
        audit = {
            "what": "majority lost; went on with the survivors",
            "dead": list(m.dead),
            "voters": list(m.voters),
            "voters_before": list(self.membership.voters),
            "wall_us": self.shard.wall_us,
            "by": sender,
        }
        learners = tuple(i for i in lives if i not in m.voters)
        forced = Membership(tuple(sorted(m.voters)), learners, lives, audit)
        index = self.log.append(Entry(self.term, CONFIG, forced.pack()))
        self.shard.save_entries(self, index)
        self._take_membership(index, self.log.entry(index).data)
        self.shard.event("recovered", self.uid, audit)
        self.role = CANDIDATE
        self.votes = {self.id: True}
        self._wait_to_campaign(self.election_timeout_us // 2)
        if forced.quorum == 1:
            self._count_votes()
            return
        message = Vote(VOTE, self.uid, self.term, False, self.log.last_index, self.log.last_term, False)
        for peer in forced.voters:
            if peer != self.id:
                self.shard.send_saved(peer, message)

    # ------------------------------------------------------------------ proof

    def check_invariants(self) -> None:
        """Raise AssertionError if this member's own parts contradict each other."""
        log = self.log
        assert log.snapshot_index <= self.applied <= self.commit <= log.last_index, (
            log.snapshot_index,
            self.applied,
            self.commit,
            log.last_index,
        )
        assert len(log.entries) == log.last_index - log.snapshot_index
        assert log.last_term <= self.term
        assert (self.lead is not None) == (self.role == LEADER)
        indexes = [index for index, _ in self.memberships]
        assert indexes == sorted(indexes)
        assert indexes[-1] <= log.last_index
        lead = self.lead
        if lead is None:
            if self.leader:
                assert self.leader != self.id
                assert self.uid in self.shard.links[self.leader].followed
            return
        assert self.leader == self.id
        assert lead.noop_index <= log.last_index
        assert lead.progress.keys() == self.membership.lives.keys() - {self.id}
        for peer, progress in lead.progress.items():
            assert 0 <= progress.match < progress.next <= log.last_index + 1, (peer, progress.match, progress.next)
            assert progress.led == (self.uid in self.shard.links[peer].led)
        for index in lead.pending:
            assert self.applied < index <= log.last_index

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

Here are only a member's parts, the facts that follow from them and what must always hold. What it does is in modules of
functions that take the member; the table in the class names them all. They stand on one another in that order, from
``roles`` up to ``leaderless``, and none imports one that comes later::

    roles         term and role           change       one member at a time
    own_log       entries, commit index   replication  the leader's appends and what comes back
    restoring     a state that comes first
    apply         user code, hooks        reads        ReadIndex, lease
    divergence    do replicas differ?     election     campaign, votes, handing over
    liveness      who follows since when  repair       a majority lost for good
    snapshots     make, send, install
                                          leaderless   the timer, the loss of a leader

Functions, not a line of base classes as in the host: each part hands the member itself to the shard and to links, and a
base class is not yet a Member. An entry of the table is the function, so that a call costs what a method's does.

Two rules that are easily broken by a change:

* A promise (lease, ReadIndex, check-quorum) counts from the *stamp* of the message that was answered, never from the
  answer's arrival; and only voters of the newest configuration count (:mod:`raftfleet.core.liveness`).
* ``match`` moves only by an answer that carries this term, this life of the answerer, and what the append itself
  covered (:mod:`raftfleet.core.replication`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raftfleet.core import (
    apply,
    change,
    divergence,
    election,
    leaderless,
    liveness,
    own_log,
    reads,
    repair,
    replication,
    restoring,
    roles,
    snapshots,
    versions,
)
from raftfleet.core.log import Log
from raftfleet.core.names import FLEET_UID
from raftfleet.core.roles import EPOCH_SHIFT, FOLLOWER, LEADER, NEVER_US
from raftfleet.core.sessions import Sessions

if TYPE_CHECKING:
    from raftfleet.core.config import GroupConfig
    from raftfleet.core.divergence import Audit
    from raftfleet.core.incoming import Incoming
    from raftfleet.core.leading import Leading
    from raftfleet.core.membership import Membership
    from raftfleet.core.repair import Losses
    from raftfleet.core.shard import Shard


class Member:
    """One member. Owned by a :class:`~raftfleet.core.shard.Shard`, which calls everything here."""

    __slots__ = (
        "active_version",
        "applied",
        "audit",
        "checked_index",
        "commit",
        "config",
        "dump_known",
        "eager_commit",
        "election_timeout_us",
        "forgotten_end",
        "heard_us",
        "hook",
        "id",
        "incoming",
        "is_quarantined",
        "last_leader",
        "last_time_us",
        "lead",
        "leader",
        "life",
        "life_term",
        "log",
        "losses",
        "machine",
        "memberships",
        "name",
        "recovery",
        "restoring",
        "role",
        "session_table",
        "shard",
        "state",
        "takes_over_until_us",
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
        self.election_timeout_us = config.election_timeout_us
        self.role = FOLLOWER
        self.term = 0
        self.vote = 0
        self.leader = 0
        self.last_leader = 0  # whoever is followed no more; the only one to ask where no voter is known
        self.log = Log()
        self.commit = 0
        self.applied = 0
        self.checked_index = 0  # of the newest CHECK entry applied, or appended here as leader
        self.audit: Audit | None = None
        self.is_quarantined = False  # its state differs from what a quorum agrees on
        self.last_time_us = 0  # of the newest entry applied or appended here as leader
        self.memberships: list[tuple[int, Membership]] = [shard.first_membership(membership)]
        self.heard_us = NEVER_US  # when a leader was last heard about this very group; outlives following it
        self.timer_us = 0
        self.votes: dict[int, bool] | None = None  # since the last campaign, until it is over
        self.takes_over_until_us = 0  # asks the voters whether it can, since its leader hands over
        self.lead: Leading | None = None
        self.incoming: Incoming | None = None  # a leader's snapshot, as far as it has come
        self.dump_known = (0, 0)  # size of the state when it was last dumped or loaded, and log.total_bytes then
        self.losses: Losses | None = None  # what peers' disks lost, as told since there is no leader
        self.recovery: dict[int, tuple[int, int, int]] | None = None  # survivor -> (last term, last index, term)
        self.session_table = Sessions(config.session_ttl_us, config.session_count_max)
        self.active_version = config.machine_version or 1
        self.restoring = restoring.begin(config)
        machine.context.version = self.active_version
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

    @property
    def is_readable(self) -> bool:
        """Whether a stale read may be answered here."""
        return self.applied > 0 and not self.is_quarantined

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
        return self.lead is not None or self.shard.now_us - self.heard_leader_us() < self.election_timeout_us

    def heard_leader_us(self) -> int:
        """When a leader was last heard, about this group or by the link it is followed on."""
        heard_us = self.heard_us
        if self.leader:
            link = self.shard.links.get(self.leader)
            if link is not None and link.heard_us > heard_us and self.uid in link.followed:
                heard_us = link.heard_us
        return heard_us

    @property
    def may_campaign(self) -> bool:
        """Whether this member is a voter, or was one before a removal that is not committed.

        The latter may hold the longest log of all: without its candidature a group whose leader was removing itself
        when it fell could have no leader ever again (thesis 4.2.2).

        No vote goes to a log that ends before ``forgotten_end``, this member's for itself neither: while its leader
        sends it the log of its former life again, configurations of old are in force, and one may have it as the only
        voter (DESIGN 5.7).

        Nor does one campaign in an epoch of which it has no entry: who began it forced a configuration that is not
        known here. Members that were given up, and live, would elect each other by the one of old, and depose those
        that went on without them (DESIGN 5.15).
        """
        if self.term >> EPOCH_SHIFT > self.log.last_term >> EPOCH_SHIFT:
            return False
        if (self.log.last_term, self.log.last_index) < self.forgotten_end:
            return False
        return self.id in self.membership.voters or self.id in self.committed_membership()[1].voters

    # ------------------------------------------------------------------ what it does, and where

    # roles: term and role
    wait_to_campaign = roles.wait_to_campaign
    step_down = roles.step_down

    # own_log: the log, as the leader wants it
    on_append = own_log.on_append

    # apply: the users' code, on what is committed
    apply_committed = apply.apply_committed
    on_established = apply.on_established

    # divergence: do replicas differ?
    on_digest = divergence.on_digest

    # liveness: who follows this leader, and since when
    confirmed_stamp = liveness.confirmed_stamp
    quorum_stamp = liveness.quorum_stamp
    live_members = liveness.live_members
    check_quorum = liveness.check_quorum

    # snapshots: the state as bytes, and back
    make_snapshot = snapshots.make_snapshot
    on_snapshot = snapshots.on_snapshot

    # change: who belongs to the group
    change_membership = change.change_membership
    add_learner = change.add_learner
    promote = change.promote
    raise_version = versions.raise_version
    demote = change.demote
    remove = change.remove
    leave = change.leave
    on_gone = change.on_gone

    # replication: the log to all others, as leader
    propose = replication.propose
    propose_piece = restoring.propose_piece
    flush = replication.flush
    on_append_answer = replication.on_append_answer
    on_snapshot_answer = replication.on_snapshot_answer
    on_tick = replication.on_tick
    on_beat_answered = replication.on_beat_answered
    not_followed = replication.not_followed

    # reads: queries, as leader
    read = reads.read
    lease_until_us = reads.lease_until_us
    ask_for_confirmation = reads.ask_for_confirmation
    answer_reads = reads.answer_reads
    evaluate = reads.evaluate

    # election: coming to lead, handing over
    campaign = election.campaign
    on_vote = election.on_vote
    on_vote_answer = election.on_vote_answer
    count_votes = election.count_votes
    transfer = election.transfer
    on_timeout_now = election.on_timeout_now

    # repair: a majority that is lost for good
    on_lost = repair.on_lost
    on_loss_query = repair.on_loss_query
    lost_majority = repair.lost_majority
    on_recover_query = repair.on_recover_query
    on_recover_answer = repair.on_recover_answer
    on_force_config = repair.on_force_config

    # leaderless: without a leader
    leader_silent = leaderless.leader_silent
    leader_gone = leaderless.leader_gone
    on_step_down = leaderless.on_step_down
    not_on_leaders_list = leaderless.not_on_leaders_list
    timer_due = leaderless.timer_due

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

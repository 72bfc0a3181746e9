"""Mutants of the consensus core: every rule of DESIGN 5, 6 and 11 that a shard in memory obeys, broken.

Each row: a name, the rule, what is broken in words, the profile of faults under which it shows soonest, and the change
of source (:mod:`raftfleet.testing.mutation`). ``python -m raftfleet.testing.mutants`` plays them.
"""

from __future__ import annotations

from raftfleet.testing.mutants_table import Mutant, mutant

_SMALL_APPENDS = ("core.replication:_send_appends", "if size_bytes > APPEND_BYTES_MAX and count:", "if count:")
"""Not wrong, only awkward: one entry in each append, as if they were large."""

LOG = (
    mutant(
        "append-cuts-beyond-conflict",
        "5.1",
        "every append cuts the log behind it, also a late one",
        (
            "core.own_log:on_append",
            "    if entries and not",
            "    if max(member.commit, log.snapshot_index) <= end < log.last_index:\n"
            "        log.truncate_from(end + 1)\n"
            "        forget_memberships(member, end + 1)\n"
            "    if entries and not",
        ),
        profile="unordered",
    ),
    mutant(
        "append-acknowledges-last-index",
        "5.1",
        "a follower acknowledges its own last index",
        (
            "core.own_log:on_append",
            "        return\n    _answer_append(member, sender, m, True, end, 0, 0)",
            "        return\n    _answer_append(member, sender, m, True, log.last_index, 0, 0)",
        ),
        _SMALL_APPENDS,
        profile="quarrels",
    ),
    mutant(
        "append-commits-beyond-its-end",
        "5.1",
        "a follower commits what the append did not cover",
        ("core.own_log:on_append", "commit = min(m.commit, end)", "commit = min(m.commit, log.last_index)"),
        _SMALL_APPENDS,
        profile="quarrels",
    ),
    mutant(
        "commit-of-an-older-term",
        "paper 5.4.2",
        "a leader commits an older term's entry by counting",
        ("core.replication:advance_commit", " and member.log.term_at(index) == member.term", ""),
        _SMALL_APPENDS,
        profile="quarrels",
    ),
    mutant(
        "answer-of-an-older-term-counts",
        "5.6",
        "an acknowledgement of an older term counts in this one",
        ("core.replication:_answerer", "lead is None or m.term < member.term or", "lead is None or"),
        profile="quarrels",
    ),
    mutant(
        "learners-count",
        "5.13",
        "learners count towards a commit",
        (
            "core.replication:advance_commit",
            "for voter in membership.voters\n    ]",
            "for voter in membership.lives\n    ]",
        ),
        profile="changes",
    ),
    mutant(
        "half-is-a-quorum",
        "5.13",
        "half of an even number of voters is taken for a quorum",
        ("core.membership:Membership.__init__", "len(voters) // 2 + 1", "(len(voters) + 1) // 2"),
        profile="changes",
    ),
    mutant(
        "old-configuration-decides",
        "5.13",
        "a leader commits by the last committed configuration instead of the newest",
        (
            "core.replication:advance_commit",
            "membership = member.membership\n",
            "membership = member.committed_membership()[1]\n",
        ),
        (
            "core.replication:advance_commit",
            "progress[voter].match for voter",
            "(progress[voter].match if voter in progress else 0) for voter",
        ),
        profile="changes",
    ),
)

READS = (
    mutant(
        "read-before-own-term",
        "5.2",
        "a new leader answers reads before an entry of its term is committed",
        ("core.reads:read", "max(member.commit, lead.noop_index)", "member.commit"),
        ("core.reads:answer_reads", "if member.commit < lead.noop_index or member.is_quarantined:", "if False:"),
        profile="unordered reads",
    ),
    mutant(
        "read-without-a-round",
        "5.2",
        "a leader answers reads without asking anybody",
        ("core.liveness:quorum_stamp", "return stamps[membership.quorum - 1]", "return member.shard.stamp"),
        profile="reads",
    ),
    mutant(
        "read-trusts-an-older-round",
        "5.2",
        "answers to messages sent up to two election timeouts before the read confirm it",
        (
            "core.reads:answer_reads",
            "if stamp <= confirmed:",
            "if stamp - 2 * member.election_timeout_us <= confirmed:",
        ),
        profile="reads",
    ),
    mutant(
        "read-before-applied",
        "5.2",
        "reads are answered before what is committed is applied",
        ("core.reads:answer_reads", "        if member.applied < read_index:\n            break\n", ""),
        (
            "core.shard:Shard.apply",
            "    if self._applying:\n        applying",
            "    for member in list(self.reading.values()):\n"
            "        member.answer_reads()\n"
            "    if self._applying:\n        applying",
        ),
        profile="unordered reads",
    ),
    mutant(
        "lease-without-margin",
        "5.10",
        "the lease is as long as the followers' refusal, by a clock that may be slow",
        ("core.reads:lease_until_us", "(1.0 - margin)", "1.0"),
        profile="leases",
    ),
    mutant(
        "lease-nobody-promised",
        "5.10",
        "groups that are told nothing about clocks read under a lease too",
        ("core.reads:lease_until_us", "margin is None or ", ""),
        ("core.reads:lease_until_us", "margin = member.config.clock_drift_margin", "margin = 0.1"),
        profile="wild clocks",
    ),
    mutant(
        "lease-lives-through-transfer",
        "5.10",
        "the lease holds on while the leadership is handed over",
        ("core.reads:lease_until_us", " or lead.lease_void", ""),
        profile="transfers",
    ),
    mutant(
        "lease-clock-read-once",
        "5.10",
        "an answer under the lease is handed out without reading the clock again",
        ("core.shard:Shard.settle", "if now_us < until_us and member.lease_until_us() >= until_us:", "if True:"),
        profile="stopped",
    ),
)

CHANGES = (
    mutant(
        "two-changes-at-once",
        "5.3",
        "a change of membership begins while another is under way",
        (
            "core.change:check_change",
            "    if lead.config_index:\n",
            "    if False:\n",
        ),
        profile="changes",
    ),
    mutant(
        "change-before-own-term",
        "5.3",
        "a new leader changes the membership before an entry of its term is committed",
        (
            "core.change:check_change",
            "    if member.commit < lead.noop_index:\n",
            "    if False:\n",
        ),
        profile="changes",
    ),
    mutant(
        "newcomer-votes-at-once",
        "5.3",
        "a new member comes in as a voter",
        ("core.change:add_learner", "with_learner(instance)", "with_learner(instance).with_promoted(instance)"),
        profile="changes",
    ),
    mutant(
        "promoted-before-caught-up",
        "5.3",
        "a learner is promoted whatever it has",
        (
            "core.change:promote",
            "if progress is None or progress.state != REPLICATE or progress.match + CAUGHT_UP_ENTRIES < member.commit:",
            "if progress is None:",
        ),
        profile="changes",
    ),
    mutant(
        "change-leaves-no-live-quorum",
        "5.3",
        "a voter is removed though the live ones left are no quorum; the operator may remove the living first",
        ("core.change:change_membership", "if len(live) < membership.quorum:", "if False:"),
        ("core.change:remove", "instance not in member.membership", "not member.membership.lives"),
        (
            "core.change:remove",
            "    member.change_membership(",
            "    voters = [v for v in member.voters if v != member.id and v in member.live_members()]\n"
            "    instance = voters[0] if voters else instance\n"
            "    if instance not in member.membership:\n"
            "        return\n"
            "    member.change_membership(",
        ),
        profile="changes",
    ),
)

SNAPSHOTS = (
    mutant(
        "snapshot-behind-commit-installed",
        "5.4",
        "a snapshot that is behind what is committed here is installed",
        ("core.snapshots:on_snapshot", "if m.index <= member.commit:", "if False:"),
        profile="snapshots",
    ),
    mutant(
        "snapshot-of-an-older-term-installed",
        "5.4",
        "a snapshot of an older term's leader is taken",
        ("core.snapshots:on_snapshot", "if m.term < member.term:", "if False:"),
        ("core.snapshots:on_snapshot", "member.lead is not None and m.term == member.term", "member.lead is not None"),
        (
            "core.snapshots:on_snapshot",
            "if member.leader != sender or m.term != member.term:\n        roles.follow(member, m.term, sender)",
            "if m.term < member.term:\n        pass\n"
            "    elif member.leader != sender or m.term != member.term:\n        roles.follow(member, m.term, sender)",
        ),
        profile="snapshots",
    ),
    mutant(
        "snapshot-without-sessions",
        "5.4",
        "clients' sessions do not travel in a snapshot",
        ("core.snapshots:make_snapshot", "member.session_table.dump()", "[]"),
        profile="snapshots",
    ),
    mutant(
        "snapshot-without-membership",
        "5.4",
        "the receiver of a snapshot keeps the membership it had",
        (
            "core.snapshots:_install_snapshot",
            "    member.memberships = [(unpacked.membership_index, unpacked.membership), *later]",
            "    known = member.membership if member.voters else unpacked.membership\n"
            "    member.memberships = [(unpacked.membership_index, known), *later]",
        ),
        profile="snapshots",
    ),
    mutant(
        "snapshot-with-a-later-membership",
        "5.4",
        "a snapshot carries the newest membership instead of the one at its index",
        ("core.snapshots:make_snapshot", "if row[0] <= index:", "if True:"),
        profile="snapshots",
    ),
    mutant(
        "snapshot-of-two-leaders-put-together",
        "5.4",
        "chunks are put together whatever they are of, and nobody looks at the CRC",
        ("core.snapshots:on_snapshot", "incoming.key != key", "incoming.index > key.index"),
        ("core.snapshots:_install_snapshot", "if not incoming.is_whole:", "if False:"),
        ("core.snapshots:on_snapshot", "done = incoming.is_complete", "done = incoming.received >= m.total"),
        ("core.snapshots:on_snapshot", "m.offset == incoming.received and m.offset + len(m.data) <= m.total", "True"),
        profile="snapshots",
    ),
)

IDENTITY = (
    mutant(
        "vote-forgotten",
        "5.6",
        "a member gives its vote to whoever asks",
        ("core.election:on_vote", "member.vote in (0, sender) and not member.leader", "True"),
        profile="partitions",
    ),
    mutant(
        "vote-for-a-shorter-log",
        "paper 5.4.1",
        "a vote goes to a candidate whose log lacks entries",
        (
            "core.election:on_vote",
            "up_to_date = (m.last_term, m.last_index) >=",
            "up_to_date = True or (m.last_term, m.last_index) >=",
        ),
        profile="partitions",
    ),
    mutant(
        "instance-comes-back-empty",
        "5.7",
        "a shard that lost its memory keeps its instance",
        ("testing.sim_cluster:ClusterLayer.start_shard", "self._lives[place] += 1", "self._lives[place] = 1"),
    ),
    mutant(
        "answer-of-an-earlier-life-counts",
        "5.7",
        "an answer of a member's life before its removal counts for the present one",
        ("core.replication:_answerer", "if progress is None or m.life != progress.life:", "if progress is None:"),
        profile="changes",
    ),
    mutant(
        "candidate-by-the-present-log-only",
        "5.7",
        "a member that was added again campaigns before it holds what it once held",
        (
            "core.member:Member.may_campaign",
            "if (self.log.last_term, self.log.last_index) < self.forgotten_end:",
            "if False:",
        ),
        _SMALL_APPENDS,
        profile="changes",
    ),
    mutant(
        "vote-by-the-present-log-only",
        "5.7",
        "a member that was added again votes for others as if it had never held more than now",
        (
            "core.election:on_vote",
            ">= max((log.last_term, log.last_index), member.forgotten_end)",
            ">= (log.last_term, log.last_index)",
        ),
        profile="reborn",
    ),
    mutant(
        "vote-of-an-earlier-life-forgotten",
        "5.7",
        "an instance that was removed and added again forgets term and vote",
        (
            "core.shard:Shard.create_group",
            "member.term, member.vote, member.forgotten_end = buried.term, buried.vote, buried.log_end",
            "pass",
        ),
        profile="changes",
    ),
)

ELECTIONS = (
    mutant(
        "pre-vote-raises-the-term",
        "5.8",
        "whoever is asked for a pre-vote takes over its term",
        ("core.election:on_vote", "if m.term > member.term:", "if True:"),
        (
            "core.election:on_vote",
            "    if m.pre:\n        if up_to_date",
            "    if m.term > member.term:\n        roles.follow(member, m.term, 0)\n"
            "    if m.pre:\n        if up_to_date",
        ),
    ),
    mutant(
        "no-pre-vote",
        "5.8",
        "a member campaigns without asking first whether it would be elected",
        ("core.leaderless:timer_due", "member.campaign(pre=True)", "member.campaign(pre=False)"),
    ),
    mutant(
        "refusal-teaches-no-term",
        "5.8",
        "a refusal does not teach the higher term that it carries",
        ("core.election:on_vote_answer", "if not m.granted and m.term > member.term:", "if False:"),
        profile="usurpers",
    ),
    mutant(
        "no-check-quorum",
        "5.8",
        "a leader that hears no quorum goes on leading",
        (
            "core.liveness:check_quorum",
            "if member.shard.now_us - heard_us > member.election_timeout_us:",
            "if heard_us < 0:",
        ),
        profile="partitions",
    ),
    mutant(
        "no-stickiness",
        "5.8",
        "votes are given while a leader is heard",
        ("core.election:on_vote", "    if not m.transfer and member.hears_leader():\n        return\n", ""),
        ("core.leaderless:timer_due", "if member.hears_leader():", "if False:"),
        ("core.leaderless:leader_silent", "max(left_us, 0)", "0"),
        (
            "core.shard:Shard._check_followed",
            "if now_us - link.heard_us >= link.election_timeout_us_min:",
            "if now_us - link.heard_us >= link.election_timeout_us_min // 4:",
        ),
        (
            "core.shard:Shard._check_followed",
            "now_us - link.heard_us >= member.election_timeout_us",
            "now_us - link.heard_us >= member.election_timeout_us // 4",
        ),
        profile="leases",
    ),
    mutant(
        "promise-ends-with-following",
        "5.8, 5.10",
        "who ceases to follow a leader forgets when it last heard it over their link",
        ("core.roles:follow", "        member.heard_us = member.heard_leader_us()\n", ""),
        profile="lease quarrels",
    ),
    mutant(
        "promise-by-an-old-clock",
        "5.10",
        "a member that stood still before it took a message promises by the clock from before",
        ("core.shard:Shard.clock_read", "if now_us > self.now_us:", "if False:"),
        profile="stopped",
    ),
    mutant(
        "handed-over-to-one-that-lags",
        "5.11",
        "TimeoutNow is sent before the target has all that the leader has",
        ("core.election:transfer", "if progress.match == member.log.last_index:", "if True:"),
        profile="transfers",
    ),
    mutant(
        "transfer-without-deadline",
        "5.11",
        "a leader whose transfer failed never resumes",
        ("core.replication:on_tick", "member.shard.now_us >= lead.transfer_deadline_us", "False"),
        profile="transfers",
    ),
    mutant(
        "commands-go-on-in-a-transfer",
        "5.11",
        "new commands enter the log while the leadership is handed over",
        ("core.replication:flush", " and not lead.transfer_target", ""),
        profile="transfers",
    ),
    mutant(
        "removed-member-is-not-told",
        "5.12",
        "nobody tells a removed member that it was removed",
        ("core.own_log:_on_config_committed", "for peer in lead.removed:", "for peer in ():"),
        (
            "core.election:on_vote",
            "member.shard.send(sender, Gone(GONE, member.uid, member.term, member.commit))",
            "pass",
        ),
        profile="changes",
    ),
    mutant(
        "empty-member-asks-nobody",
        "5.12",
        "a member that was removed before it had anything asks nobody whether it was",
        ("core.leaderless:_ask_whether_removed", "or [member.last_leader]", "or []"),
        profile="abandoned",
    ),
    mutant(
        "silence-is-death",
        "5.15",
        "an instance that was silent for three seconds counts as gone for good",
        (
            "core.shard:Shard.gone_for",
            'return {instance for instance, why in self.gone.items() if why == "operator"}',
            "return {link.peer for link in self.links.values() if self.now_us - link.heard_us > 3_000_000}",
        ),
        profile="partitions",
    ),
    mutant(
        "apply-reads-the-clock",
        "5.16",
        "a replica takes its own time when it applies",
        (
            "core.apply:_apply_batch",
            "    if time_us > member.last_time_us:",
            "    time_us = member.shard.wall_us\n    if time_us > member.last_time_us:",
        ),
    ),
)

SESSIONS = (
    mutant(
        "repeated-command-runs-again",
        "11",
        "a command that was seen before runs again",
        ("core.sessions:Sessions.admit", "if stored is not None:", "if False:"),
        ("core.sessions:Sessions.admit", "if seq <= session.acked or ", "if "),
    ),
    mutant(
        "results-are-not-remembered",
        "11",
        "a result is forgotten as soon as it was given",
        ("core.apply:_run", "results[seq] = outcome", "results.pop(seq, None)"),
    ),
    mutant(
        "acknowledged-too-far",
        "11",
        "a client's word that it has the results up to n forgets the next ones too",
        (
            "core.sessions:Sessions.admit",
            "    if acked > session.acked:\n",
            "    acked += 2\n    if acked > session.acked:\n",
        ),
        ("core.sessions:Sessions.admit", "seq <= session.acked or ", ""),
    ),
    mutant(
        "late-retry-is-taken-for-new",
        "11",
        "a retry is admitted though its session may be forgotten",
        (
            "core.sessions:Sessions.admit",
            "        if abs(time_us - issued_us) * 2 > self.ttl_us:\n"
            "            return SESSION_EXPIRED, NIL\n"
            "        if len",
            "        if len",
        ),
        profile="sessions",
    ),
    mutant(
        "session-expires-by-last-answer",
        "11",
        "a session that is in use is forgotten like one that is idle",
        ("core.sessions:Sessions.expire", "horizon = time_us - self.ttl_us", "horizon = time_us - self.ttl_us // 8"),
        profile="sessions",
    ),
)

LINKS = (
    mutant(
        "digest-ignored",
        "6",
        "every answer to a beat confirms, whatever digest it carries",
        ("core.links:Link.answer_is_ok", "if digest == beat.digest:", "if True:"),
        profile="partitions",
    ),
    mutant(
        "beat-before-leadership-counts",
        "6",
        "a beat from before a group was led speaks for it",
        ("core.liveness:confirmed_stamp", "link.ok_seq >= progress.led_seq and ", ""),
        profile="partitions",
    ),
    mutant(
        "promise-counted-from-receipt",
        "6",
        "a promise counts from the arrival of its answer, on links and of appends",
        (
            "core.shard:Shard._on_beat_answer",
            "    if beat is None:\n",
            "    if beat is not None and link.ok_seq == m.seq:\n"
            "        link.ok_stamp = self.stamp\n"
            "    if beat is None:\n",
        ),
        ("core.replication:_answerer", "progress.ack_stamp = m.stamp", "progress.ack_stamp = member.shard.stamp"),
        profile="slow links",
    ),
    mutant(
        "wake-up-forgotten",
        "6",
        "a silent link wakes none of the members that follow over it",
        ("core.shard:Shard._check_followed", "if now_us - link.heard_us >= link.election_timeout_us_min:", "if False:"),
    ),
    mutant(
        "active-set-forgotten",
        "6",
        "a group with something unacknowledged is not looked at again",
        ("core.own_log:append", "    member.shard.active[member.uid] = member\n", ""),
        ("core.own_log:set_commit", "    shard.active[member.uid] = member\n", ""),
    ),
    mutant(
        "no-lists",
        "6",
        "digests that differ are never resolved by lists",
        ("core.shard:Shard._on_beat_answer", "link.mismatch_count >= MISMATCHES_BEFORE_LIST", "False"),
        profile="durable idle",
    ),
    mutant(
        "list-is-not-heard",
        "6",
        "a list confirms, and does not count as hearing the leader",
        ("core.shard:Shard._on_link_list", "link.heard_us = self.now_us", "pass"),
        profile="stopped",
    ),
    mutant(
        "stamp-of-an-earlier-term",
        "6",
        "an answer to an append of an earlier term carries the stamp of it",
        (
            "core.own_log:on_append",
            "teach_term(member, sender, m.prev_index, m.life)",
            "_answer_append(member, sender, m, False, m.prev_index, 0, 0)",
        ),
        profile="quarrels",
    ),
    mutant(
        "commit-index-is-not-told",
        "6",
        "a follower that has all is not told what was committed since",
        ("core.replication:on_tick", "if progress.told_commit < member.commit and", "if False and"),
    ),
    mutant(
        "confirmed-to-whoever-asks",
        "6",
        "a beat's answer says what the asker wants to hear: that all groups are followed",
        (
            "core.shard:Shard._on_beat",
            "BeatAnswer(BEAT_ANSWER, m.seq, link.followed_digest)",
            "BeatAnswer(BEAT_ANSWER, m.seq, m.digest)",
        ),
        profile="partitions",
    ),
)

MUTANTS: tuple[Mutant, ...] = (
    *LOG,
    *READS,
    *CHANGES,
    *SNAPSHOTS,
    *IDENTITY,
    *ELECTIONS,
    *SESSIONS,
    *LINKS,
)

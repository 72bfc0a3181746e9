"""What must hold in every run, kept apart from the scenarios that try to break it.

This module does not cause anything: it looks at members after each step and at answers as they come, and raises
:class:`~raftfleet.testing.model.Violation` at the first step at which a promise is broken.

* :class:`ClusterChecker`: election safety (one leader per group and term), log matching, leader completeness, committed
  entries never change or vanish, commit and term never go back, configurations change one voter at a time, no instance
  votes twice in a term. It needs only what is public of a member: ``role, term, commit, applied, last_index, log,
  voters, learners``.
* :class:`HistoryChecker`: acknowledged commands are in every later state, exactly-once, reads and commands respect
  real time (linearizability by versions, complete and in O(1) per operation).

Cost matters, for they run after every step: a member whose few numbers have not changed is passed over with one tuple
comparison, and logs are compared with one table per group, entry by entry, once per entry and member.
"""

from __future__ import annotations

from typing import Any

from raftfleet.core.membership import Membership
from raftfleet.core.messages import CONFIG, VOTE_ANSWER, Entry
from raftfleet.testing.model import GroupRecord, Violation

LEADER = "leader"


class _Mirror:
    """What was already checked of one member."""

    __slots__ = ("commit", "last_index", "last_term", "member", "signature", "term", "terms")

    def __init__(self, member: Any) -> None:
        self.member = member
        self.signature: tuple[Any, ...] = ()
        self.term = 0
        self.commit = 0
        self.last_index = 0
        self.last_term = 0
        self.terms: dict[int, int] = {}


class _GroupTable:
    """One group's log: ``committed[i - 1]`` is the entry at index i; ``seen`` is every entry that any member held.

    ``commit_terms[i - 1]``: the term of whoever was first seen to have committed it.
    """

    __slots__ = ("commit_terms", "committed", "configs", "seen")

    def __init__(self) -> None:
        self.committed: list[Entry | None] = []
        self.commit_terms: list[int] = []
        self.configs: list[tuple[int, Membership]] = []
        self.seen: dict[tuple[int, int], tuple[int, Entry]] = {}


class ClusterChecker:
    """Safety of the replicated logs of all groups, checked step by step."""

    def __init__(self) -> None:
        self.leaders: dict[tuple[int, int], int] = {}
        self.votes: dict[tuple[int, int, int], int] = {}
        self._tables: dict[int, _GroupTable] = {}
        self._mirrors: dict[tuple[int, int], _Mirror] = {}
        self.config_count = 0

    def check_members(self, instance: int, members: dict[int, Any]) -> None:
        """Look at the members of one shard after a step of it."""
        mirrors = self._mirrors
        for uid, member in members.items():
            mirror = mirrors.get((instance, uid))
            if mirror is None or mirror.member is not member:
                mirror = mirrors[(instance, uid)] = _Mirror(member)
            signature = (member.term, member.role, member.commit, member.last_index, member.log.last_term)
            if signature != mirror.signature:
                self._check_member(instance, uid, member, mirror)
                mirror.signature = signature

    def forget_instance(self, instance: int) -> None:
        """The instance is lost for ever."""
        for key in [key for key in self._mirrors if key[0] == instance]:
            del self._mirrors[key]

    def check_sends(self, instance: int, to_instance: int, messages: list[Any]) -> None:
        """Look at what a shard sends: votes must be given once."""
        for message in messages:
            if message[0] == VOTE_ANSWER and message.granted and not message.pre:
                self.check_vote(message.uid, message.term, instance, to_instance)

    def check_vote(self, uid: int, term: int, voter: int, candidate: int) -> None:
        """``voter`` gave its vote (a candidate's own vote counts too)."""
        earlier = self.votes.setdefault((uid, term, voter), candidate)
        if earlier != candidate:
            raise Violation(
                f"instance rule: {voter} voted in group {uid} term {_term(term)} for {earlier} and {candidate}"
            )

    def _check_member(self, instance: int, uid: int, member: Any, mirror: _Mirror) -> None:
        table = self._tables.get(uid)
        if table is None:
            table = self._tables[uid] = _GroupTable()
        term, commit = member.term, member.commit
        if term < mirror.term:
            raise Violation(
                f"monotony: group {uid} at {instance}: term went back from {_term(mirror.term)} to {_term(term)}"
            )
        if commit < mirror.commit:
            raise Violation(f"monotony: group {uid} at {instance}: commit went back from {mirror.commit} to {commit}")
        if not member.applied <= commit <= member.last_index:
            raise Violation(
                f"monotony: group {uid} at {instance}: applied {member.applied} <= commit {commit} <="
                f" last {member.last_index} does not hold"
            )
        mirror.term = term
        self._check_log(instance, uid, member.log, mirror, table)
        if commit > mirror.commit:
            self._check_commit(instance, uid, member, mirror, table)
            mirror.commit = commit
        if member.role == LEADER:
            self._check_leader(instance, uid, member, table)

    def _check_log(self, instance: int, uid: int, log: Any, mirror: _Mirror, table: _GroupTable) -> None:
        """Log matching: same (index, term) means same entry and, by induction, same prefix."""
        last_index, last_term = log.last_index, log.last_term
        if last_index == mirror.last_index and last_term == mirror.last_term:
            return
        terms, seen = mirror.terms, table.seen
        index = last_index
        first = log.first_index
        while index >= first:
            term = log.term_at(index)
            if terms.get(index) == term:
                break
            entry = log.entry(index)
            before = log.term_at(index - 1)
            if entry.term != term or term < before:
                raise Violation(f"log matching: group {uid} at {instance}: terms fall along the log at {index}")
            earlier = seen.get((index, term))
            if earlier is None:
                seen[(index, term)] = (before, entry)
            elif (earlier[0] != before and -1 not in (earlier[0], before)) or earlier[1] != entry:
                raise Violation(f"log matching: group {uid} index {index} term {_term(term)} differs at {instance}")
            terms[index] = term
            index -= 1
        for gone in range(last_index + 1, mirror.last_index + 1):
            terms.pop(gone, None)
        mirror.last_index, mirror.last_term = last_index, last_term

    def _check_commit(self, instance: int, uid: int, member: Any, mirror: _Mirror, table: _GroupTable) -> None:
        """State machine safety: one entry per committed index, whoever commits it."""
        log, committed = member.log, table.committed
        for index in range(mirror.commit + 1, member.commit + 1):
            if index >= log.first_index:
                entry = log.entry(index)
            elif member.role == LEADER and index in mirror.terms:
                entry = table.seen[(index, mirror.terms[index])][1]  # committed and compacted in one step
            else:
                continue
            if index <= len(committed):
                known = committed[index - 1]
                if known is None:
                    committed[index - 1] = entry
                    if entry.kind == CONFIG and index > (table.configs[-1][0] if table.configs else 0):
                        self._check_config(uid, index, entry, table)
                elif known != entry:
                    raise Violation(
                        f"state machine safety: group {uid} index {index} was committed in term {_term(known.term)},"
                        f" at {instance} it is of term {_term(entry.term)}"
                    )
                continue
            while len(committed) < index - 1:
                committed.append(None)  # Seen first through a snapshot.
                table.commit_terms.append(member.term)
            committed.append(entry)
            table.commit_terms.append(member.term)
            if entry.kind == CONFIG:
                self._check_config(uid, index, entry, table)

    def _check_config(self, uid: int, index: int, entry: Entry, table: _GroupTable) -> None:
        """Quorums of neighbouring configurations overlap: one voter comes or goes at a time."""
        membership = Membership.unpack(entry.data, index)
        self.config_count += 1
        if table.configs and not membership.is_forced_at(index) and None not in table.committed[table.configs[-1][0] :]:
            before = table.configs[-1][1]
            if len(set(before.voters) ^ set(membership.voters)) > 1:
                raise Violation(
                    f"configuration: group {uid} index {index}: voters changed from {before.voters} to"
                    f" {membership.voters} at once"
                )
            both = {*before.voters, *membership.voters}
            if before.quorum + membership.quorum <= len(both):
                raise Violation(
                    f"configuration: group {uid} index {index}: quorums of {membership.voters} need not overlap those"
                    f" of {before.voters}"
                )
        table.configs.append((index, membership))

    def _check_leader(self, instance: int, uid: int, member: Any, table: _GroupTable) -> None:
        key = (uid, member.term)
        known = self.leaders.get(key)
        if known == instance:
            return
        if known is not None:
            raise Violation(
                f"election safety: group {uid} term {_term(member.term)} has two leaders, {known} and {instance}"
            )
        self.leaders[key] = instance
        log = member.log
        # What was committed in a later term binds this leader no more: its votes may have been under way for long.
        end = len(table.committed)
        while end and table.commit_terms[end - 1] >= member.term:
            end -= 1
        if log.last_index < end:
            raise Violation(
                f"leader completeness: group {uid} term {_term(member.term)}: leader {instance} ends at"
                f" {log.last_index}, {end} entries were committed in earlier terms"
            )
        for index in range(max(1, log.first_index), end + 1):
            entry = table.committed[index - 1]
            if entry is not None and log.term_at(index) != entry.term:
                raise Violation(
                    f"leader completeness: group {uid}: leader {instance} of term {_term(member.term)} has another"
                    f" entry at committed index {index}"
                )

    def committed_count(self, uid: int) -> int:
        """The highest index ever seen committed in a group."""
        table = self._tables.get(uid)
        return len(table.committed) if table else 0

    def check_equal_members(self, uid: int, members: list[tuple[int, Any]]) -> None:
        """In peace: all members of a group have the same log end, commit and configuration."""
        views = {
            (m.last_index, m.log.last_term, m.commit, m.applied, tuple(m.voters), tuple(m.learners)) for _, m in members
        }
        if len(views) > 1:
            rows = [
                (i, m.role, _term(m.term), m.last_index, m.commit, m.applied, m.voters, m.learners) for i, m in members
            ]
            raise Violation(f"peace: group {uid}: members differ in peace: {rows}")


def _term(term: int) -> str:
    return f"{term >> 32}.{term & 0xFFFFFFFF}" if term >> 32 else str(term)


class HistoryChecker:
    """Promises to clients, checked as answers come.

    Linearizability by versions: each operation notes, when it is called, the highest version that any operation of the
    group had been answered with; its own answer must not lie below (a query) or at (a command) that floor. Together
    with :class:`~raftfleet.testing.model.GroupRecord`, which gives the versions one order, this is equivalent to
    linearizability, for commands and queries, of the whole group, and costs O(1).
    """

    def __init__(self) -> None:
        self.records: dict[int, GroupRecord] = {}
        self._answered_version: dict[int, int] = {}
        self._acknowledged: dict[int, dict[int, int]] = {}
        self._refused: dict[int, list[int]] = {}

    def record(self, uid: int) -> GroupRecord:
        """The record that all members of the group share."""
        if uid not in self.records:
            self.records[uid] = GroupRecord(uid)
            self._answered_version[uid] = 0
            self._acknowledged[uid] = {}
            self._refused[uid] = []
        return self.records[uid]

    def raise_found(self) -> None:
        """Raise what a state machine noticed: the core takes what a machine raises for a command's result."""
        for record in self.records.values():
            if record.found is not None:
                raise record.found

    def called(self, uid: int) -> int:
        """An operation begins; returns its floor."""
        return self._answered_version[uid]

    def command_answered(self, uid: int, operation: int, floor: int, version: int, chain: int) -> None:
        """A command was acknowledged with this state."""
        record = self.records[uid]
        record.answered(version, chain)
        if record.operation_at[version] != operation:
            raise Violation(
                f"exactly-once: group {uid} operation {operation} was answered with version {version}, which is"
                f" operation {record.operation_at[version]}"
            )
        if version <= floor:
            raise Violation(
                f"linearizability: group {uid} operation {operation} took effect at version {version}, but began"
                f" after version {floor} was answered"
            )
        self._acknowledged[uid][operation] = version
        if version > self._answered_version[uid]:
            self._answered_version[uid] = version

    def query_answered(self, uid: int, floor: int, version: int, chain: int) -> None:
        """A linearizable query was answered from this state."""
        self.records[uid].answered(version, chain)
        if version < floor:
            raise Violation(
                f"stale read: group {uid} answered a linearizable query with version {version}, but version {floor}"
                " had been answered before it began"
            )
        if version > self._answered_version[uid]:
            self._answered_version[uid] = version

    def stale_query_answered(self, uid: int, version: int, chain: int) -> None:
        """A stale query may be old, but must be from a state that was."""
        self.records[uid].answered(version, chain)

    def refused(self, uid: int, operation: int) -> None:
        """A client was told that its command was not applied, by every attempt that it made."""
        self._refused[uid].append(operation)

    def check_refused(self) -> None:
        """What was refused must not have happened, not even later."""
        for uid, operations in self._refused.items():
            for operation in operations:
                if operation in self.records[uid].version_of:
                    raise Violation(
                        f"refusal: group {uid} operation {operation} was refused as not applied, and took effect"
                    )

    def acknowledged_count(self) -> int:
        """Commands acknowledged, over all groups."""
        return sum(len(operations) for operations in self._acknowledged.values())

    def check_state(self, uid: int, seen: dict[int, int], who: object) -> None:
        """A member's state in peace holds every command that was acknowledged, at the version that was told."""
        for operation, version in self._acknowledged[uid].items():
            if seen.get(operation) != version:
                raise Violation(
                    f"acknowledged write lost: group {uid} operation {operation} (version {version}) is not in the"
                    f" state of {who}"
                )

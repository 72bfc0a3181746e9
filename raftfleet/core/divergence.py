"""The alarm for replicas that differ: members compare digests of what they have come to, at agreed indexes.

Raft makes logs equal; that equal logs make equal states is the user's promise, and memory may rot. This module notices
when it is broken. It knows nothing of time but the shard's, and runs beside the way of a command: a CHECK entry comes
once in ``divergence_check_entries`` entries, only where there are entries, and nothing is done per command.

Rules:

* The leader appends the CHECK entry and says in it whether the state is to be looked at (data: msgpack bool). Whoever
  applies it makes a :class:`~raftfleet.core.messages.Digest` of what it has then and sends it to all other members.
  What is lost is not sent again: a difference that stays is seen at the next check.
* ``state`` stands for the user's ``digest(state)`` (the dump, unless the machine knows better) and for the newest
  results that the sessions keep; ``log`` for the newest entries. 0: not known here, which differs from nothing.
* A check costs little: states are looked at the more seldom the larger they are (one byte per
  :data:`BYTES_PER_ENTRY`), and above ``divergence_state_bytes_max`` not at all, until it is time to measure again.
* Members that differ are told loudly, in any case. If a quorum of voters agrees with each other, whoever differs from
  them is the *outlier*. Nobody is, where no quorum agrees: then only a person can tell who is right.
* An outlier that learns of it is **quarantined**: it leads no more, does not campaign before others had their chance,
  and answers no stale read. It votes and acknowledges as before, for its log is right: a group loses no voter by it.
* The leader's node lets the outlier's place in the group be taken by a new member on the same node, made from a
  snapshot of the majority (:mod:`raftfleet.fleet.reconcile`), each at most once in :data:`REBUILD_US`, and only while
  every other voter is there.
* A quarantined member that had to lead after all (it alone had the whole log) takes no command and answers no read; it
  steps down as soon as its log is committed, that is, as soon as another one has it too.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import msgpack

from raftfleet.core import own_log, roles
from raftfleet.core.codes import COMMAND_FAILED
from raftfleet.core.messages import CHECK, DIGEST, Digest
from raftfleet.core.names import FLEET_UID, hash64

if TYPE_CHECKING:
    from raftfleet.core.leading import Leading
    from raftfleet.core.member import Member
    from raftfleet.core.messages import Entry

BYTES_PER_ENTRY = 64
"""A state of n bytes is looked at once in n / 64 entries at most: about what a small command costs by itself."""
LOG_ENTRIES_MAX = 256
SESSIONS_MAX = 64
"""Sessions whose results go into a digest: those used last."""
REBUILD_US = 600_000_000
"""A machine that differs by its nature would have its member made anew at every check."""
PATIENCE_TIMERS = 4
"""Election timers that a quarantined member lets pass, for others to lead."""

FOREVER_US = 1 << 62


class Audit:
    """What a member knows of checks; made at the first one.

    Attributes:
        own: this member's newest digest.
        reports: the others' newest, by instance.
        state_bytes: size of the state when it was last looked at; halved at each check that does not look.
        differing: instances that differed at the newest check, this one included; empty: all that told agree.
        outliers: instance -> (life, when it was found to be an outlier).
        check_count, difference_count: since this process knows the group.
    """

    __slots__ = (
        "check_count",
        "difference_count",
        "differing",
        "outliers",
        "own",
        "patience",
        "reports",
        "state_bytes",
    )

    def __init__(self) -> None:
        self.own: Digest | None = None
        self.reports: dict[int, Digest] = {}
        self.state_bytes = 0
        self.differing: frozenset[int] = frozenset()
        self.outliers: dict[int, tuple[int, int]] = {}
        self.patience = PATIENCE_TIMERS
        self.check_count = 0
        self.difference_count = 0


# ---------------------------------------------------------------- as leader


def applied_as_leader(member: Member) -> None:
    """After something was applied: ask for a check if one is due; hand over what must not be led from here."""
    lead = member.lead
    assert lead is not None
    if member.is_quarantined:
        if member.commit >= lead.noop_index and len(member.voters) > 1:
            assert member.audit is not None
            member.audit.patience = PATIENCE_TIMERS
            roles.step_down(member)
        return
    every = member.config.divergence_check_entries
    if not every or lead.transfer_target or len(member.membership.lives) < 2 or member.commit < lead.noop_index:
        return
    audit = member.audit
    is_large = False
    if audit is not None:
        is_large = audit.state_bytes > member.config.divergence_state_bytes_max
        if not is_large:
            every = max(every, audit.state_bytes // BYTES_PER_ENTRY)
    if member.applied - member.checked_index >= every:
        member.checked_index = own_log.append(member, CHECK, bytes(msgpack.packb(not is_large)))
        member.shard.set_dirty(member)


def begin_to_lead(member: Member, lead: Leading) -> None:
    """A quarantined member leads, since no other could: nothing enters the log or is read through it."""
    lead.transfer_target = -1
    lead.transfer_deadline_us = FOREVER_US
    lead.lease_void = True
    member.shard.event("led_in_quarantine", member.uid)


def gives_way(member: Member) -> bool:
    """Whether a quarantined member lets its election timer pass once more."""
    audit = member.audit
    if not member.is_quarantined or audit is None or audit.patience <= 0:
        return False
    audit.patience -= 1
    return True


def outliers(member: Member) -> frozenset[int]:
    """Members that are to be made anew: found to differ from a quorum that agrees, and still the same life."""
    audit = member.audit
    if audit is None or member.uid == FLEET_UID:
        return frozenset()
    lives = member.membership.lives
    return frozenset(instance for instance, (life, _) in audit.outliers.items() if lives.get(instance) == life)


# ---------------------------------------------------------------- as any member


def on_check(member: Member, index: int, entry: Entry) -> None:
    """A CHECK entry is applied: digest what is here, tell it, compare."""
    audit = member.audit
    if audit is None:
        audit = member.audit = Audit()
    elif audit.own is not None:
        _compare(member, audit, is_final=True)
    member.checked_index = index
    audit.check_count += 1
    audit.differing = frozenset()
    state = 0
    if entry.data == b"\xc3":
        state, audit.state_bytes = _state_digest(member)
    else:
        audit.state_bytes //= 2
    lives = member.membership.lives
    own = audit.own = Digest(
        DIGEST, member.uid, member.term, index, lives.get(member.id, 0), state, _log_digest(member, index)
    )
    for peer in lives:
        if peer != member.id:
            member.shard.send(peer, own)
    _compare(member, audit)


def on_digest(member: Member, sender: int, m: Digest) -> None:
    """What another member has come to. It may come before this member is there."""
    audit = member.audit
    if audit is None:
        audit = member.audit = Audit()
    known = audit.reports.get(sender)
    if sender in member.membership.lives and (known is None or known.index <= m.index):
        audit.reports[sender] = m
        was_quarantined = member.is_quarantined
        _compare(member, audit)
        if member.is_quarantined and not was_quarantined:
            roles.step_down(member)


def _state_digest(member: Member) -> tuple[int, int]:
    """``(64 bits for the state and the newest results, never 0; bytes looked at)``; (0, 0): it cannot be told."""
    try:
        with member.shard.user_code(member):
            data = bytes(member.machine.digest(member.state))
    except BaseException:  # told where a snapshot needs the dump; here it only means that nothing is known
        return 0, 0
    digest = hashlib.blake2b(data, digest_size=8)
    digest.update(_newest_results(member))
    return int.from_bytes(digest.digest(), "big") or 1, len(data)


def _newest_results(member: Member) -> bytes:
    """Stored results of the sessions used last. Of an exception only its type: its text may hold an address."""
    rows: list[Any] = []
    for number, (client_id, session) in enumerate(reversed(member.session_table.by_client.items())):
        if number == SESSIONS_MAX:
            break
        rows.append([client_id, session.acked, session.used_us])
        rows += [[seq, _told(outcome)] for seq, outcome in session.results.items()]
    return bytes(msgpack.packb(rows))


def _told(outcome: Any) -> Any:
    if isinstance(outcome, tuple) and outcome[0] == COMMAND_FAILED:
        return [COMMAND_FAILED, msgpack.unpackb(outcome[1])[0]]
    return outcome


def _log_digest(member: Member, index: int) -> int:
    """64 bits of the newest entries up to ``index``, never 0; 0: not all of them are held here."""
    first = max(index - LOG_ENTRIES_MAX, 0) + 1
    if first < member.log.first_index:
        return 0
    return hash64(bytes(msgpack.packb(member.log.slice(first, index + 1)))) or 1


def _compare(member: Member, audit: Audit, *, is_final: bool = False) -> None:
    """Who differs, and from whom? Tells what is new; that no quorum agrees only when no more reports are waited for.

    A leader that turns out to be the outlier is not deposed here, since entries may be being applied.
    """
    own = audit.own
    lives = member.membership.lives
    if own is None:
        return
    rows = {member.id: own}
    for instance, report in audit.reports.items():
        # A report of an earlier life speaks of a member that is no more.
        if report.index == own.index and lives.get(instance) == report.life:
            rows[instance] = report
    wrong: set[int] = set()
    is_split = False
    for digests in ({i: row.state for i, row in rows.items()}, {i: row.log for i, row in rows.items()}):
        known = {instance: digest for instance, digest in digests.items() if digest}
        if len(set(known.values())) > 1:
            is_split = True
            wrong |= _minority(member, known)
    differing = frozenset(rows) if is_split and not wrong else frozenset(wrong)
    is_final = is_final or len(rows) == len(lives)
    if not differing - audit.differing or not (wrong or is_final):
        return
    audit.differing = differing
    audit.difference_count += 1
    member.shard.event("diverged", member.uid, own.index, tuple(sorted(differing)), bool(wrong))
    if wrong and member.uid != FLEET_UID:
        _quarantine(member, audit, wrong)


def _minority(member: Member, known: dict[int, int]) -> set[int]:
    """Whoever differs from a quorum of voters that agrees; empty: there is no such quorum."""
    membership = member.membership
    voters = [known[voter] for voter in membership.voters if voter in known]
    for digest in set(voters):
        if voters.count(digest) >= membership.quorum:
            return {instance for instance, other in known.items() if other != digest}
    return set()


def _quarantine(member: Member, audit: Audit, wrong: set[int]) -> None:
    now_us = member.shard.now_us
    for instance in sorted(wrong):
        life = member.membership.lives[instance]
        before = audit.outliers.get(instance)
        if before is None or (before[0] != life and now_us - before[1] >= REBUILD_US):
            audit.outliers[instance] = (life, now_us)
    if member.id in wrong and not member.is_quarantined:
        member.is_quarantined = True
        member.shard.event("quarantined", member.uid)
    if member.lead is not None:
        member.shard.event("outliers", member.uid)

"""Running the user's code on what is committed, and the hooks.

This module knows nothing of quorums, terms or time: the entry's time is its leader's (DESIGN 5.16), so that every
replica comes to the same state.

Rules:

* Entries are applied in order, once; ``applied`` moves after the entry, ``applied <= commit`` always.
* Whether a command runs or its stored result is given again is decided by the session table alone, which is equal on
  every replica (:mod:`raftfleet.core.sessions`).
* What a command raises is its result, on every replica alike. What a hook raises is told and counted, and stops
  nothing.
* Hooks about commands and members run on the leader only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack

from raftfleet.core import divergence, restoring, versions
from raftfleet.core import sessions as session_rules
from raftfleet.core.codes import BAD_REQUEST, COMMAND_FAILED, OK
from raftfleet.core.failures import describe, failure_body, pack_result
from raftfleet.core.incoming import drop_incoming
from raftfleet.core.messages import CHECK, COMMANDS, CONFIG, RESTORE, VERSION
from raftfleet.core.sessions import Session

if TYPE_CHECKING:
    from raftfleet.core.member import Member
    from raftfleet.core.membership import Membership
    from raftfleet.core.messages import Entry

LOG_BYTES_KEPT_MAX = 32 << 20
LOG_BYTES_HELD_MAX = 256 << 20
"""A large snapshot takes seconds to make and to send; without the log since then, all of it would be for nothing."""
ENTRY_BYTES = 200
"""What an entry takes besides its data, about."""

_unpack = msgpack.unpackb


def apply_committed(member: Member) -> None:
    """Apply what is committed, in order; as leader, answer."""
    log = member.log
    lead = member.lead
    while member.applied < member.commit:
        index = member.applied + 1
        entry = log.entry(index)
        if entry.kind == COMMANDS:
            tokens = lead.pending.pop(index, None) if lead is not None else None
            _apply_batch(member, index, entry, tokens)
        elif entry.kind == CONFIG:
            _apply_config(member, index)
        elif entry.kind == RESTORE:
            tokens = lead.pending.pop(index, None) if lead is not None else None
            _apply_piece(member, entry, tokens)
        elif entry.kind == VERSION and not versions.apply_version(member, entry):
            member.shard.stop_member(member)
            return
        elif entry.kind == CHECK:
            divergence.on_check(member, index, entry)
        member.applied = index
    if member.lead is not None:
        divergence.applied_as_leader(member)
    if member.incoming is not None and member.incoming.index <= member.commit:
        drop_incoming(member)
    kept = member.config.log_entries_kept
    if member.applied - log.snapshot_index >= 2 * kept:
        _compact_to(member, member.applied - kept)
    elif log.size_bytes > LOG_BYTES_KEPT_MAX:
        _compact_to(member, member.applied)


def _compact_to(member: Member, index: int) -> None:
    """Forget entries up to ``index``, but not those that go on from a snapshot which is under way to somebody."""
    lead = member.lead
    log = member.log
    if lead is not None and lead.hold_index and member.shard.now_us < lead.hold_until_us:
        if log.size_bytes + ENTRY_BYTES * len(log.entries) < LOG_BYTES_HELD_MAX:
            index = min(index, lead.hold_index)
    log.compact_to(index)


def _apply_piece(member: Member, entry: Entry, tokens: list[object] | None) -> None:
    was_restoring = member.restoring is not None
    code, body = restoring.apply_piece(member, entry)
    if tokens is not None:
        member.shard.reply(tokens[0], code, body)
    if was_restoring and member.restoring is None:
        member.shard.on_restored(member)
        if member.hook is not None:
            call_hook(member, "on_restored", member.state)


def _apply_batch(member: Member, index: int, entry: Entry, tokens: list[object] | None) -> None:
    try:
        time_us, commands = session_rules.unpack_batch(entry.data)
    except ValueError as error:  # from whoever led then; the same nothing for every replica
        member.shard.violation(member, f"the entry at index {index} cannot be applied: {error}")
        return
    if time_us > member.last_time_us:
        member.last_time_us = time_us
    member.session_table.expire(time_us)
    context = member.machine.context
    context.uid = member.uid
    context.index = index
    context.term = entry.term
    context.time_us = time_us
    context.version = member.active_version
    shard = member.shard
    context.position = 0
    leading = tokens is not None
    is_watched = shard.begin_user_code(member)
    try:
        for number, command in enumerate(commands):
            code, body = _apply_item(member, command, time_us, leading)
            if tokens is not None:
                shard.reply(tokens[number], code, body)
    finally:
        if is_watched:
            shard.end_user_code()
    shard.on_applied(member, index, time_us, commands)


def _apply_item(member: Member, command: bytes, time_us: int, leading: bool) -> tuple[int, Any]:
    """Apply a command or a run; returns what its sender is told: for a run OK, and the list of what came of each."""
    try:
        client_id, seq, acked, issued_us, arg = session_rules.parse_command(command)
    except ValueError as error:
        member.machine.context.position += 1
        return BAD_REQUEST, str(error)
    table = member.session_table
    if isinstance(arg, bytes):
        outcome = _apply_one(member, table.admit(client_id, seq, acked, issued_us, time_us), seq, arg, leading)
        return (OK, outcome) if isinstance(outcome, bytes) else _told(outcome)
    session = table.admit_run(client_id, seq, len(arg), acked, issued_us, time_us)
    if session is not None:
        outcomes = _run(member, session, seq, arg, leading)
    else:
        outcomes = [
            _apply_one(member, table.admit(client_id, one, acked, issued_us, time_us), one, data, leading)
            for one, data in enumerate(arg, seq)
        ]
    if not leading or set(map(type, outcomes)) == {bytes}:
        return OK, outcomes
    return OK, [outcome if isinstance(outcome, bytes) else list(_told(outcome)) for outcome in outcomes]


def _apply_one(
    member: Member, admitted: Session | tuple[int, bytes], seq: int, arg: bytes, leading: bool
) -> bytes | tuple[int, Any]:
    """Run one command if it is to run; returns its packed result, or the code and body of what it got instead."""
    if isinstance(admitted, Session):
        return _run(member, admitted, seq, [arg], leading)[0]
    member.machine.context.position += 1
    code, body = admitted
    return body if code == OK else (code, body)


def _run(
    member: Member, session: Session, first: int, args: list[bytes], leading: bool
) -> list[bytes | tuple[int, Any]]:
    """Run commands that were admitted, from seq ``first`` on. This is the inner loop of everything."""
    command = member.machine.command
    context = member.machine.context
    results = session.results
    hook = member.hook if leading else None
    outcomes: list[bytes | tuple[int, Any]] = []
    seq = first
    for arg in args:
        before = member.state
        outcome: bytes | tuple[int, Any]
        try:
            value = _unpack(arg, raw=False, strict_map_key=False)
            result, after = command(before, value)
            outcome = pack_result(result)
        except BaseException as error:  # SystemExit too: a user's code ends its command, never the worker
            outcome = (COMMAND_FAILED, msgpack.packb(describe(error)))
        else:
            member.state = after
            if hook is not None:
                call_hook(member, "on_command_committed", before, value, result, after)
        results[seq] = outcome
        outcomes.append(outcome)
        seq += 1
        context.position += 1
    return outcomes


def _told(outcome: tuple[int, Any]) -> tuple[int, Any]:
    """A code other than OK as the client hears it; stored bodies are packed."""
    code, body = outcome
    return code, failure_body(code, body)


def _apply_config(member: Member, index: int) -> None:
    if member.hook is None or member.lead is None:
        return
    before: Membership | None = None
    for at, membership in member.memberships:
        if at == index and before is not None:
            for instance in membership.lives.keys() - before.lives.keys():
                call_hook(member, "on_member_added", member.shard.node_of(instance))
            for instance in before.lives.keys() - membership.lives.keys():
                call_hook(member, "on_member_removed", member.shard.node_of(instance))
        before = membership


def on_established(member: Member) -> None:
    """Called by the shard when this leader's own term is committed and applied."""
    if member.hook is not None:
        call_hook(member, "on_elected")


def call_hook(member: Member, method: str, *args: Any) -> None:
    """Run a hook; what it raises is told and counted, and stops nothing."""
    try:
        with member.shard.user_code(member):
            getattr(member.hook, method)(member.name, *args)
    except BaseException as error:
        member.shard.event("hook_failed", member.uid, method, ": ".join(describe(error)))

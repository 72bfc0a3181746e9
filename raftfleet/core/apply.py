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

from raftfleet.core import sessions as session_rules
from raftfleet.core import versions
from raftfleet.core.codes import BAD_REQUEST, COMMAND_FAILED, OK
from raftfleet.core.failures import describe, failure_body, pack_result
from raftfleet.core.messages import COMMANDS, CONFIG, VERSION
from raftfleet.core.sessions import Session

if TYPE_CHECKING:
    from raftfleet.core.member import Member
    from raftfleet.core.membership import Membership
    from raftfleet.core.messages import Entry
    from raftfleet.core.sessions import Sessions

LOG_BYTES_KEPT_MAX = 32 << 20


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
        elif entry.kind == VERSION and not versions.apply_version(member, entry):
            member.shard.stop_member(member)
            return
        member.applied = index
    kept = member.config.log_entries_kept
    if member.applied - log.snapshot_index >= 2 * kept:
        log.compact_to(member.applied - kept)
    elif log.size_bytes > LOG_BYTES_KEPT_MAX:
        log.compact_to(member.applied)


def _apply_batch(member: Member, index: int, entry: Entry, tokens: list[object] | None) -> None:
    time_us, commands = session_rules.unpack_batch(entry.data)
    if time_us > member.last_time_us:
        member.last_time_us = time_us
    table = member.session_table
    table.expire(time_us)
    context = member.machine.context
    context.uid = member.uid
    context.index = index
    context.term = entry.term
    context.time_us = time_us
    context.version = member.active_version
    shard = member.shard
    with shard.user_code(member):
        for position, command in enumerate(commands):
            context.position = position
            outcome = _apply_command(member, table, command, time_us, tokens is not None)
            if tokens is not None:
                code, body = outcome
                shard.reply(tokens[position], code, body if code == OK else failure_body(code, body))
    shard.on_applied(member, index, time_us, commands)


def _apply_command(member: Member, table: Sessions, command: bytes, time_us: int, leading: bool) -> tuple[int, Any]:
    try:
        client_id, seq, acked, issued_us, arg = session_rules.parse_command(command)
    except ValueError as error:
        return BAD_REQUEST, str(error)
    admitted = table.admit(client_id, seq, acked, issued_us, time_us)
    if type(admitted) is not Session:
        return admitted  # type: ignore[return-value]
    before = member.state
    try:
        value = msgpack.unpackb(arg, raw=False, strict_map_key=False)
        result, after = member.machine.command(before, value)
        packed = pack_result(result)
    except BaseException as error:  # SystemExit too: a user's code ends its command, never the worker
        outcome = (COMMAND_FAILED, msgpack.packb(describe(error)))
    else:
        member.state = after
        outcome = (OK, packed)
        if leading and member.hook is not None:
            call_hook(member, "on_command_committed", before, value, result, after)
    admitted.results[seq] = outcome
    return outcome


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

"""Versions of a state machine: when all members' code knows a newer one, the group goes over to it at one entry.

This module knows nothing of how the members' versions were learned. Rules (DESIGN 7):

* A group works as one version, the same on every replica: :attr:`Member.active_version`. Nodes whose code is newer run
  it as the older version until all members can do more, so machines are updated one by one, in any order.
* The leader appends a VERSION entry (msgpack int) when it knows that every member supports it. Applying the entry
  brings the state up with the user's ``upgrade(state, from_version)``. What ``upgrade`` raises leaves state and version
  as they were, on every replica alike, and is told.
* A member whose code is older than what it has to apply stops, loudly, instead of applying it wrongly: its node runs
  old code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgpack

from raftfleet.core import own_log
from raftfleet.core.change import ConfigChangeRefused
from raftfleet.core.failures import describe
from raftfleet.core.messages import VERSION

if TYPE_CHECKING:
    from raftfleet.core.member import Member
    from raftfleet.core.messages import Entry


def raise_version(member: Member, version: int) -> None:
    """As leader: go over to ``version``, which every member supports.

    Raises:
        ConfigChangeRefused: not an established leader, or a change of membership is under way, whose newcomer may be
            older.
    """
    lead = member.lead
    if lead is None or member.commit < lead.noop_index:
        raise ConfigChangeRefused("this member does not lead, or has committed nothing in its term yet")
    if lead.config_index or lead.transfer_target:
        raise ConfigChangeRefused("a change of membership or of the leader is under way")
    if member.shard.is_full:
        raise ConfigChangeRefused("this leader has no room on its disk")
    if version > member.active_version and version > lead.version_asked:
        lead.version_asked = version
        own_log.append(member, VERSION, bytes(msgpack.packb(version)))
        member.shard.set_dirty(member)


def apply_version(member: Member, entry: Entry) -> bool:
    """Apply a VERSION entry; False if this member cannot go on."""
    version = msgpack.unpackb(entry.data)
    machine = member.machine
    before = member.active_version
    if version <= before:
        return True
    if version > machine.version:
        member.shard.event("too_old", member.uid, version, machine.version)
        return False
    machine.context.version = version
    try:
        with member.shard.user_code(member):
            member.state = machine.upgrade(member.state, before)
    except BaseException as error:
        machine.context.version = before
        member.shard.event("upgrade_failed", member.uid, version, ": ".join(describe(error)))
        return True
    member.active_version = version
    member.shard.event("upgraded", member.uid, version)
    return True

"""Whole states out of a group and into one, as steps that both drivers take: nothing here waits or sends.

A step is ``(method, args, timeout_s)``, a call that the driver makes; or ``(PAUSE, {}, seconds)``. Its answer is sent
into the generator, its error thrown into it. What may be tried again is tried again here.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator
from dataclasses import replace
from typing import Any, TypeAlias

from raftfleet import errors
from raftfleet.core.config import GroupConfig
from raftfleet.core.names import check_group_name
from raftfleet.wire.exported import ExportedState

PAUSE = ""
PAUSE_S = 0.25
PIECE_BYTES = 256 << 10
CALL_S = 10.0

Step: TypeAlias = tuple[str, dict[str, Any], float]
Steps: TypeAlias = Generator[Step, Any, Any]

_AGAIN = (errors.NoLeader, errors.Overloaded, errors.Unanswered, errors.NotActive, errors.DiskFull)


def restored_config(restore: ExportedState, config: GroupConfig | None) -> GroupConfig:
    """The config of a group that begins with that state: the given one, or that of the group it was of.

    Raises:
        ValueError: none was given, and the state does not know it.
    """
    if config is None:
        if not restore.config:
            raise ValueError(f"the state of {restore.name!r} does not say which machine it is of: give a config")
        config = GroupConfig.from_dict({**restore.config, "restore": None})
    version = restore.machine_version if config.machine_version is None else config.machine_version
    if version != restore.machine_version:
        raise ValueError(
            f"the state was dumped by version {restore.machine_version} of its machine, and is loaded by that: "
            f"machine_version is {version}"
        )
    return replace(config, machine_version=version, restore=(len(restore.state), restore.crc))


def export_steps(name: str, consistency: str, timeout_s: float) -> Steps:
    """Copy a group's state. Returns an :class:`ExportedState`."""
    check_group_name(name)
    if consistency not in ("linearizable", "stale"):
        raise ValueError(f"consistency is 'linearizable' or 'stale', not {consistency!r}")
    stale = consistency == "stale"
    begun = yield "copy_begin", {"name": name, "stale": stale}, timeout_s
    at = {"name": name, "instance": begun["instance"], "id": begun["id"]}
    parts: list[bytes] = []
    offset, size_bytes = 0, begun["size_bytes"]
    failures = 0
    while offset < size_bytes:
        try:
            part = yield "copy_read", {**at, "offset": offset}, min(timeout_s, CALL_S)
        except _AGAIN:
            failures += 1
            if failures * PAUSE_S > timeout_s:
                raise
            yield PAUSE, {}, PAUSE_S
            continue
        if not part:
            raise errors.ProtocolError(f"the copy of {name!r} ended after {offset} of {size_bytes} bytes")
        failures = 0
        parts.append(part)
        offset += len(part)
    state = b"".join(parts)
    if len(state) != size_bytes or zlib.crc32(state) != begun["crc"]:
        raise errors.ProtocolError(f"the copy of {name!r} is not what was announced: its CRC is wrong")
    try:
        yield "copy_end", at, CALL_S
    except errors.RaftFleetError:
        pass  # it is dropped by itself
    return ExportedState(
        name=name,
        state=state,
        machine_version=begun["machine_version"],
        replicas=begun["replicas"],
        config=begun["config"],
        uid=begun["uid"],
        index=begun["index"],
        term=begun["term"],
        wall_us=begun["wall_us"],
        is_linearizable=not stale,
        node=begun["node"],
    )


def begin_steps(args: dict[str, Any], timeout_s: float) -> Steps:
    """Add the group that is to be restored, or find that it was added with this very state. Returns its uid."""
    try:
        added = yield "add_group", args, timeout_s
    except errors.AlreadyAdded:
        status = yield "group_status", {"name": args["name"]}, timeout_s
        if status.get("restoring") != args["config"]["restore"]:
            raise
        return status["uid"]
    return added["uid"]


def piece_steps(name: str, uid: int, state: bytes, timeout_s: float) -> Steps:
    """Send a group the state that it waits for. ``timeout_s``: without any progress."""
    offset, failures = 0, 0
    while True:
        data = state[offset : offset + PIECE_BYTES]
        try:
            there, done = yield (
                "restore_piece",
                {"name": name, "uid": uid, "offset": offset, "data": data},
                min(timeout_s, CALL_S),
            )
        except (*_AGAIN, errors.OutcomeUnknown):  # a piece that comes twice counts once
            failures += 1
            if failures * PAUSE_S > timeout_s:
                raise
            yield PAUSE, {}, PAUSE_S
            continue
        if done:
            return None
        failures = failures + 1 if there == offset else 0
        if failures * PAUSE_S > timeout_s:
            raise errors.NoLeader(f"group {name!r} takes no more of its state: {offset} of {len(state)} bytes")
        offset = there

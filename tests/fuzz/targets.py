"""Every decoder of raftfleet, what it may raise, and examples of what it takes.

A decoder is whatever meets bytes that another process, another machine or a disk made. A new one gets a row here.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgpack

from raftfleet.core import host_messages as hm
from raftfleet.core import messages as m
from raftfleet.core import sessions
from raftfleet.core.config import GroupConfig
from raftfleet.core.membership import Membership
from raftfleet.fleet.founding import Memory
from raftfleet.fleet.machine import FleetState
from raftfleet.storage import records, scan
from raftfleet.testing.fleet import SimFleet
from raftfleet.wire import codec, ipc, stream
from raftfleet.wire.errors import WireError


class Target(NamedTuple):
    """``decode(data)`` may return or raise one of ``declared``, and nothing else may happen."""

    decode: Callable[[bytes], Any]
    declared: tuple[type[BaseException], ...]
    examples: Sequence[bytes]
    is_msgpack: bool = True


def a_fleet() -> SimFleet:
    """A simulated fleet in which a few things have happened."""
    fleet = SimFleet(1)
    fleet.start({"n1": "z1", "n2": "z2", "n3": "z1"})
    for number in range(3):
        fleet.add_group(f"group {number}")
    client = fleet.client("n2")
    for number in range(3):
        client.result(client.command(f"group {number}", "inc"))
    fleet.kill_worker("n1", 1)
    fleet.wait_settled()
    return fleet


def _state_dump() -> bytes:
    state = a_fleet().any_state()
    assert state is not None
    return state.dump()


STATE = _state_dump()
CLIENT = bytes(range(16))
COMMAND = msgpack.packb([CLIENT, 7, 5, 1_700_000_000_000_000, msgpack.packb(["put", "a", 1])])
RUN = msgpack.packb([CLIENT, 8, 5, 1_700_000_000_000_000, [msgpack.packb("a"), msgpack.packb("b")]])
MEMBERSHIP = Membership((1, 2, 3), (4,), {1: 0, 2: 0, 3: 9, 4: -1}).pack()
MEMORY = Memory(7, (1, 2), (1, 2)).pack()
REQUESTS = [
    [0, ipc.HELLO, ipc.PROTOCOL, CLIENT],
    [1, ipc.COMMAND, "name", 3, 500, COMMAND],
    [2, ipc.QUERY, "name", 3, 500, 1, b"\x01"],
    [3, ipc.CALL, "status", {"a": 1}, 500],
]
ENTRIES = [m.Entry(3, m.COMMANDS, sessions.pack_batch(1, [COMMAND])), m.Entry(3, m.CONFIG, MEMBERSHIP)]
FRAME = codec.encode_frame(
    bytes(16),
    1,
    2,
    [
        m.Append(m.APPEND, 1, 3, 4, 2, 3, 9, 0, ENTRIES),
        m.AppendAnswer(m.APPEND_ANSWER, 1, 3, True, 4, 0, 0, 9, 0),
        m.Vote(m.VOTE, 1, 3, True, 4, 2, False),
        m.Digest(m.DIGEST, 1, 3, 9, 0, 2**64 - 1, 0),
        m.LinkList(m.LINK_LIST, 1, 2, 0, 1, [(1, 3)]),
        hm.Leaders(hm.LEADERS, [hm.Leadership(1, 3, 2)]),
        hm.Rpc(hm.RPC, 1, "who_leads", {"uid": 1}),
    ],
)


def _segment() -> bytes:
    header = records.pack_header(records.SegmentHeader(records.FORMAT, 11, 1, 0, bytes(16), records.node_hash("n1")))
    data = bytearray(header)
    for batch in range(3):
        start = len(data)
        rows = [
            records.pack_entries(5, 1 + batch, [m.Entry(3, m.COMMANDS, b"data")]),
            records.pack_life(records.VOTE, 5, 3, 2, 0),
        ]
        for row in rows:
            data += row
        data += records.pack_mark(batch, 1, 11, start, len(data), rows)
    return bytes(data) + bytes(256)


def _scan(data: bytes) -> Any:
    records.read_header(data)
    return list(scan.scan_segment(data, 1, 11, 0))


def _record(data: bytes) -> Any:
    """A record whose checksum is right, whatever is in it."""
    if len(data) < 4:
        return None
    kind, count = data[0], data[1]
    packed = records.pack_record(kind, 5, 3, 7, count, data[2:])
    record = records.read_record(packed, 0)
    assert record is not None
    if kind in (records.ENTRIES, records.FORWARD):
        return records.unpack_entries(record)
    return None


def _fleet_state(data: bytes) -> Any:
    """A state that was taken must be whole enough for whatever looks at it."""
    state = FleetState.load(data)
    state.active_nodes()
    for group in state.groups.values():
        state.desired(group)
        state.explain(group)
    return state.dump()


def _fleet_command(data: bytes) -> Any:
    """A command as any client may send it: refused or applied, and the state stays whole."""
    state = FleetState.load(STATE)
    command = msgpack.unpackb(data, raw=False, strict_map_key=False)
    try:
        return state.apply(command, 0)
    finally:
        assert FleetState.load(state.dump()) == state


def _stream(data: bytes) -> Any:
    """A client's stream in pieces, and each request of it checked."""
    reader = ipc.FrameReader()
    rng = random.Random(len(data))
    at = 0
    while at < len(data):
        size = rng.randrange(1, 40)
        for frame in reader.feed(data[at : at + size]):
            for item in frame:
                ipc.check_request(item)
        at += size


def _node_stream(data: bytes) -> Any:
    """A stream between nodes, cut anywhere: the greeting, then frames."""
    rng = random.Random(len(data))
    greeting, decoder, at = bytearray(), None, 0
    while at < len(data):
        size = rng.randrange(1, 40)
        piece = data[at : at + size]
        at += size
        if decoder is None:
            missing = stream.GREETING_BYTES - len(greeting)
            greeting += piece[:missing]
            if stream.read_greeting(greeting) is None:
                continue
            decoder, piece = stream.StreamDecoder(1 << 20), piece[missing:]
        for frame in decoder.feed(memoryview(piece)):
            codec.decode_frame(frame)
        if decoder.error is not None:
            raise decoder.error
        assert decoder.pending_bytes <= len(data)


def _replies(data: bytes) -> Any:
    for frame in ipc.FrameReader().feed(data):
        for item in frame:
            _, code, body = ipc.check_reply(item)
            ipc.error_of(code, body)


def _sessions(data: bytes) -> Any:
    table = sessions.Sessions(10_000_000, 100)
    table.load(msgpack.unpackb(data, raw=False, strict_map_key=False))


def _group_config(data: bytes) -> Any:
    return GroupConfig.from_dict(msgpack.unpackb(data, raw=False, strict_map_key=False))


NODE = {"name": "n9", "zone": "z", "host": "10.0.0.9", "port": 7400, "public_key": "", "instances": [901, 902]}
COMMANDS = [
    ["found", bytes(16), [NODE]],
    ["join", NODE],
    ["deactivate", "n1"],
    ["leave", "n1"],
    ["remove_node", "n1", "operator", [1, 2]],
    ["declare_lost", [1, 2]],
    ["instances", "n1", [3, 4], [1, 2]],
    ["add_group", "new", 3, GroupConfig("a:B").to_dict()],
    ["add_groups", ["more", "and more"], 3, GroupConfig("a:B").to_dict()],
    ["remove_group", "group 1"],
    ["change_config", "group 1", GroupConfig("a:B").to_dict()],
    ["renew_group", 3, [1, 2]],
]

not_msgpack = (ValueError, TypeError, msgpack.UnpackException)
"""What unpacking itself may raise, where a target's first step is not raftfleet's own."""


def _is_msgpack(data: bytes) -> bool:
    try:
        msgpack.unpackb(data, raw=False, strict_map_key=False)
    except not_msgpack:
        return False
    return True


def of_value(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """For decoders that are given a value which was unpacked before."""
    return lambda data: decode(data) if _is_msgpack(data) else None


def targets() -> dict[str, Target]:
    """All of them, by name."""
    from raftfleet.fleet.machine import FleetRefused

    length = struct.Struct(">I")
    return {
        "frame between nodes": Target(codec.decode_frame, (WireError,), [FRAME]),
        "stream between nodes": Target(
            _node_stream,
            (WireError,),
            [stream.pack_greeting(7) + 2 * (stream.pack_length(len(FRAME)) + FRAME), stream.pack_greeting(2**63 - 1)],
            False,
        ),
        "stream of a client": Target(_stream, (WireError,), [ipc.pack_frame(REQUESTS)], False),
        "requests of a client": Target(
            lambda data: _stream(length.pack(len(data)) + data), (WireError,), [msgpack.packb(REQUESTS)]
        ),
        "replies to a client": Target(
            lambda data: _replies(length.pack(len(data)) + data),
            (WireError,),
            [msgpack.packb([[1, 0, b"\x01"], [2, 1, ["ValueError", "x"]], [3, 16, ["n1", "y"]], [4, 10, "why"]])],
        ),
        "command": Target(sessions.parse_command, (ValueError,), [COMMAND, RUN]),
        "batch of commands": Target(sessions.unpack_batch, (ValueError,), [sessions.pack_batch(5, [COMMAND, RUN])]),
        "membership": Target(lambda data: Membership.unpack(data, 9), (ValueError,), [MEMBERSHIP]),
        "sessions of a snapshot": Target(
            of_value(_sessions),
            (ValueError,),
            [msgpack.packb([[CLIENT, 3, 4, [[5, 0, b"r"], [6, 1, msgpack.packb(["E", "m"])]]]])],
        ),
        "founding memory": Target(Memory.unpack, (ValueError,), [MEMORY]),
        "state of a fleet": Target(_fleet_state, (ValueError,), [STATE]),
        "command to a fleet": Target(of_value(_fleet_command), (FleetRefused,), [msgpack.packb(c) for c in COMMANDS]),
        "config of a group": Target(
            of_value(_group_config), (ValueError,), [msgpack.packb(GroupConfig("a:B", hook="c:D").to_dict())]
        ),
        "segment of a log": Target(_scan, (), [_segment()], False),
        "record of a log": Target(
            _record, (ValueError,), [bytes([1, 2]) + struct.pack("<2I", 3, 4) + b"\1\2abcdefg"], False
        ),
    }

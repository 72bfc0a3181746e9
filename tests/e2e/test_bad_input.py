"""Nothing that arrives on any socket of a node may end, stop or confuse it."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import pytest
import zmq
from e2e.load import JUST_AN_INT, Load

from raftfleet.core import messages
from raftfleet.testing import LocalFleet
from raftfleet.wire.codec import encode_frame
from raftfleet.wire.ipc import CALL, COMMAND, HELLO, PROTOCOL, QUERY, pack_frame
from raftfleet.wire.stream import pack_greeting, pack_length

HUNDRED_MB = 100_000_000
OTHER_FLEET = bytes(range(16))
CLIENT_ID = b"c" * 16


GROUPS = [f"group{number}" for number in range(10)]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[LocalFleet]:
    """Two nodes of two workers with ten groups, shared by the tests of this file: nothing may disturb them."""
    with LocalFleet() as fleet:
        fleet.start_nodes({"n1": "z1", "n2": "z2"}, workers=2)
        client = fleet.connect("n2")
        for name in GROUPS:
            client.add_consensus_group(name, 2, JUST_AN_INT)
        fleet.wait_settled()
        fleet.status("n1"), fleet.status("n2")  # opens the connections that pair() will use
        yield fleet


@pytest.fixture
def pair(two_nodes: LocalFleet) -> Iterator[LocalFleet]:
    """The nodes, under load before, while and after the test talks nonsense."""
    fleet = two_nodes
    client = fleet.connect("n2")
    first = {name: client.query(name, "get") for name in GROUPS}
    client.close()
    before = pids(fleet)
    with Load(fleet, first, via=["n1", "n2"], pause_s_max=0.05) as load:
        load.await_progress()
        yield fleet
        load.await_progress()
    load.check()
    assert pids(fleet) == before, "a process ended"
    assert all(worker["restarts"] == 0 for name in ("n1", "n2") for worker in fleet.status(name)["workers"])
    for node in fleet.nodes.values():
        assert "Traceback" not in node.log()


def pids(fleet: LocalFleet) -> list[int]:
    return [process.pid for name in ("n1", "n2") for process in fleet.nodes[name].processes()]


# -------------------------------------------------------------------- links between nodes


def random_bytes(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(0, 2000))


def wrong_protocol(rng: random.Random) -> bytes:
    return msgpack.packb([99, bytes(16), 1, 0, [[messages.BEAT, 1, 2, 3]]])


def other_fleet(rng: random.Random) -> bytes:
    vote = messages.Vote(messages.VOTE, 0, 1 << 40, False, 1 << 40, 1 << 40, False)
    return encode_frame(OTHER_FLEET, rng.getrandbits(62) + 1, 0, [vote])


def unknown_kind(rng: random.Random) -> bytes:
    return msgpack.packb([1, bytes(16), 1, 0, [[250, "what", None]]])


def truncated(rng: random.Random) -> bytes:
    whole = encode_frame(OTHER_FLEET, 1, 2, [messages.Append(messages.APPEND, 1, 1, 1, 1, 1, 1, 1, [])])
    return whole[: rng.randrange(len(whole))]


def nested_deeply(rng: random.Random) -> bytes:
    return b"\x91" * 5000 + b"\xc0"


def announces_a_huge_array(rng: random.Random) -> bytes:
    return b"\xdd\xff\xff\xff\xff" + b"\xc0" * 16


@pytest.mark.parametrize(
    "make",
    [random_bytes, wrong_protocol, other_fleet, unknown_kind, truncated, nested_deeply, announces_a_huge_array],
)
def test_no_frame_between_nodes_disturbs_a_node(pair: LocalFleet, make: Callable[[random.Random], bytes]) -> None:
    rng = random.Random(make.__name__)
    port = pair.nodes["n1"].port
    for target in (port, port + 1, port + 2):
        frames = [make(rng) for _ in range(50)]
        send_stream(target, pack_greeting(7) + b"".join(pack_length(len(frame)) + frame for frame in frames))
        send_to_router(target, [[frame] for frame in frames])  # by a stranger that speaks the other transport


def test_a_frame_of_a_hundred_megabytes_between_nodes_is_not_read(pair: LocalFleet) -> None:
    port = pair.nodes["n1"].port
    for target in (port, port + 1):
        send_stream(target, pack_greeting(7) + pack_length(HUNDRED_MB) + bytes(HUNDRED_MB))
        send_to_router(target, [[bytes(HUNDRED_MB)]])
    grown = max(process.memory_info().rss for process in pair.nodes["n1"].processes())
    assert grown < HUNDRED_MB, "the frame was kept in memory"


def test_messages_of_several_parts_and_none_are_ignored(pair: LocalFleet) -> None:
    port = pair.nodes["n1"].port
    for target in (port, port + 1):
        send_to_router(target, [[b""], [b"", b""], [b"a", b"b", b"c"], [other_fleet(random.Random(1)), b"more"]])


def send_stream(port: int, data: bytes) -> None:
    """Send bytes as a stranger that has greeted, until they are all out of our hands or it is closed there."""
    with socket.create_connection(("127.0.0.1", port), 20.0) as connection:
        send_until_closed(connection, data)


def send_to_router(port: int, frames: list[list[bytes]]) -> None:
    """Send multi-part messages over ZeroMQ, and wait until they are out of our hands or nobody takes them."""
    context = zmq.Context()
    try:
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 2000)
        dealer.setsockopt(zmq.SNDTIMEO, 2000)
        dealer.setsockopt(zmq.IMMEDIATE, 1)
        dealer.connect(f"tcp://127.0.0.1:{port}")
        for frame in frames:
            try:
                dealer.send_multipart(frame)
            except zmq.Again:  # the node closed the connection and that is its right
                break
        dealer.close()
    finally:
        context.term()


def test_bytes_that_are_no_greeting_are_ignored(pair: LocalFleet) -> None:
    rng = random.Random(7)
    port = pair.nodes["n1"].port
    for target in (port, port + 1, port + 2):
        with socket.create_connection(("127.0.0.1", target), 2.0) as connection:
            send_until_closed(connection, rng.randbytes(5000))


# -------------------------------------------------------------------- client sockets


def hello(protocol: int = PROTOCOL) -> bytes:
    return pack_frame([[0, HELLO, protocol, CLIENT_ID]])


def huge_announcement() -> bytes:
    return struct.pack(">I", HUNDRED_MB)


BAD_CLIENT_BYTES = {
    "random_bytes": lambda: random.Random(3).randbytes(5000),
    "a_frame_of_random_bytes": lambda: hello() + struct.pack(">I", 500) + random.Random(4).randbytes(500),
    "wrong_protocol": lambda: hello(99),
    "no_hello": lambda: pack_frame([[1, CALL, "status", {}, 1000]]),
    "two_hellos": lambda: hello() + hello(),
    "announces_100_mb": lambda: hello() + huge_announcement() + bytes(1000),
    "not_an_array": lambda: hello() + struct.pack(">I", 1) + b"\xc0",
    "unknown_kind": lambda: hello() + pack_frame([[1, 77, "x"]]),
    "unknown_method": lambda: hello() + pack_frame([[1, CALL, "no_such_method", {}, 1000]]),
    "arguments_of_the_wrong_type": lambda: hello() + pack_frame([[1, CALL, "add_group", {"name": 7, "x": []}, 1000]]),
    "command_that_is_no_msgpack": lambda: hello() + pack_frame([[1, COMMAND, "group1", 0, 1000, b"\xc1\xc1"]]),
    "command_of_another_shape": lambda: (
        hello() + pack_frame([[1, COMMAND, "group1", 0, 1000, msgpack.packb({"client": 1})]])
    ),
    "query_of_the_fleet_group": lambda: hello() + pack_frame([[1, QUERY, "$fleet", 0, 1000, 0, b"\xc1"]]),
    "negative_numbers": lambda: hello() + pack_frame([[-1, COMMAND, "group1", -5, -1000, b""]]),
    "half_a_frame": lambda: hello()[:-3],
}


@pytest.mark.parametrize("what", sorted(BAD_CLIENT_BYTES))
def test_no_client_disturbs_a_node(pair: LocalFleet, what: str) -> None:
    data = BAD_CLIENT_BYTES[what]()
    for name in ("control.sock", "shard-0.sock", "shard-1.sock"):
        for _ in range(5):
            talk_nonsense(pair.nodes["n1"].run_dir / name, data)


def test_a_client_that_sends_a_hundred_megabytes_is_cut_off(pair: LocalFleet) -> None:
    path = pair.nodes["n1"].run_dir / "shard-0.sock"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5.0)
        connection.connect(os.fspath(path))
        sent = send_until_closed(connection, hello() + huge_announcement() + bytes(HUNDRED_MB))
    assert sent < HUNDRED_MB


def test_clients_that_connect_and_say_nothing_do_no_harm(pair: LocalFleet) -> None:
    silent = []
    try:
        for _ in range(100):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(os.fspath(pair.nodes["n1"].run_dir / "shard-0.sock"))
            silent.append(connection)
    finally:
        for connection in silent:
            connection.close()


def talk_nonsense(path: Path, data: bytes) -> None:
    """Send ``data`` and read whatever comes back until the node has answered or cut the connection."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(0.05)
        connection.connect(os.fspath(path))
        send_until_closed(connection, data)
        try:
            while connection.recv(65536):
                pass
        except (TimeoutError, ConnectionError):
            pass


def send_until_closed(connection: socket.socket, data: bytes) -> int:
    """Send as much as the other side takes; return how many bytes that were."""
    view, sent = memoryview(data), 0
    while sent < len(data):
        try:
            sent += connection.send(view[sent : sent + 65536])
        except (TimeoutError, ConnectionError):
            break
    return sent

"""Both transports on loopback: real sockets on both sides, and strangers with garbage."""

from __future__ import annotations

import errno
import random
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import zmq
from transport.world import (
    FLEET,
    OTHER_FLEET,
    PATIENCE_S,
    Stranger,
    World,
    beat,
    counted,
    port_of,
    receive_until,
    send_until_taken,
)

from raftfleet.core import messages as m
from raftfleet.transport import peers as peers_module
from raftfleet.transport.base import Peers, is_endpoint
from raftfleet.transport.curve import generate_keys
from raftfleet.transport.errors import ListenError
from raftfleet.transport.peers import PeerSockets
from raftfleet.wire.codec import Frame, FrameLimits, encode_frame
from raftfleet.wire.stream import pack_greeting


def test_two_processes_exchange_frames_in_order(world: World, peers: Callable[..., Peers[Any]]) -> None:
    a, b = peers(1), peers(2)
    assert a.set_address(2, b.endpoint)
    assert b.set_address(1, a.endpoint)
    send_until_taken(world, a, 2, [beat(0)])
    for seq in range(1, 100):
        assert a.send(2, [beat(seq), beat(seq)])
    received = receive_until(world, b, lambda got: len(got) == 100)
    assert [sender for sender, _ in received] == [1] * 100
    assert [messages[0].seq for _, messages in received] == list(range(100))
    assert type(received[0][1][0]) is m.Beat
    send_until_taken(world, b, 1, [beat(5)])
    assert receive_until(world, a, bool) == [(2, [beat(5)])]
    assert a.counters["frames_sent"] == 100 == b.counters["frames_received"]


def test_a_budget_leaves_the_rest_pending(world: World, peers: Callable[..., Peers[Any]]) -> None:
    a, b = peers(1), peers(2)
    a.set_address(2, b.endpoint)
    send_until_taken(world, a, 2, [beat(0)])
    for seq in range(1, 20):
        assert a.send(2, [beat(seq)])
    got: list[Any] = []
    while len(got) < 20:
        world.turn(0)
        part = b.receive(budget_frames=3)
        assert len(part) <= 3
        got += part
    assert not b.pending()


def test_nothing_is_lost_between_the_descriptor_and_events(world: World, peers: Callable[..., Peers[Any]]) -> None:
    a, b = peers(1), peers(2)
    a.set_address(2, b.endpoint)
    b.set_address(1, a.endpoint)
    send_until_taken(world, a, 2, [beat(0)])
    receive_until(world, b, bool)
    send_until_taken(world, b, 1, [beat(0)])
    receive_until(world, a, bool)
    for seq in range(500):  # there and back, each side waiting on its descriptor alone; a lost wake-up would hang
        assert a.send(2, [beat(seq)])
        assert receive_until(world, b, bool) == [(1, [beat(seq)])]
        assert b.send(1, [beat(seq)])
        assert receive_until(world, a, bool) == [(2, [beat(seq)])]


def test_sending_without_an_address_or_to_a_dead_peer_is_false_and_immediate(
    world: World, peers: Callable[..., Peers[Any]]
) -> None:
    a = peers(1)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert not a.send(2, [beat(1)])
    assert a.counters["dropped: no address"] == 1
    assert a.set_address(2, f"tcp://127.0.0.1:{port}")
    for seq in range(1000):
        assert not a.send(2, [beat(seq)])
    assert a.counters["dropped: queue full or peer away"] == 1000
    assert not a.is_ready(2)


def test_nothing_queues_while_a_peer_is_away_and_its_next_life_refuses_frames_for_the_former(
    world: World,
    peers: Callable[..., Peers[Any]],
) -> None:
    a, b = peers(1), peers(2)
    port = port_of(b.endpoint)
    a.set_address(2, b.endpoint)
    send_until_taken(world, a, 2, [beat(1)])
    receive_until(world, b, bool)
    b.close()
    give_up = time.monotonic() + PATIENCE_S
    while a.send(2, [beat(2)]):  # until it is noticed
        assert time.monotonic() < give_up
        world.turn()
    again = peers(3, port=port)
    send_until_taken(world, a, 2, [beat(3)])  # the same address, the former instance
    assert receive_until(world, again, counted(again, "refused: other instance")) == []
    assert a.set_address(3, again.endpoint)
    a.forget(2)
    send_until_taken(world, a, 3, [beat(4)])
    assert receive_until(world, again, bool) == [(1, [beat(4)])]
    assert a.instances() == [3] and a.address(3) == again.endpoint and a.address(2) is None


def test_a_full_queue_drops_without_blocking(world: World, peers: Callable[..., Peers[Any]]) -> None:
    a, b = peers(1, send_queue_frames_max=8), peers(2)
    a.set_address(2, b.endpoint)
    send_until_taken(world, a, 2, [beat(1)])
    big = m.Append(m.APPEND, 1, 2, 3, 4, 5, 6, 7, [m.Entry(1, 1, bytes(1 << 20))])
    dropped = a.counters["dropped: queue full or peer away"]
    sent = 0
    while a.send(2, [big]):  # nobody receives, so that one of the queues gets full
        sent += 1
        assert sent < 2000
    assert sent >= 4
    assert a.counters["dropped: queue full or peer away"] == dropped + 1
    got = receive_until(world, b, lambda received: len(received) >= sent + 1)
    assert len(got) == sent + 1  # what was taken arrives
    send_until_taken(world, a, 2, [beat(9)])
    assert receive_until(world, b, bool) == [(1, [beat(9)])]


def test_too_large_a_frame_is_not_sent(world: World, peers: Callable[..., Peers[Any]]) -> None:
    a, b = peers(1, limits=FrameLimits(frame_bytes_max=1000)), peers(2)
    a.set_address(2, b.endpoint)
    send_until_taken(world, a, 2, [beat(1)])
    assert not a.send(2, [m.Append(m.APPEND, 1, 2, 3, 4, 5, 6, 7, [m.Entry(1, 1, bytes(1000))])])
    assert a.counters["dropped: too large"] == 1


def test_garbage_frames_are_counted_and_the_next_good_one_arrives(
    world: World, peers: Callable[..., Peers[Any]], stranger: Callable[[str], Stranger]
) -> None:
    b = peers(2)
    one = stranger(b.endpoint)
    rng = random.Random(3)
    for _ in range(200):
        one.send(rng.randbytes(rng.randrange(300)))
    one.send(b"")
    one.send(encode_frame(FLEET, 1, 2, [beat(1)]))
    assert receive_until(world, b, bool) == [(1, [beat(1)])]
    refused = sum(count for name, count in b.counters.items() if name.startswith("refused: "))
    assert refused == 201


def test_other_fleet_other_protocol_and_other_instance_are_refused_and_counted(
    world: World, peers: Callable[..., Peers[Any]], stranger: Callable[[str], Stranger]
) -> None:
    told: list[Frame] = []
    b = peers(2, on_other_fleet=told.append)
    one = stranger(b.endpoint)
    one.send(encode_frame(OTHER_FLEET, 1, 2, [beat(1)]))
    one.send(msgpack.packb([2, FLEET, 1, 2, []]))
    one.send(encode_frame(FLEET, 1, 99, [beat(1)]))
    one.send(encode_frame(bytes(16), 1, 2, [beat(1)]))
    one.send(encode_frame(FLEET, 1, 0, [beat(2)]))
    assert receive_until(world, b, bool) == [(1, [beat(2)])]
    for reason in ("other fleet", "other protocol", "other instance", "no fleet"):
        assert b.counters[f"refused: {reason}"] == 1, reason
    assert [frame.fleet for frame in told] == [OTHER_FLEET]


def test_who_is_in_no_fleet_yet_is_let_in_by_the_predicate_alone(
    world: World, peers: Callable[..., Peers[Any]], stranger: Callable[[str], Stranger]
) -> None:
    b = peers(2, fleet=bytes(16), accept_without_fleet=lambda frame: frame.from_instance == 1)
    one = stranger(b.endpoint)
    one.send(encode_frame(bytes(16), 5, 2, [beat(1)]))
    one.send(encode_frame(bytes(16), 1, 2, [beat(2)]))
    one.send(encode_frame(OTHER_FLEET, 1, 2, [beat(3)]))
    got = receive_until(world, b, lambda received: len(received) == 2)
    assert [messages for _, messages in got] == [[beat(2)], [beat(3)]]
    b.set_fleet(FLEET)
    one.send(encode_frame(bytes(16), 1, 2, [beat(4)]))
    one.send(encode_frame(OTHER_FLEET, 1, 2, [beat(5)]))
    one.send(encode_frame(FLEET, 5, 2, [beat(6)]))
    assert receive_until(world, b, lambda received: len(received) == 2) == [(1, [beat(4)]), (5, [beat(6)])]


def test_a_message_of_several_parts_is_refused(
    world: World, zmq_peers: Callable[..., PeerSockets], raw: Callable[..., zmq.Socket[bytes]]
) -> None:
    b = zmq_peers(2)
    stranger = raw(b.endpoint)
    stranger.send_multipart([b"a", b"b", b"c"])
    stranger.send(encode_frame(FLEET, 1, 2, [beat(1)]))
    assert receive_until(world, b, bool) == [(1, [beat(1)])]
    assert b.counters["refused: more than one part"] == 1


def test_a_frame_of_100_mb_ends_its_connection_unread(world: World, zmq_peers: Callable[..., PeerSockets]) -> None:
    a, b = zmq_peers(1), zmq_peers(2)
    a.set_address(2, b.endpoint)
    send_until_taken(world, a, 2, [beat(1)])
    receive_until(world, b, bool)
    before = _rss_bytes()
    with socket.create_connection(("127.0.0.1", port_of(b.endpoint))) as stranger:
        stranger.settimeout(PATIENCE_S)
        stranger.sendall(b"\xff" + bytes(8) + b"\x7f\x03\0" + b"NULL".ljust(20, b"\0") + bytes(32))
        ready = b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
        # A greeting comes in pieces, and with a timeout set MSG_WAITALL does not wait for all of them.
        greeting = b""
        while len(greeting) < 64:
            piece = stranger.recv(64 - len(greeting))
            assert piece, "closed within the greeting"
            greeting += piece
        stranger.sendall(b"\x04" + bytes([len(ready)]) + ready)
        assert stranger.recv(1) == b"\x04"  # the other side's READY
        small = encode_frame(FLEET, 5, 2, [beat(5)])
        stranger.sendall(b"\x00" + bytes([len(small)]) + small)
        assert receive_until(world, b, bool) == [(5, [beat(5)])]  # the hand-made connection is a good one until now
        stranger.sendall(b"\x02" + struct.pack(">Q", 100 << 20))
        with pytest.raises(OSError):
            for _ in range(100):
                stranger.sendall(bytes(1 << 20))
    assert _rss_bytes() - before < 50 << 20
    for seq in range(20):
        assert a.send(2, [beat(seq)])
    assert len(receive_until(world, b, lambda received: len(received) == 20)) == 20


def test_a_stranger_that_sends_100_mb_over_zeromq_hurts_nobody(
    world: World, zmq_peers: Callable[..., PeerSockets], raw: Callable[..., zmq.Socket[bytes]]
) -> None:
    a, b = zmq_peers(1), zmq_peers(2)
    a.set_address(2, b.endpoint)
    stranger = raw(b.endpoint)
    stranger.send(bytes(100 << 20))
    send_until_taken(world, a, 2, [beat(1)])
    assert receive_until(world, b, bool) == [(1, [beat(1)])]


def _rss_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(1000),
        b"\xff" * 1000,
        b"\xff\0\0\0\0\0\0\0\x01\x7f" + b"\x03\0NULL" + bytes(48) + b"\x04\xff",
        struct.pack(">Q", 2**63) * 10,
        pack_greeting(5)[:20],
        pack_greeting(5) + b"\xff" * 100,
        pack_greeting(5).replace(b" 01 ", b" 99 "),
    ],
)
def test_a_raw_tcp_connection_with_garbage_hurts_nobody(
    world: World, peers: Callable[..., Peers[Any]], sent: bytes
) -> None:
    a, b = peers(1), peers(2)
    with socket.create_connection(("127.0.0.1", port_of(b.endpoint))) as stranger:
        stranger.sendall(sent)
        a.set_address(2, b.endpoint)
        send_until_taken(world, a, 2, [beat(1)])
        assert receive_until(world, b, bool) == [(1, [beat(1)])]


@pytest.mark.parametrize(
    "endpoint",
    [
        *["", "tcp://", "tcp://h", "tcp://h:", "tcp://h:0", "tcp://h:65536", "tcp://h:1;tcp://x:2", "tcp://*:1"],
        *[
            "ipc:///tmp/x",
            "inproc://zeromq.zap.01",
            "tcp://h:1\n",
            "tcp://h h:1",
            "tcp://a:1@b",
            "udp://h:1",
            "tcp://-h:1",
        ],
    ],
)
def test_an_endpoint_of_another_shape_is_refused(world: World, peers: Callable[..., Peers[Any]], endpoint: str) -> None:
    a = peers(1)
    assert not is_endpoint(endpoint)
    assert not a.set_address(2, endpoint)
    assert a.counters["refused: bad address"] == 1
    assert a.instances() == []


def test_endpoints_of_the_usual_shapes_are_taken() -> None:
    for endpoint in (
        "tcp://127.0.0.1:7400",
        "tcp://node-1.example.org:1",
        "tcp://[::1]:65535",
        "tcp://[fe80::1%eth0]:5",
    ):
        assert is_endpoint(endpoint), endpoint


def test_a_taken_address_is_a_listen_error(world: World, peers: Callable[..., Peers[Any]]) -> None:
    b = peers(2)
    with pytest.raises(ListenError, match="in use") as caught:
        peers(3, port=port_of(b.endpoint))
    assert caught.value.errno == errno.EADDRINUSE


def test_an_address_that_moves_is_followed(world: World, peers: Callable[..., Peers[Any]]) -> None:
    a, b, c = peers(1), peers(2), peers(2)
    a.set_address(2, b.endpoint)
    send_until_taken(world, a, 2, [beat(1)])
    receive_until(world, b, bool)
    a.set_address(2, c.endpoint)
    send_until_taken(world, a, 2, [beat(2)])
    assert receive_until(world, c, bool) == [(1, [beat(2)])]
    assert b.receive() == []


# --- CURVE ---


def test_listed_keys_are_let_in_and_others_are_not(world: World, zmq_peers: Callable[..., PeerSockets]) -> None:
    keys_a, keys_b, keys_c = generate_keys(), generate_keys(), generate_keys()
    listed = [keys_a.public_key, keys_b.public_key]
    a, b = zmq_peers(1, keys=keys_a, allowed_keys=listed), zmq_peers(2, keys=keys_b, allowed_keys=listed)
    now_us = [0]
    stranger = zmq_peers(3, keys=keys_c, allowed_keys=[keys_b.public_key], clock_us=lambda: now_us[0])
    assert stranger.set_address(2, b.endpoint, keys_b.public_key)
    assert a.set_address(2, b.endpoint, keys_b.public_key)
    receive_until(world, b, counted(b, "refused: public key"))
    assert not stranger.send(2, [beat(1)])
    give_up = time.monotonic() + PATIENCE_S
    while not a.send(2, [beat(2)]):
        assert time.monotonic() < give_up
        b.receive()  # the handshake needs b's loop to answer ZeroMQ's question
        world.poller.wait(2000)
    assert receive_until(world, b, bool) == [(1, [beat(2)])]
    b.set_allowed_keys([*listed, keys_c.public_key])
    give_up = time.monotonic() + PATIENCE_S
    while not stranger.send(2, [beat(3)]):  # ZeroMQ gives up on a peer that refused its key; check_handshakes does not
        assert time.monotonic() < give_up
        now_us[0] += peers_module.HANDSHAKE_CHECK_US
        assert stranger.check_handshakes() == []
        b.receive()
        world.poller.wait(2000)
    assert receive_until(world, b, bool) == [(3, [beat(3)])]
    assert stranger.counters["refused there: public key"] == 1


def test_a_node_with_keys_listens_to_nobody_without(
    world: World, zmq_peers: Callable[..., PeerSockets], raw: Callable[..., zmq.Socket[bytes]]
) -> None:
    keys_a, keys_b = generate_keys(), generate_keys()
    b = zmq_peers(2, keys=keys_b, allowed_keys=[keys_a.public_key])
    plain = zmq_peers(3)
    plain.set_address(2, b.endpoint)
    stranger = raw(b.endpoint)
    stranger.send(encode_frame(FLEET, 1, 2, [beat(1)]))
    a = zmq_peers(1, keys=keys_a, allowed_keys=[])
    a.set_address(2, b.endpoint, keys_b.public_key)
    give_up = time.monotonic() + PATIENCE_S
    while not a.send(2, [beat(2)]):
        assert not plain.send(2, [beat(1)])
        assert time.monotonic() < give_up
        assert b.receive() == []
        world.poller.wait(2000)
    assert receive_until(world, b, bool) == [(1, [beat(2)])]


def test_a_wrong_key_is_told_from_silence(world: World, zmq_peers: Callable[..., PeerSockets]) -> None:
    keys_a, keys_b, other = generate_keys(), generate_keys(), generate_keys()
    now_us = [0]
    a = zmq_peers(1, keys=keys_a, allowed_keys=[], clock_us=lambda: now_us[0])
    b = zmq_peers(2, keys=keys_b, allowed_keys=[keys_a.public_key])
    assert a.set_address(3, "tcp://127.0.0.1:1", keys_b.public_key)  # nobody is there: no key is wrong
    assert a.set_address(2, b.endpoint, other.public_key)
    give_up = time.monotonic() + PATIENCE_S
    while not (wrong := a.check_handshakes()):
        assert time.monotonic() < give_up
        now_us[0] += peers_module.HANDSHAKE_CHECK_US
        b.receive()
        world.poller.wait(2000)
    assert wrong == [2]
    assert a.set_address(2, b.endpoint, keys_b.public_key)
    while not a.send(2, [beat(1)]):
        assert time.monotonic() < give_up
        now_us[0] += peers_module.HANDSHAKE_CHECK_US
        assert a.check_handshakes() == []
        b.receive()
        world.poller.wait(2000)
    assert receive_until(world, b, bool) == [(1, [beat(1)])]


def test_a_connection_that_is_replaced_while_its_handshake_fails_holds_up_no_other(
    world: World,
    zmq_peers: Callable[..., PeerSockets],
) -> None:
    """ZeroMQ's thread once told of a failure where nobody listened any more, and all its connections stood still."""
    keys_a, keys_b = generate_keys(), generate_keys()
    a = zmq_peers(1, keys=keys_a, allowed_keys=[])
    b = zmq_peers(2, keys=keys_b, allowed_keys=[keys_a.public_key])
    for turn in range(300):
        assert a.set_address(2, b.endpoint, generate_keys().public_key)
        select.select([], [], [], 0.0005 * (turn % 5))
    assert a.set_address(2, b.endpoint, keys_b.public_key)
    give_up = time.monotonic() + PATIENCE_S
    while not a.send(2, [beat(1)]):
        assert time.monotonic() < give_up
        b.receive()
        world.poller.wait(2000)
    assert receive_until(world, b, bool) == [(1, [beat(1)])]


def test_a_node_that_lies_about_its_key_gets_nothing(world: World, zmq_peers: Callable[..., PeerSockets]) -> None:
    keys_a, keys_b, claimed = generate_keys(), generate_keys(), generate_keys()
    a = zmq_peers(1, keys=keys_a, allowed_keys=[])
    b = zmq_peers(2, keys=keys_b, allowed_keys=[keys_a.public_key])
    assert a.set_address(2, b.endpoint, claimed.public_key)
    assert not a.set_address(4, b.endpoint, "no key")
    assert not a.set_address(5, b.endpoint)
    assert a.instances() == [2]
    for _ in range(50):
        assert not a.send(2, [beat(1)])
        assert b.receive() == []
        world.poller.wait(2000)

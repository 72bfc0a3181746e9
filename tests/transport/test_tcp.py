"""Plain TCP between nodes: the stream's bytes, half-written frames, restarts, strangers, the other transport."""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from transport.world import FLEET, PATIENCE_S, World, beat, counted, port_of, receive_until, send_until_taken

from raftfleet.core import messages as m
from raftfleet.transport import resolve, tcp
from raftfleet.transport.base import Peers
from raftfleet.transport.errors import ListenError
from raftfleet.transport.peers import PeerSockets
from raftfleet.transport.tcp import TcpPeers
from raftfleet.wire.codec import FrameLimits, encode_frame
from raftfleet.wire.errors import WireError
from raftfleet.wire.stream import GREETING_BYTES, StreamDecoder, pack_greeting, pack_length, read_greeting

ZMTP = b"\xff" + bytes(8) + b"\x7f"


@pytest.fixture
def peers(world: World) -> Callable[..., TcpPeers]:
    def make(instance: int, *, port: int = 0, host: str = "127.0.0.1", **options: Any) -> TcpPeers:
        sockets = TcpPeers(instance, host, port, world.poller, **options)
        sockets.set_fleet(FLEET)
        world.made.append(sockets)
        return sockets

    return make


def bulk(size_bytes: int, seq: int = 7) -> m.Append:
    return m.Append(m.APPEND, 1, 2, 3, 4, 5, seq, 7, [m.Entry(1, 1, bytes(size_bytes))])


def until(world: World, condition: Callable[[], object], timeout_us: int = 2000) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up
        world.turn(timeout_us)


def dial(sockets: Peers[Any]) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port_of(sockets.endpoint)), timeout=PATIENCE_S)


def read_all(world: World, stranger: socket.socket) -> bytes:
    """What the other side sends until it closes."""
    data = b""
    stranger.setblocking(False)
    give_up = time.monotonic() + PATIENCE_S
    while True:
        try:
            piece = stranger.recv(4096)
        except BlockingIOError:
            assert time.monotonic() < give_up
            world.turn()
            continue
        except ConnectionResetError:
            return data
        if not piece:
            return data
        data += piece


# --- the stream ---


def test_frames_come_out_as_they_went_in_however_the_stream_is_cut() -> None:
    rng = random.Random(5)
    for _ in range(300):
        frames = [rng.randbytes(rng.choice((0, 1, 5, 300, 3000))) for _ in range(rng.randrange(1, 8))]
        data = b"".join(pack_length(len(frame)) + frame for frame in frames)
        decoder = StreamDecoder(3000)
        found: list[bytes] = []
        at = 0
        while at < len(data):
            size = rng.choice((1, 2, 3, 7, 100, 2000))
            found += [bytes(frame) for frame in decoder.feed(memoryview(data[at : at + size]))]
            at += size
        assert found == frames
        assert decoder.pending_bytes == 0


def test_a_frame_above_the_limit_is_refused_by_its_length_alone() -> None:
    decoder = StreamDecoder(10)
    assert [bytes(frame) for frame in decoder.feed(memoryview(pack_length(10) + bytes(10)))] == [bytes(10)]
    assert decoder.error is None
    assert [bytes(frame) for frame in decoder.feed(memoryview(pack_length(1) + b"x" + pack_length(11)))] == [b"x"]
    assert decoder.error is not None and decoder.error.reason == "frame too large"


def test_a_greeting_is_judged_by_its_first_wrong_byte() -> None:
    whole = pack_greeting(2**63 - 1)
    assert len(whole) == GREETING_BYTES
    assert [read_greeting(whole[:size]) for size in range(GREETING_BYTES)] == [None] * GREETING_BYTES
    assert read_greeting(whole + b"more") == 2**63 - 1
    for data, reason in (
        (ZMTP[:1], "other transport"),
        (b"G", "not a node"),
        (whole[:10] + b"X", "not a node"),
        (whole.replace(b" 01 ", b" 02 "), "other protocol"),
        (whole[:-1] + b"G", "not a node"),
        (whole[:-16] + b"f" * 16, "not a node"),
    ):
        with pytest.raises(WireError) as caught:
            read_greeting(data)
        assert caught.value.reason == reason, data


# --- connections ---


def test_both_directions_go_over_the_connection_of_the_lower_instance(
    world: World, peers: Callable[..., TcpPeers]
) -> None:
    a, b = peers(1), peers(2)
    b.set_address(1, a.endpoint)
    send_until_taken(world, b, 1, [beat(1)])  # the higher one's own, until there is the other one
    receive_until(world, a, bool)
    a.set_address(2, b.endpoint)
    until(world, lambda: a._peers[2].own is a._peers[2].via and b._peers[1].own is not b._peers[1].via)
    for seq in range(10):
        assert a.send(2, [beat(seq)]) and b.send(1, [beat(seq)])
    assert len(receive_until(world, a, lambda got: len(got) == 10)) == 10
    assert len(receive_until(world, b, lambda got: len(got) == 10)) == 10
    a.forget(2)  # a's connection goes, and b sends over its own again
    until(world, lambda: b._peers[1].own is b._peers[1].via)
    assert b.send(1, [beat(11)])
    assert receive_until(world, a, bool) == [(2, [beat(11)])]


def test_a_peer_that_comes_back_is_connected_again(world: World, peers: Callable[..., TcpPeers]) -> None:
    a, b = peers(1), peers(2)
    port = port_of(b.endpoint)
    a.set_address(2, b.endpoint)
    for seq in range(5):
        send_until_taken(world, a, 2, [beat(seq)])
        receive_until(world, b, bool)
        b.close()
        until(world, lambda: not a.send(2, [beat(99)]))
        b = peers(2, port=port)
    send_until_taken(world, a, 2, [beat(9)])
    assert receive_until(world, b, bool)[0] == (1, [beat(9)])


def test_dialing_backs_off_and_tells_when_it_is_due(world: World, peers: Callable[..., TcpPeers]) -> None:
    now_us = [1_000_000]
    a = peers(1, clock_us=lambda: now_us[0])
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    a.set_address(2, f"tcp://127.0.0.1:{port}")
    waits_us = []
    for _ in range(8):
        until_refused = time.monotonic() + PATIENCE_S
        while a._peers[2].own is not None:
            assert time.monotonic() < until_refused
            world.poller.wait(2000)
        assert a.next_tend_us() <= a._peers[2].retry_us
        waits_us.append(a._peers[2].retry_us - now_us[0])
        now_us[0] = a._peers[2].retry_us
        a.tend(now_us[0])
    for wait_us, base_us in zip(waits_us, (50_000, 100_000, 200_000, 400_000, 800_000, *[1_000_000] * 3), strict=True):
        assert 0.7 * base_us < wait_us < 1.3 * base_us


def test_who_accepts_and_says_nothing_is_given_up_and_tried_again(world: World, peers: Callable[..., TcpPeers]) -> None:
    now_us = [0]
    a = peers(1, clock_us=lambda: now_us[0])
    with socket.create_server(("127.0.0.1", 0)) as silent:
        a.set_address(2, f"tcp://127.0.0.1:{silent.getsockname()[1]}")
        first, _ = silent.accept()
        with first:
            first.settimeout(PATIENCE_S)
            until(world, lambda: a._peers[2].own is not None and a._peers[2].own.is_connected)
            assert first.recv(100) == pack_greeting(1)
            assert not a.send(2, [beat(1)]) and not a.is_ready(2)
            now_us[0] = tcp.GREETING_US_MAX
            a.tend(now_us[0])
            assert a._peers[2].own is None
            now_us[0] = a._peers[2].retry_us
            a.tend(now_us[0])
            silent.settimeout(PATIENCE_S)
            silent.accept()[0].close()


def test_a_name_is_looked_up_without_holding_up_the_loop(
    world: World, peers: Callable[..., TcpPeers], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = peers(1), peers(2)
    go = threading.Event()
    real = socket.getaddrinfo

    def slow(host: str, *args: Any, **options: Any) -> Any:
        if host == "node-2.example.org" and not options["flags"]:
            assert go.wait(PATIENCE_S)
            host = "127.0.0.1"
        return real(host, *args, **options)

    monkeypatch.setattr(resolve.socket, "getaddrinfo", slow)
    a.set_address(2, f"tcp://node-2.example.org:{port_of(b.endpoint)}")
    a.set_address(3, b.endpoint)
    send_until_taken(world, a, 3, [beat(1)])  # another peer is reached meanwhile
    assert not a.send(2, [beat(1)])
    go.set()
    send_until_taken(world, a, 2, [beat(2)])


def test_a_name_that_does_not_exist_is_no_listening_address_and_no_exception(
    world: World, peers: Callable[..., TcpPeers], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(*args: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    a = peers(1)
    monkeypatch.setattr(resolve.socket, "getaddrinfo", unknown)
    with pytest.raises(ListenError, match="not known"):
        peers(2, host="nowhere.example.org")
    a.set_address(3, "tcp://nowhere.example.org:7400")
    until(world, lambda: "no address for tcp://nowhere.example.org:7400" in caplog.text)
    assert not a.send(3, [beat(1)])


# --- half-written frames ---


def test_a_frame_behind_a_half_written_one_waits_and_no_bytes_mix(world: World, peers: Callable[..., TcpPeers]) -> None:
    """As a beat out of a signal handler does: the rest of the former frame goes first."""
    a, b = peers(1), peers(2)
    a.set_address(2, b.endpoint)
    send_until_taken(world, a, 2, [beat(0)])
    receive_until(world, b, bool)
    sent = 0
    while a.is_flushed():  # until the kernel took only a part
        assert a.send(2, [bulk(1 << 20, sent)])
        sent += 1
    for seq in range(50):
        assert a.send(2, [beat(seq)])
        sent += 1
    got = receive_until(world, b, lambda received: len(received) == sent)
    assert [messages[0].seq for _, messages in got[-50:]] == list(range(50))
    assert [messages[0].stamp for _, messages in got[:-50]] == list(range(sent - 50))
    assert a.is_flushed()


def test_small_frames_have_places_of_their_own_in_a_queue_full_of_large_ones(
    world: World, peers: Callable[..., TcpPeers]
) -> None:
    a, b = peers(1, send_queue_frames_max=16, send_queue_bytes_max=3 << 20), peers(2)
    a.set_address(2, b.endpoint)
    send_until_taken(world, a, 2, [beat(0)])
    receive_until(world, b, bool)
    large = 0
    while a.send(2, [bulk(1 << 20, large)]):
        large += 1
    assert a.counters["dropped: queue full or peer away"]
    assert not a.send(2, [bulk(1 << 20)])
    small = 0
    while a.send(2, [beat(small)]):
        small += 1
    assert 8 <= small <= 16
    assert len(receive_until(world, b, lambda got: len(got) == large + small)) == large + small


def test_one_frame_may_be_larger_than_the_queue(world: World, peers: Callable[..., TcpPeers]) -> None:
    a, b = peers(1, send_queue_bytes_max=1000), peers(2)
    a.set_address(2, b.endpoint)
    send_until_taken(world, a, 2, [bulk(30 << 20)])
    ((_, (append,)),) = receive_until(world, b, bool)
    assert append.entries[0].data == bytes(30 << 20)


def test_frames_that_waited_for_a_lost_connection_are_counted(world: World, peers: Callable[..., TcpPeers]) -> None:
    a, b = peers(1), peers(2)
    a.set_address(2, b.endpoint)
    send_until_taken(world, a, 2, [beat(0)])
    while a.is_flushed():
        assert a.send(2, [bulk(1 << 20)])
    assert a.send(2, [beat(1)])
    b.close()
    until(world, lambda: a.counters["dropped: connection lost"])
    assert a.counters["dropped: connection lost"] == 2


def test_the_rest_of_a_full_inbox_is_left_in_the_kernel(world: World, peers: Callable[..., TcpPeers]) -> None:
    a, b = peers(1), peers(2)
    a.set_address(2, b.endpoint)
    send_until_taken(world, a, 2, [beat(0)])
    receive_until(world, b, bool)
    sent = 0
    while sent < 20_000 and a.send(2, [beat(sent)]):
        sent += 1
    for _ in range(20):
        world.turn(0)
    frames_at_once = tcp.RECEIVE_BYTES // len(encode_frame(FLEET, 1, 2, [beat(0)]))
    assert len(b._inbox) < tcp.INBOX_FRAMES_MAX + frames_at_once
    assert len(receive_until(world, b, lambda got: len(got) == sent)) == sent


# --- in a signal handler, and in a fork ---


def test_what_has_come_can_be_looked_at_while_the_poller_stands_still(
    world: World, peers: Callable[..., TcpPeers]
) -> None:
    a, b = peers(1), peers(2)
    a.set_address(2, b.endpoint)
    other_reader, other_writer = os.pipe()
    called: list[int] = []
    world.poller.register(other_reader, called.append)
    try:
        os.write(other_writer, b"x")
        give_up = time.monotonic() + PATIENCE_S
        while not a.send(2, [beat(1)]):  # connects, accepts and greets without a turn of the loop
            assert time.monotonic() < give_up
            a.look()
            b.look()
        while not (got := b.receive()):
            assert time.monotonic() < give_up
            b.look()
        assert got == [(1, [beat(1)])]
        assert not called
        world.poller.wait(0)
        assert called
    finally:
        world.poller.unregister(other_reader)
        os.close(other_reader)
        os.close(other_writer)


def test_a_forked_child_that_closes_its_copies_disturbs_no_connection(
    world: World, peers: Callable[..., TcpPeers]
) -> None:
    a, b = peers(1), peers(2)
    a.set_address(2, b.endpoint)
    send_until_taken(world, a, 2, [beat(0)])
    pid = os.fork()
    if pid == 0:
        os.closerange(3, 4096)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    for seq in range(1, 20):
        assert a.send(2, [beat(seq)])
    assert len(receive_until(world, b, lambda got: len(got) == 20)) == 20


# --- strangers ---


def test_a_frame_that_announces_100_mb_ends_its_connection(world: World, peers: Callable[..., TcpPeers]) -> None:
    b = peers(2)
    with dial(b) as stranger:
        frame = encode_frame(FLEET, 5, 2, [beat(5)])
        stranger.sendall(pack_greeting(5) + pack_length(len(frame)) + frame + pack_length(100 << 20))
        assert receive_until(world, b, bool) == [(5, [beat(5)])]
        assert read_all(world, stranger) == pack_greeting(2)
    assert b.counters["refused: frame too large"] == 1


def test_who_does_not_greet_in_time_is_closed(world: World, peers: Callable[..., TcpPeers]) -> None:
    now_us = [0]
    b = peers(2, clock_us=lambda: now_us[0])
    with dial(b) as stranger:
        stranger.sendall(pack_greeting(5)[:20])
        until(world, lambda: b.counters["bytes_received"] == 20)
        b.tend(tcp.GREETING_US_MAX)
        assert not b.counters["refused: not a node"]
        b.tend(tcp.GREETING_US_MAX + tcp.SWEEP_US + 1)
        assert b.counters["refused: not a node"] == 1
        assert read_all(world, stranger) == b""


def test_who_does_not_finish_a_frame_in_time_is_closed_however_it_trickles(
    world: World, peers: Callable[..., TcpPeers]
) -> None:
    b = peers(2, clock_us=lambda: 0)
    with dial(b) as stranger:
        stranger.sendall(pack_greeting(5) + pack_length(1000))
        sent_bytes = GREETING_BYTES + 4
        for seconds in range(1, 63):
            stranger.sendall(b"x")
            sent_bytes += 1
            until(world, lambda: b.counters["bytes_received"] == sent_bytes)  # noqa: B023
            assert not b.counters["refused: too slow"]
            b._sweep(seconds * 1_000_000)
        assert b.counters["refused: too slow"] == 1


def test_unfinished_frames_are_bounded_over_all_connections(world: World, peers: Callable[..., TcpPeers]) -> None:
    a, b = peers(1), peers(2, unfinished_bytes_max=100_000)
    a.set_address(2, b.endpoint)
    send_until_taken(world, a, 2, [beat(1)])
    strangers = [dial(b) for _ in range(5)]
    for number, stranger in enumerate(strangers):
        stranger.sendall(pack_greeting(5 + number) + pack_length(1 << 20) + bytes(20_000 + number))
    until(world, lambda: b.counters["refused: too slow"])
    assert b._unfinished_bytes <= 100_000
    send_until_taken(world, a, 2, [beat(2)])
    assert receive_until(world, b, lambda got: len(got) == 2) == [(1, [beat(1)]), (1, [beat(2)])]
    for stranger in strangers:
        stranger.close()
    until(world, lambda: b._unfinished_bytes == 0)


def test_connections_above_the_limit_are_turned_away(world: World, peers: Callable[..., TcpPeers]) -> None:
    b = peers(2, connections_max=2)
    kept = [dial(b), dial(b)]
    for stranger in kept:
        stranger.sendall(pack_greeting(5))
    until(world, lambda: b.counters["connections"] == 2)
    with dial(b) as third:
        assert read_all(world, third) == b""
    assert b.counters["refused: too many connections"] == 1
    kept.pop().close()
    until(world, lambda: b._accepted_count == 1)
    with dial(b) as fourth:
        fourth.sendall(pack_greeting(6))
        until(world, lambda: b.counters["connections"] == 3)
    kept.pop().close()


def test_a_stranger_that_uses_up_all_descriptors_is_turned_away(
    world: World, peers: Callable[..., TcpPeers], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = peers(1), peers(2)
    a.set_address(2, b.endpoint)
    send_until_taken(world, a, 2, [beat(1)])
    real, failures = b._listener, [OSError(errno.EMFILE, "none left")]

    class Listener:
        def accept(self) -> Any:
            if failures:
                raise failures.pop()
            return real.accept()

        def close(self) -> None:
            real.close()

    monkeypatch.setattr(b, "_listener", Listener())
    with dial(b) as stranger:
        assert read_all(world, stranger) == b""
    assert b.counters["refused: too many connections"] == 1
    assert a.send(2, [beat(2)])
    assert len(receive_until(world, b, lambda got: len(got) == 2)) == 2


def test_too_large_a_limit_of_ones_own_does_not_matter_to_others(world: World, peers: Callable[..., TcpPeers]) -> None:
    a, b = peers(1), peers(2, limits=FrameLimits(frame_bytes_max=1000))
    a.set_address(2, b.endpoint)
    send_until_taken(world, a, 2, [bulk(2000)])
    first = a._peers[2].own
    until(world, lambda: a._peers[2].own is not first)
    assert b.counters["refused: frame too large"] == 1
    send_until_taken(world, a, 2, [beat(1)])
    assert receive_until(world, b, bool) == [(1, [beat(1)])]


# --- the other transport ---


def test_zeromq_and_tcp_tell_each_other_apart_in_words(
    world: World,
    peers: Callable[..., TcpPeers],
    zmq_peers: Callable[..., PeerSockets],
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain, other = peers(1), zmq_peers(2)
    plain.set_address(2, other.endpoint)
    receive_until(world, other, counted(other, "refused: other transport"))
    until(world, lambda: plain.counters["refused: other transport"])
    assert f"{other.endpoint}: other transport" in caplog.text
    assert "a node that connected speaks plain TCP, this one ZeroMQ (--transport" in caplog.text
    caplog.clear()
    plain.forget(2)
    before = plain.counters["refused: other transport"]
    other.set_address(1, plain.endpoint)
    until(world, lambda: plain.counters["refused: other transport"] > before)
    assert "it began as ZeroMQ does (--transport" in caplog.text
    assert plain.receive() == [] == other.receive()

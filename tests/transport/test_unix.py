"""The node's Unix sockets: a real server and clients in one process, driven by one poller."""

from __future__ import annotations

import errno
import os
import random
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raftfleet.transport.errors import ListenError
from raftfleet.transport.poller import Poller
from raftfleet.transport.unix import UnixServer
from raftfleet.transport.unix_client import UnixChannel
from raftfleet.wire import ipc

PATIENCE_S = 60.0
CLIENT_ID = bytes(range(16))
HELLO = [0, ipc.HELLO, ipc.PROTOCOL, CLIENT_ID]
WELCOME = {"node": "n1", "role": "shard", "index": 0, "instance": 5, "workers": 2, "protocol": ipc.PROTOCOL}


@pytest.fixture
def poller() -> Iterator[Poller]:
    """A poller; afterwards no descriptor may be left."""
    before = os.listdir("/proc/self/fd")
    poller = Poller()
    yield poller
    poller.close()
    assert len(os.listdir("/proc/self/fd")) <= len(before)


@pytest.fixture
def serve(poller: Poller, tmp_path: Path) -> Iterator[Callable[..., UnixServer]]:
    """Makes servers at tmp_path/s.sock."""
    made = []

    def make(**options: Any) -> UnixServer:
        server = UnixServer(tmp_path / "s.sock", poller, lambda: WELCOME, **options)
        made.append(server)
        return server

    yield make
    for server in made:
        server.close()


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[..., socket.socket]]:
    """Makes bare connections to tmp_path/s.sock; with ``hello`` they have introduced themselves."""
    made = []

    def make(*, hello: bool = False) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE_S)
        sock.connect(str(tmp_path / "s.sock"))
        made.append(sock)
        if hello:
            sock.sendall(ipc.pack_frame([HELLO]))
        return sock

    yield make
    for sock in made:
        sock.close()


@pytest.fixture
def channel(poller: Poller, tmp_path: Path) -> Iterator[Callable[..., UnixChannel]]:
    """Makes channels to tmp_path/s.sock."""
    made = []

    def make(**options: Any) -> UnixChannel:
        channel = UnixChannel(tmp_path / "s.sock", CLIENT_ID, poller, **options)
        made.append(channel)
        return channel

    yield make
    for channel in made:
        channel.close()


def run_until(poller: Poller, done: Callable[[], Any], every: Callable[[], Any] = lambda: None) -> None:
    """Turn the loop until ``done``."""
    give_up = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < give_up
        poller.wait(10_000)
        every()


def read_frame(poller: Poller, sock: socket.socket, every: Callable[[], Any] = lambda: None) -> list[Any]:
    """Turn the loop until a whole frame has come to this client."""
    reader = ipc.FrameReader()
    frames: list[Any] = []
    sock.setblocking(False)

    def read() -> bool:
        try:
            frames.extend(reader.feed(sock.recv(65536)))
        except BlockingIOError:
            pass
        return bool(frames)

    run_until(poller, read, every)
    assert len(frames) == 1
    return frames[0]  # type: ignore[no-any-return]


def is_closed(sock: socket.socket) -> bool:
    """Whether the other side has ended the connection; what came before that is read away."""
    sock.setblocking(False)
    try:
        while sock.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        pass
    return True


def query(ident: int, arg: bytes = b"") -> list[Any]:
    return [ident, ipc.QUERY, "group", 0, 500, ipc.LINEARIZABLE, arg]


def test_requests_come_in_and_replies_go_out_in_one_frame(
    poller: Poller, serve: Callable[..., UnixServer], connect: Callable[..., socket.socket]
) -> None:
    server = serve()
    client = connect(hello=True)
    assert read_frame(poller, client) == [[0, ipc.OK, WELCOME]]
    assert server.receive() == []
    client.sendall(ipc.pack_frame([query(1), query(2)]) + ipc.pack_frame([query(3)]))
    received: list[Any] = []
    run_until(
        poller, lambda: sum(len(requests) for _, requests in received) == 3, lambda: received.extend(server.receive())
    )
    (ident,) = {ident for ident, _ in received}
    assert server.client_id(ident) == CLIENT_ID
    assert server.connection_ids() == [ident]
    assert [request for _, requests in received for request in requests] == [query(1), query(2), query(3)]
    assert server.send(ident, [[1, ipc.OK, b"one"]])
    assert server.send(ident, [[2, ipc.OK, b"two"], [3, ipc.OVERLOADED, "no"]])
    server.flush()
    assert read_frame(poller, client) == [[1, ipc.OK, b"one"], [2, ipc.OK, b"two"], [3, ipc.OVERLOADED, "no"]]


def test_requests_behind_hello_in_the_same_frame_are_served(
    poller: Poller, serve: Callable[..., UnixServer], connect: Callable[..., socket.socket]
) -> None:
    server = serve()
    connect().sendall(ipc.pack_frame([HELLO, query(1)]))
    received: list[Any] = []
    run_until(poller, lambda: received, lambda: received.extend(server.receive()))
    assert received[0][1] == [query(1)]


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "oversize"),
        (b"\xff" * 100, "oversize"),
        ((100 << 20).to_bytes(4, "big"), "oversize"),
        (b"\x00\x00\x00\x01\xc1", "garbage"),
        (b"\x00\x00\x00\x01\x80", "garbage"),
        (ipc.pack_frame([query(1)]), "no hello"),
        (ipc.pack_frame([HELLO, HELLO]), "request"),
        (ipc.pack_frame([HELLO]) * 2, "request"),
        (ipc.pack_frame([HELLO, [1, 77]]), "request"),
        (ipc.pack_frame([HELLO, [1, ipc.QUERY, 5]]), "request"),
        (ipc.pack_frame([[0, ipc.HELLO, 99, CLIENT_ID]]), "other protocol"),
        (ipc.pack_frame([[0, ipc.HELLO, ipc.PROTOCOL, b"short"]]), "request"),
    ],
)
def test_what_is_not_understood_ends_that_connection_alone(
    poller: Poller,
    serve: Callable[..., UnixServer],
    connect: Callable[..., socket.socket],
    sent: bytes,
    reason: str,
) -> None:
    server = serve()
    good, bad = connect(hello=True), connect()
    read_frame(poller, good)
    bad.sendall(sent)
    run_until(poller, lambda: is_closed(bad))
    assert server.counters[f"dropped: {reason}"] == 1, server.counters
    good.sendall(ipc.pack_frame([query(1)]))
    received: list[Any] = []
    run_until(poller, lambda: received, lambda: received.extend(server.receive()))
    assert received[0][1] == [query(1)]


def test_random_bytes_never_raise(
    poller: Poller, serve: Callable[..., UnixServer], connect: Callable[..., socket.socket]
) -> None:
    server = serve()
    rng = random.Random(5)
    for _ in range(100):
        client = connect(hello=rng.random() < 0.5)
        body = rng.randbytes(rng.randrange(1, 200))
        client.sendall(rng.choice([b"", len(body).to_bytes(4, "big")]) + body)
        client.shutdown(socket.SHUT_WR)
        run_until(poller, lambda client=client: is_closed(client), server.receive)  # type: ignore[misc]
        client.close()
    assert server.counters["connections"] == server.counters["closed"] == 100


def test_a_frame_that_comes_byte_by_byte_is_a_frame_and_one_that_stops_half_way_is_not(
    poller: Poller, serve: Callable[..., UnixServer], connect: Callable[..., socket.socket]
) -> None:
    ended: list[int] = []
    server = serve(on_disconnect=ended.append)
    slow, broken = connect(hello=True), connect(hello=True)
    received: list[Any] = []
    for byte in ipc.pack_frame([query(1)]):
        slow.sendall(bytes([byte]))
        poller.wait(10_000)
        received += server.receive()
    run_until(poller, lambda: received, lambda: received.extend(server.receive()))
    assert received[0][1] == [query(1)]
    broken.sendall(ipc.pack_frame([query(2)])[:-1])
    poller.wait(10_000)
    broken.close()
    run_until(poller, lambda: ended)
    assert server.receive() == []
    assert server.counters["dropped: connection lost"] == 1
    assert not server.send(ended[0], [[2, ipc.OK, b""]])
    assert server.client_id(ended[0]) is None


def test_a_client_that_does_not_read_is_slowed_down_then_dropped(
    poller: Poller, serve: Callable[..., UnixServer], connect: Callable[..., socket.socket]
) -> None:
    server = serve(output_bytes_max=4 << 20, output_pause_bytes=1 << 20)
    deaf, other = connect(hello=True), connect(hello=True)
    run_until(poller, lambda: len(server.connection_ids()) == 2)
    ident = server.connection_ids()[0]
    big = bytes(900_000)
    for number in (1, 2, 3):
        assert server.send(ident, [[number, ipc.OK, big]])
        server.flush()
    deaf.sendall(ipc.pack_frame([query(1)]))
    other.sendall(ipc.pack_frame([query(2)]))
    received: list[Any] = []
    run_until(poller, lambda: received, lambda: received.extend(server.receive()))
    poller.wait(10_000)
    received += server.receive()
    assert [requests for _, requests in received] == [[query(2)]]  # the deaf one is not listened to
    for number in (4, 5, 6):
        server.send(ident, [[number, ipc.OK, big]])
        server.flush()
    assert not server.send(ident, [[7, ipc.OK, big]])
    assert server.counters["dropped: does not read"] == 1
    assert len(server.connection_ids()) == 1


def test_a_slow_reader_gets_everything_and_is_heard_again(
    poller: Poller, serve: Callable[..., UnixServer], connect: Callable[..., socket.socket]
) -> None:
    server = serve(output_pause_bytes=100_000)
    client = connect(hello=True)
    read_frame(poller, client)
    (ident,) = server.connection_ids()
    big = bytes(3 << 20)
    server.send(ident, [[1, ipc.OK, big]])
    server.flush()
    client.sendall(ipc.pack_frame([query(2)]))
    assert read_frame(poller, client) == [[1, ipc.OK, big]]
    received: list[Any] = []
    run_until(poller, lambda: received, lambda: received.extend(server.receive()))
    assert received == [(ident, [query(2)])]


def test_silent_and_stuck_clients_are_swept(
    poller: Poller, serve: Callable[..., UnixServer], connect: Callable[..., socket.socket]
) -> None:
    server = serve(clock_us=lambda: 0)
    silent, stuck, idle = connect(), connect(hello=True), connect(hello=True)
    run_until(poller, lambda: len(server.connection_ids()) == 2)
    server.send(server.connection_ids()[0], [[1, ipc.OK, bytes(3 << 20)]])
    server.flush()
    server.sweep(9_000_000)
    assert server.counters["closed"] == 0
    server.sweep(11_000_000)
    assert server.counters["dropped: no hello"] == 1
    assert is_closed(silent)
    server.sweep(31_000_000)
    assert server.counters["dropped: does not read"] == 1
    assert len(server.connection_ids()) == 1
    assert not is_closed(idle)
    stuck.close()


def test_more_connections_than_the_limit_are_turned_away(
    poller: Poller, serve: Callable[..., UnixServer], connect: Callable[..., socket.socket]
) -> None:
    server = serve(connections_max=2)
    first, _second = connect(hello=True), connect(hello=True)
    run_until(poller, lambda: len(server.connection_ids()) == 2)
    third = connect()
    run_until(poller, lambda: is_closed(third))
    assert server.counters["dropped: too many connections"] == 1
    first.close()
    run_until(poller, lambda: len(server.connection_ids()) == 1)
    fourth = connect(hello=True)
    assert read_frame(poller, fourth) == [[0, ipc.OK, WELCOME]]


def test_a_process_without_descriptors_turns_clients_away_and_does_not_spin(
    poller: Poller,
    serve: Callable[..., UnixServer],
    connect: Callable[..., socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = serve()
    client = connect()

    class NoDescriptors:
        def __init__(self, listener: socket.socket) -> None:
            self.listener, self.refusals = listener, 1

        def accept(self) -> Any:
            if self.refusals:
                self.refusals -= 1
                raise OSError(errno.EMFILE, "too many open files")
            return self.listener.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.listener, name)

    monkeypatch.setattr(server, "_listener", NoDescriptors(server._listener))
    run_until(poller, lambda: is_closed(client))
    assert server.counters["dropped: too many connections"] == 1
    assert read_frame(poller, connect(hello=True)) == [[0, ipc.OK, WELCOME]]


def test_an_answer_that_cannot_be_packed_or_is_too_large_becomes_an_error_and_the_others_arrive(
    poller: Poller, serve: Callable[..., UnixServer], connect: Callable[..., socket.socket]
) -> None:
    server = serve()
    client = connect(hello=True)
    read_frame(poller, client)
    (ident,) = server.connection_ids()
    huge = bytes(ipc.FRAME_BYTES_MAX)
    server.send(ident, [[1, ipc.OK, b"a"], [2, ipc.OK, object()], [3, ipc.OK, huge], [4, ipc.OK, b"d"]])
    server.flush()
    reader = ipc.FrameReader()
    replies: list[Any] = []
    client.setblocking(True)
    while len(replies) < 4:
        for frame in reader.feed(client.recv(65536)):
            replies += frame
    assert [(ident, code) for ident, code, _ in replies] == [(1, 0), (2, 1), (3, 1), (4, 0)]


def test_the_socket_file_is_private_and_removed(serve: Callable[..., UnixServer], tmp_path: Path) -> None:
    server = serve(mode=0o660)
    assert stat.S_IMODE(os.stat(server.path).st_mode) == 0o660
    server.close()
    server.close()
    assert not os.path.exists(server.path)
    assert stat.S_IMODE(os.stat(serve().path).st_mode) == 0o600
    with pytest.raises(ListenError, match="no group"):
        UnixServer(tmp_path / "g.sock", Poller(), lambda: WELCOME, group="no-such-group-here")
    assert not (tmp_path / "g.sock").exists()


def test_a_leftover_socket_is_replaced_and_a_living_one_is_not(
    serve: Callable[..., UnixServer], tmp_path: Path
) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "s.sock"))
    dead.close()
    serve()
    with pytest.raises(ListenError, match="another process") as caught:
        serve()
    assert caught.value.errno == errno.EADDRINUSE


def test_a_file_that_is_no_socket_is_left_alone(serve: Callable[..., UnixServer], tmp_path: Path) -> None:
    (tmp_path / "s.sock").write_text("mine")
    with pytest.raises(ListenError, match="not a socket"):
        serve()
    assert (tmp_path / "s.sock").read_text() == "mine"


def test_too_long_a_path_says_what_to_do(poller: Poller, tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="shorter run dir"):
        UnixServer(tmp_path / ("x" * 120), poller, lambda: WELCOME)


# --- the channel ---


class Answers:
    """Collects what callbacks are told."""

    def __init__(self) -> None:
        self.got: list[tuple[int, Any]] = []

    def __call__(self, code: int, body: Any) -> None:
        self.got.append((code, body))


def answer_all(server: UnixServer) -> None:
    """Answer each request with its own fields."""
    for ident, requests in server.receive():
        server.send(ident, [[request[0], ipc.OK, request[2:]] for request in requests])
    server.flush()


def test_a_channel_asks_and_is_answered(
    poller: Poller, serve: Callable[..., UnixServer], channel: Callable[..., UnixChannel]
) -> None:
    server = serve()
    ups: list[Any] = []
    pushes: list[Any] = []
    answers = Answers()
    client = channel(on_up=ups.append, on_push=pushes.append)
    client.call("method", {"a": 1}, 500, 0, answers)  # before there is a connection
    client.tick(0)
    run_until(poller, lambda: answers.got, lambda: answer_all(server))
    assert answers.got == [(ipc.OK, ["method", {"a": 1}, 500])]
    assert ups == [WELCOME] and client.welcome == WELCOME and client.is_up
    for number in range(10):
        client.call("method", {"number": number}, 500, 0, answers)
    client.flush()
    run_until(poller, lambda: len(answers.got) == 11, lambda: answer_all(server))
    assert [body[1]["number"] for _, body in answers.got[1:]] == list(range(10))
    server.send(server.connection_ids()[0], [[0, ipc.PUSH, ["fleet", 5, []]]])
    server.flush()
    run_until(poller, lambda: pushes)
    assert pushes == [["fleet", 5, []]]


def test_what_was_never_written_is_unanswered_and_what_was_is_unknown(
    poller: Poller, serve: Callable[..., UnixServer], channel: Callable[..., UnixChannel]
) -> None:
    answers = Answers()
    client = channel()
    client.call("method", {}, 500, 0, answers)
    client.tick(0)
    assert client.next_deadline_us() == 10_000  # nobody listens: try again
    client.tick(599_999)
    assert answers.got == []
    client.tick(600_000)
    assert answers.got[0][0] == ipc.UNANSWERED
    server = serve()
    client.call("method", {}, 500, 1_000_000, answers)
    run_until(poller, server.receive, lambda: client.tick(1_000_000))
    client.tick(1_600_000)
    assert answers.got[1][0] == ipc.OUTCOME_UNKNOWN


def test_a_broken_connection_answers_what_was_written_and_is_made_again(
    poller: Poller, serve: Callable[..., UnixServer], channel: Callable[..., UnixChannel]
) -> None:
    now_us = [0]
    ups: list[Any] = []
    downs: list[str] = []
    answers = Answers()
    server = serve()
    client = channel(on_up=ups.append, on_down=downs.append)

    def tick() -> None:
        now_us[0] += 5_000
        client.tick(now_us[0])

    run_until(poller, lambda: ups, tick)
    client.call("method", {}, 60_000, now_us[0], answers)
    run_until(poller, server.receive, tick)
    server.close()
    run_until(poller, lambda: answers.got, tick)
    assert answers.got[0][0] == ipc.OUTCOME_UNKNOWN
    assert len(downs) == 1 and not client.is_up
    client.call("method", {}, 60_000, now_us[0], answers)
    server = serve()

    def both() -> None:
        tick()
        answer_all(server)

    run_until(poller, lambda: len(answers.got) == 2, both)
    assert answers.got[1] == (ipc.OK, ["method", {}, 60_000])
    assert len(ups) == 2


def test_a_request_made_after_the_flush_does_not_wait_for_anything_else(
    poller: Poller, serve: Callable[..., UnixServer], channel: Callable[..., UnixChannel]
) -> None:
    server = serve()
    client = channel()
    run_until(poller, lambda: client.is_up, lambda: client.tick(0))
    assert client.next_deadline_us() is None
    client.call("method", {}, 500, 0)
    assert client.next_deadline_us() == 0
    client.tick(0)
    assert client.next_deadline_us() == 600_000
    run_until(poller, server.receive)


def test_back_off_doubles_up_to_a_second(channel: Callable[..., UnixChannel]) -> None:
    client = channel()
    now_us, waits = 0, []
    for _ in range(10):
        client.tick(now_us)
        next_us = client.next_deadline_us()
        assert next_us is not None
        waits.append(next_us - now_us)
        now_us = next_us
    assert waits == [10_000 * 2**n for n in range(7)] + [1_000_000] * 3


def test_a_full_or_closed_channel_says_so_at_once(channel: Callable[..., UnixChannel]) -> None:
    answers = Answers()
    client = channel(waiting_max=2)
    for _ in range(3):
        client.call("method", {}, 500, 0, answers)
    assert answers.got == []  # never from within call
    client.tick(0)
    assert [code for code, _ in answers.got] == [ipc.OVERLOADED]
    client.close()
    client.call("method", {}, 500, 0, answers)
    assert client.next_deadline_us() == 0
    client.tick(0)
    assert [code for code, _ in answers.got[1:]] == [ipc.UNANSWERED] * 3
    assert client.next_deadline_us() is None


def test_a_request_that_cannot_be_packed_is_refused_alone(
    poller: Poller, serve: Callable[..., UnixServer], channel: Callable[..., UnixChannel]
) -> None:
    server = serve()
    bad, large, good = Answers(), Answers(), Answers()
    client = channel()
    client.call("method", {"a": object()}, 500, 0, bad)
    client.call("method", {"a": bytes(ipc.FRAME_BYTES_MAX)}, 500, 0, large)
    client.call("method", {}, 500, 0, good)

    def both() -> None:
        client.tick(0)
        answer_all(server)

    run_until(poller, lambda: bad.got and large.got and good.got, both)
    assert [bad.got[0][0], large.got[0][0], good.got[0][0]] == [ipc.BAD_REQUEST, ipc.TOO_LARGE, ipc.OK]


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff" * 100,
        b"\x00\x00\x00\x01\xc1",
        ipc.pack_frame([[0, ipc.REFUSED, "no"]]),
        ipc.pack_frame([[0, ipc.OK, "not a map"]]),
        ipc.pack_frame([["id", 0, 0]]),
        ipc.pack_frame([[0, ipc.PUSH, []]]),
    ],
)
def test_a_server_that_makes_no_sense_is_left_and_tried_again(
    poller: Poller, channel: Callable[..., UnixChannel], tmp_path: Path, sent: bytes
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.sock"))
        listener.listen()
        client = channel()
        client.tick(0)
        with listener.accept()[0] as server:
            server.sendall(sent)
            run_until(poller, lambda: is_closed(server))
        client.tick(1_000_000)
        client.tick(2_000_000)
        listener.accept()[0].close()


def test_a_server_that_does_not_answer_hello_is_left(
    poller: Poller, channel: Callable[..., UnixChannel], tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.sock"))
        listener.listen()
        client = channel()
        client.tick(0)
        assert client.next_deadline_us() == 5_000_000
        client.tick(5_000_000)
        with listener.accept()[0] as server:
            assert is_closed(server)


def test_requests_given_up_while_there_is_no_connection_are_forgotten(channel: Callable[..., UnixChannel]) -> None:
    client = channel()
    for second in range(200):
        client.call("method", {}, 0, second * 1_000_000)
        client.tick(second * 1_000_000 + 200_000)
    assert len(client._to_write) <= 18

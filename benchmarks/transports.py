"""What the way of one command costs without what it carries: over ZeroMQ, and over bare TCP.

    python benchmarks/transports.py [--seconds 3] [--rounds 3]

Four processes in the shape of a replicated command, and nothing of Raft: a client writes 64 bytes to a leader's Unix
socket; the leader sends them to two followers; each sends them back; at the first answer the leader answers the client.
The loops are those of a worker: one epoll, non-blocking sockets, ZeroMQ's descriptor drained until EVENTS is empty.
TCP comes with a connection for each direction, and with one for both, as between nodes without keys. Rounds of the
transports and of the bare pyzmq echo alternate. What a real command takes beyond this is raftfleet's
own; what this takes over ZeroMQ beyond bare TCP is the hand-over to ZeroMQ's thread and back, at each hop.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import zmq

MESSAGE = bytes(64)
FOLLOWER_COUNT = 2
TRANSPORTS = ("ZeroMQ", "TCP", "TCP, both ways")


class ZmqLink:
    """One end of the link between leader and follower: a ROUTER to receive, a DEALER to send, as in a node."""

    def __init__(self) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.port = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.fd = int(self.router.get(zmq.FD))
        self.dealers: list[Any] = []

    def connect(self, port: int) -> None:
        dealer = self.context.socket(zmq.DEALER)
        dealer.connect(f"tcp://127.0.0.1:{port}")
        self.dealers.append(dealer)

    def send(self) -> None:
        for dealer in self.dealers:
            dealer.send(MESSAGE, zmq.NOBLOCK)

    def receive(self) -> int:
        count = 0
        while self.router.get(zmq.EVENTS) & zmq.POLLIN:
            self.router.recv(zmq.NOBLOCK)
            self.router.recv(zmq.NOBLOCK)
            count += 1
        return count


class TcpLink:
    """The same over one TCP connection each way."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.poller = select.epoll()
        self.fd = self.poller.fileno()
        self.outgoing: list[socket.socket] = []
        self.incoming: dict[int, socket.socket] = {}

    def connect(self, port: int) -> None:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.outgoing.append(connection)

    def accept(self) -> None:
        connection, _ = self.listener.accept()
        connection.setblocking(False)
        self.incoming[connection.fileno()] = connection
        self.poller.register(connection, select.EPOLLIN)

    def send(self) -> None:
        for connection in self.outgoing:
            connection.send(MESSAGE)

    def receive(self) -> int:
        return sum(len(self.incoming[fd].recv(65536)) // len(MESSAGE) for fd, _ in self.poller.poll(0))


class PairLink(TcpLink):
    """The same over one connection for both directions: the leader connects."""

    def connect(self, port: int) -> None:
        super().connect(port)
        self._read_too(self.outgoing[-1])

    def accept(self) -> None:
        super().accept()
        connection = list(self.incoming.values())[-1]
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.outgoing.append(connection)

    def _read_too(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.incoming[connection.fileno()] = connection
        self.poller.register(connection, select.EPOLLIN)


LINKS: dict[str, Any] = dict(zip(TRANSPORTS, (ZmqLink, TcpLink, PairLink), strict=True))


def fork(body: Callable[[], None]) -> int:
    """Run ``body`` in a process of its own, which ends with its parent's SIGKILL."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(0)
    return pid


def measure_echo(seconds: float) -> float:
    """The median round trip in µs of one message between a DEALER and a ROUTER, each in a process of its own."""
    port_reader, port_writer = os.pipe()
    result_reader, result_writer = os.pipe()

    def serve() -> None:
        router = zmq.Context().socket(zmq.ROUTER)
        os.write(port_writer, router.bind_to_random_port("tcp://127.0.0.1").to_bytes(2, "big"))
        while True:
            router.send_multipart(router.recv_multipart())

    def ask() -> None:
        dealer = zmq.Context().socket(zmq.DEALER)
        dealer.connect(f"tcp://127.0.0.1:{int.from_bytes(os.read(port_reader, 2), 'big')}")
        latencies_s = []
        end_s = time.perf_counter() + seconds
        while (began_s := time.perf_counter()) < end_s:
            dealer.send(MESSAGE)
            dealer.recv()
            latencies_s.append(time.perf_counter() - began_s)
        os.write(result_writer, str(statistics.median(latencies_s) * 1e6).encode())

    server, client = fork(serve), fork(ask)
    try:
        return float(os.read(result_reader, 64))
    finally:
        for pid in (server, client):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for descriptor in (port_reader, port_writer, result_reader, result_writer):
            os.close(descriptor)


def measure(transport: str, seconds: float, path: str) -> tuple[float, dict[str, float]]:
    """The median round trip in µs, and µs of CPU per command by role."""
    ports = [os.pipe() for _ in range(FOLLOWER_COUNT)]
    back = [os.pipe() for _ in range(FOLLOWER_COUNT)]

    link_of = LINKS[transport]
    is_pair = link_of is PairLink

    def follower(number: int) -> None:
        link = link_of()
        os.write(ports[number][1], link.port.to_bytes(2, "big"))
        port = int.from_bytes(os.read(back[number][0], 2), "big")
        if not is_pair:
            link.connect(port)
        if transport != "ZeroMQ":
            link.accept()
        poller = select.epoll()
        poller.register(link.fd, select.EPOLLIN)
        while True:
            for _ in range(link.receive()):
                link.send()
            poller.poll()

    def leader() -> None:
        link = link_of()
        for number in range(FOLLOWER_COUNT):
            link.connect(int.from_bytes(os.read(ports[number][0], 2), "big"))
            os.write(back[number][1], link.port.to_bytes(2, "big"))
            if transport == "TCP":
                link.accept()
        server = socket.socket(socket.AF_UNIX)
        server.bind(path)
        server.listen()
        client, _ = server.accept()
        client.setblocking(False)
        poller = select.epoll()
        poller.register(link.fd, select.EPOLLIN)
        poller.register(client, select.EPOLLIN)
        answers = 0
        while True:
            for fd, _ in poller.poll():
                if fd == client.fileno():
                    client.recv(65536)
                    link.send()
            for _ in range(link.receive()):
                answers += 1
                if answers % FOLLOWER_COUNT == 1:
                    client.send(MESSAGE)

    pids = {"leader": [fork(leader)], "followers": [fork(lambda n=n: follower(n)) for n in range(FOLLOWER_COUNT)]}
    try:
        return _ask(path, seconds, {role: [psutil.Process(pid) for pid in some] for role, some in pids.items()})
    finally:
        for pid in [pid for some in pids.values() for pid in some]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for descriptor in [one for pipe in ports + back for one in pipe]:
            os.close(descriptor)
        Path(path).unlink(missing_ok=True)


def _ask(path: str, seconds: float, roles: dict[str, list[psutil.Process]]) -> tuple[float, dict[str, float]]:
    deadline_s = time.monotonic() + 20
    with socket.socket(socket.AF_UNIX) as client:
        while client.connect_ex(path):
            assert time.monotonic() < deadline_s, "the leader does not listen"
            time.sleep(0.01)
        for _ in range(500):
            client.send(MESSAGE)
            client.recv(65536)
        before = {role: _cpu_s(some) for role, some in roles.items()}
        latencies_s = []
        end_s = time.perf_counter() + seconds
        while (began_s := time.perf_counter()) < end_s:
            client.send(MESSAGE)
            client.recv(65536)
            latencies_s.append(time.perf_counter() - began_s)
        count = len(latencies_s)
        cpu_us = {role: (_cpu_s(some) - before[role]) * 1e6 / count for role, some in roles.items()}
    return statistics.median(latencies_s) * 1e6, cpu_us


def _cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def main() -> None:
    """Print both transports' figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="per transport and round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, dict[str, float]]]] = {transport: [] for transport in TRANSPORTS}
    echo_us = []
    with tempfile.TemporaryDirectory(prefix="rf-") as folder:
        for _ in range(arguments.rounds):
            echo_us.append(measure_echo(arguments.seconds))
            for transport in TRANSPORTS:
                found[transport].append(measure(transport, arguments.seconds, f"{folder}/leader.sock"))
    echo_p50_us = statistics.median(echo_us)
    print(f"bare pyzmq echo: p50 {echo_p50_us:.0f} µs")
    for transport, rows in found.items():
        p50_us = statistics.median(row[0] for row in rows)
        cpu = ", ".join(f"{role} {statistics.median(row[1][role] for row in rows):.0f}" for role in rows[0][1])
        print(f"{transport}: p50 {p50_us:.0f} µs, {p50_us / echo_p50_us:.2f} × the echo; µs of CPU per command: {cpu}")


if __name__ == "__main__":
    sys.exit(main())

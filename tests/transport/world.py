"""What the tests of both transports share: one loop for all sides, and strangers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import zmq

from raftfleet.core import messages as m
from raftfleet.transport.base import Peers
from raftfleet.transport.poller import Poller
from raftfleet.wire.stream import pack_greeting, pack_length

FLEET = bytes(range(16))
OTHER_FLEET = bytes(reversed(range(16)))
PATIENCE_S = 60.0


def beat(seq: int) -> m.Beat:
    return m.Beat(m.BEAT, seq, 7, 8)


class World:
    """Some peers on loopback, all driven by one loop, as each of them would be by its own."""

    def __init__(self) -> None:
        self.poller = Poller()
        self.made: list[Peers[Any]] = []

    def turn(self, timeout_us: int = 2000) -> None:
        self.poller.wait(timeout_us)
        for sockets in self.made:
            sockets.tend(sockets._clock_us())

    def close(self) -> None:
        for sockets in self.made:
            sockets.close()
        self.poller.close()


class Stranger:
    """Somebody who speaks the transport and sends what it likes."""

    def __init__(self, transport: str, endpoint: str, raw: Callable[..., zmq.Socket[bytes]]) -> None:
        self._zmq = raw(endpoint) if transport == "zeromq" else None
        self._tcp: socket.socket | None = None
        if transport == "tcp":
            self._tcp = socket.create_connection(("127.0.0.1", port_of(endpoint)), timeout=PATIENCE_S)
            self._tcp.sendall(pack_greeting(5))

    def send(self, frame: bytes) -> None:
        if self._zmq is not None:
            self._zmq.send(frame)
        if self._tcp is not None:
            self._tcp.sendall(pack_length(len(frame)) + frame)

    def close(self) -> None:
        if self._tcp is not None:
            self._tcp.close()


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def send_until_taken(world: World, sender: Peers[Any], instance: int, messages: list[Any]) -> None:
    """A connection takes a moment; until it is there, sends are refused."""
    give_up = time.monotonic() + PATIENCE_S
    while not sender.send(instance, messages):
        assert time.monotonic() < give_up, ("never connected", sender.counters)
        world.turn()


def receive_until(world: World, receiver: Peers[Any], done: Callable[[list[Any]], bool]) -> list[Any]:
    """Receive by the rules (take all, then wait to be woken) until ``done``."""
    received: list[Any] = []
    give_up = time.monotonic() + PATIENCE_S
    while True:
        received += receiver.receive()
        if done(received):
            return received
        assert time.monotonic() < give_up, (received, receiver.counters)
        world.turn(0 if receiver.is_woken or receiver.pending() else 100_000)


def counted(receiver: Peers[Any], name: str, count: int = 1) -> Callable[[list[Any]], bool]:
    return lambda _received: receiver.counters[name] >= count

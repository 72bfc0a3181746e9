"""Peers on loopback, over either transport."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from transport.world import FLEET, PATIENCE_S, Stranger, World

from raftfleet.transport.base import Peers
from raftfleet.transport.choose import open_peers
from raftfleet.transport.peers import PeerSockets


@pytest.fixture
def world() -> Iterator[World]:
    """Closes what was made, and finds descriptors and threads that stay behind."""
    fds_before, threads_before = set(os.listdir("/proc/self/fd")), set(os.listdir("/proc/self/task"))
    made = World()
    yield made
    made.close()
    assert len(set(os.listdir("/proc/self/fd"))) <= len(fds_before)
    give_up = time.monotonic() + PATIENCE_S
    while not set(os.listdir("/proc/self/task")) <= threads_before:  # a thread that was joined may still be listed
        assert time.monotonic() < give_up, "a thread stays behind"
        time.sleep(0.001)


@pytest.fixture(params=["zeromq", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def peers(world: World, transport: str) -> Callable[..., Peers[Any]]:
    """Makes peers on loopback, in FLEET."""

    def make(instance: int, *, port: int = 0, fleet: bytes = FLEET, **options: Any) -> Peers[Any]:
        sockets = open_peers(transport, instance, "127.0.0.1", port, world.poller, **options)
        sockets.set_fleet(fleet)
        world.made.append(sockets)
        return sockets

    return make


@pytest.fixture
def zmq_peers(world: World) -> Callable[..., PeerSockets]:
    """The same, over ZeroMQ."""

    def make(instance: int, *, port: int = 0, fleet: bytes = FLEET, **options: Any) -> PeerSockets:
        sockets = PeerSockets(instance, "127.0.0.1", port, world.poller, **options)
        sockets.set_fleet(fleet)
        world.made.append(sockets)
        return sockets

    return make


@pytest.fixture
def raw() -> Iterator[Callable[..., zmq.Socket[bytes]]]:
    """Makes bare DEALERs that are connected to an endpoint: strangers."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def make(endpoint: str, **options: Any) -> zmq.Socket[bytes]:
        dealer = context.socket(zmq.DEALER)
        dealer.set(zmq.LINGER, 0)
        for name, value in options.items():
            dealer.set(getattr(zmq, name), value)
        dealer.connect(endpoint)
        return dealer

    yield make
    context.destroy(linger=0)


@pytest.fixture
def stranger(transport: str, raw: Callable[..., zmq.Socket[bytes]]) -> Iterator[Callable[[str], Stranger]]:
    made = []

    def make(endpoint: str) -> Stranger:
        made.append(Stranger(transport, endpoint, raw))
        return made[-1]

    yield make
    for one in made:
        one.close()

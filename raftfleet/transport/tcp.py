"""Frames between nodes over plain TCP, written and read by the loop itself.

The transport of nodes without CURVE keys. What it promises is said in :mod:`raftfleet.transport.base`, what the bytes
are in :mod:`raftfleet.wire.stream`. ZeroMQ hands every frame to a thread of its own and is woken by it for every frame
that comes: two more wake-ups at each hop. Here a frame goes from ``send`` into the kernel, and epoll says what came.

Connections:

* Each side connects to each instance whose address it knows, and tries again with back-off (50 ms, doubled up to 1 s,
  with jitter) for as long as it knows it.
* So there may be two connections between two processes. Frames are taken from both; they are sent over the one that the
  lower instance made, if it is there. Both sides come to the same choice, so that in both directions one connection
  carries the acknowledgements along (measured: 45 µs instead of 51 for what a command does, and a sixth less CPU), and
  the other one stands by. Frames may overtake each other when the choice changes.
* A connection is used when both greetings have come. What is no greeting ends it, with a reason in the log.
* A frame that the kernel does not take whole stays here, and what comes after it queues behind it: up to
  ``SEND_QUEUE_BYTES_MAX``, then frames are dropped, never parts of one. Small ones (beats are) may still be added, so
  that bulk on a slow line does not look like death.
* The kernel holds little that it cannot send yet (``TCP_NOTSENT_LOWAT``), so that a beat is not behind megabytes.
* Half-open connections: data that is not acknowledged for ``PEER_GONE_MS``, or, on a silent connection, keep-alives.

Strangers: connections are bounded, each must greet and finish its frames in time, and what is unfinished is bounded
over all of them. A connection that breaks a rule is closed; the loop goes on.

All of it belongs to one thread. A signal handler may call :meth:`TcpPeers.look`, ``receive``, ``send`` and ``tend`` if
no call of these is on the stack below it: a frame that is half written then waits in its queue, with others behind it.

More counters than the base's: ``connections``; ``dropped: connection lost`` (frames that waited in it); ``refused: not
a node | too many connections | too slow``.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import random
import socket
from collections import deque
from typing import Any

from raftfleet.transport.base import HINT, NEVER_US, PEER_GONE_MS, Peers, is_endpoint, split_endpoint
from raftfleet.transport.errors import ListenError
from raftfleet.transport.poller import READ, WRITE, Poller
from raftfleet.transport.resolve import Lookup
from raftfleet.wire.errors import WireError
from raftfleet.wire.stream import (
    GREETING_BYTES,
    StreamDecoder,
    pack_greeting,
    pack_length,
    read_greeting,
)

CONNECTIONS_MAX = 8192
"""That others made. A fleet of a thousand nodes with four shards each makes 4,000."""
RECEIVE_BYTES = 64 << 10
READS_MAX = 16
"""A connection that has more than these reads waits for the next turn, behind the others."""
INBOX_FRAMES_MAX = 1024
"""While so many frames wait for the loop nothing more is read: TCP pushes back."""
SEND_QUEUE_BYTES_MAX = 4 << 20
"""At 100 Mbit/s a third of a second, which an election timeout of a second can bear."""
SMALL_FRAME_BYTES = 1024
NOTSENT_BYTES = 256 << 10
UNFINISHED_BYTES_MAX = 256 << 20
"""Of frames that have begun to come, over all connections. A frame has up to 32 MiB."""
CONNECT_US_MAX = 2_000_000
GREETING_US_MAX = 5_000_000
FRAME_US_MAX = 60_000_000
"""For 32 MiB that is half a megabyte a second."""
RETRY_US_MIN = 50_000
RETRY_US_MAX = 1_000_000
STABLE_US = 1_000_000
"""A connection that lasted for less does not reset the back-off."""
LOOKUP_US = 10_000
SWEEP_US = 1_000_000
KEEPALIVE_S = 10

logger = logging.getLogger(__name__)


class _Connection:
    """A socket and what is under way in it. ``peer`` is set where this side connected."""

    __slots__ = (
        "began_us",
        "decoder",
        "events",
        "fd",
        "frame_us",
        "greeting",
        "instance",
        "is_connected",
        "output",
        "output_bytes",
        "peer",
        "sock",
        "unfinished_bytes",
        "where",
    )

    def __init__(self, sock: socket.socket, where: str, now_us: int, peer: _Peer | None) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.where = where
        self.peer = peer
        self.began_us = now_us
        self.is_connected = peer is None
        self.events = READ if peer is None else READ | WRITE
        self.greeting: bytearray | None = bytearray()  # None: the other side's has come, and ours was sent
        self.instance = 0
        self.decoder: StreamDecoder | None = None
        self.output: deque[bytes | memoryview] = deque()  # the first one may be the rest of a frame
        self.output_bytes = 0
        self.unfinished_bytes = 0
        self.frame_us = 0  # since when a frame has been unfinished, by the sweeps; 0: it is not


class _Peer:
    """An instance with an address. ``via`` is the connection that its frames go over, if there is one."""

    __slots__ = ("address_turn", "backoff_us", "endpoint", "instance", "lookup", "own", "retry_us", "via")

    def __init__(self, instance: int, endpoint: str) -> None:
        self.instance = instance
        self.endpoint = endpoint
        self.own: _Connection | None = None  # connecting, greeting or up
        self.via: _Connection | None = None
        self.lookup: Lookup | None = None
        self.address_turn = 0
        self.retry_us = 0
        self.backoff_us = RETRY_US_MIN


class TcpPeers(Peers[_Peer]):
    """All TCP sockets to and from other nodes of one process.

    Args:
        host, port: where it listens. Port 0: any; see :attr:`endpoint`.
        poller: where the descriptors are registered; its ``wait`` reads.
        options: those of :class:`~raftfleet.transport.base.Peers`.

    Raises:
        ListenError: the address is taken or is not ours.
    """

    def __init__(
        self,
        instance: int,
        host: str,
        port: int,
        poller: Poller,
        *,
        connections_max: int = CONNECTIONS_MAX,
        send_queue_bytes_max: int = SEND_QUEUE_BYTES_MAX,
        unfinished_bytes_max: int = UNFINISHED_BYTES_MAX,
        **options: Any,
    ) -> None:
        super().__init__(instance, logger=logger, **options)
        self.is_woken = False
        self._poller = poller
        self._connections_max = connections_max
        self._send_queue_bytes_max = send_queue_bytes_max
        self._unfinished_bytes_max = unfinished_bytes_max
        self._unfinished_bytes = 0
        self._random = random.Random()
        self._greeting = pack_greeting(instance)
        self._buffer = memoryview(
            bytearray(RECEIVE_BYTES)
        )  # of all connections: a frame is decoded before the next read
        self._inbox: list[tuple[int, list[Any]]] = []
        self._connections: dict[int, _Connection] = {}  # by descriptor
        self._accepted_count = 0
        self._greeted: dict[int, _Connection] = {}  # instance -> the last connection that it made to us
        self._dialing: dict[int, _Peer] = {}  # those with no connection of ours, or one that is not up yet
        self._tend_us = NEVER_US
        self._sweep_us = 0
        self._listener, self.endpoint = _listen(host, port)
        self._listener_fd = self._listener.fileno()
        # Held back for the moment when the process is out of descriptors: without one to spare, the connection that
        # cannot be accepted could not be refused either, and epoll would report it for ever.
        self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        poller.register(self._listener_fd, self._accept)

    # --- addresses ---

    def set_address(self, instance: int, endpoint: str, public_key: str = "") -> bool:
        present = self._peers.get(instance)
        if present is not None and present.endpoint == endpoint:
            return True
        if not is_endpoint(endpoint):
            self._refuse("bad address", "%r", endpoint[:200])
            return False
        if present is not None:
            self.forget(instance)
        peer = self._peers[instance] = self._dialing[instance] = _Peer(instance, endpoint)
        self._choose(instance)
        self._dial(peer, self._clock_us())
        return True

    def forget(self, instance: int) -> None:
        peer = self._peers.pop(instance, None)
        self._dialing.pop(instance, None)
        if peer is not None and peer.own is not None:
            self._close(peer.own)

    def address(self, instance: int) -> str | None:
        peer = self._peers.get(instance)
        return peer.endpoint if peer is not None else None

    def is_ready(self, instance: int) -> bool:
        peer = self._peers.get(instance)
        return peer is not None and peer.via is not None and self._has_room(peer.via, SMALL_FRAME_BYTES + 1)

    # --- frames ---

    def _put(self, instance: int, peer: _Peer, frame: bytes) -> bool:
        connection = peer.via
        if connection is None:
            self.counters["dropped: queue full or peer away"] += 1
            return False
        data = pack_length(len(frame)) + frame
        if connection.output:
            if not self._has_room(connection, len(data)):
                self.counters["dropped: queue full or peer away"] += 1
                return False
            connection.output.append(data)
            connection.output_bytes += len(data)
        else:
            try:
                written_bytes = connection.sock.send(data)
            except (BlockingIOError, InterruptedError):
                written_bytes = 0
            except OSError as error:
                self._lost(connection, str(error))
                return self._put(instance, peer, frame)  # over the other connection, if there is one
            if written_bytes < len(data):
                connection.output.append(memoryview(data)[written_bytes:])
                connection.output_bytes = len(data) - written_bytes
                self._listen_for(connection, READ | WRITE)
        counters = self.counters
        counters["frames_sent"] += 1
        counters["bytes_sent"] += len(data)
        return True

    def _has_room(self, connection: _Connection, size_bytes: int) -> bool:
        """Whether a frame may queue: the last quarter of the places is for small ones."""
        count = len(connection.output)
        if size_bytes <= SMALL_FRAME_BYTES or not count:
            return count < self._send_queue_frames_max
        is_short = count < self._send_queue_frames_max - self._send_queue_frames_max // 4
        return is_short and connection.output_bytes + size_bytes <= self._send_queue_bytes_max

    def receive(self, budget_frames: int = 1024) -> list[tuple[int, list[Any]]]:
        received = self._inbox
        if len(received) <= budget_frames:
            if received:
                self._inbox = []
            self.is_woken = False
            return received
        self._inbox = received[budget_frames:]
        return received[:budget_frames]

    def pending(self) -> bool:
        return bool(self._inbox)

    def look(self) -> None:
        self._poller.look(_Owned(self._connections, self._listener_fd))

    def is_flushed(self) -> bool:
        return not any(connection.output for connection in self._connections.values())

    # --- connecting ---

    def tend(self, now_us: int) -> list[int]:
        if now_us >= self._tend_us:
            self._tend_us = NEVER_US
            for peer in list(self._dialing.values()):
                self._pursue(peer, now_us)
        if now_us >= self._sweep_us:
            self._sweep_us = now_us + SWEEP_US
            self._sweep(now_us)
        return []

    def next_tend_us(self) -> int:
        return self._tend_us

    def _pursue(self, peer: _Peer, now_us: int) -> None:
        """Bring a peer nearer to a connection, or note when to look again."""
        own = peer.own
        if own is None:
            if now_us >= peer.retry_us:
                self._dial(peer, now_us)
            else:
                self._tend_us = min(self._tend_us, peer.retry_us)
            return
        due_us = own.began_us + (GREETING_US_MAX if own.is_connected else CONNECT_US_MAX)
        if now_us >= due_us:
            self._lost(own, "it did not answer in time")
        else:
            self._tend_us = min(self._tend_us, due_us)

    def _dial(self, peer: _Peer, now_us: int) -> None:
        if peer.lookup is None:
            peer.lookup = Lookup(*split_endpoint(peer.endpoint))
        addresses = peer.lookup.addresses
        if addresses is None:
            self._retry(peer, now_us + LOOKUP_US)
            return
        peer.lookup.wait(1.0)  # the thread has nothing left to do but to end
        peer.lookup = None
        if not addresses:
            self._warn("lookup", "there is no address for %s yet", peer.endpoint)
            self._back_off(peer, now_us)
            return
        family, address = addresses[peer.address_turn % len(addresses)]
        peer.address_turn += 1
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        except OSError as error:  # out of descriptors: what is connected goes on
            self._warn("socket", "no socket left for %s: %s", peer.endpoint, error)
            self._back_off(peer, now_us)
            return
        connection = _Connection(sock, peer.endpoint, now_us, peer)
        try:
            _set_options(sock)
            error_number = sock.connect_ex(address)
        except OSError as error:
            error_number = error.errno or errno.EINVAL
        if error_number not in (0, errno.EINPROGRESS):
            sock.close()
            self._back_off(peer, now_us)
            return
        peer.own = connection
        self._add(connection)
        self._tend_us = min(self._tend_us, now_us + CONNECT_US_MAX)

    def _back_off(self, peer: _Peer, now_us: int) -> None:
        self._retry(peer, now_us + int(peer.backoff_us * self._random.uniform(0.75, 1.25)))
        peer.backoff_us = min(2 * peer.backoff_us, RETRY_US_MAX)

    def _retry(self, peer: _Peer, at_us: int) -> None:
        peer.retry_us = at_us
        self._dialing[peer.instance] = peer
        self._tend_us = min(self._tend_us, at_us)

    def _connected(self, connection: _Connection) -> bool:
        """Greet, if connecting has succeeded."""
        sock = connection.sock
        error_number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error_number:
            self._lost(connection, os.strerror(error_number))
            return False
        try:
            # Where nobody listens, a port of the kernel's own choosing may be the very port that it connects to.
            if sock.getsockname() == sock.getpeername():
                raise OSError(errno.ECONNREFUSED, "connected to itself")
            if sock.send(self._greeting) != GREETING_BYTES:
                raise OSError(errno.ENOBUFS, "no room for a greeting")
        except OSError as error:
            self._lost(connection, str(error))
            return False
        connection.is_connected = True
        self._listen_for(connection, READ)
        return True

    def _accept(self, _mask: int) -> None:
        for _ in range(64):  # then the others have their turn
            try:
                sock, address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._refuse_without_descriptor()
                return
            if self._accepted_count >= self._connections_max:
                sock.close()
                self._refuse("too many connections", "from %s: %d are open", address[0], self._accepted_count)
                continue
            try:
                sock.setblocking(False)
                _set_options(sock)
            except OSError:  # it has gone again
                sock.close()
                continue
            self._accepted_count += 1
            self.counters["connections"] += 1
            self._add(_Connection(sock, f"{address[0]}:{address[1]}", self._clock_us(), None))

    def _refuse_without_descriptor(self) -> None:
        os.close(self._spare_fd)
        try:
            self._listener.accept()[0].close()
        except OSError:
            pass
        self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._refuse("too many connections", "the process has no file descriptor left")

    def _greet(self, connection: _Connection, data: memoryview) -> memoryview:
        """Take in the other side's greeting; return what came behind it."""
        greeting = connection.greeting
        assert greeting is not None
        missing_bytes = GREETING_BYTES - len(greeting)
        greeting += data[:missing_bytes]
        instance = read_greeting(greeting)
        if instance is None:
            return data[:0]
        connection.greeting = None
        connection.instance = instance
        connection.decoder = StreamDecoder(self._limits.frame_bytes_max)
        if connection.peer is None:
            if connection.sock.send(self._greeting) != GREETING_BYTES:
                raise OSError(errno.ENOBUFS, "no room for a greeting")
            self._greeted[instance] = connection
            self._choose(instance)
        else:
            connection.began_us = self._clock_us()
            self._dialing.pop(connection.peer.instance, None)
            self._choose(connection.peer.instance)
        return data[missing_bytes:]

    def _choose(self, instance: int) -> None:
        """Over which connection frames to ``instance`` go: the lower instance's own, if it is up."""
        peer = self._peers.get(instance)
        if peer is None:
            return
        own = peer.own if peer.own is not None and peer.own.greeting is None else None
        theirs = self._greeted.get(instance)
        peer.via = theirs if own is None or (theirs is not None and instance < self.instance) else own

    # --- what the poller calls ---

    def _ready(self, connection: _Connection, mask: int) -> None:
        if self._connections.get(connection.fd) is not connection:
            return  # closed by another handler of the same batch
        if not connection.is_connected and not self._connected(connection):
            return
        if mask & WRITE and connection.output:
            self._flush(connection)
        if mask & ~WRITE:
            try:
                self._read(connection)
            except WireError as error:
                detail = f"{error}{HINT}" if error.reason == "other transport" else str(error)
                self._refuse(error.reason, "%s: %s", connection.where, detail)
                self._lost(connection, "")
            except OSError as error:
                self._lost(connection, str(error))

    def _read(self, connection: _Connection) -> None:
        for _ in range(READS_MAX):
            if len(self._inbox) >= INBOX_FRAMES_MAX:
                return  # epoll says again what is still there
            try:
                size_bytes = connection.sock.recv_into(self._buffer)
            except (BlockingIOError, InterruptedError):
                return
            if not size_bytes:
                self._lost(connection, "closed there")
                return
            self.counters["bytes_received"] += size_bytes
            data = self._buffer[:size_bytes]
            if connection.decoder is None:
                data = self._greet(connection, data)
            if connection.decoder is not None:
                self._take(connection, connection.decoder, data)
            if size_bytes < RECEIVE_BYTES or self._connections.get(connection.fd) is not connection:
                return

    def _take(self, connection: _Connection, decoder: StreamDecoder, data: memoryview) -> None:
        frames = decoder.feed(data)
        if frames:
            self.counters["frames_received"] += len(frames)
            for frame in frames:
                self._decode(frame, self._inbox)
            if self._inbox:
                self.is_woken = True
        if decoder.pending_bytes or connection.unfinished_bytes or decoder.error is not None:
            self._note_unfinished(connection, decoder, bool(frames))

    def _note_unfinished(self, connection: _Connection, decoder: StreamDecoder, has_finished: bool) -> None:
        """Keep the sum of what is unfinished, and its bound.

        Raises:
            WireError: the stream is broken.
        """
        if decoder.error is not None:
            raise decoder.error
        if has_finished:
            connection.frame_us = 0
        self._unfinished_bytes += decoder.pending_bytes - connection.unfinished_bytes
        connection.unfinished_bytes = decoder.pending_bytes
        if self._unfinished_bytes > self._unfinished_bytes_max:
            most = max(self._connections.values(), key=lambda one: one.unfinished_bytes)
            self._refuse("too slow", "%s: too much is unfinished over all connections", most.where)
            self._lost(most, "")

    def _flush(self, connection: _Connection) -> None:
        output = connection.output
        try:
            while output:
                written_bytes = connection.sock.send(output[0])
                connection.output_bytes -= written_bytes
                if written_bytes < len(output[0]):
                    output[0] = memoryview(output[0])[written_bytes:]
                    return
                output.popleft()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lost(connection, str(error))
            return
        self._listen_for(connection, READ)

    # --- endings ---

    def _sweep(self, now_us: int) -> None:
        """Close connections of others that do not greet, or do not finish a frame. Ours are closed where they dial."""
        for connection in list(self._connections.values()):
            if connection.peer is None and connection.greeting is not None:
                if now_us - connection.began_us > GREETING_US_MAX:
                    self._refuse("not a node", "%s: it did not greet for 5 s", connection.where)
                    self._lost(connection, "")
            elif connection.unfinished_bytes:
                connection.frame_us = connection.frame_us or now_us
                if now_us - connection.frame_us > FRAME_US_MAX:
                    self._refuse("too slow", "%s: a frame was not finished in 60 s", connection.where)
                    self._lost(connection, "")

    def _lost(self, connection: _Connection, why: str) -> None:
        """Close a connection that ended or broke a rule; dial again where this side had made it."""
        peer = connection.peer
        self._close(connection)
        if peer is None or self._peers.get(peer.instance) is not peer:
            return
        now_us = self._clock_us()
        if connection.greeting is None:
            logger.debug("the connection to %s ended: %s", connection.where, why or "refused")
            if now_us - connection.began_us > STABLE_US:
                peer.backoff_us = RETRY_US_MIN
        self._back_off(peer, now_us)

    def _close(self, connection: _Connection) -> None:
        if self._connections.get(connection.fd) is not connection:
            return
        del self._connections[connection.fd]
        self._poller.unregister(connection.fd)
        connection.sock.close()
        self._unfinished_bytes -= connection.unfinished_bytes
        if connection.output:
            self.counters["dropped: connection lost"] += len(connection.output)
            connection.output.clear()
        if connection.peer is None:
            self._accepted_count -= 1
            if self._greeted.get(connection.instance) is connection:
                del self._greeted[connection.instance]
                self._choose(connection.instance)
        else:
            connection.peer.own = None
            self._choose(connection.peer.instance)

    def _add(self, connection: _Connection) -> None:
        self._connections[connection.fd] = connection
        self._poller.register(connection.fd, functools.partial(self._ready, connection), connection.events)

    def _listen_for(self, connection: _Connection, events: int) -> None:
        if events != connection.events:
            connection.events = events
            self._poller.modify(connection.fd, events)

    def close(self) -> None:
        if self._spare_fd < 0:
            return
        lookups = [peer.lookup for peer in self._peers.values() if peer.lookup is not None]
        for instance in list(self._peers):
            self.forget(instance)
        for connection in list(self._connections.values()):
            self._close(connection)
        self._poller.unregister(self._listener_fd)
        self._listener.close()
        os.close(self._spare_fd)
        self._spare_fd = -1
        for lookup in lookups:
            lookup.wait(0.5)


class _Owned:
    """Which descriptors are those of a :class:`TcpPeers`."""

    def __init__(self, connections: dict[int, _Connection], listener_fd: int) -> None:
        self._connections = connections
        self._listener_fd = listener_fd

    def __contains__(self, fd: object) -> bool:
        return fd in self._connections or fd == self._listener_fd


def _listen(host: str, port: int) -> tuple[socket.socket, str]:
    """A listening socket and its endpoint. A name is looked up here, once, as the node starts."""
    shown = f"[{host}]" if ":" in host else host
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise ListenError(f"tcp://{shown}:{port}", error.errno or 0, error.strerror or str(error)) from error
    try:
        # A connection of a former life that lingers in TIME_WAIT does no harm; a listener there still refuses us.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ListenError(f"tcp://{shown}:{port}", error.errno or 0, error.strerror or str(error)) from error
    return listener, f"tcp://{shown}:{listener.getsockname()[1]}"


def _set_options(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, PEER_GONE_MS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S // 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)

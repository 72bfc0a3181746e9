"""Frames between nodes over ZeroMQ: one ROUTER that only receives, one DEALER per remote instance that only sends.

The transport of fleets with CURVE keys. What it promises is said in :mod:`raftfleet.transport.base`; here is how:

* A ROUTER that sends with MANDATORY can block for ever at its high-water mark; ours never sends.
* Nothing queues for a peer that is not there: ``ZMQ_IMMEDIATE``.
* Host names are resolved in ZeroMQ's thread, where a name server that does not answer holds up all peers: use
  addresses of digits.

ZeroMQ's descriptor is edge-triggered: it becomes readable when something *changed*, not while something is there. So
whoever waits for it first receives until ``is_woken`` is False. Sending does not disturb this, for it happens on other
sockets than receiving. A question to ZeroMQ (:meth:`PeerSockets.pending`) is a system call of 1 µs, and most turns of a
busy loop were not caused by a peer.

With keys a connection can fail in two ways that would otherwise look like silence, and ZeroMQ tells them apart: the
other side refused our key (and then ZeroMQ never tries again, so we do), or it does not hold the key that we expected.
:meth:`PeerSockets.check_handshakes` says which, on the receiving loop and a few times a second.

More counters than the base's: ``refused: more than one part``, ``refused: public key``; ``refused there: public key``
(a node does not have ours in its list); ``failed: wrong key``.
"""

from __future__ import annotations

import errno
import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Any, cast

import zmq
from zmq.utils.monitor import parse_monitor_message

from raftfleet.transport.base import HINT, PEER_GONE_MS, Peers, is_endpoint
from raftfleet.transport.curve import ZAP_DOMAIN, NodeKeys, ZapHandler, is_public_key
from raftfleet.transport.errors import ListenError
from raftfleet.transport.poller import Poller
from raftfleet.wire.stream import GREETING_TEXT

RECEIVE_QUEUE_FRAMES_MAX = 256
"""Frames that may wait here from one peer; beyond it TCP pushes back."""

SOCKETS_MAX = 8192
"""ZeroMQ's own default of 1023 sockets per context is fewer than a fleet of 300 nodes with 4 shards each."""

HANDSHAKE_CHECK_US = 200_000
AFRESH_US = 5_000_000
"""A connection with keys that did not come about for so long is made afresh. ZeroMQ itself gives up for good after some
failures of a handshake, a refused key among them; but the list there may have been completed, its node restarted."""

_HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)
_NOBLOCK = int(zmq.NOBLOCK)
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)
_POLLOUT = int(zmq.POLLOUT)

logger = logging.getLogger(__name__)

ZmqPeer = tuple["zmq.Socket[bytes]", str, str]
"""The DEALER, its endpoint, the public key that is expected there."""


class PeerSockets(Peers[ZmqPeer]):
    """All ZeroMQ sockets of one process, which speaks as ``instance``.

    Args:
        host, port: where the ROUTER listens. Port 0: any; see :attr:`endpoint`.
        poller: what wakes the loop; the descriptors are registered there.
        keys: CURVE key pair of this node, or None for no encryption.
        allowed_keys: public keys of nodes that may connect; only with ``keys``.
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
        keys: NodeKeys | None = None,
        allowed_keys: Iterable[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(instance, logger=logger, **options)
        self._poller = poller
        self._keys = keys
        self._fds: list[int] = []
        self._monitors: dict[int, zmq.Socket[bytes]] = {}  # only with keys
        self._monitor_numbers = itertools.count()
        self._afresh_us: dict[int, int] = {}  # instance that is not connected -> when that is begun anew
        self._handshakes_us = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, SOCKETS_MAX)
        self._zap = ZapHandler(self._context, allowed_keys) if keys is not None else None
        self._router = self._context.socket(zmq.ROUTER)
        try:
            self._listen(host, port)
        except BaseException:
            self.close()
            raise
        self._fds = [int(self._router.get(zmq.FD))]
        if self._zap is not None:
            self._fds.append(self._zap.fd)
        for fd in self._fds:
            poller.register(fd, self._wake)

    def _listen(self, host: str, port: int) -> None:
        router = self._router
        _set_common(router, f"[{host}]" if ":" in host else host, keys=self._keys)
        router.set(zmq.RCVHWM, RECEIVE_QUEUE_FRAMES_MAX)
        router.set(zmq.SNDHWM, 1)
        # A larger frame ends the connection before its body is read. 128: what CURVE and ZMTP add.
        router.set(zmq.MAXMSGSIZE, self._limits.frame_bytes_max + 128)
        router.set(zmq.BACKLOG, 1024)
        if self._keys is not None:
            router.set(zmq.CURVE_SERVER, 1)
            router.set(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        address = f"tcp://[{host}]:{port or '*'}" if ":" in host else f"tcp://{host}:{port or '*'}"
        try:
            router.bind(address)
        except zmq.ZMQError as error:
            raise ListenError(address, error.errno or 0, zmq.strerror(error.errno or 0)) from error
        self.endpoint = cast(bytes, router.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode("ascii")

    def set_allowed_keys(self, public_keys: Iterable[str]) -> None:
        """Replace the list of public keys that may connect. Only with keys."""
        assert self._zap is not None, "this node has no keys"
        self._zap.set_allowed(public_keys)

    # --- addresses ---

    def set_address(self, instance: int, endpoint: str, public_key: str = "") -> bool:
        present = self._peers.get(instance)
        if present is not None and present[1] == endpoint and present[2] == public_key:
            return True
        if not is_endpoint(endpoint) or (self._keys is not None and not is_public_key(public_key)):
            self._refuse("bad address", "%r with public key %r", endpoint[:200], public_key[:60])
            return False
        if present is not None:
            self.forget(instance)
        try:
            dealer = self._context.socket(zmq.DEALER)
        except zmq.ZMQError as error:  # out of descriptors or sockets: the others must go on
            self._refuse("bad address", "no socket left for %s: %s", endpoint, error)
            return False
        try:
            _set_common(dealer, endpoint, keys=self._keys)
            dealer.set(zmq.IMMEDIATE, 1)
            dealer.set(zmq.SNDHWM, self._send_queue_frames_max)
            dealer.set(zmq.RCVHWM, 1)
            dealer.set(zmq.MAXMSGSIZE, 1024)  # nothing is received here but handshakes
            dealer.set(zmq.RECONNECT_IVL, 50)
            dealer.set(zmq.RECONNECT_IVL_MAX, 1000)
            dealer.set(zmq.CONNECT_TIMEOUT, 2000)
            if self._keys is not None:
                dealer.set(zmq.CURVE_SERVERKEY, public_key.encode("ascii"))
                self._monitor(instance, dealer)
            dealer.connect(endpoint)
        except zmq.ZMQError as error:
            self._close(instance, dealer)
            self._refuse("bad address", "%s: %s", endpoint, error)
            return False
        self._peers[instance] = (dealer, endpoint, public_key)
        return True

    def forget(self, instance: int) -> None:
        peer = self._peers.pop(instance, None)
        self._afresh_us.pop(instance, None)
        if peer is not None:
            self._close(instance, peer[0])

    def _monitor(self, instance: int, dealer: zmq.Socket[bytes]) -> None:
        """Have ZeroMQ's thread tell of failed handshakes.

        It tells by a blocking send: with a limit of what may wait, or with nobody at the other end any more, that
        would stop the thread and all connections with it. So there is no limit, and :meth:`_close` has an order.
        """
        endpoint = f"inproc://handshakes-{next(self._monitor_numbers)}"
        dealer.monitor(endpoint, _HANDSHAKE_FAILURES)
        monitor = self._monitors[instance] = self._context.socket(zmq.PAIR)
        monitor.set(zmq.LINGER, 0)
        monitor.set(zmq.RCVHWM, 0)
        monitor.connect(endpoint)

    def _close(self, instance: int, dealer: zmq.Socket[bytes]) -> None:
        monitor = self._monitors.pop(instance, None)
        if self._keys is not None:
            dealer.disable_monitor()
        if monitor is not None:
            monitor.close(linger=0)
        dealer.close(linger=0)

    def tend(self, now_us: int) -> list[int]:
        """Look after handshakes. Its own clock says whether it is time."""
        return self.check_handshakes()

    def check_handshakes(self) -> list[int]:
        """Look after connections that failed because of keys. At most a few times a second; else it does nothing.

        One that was refused there is said in the log. One that does not come about is made afresh every few seconds.

        Returns:
            Instances whose address was connected with a key that is not theirs (the handshake was broken off).
        """
        if self._keys is None:
            return []
        now_us = self._clock_us()
        if now_us < self._handshakes_us:
            return []
        self._handshakes_us = now_us + HANDSHAKE_CHECK_US
        wrong = []
        for instance, monitor in list(self._monitors.items()):
            failures = 0
            while int(monitor.get(_EVENTS)) & _POLLIN:
                failures |= parse_monitor_message(monitor.recv_multipart(_NOBLOCK))["event"]
            if failures & zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self.counters["refused there: public key"] += 1
                self._warn(
                    "refused there",
                    "%s refused this node: its public key %s is not in the list there (--curve-public-keys-file)",
                    *(self._peers[instance][1], self._keys.public_key),
                )
            elif failures:
                self.counters["failed: wrong key"] += 1
                wrong.append(instance)
            if int(self._peers[instance][0].get(_EVENTS)) & _POLLOUT:
                self._afresh_us.pop(instance, None)
            elif self._afresh_us.setdefault(instance, now_us + AFRESH_US) <= now_us:
                _, endpoint, public_key = self._peers[instance]
                self.forget(instance)
                self.set_address(instance, endpoint, public_key)
        return wrong

    def address(self, instance: int) -> str | None:
        peer = self._peers.get(instance)
        return peer[1] if peer is not None else None

    def is_ready(self, instance: int) -> bool:
        peer = self._peers.get(instance)
        return peer is not None and bool(int(peer[0].get(_EVENTS)) & _POLLOUT)

    # --- frames ---

    def _put(self, instance: int, peer: ZmqPeer, frame: bytes) -> bool:
        try:
            peer[0].send(frame, _NOBLOCK)
        except zmq.ZMQError as error:
            self.counters["dropped: queue full or peer away"] += 1
            if error.errno != errno.EAGAIN:
                self._warn("send", "could not send to instance %d: %s", instance, error)
            return False
        counters = self.counters
        counters["frames_sent"] += 1
        counters["bytes_sent"] += len(frame)
        return True

    def receive(self, budget_frames: int = 1024) -> list[tuple[int, list[Any]]]:
        """All that has come. Refused frames count in the budget.

        The first receive is made without asking whether anything is there: after a wake-up it is (EAGAIN, as an
        exception, costs three times as much as the question, but is rare).
        """
        if self._zap is not None:
            for address in self._zap.drain():
                self._refuse("public key", "from %s, which is not in the fleet's list", address)
        received: list[tuple[int, list[Any]]] = []
        get = cast(Callable[[int], int], self._router.get)
        recv = self._router.recv
        size_bytes = 0
        count = 0
        has_more = True
        while has_more:
            if count >= budget_frames:
                return self._counted(received, count, size_bytes)
            try:
                recv(_NOBLOCK)  # the sender's routing id, made up by ZeroMQ
            except zmq.Again:
                break
            except zmq.ZMQError as error:
                self._refuse("socket error", "%s", error)
                return self._counted(received, count, size_bytes)
            count += 1
            try:
                part = recv(_NOBLOCK, copy=False)
                data = part.buffer
                parts = 1
                while part.more:
                    part = recv(_NOBLOCK, copy=False)
                    parts += 1
                has_more = bool(get(_EVENTS) & _POLLIN)
            except zmq.ZMQError as error:
                self._refuse("socket error", "%s", error)
                return self._counted(received, count, size_bytes)
            size_bytes += len(data)
            if parts > 1:
                self._refuse("more than one part", "a message of %d parts", parts)
                continue
            if data[: len(GREETING_TEXT)] == GREETING_TEXT:
                self._refuse("other transport", "%s", "a node that connected speaks plain TCP, this one ZeroMQ" + HINT)
                continue
            self._decode(data, received)
        self.is_woken = False
        return self._counted(received, count, size_bytes)

    def _counted(self, received: list[tuple[int, list[Any]]], count: int, size_bytes: int) -> list[Any]:
        if count:
            self.counters["frames_received"] += count
            self.counters["bytes_received"] += size_bytes
        return received

    # --- waiting ---

    def _wake(self, _mask: int) -> None:
        self.is_woken = True

    def pending(self) -> bool:
        return bool(int(self._router.get(_EVENTS)) & _POLLIN)

    def close(self) -> None:
        """Close all sockets, drop what waits in them, and end ZeroMQ's thread. May be called twice."""
        for fd in self._fds:
            self._poller.unregister(fd)
        self._fds = []
        for instance in list(self._peers):
            self.forget(instance)
        self._router.close(linger=0)
        if self._zap is not None:
            self._zap.close()
        self._context.destroy(linger=0)


def _set_common(sock: zmq.Socket[bytes], address: str, *, keys: NodeKeys | None) -> None:
    sock.set(zmq.LINGER, 0)
    sock.set(zmq.IPV6, int("[" in address))
    sock.set(zmq.HANDSHAKE_IVL, 5000)
    sock.set(zmq.TCP_MAXRT, PEER_GONE_MS)
    if keys is not None:
        sock.set(zmq.CURVE_PUBLICKEY, keys.public_key.encode("ascii"))
        sock.set(zmq.CURVE_SECRETKEY, keys.secret_key.encode("ascii"))

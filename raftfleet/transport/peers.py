"""Frames between nodes over ZeroMQ: one ROUTER that only receives, one DEALER per remote instance that only sends.

Rules:

1. Nothing blocks. A frame that cannot be handed over at once is dropped and counted: Raft sends again. (A ROUTER that
   sends with MANDATORY can block for ever at its high-water mark; ours never sends.)
2. Nothing queues for a peer that is not there (``ZMQ_IMMEDIATE``), and little for one that is slow: what waits too
   long is worth nothing to Raft, and a peer that comes back must not find seconds of the past.
3. Nothing that arrives raises. What does not parse, is of another fleet or is meant for another instance is dropped,
   counted and logged at a limited rate.
4. An address that a peer sends about itself is believed only as far as its shape: ``tcp://host:port``. Host names are
   resolved in ZeroMQ's thread, where a name server that does not answer holds up all peers: use addresses of digits.

ZeroMQ's descriptor is edge-triggered: it becomes readable when something *changed*, not while something is there. So
whoever waits on :meth:`PeerSockets.fds` first receives until :meth:`PeerSockets.pending` is False. Sending does not
disturb this, for it happens on other sockets than receiving. A loop that has :meth:`PeerSockets.wake` called for those
descriptors may look at ``is_woken`` instead, which costs nothing: a question to ZeroMQ is a system call of 1 µs, and
most turns of a busy loop were not caused by a peer.

With keys a connection can fail in two ways that would otherwise look like silence, and ZeroMQ tells them apart: the
other side refused our key (and then ZeroMQ never tries again, so we do), or it does not hold the key that we expected.
:meth:`PeerSockets.check_handshakes` says which, on the receiving loop and a few times a second.

The counters, by name: ``frames_received``, ``frames_sent``, ``bytes_sent``, ``bytes_received``;
``dropped: no address | queue full or peer away | too large``; ``refused: `` and one of :class:`WireError`'s reasons,
``other fleet``, ``other instance``, ``more than one part``, ``public key``, ``bad address``;
``refused there: public key`` (a node does not have ours in its list); ``failed: wrong key``.
"""

from __future__ import annotations

import errno
import itertools
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import zmq
from zmq.utils.monitor import parse_monitor_message

from raftfleet.transport.curve import ZAP_DOMAIN, NodeKeys, ZapHandler, is_public_key
from raftfleet.transport.errors import ListenError
from raftfleet.transport.ratelimit import LimitedLog
from raftfleet.wire.codec import DEFAULT_LIMITS, NO_FLEET, Frame, FrameLimits, decode_frame, encode_frame
from raftfleet.wire.errors import WireError

SEND_QUEUE_FRAMES_MAX = 256
"""Frames that may wait for one peer. A loop sends one frame per peer: some tens of milliseconds at full speed."""

RECEIVE_QUEUE_FRAMES_MAX = 256
"""Frames that may wait here from one peer; beyond it TCP pushes back."""

SOCKETS_MAX = 8192
"""ZeroMQ's own default of 1023 sockets per context is fewer than a fleet of 300 nodes with 4 shards each."""

PEER_GONE_MS = 5000
"""A connection whose data is not acknowledged for so long is closed, so that nothing queues behind a cut cable. Beats
flow all the time, so the data itself is the probe and no ping is needed."""

HANDSHAKE_CHECK_US = 200_000
AFRESH_US = 5_000_000
"""A connection with keys that did not come about for so long is made afresh. ZeroMQ itself gives up for good after some
failures of a handshake, a refused key among them; but the list there may have been completed, its node restarted."""

_HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)

_ENDPOINT = re.compile(
    r"tcp://(?:[A-Za-z0-9_][A-Za-z0-9._-]{0,252}|\[[0-9A-Fa-f:.]{2,45}(?:%\w{1,15})?\]):([0-9]{1,5})"
)
_NOBLOCK = int(zmq.NOBLOCK)
_EVENTS = int(zmq.EVENTS)
_POLLIN = int(zmq.POLLIN)
_POLLOUT = int(zmq.POLLOUT)

logger = logging.getLogger(__name__)

FleetPredicate = Callable[[Frame], bool]
"""Asked about a frame when its sender, or this side, is in no fleet yet."""


def monotonic_us() -> int:
    """The monotonic clock in microseconds."""
    return time.monotonic_ns() // 1000


def is_endpoint(text: str) -> bool:
    """Whether ``text`` is ``tcp://host:port`` with a host that cannot hold anything else and a port from 1 to 65535."""
    match = _ENDPOINT.fullmatch(text)
    return match is not None and 0 < int(match.group(1)) < 65536


class PeerSockets:
    """All ZeroMQ sockets of one process, which speaks as ``instance``.

    Args:
        instance: the number that frames to this process carry; frames for another one (a former life of this process
            at the same port) are refused.
        host, port: where the ROUTER listens. Port 0: any; see :attr:`endpoint`.
        keys: CURVE key pair of this node, or None for plain TCP.
        allowed_keys: public keys of nodes that may connect; only with ``keys``.
        limits: of a frame.
        accept_without_fleet: asked about a frame if its sender or this side is in no fleet. Default: refuse.
        on_other_fleet: told about each frame of another fleet, so that the manager can say so in words.
        clock_us: for the rate of log lines and of looking after handshakes.

    Raises:
        ListenError: the address is taken or is not ours.
    """

    def __init__(
        self,
        instance: int,
        host: str,
        port: int,
        *,
        keys: NodeKeys | None = None,
        allowed_keys: Iterable[str] = (),
        limits: FrameLimits = DEFAULT_LIMITS,
        send_queue_frames_max: int = SEND_QUEUE_FRAMES_MAX,
        accept_without_fleet: FleetPredicate | None = None,
        on_other_fleet: Callable[[Frame], None] | None = None,
        clock_us: Callable[[], int] = monotonic_us,
    ) -> None:
        self.instance = instance
        self.fleet = NO_FLEET
        self.counters: Counter[str] = Counter()
        self._keys = keys
        self._limits = limits
        self._send_queue_frames_max = send_queue_frames_max
        self._accept_without_fleet = accept_without_fleet
        self._on_other_fleet = on_other_fleet
        self._clock_us = clock_us
        self._log = LimitedLog(logger)
        self.is_woken = True
        """Whether something may have come: set by :meth:`wake`, cleared when :meth:`receive` has taken all."""
        self._peers: dict[int, tuple[zmq.Socket[bytes], str, str]] = {}
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
        self._router_fd = int(self._router.get(zmq.FD))

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
        self.endpoint: str = cast(bytes, router.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode("ascii")
        """``tcp://host:port`` as it was bound."""

    def set_fleet(self, fleet: bytes) -> None:
        """Send as a member of ``fleet`` (16 bytes, :data:`NO_FLEET` for none) and refuse frames of others."""
        if type(fleet) is not bytes or len(fleet) != len(NO_FLEET):
            raise ValueError(f"a fleet id has {len(NO_FLEET)} bytes, not {fleet!r}")
        self.fleet = fleet

    def set_allowed_keys(self, public_keys: Iterable[str]) -> None:
        """Replace the list of public keys that may connect. Only with keys."""
        assert self._zap is not None, "this node has no keys"
        self._zap.set_allowed(public_keys)

    # --- addresses ---

    def set_address(self, instance: int, endpoint: str, public_key: str = "") -> bool:
        """Connect to ``instance`` at ``endpoint``; nothing happens if that is where it already is.

        The connection takes a moment, and until it is there :meth:`send` returns False.

        Args:
            public_key: the remote node's CURVE key; needed if this node has keys, ignored if it has none.

        Returns:
            False, and a counted, logged refusal, if endpoint or key cannot be used: they may come from outside.
        """
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
        """Close the connection to ``instance``; what waits for it is dropped. Unknown instances are ignored."""
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
        """Where ``instance`` was last said to be."""
        peer = self._peers.get(instance)
        return peer[1] if peer is not None else None

    def instances(self) -> list[int]:
        """All instances that have an address."""
        return list(self._peers)

    def is_ready(self, instance: int) -> bool:
        """Whether :meth:`send` to ``instance`` would be taken now: connected, and its queue has room."""
        peer = self._peers.get(instance)
        return peer is not None and bool(int(peer[0].get(_EVENTS)) & _POLLOUT)

    # --- frames ---

    def send(self, instance: int, messages: Sequence[tuple[Any, ...]], *, to_whoever: bool = False) -> bool:
        """Send these messages to ``instance``, in one frame or, where that is too large, in several. Never blocks.

        Args:
            to_whoever: for whoever listens at that address, whatever its instance (managers know addresses first).

        Returns:
            False if the frame was dropped: no address, not connected, queue full, or larger than a frame may be. True
            says that ZeroMQ took it, not that it will arrive.
        """
        peer = self._peers.get(instance)
        if peer is None:
            self.counters["dropped: no address"] += 1
            return False
        frame = encode_frame(self.fleet, self.instance, 0 if to_whoever else instance, messages)
        size_bytes = len(frame)
        if size_bytes > self._limits.frame_bytes_max and len(messages) > 1:
            half = len(messages) // 2
            first = self.send(instance, messages[:half], to_whoever=to_whoever)
            return self.send(instance, messages[half:], to_whoever=to_whoever) and first
        if size_bytes > self._limits.frame_bytes_max:
            # The receiver would end the connection, and with it lose whatever else is under way.
            self.counters["dropped: too large"] += 1
            self._warn("too large", "dropped a frame of %d bytes to instance %d", size_bytes, instance)
            return False
        try:
            peer[0].send(frame, _NOBLOCK)
        except zmq.ZMQError as error:
            self.counters["dropped: queue full or peer away"] += 1
            if error.errno != errno.EAGAIN:
                self._warn("send", "could not send to instance %d: %s", instance, error)
            return False
        counters = self.counters
        counters["frames_sent"] += 1
        counters["bytes_sent"] += size_bytes
        return True

    def send_to_all(self, sends: dict[int, list[tuple[Any, ...]]]) -> None:
        """Send to each instance its messages; what cannot be sent is dropped and counted."""
        for instance, messages in sends.items():
            self.send(instance, messages)

    def receive(self, budget_frames: int = 1024) -> list[tuple[int, list[Any]]]:
        """All that has come, as ``(from_instance, messages)``, up to ``budget_frames`` frames, refused ones included.

        If the budget was used up, :meth:`pending` is True and the descriptor will not wake anybody.

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
            try:
                frame = decode_frame(data, self._limits)
            except WireError as error:
                self._refuse(error.reason, "%s", error)
                continue
            if self._is_welcome(frame):
                received.append((frame.from_instance, frame.messages))
        self.is_woken = False
        return self._counted(received, count, size_bytes)

    def _counted(self, received: list[tuple[int, list[Any]]], count: int, size_bytes: int) -> list[Any]:
        if count:
            self.counters["frames_received"] += count
            self.counters["bytes_received"] += size_bytes
        return received

    def _is_welcome(self, frame: Frame) -> bool:
        if frame.fleet != self.fleet or self.fleet == NO_FLEET:
            if frame.fleet == NO_FLEET or self.fleet == NO_FLEET:
                if self._accept_without_fleet is None or not self._accept_without_fleet(frame):
                    self.counters["refused: no fleet"] += 1  # usual while nodes start: not worth a line
                    return False
            else:
                self._refuse(
                    "other fleet",
                    "instance %d is in fleet %s, this node in %s",
                    *(frame.from_instance, frame.fleet.hex(), self.fleet.hex()),
                )
                if self._on_other_fleet is not None:
                    self._on_other_fleet(frame)
                return False
        if frame.to_instance != self.instance and frame.to_instance != 0:
            # Usual after a restart at the same port, until the others have learned the new instance.
            self.counters["refused: other instance"] += 1
            return False
        return True

    # --- waiting ---

    def fds(self) -> list[int]:
        """Descriptors to wait on for READ. Edge-triggered: see the module's docstring."""
        return [self._router_fd] if self._zap is None else [self._router_fd, self._zap.fd]

    def wake(self, _mask: int = 0) -> None:
        """For the poller: one of :meth:`fds` became readable."""
        self.is_woken = True

    def pending(self) -> bool:
        """Whether there is more to receive. Ask before waiting on :meth:`fds`."""
        return bool(int(self._router.get(_EVENTS)) & _POLLIN)

    def close(self) -> None:
        """Close all sockets, drop what waits in them, and end ZeroMQ's thread. May be called twice."""
        for instance in list(self._peers):
            self.forget(instance)
        self._router.close(linger=0)
        if self._zap is not None:
            self._zap.close()
        self._context.destroy(linger=0)

    # --- bookkeeping ---

    def _refuse(self, reason: str, detail: str, *args: object) -> None:
        self.counters[f"refused: {reason}"] += 1
        self._warn(reason, f"refused ({reason}): {detail}", *args)

    def _warn(self, key: str, message: str, *args: object) -> None:
        self._log.warning(self._clock_us(), key, message, *args)


def _set_common(sock: zmq.Socket[bytes], address: str, *, keys: NodeKeys | None) -> None:
    sock.set(zmq.LINGER, 0)
    sock.set(zmq.IPV6, int("[" in address))
    sock.set(zmq.HANDSHAKE_IVL, 5000)
    sock.set(zmq.TCP_MAXRT, PEER_GONE_MS)
    if keys is not None:
        sock.set(zmq.CURVE_PUBLICKEY, keys.public_key.encode("ascii"))
        sock.set(zmq.CURVE_SECRETKEY, keys.secret_key.encode("ascii"))

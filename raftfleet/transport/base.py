"""What the two transports between nodes share: whose frames are taken, how frames are made, what is counted.

Rules, for both:

1. Nothing blocks. A frame that cannot be handed over at once, and does not fit into a short queue, is dropped as a
   whole and counted: Raft sends again.
2. Nothing queues for a peer that is not there, and little for one that is slow: what waits too long is worth nothing to
   Raft, and a peer that comes back must not find seconds of the past.
3. Nothing that arrives raises. What does not parse, is of another fleet or is meant for another instance is dropped,
   counted and logged at a limited rate.
4. An address that a peer sends about itself is believed only as far as its shape: ``tcp://host:port``.

The counters, by name: ``frames_received``, ``frames_sent``, ``bytes_sent``, ``bytes_received``;
``dropped: no address | queue full or peer away | too large``; ``refused: `` and one of :class:`WireError`'s reasons,
``no fleet``, ``other fleet``, ``other instance``, ``other transport``, ``bad address``; and those of each transport.
"""

from __future__ import annotations

import logging
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from raftfleet.transport.ratelimit import LimitedLog
from raftfleet.wire.codec import DEFAULT_LIMITS, NO_FLEET, Frame, FrameLimits, decode_frame, encode_frame
from raftfleet.wire.errors import WireError

SEND_QUEUE_FRAMES_MAX = 256
"""Frames that may wait for one peer. A loop sends one frame per peer: some tens of milliseconds at full speed."""

PEER_GONE_MS = 5000
"""A connection whose data is not acknowledged for so long is closed, so that nothing queues behind a cut cable. Beats
flow all the time, so the data itself is the probe and no ping is needed."""

NEVER_US = 1 << 62

HINT = " (--transport, or CURVE keys on one side only): all nodes of a fleet need the same"
"""What to do when the two sides of a connection speak different transports."""

_ENDPOINT = re.compile(
    r"tcp://(?:([A-Za-z0-9_][A-Za-z0-9._-]{0,252})|\[([0-9A-Fa-f:.]{2,45}(?:%\w{1,15})?)\]):([0-9]{1,5})"
)

FleetPredicate = Callable[[Frame], bool]
"""Asked about a frame when its sender, or this side, is in no fleet yet."""

PeerT = TypeVar("PeerT")


def monotonic_us() -> int:
    """The monotonic clock in microseconds."""
    return time.monotonic_ns() // 1000


def is_endpoint(text: str) -> bool:
    """Whether ``text`` is ``tcp://host:port`` with a host that cannot hold anything else and a port from 1 to 65535."""
    match = _ENDPOINT.fullmatch(text)
    return match is not None and 0 < int(match[3]) < 65536


def split_endpoint(text: str) -> tuple[str, int]:
    """Host, without brackets, and port of what :func:`is_endpoint` accepts."""
    match = _ENDPOINT.fullmatch(text)
    assert match is not None, text
    return match[1] or match[2], int(match[3])


class Peers(ABC, Generic[PeerT]):
    """All sockets to and from other nodes of one process, which speaks as ``instance``.

    Args:
        instance: the number that frames to this process carry; frames for another one (a former life of this process
            at the same port) are refused.
        limits: of a frame.
        accept_without_fleet: asked about a frame if its sender or this side is in no fleet. Default: refuse.
        on_other_fleet: told about each frame of another fleet, so that the manager can say so in words.
        clock_us: for the rate of log lines and of looking after connections.
    """

    endpoint: str
    """``tcp://host:port`` as it was bound."""

    def __init__(
        self,
        instance: int,
        *,
        logger: logging.Logger,
        limits: FrameLimits = DEFAULT_LIMITS,
        send_queue_frames_max: int = SEND_QUEUE_FRAMES_MAX,
        accept_without_fleet: FleetPredicate | None = None,
        on_other_fleet: Callable[[Frame], None] | None = None,
        clock_us: Callable[[], int] = monotonic_us,
    ) -> None:
        self.instance = instance
        self.fleet = NO_FLEET
        self.counters: Counter[str] = Counter()
        self.is_woken = True
        """Whether something may have come; cleared when :meth:`receive` has taken all."""
        self._limits = limits
        self._send_queue_frames_max = send_queue_frames_max
        self._accept_without_fleet = accept_without_fleet
        self._on_other_fleet = on_other_fleet
        self._clock_us = clock_us
        self._log = LimitedLog(logger)
        self._peers: dict[int, PeerT] = {}

    def set_fleet(self, fleet: bytes) -> None:
        """Send as a member of ``fleet`` (16 bytes, :data:`NO_FLEET` for none) and refuse frames of others."""
        if type(fleet) is not bytes or len(fleet) != len(NO_FLEET):
            raise ValueError(f"a fleet id has {len(NO_FLEET)} bytes, not {fleet!r}")
        self.fleet = fleet

    # --- addresses ---

    @abstractmethod
    def set_address(self, instance: int, endpoint: str, public_key: str = "") -> bool:
        """Connect to ``instance`` at ``endpoint``; nothing happens if that is where it already is.

        The connection takes a moment, and until it is there :meth:`send` returns False.

        Args:
            public_key: the remote node's CURVE key; needed if this node has keys, ignored if it has none.

        Returns:
            False, and a counted, logged refusal, if endpoint or key cannot be used: they may come from outside.
        """

    @abstractmethod
    def forget(self, instance: int) -> None:
        """Send nothing to ``instance`` any more; what waits for it is dropped. Unknown instances are ignored."""

    @abstractmethod
    def address(self, instance: int) -> str | None:
        """Where ``instance`` was last said to be."""

    @abstractmethod
    def is_ready(self, instance: int) -> bool:
        """Whether :meth:`send` to ``instance`` would be taken now: connected, and its queue has room."""

    def instances(self) -> list[int]:
        """All instances that have an address."""
        return list(self._peers)

    # --- frames ---

    def send(self, instance: int, messages: Sequence[tuple[Any, ...]], *, to_whoever: bool = False) -> bool:
        """Send these messages to ``instance``, in one frame or, where that is too large, in several. Never blocks.

        Args:
            to_whoever: for whoever listens at that address, whatever its instance (managers know addresses first).

        Returns:
            False if the frame was dropped: no address, not connected, queue full, or larger than a frame may be. True
            says that it is on its way, not that it will arrive.
        """
        peer = self._peers.get(instance)
        if peer is None:
            self.counters["dropped: no address"] += 1
            return False
        frame = encode_frame(self.fleet, self.instance, 0 if to_whoever else instance, messages)
        size_bytes = len(frame)
        if size_bytes <= self._limits.frame_bytes_max:
            return self._put(instance, peer, frame)
        if len(messages) > 1:
            half = len(messages) // 2
            first = self.send(instance, messages[:half], to_whoever=to_whoever)
            return self.send(instance, messages[half:], to_whoever=to_whoever) and first
        # The receiver would end the connection, and with it lose whatever else is under way.
        self.counters["dropped: too large"] += 1
        self._warn("too large", "dropped a frame of %d bytes to instance %d", size_bytes, instance)
        return False

    @abstractmethod
    def _put(self, instance: int, peer: PeerT, frame: bytes) -> bool:
        """Hand a frame over, or drop it; count either."""

    def send_to_all(self, sends: dict[int, list[tuple[Any, ...]]]) -> None:
        """Send to each instance its messages; what cannot be sent is dropped and counted."""
        for instance, messages in sends.items():
            self.send(instance, messages)

    @abstractmethod
    def receive(self, budget_frames: int = 1024) -> list[tuple[int, list[Any]]]:
        """All that has come, as ``(from_instance, messages)``, up to ``budget_frames`` frames.

        If the budget was used up, :attr:`is_woken` stays True, and the descriptors will not wake anybody.
        """

    @abstractmethod
    def pending(self) -> bool:
        """Whether there is more to receive."""

    def look(self) -> None:
        """Take note of what has come without waiting for the poller, which stands still: before :meth:`receive`."""

    # --- connections ---

    def tend(self, now_us: int) -> list[int]:
        """Look after connections: dial again, give up what takes too long. Call it from the loop when it is due.

        Returns:
            Instances whose address was connected with a CURVE key that is not theirs.
        """
        return []

    def next_tend_us(self) -> int:
        """When :meth:`tend` has something to do that should not wait; :data:`NEVER_US` if nothing."""
        return NEVER_US

    def is_flushed(self) -> bool:
        """Whether the kernel has all that was sent, as far as this process can know."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Close all sockets and drop what waits in them. May be called twice."""

    # --- bookkeeping ---

    def _decode(self, data: bytes | memoryview, received: list[tuple[int, list[Any]]]) -> None:
        """Append what ``data`` holds to ``received`` if it is for us; else count why not."""
        try:
            frame = decode_frame(data, self._limits)
        except WireError as error:
            self._refuse(error.reason, "%s", error)
            return
        # What comes nearly always, by the shortest way.
        if (frame.fleet == self.fleet != NO_FLEET and frame.to_instance == self.instance) or self._is_welcome(frame):
            received.append((frame.from_instance, frame.messages))

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

    def _refuse(self, reason: str, detail: str, *args: object) -> None:
        self.counters[f"refused: {reason}"] += 1
        self._warn(reason, f"refused ({reason}): {detail}", *args)

    def _warn(self, key: str, message: str, *args: object) -> None:
        self._log.warning(self._clock_us(), key, message, *args)

"""Exactly-once: what each client's commands returned, replicated with the state (DESIGN 11; Raft thesis 6.3).

This module knows nothing of clocks: time is the leader's, taken from the entries, so every replica forgets a client at
the same entry.

A command on the wire and in the log is msgpack ``[client_id: bin16, seq, acked, issued_us, arg: bin]``; ``arg`` is the
user's argument, packed once by the client and unpacked only when it is applied. A COMMANDS entry is msgpack
``[time_us, [command: bin, ...]]``. ``seq`` counts from 1 for each client and group; ``acked`` says that all results up
to it were received and may be forgotten.

Why a second execution cannot happen: a command runs only if the entry's time is at most ``ttl / 2`` after ``issued_us``
(and at most ``ttl / 2`` before it), and the session that remembers its first run lives for ``ttl`` after that run. The
clocks of the client's machine and the leaders' may thus differ by almost ``ttl / 2``.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgpack

from raftfleet.core.codes import COMMAND_FAILED as COMMAND_FAILED
from raftfleet.core.codes import OK as OK
from raftfleet.core.codes import OVERLOADED as OVERLOADED
from raftfleet.core.codes import SESSION_EXPIRED as SESSION_EXPIRED

RESULTS_PER_SESSION_MAX = 4096
"""More unacknowledged results than any client of ours keeps in flight (1024); a client that exceeds it is refused."""

NIL = b"\xc0"


COMMAND_HEADER_BYTES_MAX = 64
"""What a command may have besides its argument: client id, three numbers, and msgpack's headers."""


def size_refusal(group: str, size_bytes: int, limit: int) -> str | None:
    """Why a packed command of that size is not taken, or None if it is.

    Asked on the way in and never when a command is applied: the limit may change while commands are under way, and
    replicas must not differ over it.
    """
    if size_bytes <= limit + COMMAND_HEADER_BYTES_MAX:
        return None
    return f"the argument has about {size_bytes} bytes; the limit of group {group} is command_bytes_max = {limit}"


def parse_command(data: bytes) -> tuple[bytes, int, int, int, bytes]:
    """Take a command's header apart: ``(client_id, seq, acked, issued_us, arg)``.

    Raises:
        ValueError: the bytes are not a command.
    """
    try:
        client_id, seq, acked, issued_us, arg = msgpack.unpackb(data)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError("a command is msgpack [client id, seq, acked, issued at, argument]") from error
    if (
        type(client_id) is not bytes
        or len(client_id) != 16
        or type(seq) is not int
        or type(acked) is not int
        or type(issued_us) is not int
        or type(arg) is not bytes
        or not 0 <= acked < seq < 1 << 63
        or not 0 <= issued_us < 1 << 63
    ):
        raise ValueError("a command's header has a wrong field")
    return client_id, seq, acked, issued_us, arg


def pack_batch(time_us: int, commands: list[bytes]) -> bytes:
    """Data of a COMMANDS entry."""
    return bytes(msgpack.packb((time_us, commands)))


def unpack_batch(data: bytes) -> tuple[int, list[bytes]]:
    """The inverse of :func:`pack_batch`."""
    time_us, commands = msgpack.unpackb(data)
    return time_us, commands


class Session:
    """One client's results above ``acked``: ``results[seq] = (code, packed body)``."""

    __slots__ = ("acked", "results", "used_us")

    def __init__(self) -> None:
        self.acked = 0
        self.used_us = 0
        self.results: dict[int, tuple[int, bytes]] = {}


class Sessions:
    """All clients of one group, in the order of their last use."""

    __slots__ = ("by_client", "count_max", "ttl_us")

    def __init__(self, ttl_us: int, count_max: int) -> None:
        self.ttl_us = ttl_us
        self.count_max = count_max
        self.by_client: OrderedDict[bytes, Session] = OrderedDict()

    def expire(self, time_us: int) -> None:
        """Forget clients that were idle for ``ttl``. Called once per entry, before its commands."""
        by_client = self.by_client
        horizon = time_us - self.ttl_us
        while by_client:
            client_id = next(iter(by_client))
            if by_client[client_id].used_us >= horizon:
                return
            del by_client[client_id]

    def admit(
        self, client_id: bytes, seq: int, acked: int, issued_us: int, time_us: int
    ) -> Session | tuple[int, bytes]:
        """Either the session in which the command is to run now, or the answer that it gets without running."""
        session = self.by_client.get(client_id)
        if session is None:
            if abs(time_us - issued_us) * 2 > self.ttl_us:
                return SESSION_EXPIRED, NIL
            if len(self.by_client) >= self.count_max:
                return OVERLOADED, NIL
            session = self.by_client[client_id] = Session()
        else:
            stored = session.results.get(seq)
            if stored is not None:
                return stored
            if seq <= session.acked or abs(time_us - issued_us) * 2 > self.ttl_us:
                return SESSION_EXPIRED, NIL
            if len(session.results) >= RESULTS_PER_SESSION_MAX and acked <= session.acked:
                return OVERLOADED, NIL
            self.by_client.move_to_end(client_id)
        session.used_us = time_us
        if acked > session.acked:
            results = session.results
            if len(results) <= acked - session.acked:
                for old in [old for old in results if old <= acked]:
                    del results[old]
            else:
                for old in range(session.acked + 1, acked + 1):
                    results.pop(old, None)
            session.acked = acked
        return session

    def dump(self) -> list[Any]:
        """For a snapshot; oldest use first."""
        return [
            [client_id, s.acked, s.used_us, [[seq, code, body] for seq, (code, body) in s.results.items()]]
            for client_id, s in self.by_client.items()
        ]

    def load(self, rows: list[Any]) -> None:
        """The inverse of :meth:`dump`."""
        self.by_client.clear()
        for client_id, acked, used_us, results in rows:
            session = self.by_client[client_id] = Session()
            session.acked = acked
            session.used_us = used_us
            session.results = {seq: (code, body) for seq, code, body in results}

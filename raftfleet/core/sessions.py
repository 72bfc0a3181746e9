"""Exactly-once: what each client's commands returned, replicated with the state (DESIGN 11; Raft thesis 6.3).

This module knows nothing of clocks: time is the leader's, taken from the entries, so every replica forgets a client at
the same entry.

A command on the wire and in the log is msgpack ``[client_id: bin16, seq, acked, issued_us, arg: bin]``; ``arg`` is the
user's argument, packed once by the client and unpacked only when it is applied. A COMMANDS entry is msgpack
``[time_us, [command: bin, ...]]``. ``seq`` counts from 1 for each client and group; ``acked`` says that all results up
to it were received and may be forgotten.

A **run** is many commands of one client as one command: ``arg`` is a list of arguments, ``seq`` that of the first, the
others count on from there. It is nothing but a shorter way to say the same: every command of it has its own place in
the session and its own result. A run that is new as a whole is admitted as a whole; of any other, each command is
judged alone. (Measured: taking a command apart and admitting it cost as much as all the rest of applying it.)

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

RUN_COMMANDS_MAX = 256
"""A longer run is refused: so much work may come of one item of a batch."""

NIL = b"\xc0"

_pack = msgpack.Packer(use_bin_type=True).pack
_unpack = msgpack.unpackb

COMMAND_HEADER_BYTES_MAX = 64
"""What a command may have besides its argument: client id, three numbers, and msgpack's headers."""


def size_refusal(group: str, command: bytes, limit: int) -> str | None:
    """Why a packed command, or run, is not taken because of its size, or None if it is.

    Asked on the way in and never when a command is applied: the limit may change while commands are under way, and
    replicas must not differ over it.
    """
    size_bytes = len(command)
    if size_bytes <= limit + COMMAND_HEADER_BYTES_MAX:
        return None
    try:
        arg = parse_command(command)[4]
    except ValueError:
        arg = command  # it is refused for that when it is applied; here only its size counts
    if type(arg) is list:
        size_bytes = max(map(len, arg))
        if size_bytes <= limit:
            return None
    return f"the argument has about {size_bytes} bytes; the limit of group {group} is command_bytes_max = {limit}"


def parse_command(data: bytes) -> tuple[bytes, int, int, int, bytes | list[bytes]]:
    """Take a command's header apart: ``(client_id, seq, acked, issued_us, arg)``; of a run, ``arg`` is the list.

    Raises:
        ValueError: the bytes are not a command.
    """
    try:
        client_id, seq, acked, issued_us, arg = _unpack(data)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError("a command is msgpack [client id, seq, acked, issued at, argument]") from error
    if (
        type(client_id) is not bytes
        or len(client_id) != 16
        or type(seq) is not int
        or type(acked) is not int
        or type(issued_us) is not int
        or not 0 <= acked < seq < 1 << 63
        or not 0 <= issued_us < 1 << 63
    ):
        raise ValueError("a command's header has a wrong field")
    if type(arg) is not bytes:
        check_arguments(arg)
        if (seq + len(arg)) >> 63:
            raise ValueError("a run's last seq is out of range")
    return client_id, seq, acked, issued_us, arg


def check_arguments(args: object) -> list[bytes]:
    """Return the arguments of a run if that is what they are.

    Raises:
        ValueError: they are not, or too many.
    """
    if type(args) is not list or not 0 < len(args) <= RUN_COMMANDS_MAX or set(map(type, args)) != {bytes}:
        raise ValueError(f"a run has 1 to {RUN_COMMANDS_MAX} packed arguments")
    return args


def pack_batch(time_us: int, commands: list[bytes]) -> bytes:
    """Data of a COMMANDS entry."""
    packed: bytes = _pack((time_us, commands))
    return packed


def unpack_batch(data: bytes) -> tuple[int, list[bytes]]:
    """The inverse of :func:`pack_batch`. The commands are not looked at: :func:`parse_command` does.

    Raises:
        ValueError: the bytes are not a batch.
    """
    try:
        time_us, commands = _unpack(data)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError("a batch is msgpack [time, [command, ...]]") from error
    if type(time_us) is not int or type(commands) is not list or not 0 <= time_us < 1 << 63:
        raise ValueError("a batch has a wrong field")
    return time_us, commands


class Session:
    """One client's results above ``acked``: ``results[seq]`` is the packed result, or ``(code, packed body)``.

    Most are results, and bytes cost the garbage collector nothing.
    """

    __slots__ = ("acked", "results", "used_us")

    def __init__(self) -> None:
        self.acked = 0
        self.used_us = 0
        self.results: dict[int, bytes | tuple[int, bytes]] = {}

    def acknowledge(self, acked: int) -> None:
        """Forget the results up to ``acked``, which is higher than before."""
        results = self.results
        if acked - self.acked == 1:
            results.pop(acked, None)  # a client with one command at a time
        elif len(results) <= acked - self.acked:
            for old in [old for old in results if old <= acked]:
                del results[old]
        else:
            for old in range(self.acked + 1, acked + 1):
                results.pop(old, None)
        self.acked = acked


_NO_SESSIONS: OrderedDict[bytes, Session] = OrderedDict()
"""The table of every group without a client: nothing is ever put into it (an empty one takes 200 bytes)."""


class Sessions:
    """All clients of one group, in the order of their last use."""

    __slots__ = ("by_client", "count_max", "ttl_us")

    def __init__(self, ttl_us: int, count_max: int) -> None:
        self.ttl_us = ttl_us
        self.count_max = count_max
        self.by_client: OrderedDict[bytes, Session] = _NO_SESSIONS

    def _begin(self, client_id: bytes) -> Session:
        """A new session. The first one makes the table: a group that nobody has used yet needs none."""
        if self.by_client is _NO_SESSIONS:
            self.by_client = OrderedDict()
        session = self.by_client[client_id] = Session()
        return session

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
            session = self._begin(client_id)
        else:
            stored = session.results.get(seq)
            if stored is not None:
                return stored if type(stored) is tuple else (OK, stored)  # type: ignore[return-value]
            if seq <= session.acked or abs(time_us - issued_us) * 2 > self.ttl_us:
                return SESSION_EXPIRED, NIL
            if len(session.results) >= RESULTS_PER_SESSION_MAX and acked <= session.acked:
                return OVERLOADED, NIL
            self.by_client.move_to_end(client_id)
        session.used_us = time_us
        if acked > session.acked:
            session.acknowledge(acked)
        return session

    def admit_run(
        self, client_id: bytes, first: int, count: int, acked: int, issued_us: int, time_us: int
    ) -> Session | None:
        """The session in which ``count`` commands from ``first`` on all run now: what :meth:`admit` would say of each.

        None: not all of them; nothing was changed, ask for each.
        """
        session = self.by_client.get(client_id)
        if (
            session is None
            or first <= session.acked
            or abs(time_us - issued_us) * 2 > self.ttl_us
            or len(session.results) + count > RESULTS_PER_SESSION_MAX
            or not session.results.keys().isdisjoint(range(first, first + count))
        ):
            return None
        self.by_client.move_to_end(client_id)
        session.used_us = time_us
        if acked > session.acked:
            session.acknowledge(acked)
        return session

    def dump(self) -> list[Any]:
        """For a snapshot; oldest use first."""
        return [
            [
                client_id,
                s.acked,
                s.used_us,
                [[seq, *stored] if type(stored) is tuple else [seq, OK, stored] for seq, stored in s.results.items()],
            ]
            for client_id, s in self.by_client.items()
        ]

    def load(self, rows: list[Any]) -> None:
        """The inverse of :meth:`dump`.

        Raises:
            ValueError: the rows are not a dump. The table is empty then.
        """
        self.by_client = _NO_SESSIONS
        try:
            for client_id, acked, used_us, results in rows:
                if not (bytes is type(client_id) and int is type(acked) is type(used_us)):
                    raise ValueError("a wrong type")
                session = self._begin(client_id)
                session.acked = acked
                session.used_us = used_us
                session.results = {seq: body if code == OK else (code, body) for seq, code, body in results}
        except (ValueError, TypeError) as error:
            self.by_client = _NO_SESSIONS
            raise ValueError(f"not a table of sessions: {error}") from error

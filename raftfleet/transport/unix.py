"""The Unix stream sockets on which a process of the node serves local clients.

Rules:

1. Nothing blocks and nothing that a client sends raises: what cannot be understood ends that client's connection,
   counted and logged at a limited rate.
2. Everything is bounded: connections, the bytes of an unfinished frame, the bytes that wait to be read by the client. A
   client that does not read is first not listened to any more, and dropped when it still has more coming than is kept.
3. The first request on a connection is HELLO; before it nothing else is understood.
4. Replies are collected and leave in one frame per connection at :meth:`UnixServer.flush`, so that a busy loop makes
   one system call per client, not one per reply.

How it is driven: ``poller.wait()`` reads what is there, :meth:`UnixServer.receive` hands it out, :meth:`send` and
:meth:`flush` answer, :meth:`sweep` about once a second drops those that never said HELLO or stopped reading.

The counters, by name: ``connections``, ``requests``, ``replies``, ``bytes_received``, ``bytes_sent``, ``closed``, and
``dropped: `` and one of :class:`WireError`'s reasons, ``too many connections``, ``no hello``, ``other protocol``,
``does not read``, ``connection lost``.
"""

from __future__ import annotations

import errno
import functools
import grp
import itertools
import logging
import os
import socket
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raftfleet.transport.base import monotonic_us
from raftfleet.transport.errors import ListenError
from raftfleet.transport.poller import READ, WRITE, Poller
from raftfleet.transport.ratelimit import LimitedLog
from raftfleet.wire import ipc
from raftfleet.wire.errors import WireError

CONNECTIONS_MAX = 1024
OUTPUT_BYTES_MAX = 64 << 20
"""Four of the largest replies. More than that waiting is a client that does not read."""
OUTPUT_PAUSE_BYTES = 1 << 20
"""While more than this waits for a client, its requests are not read: it slows down itself and nobody else."""
HELLO_TIMEOUT_US = 10_000_000
READ_TIMEOUT_US = 30_000_000
"""A client that has output waiting and has taken none of it for so long is gone or stuck."""
PATH_BYTES_MAX = 107
"""``sockaddr_un`` has room for 108 bytes, one of them a NUL."""

logger = logging.getLogger(__name__)


class _Connection:
    __slots__ = (
        "accepted_us",
        "client_id",
        "events",
        "fd",
        "ident",
        "output",
        "output_bytes",
        "progress_us",
        "reader",
        "replies",
        "sock",
    )

    def __init__(self, ident: int, sock: socket.socket, reader: ipc.FrameReader, now_us: int) -> None:
        self.ident = ident
        self.sock = sock
        self.fd = sock.fileno()
        self.reader = reader
        self.accepted_us = now_us
        self.client_id: bytes | None = None  # None: has not said HELLO
        self.replies: list[list[Any]] = []  # not packed yet
        self.output: list[bytes | memoryview] = []  # packed, not taken by the kernel yet
        self.output_bytes = 0
        self.progress_us = now_us  # when the kernel last took something while something waited
        self.events = READ


class UnixServer:
    """A listening Unix socket and its connections.

    Args:
        path: of the socket file. One left by a process that is gone is replaced; one that answers is a ListenError.
        poller: where the descriptors are registered; its ``wait`` reads.
        welcome: the body of the answer to HELLO, asked for each time (``{"node", "role", "index", "instance",
            "workers", "protocol"}``).
        mode: of the socket file. It is never open wider, not even for a moment.
        group: name of the Unix group that shall own the file, or None.
        on_disconnect: told the id of each connection that has ended, so that nobody answers into the void.

    Raises:
        ListenError: the path is too long, in use, or not ours to write.
    """

    def __init__(
        self,
        path: str | Path,
        poller: Poller,
        welcome: Callable[[], dict[str, Any]],
        *,
        mode: int = 0o600,
        group: str | None = None,
        connections_max: int = CONNECTIONS_MAX,
        output_bytes_max: int = OUTPUT_BYTES_MAX,
        output_pause_bytes: int = OUTPUT_PAUSE_BYTES,
        frame_bytes_max: int = ipc.FRAME_BYTES_MAX,
        on_disconnect: Callable[[int], None] | None = None,
        clock_us: Callable[[], int] = monotonic_us,
    ) -> None:
        self.path = str(path)
        self.counters: Counter[str] = Counter()
        self._poller = poller
        self._welcome = welcome
        self._connections_max = connections_max
        self._output_bytes_max = output_bytes_max
        self._output_pause_bytes = output_pause_bytes
        self._frame_bytes_max = frame_bytes_max
        self._on_disconnect = on_disconnect
        self._clock_us = clock_us
        self._log = LimitedLog(logger)
        self._idents = itertools.count(1)
        self._connections: dict[int, _Connection] = {}
        self._inbox: list[tuple[int, list[list[Any]]]] = []
        self._unflushed: dict[int, _Connection] = {}
        # Held back for the moment when the process is out of descriptors: without one to spare, the connection that
        # cannot be accepted could not be refused either, and epoll would report it for ever.
        self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._listener = _listen(self.path, mode, group)
        except BaseException:
            os.close(self._spare_fd)
            raise
        self._inode = os.stat(self.path).st_ino
        poller.register(self._listener.fileno(), self._accept)

    # --- what the loop calls ---

    def receive(self) -> list[tuple[int, list[list[Any]]]]:
        """``(connection id, requests)`` that ``poller.wait`` has read since the last call, checked, without HELLOs."""
        received = self._inbox
        if received:
            self._inbox = []
        return received

    def send(self, connection_id: int, replies: list[list[Any]]) -> bool:
        """Queue ``[id, code, body]`` replies until :meth:`flush`. False if that connection has ended."""
        connection = self._connections.get(connection_id)
        if connection is None:
            return False
        connection.replies += replies
        self._unflushed[connection_id] = connection
        return True

    def flush(self) -> None:
        """Write what was sent, one frame per connection; what the kernel does not take waits for it."""
        if not self._unflushed:
            return
        unflushed = self._unflushed
        self._unflushed = {}
        for connection in unflushed.values():
            replies = connection.replies
            connection.replies = []
            self.counters["replies"] += len(replies)
            if connection.ident in self._connections:
                self._write(connection, _pack_replies(replies))

    def sweep(self, now_us: int) -> None:
        """Drop those that never said HELLO and those that have stopped reading. About once a second will do."""
        for connection in list(self._connections.values()):
            if connection.client_id is None and now_us - connection.accepted_us > HELLO_TIMEOUT_US:
                self._drop(connection, "no hello", "nothing understandable came for 10 s")
            elif connection.output and now_us - connection.progress_us > READ_TIMEOUT_US:
                self._drop(connection, "does not read", f"{connection.output_bytes} bytes have waited for 30 s")

    def client_id(self, connection_id: int) -> bytes | None:
        """The 16 bytes that the client called itself in HELLO, None if the connection has ended."""
        connection = self._connections.get(connection_id)
        return connection.client_id if connection is not None else None

    def connection_ids(self) -> list[int]:
        """Connections that have said HELLO."""
        return [ident for ident, connection in self._connections.items() if connection.client_id is not None]

    def close(self) -> None:
        """Flush what the kernel takes at once, close everything, remove the socket file if it is still ours."""
        if self._spare_fd < 0:
            return
        self.flush()
        self._poller.unregister(self._listener.fileno())
        self._listener.close()
        for connection in list(self._connections.values()):
            self._close(connection)
        try:
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)
        except FileNotFoundError:
            pass
        os.close(self._spare_fd)
        self._spare_fd = -1

    # --- what the poller calls ---

    def _accept(self, _mask: int) -> None:
        for _ in range(64):  # then the others have their turn
            try:
                sock, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._refuse_without_descriptor()
                return
            if len(self._connections) >= self._connections_max:
                sock.close()
                self._warn("too many connections", f"a client was turned away: {self._connections_max} are connected")
                continue
            sock.setblocking(False)
            connection = _Connection(next(self._idents), sock, ipc.FrameReader(self._frame_bytes_max), self._clock_us())
            self._connections[connection.ident] = connection
            self.counters["connections"] += 1
            self._poller.register(connection.fd, functools.partial(self._ready, connection))

    def _refuse_without_descriptor(self) -> None:
        os.close(self._spare_fd)
        try:
            sock, _address = self._listener.accept()
            sock.close()
        except OSError:
            pass
        self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._warn("too many connections", "a client was turned away: the process has no file descriptor left")

    def _ready(self, connection: _Connection, mask: int) -> None:
        if mask & WRITE:
            self._write_waiting(connection)
        if mask & ~WRITE and connection.ident in self._connections:
            self._read(connection)

    def _read(self, connection: _Connection) -> None:
        try:
            data = connection.sock.recv(ipc.RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._drop(connection, "connection lost", str(error), quiet=True)
            return
        if not data:
            if connection.reader.pending_bytes:
                self._drop(connection, "connection lost", "it ended in the middle of a frame", quiet=True)
            else:
                self._close(connection)
            return
        self.counters["bytes_received"] += len(data)
        try:
            frames = connection.reader.feed(data)
            if not frames:
                return
            requests = frames[0] if len(frames) == 1 else [request for frame in frames for request in frame]
            for request in requests:
                ipc.check_request(request)
            if connection.client_id is None:
                requests = self._hello(connection, requests)
            elif any(request[1] == ipc.HELLO for request in requests):
                raise WireError("request", "a second HELLO")
        except WireError as error:
            self._drop(connection, error.reason, str(error))
            return
        if requests:
            self.counters["requests"] += len(requests)
            self._inbox.append((connection.ident, requests))

    def _hello(self, connection: _Connection, requests: list[list[Any]]) -> list[list[Any]]:
        if not requests:
            return requests
        hello, *others = requests
        if hello[1] != ipc.HELLO:
            raise WireError("no hello", "the first request is HELLO")
        if hello[2] != ipc.PROTOCOL:
            message = f"this node speaks version {ipc.PROTOCOL} of the protocol, not {hello[2]}"
            self._write(connection, ipc.pack_frame([[0, ipc.REFUSED, message]]))
            raise WireError("other protocol", message)
        if any(request[1] == ipc.HELLO for request in others):
            raise WireError("request", "a second HELLO")
        connection.client_id = hello[3]
        self._write(connection, ipc.pack_frame([[0, ipc.OK, self._welcome()]]))
        return others

    # --- output ---

    def _write(self, connection: _Connection, data: bytes) -> None:
        if connection.output:
            connection.output.append(data)
            connection.output_bytes += len(data)
        else:
            try:
                written = connection.sock.send(data)
            except (BlockingIOError, InterruptedError):
                written = 0
            except OSError as error:
                self._drop(connection, "connection lost", str(error), quiet=True)
                return
            self.counters["bytes_sent"] += written
            if written == len(data):
                return
            connection.output.append(memoryview(data)[written:])
            connection.output_bytes = len(data) - written
            connection.progress_us = self._clock_us()
        if connection.output_bytes > self._output_bytes_max:
            self._drop(
                connection,
                "does not read",
                f"{connection.output_bytes} bytes wait for it; the limit is {self._output_bytes_max}",
            )
            return
        self._wait_for(connection)

    def _write_waiting(self, connection: _Connection) -> None:
        output = connection.output
        try:
            while output:
                written = connection.sock.send(output[0])
                self.counters["bytes_sent"] += written
                connection.output_bytes -= written
                connection.progress_us = self._clock_us()
                if written < len(output[0]):
                    output[0] = memoryview(output[0])[written:]
                    break
                del output[0]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._drop(connection, "connection lost", str(error), quiet=True)
            return
        self._wait_for(connection)

    def _wait_for(self, connection: _Connection) -> None:
        events = WRITE if connection.output else 0
        if connection.output_bytes <= self._output_pause_bytes:
            events |= READ
        if events != connection.events:
            connection.events = events
            self._poller.modify(connection.fd, events)

    # --- endings ---

    def _drop(self, connection: _Connection, reason: str, detail: str, *, quiet: bool = False) -> None:
        """End a connection for a reason worth counting; ``quiet``: a client may well go away, that is no news."""
        if connection.ident not in self._connections:
            return
        if quiet:
            self.counters[f"dropped: {reason}"] += 1
        else:
            self._warn(reason, f"dropped a client of {os.path.basename(self.path)} ({reason}): {detail}")
        self._close(connection)

    def _close(self, connection: _Connection) -> None:
        if self._connections.pop(connection.ident, None) is None:
            return
        self._unflushed.pop(connection.ident, None)
        self._poller.unregister(connection.fd)
        connection.sock.close()
        connection.output.clear()
        self.counters["closed"] += 1
        if self._on_disconnect is not None:
            self._on_disconnect(connection.ident)

    def _warn(self, reason: str, message: str) -> None:
        self.counters[f"dropped: {reason}"] += 1
        self._log.warning(self._clock_us(), reason, "%s", message)


def _pack_replies(replies: list[list[Any]]) -> bytes:
    """One frame if it fits; more if it does not; an error in place of a reply that fits in none or cannot be packed."""
    try:
        return ipc.pack_frame(replies)
    except (WireError, ValueError, TypeError, RecursionError) as error:
        if len(replies) > 1:
            half = len(replies) // 2
            return _pack_replies(replies[:half]) + _pack_replies(replies[half:])
        if isinstance(error, WireError):
            message = f"the answer is larger than a frame may be ({ipc.FRAME_BYTES_MAX} bytes)"
        else:
            message = f"the answer cannot be packed: {error}"
        # It was carried out; only its result cannot be told. OUTCOME_UNKNOWN would invite to try again in vain.
        return ipc.pack_frame([[replies[0][0], ipc.COMMAND_FAILED, ["ResultTooLarge", message]]])


def _listen(path: str, mode: int, group: str | None) -> socket.socket:
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise ListenError(
            path,
            errno.ENAMETOOLONG,
            f"the path of a Unix socket has at most {PATH_BYTES_MAX} bytes: use a shorter run dir",
        )
    _remove_leftover(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        # bind() makes the file with the umask's mode: nobody else may connect before chmod has run.
        former_umask = os.umask(0o777)
        try:
            listener.bind(path)
        finally:
            os.umask(former_umask)
        if group is not None:
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
        os.chmod(path, mode)
        listener.listen(512)
    except KeyError as error:
        listener.close()
        os.unlink(path)
        raise ListenError(path, errno.EINVAL, f"there is no group {group!r}") from error
    except OSError as error:
        listener.close()
        raise ListenError(path, error.errno or 0, os.strerror(error.errno or 0)) from error
    return listener


def _remove_leftover(path: str) -> None:
    """Unlink a socket file that nobody listens on. ListenError if somebody does, or if it is no socket."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ListenError(path, errno.EEXIST, "there is a file that is not a socket")
    except FileNotFoundError:
        return
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ListenError(path, error.errno or 0, f"cannot remove the leftover socket: {error}") from error
        return
    except FileNotFoundError:
        return
    except BlockingIOError:  # its queue of connections is full: somebody is there
        pass
    except OSError as error:
        raise ListenError(path, error.errno or 0, os.strerror(error.errno or 0)) from error
    finally:
        probe.close()
    raise ListenError(path, errno.EADDRINUSE, "another process listens there")

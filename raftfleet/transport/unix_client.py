"""A non-blocking client's end of one of the node's Unix sockets, for the node's own processes.

The manager speaks so to its shards and a shard to shard 0. (Users' clients have their own drivers in
:mod:`raftfleet.client`.) Time arrives as an argument, in monotonic microseconds.

Rules:

1. A request is answered once: by the other side, or by the channel with UNANSWERED (it was never written: it did not
   happen) or OUTCOME_UNKNOWN (it was, and no answer came). The callback gets ``(code, body)`` as in
   :mod:`raftfleet.wire.ipc`, always from ``poller.wait()`` or :meth:`UnixChannel.tick`, never from within ``call``.
2. While there is no connection, requests wait, up to their deadlines, and are written in order when it is there.
3. A broken connection is made again, with back-off; ``on_up`` says so, because watches must be asked for again.
4. What waits is bounded: beyond it a request is answered OVERLOADED.
"""

from __future__ import annotations

import heapq
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raftfleet.transport.poller import READ, WRITE, Poller
from raftfleet.wire import ipc
from raftfleet.wire.errors import WireError

BACKOFF_FIRST_US = 10_000
BACKOFF_MAX_US = 1_000_000
HELLO_TIMEOUT_US = 5_000_000
"""A process that accepts but does not answer HELLO for so long is stuck: connect anew."""
WAITING_MAX = 100_000
"""Requests without an answer. The fleet's processes have a few; users' clients do not come this way."""
OUTPUT_BYTES_MAX = 64 << 20

logger = logging.getLogger(__name__)

Callback = Callable[[int, Any], None]


class _Request:
    __slots__ = ("callback", "deadline_us", "ident", "packed", "written")

    def __init__(self, ident: int, item: list[Any], deadline_us: int, callback: Callback) -> None:
        self.ident = ident
        self.packed: list[Any] | None = item  # None once it is written
        self.deadline_us = deadline_us
        self.callback = callback
        self.written = False


class UnixChannel:
    """A connection to the socket at ``path`` that is made again whenever it breaks.

    Args:
        client_id: 16 bytes, as in HELLO.
        on_push: called with ``[topic, ...]`` for each push.
        on_up: called with the body of HELLO's answer whenever a connection is ready.
        on_down: called with the reason whenever a ready connection has ended.

    Call :meth:`tick` at :meth:`next_deadline_us` (or oftener) and :meth:`flush` at the end of each loop.
    """

    def __init__(
        self,
        path: str | Path,
        client_id: bytes,
        poller: Poller,
        *,
        on_push: Callable[[list[Any]], None] | None = None,
        on_up: Callable[[dict[str, Any]], None] | None = None,
        on_down: Callable[[str], None] | None = None,
        waiting_max: int = WAITING_MAX,
    ) -> None:
        self.path = str(path)
        self.is_up = False
        self.welcome: dict[str, Any] = {}
        self.last_error = "not tried yet"
        self._client_id = client_id
        self._poller = poller
        self._on_push = on_push
        self._on_up = on_up
        self._on_down = on_down
        self._waiting_max = waiting_max
        self._requests: dict[int, _Request] = {}
        self._deadlines: list[tuple[int, int]] = []  # heap of (deadline, request id); answered ones are skipped
        self._to_write: list[_Request] = []
        self._answers: list[tuple[Callback, int, Any]] = []  # given by the channel itself, delivered by tick
        self._next_ident = 1
        self._sock: socket.socket | None = None
        self._reader = ipc.FrameReader()
        self._output = bytearray()
        self._events = READ
        self._backoff_us = BACKOFF_FIRST_US
        self._retry_at_us: int | None = 0  # None: not known before the next tick says what time it is
        self._hello_deadline_us: int | None = None
        self._closed = False

    # --- requests ---

    def call(
        self, method: str, args: dict[str, Any], timeout_ms: int, now_us: int, callback: Callback | None = None
    ) -> None:
        """Ask for CALL ``method`` with ``args``; ``callback(code, body)`` is told the outcome."""
        self.request(ipc.CALL, [method, args, timeout_ms], timeout_ms, now_us, callback)

    def request(
        self, kind: int, fields: list[Any], timeout_ms: int, now_us: int, callback: Callback | None = None
    ) -> None:
        """Ask anything: ``[id, kind, *fields]`` as in :mod:`raftfleet.wire.ipc`.

        The channel gives up a tenth of a second after the other side should have answered.
        """
        callback = callback or _ignore
        if self._closed or len(self._requests) >= self._waiting_max or len(self._output) > OUTPUT_BYTES_MAX:
            code = ipc.UNANSWERED if self._closed else ipc.OVERLOADED
            self._answers.append((callback, code, f"{os.path.basename(self.path)}: the channel is closed or full"))
            return
        ident = self._next_ident
        self._next_ident += 1
        deadline_us = now_us + timeout_ms * 1000 + 100_000
        request = _Request(ident, [ident, kind, *fields], deadline_us, callback)
        self._requests[ident] = request
        self._to_write.append(request)
        heapq.heappush(self._deadlines, (deadline_us, ident))

    def flush(self) -> None:
        """Write what was asked since the last time, in one frame."""
        if not self.is_up or not self._to_write:
            return
        requests = [request for request in self._to_write if request.ident in self._requests]
        self._to_write = []
        for frame_of in _pack_requests(requests, self._refuse):
            self._output += frame_of
        self._write()

    def _refuse(self, request: _Request, error: Exception) -> None:
        if self._requests.pop(request.ident, None) is not None:
            code = ipc.TOO_LARGE if isinstance(error, WireError) else ipc.BAD_REQUEST
            self._answers.append((request.callback, code, str(error)))

    # --- time ---

    def tick(self, now_us: int) -> None:
        """Connect if it is time to, give up requests whose deadline has passed, deliver the channel's own answers."""
        if self._closed:
            self._deliver()
            return
        if self._sock is None:
            if self._retry_at_us is None:
                self._retry_at_us = now_us + self._backoff_us
                self._backoff_us = min(2 * self._backoff_us, BACKOFF_MAX_US)
            if now_us >= self._retry_at_us:
                self._connect(now_us)
        elif self._hello_deadline_us is not None and now_us >= self._hello_deadline_us:
            self._disconnect("no answer to HELLO")
        while self._deadlines and self._deadlines[0][0] <= now_us:
            _, ident = heapq.heappop(self._deadlines)
            request = self._requests.pop(ident, None)
            if request is not None:
                code = ipc.OUTCOME_UNKNOWN if request.written else ipc.UNANSWERED
                message = "no answer in time" if request.written else f"not connected: {self.last_error}"
                self._answers.append((request.callback, code, f"{os.path.basename(self.path)}: {message}"))
        if len(self._to_write) > 2 * len(self._requests) + 16:  # mostly given up: a dead process must not collect them
            self._to_write = [request for request in self._to_write if request.ident in self._requests]
        self._deliver()
        self.flush()

    def next_deadline_us(self) -> int | None:
        """When :meth:`tick` has something to do; 0 is at once, None is never."""
        while self._deadlines and self._deadlines[0][1] not in self._requests:
            heapq.heappop(self._deadlines)
        candidates = [self._deadlines[0][0]] if self._deadlines else []
        if self._answers or (self.is_up and self._to_write):
            return 0  # something to deliver, or asked after the last flush
        if self._closed:
            return None
        if self._sock is None:
            candidates.append(self._retry_at_us or 0)
        elif self._hello_deadline_us is not None:
            candidates.append(self._hello_deadline_us)
        return min(candidates, default=None)

    def close(self) -> None:
        """End the connection. What has no answer yet is told so by the next tick."""
        self._closed = True
        self._disconnect("closed")
        for request in list(self._requests.values()):
            code = ipc.OUTCOME_UNKNOWN if request.written else ipc.UNANSWERED
            self._answers.append((request.callback, code, "the channel was closed"))
        self._requests.clear()
        self._to_write.clear()

    def _deliver(self) -> None:
        answers = self._answers
        self._answers = []
        for callback, code, body in answers:
            callback(code, body)

    # --- the connection ---

    def _connect(self, now_us: int) -> None:
        self._retry_at_us = None
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.connect(self.path)  # a Unix socket connects at once or not at all
        except OSError as error:
            sock.close()
            self.last_error = str(error)
            self._retry_at_us = now_us + self._backoff_us
            self._backoff_us = min(2 * self._backoff_us, BACKOFF_MAX_US)
            return
        self._sock = sock
        self._reader = ipc.FrameReader()
        self._output = bytearray()
        self._events = READ
        self._hello_deadline_us = now_us + HELLO_TIMEOUT_US
        self._poller.register(sock.fileno(), self._ready)
        self._output += ipc.pack_frame([[0, ipc.HELLO, ipc.PROTOCOL, self._client_id]])
        self._write()

    def _disconnect(self, reason: str) -> None:
        sock = self._sock
        if sock is None:
            return
        self._sock = None
        self._retry_at_us = None
        self._hello_deadline_us = None
        self.last_error = reason
        was_up, self.is_up = self.is_up, False
        self._poller.unregister(sock.fileno())
        sock.close()
        for request in list(self._requests.values()):
            if request.written:
                del self._requests[request.ident]
                message = f"{os.path.basename(self.path)}: connection lost: {reason}"
                self._answers.append((request.callback, ipc.OUTCOME_UNKNOWN, message))
        if was_up:
            logger.info("connection to %s lost: %s", self.path, reason)
            if self._on_down is not None:
                self._on_down(reason)

    def _ready(self, mask: int) -> None:
        if mask & WRITE:
            self._write()
        if mask & ~WRITE and self._sock is not None:
            self._read(self._sock)

    def _read(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(ipc.RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._disconnect(str(error))
            return
        if not data:
            self._disconnect("the other side closed it")
            return
        try:
            for frame in self._reader.feed(data):
                for reply in frame:
                    self._reply(*ipc.check_reply(reply))
                    if self._sock is not sock:  # a callback has closed the channel
                        return
        except WireError as error:
            logger.warning("%s: not understood: %s", self.path, error)
            self._disconnect(str(error))

    def _reply(self, ident: int, code: int, body: Any) -> None:
        if ident:
            request = self._requests.pop(ident, None)
            if request is not None:
                request.callback(code, body)
        elif code == ipc.PUSH:
            if type(body) is not list or not body:
                raise WireError("reply", "a push is [topic, ...]")
            if self._on_push is not None:
                self._on_push(body)
        elif self.is_up or code != ipc.OK or type(body) is not dict:
            raise WireError("reply", f"HELLO was answered {code} {body!r}"[:200])
        else:
            self.is_up = True
            self.welcome = body
            self._hello_deadline_us = None
            self._backoff_us = BACKOFF_FIRST_US
            if self._on_up is not None:
                self._on_up(body)
            self.flush()

    def _write(self) -> None:
        sock = self._sock
        if sock is None:
            return
        try:
            while self._output:
                del self._output[: sock.send(self._output)]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._disconnect(str(error))
            return
        events = READ | WRITE if self._output else READ
        if events != self._events:
            self._events = events
            self._poller.modify(sock.fileno(), events)


def _pack_requests(requests: list[_Request], refuse: Callable[[_Request, Exception], None]) -> list[bytes]:
    """Few frames with all requests; one that fits in none, or cannot be packed, is refused alone."""
    if not requests:
        return []
    try:
        packed = ipc.pack_frame([request.packed for request in requests])
    except (WireError, ValueError, TypeError, RecursionError) as error:
        if len(requests) > 1:
            half = len(requests) // 2
            return _pack_requests(requests[:half], refuse) + _pack_requests(requests[half:], refuse)
        refuse(requests[0], error)
        return []
    for request in requests:
        request.written = True
        request.packed = None
    return [packed]


def _ignore(_code: int, _body: Any) -> None:
    """The callback of whoever does not want to know."""

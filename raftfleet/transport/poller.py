"""One epoll for everything a process waits for: Unix sockets, TCP sockets, ZeroMQ's descriptors, signals.

Handlers are called from :meth:`Poller.wait`, in the process's one thread, and must not block. epoll is level-triggered
here: a handler that leaves something unread is called again. ZeroMQ's descriptors are the exception, for they become
readable on *changes* only; :mod:`raftfleet.transport.peers` drains until ``EVENTS`` says empty.

Signals: the C-level handler writes the signal's number into a socket pair (``signal.set_wakeup_fd``), the loop reads it
and calls the watcher. Nothing of ours runs inside a signal handler.
"""

from __future__ import annotations

import select
import signal
import socket
from collections.abc import Callable, Container
from types import FrameType
from typing import Any

READ = select.EPOLLIN
WRITE = select.EPOLLOUT

Handler = Callable[[int], None]
"""Called with the epoll event mask (READ, WRITE, EPOLLHUP, EPOLLERR)."""


class Poller:
    """An epoll with a handler for each descriptor."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._signal_reader: socket.socket | None = None
        self._signal_writer: socket.socket | None = None
        self._signal_handler: Callable[[int], None] | None = None
        self._former_handlers: dict[int, Any] = {}
        self._former_wakeup_fd = -1

    def register(self, fd: int, handler: Handler, events: int = READ) -> None:
        """Call ``handler`` whenever ``fd`` is ready for ``events``. ValueError if it is registered already."""
        if fd in self._handlers:
            raise ValueError(f"fd {fd} is registered already")
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def modify(self, fd: int, events: int) -> None:
        """Wait for other events on ``fd``; 0 leaves only hang-ups and errors."""
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Forget ``fd``. Call it before the descriptor is closed; unknown ones are ignored."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def wait(self, timeout_us: int | None) -> int:
        """Wait for up to ``timeout_us`` (None: for ever; 0: only look), call handlers, return how many were called.

        epoll counts in milliseconds: a timeout is rounded up to the next whole one.
        """
        events = self._epoll.poll(None if timeout_us is None else max(0, timeout_us) / 1_000_000)
        called = 0
        for fd, mask in events:
            handler = self._handlers.get(fd)
            if handler is not None:  # an earlier handler of this batch may have closed it
                handler(mask)
                called += 1
        return called

    def look(self, fds: Container[int]) -> None:
        """Call the handlers of ``fds`` for what is ready now; a later :meth:`wait` calls the others."""
        for fd, mask in self._epoll.poll(0):
            handler = self._handlers.get(fd) if fd in fds else None
            if handler is not None:
                handler(mask)

    def watch_signals(self, handler: Callable[[int], None], *signal_numbers: int) -> None:
        """From now on these signals end a wait, and ``handler`` is called with the number. Main thread only."""
        if self._signal_reader is not None:
            raise ValueError("signals are watched already")
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        self._signal_reader, self._signal_writer, self._signal_handler = reader, writer, handler
        # A full pipe is no reason for a warning on stderr: the loop will wake up for what is already in it.
        self._former_wakeup_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in signal_numbers:
            self._former_handlers[number] = signal.signal(number, _ignore)
        self.register(reader.fileno(), self._read_signals)

    def _read_signals(self, _mask: int) -> None:
        assert self._signal_reader is not None and self._signal_handler is not None
        try:
            numbers = self._signal_reader.recv(4096)
        except BlockingIOError:
            return
        for number in dict.fromkeys(numbers):  # the same signal many times at once is one signal
            if number in self._former_handlers:
                self._signal_handler(number)

    def close(self) -> None:
        """Close the epoll and give signals back to whoever had them. Registered descriptors stay open."""
        if self._signal_reader is not None and self._signal_writer is not None:
            for number, former in self._former_handlers.items():
                signal.signal(number, former if former is not None else signal.SIG_DFL)
            signal.set_wakeup_fd(self._former_wakeup_fd)
            self._signal_reader.close()
            self._signal_writer.close()
            self._signal_reader = self._signal_writer = None
            self._former_handlers.clear()
        self._handlers.clear()
        self._epoll.close()


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """The Python-level half of a watched signal: the C-level half has written to the wake-up descriptor already."""

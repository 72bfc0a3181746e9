"""Host names to addresses, without waiting for a name server.

An address of digits is answered at once. A name is looked up by a thread of its own, for there is no other way to ask
the system's resolver without blocking; whoever asks looks again until the answer is there.
"""

from __future__ import annotations

import socket
import threading
from typing import Any

LOOKUPS_MAX = 8
"""Names looked up at a time. A name server that does not answer holds each for some seconds."""

Address = tuple[int, Any]
"""``(family, sockaddr)``."""

_running: set[Lookup] = set()


class Lookup:
    """One question. ``addresses`` is None until it is answered, and empty if there is no such host."""

    def __init__(self, host: str, port: int) -> None:
        self.addresses: list[Address] | None = None
        self._host = host
        self._port = port
        self._thread: threading.Thread | None = None
        try:
            self.addresses = self._ask(socket.AI_NUMERICHOST)
        except OSError:
            self._begin()

    def _begin(self) -> None:
        if len(_running) >= LOOKUPS_MAX:
            self.addresses = []
            return
        _running.add(self)
        self._thread = threading.Thread(target=self._run, name=f"lookup {self._host}", daemon=True)
        self._thread.start()

    def _ask(self, flags: int) -> list[Address]:
        rows = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=flags)
        return [(row[0], row[4]) for row in rows]

    def _run(self) -> None:
        try:
            self.addresses = self._ask(0)
        except (OSError, UnicodeError):
            self.addresses = []
        finally:
            _running.discard(self)

    def wait(self, timeout_s: float) -> None:
        """For whoever closes: wait until the thread has ended, or for so long."""
        if self._thread is not None:
            self._thread.join(timeout_s)

"""Ports for tests: blocks of consecutive ones that nobody listens on and no other test run takes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

# Below Linux's ephemeral range (32768 and up), so that no outgoing connection sits on a port that is to be bound.
PORTS_FIRST, PORTS_LAST = 18_000, 31_999


class PortBlocks:
    """Blocks of consecutive free ports, each kept by a lock file so that parallel test runs do not share one.

    A free port that was found by binding and closing is anybody's until the node binds it. The lock file closes this
    window among the users of this class; the range below the ephemeral ports closes it for outgoing connections.
    """

    STEP = 20

    def __init__(self) -> None:
        self._folder = Path(tempfile.gettempdir()) / f"raftfleet-ports-{os.getuid()}"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._locks: list[tuple[Path, int]] = []

    def take_block(self, count: int) -> int:
        """The first of ``count`` consecutive ports that nobody listens on, kept until :meth:`release`."""
        assert 1 <= count <= self.STEP, f"a block has at most {self.STEP} ports"
        starts = list(range(PORTS_FIRST, PORTS_LAST - self.STEP, self.STEP))
        random.SystemRandom().shuffle(starts)
        for start in starts:
            if self._lock(start):
                if all(_is_free(port) for port in range(start, start + count)):
                    return start
                self._unlock(*self._locks.pop())
        raise OSError(errno.EADDRINUSE, f"no {count} consecutive free ports between {PORTS_FIRST} and {PORTS_LAST}")

    def release(self) -> None:
        """Give all blocks back and remove every trace."""
        for path, descriptor in self._locks:
            self._unlock(path, descriptor)
        self._locks.clear()
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    @classmethod
    def remove_abandoned(cls) -> None:
        """Remove the lock files of processes that ended without :meth:`release`."""
        blocks = cls()
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(blocks._folder):
                blocks._lock(int(name))
        blocks.release()

    def _lock(self, start: int) -> bool:
        path = self._folder / str(start)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # another user's release() has just removed the empty folder
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The lock counts only on the file that has the name now: its last owner may have unlinked this one.
            if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            os.close(descriptor)
            return False
        self._locks.append((path, descriptor))
        return True

    @staticmethod
    def _unlock(path: Path, descriptor: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.close(descriptor)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As ZeroMQ binds: a connection of an earlier test that lingers in TIME_WAIT does no harm.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True

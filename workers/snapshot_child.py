"""Writing a large snapshot while the worker goes on: a forked child has the state as it was at the fork.

The kernel copies a page when one of the two writes to it, so the child's view stands still and the worker pays only for
what it changes meanwhile (as in Redis's BGSAVE). Rules:

* The child touches nothing of the worker: no ZeroMQ, no socket, no log, no store. It closes every descriptor but the
  pipe's end at once (the data directory's lock among them), dumps, writes its file by
  :func:`raftfleet.storage.snapshots.write_snapshot`, says through the pipe what became of it, leaves by ``os._exit``.
* One child at a time. It dies with its worker, and is killed after ``CHILD_US_MAX``: a user's ``dump`` may wait for a
  lock that a thread of the worker held at the fork.
* The pipe tells the end, however the child ended: nothing written, or nonsense, is a failure.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import signal
import sys

import msgpack

from raftfleet.core.failures import describe
from raftfleet.core.member import Member
from raftfleet.node.context import monotonic_us
from raftfleet.storage.base import SnapshotInfo
from raftfleet.storage.files import OsFiles
from raftfleet.storage.keeper import Keeper
from raftfleet.storage.snapshots import TEMPORARY, snapshot_name, write_snapshot
from raftfleet.transport.poller import Poller

CHILD_US_MAX = 600_000_000
"""Half a gigabyte takes a few seconds; ten minutes are for a disk that hardly moves."""
REPORT_BYTES_MAX = 64 << 10
PR_SET_PDEATHSIG = 1
NICE = 5


class SnapshotChild:
    """The worker's side: begins a child, hears how it ended, tells the keeper."""

    def __init__(self, keeper: Keeper, poller: Poller) -> None:
        self.pid = 0
        self._keeper = keeper
        self._poller = poller
        self._uid = 0
        self._path = ""
        self._pipe = -1
        self._report = b""
        self._kill_us = 0
        self._libc = ctypes.CDLL(None)

    def begin(self, member: Member, generation: int) -> bool:
        """Fork a child that writes ``member``'s snapshot; False if one is at work already or none can be forked."""
        if self.pid:
            return False
        store = self._keeper.store
        folder = f"{store.path}/snapshots"
        parent = os.getpid()
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        began_us = monotonic_us()
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(reader)
            os.close(writer)
            self._keeper.snapshot_failed(member.uid, began_us, f"fork: {error}")
            return False
        if pid == 0:
            try:
                self._be_child(parent, writer, member, folder, generation)
            finally:
                os._exit(1)
        self._keeper.fork_us_max = max(self._keeper.fork_us_max, monotonic_us() - began_us)
        os.close(writer)
        self.pid, self._uid, self._pipe, self._report = pid, member.uid, reader, b""
        self._path = f"{folder}/{snapshot_name(member.uid, generation)}"
        self._kill_us = began_us + CHILD_US_MAX
        self._poller.register(reader, self._on_readable)
        return True

    # ------------------------------------------------------------------ the worker's side

    def _on_readable(self, _mask: int) -> None:
        try:
            data = os.read(self._pipe, REPORT_BYTES_MAX)
        except BlockingIOError:
            return
        if data:
            self._report += data
        else:
            self._ended()

    def tick(self, now_us: int) -> None:
        """Kill a child that takes for ever."""
        if self.pid and now_us > self._kill_us:
            self._kill_us = now_us + CHILD_US_MAX
            os.kill(self.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own

    def _ended(self) -> None:
        self._poller.unregister(self._pipe)
        os.close(self._pipe)
        _, status = os.waitpid(self.pid, 0)  # the pipe's last end was closed: it is dead, or as good as dead
        self.pid, self._pipe = 0, -1
        now_us = monotonic_us()
        try:
            index, term, generation, size_bytes = msgpack.unpackb(self._report)
            info = SnapshotInfo(self._uid, index, term, generation, size_bytes, self._path)
        except (ValueError, TypeError, msgpack.UnpackException):
            _remove(self._path + TEMPORARY)
            why = self._report.decode(errors="replace") or f"its writer ended with status {status}"
            self._keeper.snapshot_failed(self._uid, now_us, why)
            return
        self._keeper.snapshot_made(info)

    def close(self) -> None:
        """The worker ends: so does the child, and what it has not finished is removed."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self._poller.unregister(self._pipe)
            os.close(self._pipe)
            os.waitpid(self.pid, 0)
            self.pid = 0
            _remove(self._path + TEMPORARY)

    # ------------------------------------------------------------------ the child

    def _be_child(self, parent: int, writer: int, member: Member, folder: str, generation: int) -> None:
        self._libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            return
        gc.disable()  # a collection would touch, and so copy, every page
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _close_all_but(writer)
        os.nice(NICE)
        member.shard.user_code_watch = None
        try:
            index, term, data = member.make_snapshot()
            info = write_snapshot(OsFiles(), folder, member.uid, index, term, generation, {"name": member.name}, data)
        except BaseException as error:  # of the user's ``dump``, or the disk
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            text = "no space left for it" if full else ": ".join(describe(error))
            report = text.encode(errors="replace")[: REPORT_BYTES_MAX // 2]
        else:
            report = msgpack.packb([info.index, info.term, info.generation, info.size_bytes])
        _write_all(writer, report)
        os._exit(0)


def _close_all_but(kept: int) -> None:
    """Standard streams stay: a crash in C says where."""
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))


def _write_all(descriptor: int, data: bytes) -> None:
    os.set_blocking(descriptor, True)
    while data:
        data = data[os.write(descriptor, data) :]


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


__all__ = ["SnapshotChild"]

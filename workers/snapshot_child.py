"""Dumping a large state while the worker goes on: a forked child has the state as it was at the fork.

The kernel copies a page when one of the two writes to it, so the child's view stands still and the worker pays only for
what it changes meanwhile (as in Redis's BGSAVE). What it dumps goes into a snapshot file of the data directory, or, of
a group in memory that has to bring a member up to date, into an anonymous file in memory. Rules:

* The child touches nothing of the worker: no ZeroMQ, no socket, no log, no store. It closes every descriptor but the
  pipe's end (and the anonymous file) at once, the data directory's lock among them; it dumps, writes, says through the
  pipe what became of it, leaves by ``os._exit``.
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
import zlib
from collections.abc import Callable
from typing import Any, Protocol

import msgpack

from raftfleet.core.failures import describe
from raftfleet.core.member import Member
from raftfleet.core.shard import Shard
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


class Target(Protocol):
    """Where a child writes to, and who hears of it."""

    descriptor: int
    """Kept open in the child; -1: none."""

    def write(self, member: Member) -> list[Any]:
        """In the child: dump and write; what is returned, a msgpack value, is told to the worker."""

    def made(self, report: Any) -> None:
        """In the worker: it is done, as was reported. Raises ValueError or TypeError if that is nonsense."""

    def failed(self, why: str, now_us: int) -> None:
        """In the worker: it came to nothing."""

    def close(self) -> None:
        """In the worker: nothing more comes; what is half done is removed."""


class FileTarget:
    """A snapshot file of the data directory; ``is_last``: of a group that is being removed, for the archive."""

    descriptor = -1

    def __init__(self, keeper: Keeper, member: Member, generation: int, *, is_last: bool = False) -> None:
        self._keeper = keeper
        self._name = member.name
        self._is_last = is_last
        self._uid = member.uid
        self._generation = generation
        self._folder = f"{keeper.store.path}/snapshots"
        self._path = f"{self._folder}/{snapshot_name(member.uid, generation)}"

    def write(self, member: Member) -> list[Any]:
        """See :class:`Target`."""
        index, term, data = member.make_snapshot()
        meta = {"name": member.name}
        info = write_snapshot(OsFiles(), self._folder, member.uid, index, term, self._generation, meta, data)
        return [info.index, info.term, info.generation, info.size_bytes]

    def made(self, report: Any) -> None:
        """See :class:`Target`."""
        index, term, generation, size_bytes = report
        info = SnapshotInfo(self._uid, index, term, generation, size_bytes, self._path)
        if self._is_last:
            self._keeper.last_state_made(info)
        else:
            self._keeper.snapshot_made(info)

    def failed(self, why: str, now_us: int) -> None:
        """See :class:`Target`."""
        if self._is_last:
            self._keeper.last_state_failed(self._name, why)
        else:
            self._keeper.snapshot_failed(self._uid, now_us, why)

    def close(self) -> None:
        """See :class:`Target`."""
        try:
            os.unlink(self._path + TEMPORARY)
        except FileNotFoundError:
            pass


class MemorySource:
    """A dump in an anonymous file, read from there while it is sent. Satisfies :class:`raftfleet.core.sending.Source`.

    Like a file object it closes it when the last transfer that reads it lets go.
    """

    def __init__(self, descriptor: int, index: int, term: int, size_bytes: int, crc: int) -> None:
        self.index = index
        self.term = term
        self.size_bytes = size_bytes
        self.crc = crc
        self._descriptor = descriptor

    def read(self, offset: int, count: int) -> bytes:
        """See :class:`raftfleet.core.sending.Source`."""
        return os.pread(self._descriptor, count, offset)

    def __del__(self) -> None:
        os.close(self._descriptor)


class MemoryTarget:
    """An anonymous file: what it takes is given back with its last descriptor, whatever dies."""

    def __init__(self, shard: Shard, member: Member) -> None:
        self._shard = shard
        self._member = member
        self.descriptor = os.memfd_create("raftfleet-dump", os.MFD_CLOEXEC)

    def write(self, member: Member) -> list[Any]:
        """See :class:`Target`."""
        index, term, data = member.make_snapshot()
        _write_all(self.descriptor, data)
        return [index, term, len(data), zlib.crc32(data)]

    def made(self, report: Any) -> None:
        """See :class:`Target`."""
        index, term, size_bytes, crc = report
        source = MemorySource(self.descriptor, index, term, size_bytes, crc)
        self.descriptor = -1
        self._shard.dump_made(self._member, source)

    def failed(self, why: str, now_us: int) -> None:
        """See :class:`Target`."""
        self._shard.dump_failed(self._member, why)

    def close(self) -> None:
        """See :class:`Target`."""
        if self.descriptor != -1:
            os.close(self.descriptor)
            self.descriptor = -1


class SnapshotChild:
    """The worker's side: begins a child, hears how it ended, tells whoever wanted it.

    Attributes:
        fork_us_max: how long the longest fork took.
    """

    def __init__(self, poller: Poller) -> None:
        self.pid = 0
        self.fork_us_max = 0
        self._poller = poller
        self._target: Target | None = None
        self._pipe = -1
        self._report = b""
        self._kill_us = 0
        self._libc = ctypes.CDLL(None)

    def begin(self, member: Member, make_target: Callable[[], Target]) -> bool:
        """Fork a child that dumps ``member``; False if one is at work already or none can be forked."""
        if self.pid:
            return False
        target = make_target()
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
            target.close()
            target.failed(f"fork: {error}", began_us)
            return False
        if pid == 0:
            try:
                self._be_child(parent, writer, member, target)
            finally:
                os._exit(1)
        self.fork_us_max = max(self.fork_us_max, monotonic_us() - began_us)
        os.close(writer)
        self.pid, self._target, self._pipe, self._report = pid, target, reader, b""
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
        target = self._target
        assert target is not None
        self._poller.unregister(self._pipe)
        os.close(self._pipe)
        _, status = os.waitpid(self.pid, 0)  # the pipe's last end was closed: it is dead, or as good as dead
        self.pid, self._pipe, self._target = 0, -1, None
        try:
            report = msgpack.unpackb(self._report)
            if not isinstance(report, list) or len(report) != 4:
                raise ValueError(report)
        except (ValueError, TypeError, msgpack.UnpackException):
            target.close()
            why = self._report.decode(errors="replace") or f"its writer ended with status {status}"
            target.failed(why, monotonic_us())
            return
        target.made(report)

    def close(self) -> None:
        """The worker ends: so does the child, and what it has not finished is removed."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self._poller.unregister(self._pipe)
            os.close(self._pipe)
            os.waitpid(self.pid, 0)
            self.pid = 0
        if self._target is not None:
            self._target.close()
            self._target = None

    # ------------------------------------------------------------------ the child

    def _be_child(self, parent: int, writer: int, member: Member, target: Target) -> None:
        self._libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            return
        gc.disable()  # a collection would touch, and so copy, every page
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _close_all_but(writer, target.descriptor)
        os.nice(NICE)
        member.shard.user_code_watch = None
        try:
            report = msgpack.packb(target.write(member))
        except BaseException as error:  # of the user's ``dump``, or the disk
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            text = "no space left for it" if full else ": ".join(describe(error))
            report = text.encode(errors="replace")[: REPORT_BYTES_MAX // 2]
        _write_all(writer, report)
        os._exit(0)


def _close_all_but(*kept: int) -> None:
    """Standard streams stay: a crash in C says where."""
    start = 3
    for descriptor in sorted(kept):
        if descriptor >= start:
            os.closerange(start, descriptor)
            start = descriptor + 1
    os.closerange(start, os.sysconf("SC_OPEN_MAX"))


def _write_all(descriptor: int, data: bytes) -> None:
    os.set_blocking(descriptor, True)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


__all__ = ["FileTarget", "MemoryTarget", "SnapshotChild"]

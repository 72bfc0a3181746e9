"""Ends what a :class:`~raftfleet.testing.LocalFleet` started when its process ended without closing it, however it did.

A watcher, one small process per fleet, reads a pipe whose other end only the fleet's process holds: the kernel closes
that end even after SIGKILL. The watcher then asks the fleet's nodes to end, kills those that do not, and removes what
they left. Nodes are found by their command lines, which name the fleet's folder, and not by process ids told before:
none is missed that was started a moment ago, and no stranger is hit who has got an id since.

No process that the fleet's process starts inherits the end of the pipe (close-on-exec), nor does a fork keep it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

from raftfleet.testing.ports import PortBlocks

GRACE_S = 10.0
"""Until SIGKILL. A node kills its own children five seconds after it was told to end."""

_POLL_INTERVAL_S = 0.05

# What is needed to reap is imported only then: until then the watcher is to cost next to nothing.
_WATCHER = "import sys; sys.stdin.buffer.read(); from raftfleet.testing import reaper; reaper.reap(sys.argv[1])"


class Reaper:
    """The watcher of one fleet, seen from the process that it watches.

    Args:
        folder: the fleet's; all its nodes have their run directories in it.
    """

    def __init__(self, folder: Path) -> None:
        read_end, write_end = os.pipe()
        self._pipe = os.fdopen(write_end, "wb")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _WATCHER, str(folder)],
                stdin=read_end,
                # Whoever reads the output of the process that has ended shall not wait for this one, too.
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(read_end)
        _reapers.add(self)

    def close(self) -> None:
        """End the watcher: there is nothing left to watch over."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()


_reapers: weakref.WeakSet[Reaper] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for reaper in list(_reapers):
        reaper._pipe.close()


os.register_at_fork(after_in_child=_after_fork_in_child)


# -------------------------------------------------------------------- in the watcher


def reap(folder: str) -> None:
    """End all nodes whose run directories are in ``folder``, and remove it with all that they left elsewhere."""
    deadline = time.monotonic() + GRACE_S
    asked: set[int] = set()
    while (found := node_processes(folder)) and time.monotonic() < deadline:
        for pid in found - asked:
            _signal(pid, signal.SIGCONT)  # it may have been paused
            if _is_supervisor(pid):
                _signal(pid, signal.SIGTERM)
        asked |= found
        time.sleep(_POLL_INTERVAL_S)
    while found:
        for pid in found:
            _signal(pid, signal.SIGKILL)
        time.sleep(_POLL_INTERVAL_S)
        found = node_processes(folder)
    for run_dir in Path(folder).glob("*/"):
        remove_table(run_dir)
    shutil.rmtree(folder, ignore_errors=True)
    PortBlocks.remove_abandoned()


def node_processes(folder: str) -> set[int]:
    """All processes of nodes whose run directories are in ``folder``; a node's children have its command line."""
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                words = Path("/proc", entry, "cmdline").read_bytes().split(b"\0")
                if b"--run-dir" in words:
                    run_dir = words[words.index(b"--run-dir") + 1]
                    if run_dir.startswith(os.fsencode(folder) + b"/"):
                        found.add(int(entry))
    return found


def remove_table(run_dir: Path) -> None:
    """Remove the leader table's segments (one, or two while it grows) that a killed node could not remove itself."""
    with contextlib.suppress(OSError):
        current = Path(os.readlink(run_dir / "leader_table"))
        stem, separator, _generation = current.name.rpartition("-g")
        if separator and stem.startswith("raftfleet-") and current.parent == Path("/dev/shm"):
            for segment in current.parent.glob(f"{stem}-g*"):
                segment.unlink(missing_ok=True)


def _is_supervisor(pid: int) -> bool:
    """Whether it leads its session, as LocalFleet starts it; it then ends its children itself."""
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)

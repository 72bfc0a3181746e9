"""What a test may leave behind, and how it is seen: processes, threads, descriptors, shared segments, folders."""

from __future__ import annotations

import os
import tempfile
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "FLEET_TEST_SESSION"  # inherited by every process that a test starts; not RAFTFLEET_…, which nodes interpret
SESSION = uuid.uuid4().hex
SHM = Path("/dev/shm")
SUPERVISOR_PID_OFFSET = 48  # in a leader table's header

os.environ[MARK] = SESSION
_made_folders: set[str] = set()
_mkdtemp = tempfile.mkdtemp


def _recording_mkdtemp(*args: Any, **kwargs: Any) -> Any:
    folder = _mkdtemp(*args, **kwargs)
    _made_folders.add(os.fspath(folder))
    return folder


tempfile.mkdtemp = _recording_mkdtemp  # type: ignore[assignment]


@dataclass
class Snapshot:
    """What there is at one moment, each as a printable name."""

    processes: set[str]
    threads: set[str]
    descriptors: set[str]
    segments: set[str]
    folders: set[str]


def running_processes() -> dict[int, str]:
    """Processes of this test session but this one, by pid: those forked here, and those started with our mark."""
    mine = _read(Path("/proc/self/cmdline"))
    session = os.getsid(0)
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        folder = Path("/proc", entry)
        status = _read(folder / "stat")
        fields = status.rpartition(b")")[2].split()
        if not fields or int(fields[1]) == 2:  # gone, or a thread of the kernel
            continue
        is_fork = int(fields[3]) == session and _read(folder / "cmdline") == mine
        is_child = int(fields[1]) == os.getpid()
        if is_child or is_fork or f"{MARK}={SESSION}".encode() in _read(folder / "environ").split(b"\0"):
            name = status[status.find(b"(") + 1 : status.rfind(b")")].decode(errors="replace")
            found[int(entry)] = f"process {entry} ({name}, state {fields[0].decode()})"
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _descriptors() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"descriptor {number} -> {os.readlink(f'/proc/self/fd/{number}')}")
        except OSError:  # the one that listed the folder
            pass
    return found


def _segments(processes: dict[int, str]) -> set[str]:
    """Leader tables whose node is dead, or is one of ours. Those of other living nodes are none of our business.

    With ``RAFTFLEET_TEST_NEIGHBOURS`` set, other test runs kill their nodes on this machine: the dead are theirs then.
    """
    found = set()
    has_neighbours = bool(os.environ.get("RAFTFLEET_TEST_NEIGHBOURS"))
    for path in SHM.glob("raftfleet-*"):
        header = _read(path)[: SUPERVISOR_PID_OFFSET + 8]
        pid = int.from_bytes(header[SUPERVISOR_PID_OFFSET:], "little")
        is_dead = not has_neighbours and not Path(f"/proc/{pid}").exists()
        if pid in processes or pid == os.getpid() or is_dead:
            found.add(f"shared memory {path}")
    return found


def snapshot() -> Snapshot:
    processes = running_processes()
    return Snapshot(
        processes=set(processes.values()),
        threads={f"thread {thread.name}" for thread in threading.enumerate()}
        | {f"task {task} of this process" for task in os.listdir("/proc/self/task")},
        descriptors=_descriptors(),
        segments=_segments(processes),
        folders={f"folder {folder}" for folder in _made_folders if os.path.exists(folder)},
    )


def leaks_since(before: Snapshot) -> list[str]:
    """What is there now and was not before."""
    now = snapshot()
    # A process changes its state and its name; what counts is its number.
    known = {name.split()[1] for name in before.processes}
    leaks = [name for name in sorted(now.processes) if name.split()[1] not in known]
    for kind in ("threads", "descriptors", "segments", "folders"):
        leaks += sorted(getattr(now, kind) - getattr(before, kind))
    return leaks

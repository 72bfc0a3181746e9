"""The run directory: where a node's sockets, its lock and the link to its leader table lie.

::

    RUN_DIR/                  0700, or 0750 with a socket group
        node.lock             held (flock) by the supervisor and its children; lines inside: pid, name, and
                              whether the node had ``made`` or ``found`` this directory
        control.sock          the manager's Unix socket, 0600, or 0660 with a socket group
        shard-0.sock ...      the shards' Unix sockets, likewise
        leader_table          link to the present segment in /dev/shm

The lock decides who owns the directory. It belongs to the open file, which children inherit: a new node can take over
only when the last process of a crashed one is gone, and then everything else in here is a leftover and is removed.

This module starts no process and is light to import: clients use it to find their node.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import socket
import stat
import time
from collections.abc import Mapping
from pathlib import Path

from raftfleet.errors import ConfigError, NodeError

LOCK_NAME = "node.lock"
CONTROL_SOCKET_NAME = "control.sock"
LEADER_TABLE_NAME = "leader_table"
RUN_DIR_VARIABLE = "RAFTFLEET_RUN_DIR"
SOCKET_PATH_BYTES_MAX = 107  # sockaddr_un.sun_path is 108 bytes, with a zero at the end


class RunDirBusy(NodeError):
    """Another node runs in this run directory."""


def shard_socket_name(index: int) -> str:
    """File name of shard ``index``'s socket."""
    return f"shard-{index}.sock"


def shard_socket(run_dir: str | os.PathLike[str], index: int) -> Path:
    """Where shard ``index`` listens for local clients."""
    return Path(run_dir) / shard_socket_name(index)


def control_socket(run_dir: str | os.PathLike[str]) -> Path:
    """Where the manager listens for local clients."""
    return Path(run_dir) / CONTROL_SOCKET_NAME


def default_node_name() -> str:
    """The name of a node that was given none: the machine's host name, without its domain."""
    return socket.gethostname().split(".")[0] or "node"


def base_dir(environ: Mapping[str, str] | None = None) -> Path:
    """The folder that holds the default run directories: ``$XDG_RUNTIME_DIR/raftfleet``, else ``/run/raftfleet``."""
    environ = os.environ if environ is None else environ
    return Path(environ.get("XDG_RUNTIME_DIR") or "/run") / "raftfleet"


def default_run_dir(name: str, environ: Mapping[str, str] | None = None) -> Path:
    """The run directory of the node called ``name`` when no other is asked for."""
    return base_dir(environ) / name


def lock_holder(run_dir: str | os.PathLike[str]) -> int | None:
    """The pid of the supervisor that wrote the lock file, or None. It may be dead: this is for messages only."""
    try:
        return int((Path(run_dir) / LOCK_NAME).read_text().split("\n")[0])
    except (OSError, ValueError):
        return None


def group_id(name: str | None) -> int | None:
    """The gid of the group called ``name``; ConfigError if this machine has none."""
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"socket_group: this machine has no group {name!r}") from None


class RunDir:
    """A run directory that this process has locked."""

    def __init__(self, path: Path, lock_fd: int, *, created: bool) -> None:
        self.path = path
        self._lock_fd = lock_fd
        self._created = created

    @classmethod
    def acquire(
        cls, path: str | os.PathLike[str], *, name: str, socket_group: str | None = None, wait_s: float = 3.0
    ) -> RunDir:
        """Create the directory if need be, lock it and clear what a crashed node left in it.

        Args:
            name: the node's name, for the lock file.
            socket_group: a group of users that may reach the sockets, or None.
            wait_s: how long to wait for the children of a supervisor that is dead already: they die with it, but
                not before it. A living one is not waited for.

        Raises:
            RunDirBusy: another node holds it.
            ConfigError: it cannot be made, belongs to somebody else, or is open to writers who are not its owner.
        """
        folder = Path(path)
        created = _make(folder, group_id(socket_group))
        lock_fd = _lock(folder, wait_s)
        try:
            # A crashed node that had made the directory would have removed it: that duty is taken over too.
            created = created or os.pread(lock_fd, 4096, 0).endswith(b"\nmade\n")
            os.ftruncate(lock_fd, 0)
            os.pwrite(lock_fd, f"{os.getpid()}\n{name}\n{'made' if created else 'found'}\n".encode(), 0)
        except BaseException:
            os.close(lock_fd)
            raise
        run_dir = cls(folder, lock_fd, created=created)
        run_dir.remove_sockets()
        return run_dir

    def remove_sockets(self) -> None:
        """Remove every socket file: only while no process of the node runs."""
        for path in self.path.glob("*.sock"):
            _unlink(path)

    def remove_socket(self, name: str) -> None:
        """Remove one socket file, if it is there."""
        _unlink(self.path / name)

    def release(self) -> None:
        """Leave nothing behind: sockets, lock, and the directory itself if it was made here and is empty."""
        self.remove_sockets()
        _unlink(self.path / LOCK_NAME)
        if self._created:
            try:
                self.path.rmdir()
            except OSError:
                pass  # somebody put a file of their own there
        os.close(self._lock_fd)


def _unlink(path: str | os.PathLike[str]) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _make(folder: Path, gid: int | None) -> bool:
    """Create ``folder``; True if it was not there. An existing one is checked, never changed: it may be the user's."""
    try:
        folder.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            _check(folder)
            return False
    except OSError as error:
        raise ConfigError(
            f"run_dir: cannot create {folder}: {os.strerror(error.errno or 0)}; choose another with --run-dir"
        ) from error
    if gid is not None:
        os.chown(folder, -1, gid)
        os.chmod(folder, 0o750)
    return True


def _check(folder: Path) -> None:
    status = folder.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"run_dir: {folder} is not a directory")
    if status.st_uid != os.geteuid():
        raise ConfigError(f"run_dir: {folder} belongs to user {status.st_uid}, this process is user {os.geteuid()}")
    if status.st_mode & 0o022:
        raise ConfigError(
            f"run_dir: {folder} can be written by others (mode {stat.S_IMODE(status.st_mode):o}), who could put "
            f"sockets of their own there; use a directory of its own, or chmod 700"
        )


def _lock(folder: Path, wait_s: float) -> int:
    """The descriptor of the locked lock file. A lock won on a file that has been unlinked meanwhile is no lock."""
    path = folder / LOCK_NAME
    deadline = time.monotonic() + wait_s
    while True:
        try:
            lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # the node that stopped just now removed the directory too
            _make(folder, None)
            continue
        except OSError as error:
            raise ConfigError(f"run_dir: cannot open {path}: {os.strerror(error.errno or 0)}") from error
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(lock_fd, path):
                return lock_fd
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(lock_fd)
                raise
            holder = lock_holder(folder)
            if (holder is not None and _is_alive(holder)) or time.monotonic() >= deadline:
                os.close(lock_fd)
                raise RunDirBusy(
                    f"another node runs in {folder} (process {holder}); stop it, or choose another --run-dir"
                ) from None
            time.sleep(0.02)
        os.close(lock_fd)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        here = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (mine.st_dev, mine.st_ino)


def _is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rsplit(b")", 1)[1].split()[0] not in (b"Z", b"X")
    except (OSError, IndexError):
        return False

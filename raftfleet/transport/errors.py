"""What can go wrong when a socket is set up. Nothing that arrives on one raises."""

from __future__ import annotations

from raftfleet.errors import ConfigError, NodeError


class ListenError(NodeError):
    """An address could not be listened at. ``errno``: the system's, such as EADDRINUSE."""

    def __init__(self, address: str, errno: int, reason: str) -> None:
        super().__init__(f"cannot listen at {address}: {reason}")
        self.address = address
        self.errno = errno


class KeyFileError(ConfigError):
    """A CURVE key file is missing, unreadable by us, readable by others, or not a key."""

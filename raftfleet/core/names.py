"""Names of groups and the stable hashes that place them.

This module knows nothing of sockets, files or clocks. Python's own ``hash`` differs from process to process
(PYTHONHASHSEED), so nothing here uses it: every hash is BLAKE2b, cut to the size needed, read big-endian.
"""

from __future__ import annotations

import hashlib

FLEET_GROUP = "$fleet"
"""Name of the group that holds the fleet's own metadata. Names that begin with ``$`` are reserved."""

FLEET_UID = 0
"""Uid of the fleet group. Every other group's uid is greater."""

MAX_NAME_BYTES = 255


def check_group_name(name: object) -> str:
    """Return ``name`` if a user's group may carry it.

    Raises:
        ValueError: it is not a str of 1 to 255 bytes of UTF-8, holds a NUL, or begins with ``$`` (reserved).
    """
    if not isinstance(name, str):
        raise ValueError(f"a group name is a str, not {type(name).__name__}: {name!r}")
    try:
        size_bytes = len(name.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ValueError(f"a group name is valid UTF-8; this one is not: {name!r}") from error
    if not 1 <= size_bytes <= MAX_NAME_BYTES:
        raise ValueError(f"a group name has 1 to {MAX_NAME_BYTES} bytes of UTF-8; this one has {size_bytes}")
    if name.startswith("$"):
        raise ValueError(f"names that begin with $ are reserved for raftfleet itself: {name!r}")
    if "\0" in name:
        raise ValueError(f"a group name holds no NUL: {name!r}")
    return name


def hash64(data: bytes) -> int:
    """A stable 64-bit hash of ``data`` (BLAKE2b, 8 bytes, big-endian)."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def name_hash128(name: str) -> bytes:
    """The 16 bytes that stand for a group's name in the leader table (BLAKE2b, 16 bytes)."""
    return hashlib.blake2b(name.encode("utf-8"), digest_size=16).digest()


def shard_of(name: str, worker_count: int) -> int:
    """Index of the worker that owns group ``name`` on a node with ``worker_count`` workers.

    The fleet group is always on worker 0, so that every process of the node knows where to ask.
    """
    if name == FLEET_GROUP:
        return 0
    return hash64(name.encode("utf-8")) % worker_count

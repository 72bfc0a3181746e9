"""Which nodes should host a group: rendezvous hashing that spreads over zones (raft_fleet's rule).

This module is pure: it knows nothing of sockets, clocks, or who is alive.

Within each zone, nodes are ordered by a 64-bit hash of (node, group); a node's place in that order is its rank. The
first ``replicas`` nodes by (rank, hash) host the group, the very first is its desired leader. So every zone gives its
best node before any zone gives a second one, and a node that comes or goes touches only the groups in which it ranks
high: about ``replicas / nodes`` of them.

The hash of a pair is the two names' stable hashes, XORed and mixed by splitmix64's finalizer (Steele et al., 2014):
0.3 µs in Python, where BLAKE2b of the joined names takes 0.8 µs, and a fleet of 100,000 groups is placed anew in a
second whenever a node comes. A 64-bit tie is broken by the node's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from raftfleet.core.names import hash64

_MASK = (1 << 64) - 1


class PlacementRow(NamedTuple):
    """One node's standing for one group. ``rank``: 0-based place within the zone."""

    node: str
    zone: str
    rank: int
    hash: int
    desired: bool


@lru_cache(maxsize=4096)
def node_hash(node: str) -> int:
    """The stable hash of a node's name (cached: there are few nodes and many groups)."""
    return hash64(node.encode("utf-8"))


def pair_hash(node_hash_: int, group_hash: int) -> int:
    """The 64-bit weight of a node for a group; lower is better."""
    x = node_hash_ ^ group_hash
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def place(name: str, replicas: int, nodes: Mapping[str, Sequence[str]]) -> list[str]:
    """The nodes that should host group ``name``, desired leader first.

    Args:
        name: the group.
        replicas: how many members it wants.
        nodes: zone -> its active nodes.

    Returns:
        ``min(replicas, number of nodes)`` names.
    """
    ranked = _ranked(name, nodes)
    return [node for _, _, node, _ in ranked[:replicas]]


def explain(name: str, replicas: int, nodes: Mapping[str, Sequence[str]]) -> list[PlacementRow]:
    """Every node's standing for group ``name``, best first: what ``raftfleet-node members`` shows."""
    ranked = _ranked(name, nodes)
    return [PlacementRow(node, zone, rank, hash_, i < replicas) for i, (rank, hash_, node, zone) in enumerate(ranked)]


def _ranked(name: str, nodes: Mapping[str, Sequence[str]]) -> list[tuple[int, int, str, str]]:
    group_hash = hash64(name.encode("utf-8"))
    ranked: list[tuple[int, int, str, str]] = []
    for zone, names in nodes.items():
        in_zone = [(pair_hash(node_hash(node), group_hash), node) for node in names]
        in_zone.sort()
        for rank, (hash_, node) in enumerate(in_zone):
            ranked.append((rank, hash_, node, zone))
    ranked.sort()
    return ranked

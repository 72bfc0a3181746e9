"""Which transport a node speaks to others, from its settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from raftfleet.transport.base import Peers
from raftfleet.transport.curve import NodeKeys
from raftfleet.transport.peers import PeerSockets
from raftfleet.transport.poller import Poller
from raftfleet.transport.tcp import TcpPeers


def open_peers(
    transport: str,
    instance: int,
    host: str,
    port: int,
    poller: Poller,
    *,
    keys: NodeKeys | None = None,
    allowed_keys: Iterable[str] = (),
    **options: Any,
) -> Peers[Any]:
    """The sockets of one process to and from other nodes.

    Args:
        transport: ``"tcp"`` or ``"zeromq"``; keys are for the latter.
        options: those of :class:`~raftfleet.transport.base.Peers`.

    Raises:
        ListenError: the address is taken or is not ours.
    """
    if transport == "zeromq":
        return PeerSockets(instance, host, port, poller, keys=keys, allowed_keys=allowed_keys, **options)
    if transport != "tcp" or keys is not None:
        raise ValueError(f"transport {transport!r} {'with' if keys is not None else 'without'} keys")
    return TcpPeers(instance, host, port, poller, **options)

"""What the managers of nodes say to each other: pings, founding, calls.

This module knows nothing of sockets or clocks. Like :mod:`raftfleet.core.messages`, every message is a NamedTuple whose
first field is its kind. Kinds 96 and above. The frame's instances are the managers' own random numbers; its fleet id
is all zeros as long as the sender is in no fleet.

Every message that wants an answer carries its sender's record, so that a receiver can answer a node that it has never
heard of.
"""

from __future__ import annotations

from typing import Any, NamedTuple

PING = 96
PONG = 97
PREPARE = 98
PROMISE = 99
ACCEPT = 100
ACCEPTED = 101
FOUNDED = 102
MANAGER_RPC = 103
MANAGER_RPC_ANSWER = 104


class NodeRecord(NamedTuple):
    """Who a node is, as it says itself.

    Attributes:
        name: of the node.
        zone: "" while it does not want to be active.
        host: of the manager's ROUTER, as the other nodes reach it.
        port: of the manager's ROUTER.
        public_key: CURVE key in Z85, or "".
        instances: the present instance of each shard.
        incarnation: a random number, drawn anew when the manager starts and whenever the node enters or leaves a
            fleet: two testimonies with the same incarnation hold for all the time between them.
        store: number of the file in which the node remembers; another number means that the old file was lost.
    """

    name: str
    zone: str
    host: str
    port: int
    public_key: str
    instances: tuple[int, ...]
    incarnation: int
    store: int


class FleetMemory(NamedTuple):
    """The last fleet that a node has entered, and every node that it knew in it, as ``(name, host, port)``."""

    fleet: bytes
    nodes: tuple[tuple[str, str, int], ...]


class FoundingValue(NamedTuple):
    """What founding decides. ``origin``: the ballot ``(round, proposer)`` that it was first proposed with."""

    fleet: bytes
    origin: tuple[int, int]
    voters: tuple[NodeRecord, ...]


class Ping(NamedTuple):
    """Are you there, and who are you? ``fleet``: the sender's, or b""."""

    kind: int
    seq: int
    sender: NodeRecord
    fleet: bytes


class Pong(NamedTuple):
    """``memory``: none or one. ``removed``: instances of the pinger that the answerer's fleet knows to be gone."""

    kind: int
    seq: int
    sender: NodeRecord
    fleet: bytes
    memory: tuple[FleetMemory, ...]
    removed: tuple[int, ...]


class Prepare(NamedTuple):
    """Paxos, phase 1a. ``peers``: digest of the sender's ``--peers``; those who vote must agree on who votes."""

    kind: int
    sender: NodeRecord
    round: int
    proposer: int
    peers: int


class Promise(NamedTuple):
    """Paxos, phase 1b. ``granted`` False: ``promised`` is higher, or the present candidate still has time.

    ``accepted`` and ``memory``: none or one.
    """

    kind: int
    sender: NodeRecord
    round: int
    proposer: int
    granted: bool
    promised: tuple[int, int]
    accepted_ballot: tuple[int, int]
    accepted: tuple[FoundingValue, ...]
    memory: tuple[FleetMemory, ...]


class Accept(NamedTuple):
    """Paxos, phase 2a."""

    kind: int
    sender: NodeRecord
    round: int
    proposer: int
    peers: int
    value: FoundingValue


class Accepted(NamedTuple):
    """Paxos, phase 2b."""

    kind: int
    sender: NodeRecord
    round: int
    proposer: int
    accepted: bool
    promised: tuple[int, int]


class Founded(NamedTuple):
    """The value was chosen. Its voters start their members; the others join."""

    kind: int
    sender: NodeRecord
    value: FoundingValue


class ManagerRpc(NamedTuple):
    """A call to another manager. ``args``: a map that msgpack carries."""

    kind: int
    request_id: int
    sender: NodeRecord
    method: str
    args: dict[str, Any]


class ManagerRpcAnswer(NamedTuple):
    """``code`` and ``body`` as in the client protocol."""

    kind: int
    request_id: int
    code: int
    body: Any


MESSAGE_TYPES: dict[int, type] = {
    PING: Ping,
    PONG: Pong,
    PREPARE: Prepare,
    PROMISE: Promise,
    ACCEPT: Accept,
    ACCEPTED: Accepted,
    FOUNDED: Founded,
    MANAGER_RPC: ManagerRpc,
    MANAGER_RPC_ANSWER: ManagerRpcAnswer,
}

# Descriptions of the fields after the kind, in the words of raftfleet.wire.codec.
_RECORD: Any = ("str", "str", "str", "u63", "str", ["u63"], "u63", "u63")
_MEMORY: Any = ("bin", [("str", "str", "u63")])
_BALLOT: Any = ("u63", "u63")
_VALUE: Any = ("bin", _BALLOT, [_RECORD])
FIELDS: dict[int, tuple[Any, ...]] = {
    PING: ("u63", _RECORD, "bin"),
    PONG: ("u63", _RECORD, "bin", [_MEMORY], ["u63"]),
    PREPARE: (_RECORD, "u63", "u63", "u63"),
    PROMISE: (_RECORD, "u63", "u63", "bool", _BALLOT, _BALLOT, [_VALUE], [_MEMORY]),
    ACCEPT: (_RECORD, "u63", "u63", "u63", _VALUE),
    ACCEPTED: (_RECORD, "u63", "u63", "bool", _BALLOT),
    FOUNDED: (_RECORD, _VALUE),
    MANAGER_RPC: ("u63", _RECORD, "str", "map"),
    MANAGER_RPC_ANSWER: ("u63", "u63", "value"),
}


def record_of(fields: Any) -> NodeRecord:
    """A record from the plain tuple or list that the wire or a file gave."""
    name, zone, host, port, public_key, instances, incarnation, store = fields
    return NodeRecord(name, zone, host, port, public_key, tuple(instances), incarnation, store)


def memory_of(fields: Any) -> FleetMemory:
    """A memory from the plain tuple or list that the wire or a file gave."""
    fleet, nodes = fields
    return FleetMemory(fleet, tuple((name, host, port) for name, host, port in nodes))


def value_of(fields: Any) -> FoundingValue:
    """A founding value from the plain tuple or list that the wire or a file gave."""
    fleet, origin, voters = fields
    return FoundingValue(fleet, (origin[0], origin[1]), tuple(record_of(voter) for voter in voters))


def shaped(message: Any) -> Any:
    """The message with its nested records as the classes above: the wire hands them over as plain tuples.

    Raises ValueError for a record that no node can have (no instances, a port out of range).
    """
    changes: dict[str, Any] = {}
    fields = message._fields
    if "sender" in fields:
        sender = record_of(message.sender)
        if not sender.instances or not 0 < sender.port < 65536 or 0 in sender.instances or not sender.name:
            raise ValueError(f"a record that no node can have: {sender!r:.200}")
        changes["sender"] = sender
    if "memory" in fields:
        changes["memory"] = tuple(memory_of(memory) for memory in message.memory)[:1]
    if "accepted" in fields and message.kind == PROMISE:
        changes["accepted"] = tuple(value_of(value) for value in message.accepted)[:1]
    if "value" in fields:
        changes["value"] = value_of(message.value)
        if not changes["value"].voters or not all(voter.instances for voter in changes["value"].voters):
            raise ValueError("a founding value without voters")
    return message._replace(**changes)

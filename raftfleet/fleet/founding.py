"""Founding a fleet: single-decree Paxos among the nodes of ``--peers``, so that there are never two.

This module does not know about sockets, files or clocks. Time arrives as an argument; what must be on disk before a
message may leave is an output that comes before it.

Why it is not enough to ask around: three nodes that start at random moments, some cut off from each other, can each
believe to be the first. So founding is a decision (Lamport, "Paxos Made Simple"):

* Every address in ``--peers`` is an acceptor. What it has promised and accepted is in a file of its run directory, so
  that a node that was killed remembers (:class:`Memory`).
* The value is a fleet id and the fleet group's first voters, named by shard instance. It is chosen when a majority of
  the peers has accepted it. A candidate that learns of an accepted value proposes that one and no other.
* The first promise for a while is a grant: for ``grant_us`` no other candidate gets one. That is for progress only.

What Paxos alone does not know is that instances die: nodes in memory come back with new ones. A value whose voters are
gone would be proposed for ever, so an accepted value is **void** where it is proven that its fleet never can, or never
again can, have a quorum:

1. More voters are gone than a quorum can spare, and those never entered the fleet: no leader was ever elected. Their
   word counts only if their file remembers the promise that made the value (else it is not the file of that time).
2. Someone did enter the fleet. Then its membership may have changed, and the first voters prove nothing. Entering nodes
   remember the fleet and every node they knew in it; who lets a node in remembers it *before* it is let in. So all
   nodes that a fleet ever reached are found by following these lists. If all of them say that they are not in the
   fleet now, all at one moment (asked twice, with the same incarnation: the double collect of Afek et al. 1993), its
   last instance is gone. An operator's word stands in for a node that cannot answer.

The same proof is asked for every fleet that anyone remembers before a new value is proposed.

A node whose memory was lost is an acceptor with amnesia: founding is safe as long as no majority of peers loses theirs
while an earlier fleet lives on. Against that, too, there is patience: while a peer is silent, no new fleet is proposed
for :data:`PATIENCE_US`, and one that lives and is in a fleet answers within that, and is joined instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgpack

from raftfleet.core.manager_messages import (
    ACCEPT,
    ACCEPTED,
    PING,
    PREPARE,
    PROMISE,
    Accept,
    Accepted,
    FleetMemory,
    FoundingValue,
    NodeRecord,
    Ping,
    Pong,
    Prepare,
    Promise,
    memory_of,
    value_of,
)
from raftfleet.core.names import hash64

if TYPE_CHECKING:
    from random import Random

Address: TypeAlias = tuple[str, int]
Ballot: TypeAlias = tuple[int, int]
"""``(round, proposer)``; ``(0, 0)``: none."""

NO_BALLOT: Ballot = (0, 0)
FOUNDING_VOTERS_MAX = 5
PATIENCE_US = 3_000_000
"""A node that was there before connects anew to one that came back within a second, and a random part of one."""
_FORMAT = 1


class Send(NamedTuple):
    """Send this message to the manager at that address."""

    address: Address
    message: Any


class Persist(NamedTuple):
    """Put these bytes on disk before anything that comes later in the outputs is done."""

    data: bytes


class Chosen(NamedTuple):
    """The value is the fleet."""

    value: FoundingValue


Output: TypeAlias = Send | Persist | Chosen


@dataclass(frozen=True)
class Memory:
    """What a node must remember across its own death, in a file of its run directory.

    Attributes:
        store: a random number drawn when the file is first written: who shows it has lost nothing since.
        promised: no ballot below this one gets a promise or is accepted.
        accepted_ballot: ballot of ``accepted``.
        accepted: the value accepted last.
        fleet: the last fleet entered, also after leaving it.
    """

    store: int
    promised: Ballot = NO_BALLOT
    accepted_ballot: Ballot = NO_BALLOT
    accepted: FoundingValue | None = None
    fleet: FleetMemory | None = None

    def pack(self) -> bytes:
        """msgpack ``[format, store, promised, accepted_ballot, accepted, fleet]``."""
        fields = [_FORMAT, self.store, self.promised, self.accepted_ballot, self.accepted, self.fleet]
        packed: bytes = msgpack.packb(fields)
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Memory:
        """The inverse. Raises ValueError for anything that :meth:`pack` did not make."""
        try:
            version, store, promised, accepted_ballot, accepted, fleet = msgpack.unpackb(data)
            if version != _FORMAT:
                raise ValueError(f"format {version}; this version reads {_FORMAT}")
            if type(store) is not int:
                raise ValueError("a store is a number")
            return cls(
                store,
                _ballot_of(promised),
                _ballot_of(accepted_ballot),
                value_of(accepted) if accepted else None,
                memory_of(fleet) if fleet else None,
            )
        except (ValueError, TypeError, LookupError, msgpack.UnpackException) as error:
            raise ValueError(f"not a founding memory: {error}") from error


def _ballot_of(fields: Any) -> Ballot:
    if type(fields) is not list or list(map(type, fields)) != [int, int]:
        raise ValueError("a ballot is two numbers")
    return fields[0], fields[1]


class Testimony(NamedTuple):
    """What one node that is in no fleet said of itself."""

    record: NodeRecord
    memory: FleetMemory | None


@dataclass
class _Round:
    """One attempt of this node as a candidate."""

    ballot: Ballot
    started_us: int
    asked_us: int
    survey_seq: int
    confirm_seq: int
    promises: dict[Address, Promise] = field(default_factory=dict)
    answered: set[Address] = field(default_factory=set)
    surveyed: set[Address] = field(default_factory=set)
    testimonies: dict[Address, Testimony] = field(default_factory=dict)
    confirmed: set[Address] = field(default_factory=set)
    confirming: frozenset[Address] | None = None
    value: FoundingValue | None = None
    accepts: set[Address] = field(default_factory=set)


class Founding:
    """One node's acceptor and, when it wants to be active, candidate.

    Args:
        address: this node's, as it stands in ``peers``.
        peers: all acceptors; empty: this node alone.
        memory: what the file of the run directory remembers.
        rng: for back-off and fleet ids.
        proposer: a number that no other process ever used (the manager's random instance).
        grant_us: how long a promise keeps other candidates out.
        round_us: how long a candidate waits for its round to end.
        gather_us: how long it waits for more answers than it needs, and when it asks again.
        patience_us: for so long after this process began to ask it proposes no new fleet while a peer is silent.
    """

    def __init__(
        self,
        address: Address,
        peers: Iterable[Address],
        memory: Memory,
        rng: Random,
        proposer: int,
        grant_us: int = 1_000_000,
        round_us: int = 2_000_000,
        gather_us: int = 200_000,
        patience_us: int = PATIENCE_US,
    ) -> None:
        self.address = address
        self.peers = tuple(sorted(set(peers))) or (address,)
        self.memory = memory
        self.declared_dead: set[Address] = set()
        self.status = "founding has not begun"
        self._rng = rng
        self._proposer = proposer
        self._grant_us = grant_us
        self._round_us = round_us
        self._gather_us = min(gather_us, round_us // 4)
        self._patience_us = patience_us
        self._asking_since_us = -1
        self._digest = hash64(repr(self.peers).encode()) >> 1
        self._granted_to = NO_BALLOT
        self._grant_until_us = 0
        self._highest_round = memory.promised[0]
        self._round: _Round | None = None
        self._next_attempt_us = -1
        self._failed_count = 0
        self._outputs: list[Output] = []

    @property
    def is_acceptor(self) -> bool:
        """Whether this node is among those who decide."""
        return self.address in self.peers

    @property
    def majority(self) -> int:
        """How many peers decide."""
        return len(self.peers) // 2 + 1

    def take_outputs(self) -> list[Output]:
        """What is to be done, in this order. The list is emptied."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def remember_fleet(self, fleet: FleetMemory) -> None:
        """Persist that this node enters ``fleet``, or knows more of its nodes. An older fleet is forgotten."""
        if fleet != self.memory.fleet:
            self._remember(replace(self.memory, fleet=fleet))

    def next_deadline_us(self) -> int:
        """When :meth:`tick` should be called next."""
        if self._round is None:
            return self._next_attempt_us
        return self._round.asked_us + self._gather_us

    def stop(self, now_us: int) -> None:
        """Give up the present attempt: there is a fleet to join, or this node no longer wants to be active."""
        self._round = None
        self._next_attempt_us = now_us + self._rng.randrange(self._grant_us // 2, self._grant_us)

    # -- acceptor ---------------------------------------------------------------------------------------------------

    def on_prepare(self, now_us: int, message: Prepare, record: NodeRecord) -> None:
        """Answer a candidate. The caller has made sure that this node is in no fleet."""
        ballot = (message.round, message.proposer)
        self._highest_round = max(self._highest_round, message.round)
        if not self._may_vote(message.peers, message.sender):
            return
        busy = now_us < self._grant_until_us and self._granted_to[1] != message.proposer
        granted = ballot >= self.memory.promised and not busy
        if granted and ballot > self.memory.promised:
            self._granted_to = ballot
            self._grant_until_us = now_us + self._grant_us
            self._remember(replace(self.memory, promised=ballot))
        memory = self.memory
        accepted = (memory.accepted,) if memory.accepted else ()
        fleet = (memory.fleet,) if memory.fleet else ()
        self._send(
            message.sender,
            Promise(PROMISE, record, *ballot, granted, memory.promised, memory.accepted_ballot, accepted, fleet),
        )

    def on_accept(self, now_us: int, message: Accept, record: NodeRecord) -> None:
        """Accept a value, unless a higher ballot has this node's promise. The caller checks as for a prepare."""
        ballot = (message.round, message.proposer)
        if not self._may_vote(message.peers, message.sender):
            return
        good = ballot >= self.memory.promised
        if good and self.memory.accepted_ballot != ballot:
            self._remember(replace(self.memory, promised=ballot, accepted_ballot=ballot, accepted=message.value))
        self._send(message.sender, Accepted(ACCEPTED, record, *ballot, good, self.memory.promised))

    def _may_vote(self, peers: int, sender: NodeRecord) -> bool:
        if peers == self._digest and self.is_acceptor:
            return True
        self.status = f"{sender.name} at {sender.host}:{sender.port} has another list of --peers: they must be equal"
        return False

    # -- candidate --------------------------------------------------------------------------------------------------

    def tick(self, now_us: int, record: NodeRecord) -> None:
        """Begin, go on with, or give up an attempt to found the fleet."""
        if not self.is_acceptor or not record.zone:
            return
        attempt = self._round
        if self._next_attempt_us < 0:
            # Nodes that start together would grant each other nothing: each gives those before it a head start.
            turn = self.peers.index(self.address)
            self._next_attempt_us = now_us + turn * self._gather_us + self._rng.randrange(self._gather_us // 4)
        if attempt is None:
            if now_us >= self._next_attempt_us:
                self._begin(now_us, record)
        elif now_us >= attempt.started_us + self._round_us:
            self._fail(now_us, self._waiting_for(attempt))
        else:
            self._ask_again(now_us, attempt, record)
            self._advance(now_us, record)

    def on_promise(self, now_us: int, message: Promise, record: NodeRecord) -> None:
        """Count an answer to this node's prepare."""
        self._highest_round = max(self._highest_round, message.promised[0])
        attempt = self._round
        if attempt is None or (message.round, message.proposer) != attempt.ballot or attempt.value is not None:
            return
        address = (message.sender.host, message.sender.port)
        if address not in self.peers:
            return
        attempt.answered.add(address)
        if message.granted:
            attempt.promises[address] = message
            memory = message.memory[0] if message.memory else None
            attempt.testimonies[address] = Testimony(message.sender, memory)
        elif len(attempt.answered) - len(attempt.promises) > len(self.peers) - self.majority:
            self._fail(now_us, "waiting for another candidate's attempt to found a fleet")
            return
        self._advance(now_us, record)

    def on_pong(self, now_us: int, message: Pong, record: NodeRecord) -> None:
        """A node testifies of itself. One that is in a fleet ends the attempt (the caller joins it)."""
        attempt = self._round
        if attempt is None or attempt.value is not None or message.fleet:
            return
        address = (message.sender.host, message.sender.port)
        if message.seq == attempt.survey_seq and address not in attempt.testimonies:
            memory = message.memory[0] if message.memory else None
            attempt.testimonies[address] = Testimony(message.sender, memory)
        elif message.seq == attempt.confirm_seq and address in attempt.testimonies:
            if attempt.testimonies[address].record.incarnation == message.sender.incarnation:
                attempt.confirmed.add(address)
        self._advance(now_us, record)

    def on_accepted(self, now_us: int, message: Accepted) -> None:
        """Count an answer to this node's accept."""
        self._highest_round = max(self._highest_round, message.promised[0])
        attempt = self._round
        if attempt is None or attempt.value is None or (message.round, message.proposer) != attempt.ballot:
            return
        address = (message.sender.host, message.sender.port)
        if not message.accepted or address not in self.peers:
            return
        attempt.accepts.add(address)
        if len(attempt.accepts) == self.majority:
            self._round = None
            self._failed_count = 0
            self._next_attempt_us = now_us + self._round_us
            self._outputs.append(Chosen(attempt.value))

    def _begin(self, now_us: int, record: NodeRecord) -> None:
        if self._asking_since_us < 0:
            self._asking_since_us = now_us
        self._highest_round += 1
        ballot = (self._highest_round, self._proposer)
        seq = self._rng.getrandbits(62) & ~1
        self._round = _Round(ballot, now_us, now_us, seq, seq | 1)
        if len(self.peers) > 1 and not self._failed_count:
            self.status = f"asking {len(self.peers)} peers to found a fleet"
        for address in self.peers:
            self._outputs.append(Send(address, Prepare(PREPARE, record, *ballot, self._digest)))

    def _ask_again(self, now_us: int, attempt: _Round, record: NodeRecord) -> None:
        """Repeat what has no answer: a frame to a node that is just starting is lost."""
        if now_us < attempt.asked_us + self._gather_us:
            return
        attempt.asked_us = now_us
        for address in self.peers:
            if attempt.value is not None:
                if address not in attempt.accepts:
                    accept = Accept(ACCEPT, record, *attempt.ballot, self._digest, attempt.value)
                    self._outputs.append(Send(address, accept))
            elif address not in attempt.answered:
                self._outputs.append(Send(address, Prepare(PREPARE, record, *attempt.ballot, self._digest)))

    def _advance(self, now_us: int, record: NodeRecord) -> None:
        """Move the attempt on as far as what is known allows."""
        attempt = self._round
        if attempt is None or attempt.value is not None or len(attempt.promises) < self.majority:
            return
        if len(attempt.answered) < len(self.peers) and now_us < attempt.started_us + self._gather_us:
            return  # a moment for the others: the more voters, the more deaths the young fleet survives
        value = self._old_value(attempt)
        if value is None:
            if not self._others_are_dead(attempt, record):
                return
            if len(attempt.answered) < len(self.peers) and now_us < self._asking_since_us + self._patience_us:
                return  # who is silent may be in a fleet that those who answer have forgotten
            value = self._new_value(attempt)
            if value is None:
                return
        attempt.value = value
        for address in self.peers:
            self._outputs.append(Send(address, Accept(ACCEPT, record, *attempt.ballot, self._digest, value)))

    def _old_value(self, attempt: _Round) -> FoundingValue | None:
        """The value that Paxos makes this candidate propose: the one accepted last that may still have a quorum."""
        for promise in sorted(attempt.promises.values(), key=lambda p: p.accepted_ballot, reverse=True):
            for value in promise.accepted:
                if not self._is_blocked(attempt, value, self._is_gone(attempt)):
                    return value
        return None

    def _others_are_dead(self, attempt: _Round, record: NodeRecord) -> bool:
        """Whether it is proven that no fleet that anyone remembers can have a quorum. Asks on where it is not yet."""
        values = [value for promise in attempt.promises.values() for value in promise.accepted]
        stillborn = {
            value.fleet for value in values if self._is_blocked(attempt, value, self._never_entered(attempt, value))
        }
        suspects: set[Address] = set()
        for value in values:
            if value.fleet not in stillborn:
                suspects.update((voter.host, voter.port) for voter in value.voters)
        fleets = {t.memory.fleet for t in attempt.testimonies.values() if t.memory} - stillborn
        if not suspects and not fleets:
            return True
        # Follow the lists of everyone who remembers one of these fleets.
        for testimony in attempt.testimonies.values():
            if testimony.memory and testimony.memory.fleet not in stillborn:
                suspects.update((host, port) for _, host, port in testimony.memory.nodes)
        suspects -= self.declared_dead
        if attempt.confirming is None:
            for address in sorted(suspects - attempt.testimonies.keys() - attempt.surveyed):
                attempt.surveyed.add(address)
                self._outputs.append(Send(address, Ping(PING, attempt.survey_seq, record, b"")))
            if suspects <= attempt.testimonies.keys():
                attempt.confirming = frozenset(suspects)
                for address in sorted(suspects):
                    self._outputs.append(Send(address, Ping(PING, attempt.confirm_seq, record, b"")))
        confirming = attempt.confirming
        return confirming is not None and suspects <= confirming and confirming <= attempt.confirmed

    def _new_value(self, attempt: _Round) -> FoundingValue | None:
        """A fleet of those who promised and want to be active, spread over zones, this node first."""
        records = [promise.sender for promise in attempt.promises.values() if promise.sender.zone]
        records.sort(key=lambda r: ((r.host, r.port) != self.address, r.name))
        voters: list[NodeRecord] = []
        zone_counts: dict[str, int] = {}
        while records and len(voters) < FOUNDING_VOTERS_MAX:
            best = min(records, key=lambda r: zone_counts.get(r.zone, 0))
            records.remove(best)
            zone_counts[best.zone] = zone_counts.get(best.zone, 0) + 1
            if all(best.name != voter.name for voter in voters):
                voters.append(best)
        if not voters:
            return None
        fleet = self._rng.getrandbits(128).to_bytes(16, "big")
        return FoundingValue(fleet, attempt.ballot, tuple(voters))

    # -- proofs -----------------------------------------------------------------------------------------------------

    def _is_blocked(self, attempt: _Round, value: FoundingValue, counts: Callable[[NodeRecord], bool]) -> bool:
        """Whether more of the value's voters count than its quorum can spare."""
        size = len(value.voters)
        return sum(map(counts, value.voters)) > size - (size // 2 + 1)

    def _is_gone(self, attempt: _Round) -> Callable[[NodeRecord], bool]:
        def is_gone(voter: NodeRecord) -> bool:
            address = (voter.host, voter.port)
            testimony = attempt.testimonies.get(address)
            if testimony is None:
                return address in self.declared_dead
            return testimony.record.instances[0] != voter.instances[0]

        return is_gone

    def _never_entered(self, attempt: _Round, value: FoundingValue) -> Callable[[NodeRecord], bool]:
        is_gone = self._is_gone(attempt)

        def never_entered(voter: NodeRecord) -> bool:
            testimony = attempt.testimonies.get((voter.host, voter.port))
            return (
                testimony is not None
                and is_gone(voter)
                and testimony.memory is None
                and testimony.record.store == voter.store
            )

        return never_entered

    # -- parts ------------------------------------------------------------------------------------------------------

    def _fail(self, now_us: int, why: str) -> None:
        self._round = None
        self._failed_count += 1
        self.status = why
        spread_us = self._grant_us * min(2 + self._failed_count, 6) // 2
        self._next_attempt_us = now_us + self._rng.randrange(self._grant_us // 4, spread_us)

    def _waiting_for(self, attempt: _Round) -> str:
        """Why the attempt did not end, in a sentence for the operator."""
        silent = [f"{host}:{port}" for host, port in self.peers if (host, port) not in attempt.answered]
        if len(attempt.promises) < self.majority:
            if silent:
                return (
                    f"waiting for {', '.join(silent)}: {len(attempt.answered)} of {len(self.peers)} peers answered, "
                    f"{self.majority} must agree to found a fleet"
                )
            return "waiting for another candidate's attempt to found a fleet"
        if attempt.value is not None:
            return "waiting for the peers to accept the fleet that was proposed"
        known = {(t.memory.nodes) for t in attempt.testimonies.values() if t.memory}
        nodes = {node for nodes in known for node in nodes}
        nodes.update((v.name, v.host, v.port) for p in attempt.promises.values() for a in p.accepted for v in a.voters)
        missing = sorted(
            f"{name} at {host}:{port}"
            for name, host, port in nodes
            if (host, port) not in attempt.testimonies and (host, port) not in self.declared_dead
        )
        if missing:
            return (
                f"waiting for {', '.join(missing)}, which may still be in the fleet that this node was in: start it, "
                "or, if it is gone for good, run 'raftfleet-node remove-dead-node NODE'"
            )
        return f"waiting for the peers {', '.join(silent)}" if silent else "waiting for the peers"

    def _remember(self, memory: Memory) -> None:
        self.memory = memory
        self._outputs.append(Persist(memory.pack()))

    def _send(self, receiver: NodeRecord, message: Any) -> None:
        self._outputs.append(Send((receiver.host, receiver.port), message))

"""From no fleet into one, by joining or founding, and out again.

Outside, a node asks all whom it may know whether they are in a fleet. If one is, it asks to be let in and takes no part
in a founding any more; only if none is, the founding goes on (:mod:`raftfleet.fleet.founding` has its rules and
proofs; here is what it is fed and what becomes of its outcome).

* A node enters a fleet once per instance of its shards. Leaving means new instances: every shard starts afresh.
* Only nodes outside of any fleet are acceptors of a founding; one inside answers that it is inside.
* Every founder starts its member of the fleet group and proposes the founding as the log's first command; one of them
  is enough, the same from another changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgpack

from raftfleet.core.codes import OK, OUTCOME_UNKNOWN, REFUSED, UNANSWERED
from raftfleet.core.manager_messages import FOUNDED, PING, PREPARE, Founded, FoundingValue, NodeRecord, Ping, record_of
from raftfleet.fleet.founding import Address, Send
from raftfleet.fleet.manager_outputs import MS, SECOND
from raftfleet.fleet.manager_shards import ManagerShards
from raftfleet.fleet.manager_state import (
    RPC_TIMEOUT_US,
    SURVEY_INTERVAL_US,
    ShardView,
    ignore_answer,
    node_fields,
    text_of,
)


class ManagerEntry(ManagerShards):
    """Founding and joining, entering and leaving."""

    def _tick_without_fleet(self) -> None:
        for shard in self.shards:
            if shard.fleet:  # the manager was restarted; its shards were not
                memory = self.founding.memory.fleet
                nodes = memory.nodes if memory is not None and memory.fleet == shard.fleet else ()
                accepted = self.founding.memory.accepted
                self._value = accepted if accepted is not None and accepted.fleet == shard.fleet else None
                self._enter(shard.fleet, list(self._value.voters) if self._value is not None else [], nodes)
                return
        if self._due("poll", SECOND):
            self._poll_shards()
        if self._due("survey", SURVEY_INTERVAL_US):
            self._survey()
        if self.zone is None:
            return
        fleets = sorted(
            address
            for address, (_, fleet, when_us) in self._seen.items()
            if fleet and self._now_us - when_us < 3 * SECOND
        )
        if fleets:
            self.founding.stop(self._now_us)
            if self._due("join", SECOND):
                self._join_turn += 1
                self._ask_to_join(fleets[self._join_turn % len(fleets)])
        else:
            self._status = ""
            if not self.founding.is_acceptor:
                self._status = (
                    f"waiting for one of --peers to be in a fleet; this node's own address "
                    f"{self.settings.host}:{self.settings.port} is not among them, so it cannot found one"
                )
            self.founding.tick(self._now_us, self.record)

    def _ask_to_join(self, address: Address) -> None:
        where = f"{address[0]}:{address[1]}"
        record = self.record

        def answered(code: int, body: Any) -> None:
            if self.fleet or record != self.record:
                return
            if code == OK:
                try:
                    fleet, records = body["fleet"], [record_of(fields) for fields in body["nodes"]]
                except (KeyError, TypeError, ValueError):
                    return
                if type(fleet) is bytes and len(fleet) == 16:
                    self._log("info", f"joined fleet {fleet.hex()} through {where}")
                    self._enter(fleet, records, ())
                return
            text = f"the fleet that {where} is in did not let this node in yet: {text_of(body)}"
            if self._status != text:
                self._log("warning" if code == REFUSED else "info", text)
            self._status = text

        self._rpc(address, "join", {}, RPC_TIMEOUT_US, answered)

    def _on_founded(self, value: FoundingValue) -> None:
        if self.fleet or not self.is_ready:
            return
        mine = self.instances[0]
        if not any(voter.instances[0] == mine and voter.name == self.settings.name for voter in value.voters):
            self._value = value  # its voters are worth a question
            return
        self._log("info", f"founded fleet {value.fleet.hex()} with {', '.join(v.name for v in value.voters)}")
        self._value = value
        self._enter(value.fleet, list(value.voters), ())
        self._start_fleet()

    def _start_fleet(self) -> None:
        """Start this node's first member of the fleet group, whose leader makes the founding its first command."""
        value = self._value
        if value is None or not self.fleet or value.fleet != self.fleet:
            return
        voters = [voter.instances[0] for voter in value.voters]
        if self.instances[0] not in voters:
            return
        founders = [node_fields(voter) for voter in value.voters]
        args = {
            "voters": voters,
            "state": msgpack.packb([["found", value.fleet, founders]]),
            "campaign": voters[0] == self.instances[0],
        }

        def answered(code: int, body: Any) -> None:
            if code in (UNANSWERED, OUTCOME_UNKNOWN) and self.fleet == value.fleet and self.state is None:
                self._start_fleet()
            elif code != OK:
                self._log("error", f"shard 0 could not start the fleet group: {text_of(body)}")

        self._call_shard(0, "start_fleet", args, 5 * SECOND, answered)

    def _propose_founding(self) -> None:
        """The first command of the fleet's log: its id and first nodes. Every founder proposes it; one is enough."""
        value = self._value
        assert value is not None
        command = ["found", value.fleet, [node_fields(voter) for voter in value.voters]]
        self._call_shard(0, "fleet_command", {"command": command, "timeout_ms": 1000}, 1500 * MS, ignore_answer)

    # -- entering and leaving ---------------------------------------------------------------------------------------

    def _enter(self, fleet: bytes, records: list[NodeRecord], nodes: Iterable[tuple[str, str, int]]) -> None:
        self.fleet = fleet
        self._incarnation = self._rng.getrandbits(62) + 1
        self._records = {(record.host, record.port): record for record in records}
        self._sponsored = {(host, port): name for name, host, port in nodes}
        self._leaderless_since_us = self._now_us
        self._status = f"waiting for the leader of fleet {fleet.hex()}"
        self._tasks.clear()
        self.founding.stop(self._now_us)
        self._remember_nodes()
        for shard in self.shards:
            shard.addresses_version = -1
        self._set_fleet()

    def _leave(self, why: str) -> None:
        """Have all shards start afresh, with new instances, outside of any fleet."""
        self._log("warning" if why != "left" else "info", f"leaving fleet {self.fleet.hex()}: {why}")
        self.fleet = b""
        self.state = None
        self.fleet_index = 0
        self._value = None
        self._incarnation = self._rng.getrandbits(62) + 1
        self._records.clear()
        self._sponsored.clear()
        self._seen.clear()
        self._heard_us.clear()
        self.unreachable.clear()
        self._removals.clear()
        self._tasks.clear()
        self._deactivating = False
        self._leaving = False
        self._status = ""
        self._trouble = ""
        for index, shard in enumerate(self.shards):
            self._reset_shard(index, shard)

    def _reset_shard(self, index: int, shard: ShardView) -> None:
        old = shard.instance or shard.stale_instance
        shard.stale_instance = old
        shard.instance = 0
        shard.fleet = b""
        shard.watched = False
        shard.info = {}

        def answered(code: int, body: Any) -> None:
            if code != OK and shard.stale_instance == old and shard.instance == 0:
                self._reset_shard(index, shard)

        self._call_shard(index, "leave_fleet", {}, 2 * SECOND, answered)

    # -- founding messages ------------------------------------------------------------------------------------------

    def _on_candidate(self, message: Any) -> None:
        """A prepare or an accept: only nodes outside of any fleet are acceptors."""
        if not self.is_ready:
            return
        if self.fleet or any(shard.fleet for shard in self.shards):
            self._on_ping(Ping(PING, 0, message.sender, b""))
        elif message.kind == PREPARE:
            self.founding.on_prepare(self._now_us, message, self.record)
        else:
            self.founding.on_accept(self._now_us, message, self.record)

    def _on_promise(self, message: Any) -> None:
        if self.is_ready and not self.fleet:
            self.founding.on_promise(self._now_us, message, self.record)

    def _on_accepted(self, message: Any) -> None:
        if not self.fleet:
            self.founding.on_accepted(self._now_us, message)

    def _on_founded_message(self, message: Founded) -> None:
        self._on_founded(message.value)

    def _announce(self, value: FoundingValue) -> None:
        addresses = {*self.founding.peers, *((voter.host, voter.port) for voter in value.voters)}
        for address in sorted(addresses - {self.founding.address}):
            self._outputs.append(Send(address, Founded(FOUNDED, self.record, value)))
        self._on_founded(value)

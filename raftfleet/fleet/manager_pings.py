"""Who answers: pings between managers, and what follows from silence.

A ping asks "who are you, and in which fleet?" of whoever is at an address; only the answer to the last one sent there
counts, so that a record is never older than the question. In a fleet all its nodes are pinged, outside of it (and while
its group has no leader) everyone who may be in one.

Silence for three intervals makes a node unreachable. That is a remark for people and nothing more: removing a node is
the business of :mod:`raftfleet.fleet.manager_removal`. The interval grows with the fleet, so that the load of one node
does not.
"""

from __future__ import annotations

from raftfleet.core.manager_messages import FOUNDED, PING, PONG, FleetMemory, Founded, Ping, Pong
from raftfleet.fleet.founding import Address, Send
from raftfleet.fleet.manager_outputs import SECOND
from raftfleet.fleet.manager_state import SURVEY_INTERVAL_US, ManagerState


class ManagerPings(ManagerState):
    """Pings, and whom they reach."""

    def _ping_nodes(self) -> None:
        if not self._due("ping", self._ping_interval_us() if self.shards[0].fleet_leader else SURVEY_INTERVAL_US):
            return
        nodes = self._known_nodes()
        for node in nodes:
            if node.name != self.settings.name:
                self._ping((node.host, node.port))
        if not self.shards[0].fleet_leader:
            self._survey()
        silence_us = 3 * self._ping_interval_us()
        names = {node.name for node in nodes}
        for name in [name for name in self._heard_us if name not in names]:
            del self._heard_us[name]
        for name in [name for name in self.unreachable if name not in names]:
            del self.unreachable[name]
        for node in nodes:
            if node.name == self.settings.name:
                continue
            heard_us = self._heard_us.setdefault(node.name, self._now_us)
            if self._now_us - heard_us <= silence_us:
                if self.unreachable.pop(node.name, None) is not None:
                    self._log("info", f"node {node.name} is reachable again")
            elif node.name not in self.unreachable:
                self.unreachable[node.name] = (self._wall_us - (self._now_us - heard_us)) // SECOND
                self._log("warning", f"node {node.name} at {node.host}:{node.port} is unreachable")

    def _survey(self) -> None:
        """Ask everyone who may be in a fleet."""
        addresses = set(self.founding.peers)
        memory = self.founding.memory.fleet
        if memory is not None:
            addresses.update((host, port) for _, host, port in memory.nodes)
        addresses.update((v.host, v.port) for v in (self._value.voters if self._value else ()))
        for address in sorted(addresses - {self.founding.address}):
            self._ping(address)

    def _ping(self, address: Address) -> None:
        seq = self._rng.getrandbits(62)
        self._pings[address] = seq
        self._outputs.append(Send(address, Ping(PING, seq, self.record, self.fleet)))

    def _on_ping(self, message: Ping) -> None:
        if not self.is_ready or (not self.fleet and any(shard.fleet for shard in self.shards)):
            return  # not before it knows what it is: its shards may be in a fleet that it enters with the next tick
        sender = message.sender
        removed: tuple[int, ...] = ()
        if self.fleet:
            memory: tuple[FleetMemory, ...] = ()
            if self.state is not None:
                removed = tuple(i for i in sender.instances if i in self.state.gone)
        else:
            memory = (self.founding.memory.fleet,) if self.founding.memory.fleet else ()
        address = (sender.host, sender.port)
        self._outputs.append(Send(address, Pong(PONG, message.seq, self.record, self.fleet, memory, removed)))
        if self.fleet and not message.fleet and self._value is not None and self._value.fleet == self.fleet:
            if any(voter.instances == sender.instances for voter in self._value.voters):
                self._outputs.append(Send(address, Founded(FOUNDED, self.record, self._value)))

    def _on_pong(self, message: Pong) -> None:
        sender = message.sender
        address = (sender.host, sender.port)
        if not self.is_ready:
            return
        if self._pings.get(address) == message.seq:
            del self._pings[address]
            self._seen[address] = (sender, message.fleet, self._now_us)
            if self.fleet and message.fleet == self.fleet:
                for node in self._known_nodes():
                    if node.name == sender.name and (node.host, node.port) == address:
                        self._heard_us[node.name] = self._now_us
            elif self.fleet and message.fleet and self._due(f"other fleet {address}", 60 * SECOND):
                self._log(
                    "error",
                    f"node {sender.name} at {address[0]}:{address[1]} is in another fleet, {message.fleet.hex()}; this "
                    f"node is in {self.fleet.hex()}: the two cannot work together, check --peers",
                )
            if set(message.removed) & set(self.instances[: self.settings.placing]) and message.fleet == (
                self.fleet or message.fleet
            ):
                self._leave("this node was removed from it; it joins as new")
                return
        if not self.fleet:
            if message.fleet and self.zone is not None:
                self.founding.stop(self._now_us)
            self.founding.on_pong(self._now_us, message, self.record)

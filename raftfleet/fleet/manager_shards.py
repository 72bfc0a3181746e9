"""The manager and its own shards: who they are, what they are told, what they tell of the fleet.

Shards are processes of their own. They die and come back as new instances, and so may the manager while they live on:
what it knows of them is asked again whenever a connection comes up, and then by polling. An answer that still carries
the instance that was told to start afresh is from before and is not believed.

Downwards, each shard is told the fleet's id and the addresses of all others' shards, again after every change.
Upwards, shard 0 feeds the fleet's state: a dump once (``watch_fleet``), then each command that took effect. The copy
here follows it and is never edited; one that goes astray is thrown away and asked for anew.
"""

from __future__ import annotations

from typing import Any

import msgpack

from raftfleet.core.codes import OK
from raftfleet.fleet.machine import FleetRefused, FleetState
from raftfleet.fleet.manager_outputs import SECOND, Answer
from raftfleet.fleet.manager_pings import ManagerPings
from raftfleet.fleet.manager_state import ShardView


class ManagerShards(ManagerPings):
    """This node's shards as the manager sees them, and its copy of the fleet's state."""

    def on_shard_info(self, now_us: int, index: int, info: dict[str, Any]) -> None:
        """The answer to ``shard_info``, asked when the connection to the shard came up, and then by the core itself."""
        self._now_us = now_us
        if index < len(self.shards):
            self._take_shard_info(self.shards[index], info)

    def on_shard_lost(self, now_us: int, index: int) -> None:
        """The connection to the shard broke: it is restarting, or has been."""
        self._now_us = now_us
        shard = self.shards[index]
        shard.instance = 0
        shard.fleet_leader = 0
        shard.watched = False

    def on_shard_answer(self, now_us: int, token: int, code: int, body: Any) -> None:
        """The answer to a :class:`ShardCall`. Late ones are ignored."""
        self._now_us = now_us
        pending = self._shard_calls.pop(token, None)
        if pending is not None:
            pending.then(code, body)

    def on_fleet_push(self, now_us: int, body: list[Any]) -> None:
        """``["fleet", index, [packed command, ...], epoch]`` or ``["fleet_reset", index, dump]`` from shard 0."""
        self._now_us = now_us
        if not self.fleet:
            return
        if body[0] == "fleet_reset":
            self._reset_state(body[1], body[2])
            return
        state = self.state
        if state is None:
            return
        if body[1] <= self.fleet_index:
            return
        self.fleet_index = body[1]
        for packed in body[2]:
            try:
                state.apply(msgpack.unpackb(packed, strict_map_key=False), body[3])
            except FleetRefused as refusal:  # only what took effect is pushed: this copy has gone astray
                self._log("error", f"this manager's copy of the fleet's state is wrong ({refusal}): it asks anew")
                self.state = None
                self.shards[0].watched = False
                return
        self._state_changed()

    def _poll_shards(self) -> None:
        for index, shard in enumerate(self.shards):
            self._ask_info(index, shard)

    def _ask_info(self, index: int, shard: ShardView) -> None:
        def answered(code: int, body: Any) -> None:
            if code == OK:
                self._take_shard_info(shard, body)

        self._call_shard(index, "shard_info", {}, SECOND, answered)

    def _take_shard_info(self, shard: ShardView, info: dict[str, Any]) -> None:
        instance = info["instance"]
        if instance == shard.stale_instance:
            # It is about to start afresh. One with a disk that was killed before it had put that aside is told again.
            index = self.shards.index(shard)
            if self._due(f"leave {index}", 2 * SECOND):
                self._reset_shard(index, shard)
            return
        if instance != shard.instance:
            shard.instance = instance
            shard.stale_instance = 0
            shard.addresses_version = -1
            shard.watched = False
            self._incarnation = self._rng.getrandbits(62) + 1
        shard.fleet = info.get("fleet") or b""
        shard.fleet_leader = info.get("fleet_leader") or 0
        shard.info = info

    def _set_fleet(self) -> None:
        """Tell each shard the fleet and where the others are, whenever that has changed."""
        version = self.state.node_version + self._node_version_base if self.state is not None else 0
        for index, shard in enumerate(self.shards):
            if shard.addresses_version == version or not shard.instance:
                continue
            addresses = [
                [instance, f"tcp://{node.host}:{node.port + 1 + i}", node.public_key, node.name]
                for node in self._known_nodes()
                for i, instance in enumerate(node.instances)
            ]
            shard.addresses_version = version
            self._call_shard(
                index, "set_fleet", {"fleet": self.fleet, "addresses": addresses}, SECOND, self._fleet_set(shard)
            )

    def _fleet_set(self, shard: ShardView) -> Answer:
        def answered(code: int, body: Any) -> None:
            if code != OK:
                shard.addresses_version = -1

        return answered

    def _watch(self) -> None:
        shard, instance = self.shards[0], self.shards[0].instance

        def answered(code: int, body: Any) -> None:
            if code != OK or not self.fleet or shard.instance != instance or body.get("state") is None:
                return
            shard.watched = True
            self._reset_state(body["index"], body["state"])

        self._call_shard(0, "watch_fleet", {}, SECOND, answered)

    def _reset_state(self, index: int, dump: Any) -> None:
        if type(dump) is not bytes or (self.state is not None and index < self.fleet_index):
            return
        try:
            state = FleetState.load(dump)
        except ValueError as error:
            self._log("error", f"shard 0 sent a fleet state that cannot be read: {error}")
            return
        if self.state is not None:
            self._node_version_base += self.state.node_version + 1
        self.state = state
        self.fleet_index = index
        self._state_changed()

    def _state_changed(self) -> None:
        assert self.state is not None
        if not self.state.fleet_id:
            return
        for node in self.state.nodes.values():
            self._sponsored.pop((node.host, node.port), None)
        self._records.clear()
        self._remember_nodes()
        self._declared &= set(self.state.gone) | {i for node in self.state.nodes.values() for i in node.instances}

"""Following the fleet's log: a worker creates and drops members, and learns of nodes, as that log says.

This module proposes nothing to the fleet but the renewal of a group that lost its majority. Rules:

* Worker 0 holds the fleet group's member. What it applies it feeds to its siblings and the node's manager (its
  watchers), command by command, or as a whole state after a snapshot.
* Every worker has the fleet's state as of :attr:`fleet_index`, so all decide alike. An older feed is not taken.
* A worker acts for the groups whose name it owns, and starts the first member of one that is placed here. All later
  members are started by their leader's first message, with the recipe from here.
* A uid that the log removed, or that another shard said was removed, never runs here again.
"""

from __future__ import annotations

from typing import Any

import msgpack

from raftfleet.core.codes import PUSH
from raftfleet.core.config import GroupConfig
from raftfleet.core.context import CommandContext
from raftfleet.core.failures import describe
from raftfleet.core.names import FLEET_GROUP, FLEET_UID, shard_of
from raftfleet.fleet.host_routing import RoutingLayer
from raftfleet.fleet.machine import FleetState, Group, RecordingFleetMachine

FLEET_CONFIG = GroupConfig("raftfleet.fleet.machine:FleetMachine", log_entries_kept=4096)
REMOVED_NOTE = "removed"


class FollowingLayer(RoutingLayer):
    """Does what the fleet's log says. See the module's text."""

    def set_fleet(self, fleet_id: bytes) -> None:
        """This worker belongs to that fleet from now on."""
        assert not self.fleet_id or self.fleet_id == fleet_id
        self.fleet_id = fleet_id

    def start_fleet(self, voters: tuple[int, ...], commands: list[Any], *, campaign: bool) -> None:
        """Worker 0 of a founding node: start the fleet group's member. Its first leader proposes ``commands``."""
        self._founding_commands = commands
        if FLEET_UID not in self.shard.members:
            self._listen_to_fleet()
            machine = self._new_fleet_machine()
            self.shard.create_group(FLEET_UID, FLEET_GROUP, FLEET_CONFIG, machine, voters, campaign=campaign)

    def _new_fleet_machine(self) -> RecordingFleetMachine:
        self._fleet_machine = RecordingFleetMachine()
        self._fleet_machine.context = CommandContext()
        return self._fleet_machine

    def _listen_to_fleet(self) -> None:
        self.shard.applied_listener[FLEET_UID] = self._on_fleet_applied
        self.shard.restored_listener[FLEET_UID] = self._on_fleet_restored

    def _recipe(self, uid: int) -> tuple[str, GroupConfig, Any, Any] | None:
        """What a leader's first message to a new member here needs: name, config, machine, hook."""
        if uid == FLEET_UID:
            if self.settings.index != 0 or not self.fleet_id:
                return None
            self._listen_to_fleet()
            return FLEET_GROUP, FLEET_CONFIG, self._new_fleet_machine(), None
        group = self.fleet.group_of_uid(uid)
        if group is None or uid in self._dead_early:
            return None
        made = self._make_machine(group)
        if not self._owns(group.name):
            self._guests[uid] = None
        return (group.name, group.group_config(), *made) if made is not None else None

    def _make_machine(self, group: Group) -> tuple[Any, Any] | None:
        try:
            return self.make_machine(group.group_config())
        except BaseException as error:
            self._cannot_start(group.name, error)
            return None

    def _cannot_start(self, name: str, error: BaseException) -> None:
        self.count("not_importable")
        self.note("error", f"group {name}: cannot start a member here: {': '.join(describe(error))}")

    # ------------------------------------------------------------------ what comes from the log

    def _on_fleet_applied(self, index: int, time_us: int, commands: list[bytes]) -> None:
        """Worker 0: the fleet member applied a batch."""
        machine = self._fleet_machine
        member = self.shard.members[FLEET_UID]
        assert machine is not None
        executed = machine.executed
        machine.executed = []
        self.fleet = member.state
        self.fleet_index = index
        if not executed:
            return
        epoch = machine.context.epoch
        self._fleet_changed(executed)
        if self._watchers:
            packed = [msgpack.packb(command, use_bin_type=True) for command in executed]
            for connection in self._watchers:
                self._reply(connection, 0, PUSH, ["fleet", index, packed, epoch])

    def _on_fleet_restored(self) -> None:
        """Worker 0: a snapshot replaced the fleet's state."""
        member = self.shard.members[FLEET_UID]
        if self._fleet_machine is not None:
            self._fleet_machine.executed = []
        self.fleet = member.state
        self.fleet_index = member.applied
        self._fleet_replaced()
        state = self.fleet.dump()
        for connection in self._watchers:
            self._reply(connection, 0, PUSH, ["fleet_reset", self.fleet_index, state])

    def on_feed(self, index: int, commands: list[bytes], epoch: int) -> None:
        """Other workers: commands of the fleet's log, as worker 0 applied them."""
        if index <= self.fleet_index:
            return
        executed = [msgpack.unpackb(command, raw=False, strict_map_key=False) for command in commands]
        for command in executed:
            self.fleet.apply(command, epoch)
        self.fleet_index = index
        self._fleet_changed(executed)

    def on_feed_reset(self, index: int, state: bytes) -> None:
        """Other workers: the whole state of the fleet. An older one than is known is not taken."""
        fleet = FleetState.load(state)
        if self.fleet_known and (fleet.epoch, index) < (self.fleet.epoch, self.fleet_index):
            return
        self.fleet = fleet
        self.fleet_index = index
        self._fleet_replaced()

    def _fleet_replaced(self) -> None:
        self._seen_node_version = -1
        self.fleet_known = bool(self.fleet.fleet_id)
        for name, uid in list(self._known.items()):
            group = self.fleet.by_name.get(name)
            if group is None or group.uid != uid:
                self._group_removed(name, uid)
        here = [*self.shard.members, *self.shard.tombstones, *self._resting]
        dead = [uid for uid in here if self.fleet.is_dead_uid(uid)]
        self._remember_removed(dead)
        for uid in dead:
            self.shard.remove_group(uid)
        for group in self.fleet.groups.values():
            self._group_added(group)
        self._nodes_changed()
        self._look_whether_current()

    def _fleet_changed(self, executed: list[Any]) -> None:
        self.fleet_known = bool(self.fleet.fleet_id)
        for command in executed:
            what = command[0]
            if what in ("add_group", "add_groups"):
                for name in (command[1],) if what == "add_group" else command[1]:
                    group = self.fleet.by_name.get(name)
                    if group is not None:
                        self._group_added(group)
            elif what == "remove_group":
                uid = self._known.get(command[1])
                group = self.fleet.by_name.get(command[1])
                if uid is not None and (group is None or group.uid != uid):
                    self._group_removed(command[1], uid)
                self._drop_guests()
            elif what in ("renew_group", "renew_damaged_group"):
                self._group_renewed(command[1])
            elif what == "change_config":
                self._config_changed(command[1])
        if self.fleet.node_version != self._seen_node_version:
            self._nodes_changed()
        self._look_whether_current()

    # ------------------------------------------------------------------ what follows from it

    def _nodes_changed(self) -> None:
        self._seen_node_version = self.fleet.node_version
        for node in self.fleet.nodes.values():
            for index, instance in enumerate(node.instances):
                self._set_address(instance, node.endpoint(index), node.public_key)
        for instance, why in self.fleet.gone.items():
            if self.shard.gone.get(instance) != "operator":
                self.shard.gone[instance] = why
            if instance in self.addresses:
                del self.addresses[instance]
                self._out.forgotten.append(instance)
        if self.fleet_known and not self._asked_for_leaders:
            self._asked_for_leaders = True
            self._ask_for_leaders()
        self._pinned = {}
        for uid, member in self.shard.members.items():
            if member.lead is not None:
                self._reconcile[uid] = None
                if member.is_established:
                    self._announce(member)
                    self._elected[uid] = None  # to say it once more

    def _owns(self, name: str) -> bool:
        return shard_of(name, self.settings.workers) == self.settings.index

    def _group_added(self, group: Group) -> None:
        name = group.name
        if not self._owns(name):
            if any(instance == self.instance for _, instance in group.members):
                self._maybe_create(group)  # placed here when the node had another number of workers
            self._catch_up_config(group)
            return
        if self._known.get(name) == group.uid:
            return
        self._known[name] = group.uid
        self._catch_up_config(group)
        known = self.leaders.get(group.uid)
        if known is not None:
            self._table_leader(name, group.uid, *known)
        else:
            self._out.table.append(("leaderless", name, group.uid))
        self._maybe_create(group)
        for request in self._awaiting_feed.pop(name, ()):
            if not request.done:
                self._route(request)

    def _catch_up_config(self, group: Group) -> None:
        """The config may have been changed while this worker was down."""
        member = self.shard.members.get(group.uid)
        if member is not None and member.config != group.group_config():
            self._config_changed(group.name)

    def _maybe_create(self, group: Group) -> None:
        """Start the first member that the fleet's log gives to this worker."""
        uid = group.uid
        if self.shard.holds(uid) or uid in self._dead_early:
            return
        instances = tuple(instance for _, instance in group.members)
        if self.instance not in instances:
            return
        self._unstarted[uid] = None  # until it has
        if self.shard.is_full or self._is_behind():
            return
        made = self._make_machine(group)
        if made is None:
            return
        machine, hook = made
        campaign = instances[0] == self.instance
        if not self._owns(group.name):
            self._guests[uid] = None
        try:
            self.shard.create_group(
                uid, group.name, group.group_config(), machine, instances, campaign=campaign, hook=hook
            )
        except BaseException as error:  # of the user's ``new``
            self._cannot_start(group.name, error)
        else:
            del self._unstarted[uid]

    def _group_removed(self, name: str, uid: int) -> None:
        if self._known.get(name) == uid:
            del self._known[name]
            self._out.table.append(("remove", name, uid))
        if self.shard.holds(uid) or uid in self._dead_early:
            self._remember_removed([uid])
        self.shard.remove_group(uid)
        self.leaders.pop(uid, None)
        self._dead_early.discard(uid)
        self._transfer_failed_us.pop(uid, None)
        self._pace.forget(uid)
        for table in (self._reconcile, self._reconcile_later, self._pinned, self._catching_up, self._unstarted):
            table.pop(uid, None)
        for request in self._parked.pop(uid, ()):
            if not request.done:
                self._check_name(request)

    # ------------------------------------------------------------------ what was removed stays so

    def _remember_removed(self, uids: list[int]) -> None:
        """On a disk: these groups are being removed here. Saved before their members are forgotten.

        After a restart the fleet is known as an older snapshot has it, with groups in it that were removed since, of
        whose members nothing is left here. Begun anew from there they would vote once more in terms in which they had
        voted, elect each other, and serve from nothing. A state that knows of the last removals knows of all before
        them, so those few are all there is to remember.
        """
        if self.disk is None or not uids:
            return
        self._removed = {uid for uid in self._removed if not self.fleet.is_dead_uid(uid)}.union(uids)
        self.disk.save_note(REMOVED_NOTE, bytes(msgpack.packb([self.fleet.epoch, sorted(self._removed)])))

    def _is_behind(self) -> bool:
        """Whether the fleet is known here as it was before a removal that a former process acted upon.

        In a later epoch the fleet was repaired: what it says now is what is, removals that it has lost included.
        """
        epoch, uids = self._removed_before
        if uids and (self.fleet.epoch > epoch or all(self.fleet.is_dead_uid(uid) for uid in uids)):
            self._removed_before = (0, set())
            return False
        return bool(uids)

    def _look_whether_current(self) -> None:
        if self._removed_before[1] and not self._is_behind():
            unstarted, self._unstarted = self._unstarted, {}
            for uid in unstarted:
                group = self.fleet.groups.get(uid)
                if group is not None:
                    self._maybe_create(group)

    def _drop_guests(self) -> None:
        """Members that were begun under another number of workers: their names are other workers' to look after.

        After a restart the fleet is known here as it was before some of them began: unknown is not removed. Given up
        for that, a member would be begun anew from the fleet's log, without its votes and its log.
        """
        for uid in [uid for uid in self._guests if self.fleet.is_dead_uid(uid) or not self.shard.holds(uid)]:
            del self._guests[uid]
            if self.fleet.is_dead_uid(uid):
                self._group_removed("", uid)

    def _group_renewed(self, uid: int) -> None:
        self._drop_guests()
        for name in [name for name, known in self._known.items() if known == uid]:
            self._group_removed(name, uid)
            group = self.fleet.by_name.get(name)
            if group is not None:
                self._group_added(group)

    def _renew(self, uid: int, dead: list[int], damaged: list[int]) -> None:
        """A group here has lost its majority for good, and its config says to begin anew then."""

        def answered(code: int, body: Any) -> None:
            self.note("warning", f"group {self._name(uid)}: majority lost, begun anew: {body}")

        command = ["renew_damaged_group", uid, dead, damaged] if damaged else ["renew_group", uid, dead]
        if self.settings.index == 0:
            self._fleet_command(command, 5_000_000, answered)
        else:
            token = self._next_id
            self._next_id += 1
            self._upcalls[token] = answered
            self._out.upcalls.append((token, "fleet_command", {"command": command, "timeout_ms": 5000}))

    def _config_changed(self, name: str) -> None:
        group = self.fleet.by_name.get(name)
        if group is None:
            return
        member = self.shard.members.get(group.uid)
        if member is not None:
            config = group.group_config()
            member.config = config
            member.election_timeout_us = config.election_timeout_us
            self.shard.save_group(member)
            made = self._make_machine(group)
            if made is not None:
                member.hook = made[1]

"""The state machine of the fleet group: nodes, groups, and the instances that are gone for good.

This module is pure: no sockets, no clocks, no randomness; the epoch comes from the log entry. It runs in the fleet
group (uid 0) on every node that has a copy, and in every process that follows the fleet group's feed, so the same
commands must give the same state everywhere, iteration orders included: plain dicts filled in log order, never sets.

Rules:

* A command checks everything before it changes anything. A refusal (:class:`FleetRefused`) leaves the state as it was.
* A command may arrive twice (a manager retries until it hears an answer), so each is idempotent: the second time it
  succeeds without effect, or is refused.
* An instance that is in ``gone`` never comes back (DESIGN 5.7). ``gone`` keeps the last ``GONE_COUNT_MAX``.
* A uid is ``epoch << 40 | counter`` and never used twice: the counter only rises, and an operator's repair, which may
  lose the end of the log, raises the epoch.

Commands are lists, first item a str::

    ["found", fleet_id: bin16, [node fields, ...]]       first command of a fleet's life: its id and its first nodes
    ["join", node fields]                                name, zone, host, port, public_key, instances[, replaces]
    ["deactivate", node] ["leave", node]                 leave: only of a node that is being deactivated
    ["remove_node", node, reason, [instance, ...]]       reason: "operator" or "purged"; instances: as the asker knows
    ["declare_lost", node]                               an operator: what that node once held will not come back
    ["instances", node, [instance, ...], [old, ...]]     shards came back with new instances, or there are more or fewer
    ["workers", node, count]                             members are placed on the first so many of its shards
    ["add_group", name, replicas, config] ["remove_group", name] ["change_config", name, config]
    ["add_groups", [name, ...], replicas, config]        all of them or, if one is refused, none
    ["renew_group", uid, [instance, ...]]                on_majority_loss = "new": its lost voters, which are gone
    ["renew_damaged_group", uid, [...], [...]]           the same; the second live, but say they are damaged

``replaces`` and ``old`` are the node's instances as the asker knew them ([]: none): if they are others by now, the
command is refused. Without this, a delayed command of a node's former life would declare its present one gone.

Queries: ``["nodes"]``, ``["groups"]``, ``["group", name]``, ``["state"]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import msgpack

from raftfleet.core.codes import ALREADY_ADDED, BAD_REQUEST, GROUP_NOT_FOUND, NO_ACTIVE_NODE, NOT_ACTIVE, REFUSED
from raftfleet.core.config import GroupConfig
from raftfleet.core.names import check_group_name, hash64, shard_of
from raftfleet.fleet.placement import PlacementRow, explain, node_hash, pair_hash
from raftfleet.machine import StateMachine

FIXED_SETTINGS = ("machine", "machine_version", "session_ttl_s", "session_count_max", "restore")
"""What applying a command depends on: members learn of a change at different entries, and would differ for ever."""

GONE_COUNT_MAX = 10_000
"""Instances remembered as gone: two per restart of a small node, so months of a hundred nodes' restarts."""

REPLICA_COUNT_MAX = 31
WORKER_COUNT_MAX = 1024
GROUPS_AT_ONCE_MAX = 1000
"""Names in one ``add_groups``: more would hold up, in one entry of the log, all that comes behind it."""
_PLACEMENTS_SHARED_MAX = 10_000
_FORMAT = 2


class FleetRefused(Exception):
    """A fleet command was refused: nothing changed. ``str`` is ``"code:message"``, which crosses the wire."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}:{message}")
        self.code = code
        self.message = message


class Node:
    """A node of the fleet. ``instances[i]`` is shard i's. ``active``: False while it is being deactivated.

    ``workers``: members are placed on the first so many shards; on the others only until they have moved away.
    """

    __slots__ = ("active", "host", "instances", "name", "port", "public_key", "workers", "zone")

    def __init__(
        self,
        name: str,
        zone: str,
        host: str,
        port: int,
        public_key: str,
        instances: tuple[int, ...],
        active: bool = True,
        workers: int = 0,
    ) -> None:
        self.workers = workers if 0 < workers <= len(instances) else len(instances)
        self.name = name
        self.zone = zone
        self.host = host
        self.port = port
        self.public_key = public_key
        self.instances = instances
        self.active = active

    def instance_for(self, group: str) -> int:
        """The instance that a group of this name has here, if it has a member here."""
        return self.instances[shard_of(group, self.workers)]

    def endpoint(self, shard: int) -> str:
        """ZeroMQ endpoint of that shard's ROUTER."""
        return f"tcp://{self.host}:{self.port + 1 + shard}"

    @property
    def manager_endpoint(self) -> str:
        """ZeroMQ endpoint of the manager's ROUTER."""
        return f"tcp://{self.host}:{self.port}"

    def fields(self) -> dict[str, Any]:
        """What ``join`` carries, and whether the node is active."""
        return {
            "name": self.name,
            "zone": self.zone,
            "host": self.host,
            "port": self.port,
            "public_key": self.public_key,
            "instances": list(self.instances),
            "active": self.active,
            "workers": self.workers,
        }

    def __repr__(self) -> str:
        return f"Node({self.fields()!r})"


Placement = tuple[tuple[str, int], ...]
"""Members as ``(node, instance)``, desired leader first."""


@lru_cache(maxsize=1024)
def _settings(packed: bytes) -> tuple[dict[str, Any], GroupConfig]:
    # One object for all groups of equal settings, as dict and as GroupConfig: a fleet has many groups and few kinds.
    # The key is msgpack's form, in which 600 and 600.0 differ, as they do in a dump.
    config = GroupConfig.from_dict(msgpack.unpackb(packed))
    return config.to_dict(), config


class Group:
    """A group of the fleet. ``members``: the initial voters.

    There are as many of these in every process of a node as the fleet has groups: what several can share (settings,
    placements) they do share.
    """

    __slots__ = ("_desired", "_desired_version", "config", "members", "name", "replicas", "uid")

    def __init__(self, uid: int, name: str, replicas: int, config: dict[str, Any], members: Placement) -> None:
        self.uid = uid
        self.name = name
        self.replicas = replicas
        self.config = config
        self.members = members
        self._desired: Placement = ()
        self._desired_version = -1

    def group_config(self) -> GroupConfig:
        """The config as an object."""
        return _settings(msgpack.packb(self.config))[1]

    def fields(self) -> dict[str, Any]:
        """What queries answer about a group."""
        return {
            "uid": self.uid,
            "name": self.name,
            "replicas": self.replicas,
            "config": dict(self.config),
            "members": [[node, instance] for node, instance in self.members],
        }

    def __repr__(self) -> str:
        return f"Group({self.fields()!r})"


class FleetState:
    """What the fleet knows. Changed by :meth:`apply` only; read freely, never change what it hands out.

    Attributes:
        fleet_id: 16 bytes, or b"" until the fleet is founded.
        nodes: by name, in order of joining.
        groups: by uid, in order of adding.
        by_name: the same :class:`Group` objects by name.
        gone: instance -> why, oldest first.
        former: instance -> name of the node that it was of, for those in ``gone``.
        epoch: the highest epoch of an applied command.
        counter: how many groups were ever added.
        node_version: rises whenever a node or an instance comes, goes or changes; local, not replicated.
    """

    __slots__ = (
        "_homes",
        "_placements",
        "_zones",
        "_zones_version",
        "by_name",
        "counter",
        "epoch",
        "fleet_id",
        "former",
        "gone",
        "groups",
        "node_version",
        "nodes",
    )

    def __init__(self) -> None:
        self.fleet_id = b""
        self.nodes: dict[str, Node] = {}
        self.groups: dict[int, Group] = {}
        self.by_name: dict[str, Group] = {}
        self.gone: dict[int, str] = {}
        self.former: dict[int, str] = {}
        self.epoch = 0
        self.counter = 0
        self.node_version = 0
        self._homes: dict[int, tuple[str, int]] = {}
        self._placements: dict[Placement, Placement] = {}
        self._zones: list[list[tuple[int, str, Placement]]] = []
        self._zones_version = -1

    # -- reading ----------------------------------------------------------------------------------------------------

    def group_of_uid(self, uid: int) -> Group | None:
        """The group with that uid, or None."""
        return self.groups.get(uid)

    def is_dead_uid(self, uid: int) -> bool:
        """Whether this group was removed (or lost in a repair) and stays dead: not merely still unknown here."""
        return uid != 0 and uid not in self.groups and uid <= (self.epoch << 40 | self.counter)

    def instance_home(self, instance: int) -> tuple[str, int] | None:
        """(node, shard index) of a current instance, or None."""
        return self._homes.get(instance)

    def is_current(self, instance: int) -> bool:
        """Whether this is a current instance of a known node."""
        return instance in self._homes

    def active_nodes(self) -> dict[str, list[str]]:
        """zone -> names of its active nodes, both sorted."""
        zones: dict[str, list[str]] = {}
        for name in sorted(self.nodes):
            node = self.nodes[name]
            if node.active:
                zones.setdefault(node.zone, []).append(name)
        return {zone: zones[zone] for zone in sorted(zones)}

    def desired(self, group: Group) -> Placement:
        """(node, instance) of the members the group should have, desired leader first. Cached per node version."""
        if group._desired_version != self.node_version:
            group._desired = self._place(group.name, group.replicas)
            group._desired_version = self.node_version
        return group._desired

    def explain(self, group: Group) -> list[PlacementRow]:
        """Every active node's standing for the group, best first."""
        return explain(group.name, group.replicas, self.active_nodes())

    def _place(self, name: str, replicas: int) -> Placement:
        # The rule of placement.place, unrolled over a table of nodes that is made once per node version: a test holds
        # the two together.
        if self._zones_version != self.node_version:
            zones: dict[str, list[tuple[int, str, Placement]]] = {}
            for node in self.nodes.values():
                if node.active:
                    shards = tuple((node.name, instance) for instance in node.instances[: node.workers])
                    zones.setdefault(node.zone, []).append((node_hash(node.name), node.name, shards))
            self._zones = list(zones.values())
            self._zones_version = self.node_version
        name_hash = hash64(name.encode("utf-8"))
        ranked: list[tuple[int, int, str, Placement]] = []
        for zone in self._zones:
            if len(zone) == 1:
                hash_, node_name, shards = zone[0]
                ranked.append((0, pair_hash(hash_, name_hash), node_name, shards))
                continue
            in_zone = [(pair_hash(hash_, name_hash), node_name, shards) for hash_, node_name, shards in zone]
            in_zone.sort()
            ranked.extend((rank, h, node_name, s) for rank, (h, node_name, s) in enumerate(in_zone[:replicas]))
        ranked.sort()
        return self._shared(tuple(shards[shard_of(name, len(shards))] for _, _, _, shards in ranked[:replicas]))

    def _shared(self, placement: Placement) -> Placement:
        """The one object for all groups that are placed so."""
        if len(self._placements) >= _PLACEMENTS_SHARED_MAX:
            self._placements.clear()
        return self._placements.setdefault(placement, placement)

    # -- changing ---------------------------------------------------------------------------------------------------

    def apply(self, command: Any, epoch: int) -> Any:
        """Carry out one command of the fleet log.

        Args:
            command: a list as in the module's essay; anything else is refused.
            epoch: of the log entry (``term >> 32``).

        Returns:
            The command's result, a msgpack value.

        Raises:
            FleetRefused: nothing was changed.
        """
        if not isinstance(command, (list, tuple)) or not command or not isinstance(command[0], str):
            raise FleetRefused(BAD_REQUEST, f"a fleet command is a list that begins with a str, not {command!r:.100}")
        handler = _COMMANDS.get(command[0])
        if handler is None:
            raise FleetRefused(BAD_REQUEST, f"there is no fleet command {command[0]!r:.100}")
        method, argument_count = handler
        if len(command) != 1 + argument_count:
            raise FleetRefused(BAD_REQUEST, f"{command[0]} takes {argument_count} arguments, not {len(command) - 1}")
        if not self.fleet_id and command[0] != "found":
            raise FleetRefused(NOT_ACTIVE, "the fleet is still being founded: try again")
        result = method(self, max(epoch, self.epoch), *command[1:])
        self.epoch = max(epoch, self.epoch)
        return result

    def _found(self, epoch: int, fleet_id: object, nodes: object) -> dict[str, Any]:
        if not isinstance(fleet_id, bytes) or len(fleet_id) != 16 or not any(fleet_id):
            raise FleetRefused(BAD_REQUEST, "a fleet id is 16 bytes that are not all zero")
        if self.fleet_id == fleet_id:
            return {"fleet": fleet_id}
        if self.fleet_id:
            raise FleetRefused(REFUSED, f"this is fleet {self.fleet_id.hex()}, not {fleet_id.hex()}")
        if not isinstance(nodes, (list, tuple)) or not nodes:
            raise FleetRefused(BAD_REQUEST, "a fleet is founded with at least one node")
        founders = [_parse_node(fields) for fields in nodes]
        _check_distinct("node names", [node.name for node in founders])
        _check_distinct("endpoints", [(node.host, node.port) for node in founders])
        _check_distinct("instances", [instance for node in founders for instance in node.instances])
        self.fleet_id = fleet_id
        for node in founders:
            self._put_node(node)
        return {"fleet": fleet_id}

    def _join(self, epoch: int, fields: object) -> dict[str, Any]:
        node = _parse_node(fields)
        self._check_instances(node.name, node.instances)
        assert isinstance(fields, Mapping)
        self._check_replaced(node, fields.get("replaces"))
        for other in self.nodes.values():
            if other.name != node.name and (other.host, other.port) == (node.host, node.port):
                raise FleetRefused(
                    REFUSED,
                    f"{node.host}:{node.port} belongs to node {other.name}: start this node with that name, or remove "
                    f"the other with 'raftfleet-node remove-dead-node {other.name}'",
                )
        old = self.nodes.get(node.name)
        if old is not None and old.instances != node.instances:
            same_place = (old.host, old.port) == (node.host, node.port)
            if not same_place and not all(instance in self.gone for instance in old.instances):
                raise FleetRefused(
                    REFUSED,
                    f"the name {node.name} is taken by the node at {old.host}:{old.port}: choose another --name, or "
                    f"remove that node with 'raftfleet-node remove-dead-node {node.name}'",
                )
            self._declare_gone(node.name, (i for i in old.instances if i not in node.instances), "restarted")
        if old is not None and len(old.instances) == len(node.instances):
            node.workers = old.workers
        if old is None or old.fields() != node.fields():
            self._put_node(node)
        return {"fleet": self.fleet_id}

    def _deactivate(self, epoch: int, name: object) -> dict[str, Any]:
        node = self._known_node(name)
        if not node.active:
            return {}
        if self.groups and not any(other.active for other in self.nodes.values() if other is not node):
            raise FleetRefused(
                REFUSED,
                f"{node.name} is the last active node and there are {len(self.groups)} groups: "
                "remove the groups first, or activate another node",
            )
        node.active = False
        self.node_version += 1
        return {}

    def _leave(self, epoch: int, name: object) -> dict[str, Any]:
        node = self._known_node(name)
        if node.active:
            raise FleetRefused(REFUSED, f"{node.name} is active: deactivate it before it leaves")
        self._drop_node(node, "left")
        return {}

    def _remove_node(self, epoch: int, name: object, reason: object, instances: object) -> dict[str, Any]:
        if not isinstance(name, str):
            raise FleetRefused(BAD_REQUEST, f"a node's name is a str, not {type(name).__name__}")
        if reason not in ("operator", "purged"):
            raise FleetRefused(BAD_REQUEST, f"a node is removed by 'operator' or 'purged', not {reason!r:.100}")
        given = _parse_instances(instances)
        node = self.nodes.get(name)
        if node is None:
            taken = [instance for instance in given if instance in self._homes]
            if taken:
                raise FleetRefused(REFUSED, f"instance {taken[0]} belongs to node {self._homes[taken[0]][0]}")
            self._declare_gone(name, given, str(reason))
            if reason == "operator":
                self._declare_lost(epoch, name)
            return {"removed": False}
        if sorted(given) != sorted(node.instances):
            raise FleetRefused(REFUSED, f"{name} has other instances by now: it is alive, or was when it said so")
        self._drop_node(node, str(reason))
        if reason == "operator":
            self._declare_lost(epoch, name)
        return {"removed": True}

    def _declare_lost(self, epoch: int, name: object) -> dict[str, Any]:
        """An operator's word that nothing of what a node of that name once held will come back.

        That its former instances are gone is known already; this says that groups need not wait for a better answer
        than going on without them (DESIGN 5.15).
        """
        lost = [i for i, node in self.former.items() if node == name and self.gone[i] != "operator"]
        for instance in lost:
            self.gone[instance] = "operator"
        if lost:
            self.node_version += 1
        return {"instances": lost}

    def _instances(self, epoch: int, name: object, instances: object, old: object) -> dict[str, Any]:
        node = self._known_node(name)
        given = _parse_instances(instances)
        self._check_instances(node.name, given)
        if given == node.instances:
            return {}
        self._check_replaced(
            Node(node.name, node.zone, node.host, node.port, node.public_key, given), _parse_instances(old)
        )
        self._declare_gone(node.name, (i for i in node.instances if i not in given), "restarted")
        # More shards take no members before that is said; of fewer, all do.
        workers = min(node.workers, len(given))
        self._put_node(Node(node.name, node.zone, node.host, node.port, node.public_key, given, node.active, workers))
        return {}

    def _workers(self, epoch: int, name: object, count: object) -> dict[str, Any]:
        node = self._known_node(name)
        if type(count) is not int or not 1 <= count <= len(node.instances):
            raise FleetRefused(BAD_REQUEST, f"{node.name} has {len(node.instances)} shards, not {count!r:.100}")
        if node.workers != count:
            node.workers = count
            self.node_version += 1
        return {}

    def _add_group(self, epoch: int, name: object, replicas: object, config: object) -> dict[str, Any]:
        (group,) = self._add(epoch, [name], replicas, config)
        return {"uid": group.uid, "members": [[node, instance] for node, instance in group.members]}

    def _add_groups(self, epoch: int, names: object, replicas: object, config: object) -> dict[str, Any]:
        if not isinstance(names, (list, tuple)) or not 1 <= len(names) <= GROUPS_AT_ONCE_MAX:
            raise FleetRefused(BAD_REQUEST, f"names is a list of 1 to {GROUPS_AT_ONCE_MAX} names")
        return {"uids": [group.uid for group in self._add(epoch, names, replicas, config)]}

    def _add(self, epoch: int, names: Iterable[object], replicas: object, config: object) -> list[Group]:
        try:
            checked = [check_group_name(name) for name in names]
            _check_distinct("group names", checked)
            settings = _settings(msgpack.packb(GroupConfig.from_dict(config).to_dict()))[0]
        except (ValueError, TypeError) as error:
            raise FleetRefused(BAD_REQUEST, str(error)) from error
        if isinstance(replicas, bool) or not isinstance(replicas, int) or not 1 <= replicas <= REPLICA_COUNT_MAX:
            raise FleetRefused(
                BAD_REQUEST, f"replicas is a number from 1 to {REPLICA_COUNT_MAX}, not {replicas!r:.100}"
            )
        taken = [name for name in checked if name in self.by_name]
        if taken:
            others = f" (and {len(taken) - 1} others of these)" if len(taken) > 1 else ""
            raise FleetRefused(ALREADY_ADDED, f"there is a group {taken[0]!r}{others} already")
        if not any(node.active for node in self.nodes.values()):
            raise FleetRefused(NO_ACTIVE_NODE, "the fleet has no active node: activate one")
        added = []
        for name in checked:
            self.counter += 1
            group = Group(epoch << 40 | self.counter, name, replicas, settings, ())
            group.members = self.desired(group)
            self.groups[group.uid] = self.by_name[name] = group
            added.append(group)
        return added

    def _remove_group(self, epoch: int, name: object) -> dict[str, Any]:
        group = self._known_group(name)
        members = [[node, instance] for node, instance in self.desired(group)]
        del self.groups[group.uid]
        del self.by_name[group.name]
        return {"uid": group.uid, "members": members}

    def _renew_damaged_group(self, epoch: int, uid: object, dead: object, damaged: object) -> dict[str, Any]:
        return self._renew_group(epoch, uid, dead, _parse_instances(damaged))

    def _renew_group(self, epoch: int, uid: object, dead: object, damaged: tuple[int, ...] = ()) -> dict[str, Any]:
        """A group whose state can be rebuilt starts anew and empty, under its name, with a new uid (DESIGN 5.15).

        ``damaged``: instances that live, and have told a member of the group that the records of theirs are damaged.
        """
        group = self.groups.get(uid) if isinstance(uid, int) else None
        if group is None:
            raise FleetRefused(GROUP_NOT_FOUND, f"there is no group with uid {uid!r:.100}")
        if group.config["on_majority_loss"] != "new":
            raise FleetRefused(REFUSED, f"{group.name!r} has on_majority_loss = {group.config['on_majority_loss']}")
        alive = [i for i in _parse_instances(dead) if i not in self.gone and i not in damaged]
        if alive:
            raise FleetRefused(REFUSED, f"instances {alive} are not known to be gone")
        if not any(node.active for node in self.nodes.values()):
            raise FleetRefused(NO_ACTIVE_NODE, "the fleet has no active node: activate one")
        self._remove_group(epoch, group.name)
        return self._add_group(epoch, group.name, group.replicas, {**group.config, "restore": None})

    def _change_config(self, epoch: int, name: object, config: object) -> dict[str, Any]:
        group = self._known_group(name)
        try:
            settings = GroupConfig.from_dict(config).to_dict()
        except (ValueError, TypeError) as error:
            raise FleetRefused(BAD_REQUEST, str(error)) from error
        for field in ("machine_version", "restore"):
            if settings[field] is None:
                settings[field] = group.config[field]
        kept = [field for field in FIXED_SETTINGS if settings[field] != group.config[field]]
        leases = settings["clock_drift_margin"] is not None or group.config["clock_drift_margin"] is not None
        if leases and settings["election_timeout_s"] != group.config["election_timeout_s"]:
            kept.append("election_timeout_s (of a group with clock_drift_margin)")
        if kept:
            text = f"{group.name!r} keeps its {', '.join(kept)}: these are settled when a group is added"
            raise FleetRefused(REFUSED, text)
        group.config = _settings(msgpack.packb(settings))[0]
        return {"uid": group.uid}

    # -- parts ------------------------------------------------------------------------------------------------------

    def _known_node(self, name: object) -> Node:
        node = self.nodes.get(name) if isinstance(name, str) else None
        if node is None:
            raise FleetRefused(REFUSED, f"the fleet has no node {name!r:.100}")
        return node

    def _known_group(self, name: object) -> Group:
        group = self.by_name.get(name) if isinstance(name, str) else None
        if group is None:
            raise FleetRefused(GROUP_NOT_FOUND, f"there is no group {name!r:.300}")
        return group

    def _check_instances(self, name: str, instances: Iterable[int]) -> None:
        for instance in instances:
            if instance in self.gone:
                raise FleetRefused(REFUSED, f"instance {instance} is gone ({self.gone[instance]}) and stays so")
            home = self._homes.get(instance)
            if home is not None and home[0] != name:
                raise FleetRefused(REFUSED, f"instance {instance} belongs to node {home[0]}")

    def _check_replaced(self, node: Node, replaces: object) -> None:
        """Refuse if the node has other instances by now than the asker knew, and than it wants."""
        old = self.nodes.get(node.name)
        if replaces is None or (old is not None and old.instances == node.instances):
            return
        if not isinstance(replaces, (list, tuple)) or tuple(replaces) != (old.instances if old is not None else ()):
            raise FleetRefused(REFUSED, f"the instances of node {node.name} have changed meanwhile: look again")

    def _put_node(self, node: Node) -> None:
        old = self.nodes.get(node.name)
        if old is not None:
            for instance in old.instances:
                self._homes.pop(instance, None)
        self.nodes[node.name] = node
        for index, instance in enumerate(node.instances):
            self._homes[instance] = (node.name, index)
        self.node_version += 1

    def _drop_node(self, node: Node, reason: str) -> None:
        del self.nodes[node.name]
        for instance in node.instances:
            self._homes.pop(instance, None)
        self._declare_gone(node.name, node.instances, reason)
        self.node_version += 1

    def _declare_gone(self, node: str, instances: Iterable[int], reason: str) -> None:
        for instance in instances:
            if instance not in self.gone:
                self.gone[instance] = reason
                self.former[instance] = node
        while len(self.gone) > GONE_COUNT_MAX:
            oldest = next(iter(self.gone))
            del self.gone[oldest], self.former[oldest]

    # -- dump and load ----------------------------------------------------------------------------------------------

    def dump(self) -> bytes:
        """msgpack ``[format, fleet_id, epoch, counter, nodes, settings, placements, groups, gone]``, in dicts' orders.

        A group is ``[uid, name, replicas, number of its settings, number of its placement]``: 100,000 of them then fit
        into one frame to the manager.
        """
        nodes = [
            [n.name, n.zone, n.host, n.port, n.public_key, list(n.instances), n.active, n.workers]
            for n in self.nodes.values()
        ]
        settings: dict[bytes, int] = {}
        placements: dict[Placement, int] = {}
        groups = []
        packed_settings: dict[int, bytes] = {}  # by the dict's identity: most are one object
        for g in self.groups.values():
            packed = packed_settings.get(id(g.config))
            if packed is None:
                packed = packed_settings[id(g.config)] = msgpack.packb(g.config)
            setting = settings.setdefault(packed, len(settings))
            groups.append([g.uid, g.name, g.replicas, setting, placements.setdefault(g.members, len(placements))])
        gone = [[instance, reason, self.former[instance]] for instance, reason in self.gone.items()]
        tables = [list(settings), [[list(member) for member in placement] for placement in placements]]
        dumped: bytes = msgpack.packb(
            [_FORMAT, self.fleet_id, self.epoch, self.counter, nodes, *tables, groups, gone], use_bin_type=True
        )
        return dumped

    @classmethod
    def load(cls, data: bytes) -> FleetState:
        """The inverse of :meth:`dump`. Raises ValueError if ``data`` is not a dump of this format."""
        try:
            fields = msgpack.unpackb(data, strict_map_key=False)
            if not isinstance(fields, list) or not fields or fields[0] != _FORMAT:
                raise ValueError("another version")
            return cls._from_rows(*fields[1:])
        except (ValueError, TypeError, IndexError, msgpack.UnpackException) as error:
            raise ValueError(f"this is not the state of a fleet: {error}") from error

    @classmethod
    def _from_rows(
        cls,
        fleet_id: bytes,
        epoch: int,
        counter: int,
        nodes: list[Any],
        settings: list[Any],
        placements: list[Any],
        groups: list[Any],
        gone: list[Any],
    ) -> FleetState:
        """Raises ValueError, TypeError or IndexError for rows that :meth:`dump` does not make."""
        _check_types((bytes, fleet_id), (int, epoch), (int, counter))
        _check_types(*((list, rows) for rows in (nodes, settings, placements, groups, gone)))
        state = cls()
        state.fleet_id = fleet_id
        state.epoch = epoch
        state.counter = counter
        for name, zone, host, port, public_key, instances, active, workers in nodes:
            _check_types((str, name), (str, zone), (str, host), (int, port), (str, public_key), (bool, active))
            _check_types((int, workers))
            _check_types((list, instances), *((int, instance) for instance in instances))
            if not instances:
                raise ValueError("a node without workers")
            state._put_node(Node(name, zone, host, port, public_key, tuple(instances), active, workers))
        for packed in settings:
            _check_types((bytes, packed))
        configs = [_settings(packed)[0] for packed in settings]
        for placement in placements:
            for node, instance in placement:
                _check_types((str, node), (int, instance))
        members = [state._shared(tuple((node, instance) for node, instance in placement)) for placement in placements]
        for uid, name, replicas, setting, placement in groups:
            _check_types((int, uid), (str, name), (int, replicas), (int, setting), (int, placement))
            group = Group(uid, name, replicas, configs[setting], members[placement])
            state.groups[uid] = group
            state.by_name[name] = group
        for instance, reason, former in gone:
            _check_types((int, instance), (str, reason), (str, former))
        state.gone = {instance: reason for instance, reason, _ in gone}
        state.former = {instance: node for instance, _, node in gone}
        return state

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FleetState) and self.dump() == other.dump()

    __hash__ = None  # type: ignore[assignment]


_COMMANDS: dict[str, tuple[Callable[..., Any], int]] = {
    "found": (FleetState._found, 2),
    "join": (FleetState._join, 1),
    "deactivate": (FleetState._deactivate, 1),
    "leave": (FleetState._leave, 1),
    "remove_node": (FleetState._remove_node, 3),
    "declare_lost": (FleetState._declare_lost, 1),
    "instances": (FleetState._instances, 3),
    "workers": (FleetState._workers, 2),
    "add_group": (FleetState._add_group, 3),
    "add_groups": (FleetState._add_groups, 3),
    "remove_group": (FleetState._remove_group, 1),
    "change_config": (FleetState._change_config, 2),
    "renew_group": (FleetState._renew_group, 2),
    "renew_damaged_group": (FleetState._renew_damaged_group, 3),
}


class FleetMachine(StateMachine):
    """The fleet group's state machine.

    The state is one :class:`FleetState`, changed in place: a refusal changes nothing, so there is nothing to undo.
    """

    def new(self) -> FleetState:
        """A fleet that is not founded yet: its first command is ``["found", ...]``."""
        return FleetState()

    def command(self, state: FleetState, arg: Any) -> tuple[Any, FleetState]:
        """Apply one command. Raises FleetRefused, after which the state is what it was."""
        return state.apply(arg, self.context.epoch), state

    def query(self, state: FleetState, arg: Any) -> Any:
        """Answer one query. Raises FleetRefused for one that does not exist."""
        match arg:
            case ["nodes"]:
                return {name: node.fields() for name, node in state.nodes.items()}
            case ["groups"]:
                return {group.name: group.replicas for group in state.groups.values()}
            case ["group", str(name)]:
                group = state._known_group(name)
                return group.fields() | {"desired": [list(member) for member in state.desired(group)]}
            case ["state"]:
                return state.dump()
            case _:
                raise FleetRefused(BAD_REQUEST, f"there is no fleet query {arg!r:.100}")

    def dump(self, state: FleetState) -> bytes:
        """The state for a snapshot."""
        return state.dump()

    def load(self, data: bytes) -> FleetState:
        """The state of a snapshot."""
        return FleetState.load(data)


def _check_types(*rows: tuple[type, Any]) -> None:
    for kind, value in rows:
        if type(value) is not kind:
            raise ValueError(f"{kind.__name__} is wanted, not {type(value).__name__}")


def _parse_node(fields: object) -> Node:
    if not isinstance(fields, Mapping):
        raise FleetRefused(BAD_REQUEST, f"a node is a map of fields, not {type(fields).__name__}")
    port = fields.get("port")
    instances = _parse_instances(fields.get("instances"))
    if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535 - len(instances):
        raise FleetRefused(
            BAD_REQUEST, f"port is a number from 1 to 65535 with room for the shards' above it, not {port!r:.100}"
        )
    public_key = fields.get("public_key", "")
    if not isinstance(public_key, str) or len(public_key) not in (0, 40):
        raise FleetRefused(BAD_REQUEST, "public_key is 40 characters of Z85, or empty")
    return Node(
        _parse_text("name", fields.get("name")),
        _parse_text("zone", fields.get("zone")),
        _parse_text("host", fields.get("host")),
        port,
        public_key,
        instances,
    )


def _parse_text(field: str, value: object) -> str:
    try:
        good = isinstance(value, str) and "\0" not in value and 1 <= len(value.encode("utf-8")) <= 255
    except UnicodeEncodeError:
        good = False
    if not good:
        raise FleetRefused(BAD_REQUEST, f"a node's {field} is a str of 1 to 255 bytes of UTF-8, not {value!r:.100}")
    return str(value)


def _parse_instances(value: object) -> tuple[int, ...]:
    instances: tuple[Any, ...] = tuple(value) if isinstance(value, (list, tuple)) else ()
    if not 1 <= len(instances) <= WORKER_COUNT_MAX or not all(type(i) is int and 1 <= i < 1 << 63 for i in instances):
        raise FleetRefused(BAD_REQUEST, f"instances are 1 to {WORKER_COUNT_MAX} numbers from 1 to 2**63 - 1")
    _check_distinct("instances", instances)
    return instances


def _check_distinct(what: str, values: Iterable[Any]) -> None:
    values = list(values)
    if len(set(values)) != len(values):
        raise FleetRefused(BAD_REQUEST, f"{what} must differ from each other")


class RecordingFleetMachine(FleetMachine):
    """The fleet's machine, which also keeps the commands that took effect in the batch being applied, for the feed."""

    def __init__(self) -> None:
        super().__init__()
        self.executed: list[Any] = []

    def command(self, state: FleetState, arg: Any) -> tuple[Any, FleetState]:
        """Apply, then remember."""
        outcome = super().command(state, arg)
        self.executed.append(arg)
        return outcome

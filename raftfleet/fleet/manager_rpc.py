"""What managers do for each other: let one in, pass a command on, say which groups are here, hear of a death.

Calls go by address and carry their sender's record. Nothing in them is trusted: arguments are checked, a caller that
means another fleet is refused, and of the fleet commands only those a node may ask for are passed on.

A node that asks to be let in is pinged first. Its request may be older than its present life, and a fleet that admits
instances that are no more waits for them in vain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack

from raftfleet.core.codes import BAD_REQUEST, NOT_ACTIVE, OK, REFUSED, UNANSWERED
from raftfleet.core.manager_messages import MANAGER_RPC_ANSWER, ManagerRpc, ManagerRpcAnswer, NodeRecord
from raftfleet.fleet.founding import Send
from raftfleet.fleet.manager_membership import ManagerMembership
from raftfleet.fleet.manager_outputs import MS, SECOND, Answer
from raftfleet.fleet.manager_state import as_record, ignore_answer, text_of

Losses = list[list[Any]]
"""``[[uid, [instance, ...]], ...]``: groups, and their members whose records are damaged."""
LOSSES_MAX = 20_000


def as_losses(value: object) -> Losses | None:
    """``value`` if it is of that form."""
    if not isinstance(value, list) or len(value) > LOSSES_MAX:
        return None
    for row in value:
        if not isinstance(row, list) or len(row) != 2 or type(row[0]) is not int or not isinstance(row[1], list):
            return None
        if not all(type(instance) is int for instance in row[1]):
            return None
    return value


class ManagerRpcs(ManagerMembership):
    """Calls between managers, and asking all of them at once."""

    def _on_rpc(self, message: ManagerRpc) -> None:
        address = (message.sender.host, message.sender.port)

        def answer(code: int, body: Any) -> None:
            self._outputs.append(Send(address, ManagerRpcAnswer(MANAGER_RPC_ANSWER, message.request_id, code, body)))

        if not self.fleet or not self.is_ready:
            answer(NOT_ACTIVE, "this node is in no fleet")
        elif message.args.get("fleet", self.fleet) != self.fleet:
            answer(REFUSED, f"this node is in another fleet, {self.fleet.hex()}")
        elif message.method == "join":
            self._sponsor(message.sender, answer)
        elif message.method == "propose":
            self._propose_for(message.args, answer)
        elif message.method == "local_groups":
            self._local_groups(lambda rows: answer(OK, rows))
        elif message.method == "declare_dead":
            instances = message.args.get("instances")
            if not isinstance(instances, list) or not all(type(i) is int for i in instances):
                answer(BAD_REQUEST, "instances is a list of numbers")
                return
            self._log("warning", f"{message.sender.name}: the operator declared instances {instances} dead")
            self._tell_shards_dead(instances)
            answer(OK, {})
        elif message.method == "declare_lost":
            losses = as_losses(message.args.get("losses"))
            if losses is None:
                answer(BAD_REQUEST, "losses are pairs of a uid and instances")
                return
            self._log("warning", f"{message.sender.name}: the operator gave up damaged members of {len(losses)} groups")
            self._tell_shards_lost(losses)
            answer(OK, {})
        else:
            answer(BAD_REQUEST, f"there is no method {message.method:.100}")

    def _on_rpc_answer(self, message: ManagerRpcAnswer) -> None:
        pending = self._rpc_calls.pop(message.request_id, None)
        if pending is not None:
            pending.then(message.code, message.body)

    def _sponsor(self, record: NodeRecord, answer: Answer) -> None:
        """Let a node in, if it still is who it said it is: its request may be older than its present life."""
        address = (record.host, record.port)
        if not record.zone:
            answer(BAD_REQUEST, "a node that joins names its zone")
            return
        asked_us = self._now_us
        self._ping(address)

        def is_here() -> bool:
            return address in self._seen and self._seen[address][2] > asked_us

        def looked(done: bool) -> None:
            if not done:
                answer(UNANSWERED, f"{address[0]}:{address[1]} does not answer this node")
            elif self._seen[address][0].instances != record.instances:
                answer(NOT_ACTIVE, "the node has other instances by now")
            elif not self.fleet:
                answer(NOT_ACTIVE, "this node is in no fleet")
            else:
                self._let_in(record, answer)

        self._wait_for(SECOND, is_here, looked)

    def _let_in(self, record: NodeRecord, answer: Answer) -> None:
        """Propose the join. The node is remembered on disk first: see the second proof of raftfleet.fleet.founding."""
        address = (record.host, record.port)
        fleet = self.fleet

        def answered(code: int, body: Any) -> None:
            if self.fleet != fleet:
                answer(NOT_ACTIVE, "this node has left its fleet")
            elif code == OK:
                nodes = [list(as_record(node)) for node in self._known_nodes()]
                answer(OK, {"fleet": self.fleet, "nodes": nodes})
            else:
                answer(code, text_of(body))

        if address not in self._sponsored:
            self._sponsored[address] = record.name
            self._remember_nodes()
        args = {"command": ["join", self._join_fields(record)], "timeout_ms": 1500}
        self._call_shard(0, "fleet_command", args, 2 * SECOND, answered)

    def _propose_for(self, args: dict[str, Any], answer: Answer) -> None:
        try:
            command = msgpack.unpackb(args["command"], strict_map_key=False)
            if command[0] not in ("instances", "deactivate", "leave", "remove_node"):
                raise ValueError(f"{command[0]} is not passed on")
        except Exception as error:  # bytes from outside: msgpack has many ways to say no
            answer(BAD_REQUEST, f"not a fleet command to pass on: {error!r:.200}")
            return
        self._call_shard(0, "fleet_command", {"command": command, "timeout_ms": 1000}, 1500 * MS, answer)

    def _tell_shards_dead(self, instances: list[int]) -> None:
        self._declared.update(instances)
        for index in range(len(self.shards)):
            self._call_shard(index, "declare_dead", {"instances": instances}, 2 * SECOND, ignore_answer)

    def _tell_shards_lost(self, losses: Losses) -> None:
        for index in range(len(self.shards)):
            self._call_shard(index, "declare_lost", {"losses": losses}, 2 * SECOND, ignore_answer)

    def _gather(self, timeout_us: int, then: Callable[[dict[str, list[list[Any]]]], None]) -> None:
        """Ask this node's shards and every reachable manager for their local groups; ``then`` gets node -> rows."""
        found: dict[str, list[list[Any]]] = {}
        others = {address: self._seen[address][0].name for address in self._reachable()}
        waiting = {self.settings.name, *others.values()}

        def came(node: str) -> Callable[[int, Any], None]:
            def answered(code: int, body: Any) -> None:
                if code == OK and isinstance(body, list):
                    found[node] = [row for row in body if isinstance(row, list) and len(row) >= 8]
                if node in waiting:
                    waiting.discard(node)
                    if not waiting:
                        then(found)

            return answered

        for address, node in others.items():
            self._rpc(address, "local_groups", {}, timeout_us, came(node))
        mine = came(self.settings.name)
        self._local_groups(lambda rows: mine(OK, rows), timeout_us)

    def _local_groups(self, then: Callable[[list[list[Any]]], None], timeout_us: int = SECOND) -> None:
        rows: list[list[Any]] = []
        waiting = set(range(len(self.shards)))

        def came(index: int) -> Answer:
            def answered(code: int, body: Any) -> None:
                if code == OK and isinstance(body, list):
                    rows.extend(body)
                waiting.discard(index)
                if not waiting:
                    then(rows)

            return answered

        for index in range(len(self.shards)):
            self._call_shard(index, "local_groups", {}, timeout_us, came(index))

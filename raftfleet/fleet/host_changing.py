"""Changing the fleet's groups, in worker 0: add one, remove one, give one another config.

This module is the way of an operator's call from the checks before the fleet command to what must be true when the
caller is told. Rules:

* Before a group is added, every node that would hold a member tries to import its machine; one that cannot is named. A
  node that does not answer in time is no obstacle: the group will start there when it can.
* After a group was removed, most of its members have stopped before the caller hears of it: no client can still be
  answered by the old group then.
* The fleet's machine has the last word on every command (:mod:`raftfleet.fleet.machine`).
"""

from __future__ import annotations

from typing import Any

from raftfleet.core.codes import ALREADY_ADDED, NOT_ACTIVE, NOT_IMPORTABLE, OK
from raftfleet.core.config import GroupConfig
from raftfleet.core.names import check_group_name
from raftfleet.fleet.host_reconciling import ReconcilingLayer
from raftfleet.fleet.machine import Group

IMPORT_CHECK_US = 3_000_000
DROP_WAIT_US = 1_000_000


class ChangingLayer(ReconcilingLayer):
    """Adds, removes and configures groups. See the module's text."""

    def _call_add_group(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        name = check_group_name(args["name"])
        replicas = args["replicas"]
        if type(replicas) is not int:
            raise ValueError("replicas is a whole number")
        config = GroupConfig.from_dict(args["config"])
        if not self.fleet_known:
            answer(NOT_ACTIVE, f"node {self.settings.node} is not in a fleet yet: see 'raftfleet-node status'")
            return
        if name in self.fleet.by_name:
            answer(ALREADY_ADDED, f"a consensus group {name!r} exists already")
            return
        probe = Group(0, name, replicas, config.to_dict(), ())
        places = self.fleet.desired(probe)
        check = (config.machine, config.hook, config.machine_version)
        if not places:
            self._fleet_command(["add_group", name, replicas, config.to_dict()], timeout_us, answer)  # says why not
            return
        unchecked = [(node, instance) for node, instance in places if (instance, *check) not in self._import_ok]
        failures: list[Any] = []
        left = len(unchecked)

        def checked(instance: int, code: int, body: Any) -> None:
            nonlocal left
            left -= 1
            if code == OK:
                if len(self._import_ok) > 100_000:
                    self._import_ok.clear()
                version = body.get("version") if isinstance(body, dict) else None
                key = (instance, *check)
                self._import_ok[key] = version if type(version) is int else 1
            elif code == NOT_IMPORTABLE:
                failures.append(body)
            if left == 0:
                decide()

        def decide() -> None:
            if failures:
                answer(NOT_IMPORTABLE, failures[0])
                return
            fields = config.to_dict()
            if config.machine_version is None:
                fields["machine_version"] = min(self._import_ok.get((instance, *check), 1) for _, instance in places)
            self._fleet_command(["add_group", name, replicas, fields], timeout_us, answer)

        if not unchecked:
            decide()
        for _, instance in unchecked:
            self.rpc(
                instance,
                "import_check",
                {"config": config.to_dict()},
                lambda code, body, instance=instance: checked(instance, code, body),  # type: ignore[misc]
                min(IMPORT_CHECK_US, timeout_us // 2),
            )

    def _call_remove_group(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        """Remove from the fleet's log; then see to it that most members have stopped before saying so."""

        def removed(code: int, body: Any) -> None:
            if code != OK:
                answer(code, body)
                return
            uid = body["uid"]
            instances = {instance for _, instance in body["members"]}
            group = Group(uid, str(args["name"]), max(1, len(instances)), {}, ())
            instances.update(instance for _, instance in self.fleet.desired(group))
            needed = len(instances) // 2 + 1
            answers = 0
            finished = False

            def dropped(code: int, _: Any) -> None:
                nonlocal answers, finished
                answers += 1
                if not finished and (answers >= len(instances) or (code == OK and answers >= needed)):
                    finished = True
                    answer(OK, {"uid": uid})

            for instance in instances:
                self.rpc(instance, "drop_group", {"uid": uid}, dropped, DROP_WAIT_US)

        self._fleet_command(["remove_group", args["name"]], timeout_us, removed)

    def _call_change_config(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        config = GroupConfig.from_dict(args["config"])
        self._fleet_command(["change_config", args["name"], config.to_dict()], timeout_us, answer)

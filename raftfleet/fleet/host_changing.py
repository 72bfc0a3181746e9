"""Changing the fleet's groups, in worker 0: add one, remove one, give one another config.

This module is the way of an operator's call from the checks before the fleet command to what must be true when the
caller is told. Rules:

* Before a group is added, every node that would hold a member tries to import its machine; one that cannot is named. A
  node that does not answer in time is no obstacle: the group will start there when it can.
* After a group was removed, most of its members have stopped before the caller hears of it: no client can still be
  answered by the old group then.
* Whether a name is taken says the fleet's machine alone (:mod:`raftfleet.fleet.machine`): the copy of its state here
  may lag behind a removal of which the caller has been told already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raftfleet.core.codes import NOT_ACTIVE, NOT_IMPORTABLE, OK
from raftfleet.core.config import GroupConfig
from raftfleet.core.names import check_group_name
from raftfleet.fleet.host_reconciling import ReconcilingLayer
from raftfleet.fleet.machine import GROUPS_AT_ONCE_MAX, Group

IMPORT_CHECK_US = 3_000_000
DROP_WAIT_US = 1_000_000


class ChangingLayer(ReconcilingLayer):
    """Adds, removes and configures groups. See the module's text."""

    def _call_add_group(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        name = check_group_name(args["name"])
        self._add_checked([name], args, timeout_us, answer, lambda *settings: ["add_group", name, *settings])

    def _call_add_groups(self, connection: int, args: dict[str, Any], timeout_us: int, answer: Any) -> None:
        names = [check_group_name(name) for name in args["names"]]
        if len(names) > GROUPS_AT_ONCE_MAX:
            raise ValueError(f"at most {GROUPS_AT_ONCE_MAX} groups are added at once, not {len(names)}")
        self._add_checked(names, args, timeout_us, answer, lambda *settings: ["add_groups", names, *settings])

    def _add_checked(
        self, names: list[str], args: dict[str, Any], timeout_us: int, answer: Any, command: Callable[..., list[Any]]
    ) -> None:
        """Propose ``command(replicas, config)`` once the machine was imported wherever a member is to be."""
        replicas = args["replicas"]
        if type(replicas) is not int:
            raise ValueError("replicas is a whole number")
        config = GroupConfig.from_dict(args["config"])
        if not self.fleet_known:
            answer(NOT_ACTIVE, f"node {self.settings.node} is not in a fleet yet: see 'raftfleet-node status'")
            return
        fields = config.to_dict()
        places = {
            instance: node
            for name in names
            for node, instance in self.fleet.desired(Group(0, name, replicas, fields, ()))
        }
        if not places:
            self._fleet_command(command(replicas, fields), timeout_us, answer)  # says why not
            return

        def checked(versions: list[int], failure: Any) -> None:
            if failure is not None:
                answer(NOT_IMPORTABLE, failure)
                return
            if config.machine_version is None:
                fields["machine_version"] = min(versions)
            self._fleet_command(command(replicas, fields), timeout_us, answer)

        self._check_imports(sorted(places), config, min(IMPORT_CHECK_US, timeout_us // 2), checked)

    def _check_imports(
        self, instances: list[int], config: GroupConfig, timeout_us: int, then: Callable[[list[int], Any], None]
    ) -> None:
        """``then(version of the machine on each, failure or None)``; what was found out once is not asked again."""
        check = (config.machine, config.hook, config.machine_version)
        unchecked = [instance for instance in instances if (instance, *check) not in self._import_ok]
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
                finish()

        def finish() -> None:
            versions = [self._import_ok.get((instance, *check), 1) for instance in instances]
            then(versions, failures[0] if failures else None)

        if not unchecked:
            finish()
        for instance in unchecked:
            self.rpc(
                instance,
                "import_check",
                {"config": config.to_dict()},
                lambda code, body, instance=instance: checked(instance, code, body),  # type: ignore[misc]
                timeout_us,
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

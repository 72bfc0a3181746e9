"""``repair``: the operator's word about all that is lost, at once, after having been shown what it costs.

Rules, besides those of :mod:`raftfleet.fleet.manager_removal`, on whose machinery this stands:

* Asking changes nothing. What is done is what was shown: whoever answers by the time the word is given is not given up,
  and of a node that has other instances by then than were shown, nothing is done at all.
* Only nodes are given up that keep some group from having a majority. Groups that have one are touched no more than by
  the removal of those nodes.
* Silent nodes are declared dead to all shards of all reachable nodes before the fleet is asked, since the fleet group
  may be among the groups that have to be repaired. What restarted nodes had before is declared lost afterwards, by a
  command of the fleet's log.
* A damaged member is given up for its own group only, and only if its own shard says that it is (its node lives, and
  all else that it holds is whole). The survivors are told, and act on it when they have the same word from that shard.
* Each group repairs itself then (:mod:`raftfleet.core.repair`), in a higher epoch and with a record in its log.
"""

from __future__ import annotations

from typing import Any

from raftfleet.core.codes import NOT_ACTIVE, OK, REFUSED
from raftfleet.core.manager_messages import NodeRecord
from raftfleet.fleet.machine import Node
from raftfleet.fleet.manager_outputs import SECOND, Answer
from raftfleet.fleet.manager_removal import RECOVERY_WAIT_US, ManagerRemoval
from raftfleet.fleet.manager_rpc import Losses, as_losses
from raftfleet.fleet.manager_state import ignore_answer, text_of
from raftfleet.fleet.repair_plan import (
    ABSENT,
    EXTINCT,
    GIVEN_UP,
    LOST,
    REPAIRABLE,
    SILENT,
    GroupCase,
    Report,
    judge,
    report_of,
)

Rows = dict[str, list[list[Any]]]
NODE_COUNT_MAX = 1024
LOOK_US_MAX = 4 * SECOND
"""How long nodes that were heard a moment ago may take to say what they have: a look ends when all have."""


def _losses(cases: list[GroupCase]) -> Losses:
    return [[case.uid, case.damaged] for case in cases if case.verdict == REPAIRABLE and case.damaged]


class ManagerRepair(ManagerRemoval):
    """Shows what a repair would do, and does it."""

    def _call_repair_plan(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        if not self.fleet:
            answer(NOT_ACTIVE, self._why_not_active())
            return
        self._gather(min(timeout_us // 2, LOOK_US_MAX), lambda rows: answer(OK, self._repair_plan(rows)))

    def _repair_plan(self, rows: Rows) -> dict[str, Any]:
        cases = self._judge_leaderless(rows)
        repairable = [case for case in cases if case.verdict == REPAIRABLE]
        instances = {node.name: list(node.instances) for node in self._known_nodes()}
        dead = sorted({name for case in repairable for name in case.dead})
        return {
            "groups": [case.fields() for case in cases],
            "dead": {name: instances.get(name, []) for name in dead},
            "former": sorted({name for case in repairable for name in case.former} - set(dead)),
            "damaged": _losses(repairable),
            "unreachable": dict(self.unreachable),
        }

    def _judge_leaderless(self, rows: Rows) -> list[GroupCase]:
        reports: dict[int, list[Report]] = {}
        for node, its_rows in rows.items():
            for row in its_rows:
                report = report_of(node, row)
                if report is not None:
                    reports.setdefault(row[1], []).append(report)
        homes: dict[int, Node | NodeRecord] = {
            instance: node for node in self._known_nodes() for instance in node.instances
        }
        former = self.state.former if self.state is not None else {}

        def node_of(instance: int) -> str:
            home = homes.get(instance)
            return home.name if home is not None else former.get(instance, f"instance {instance:x}")

        return [
            judge(name, uid, reports.get(uid, ()), lambda instance: self._fate(instance, homes), node_of)
            for uid, name, _ in self._leaderless_rows(rows)
        ]

    def _fate(self, instance: int, homes: dict[int, Node | NodeRecord]) -> str:
        """Of an instance whose member did not report."""
        why = self.state.gone.get(instance) if self.state is not None else None
        if why == "operator" or instance in self._declared:
            return GIVEN_UP
        if why is not None:
            return LOST
        home = homes.get(instance)
        if home is None or home.name == self.settings.name:
            return ABSENT
        return ABSENT if self._answers(home) else SILENT

    # -- the word ---------------------------------------------------------------------------------------------------

    def _call_repair(self, args: dict[str, Any], timeout_us: int, answer: Answer) -> None:
        """``args``: ``dead``, ``former``, ``damaged`` as ``repair_plan`` gave them. Only what was shown is given up."""
        dead, former, damaged = args["dead"], args["former"], as_losses(args.get("damaged", []))
        if not isinstance(dead, dict) or not isinstance(former, list) or len(dead) + len(former) > NODE_COUNT_MAX:
            raise ValueError("dead is a map of nodes to instances, former a list of nodes")
        if damaged is None:
            raise ValueError("damaged is a list of pairs of a uid and instances")
        if not self.fleet:
            answer(NOT_ACTIVE, self._why_not_active())
            return
        nodes = {node.name: node for node in self._known_nodes()}
        for name, instances in dead.items():
            node = nodes.get(name)
            if node is None or list(node.instances) != list(instances):
                answer(REFUSED, f"node {name:.100} is not what it was when the plan was made: look again")
                return
            if self._answers(node) or name == self.settings.name:
                answer(REFUSED, f"node {name:.100} answers: nothing was given up; look again")
                return
        if not dead and not former and not damaged:
            answer(REFUSED, "there is nothing to give up: no group has lost its majority")
            return
        look_us = min(timeout_us // 8, LOOK_US_MAX)
        self._gather(look_us, lambda rows: self._begin_repair(dead, former, damaged, rows, timeout_us, answer))

    def _begin_repair(
        self,
        dead: dict[str, list[int]],
        former: list[str],
        damaged: Losses,
        rows: Rows,
        timeout_us: int,
        answer: Answer,
    ) -> None:
        cases = self._judge_leaderless(rows)
        still = {uid: instances for uid, instances in _losses(cases)}
        changed = [uid for uid, instances in damaged if not set(instances) <= set(still.get(uid, ()))]
        if changed:
            answer(REFUSED, f"{len(changed)} groups are not what they were when the plan was made: look again")
            return
        before = {case.name for case in cases if case.verdict != EXTINCT}
        names = ", ".join([*dead, *(f"what {name} had" for name in former)])
        if damaged:
            names += ", " * bool(names) + f"damaged members of {len(damaged)} groups"
        self._log("warning", f"the operator repairs lost majorities and gives up {names}")
        deadline_us = self._now_us + min(timeout_us * 3 // 4, (2 + bool(former)) * RECOVERY_WAIT_US)
        instances = [instance for its in dead.values() for instance in its]
        if dead:
            self._removals.update(dead)
            self._tell_shards_dead(instances)
            for address in self._reachable():
                self._rpc(address, "declare_dead", {"instances": instances}, 2 * SECOND, ignore_answer)
        if damaged:
            self._tell_shards_lost(damaged)
            for address in self._reachable():
                self._rpc(address, "declare_lost", {"losses": damaged}, 2 * SECOND, ignore_answer)
        failures: list[str] = []

        def declare(left: list[str]) -> None:
            if not left:
                text = f"given up: {names}"
                if failures:
                    text += f"; what these had could not be declared lost yet: {', '.join(failures)}: repair again"
                self._await_recovery(text, before, deadline_us, timeout_us, answer)
                return

            def declared(code: int, body: Any) -> None:
                if code != OK:
                    failures.append(f"{left[0]} ({text_of(body)})")
                declare(left[1:])

            self._propose(["declare_lost", left[0]], declared)

        # Without a majority the fleet group takes no command: those who are to repair it have been told above.
        self._wait_for(
            min(timeout_us // 2, RECOVERY_WAIT_US),
            lambda: not any(name in self._removals for name in dead),
            lambda _done: declare(former),
        )

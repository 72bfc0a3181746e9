"""What an operator must be told before a lost majority is repaired: who has what, and whom to give up.

This module is pure: it looks at what every reachable member said at one moment and judges each group that has no
leader. It decides nothing; :mod:`raftfleet.fleet.manager_repair` acts on an operator's word only.

A voter is one of these:

==========  ===========================================================================================================
answers     its node reported the member: it is counted, and its (term, index) is shown
silent      its node does not answer: it may come back; giving it up is the operator's word that it will not
damaged     its node answers, and says that the records of the member are damaged: it will come back as new only
lost        the instance is known to be gone for good: its memory or disk was lost, though the node may run again
given up    lost, and an operator has said so already
absent      its node answers but has no such member (its state machine cannot be imported, or it was heard only a
            moment ago): nothing is known that would justify giving it up
==========  ===========================================================================================================

and a group without a leader one of these:

============  =========================================================================================================
electing      those who answer are a quorum: it needs no repair, only time
repairable    they are not, and giving up the silent, the damaged and the lost leaves members that can go on; what only
              those had that were given up is lost
blocked       an absent voter is in the way: every voter that is not given up must answer before anybody goes on
extinct       no member that has anything answers: nobody could go on; a copy of the state could, as a new group
============  =========================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from raftfleet.core import roles

ANSWERS = "answers"
SILENT = "silent"
LOST = "lost"
DAMAGED = roles.DAMAGED
GIVEN_UP = "given up"
ABSENT = "absent"

ELECTING = "electing"
REPAIRABLE = "repairable"
BLOCKED = "blocked"
EXTINCT = "extinct"


class Report(NamedTuple):
    """What a node says of a member of its own.

    ``role``: DAMAGED where it is no more; ``archived`` is then the path, on that node, of the newest snapshot that it
    left ("": none), and ``last_index`` that of the snapshot.
    """

    node: str
    instance: int
    role: str
    term: int
    last_index: int
    voters: tuple[int, ...]
    learners: tuple[int, ...]
    archived: str = ""


@dataclass
class MemberCase:
    """One member of a leaderless group. ``term`` and ``last_index``: what it has, if it answers; else 0.

    ``archived``: see :class:`Report`; ``last_index`` is that snapshot's then.
    """

    node: str
    instance: int
    is_voter: bool
    state: str
    role: str = "-"
    term: int = 0
    last_index: int = 0
    archived: str = ""


@dataclass
class GroupCase:
    """One leaderless group, judged.

    ``dead``: nodes to be declared so. ``former``: nodes of which what they once had is to be declared lost.
    ``damaged``: instances whose members are to be given up.
    """

    name: str
    uid: int
    verdict: str
    members: list[MemberCase] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    former: list[str] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)

    def fields(self) -> dict[str, Any]:
        """As a map, for the control socket."""
        members = [vars(member) for member in self.members]
        return {
            "name": self.name,
            "uid": self.uid,
            "verdict": self.verdict,
            "members": members,
            "dead": self.dead,
            "former": self.former,
            "damaged": self.damaged,
        }


def report_of(node: str, row: list[Any]) -> Report | None:
    """From a row of ``local_groups``; None if an older version wrote it, which says too little."""
    if len(row) < 11:
        return None
    _name, _uid, role, _leader, term, last_index, _commit, _applied, instance, voters, learners, *rest = row
    if not isinstance(voters, (list, tuple)) or not isinstance(learners, (list, tuple)) or type(instance) is not int:
        return None
    archived = ""
    if role == DAMAGED and len(rest) >= 2:
        archived, last_index = str(rest[0]), rest[1]
    return Report(node, instance, str(role), int(term), int(last_index), tuple(voters), tuple(learners), archived)


def judge(
    name: str, uid: int, reports: Iterable[Report], state_of: Callable[[int], str], node_of: Callable[[int], str]
) -> GroupCase:
    """Judge a group without a leader.

    Args:
        reports: of its reachable members.
        state_of: of an instance that did not report: SILENT, LOST, GIVEN_UP or ABSENT.
        node_of: name of the node that an instance is, or was, of.
    """
    by_instance = {report.instance: report for report in reports}
    whole = [report for report in by_instance.values() if report.role != DAMAGED]
    case = GroupCase(name, uid, ELECTING)
    if not whole:
        case.verdict = EXTINCT  # and who its voters were is not known: those that are left are shown
        case.members = [_row(report, is_voter=True) for report in by_instance.values()]
        return case
    # The newest configuration that anybody holds: its voters are those who must agree.
    newest = max(whole, key=lambda report: (report.term, report.last_index))
    for instance in (*newest.voters, *newest.learners):
        is_voter = instance in newest.voters
        seen = by_instance.get(instance)
        if seen is None:
            case.members.append(MemberCase(node_of(instance), instance, is_voter, state_of(instance)))
        else:
            case.members.append(_row(seen, is_voter=is_voter))
    _give_verdict(case)
    return case


def _row(seen: Report, *, is_voter: bool) -> MemberCase:
    state = DAMAGED if seen.role == DAMAGED else ANSWERS
    return MemberCase(
        *(seen.node, seen.instance, is_voter, state, seen.role),
        *(seen.term, seen.last_index, seen.archived),
    )


def _give_verdict(case: GroupCase) -> None:
    voters = [member for member in case.members if member.is_voter]
    answering = [member for member in case.members if member.state == ANSWERS]
    voting = [member for member in answering if member.is_voter]
    if len(voting) >= len(voters) // 2 + 1:
        return
    if any(member.state == ABSENT for member in voters):
        case.verdict = BLOCKED
        return
    case.verdict = REPAIRABLE if answering else EXTINCT
    case.dead = sorted({member.node for member in voters if member.state == SILENT})
    case.former = sorted({member.node for member in voters if member.state == LOST})
    case.damaged = sorted(member.instance for member in voters if member.state == DAMAGED)

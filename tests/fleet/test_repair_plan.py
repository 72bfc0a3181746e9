"""What a repair shows before anything is given up, and what it refuses to give up."""

from __future__ import annotations

from typing import Any

import pytest
from fleet.test_manager_core import add_group, ask, only_fleet, run_until, settled

from raftfleet.core import codes
from raftfleet.fleet.manager_outputs import SECOND
from raftfleet.fleet.repair_plan import (
    ABSENT,
    ANSWERS,
    BLOCKED,
    DAMAGED,
    ELECTING,
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


def report(instance: int, *, term: int = 5, last_index: int = 10, voters: tuple[int, ...] = (1, 2, 3)) -> Report:
    return Report(f"n{instance}", instance, "follower", term, last_index, voters, ())


def judged(reports: list[Report], **states: str) -> GroupCase:
    return judge("g", 7, reports, lambda i: states.get(f"i{i}", SILENT), lambda i: f"n{i}")


def test_a_group_whose_quorum_answers_needs_no_repair() -> None:
    case = judged([report(1), report(2)])
    assert (case.verdict, case.dead, case.former) == (ELECTING, [], [])


def test_a_lost_majority_names_whom_to_give_up_and_what_is_left() -> None:
    case = judged([report(1, term=6, last_index=42)], i2=SILENT, i3=LOST)
    assert (case.verdict, case.dead, case.former) == (REPAIRABLE, ["n2"], ["n3"])
    assert [(m.node, m.state, m.term, m.last_index) for m in case.members] == [
        ("n1", ANSWERS, 6, 42),
        ("n2", SILENT, 0, 0),
        ("n3", LOST, 0, 0),
    ]


def damaged(instance: int, archived: str = "", index: int = 0) -> Report:
    return Report(f"n{instance}", instance, DAMAGED, 0, index, (), (), archived)


def test_damaged_members_are_given_up_and_not_their_nodes() -> None:
    case = judged([report(1, term=6, last_index=42), damaged(2), damaged(3)])
    assert (case.verdict, case.dead, case.former, case.damaged) == (REPAIRABLE, [], [], [2, 3])
    assert [(m.node, m.state) for m in case.members] == [("n1", ANSWERS), ("n2", DAMAGED), ("n3", DAMAGED)]


def test_a_damaged_member_of_a_group_with_a_majority_needs_no_repair() -> None:
    case = judged([report(1), report(2), damaged(3)])
    assert (case.verdict, case.damaged) == (ELECTING, [])


def test_damaged_and_silent_members_are_given_up_together() -> None:
    case = judged([report(1), damaged(2)], i3=SILENT)
    assert (case.verdict, case.dead, case.damaged) == (REPAIRABLE, ["n3"], [2])


def test_of_a_group_that_is_damaged_everywhere_the_snapshots_that_are_left_are_shown() -> None:
    case = judged([damaged(1), damaged(2, "/data/shard-0/archive/a.snap", 17)])
    assert (case.verdict, case.damaged) == (EXTINCT, [])
    assert [(m.node, m.last_index, m.archived) for m in case.members] == [
        ("n1", 0, ""),
        ("n2", 17, "/data/shard-0/archive/a.snap"),
    ]


def test_a_damaged_row_tells_of_the_snapshot_that_it_left() -> None:
    row = ["g", 7, DAMAGED, 0, 0, 0, 0, 0, 2, [], [], "/a.snap", 17]
    assert report_of("n2", row) == damaged(2, "/a.snap", 17)


def test_what_was_given_up_already_is_not_asked_for_again() -> None:
    case = judged([report(1)], i2=GIVEN_UP, i3=SILENT)
    assert (case.verdict, case.dead) == (REPAIRABLE, ["n3"])


def test_a_node_that_answers_without_its_member_blocks_a_repair_and_is_not_given_up() -> None:
    case = judged([report(1)], i2=ABSENT, i3=SILENT)
    assert (case.verdict, case.dead, case.former) == (BLOCKED, [], [])


def test_the_newest_configuration_says_who_must_agree() -> None:
    old = report(1, last_index=10, voters=(1, 2, 3))
    new = report(4, last_index=11, voters=(1, 4, 5))
    case = judged([old, new], i2=SILENT, i5=SILENT)
    assert case.verdict == ELECTING
    assert sorted(m.instance for m in case.members) == [1, 4, 5]


def test_a_group_of_which_nobody_answers_cannot_be_repaired() -> None:
    assert judged([]).verdict == EXTINCT


def test_a_learner_that_is_left_can_go_on_alone() -> None:
    only = Report("n4", 4, "learner", 5, 10, (1, 2, 3), (4,))
    case = judged([only])
    assert (case.verdict, case.dead) == (REPAIRABLE, ["n1", "n2", "n3"])


@pytest.mark.parametrize("row", [["g", 7, "leader", 1, 5, 10, 9, 9], ["g", 7, "x", 1, 5, 10, 9, 9, 1, 5, ()]])
def test_a_row_that_says_too_little_is_passed_over(row: list[Any]) -> None:
    assert report_of("n1", row) is None


def test_a_plan_of_a_healthy_fleet_gives_nothing_up_and_a_repair_of_it_is_refused() -> None:
    world = settled(3)
    code, plan = ask(world, world.nodes[0], "repair_plan", {})
    assert code == 0
    assert (plan["dead"], plan["former"]) == ({}, [])
    code, text = ask(world, world.nodes[0], "repair", {"dead": {}, "former": []})
    assert code == codes.REFUSED and "nothing to give up" in text
    instances = [world.nodes[1].shards[0].instance]
    code, text = ask(world, world.nodes[0], "repair", {"dead": {"n1": instances}, "former": []})
    assert code == codes.REFUSED and "n1 answers" in text
    code, text = ask(world, world.nodes[0], "repair", {"dead": {"n1": [1]}, "former": []})
    assert code == codes.REFUSED and "look again" in text


def test_a_member_that_is_not_damaged_any_more_is_not_given_up() -> None:
    world = settled(3)
    code, text = ask(world, world.nodes[0], "repair", {"dead": {}, "former": [], "damaged": [[7, [2, 3]]]})
    assert code == codes.REFUSED and "look again" in text


@pytest.mark.parametrize(
    "args",
    [
        *({}, {"dead": [], "former": []}, {"dead": {}, "former": {}}),
        {"dead": {}, "former": [], "damaged": {}},
        {"dead": {}, "former": [], "damaged": [[1, 2]]},
    ],
)
def test_a_repair_without_a_plan_is_a_bad_request(args: dict[str, Any]) -> None:
    world = settled(3)
    assert ask(world, world.nodes[0], "repair", args)[0] == codes.BAD_REQUEST


def test_a_repair_gives_up_all_silent_nodes_at_once() -> None:
    world = settled(3)
    add_group(world)
    instances = {f"n{index}": [world.nodes[index].shards[0].instance] for index in (1, 2)}
    for node in world.nodes[1:]:
        world.kill(node)
    world.run(8 * SECOND)
    token = world.call(world.nodes[0], "repair", {"dead": instances, "former": []}, 30 * SECOND)
    world.run(2 * SECOND)
    told = [args["instances"] for name, method, args in world.calls if method == "declare_dead" and name == "n0"]
    assert told == [[*instances["n1"], *instances["n2"]]], "in one go: one alone would not free the group"
    group = only_fleet(world)
    group.voters = [world.nodes[0].shards[0].instance]  # what the core's recovery comes to
    run_until(world, lambda: token in world.replies)
    code, body = world.replies[token]
    assert code == 0 and "given up: n1, n2" in body["message"]
    run_until(world, lambda: sorted(group.state.nodes) == ["n0"])
    assert {group.state.gone[instance] for its in instances.values() for instance in its} == {"operator"}

"""Reconciling: from any start to the desired members, one safe step at a time."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from raftfleet.fleet.machine import FleetState
from raftfleet.fleet.reconcile import (
    AddLearner,
    GroupView,
    Promote,
    Remove,
    Step,
    Transfer,
    fleet_learners,
    fleet_voters,
    next_step,
    quorum,
)


def view(leader: int, voters: list[int], learners: list[int] = [], **changes: object) -> GroupView:  # noqa: B006
    """All live, all caught up, nothing pending, unless said otherwise."""
    members = frozenset([*voters, *learners])
    plain = GroupView(1, leader, tuple(voters), tuple(learners), members, members, False)
    return replace(plain, **changes)  # type: ignore[arg-type]


def all_known(instance: int) -> bool:
    return True


def test_nothing_is_done_while_a_change_is_pending_or_nobody_is_desired() -> None:
    assert next_step(view(1, [1, 2], pending=True), [3], all_known) is None
    assert next_step(view(1, [1, 2, 3]), [], all_known) is None
    assert next_step(view(1, [1, 2, 3]), [1, 2, 3], all_known) is None


def test_a_gone_voter_goes_first_and_its_replacement_follows() -> None:
    known = {1, 2, 4}.__contains__
    alive = frozenset({1, 2})
    assert next_step(view(1, [1, 2, 3], live=alive), [1, 2, 4], known) == Remove(3)
    assert next_step(view(1, [1, 2]), [1, 2, 4], known) == AddLearner(4)
    assert next_step(view(1, [1, 2]), [1, 2, 4], known, given_up={4: "operator"}) is None
    assert next_step(view(1, [1, 2], [4], caught_up=alive), [1, 2, 4], known) is None
    assert next_step(view(1, [1, 2], [4]), [1, 2, 4], known) == Promote(4)


def test_a_gone_voter_stays_while_the_live_ones_left_are_no_quorum() -> None:
    known = {1, 2, 3, 4, 6}.__contains__
    step = next_step(view(1, [1, 2, 3, 4, 5], live=frozenset({1, 2})), [1, 2, 3, 4, 6], known)
    assert step == AddLearner(6)


def test_a_silent_but_known_voter_stays_until_its_replacement_votes() -> None:
    silent = frozenset({1, 2, 4})
    assert next_step(view(1, [1, 2, 3], live=frozenset({1, 2})), [1, 2, 4], all_known) == AddLearner(4)
    assert next_step(view(1, [1, 2, 3], [4], live=silent), [1, 2, 4], all_known) == Promote(4)
    assert next_step(view(1, [1, 2, 3, 4], live=silent), [1, 2, 4], all_known) == Remove(3)


def test_a_surplus_leader_hands_over_to_the_desired_one_before_it_goes() -> None:
    assert next_step(view(3, [1, 2, 3, 4]), [1, 2, 4], all_known) == Transfer(1)
    assert next_step(view(3, [1, 2, 3, 4], live=frozenset({2, 3, 4})), [1, 2, 4], all_known) == Transfer(2)
    assert next_step(view(1, [1, 2, 3, 4]), [1, 2, 4], all_known) == Remove(3)


def test_leadership_goes_home_last() -> None:
    assert next_step(view(2, [1, 2, 3]), [1, 2, 3], all_known) == Transfer(1)
    assert next_step(view(2, [1, 2, 3], live=frozenset({2, 3})), [1, 2, 3], all_known) is None


def test_learners_of_the_fleet_group_stay_learners() -> None:
    assert next_step(view(1, [1, 2, 3]), [1, 2, 3], all_known, [4]) == AddLearner(4)
    assert next_step(view(1, [1, 2, 3], [4]), [1, 2, 3], all_known, [4]) is None
    assert next_step(view(1, [1, 2, 3], [4]), [1, 2, 3], all_known) == Remove(4)


@dataclass
class Model:
    """A group whose steps take effect at once, unless the leader's liveness rules forbid them."""

    rng: random.Random
    leader: int
    voters: list[int]
    learners: list[int]
    alive: set[int]
    known: set[int]
    behind: set[int] = field(default_factory=set)

    def view(self) -> GroupView:
        members = {*self.voters, *self.learners}
        return GroupView(
            1,
            self.leader,
            tuple(self.voters),
            tuple(self.learners),
            frozenset(members & self.alive - self.behind),
            frozenset(members & self.alive),
            False,
        )

    def take(self, step: Step, desired: list[int]) -> None:
        live = [v for v in self.voters if v in self.alive]
        match step:
            case AddLearner(instance):
                assert instance not in self.voters and instance not in self.learners
                self.learners.append(instance)
                self.behind.add(instance)
            case Promote(instance):
                assert instance in self.learners and instance in self.alive and instance not in self.behind
                self.learners.remove(instance)
                self.voters.append(instance)
            case Remove(instance):
                assert instance != self.leader
                if instance in self.learners:
                    self.learners.remove(instance)
                else:
                    self.voters.remove(instance)
                    if instance in self.known:
                        assert instance not in desired and len(self.voters) >= len(desired), "replacement first"
            case Transfer(instance):
                assert instance in live and instance not in self.behind
                self.leader = instance
        now_live = sum(v in self.alive for v in self.voters)
        assert self.leader in self.voters and now_live >= quorum(len(self.voters))


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32))
def test_steps_lead_to_the_desired_members_from_any_start(seed: int) -> None:
    rng = random.Random(seed)
    instances = list(range(1, 11))
    rng.shuffle(instances)
    voters = instances[: rng.randint(1, 5)]
    learners = instances[len(voters) : len(voters) + rng.randint(0, 2)]
    live_count = rng.randint(quorum(len(voters)), len(voters))
    dead = set(voters[live_count:])
    known = set(instances) - dead - {i for i in instances if rng.random() < 0.1}
    alive = set(instances) - dead
    desired = rng.sample(sorted(known & alive), k=min(rng.randint(1, 5), len(known & alive)))
    if not desired:
        return
    model = Model(rng, rng.choice(voters[:live_count]), voters, learners, alive, known, set(learners))
    for _ in range(100):
        step = next_step(model.view(), desired, known.__contains__)
        if step is not None:
            model.take(step, desired)
        elif model.behind:
            model.behind.discard(rng.choice(sorted(model.behind)))
        else:
            break
    assert sorted(model.voters) == sorted(desired), model
    assert model.learners == [] and model.leader == desired[0]


def fleet(zones: list[int]) -> FleetState:
    fields = [
        {"name": f"n{z}-{i}", "zone": f"z{z}", "host": f"h{z}-{i}", "port": 7400, "instances": [z * 100 + i + 1]}
        for z, count in enumerate(zones)
        for i in range(count)
    ]
    state = FleetState()
    state.apply(["found", b"f" * 16, fields], 0)
    return state


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.randoms())
def test_fleet_voters_are_spread_over_zones_and_a_fleet_at_rest_changes_nothing(
    zones: list[int], rng: random.Random
) -> None:
    state = fleet(zones)
    everyone = [node.instances[0] for node in state.nodes.values()]
    start = rng.sample(everyone, k=min(3, len(everyone)))
    chosen = fleet_voters(state, start, None, start[0])
    size = len(everyone)
    assert len(chosen) == len(set(chosen)) == (min(size, 2) if size <= 2 else 3 if size < 5 else 5)
    counts = {z: sum(i // 100 == z for i in chosen) for z in range(len(zones))}
    assert all(a <= b + 1 or b == zones[z] for a in counts.values() for z, b in counts.items())
    leader = chosen[0]
    again = fleet_voters(state, chosen, None, leader)
    assert set(again) == set(chosen) and again[0] == leader
    assert sorted([*chosen, *fleet_learners(state, chosen)]) == sorted(everyone)


def test_a_dead_fleet_voter_is_replaced_where_there_is_a_live_node() -> None:
    state = fleet([2, 2, 2])
    voters = fleet_voters(state, [])
    spare = next(node.instances[0] for node in state.nodes.values() if node.instances[0] not in voters)
    live = {node.instances[0] for node in state.nodes.values()} - {voters[1]}
    assert set(fleet_voters(state, voters, live, voters[0])) == {*voters, spare} - {voters[1]}


def test_more_than_fifty_nodes_have_seven_fleet_voters() -> None:
    assert len(fleet_voters(fleet([51]), [])) == 7
    assert len(fleet_voters(fleet([50]), [])) == 5


def test_a_deactivated_node_loses_its_vote_and_follows_until_it_leaves() -> None:
    state = fleet([1, 1, 1])
    state.apply(["deactivate", "n0-0"], 0)
    chosen = fleet_voters(state, [1, 101, 201], None, 1)
    assert 1 not in chosen and fleet_learners(state, chosen) == [1]


# -- members whose state differs -----------------------------------------------------------------------------------


def sick(instance: int, leader: int, voters: list[int], learners: list[int] = [], **changes: object) -> GroupView:  # noqa: B006
    members = frozenset([*voters, *learners])
    caught_up = members - {instance}
    return view(leader, voters, learners, outliers=frozenset({instance}), caught_up=caught_up, **changes)


def test_an_outlier_is_removed_before_anything_is_added_and_comes_back_as_a_learner() -> None:
    assert next_step(sick(3, 1, [1, 2, 3]), [1, 2, 3], all_known) == Remove(3)
    assert next_step(view(1, [1, 2]), [1, 2, 3], all_known) == AddLearner(3)


def test_an_outlier_stays_while_another_voter_is_not_heard_or_only_one_other_is_there() -> None:
    assert next_step(sick(3, 1, [1, 2, 3], live=frozenset({1, 3})), [1, 2, 3], all_known) is None
    assert next_step(sick(2, 1, [1, 2]), [1, 2], all_known) is None


def test_an_outlier_is_never_promoted_nor_given_the_lead() -> None:
    assert next_step(sick(1, 2, [2, 3], [1]), [1, 2, 3], all_known) == Remove(1)
    assert next_step(sick(1, 2, [1, 2, 3], live=frozenset({1, 2})), [1, 2, 3], all_known) is None


def test_a_leader_that_is_an_outlier_does_not_remove_itself() -> None:
    assert next_step(sick(1, 1, [1, 2, 3]), [1, 2, 3], all_known) is None

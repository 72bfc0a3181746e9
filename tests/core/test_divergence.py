"""The alarm for replicas that differ: it sees what differs, tells it, and quarantines the minority and nobody else."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from core.harness import WALL_US, Answer, Cluster, Journal, pack

from raftfleet.core import divergence
from raftfleet.core.codes import NOT_LEADER
from raftfleet.core.config import GroupConfig
from raftfleet.core.messages import CHECK, DIGEST, Digest


def cluster(count: int = 3, **fields: Any) -> Cluster:
    made = Cluster(count, **{"divergence_check_entries": 5, **fields})
    made.settle()
    return made


def work(made: Cluster, count: int = 12) -> None:
    for number in range(count):
        made.command(f"command {number}")


def rot(made: Cluster, instance: int, what: str = "rot") -> None:
    """The state of one member is not what its log says."""
    made.member(instance).state = [*made.member(instance).state, what]


def check_entries(made: Cluster) -> list[int]:
    log = made.member(made.leader()).log
    return [i for i in range(log.first_index, log.last_index + 1) if log.entry(i).kind == CHECK]


def test_equal_members_are_checked_in_time_and_nothing_is_told() -> None:
    made = cluster()
    work(made, 30)
    assert 4 <= len(check_entries(made)) <= 6
    audits = [made.member(i).audit for i in (1, 2, 3)]
    assert all(audit is not None and audit.check_count == len(check_entries(made)) for audit in audits)
    assert not made.happened("diverged") and not made.happened("quarantined")
    assert all(audit is not None and len(audit.reports) == 2 for audit in audits), "each heard both others"


def test_an_idle_group_is_not_checked_and_a_check_brings_on_no_other() -> None:
    made = cluster()
    work(made)
    before = (made.member(made.leader()).last_index, len(made.told(Digest)))
    made.run_for(60)
    assert (made.member(made.leader()).last_index, len(made.told(Digest))) == before


def test_no_check_comes_where_it_is_switched_off_or_nobody_is_there_to_compare_with() -> None:
    for made in (cluster(divergence_check_entries=0), cluster(1)):
        work(made, 20)
        assert not check_entries(made)


def test_a_follower_whose_state_differs_is_told_by_all_and_quarantined() -> None:
    made = cluster()
    work(made)
    leader = made.leader()
    wrong = 2 if leader != 2 else 3
    rot(made, wrong)
    work(made)
    for instance in (1, 2, 3):
        told = [event for event in made.happened("diverged") if event[0] == instance]
        assert told and told[0][4] == (wrong,) and told[0][5] is True, told
    assert [event[0] for event in made.happened("quarantined")] == [wrong]
    assert divergence.outliers(made.member(leader)) == {wrong}
    assert made.leader() == leader, "the group goes on"
    answer = made.query(wrong, stale=True)
    assert answer.code == NOT_LEADER, "its state is of no use to anyone"
    healthy = next(i for i in (1, 2, 3) if i not in (leader, wrong))
    assert made.query(healthy, stale=True).code == 0


def test_a_quarantined_follower_still_counts_for_the_quorum() -> None:
    made = cluster()
    leader = made.leader()
    wrong, other = (i for i in (1, 2, 3) if i != leader)
    rot(made, wrong)
    work(made)
    assert made.member(wrong).is_quarantined
    made.isolate(other)
    assert made.command("still served")


def test_a_leader_whose_state_differs_gives_way_and_does_not_come_back() -> None:
    made = cluster()
    wrong = made.leader()
    rot(made, wrong)
    answers = [made.propose(wrong, f"command {n}") for n in range(8)]
    made.run_for(5)
    leader = made.settle()
    assert leader != wrong and made.member(wrong).is_quarantined
    assert all(answer.code is not None for answer in answers)
    assert divergence.outliers(made.member(leader)) == {wrong}, "the next leader knows whom to replace"
    made.change("transfer", wrong)
    made.run_for(5)
    assert made.settle() != wrong, "it does not take the leadership over"


def test_where_no_quorum_agrees_all_are_told_and_nobody_is_quarantined() -> None:
    made = cluster()
    for instance in (1, 2, 3):
        rot(made, instance, f"rot {instance}")
    work(made)
    told = made.happened("diverged")
    assert {event[4] for event in told} == {(1, 2, 3)}
    assert {event[5] for event in told} == {False}
    assert not made.happened("quarantined")
    assert not divergence.outliers(made.member(made.leader()))
    assert made.command("goes on")


def test_two_members_that_differ_have_no_majority() -> None:
    made = cluster(2)
    rot(made, 2)
    work(made)
    assert {event[5] for event in made.happened("diverged")} == {False}
    assert not made.happened("quarantined")


def test_five_members_of_which_two_differ_quarantine_these_two() -> None:
    made = cluster(5)
    wrong = [i for i in range(1, 6) if i != made.leader()][:2]
    for instance in wrong:
        rot(made, instance, f"rot {instance}")
    work(made)
    assert sorted(event[0] for event in made.happened("quarantined")) == wrong
    assert divergence.outliers(made.member(made.leader())) == set(wrong)


def test_digests_that_are_lost_are_made_good_by_the_next_check() -> None:
    made = cluster()
    made.drop(lambda a, b, m: m[0] == DIGEST)
    rot(made, 3 if made.leader() != 3 else 2)
    work(made, 6)
    assert not made.happened("diverged")
    made.heal()
    work(made, 12)
    assert len(made.happened("quarantined")) == 1


def test_a_difference_of_two_is_told_at_the_next_check_when_the_third_is_silent() -> None:
    made = cluster()
    leader = made.leader()
    wrong, silent = (i for i in (1, 2, 3) if i != leader)
    made.isolate(silent)
    rot(made, wrong)
    work(made, 7)
    assert not made.happened("diverged"), "the third may tell who is right"
    work(made, 7)
    assert {event[5] for event in made.happened("diverged")} == {False}
    made.heal()
    work(made, 14)
    assert [event[0] for event in made.happened("quarantined")] == [wrong]


def test_a_quarantined_member_that_alone_has_the_log_leads_only_to_pass_it_on() -> None:
    made = cluster()
    wrong = made.leader()
    behind, gone = (i for i in (1, 2, 3) if i != wrong)
    made.member(wrong).audit = divergence.Audit()
    made.member(wrong).is_quarantined = False
    made.isolate(behind)
    made.propose(wrong, "only on two of three")
    made.run_for(0.1)
    made.heal()
    made.isolate(gone)
    made.crash(gone)
    made.shards[wrong].begin(made.local_us(wrong), WALL_US)
    made.member(wrong).is_quarantined = True
    made.turn(wrong, lambda shard: shard.members[1].step_down())
    answers: list[Answer] = []
    for _ in range(200):
        made.run_for(0.1)
        if made.member(wrong).lead is not None:
            answers.append(made.query(wrong))
            answers.append(made.propose(wrong, "refused"))
        if made.leader() == behind:
            break
    assert made.happened("led_in_quarantine")
    assert made.settle() == behind
    assert "only on two of three" in made.state(behind)
    assert "refused" not in made.state(behind)
    assert all(answer.code == NOT_LEADER for answer in answers)


def test_a_large_state_is_not_looked_at_until_it_is_time_to_measure_again() -> None:
    made = cluster(divergence_state_bytes_max=100)
    work(made, 40)
    checks = check_entries(made)
    log = made.member(made.leader()).log
    flags = [msgpack.unpackb(log.entry(index).data) for index in checks]
    assert flags[0] is True and flags.count(False) >= 2 and True in flags[2:], flags
    reports = [m for _, _, m in made.told(Digest)]
    assert all((m.state != 0) == flags[checks.index(m.index)] for m in reports)
    assert all(m.log for m in reports), "the log is compared all the same"
    assert not made.happened("diverged")


def test_states_are_looked_at_the_more_seldom_the_larger_they_are() -> None:
    made = cluster()
    made.command("x" * 64 * 20)
    work(made, 40)
    gaps = [b - a for a, b in zip(check_entries(made), check_entries(made)[1:], strict=False)]
    assert min(gaps) >= 20


def test_a_machine_without_a_digest_is_no_reason_for_an_alarm() -> None:
    made = cluster()
    made.member(2).machine.digest = lambda state: 1 // 0
    work(made)
    assert not made.happened("diverged")


class Grumbler(Journal):
    """Raises with a text that differs from process to process, and a type that does not."""

    def command(self, state: list[Any], arg: Any) -> Any:
        raise (KeyError if getattr(self, "is_odd", False) else ValueError)(f"at {id(self):x}")


def test_texts_of_exceptions_may_differ_and_their_types_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.harness.Journal", Grumbler)
    made = cluster()
    for number in range(8):
        made.propose(made.leader(), number)
        made.run_for(0.05)
    assert check_entries(made) and not made.happened("diverged")
    made.member(3 if made.leader() != 3 else 2).machine.is_odd = True
    for number in range(8):
        made.propose(made.leader(), number)
        made.run_for(0.05)
    assert made.happened("diverged")


def test_results_that_differ_are_noticed_though_the_states_are_equal() -> None:
    made = cluster()
    wrong = 3 if made.leader() != 3 else 2
    honest = made.member(wrong).machine.command
    made.member(wrong).machine.command = lambda state, arg: (-1, honest(state, arg)[1])
    work(made)
    assert [event[0] for event in made.happened("quarantined")] == [wrong]


def test_a_log_that_rots_in_memory_is_noticed() -> None:
    made = cluster()
    work(made, 3)
    wrong = 3 if made.leader() != 3 else 2
    log = made.member(wrong).log
    made.checker.check_members = lambda instance, members: None  # type: ignore[method-assign]
    log.entries[1] = log.entries[1]._replace(data=log.entries[1].data + b"\xc0")
    work(made, 8)
    assert [event[0] for event in made.happened("quarantined")] == [wrong]


def test_a_member_that_was_made_anew_is_no_outlier_and_the_next_time_is_not_at_once() -> None:
    made = cluster()
    leader = made.leader()
    wrong = 3 if leader != 3 else 2
    rot(made, wrong)
    work(made)
    made.change("remove_member", wrong)
    made.run_for(0.5)
    assert not divergence.outliers(made.member(leader))
    made.change("add_learner", wrong)
    made.run_for(1)
    made.change("promote", wrong)
    made.run_for(0.5)
    assert made.state(wrong) == made.state(leader) and not made.member(wrong).is_quarantined
    work(made)
    assert len(made.happened("quarantined")) == 1
    rot(made, wrong)
    work(made)
    assert made.member(wrong).is_quarantined, "it must not serve"
    assert not divergence.outliers(made.member(leader)), "one that differs by its nature is not made anew all the time"
    made.run_for(divergence.REBUILD_US / 1e6)
    work(made)
    assert divergence.outliers(made.member(leader)) == {wrong}


def test_a_digest_of_an_earlier_life_or_of_a_stranger_counts_for_nothing() -> None:
    made = cluster()
    work(made)
    leader = made.leader()
    peer = 3 if leader != 3 else 2
    own = made.member(leader).audit
    assert own is not None and own.own is not None
    lie = own.own._replace(state=own.own.state ^ 1)
    made.inject(peer, leader, lie._replace(life=7))
    made.inject(9, leader, lie)
    assert not made.happened("diverged")
    made.inject(peer, leader, lie)
    made.run_for(0.1)
    assert made.happened("diverged"), "the same from a member does"


def test_a_snapshot_takes_the_results_along() -> None:
    made = cluster(log_entries_kept=2)
    leader = made.leader()
    away = 3 if leader != 3 else 2
    made.isolate(away)
    work(made, 20)
    made.heal()
    made.run_for(2)
    work(made, 12)
    made.run_for(1)
    assert made.member(away).audit is not None
    assert made.state(away) == made.state(made.leader())
    assert not made.happened("diverged")


def test_unknown_kinds_of_config_are_refused() -> None:
    with pytest.raises(ValueError, match="divergence_check_entries is a whole number"):
        GroupConfig("a:B", divergence_check_entries=-1)
    with pytest.raises(ValueError, match="divergence_state_bytes_max"):
        GroupConfig("a:B", divergence_state_bytes_max=1.5)  # type: ignore[arg-type]


def test_commands_in_flight_at_a_check_are_answered_once_each() -> None:
    """The harness fails on a second answer: a leader that finds itself wrong while it applies must not answer twice."""
    made = cluster()
    wrong = made.leader()
    rot(made, wrong)
    answers = []
    for number in range(40):
        answer = Answer()
        answers.append(answer)
        made.turn(
            wrong, lambda s, a=answer, n=number: s.propose(1, pack(n, 1000 + n, issued_us=WALL_US + made.now_us), a)
        )  # type: ignore[misc]
    made.run_for(5)
    assert all(answer.code is not None for answer in answers)

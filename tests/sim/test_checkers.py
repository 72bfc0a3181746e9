"""Every checker can fail: each is fed the violation that it exists for, and a neighbour that is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raftfleet.core.log import Log
from raftfleet.core.membership import Membership
from raftfleet.core.messages import COMMANDS, CONFIG, VOTE_ANSWER, Entry, VoteAnswer
from raftfleet.testing.checkers import ClusterChecker, HistoryChecker
from raftfleet.testing.clock import DriftingClock, EventQueue
from raftfleet.testing.model import GroupRecord, RegistersMachine, Violation


def member(terms: list[int], *, commit: int = 0, term: int = 0, role: str = "follower", **extra: Any) -> Any:
    """A member whose log holds one entry per term given."""
    log = Log()
    log.extend([Entry(t, COMMANDS, b"%d" % i) for i, t in enumerate(terms)])
    fields = {"applied": commit, "voters": (1, 2, 3), "learners": (), **extra}
    return SimpleNamespace(
        log=log, commit=commit, term=term or max([0, *terms]), role=role, last_index=log.last_index, **fields
    )


def touch(m: Any) -> Any:
    m.last_index = m.log.last_index
    return m


def check(checker: ClusterChecker, **members: Any) -> None:
    for name, m in members.items():
        checker.check_members(int(name[1:]), {7: m})


def test_two_leaders_of_one_term_are_noticed() -> None:
    checker = ClusterChecker()
    check(checker, i1=member([1], term=2, role="leader"))
    check(checker, i2=member([1], term=3, role="leader"))
    with pytest.raises(Violation, match="election safety"):
        check(checker, i3=member([1], term=2, role="leader"))


def test_two_entries_of_one_index_and_term_are_noticed() -> None:
    checker = ClusterChecker()
    check(checker, i1=member([1, 1]))
    other = member([1])
    other.log.append(Entry(1, COMMANDS, b"another"))
    with pytest.raises(Violation, match="log matching"):
        check(checker, i2=touch(other))


def test_equal_entries_after_different_ones_are_noticed() -> None:
    checker = ClusterChecker()
    check(checker, i1=member([1, 3]))
    with pytest.raises(Violation, match="log matching"):
        check(checker, i2=member([2, 3]))


def test_logs_that_differ_before_they_agree_on_a_term_are_no_violation() -> None:
    checker = ClusterChecker()
    check(checker, i1=member([1, 1, 1]), i2=member([1, 2]))


def test_terms_that_fall_along_a_log_are_noticed() -> None:
    with pytest.raises(Violation, match="terms fall"):
        check(ClusterChecker(), i1=member([2, 1]))


def test_another_entry_at_a_committed_index_is_noticed() -> None:
    checker = ClusterChecker()
    check(checker, i1=member([1, 1], commit=2))
    with pytest.raises(Violation, match="state machine safety"):
        check(checker, i2=member([1, 2], commit=2))


def test_a_leader_that_lacks_a_committed_entry_is_noticed() -> None:
    checker = ClusterChecker()
    check(checker, i1=member([1, 1, 1], commit=3))
    with pytest.raises(Violation, match="leader completeness"):
        check(checker, i2=member([1, 1], term=2, role="leader"))


def test_a_leader_elected_late_may_lack_what_a_later_term_committed() -> None:
    """Its last vote was under way while the next term had its leader: it will hear of that one, and lead nobody."""
    checker = ClusterChecker()
    check(checker, i1=member([1, 3], commit=2, term=3, role="leader"))
    check(checker, i2=member([1, 2], term=2, role="leader"))
    with pytest.raises(Violation, match="leader completeness"):
        check(checker, i3=member([1, 2], term=4, role="leader"))


def test_a_leader_with_another_entry_at_a_committed_index_is_noticed() -> None:
    checker = ClusterChecker()
    check(checker, i1=member([1, 2], commit=2))
    with pytest.raises(Violation, match="leader completeness"):
        check(checker, i2=member([1, 3, 3], term=4, role="leader"))


@pytest.mark.parametrize(
    ("field", "value", "match"), [("commit", 1, "commit went back"), ("term", 1, "term went back")]
)
def test_what_must_never_fall_is_noticed_when_it_does(field: str, value: int, match: str) -> None:
    checker = ClusterChecker()
    m = member([1, 1], commit=2, term=3)
    check(checker, i1=m)
    setattr(m, field, value)
    m.applied = 0
    with pytest.raises(Violation, match=match):
        check(checker, i1=m)


def test_applying_beyond_the_commit_index_is_noticed() -> None:
    with pytest.raises(Violation, match="applied"):
        check(ClusterChecker(), i1=member([1, 1], commit=1, applied=2))


def test_two_votes_of_one_instance_in_one_term_are_noticed() -> None:
    checker = ClusterChecker()
    checker.check_sends(1, 2, [VoteAnswer(VOTE_ANSWER, 7, 5, False, True)])
    checker.check_sends(1, 2, [VoteAnswer(VOTE_ANSWER, 7, 5, False, True)])
    checker.check_sends(1, 3, [VoteAnswer(VOTE_ANSWER, 7, 5, True, True), VoteAnswer(VOTE_ANSWER, 7, 5, False, False)])
    checker.check_sends(1, 3, [VoteAnswer(VOTE_ANSWER, 8, 5, False, True)])
    with pytest.raises(Violation, match="voted"):
        checker.check_sends(1, 3, [VoteAnswer(VOTE_ANSWER, 7, 5, False, True)])


def test_two_voters_changed_at_once_are_noticed() -> None:
    checker = ClusterChecker()
    m = member([1])
    for number, voters in enumerate([(1, 2, 3), (1, 2, 3, 4), (2, 3, 4), (2, 5, 6)]):
        m.log.append(Entry(1, CONFIG, Membership.first(voters).pack()))
        m.commit = m.applied = m.log.last_index
        if number < 3:
            check(checker, i1=touch(m))
    with pytest.raises(Violation, match="at once"):
        check(checker, i1=touch(m))
    assert checker.config_count == 4


@pytest.mark.parametrize(("voters", "is_right"), [((1,), True), ((1, 2, 3, 4), False)])
def test_a_configuration_that_is_seen_late_counts_as_the_one_before(voters: tuple[int, ...], is_right: bool) -> None:
    """Its leader left with the step that committed it, and the first to be seen beyond it had compacted it."""

    def with_voters(*rows: tuple[int, ...]) -> Any:
        m = member([1])
        for voters in rows:
            m.log.append(Entry(1, CONFIG, Membership.first(voters).pack()))
        m.log.append(Entry(1, COMMANDS, b""))
        m.commit = m.applied = m.log.last_index
        return touch(m)

    checker = ClusterChecker()
    begun = member([1])
    begun.log.append(Entry(1, CONFIG, Membership.first((1, 2, 3)).pack()))
    begun.commit = begun.applied = 2
    check(checker, i1=touch(begun))
    compacted = with_voters((1, 2, 3), (1, 2))
    compacted.log.compact_to(3)
    check(checker, i2=compacted)
    last = with_voters((1, 2, 3), (1, 2))
    check(checker, i3=last)
    last.log.append(Entry(1, CONFIG, Membership.first(voters).pack()))
    last.commit = last.applied = last.log.last_index
    if is_right:
        check(checker, i3=touch(last))
        return
    with pytest.raises(Violation, match=r"from \(1, 2\) to"):
        check(checker, i3=touch(last))


def test_members_that_differ_in_peace_are_noticed() -> None:
    checker = ClusterChecker()
    same = [(1, member([1, 1], commit=2)), (2, member([1, 1], commit=2))]
    checker.check_equal_members(7, same)
    with pytest.raises(Violation, match="differ in peace"):
        checker.check_equal_members(7, [*same, (3, member([1, 1], commit=1))])
    with pytest.raises(Violation, match="differ in peace"):
        checker.check_equal_members(7, [*same, (3, member([1, 1], commit=2, voters=(1, 2)))])


def test_a_member_that_came_anew_is_not_measured_by_the_old_one() -> None:
    checker = ClusterChecker()
    check(checker, i1=member([1, 1], commit=2, term=5))
    check(checker, i1=member([], term=1))


def test_an_entry_that_was_compacted_in_the_step_that_committed_it_is_seen() -> None:
    checker = ClusterChecker()
    m = member([1, 1, 1], role="leader")
    check(checker, i1=m)
    m.log.compact_to(3)
    m.commit = m.applied = 3
    check(checker, i1=m)
    assert checker.committed_count(7) == 3
    with pytest.raises(Violation, match="state machine safety"):
        check(checker, i2=member([1, 2], commit=2))


# -- histories --------------------------------------------------------------------------------------------------------


def history() -> tuple[HistoryChecker, GroupRecord]:
    checker = HistoryChecker()
    record = checker.record(7)
    for version, operation in enumerate([11, 12, 13], 1):
        record.applied(operation, version, version * 100)
    return checker, record


def test_a_read_of_an_older_version_than_was_answered_before_it_began_is_noticed() -> None:
    checker, _ = history()
    floor = checker.called(7)
    checker.command_answered(7, 12, floor, 2, 200)
    checker.query_answered(7, floor, 1, 100)  # began before: may be older
    with pytest.raises(Violation, match="stale read"):
        checker.query_answered(7, checker.called(7), 1, 100)


def test_a_command_that_took_effect_before_it_began_is_noticed() -> None:
    checker, _ = history()
    checker.query_answered(7, 0, 2, 200)
    with pytest.raises(Violation, match="linearizability"):
        checker.command_answered(7, 11, checker.called(7), 1, 100)


def test_an_answer_of_another_operation_is_noticed() -> None:
    checker, _ = history()
    with pytest.raises(Violation, match="which is operation 12"):
        checker.command_answered(7, 11, 0, 2, 200)


def test_an_answer_from_a_state_that_never_was_is_noticed() -> None:
    checker, _ = history()
    for version, chain in ((2, 999), (9, 900), (-1, 0)):
        with pytest.raises(Violation, match="never was"):
            checker.stale_query_answered(7, version, chain)


def test_an_operation_that_took_effect_twice_is_noticed() -> None:
    _, record = history()
    with pytest.raises(Violation, match="exactly-once"):
        record.applied(12, 4, 400)


def test_replicas_that_apply_different_operations_are_noticed() -> None:
    _, record = history()
    record.applied(12, 2, 200)
    with pytest.raises(Violation, match="state machine safety"):
        record.applied(13, 2, 200)
    with pytest.raises(Violation, match="state machine safety"):
        record.applied(12, 2, 201)


def test_an_acknowledged_command_that_a_state_lacks_is_noticed() -> None:
    checker, _ = history()
    checker.command_answered(7, 12, 0, 2, 200)
    checker.check_state(7, {11: 1, 12: 2}, "a member")
    with pytest.raises(Violation, match="acknowledged write lost"):
        checker.check_state(7, {11: 1}, "a member")


def test_a_refused_command_that_took_effect_is_noticed() -> None:
    checker, record = history()
    checker.refused(7, 99)
    checker.check_refused()
    record.applied(99, 4, 400)
    with pytest.raises(Violation, match="refused"):
        checker.check_refused()


def test_a_damaged_snapshot_is_noticed() -> None:
    machine = RegistersMachine(GroupRecord(7))
    state = machine.new()
    _, state = machine.command(state, [1, "add", 0, 5])
    data = machine.dump(state)
    assert machine.load(data).registers == {0: 5}
    with pytest.raises(Violation, match="damaged"):
        machine.load(data[:-1] + b"\x00")


def test_a_violation_is_not_swallowed_with_what_state_machines_raise() -> None:
    assert not issubclass(Violation, Exception)


# -- time -------------------------------------------------------------------------------------------------------------


def test_events_of_one_moment_run_in_the_order_they_were_put_in() -> None:
    queue, ran = EventQueue(), []
    queue.at(5, ran.append, "b")
    queue.at(5, ran.append, "c")
    queue.at(1, lambda: queue.at(0, ran.append, "a"))
    queue.run_until(5)
    assert ran == ["a", "b", "c"]
    assert (queue.now_us, len(queue), queue.run_one()) == (5, 0, False)


@pytest.mark.parametrize("rate_ppm", [1_000_000, 950_000, 1_050_001, 333_333])
def test_a_drifting_clock_never_goes_back_and_finds_the_true_moment(rate_ppm: int) -> None:
    clock = DriftingClock(rate_ppm, offset_us=1000)
    shown = [clock.local_us(t) for t in range(0, 5000, 7)]
    assert shown == sorted(shown)
    for local in range(1000, 3000, 13):
        true = clock.true_us(local)
        assert clock.local_us(true) >= local
        assert true == 0 or clock.local_us(true - 1) < local
    before = clock.local_us(4000)
    clock.set_rate(4000, 1_100_000)
    assert clock.local_us(4000) == before

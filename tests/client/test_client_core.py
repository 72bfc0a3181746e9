"""The client's core: attempts, deadlines, sessions, and what may be said about an outcome. No sockets, no sleeping."""

from __future__ import annotations

import itertools
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftfleet import errors
from raftfleet.client import core
from raftfleet.client.core import CONTROL, DONE, IN_FLIGHT, PAUSED, QUEUED, READY, WINDOW, Call, ClientCore, Session
from raftfleet.core.names import shard_of
from raftfleet.wire import ipc
from raftfleet.wire.errors import WireError

CLIENT = bytes(range(16))
SECOND = 1_000_000
ATTEMPT_US = 500_000 + core.GRACE_US


class Driver:
    """Drives one call on a clock of its own: ``happens("no_leader")`` lets the attempt now due end in that way."""

    def __init__(self, call: Call, client: ClientCore, now_us: int = 5 * SECOND) -> None:
        self.call = call
        self.client = client
        self.now_us = now_us
        self.ids = itertools.count(1)
        self.requests: list[list[Any]] = []
        client.start(call, now_us)

    @property
    def wall_us(self) -> int:
        return self.now_us + 10**15

    def send(self, uid: int = 7) -> list[Any]:
        """Wait out a pause and send the next attempt."""
        if self.call.state == PAUSED:
            self.now_us = self.call.deadline_us
            self.call.on_deadline(self.now_us)
        assert self.call.state == READY
        self.requests.append(self.call.attempt(next(self.ids), uid, self.now_us, self.wall_us))
        return self.requests[-1]

    def reply(self, code: int, body: Any = "because", request_id: int | None = None) -> None:
        self.call.on_reply(request_id or self.call.request_id, code, body, self.now_us)

    def happens(self, what: str) -> None:
        self.send()
        if what == "silence":
            self.now_us = self.call.deadline_us
            self.call.on_deadline(self.now_us)
        elif what == "lost":
            self.call.on_lost(self.now_us)
        elif what == "refused":
            self.call.on_unsent()
            self.call.on_refused("nobody there", self.now_us)
        elif what == "ok":
            self.reply(ipc.OK, msgpack.packb("result"))
        else:
            self.reply(CODES[what], ["ValueError", "no"] if what == "failed" else "because")


CODES = {
    "no_leader": ipc.NO_LEADER,
    "overloaded": ipc.OVERLOADED,
    "not_active": ipc.NOT_ACTIVE,
    "not_found": ipc.GROUP_NOT_FOUND,
    "too_large": ipc.TOO_LARGE,
    "unknown": ipc.OUTCOME_UNKNOWN,
    "expired": ipc.SESSION_EXPIRED,
    "failed": ipc.COMMAND_FAILED,
    "changed": ipc.GROUP_CHANGED,
    "unanswered": ipc.UNANSWERED,
    "already": ipc.ALREADY_ADDED,
}


def command(client: ClientCore | None = None, arg: Any = "inc", retry: int = 3) -> Driver:
    client = client or ClientCore(CLIENT)
    return Driver(client.command("g", arg, 0.5, retry, 1.0), client)


def query(consistency: str = "linearizable") -> Driver:
    client = ClientCore(CLIENT)
    return Driver(client.query("g", "get", consistency, 0.5, 3, 1.0), client)


def control(method: str, timeout: float = 5.0) -> Driver:
    client = ClientCore(CLIENT)
    return Driver(client.control(method, {"name": "g"}, timeout), client)


# -------------------------------------------------------------------- what is sent, and when


def test_a_command_is_sent_as_the_wire_demands_and_answered() -> None:
    driver = command()
    request = driver.send(uid=42)
    assert ipc.check_request(request)[:5] == [1, ipc.COMMAND, "g", 42, 500]
    packed = msgpack.packb("inc")
    assert msgpack.unpackb(request[5]) == [CLIENT, 1, 0, driver.wall_us, packed]
    driver.reply(ipc.OK, msgpack.packb({"a": [1, None]}))
    assert (driver.call.state, driver.call.result, driver.call.error) == (DONE, {"a": [1, None]}, None)


def test_a_query_is_sent_as_the_wire_demands_and_answered() -> None:
    for consistency, number in (("linearizable", 0), ("stale", 1)):
        driver = query(consistency)
        assert ipc.check_request(driver.send(uid=42)) == [1, ipc.QUERY, "g", 42, 500, number, msgpack.packb("get")]
        driver.reply(ipc.OK, msgpack.packb(5))
        assert driver.call.result == 5


def test_a_control_call_is_sent_as_the_wire_demands_and_answered() -> None:
    driver = control("members")
    assert ipc.check_request(driver.send()) == [1, ipc.CALL, "members", {"name": "g"}, 5000]
    driver.reply(ipc.OK, {"any": "value"})
    assert driver.call.result == {"any": "value"}


def test_the_node_has_the_timeout_and_the_client_waits_a_little_longer() -> None:
    driver = command()
    driver.send()
    assert driver.call.deadline_us == driver.now_us + ATTEMPT_US


def test_a_retry_comes_after_the_interval_with_the_same_seq_and_uid() -> None:
    driver = command()
    driver.send(uid=7)
    driver.reply(ipc.NO_LEADER)
    assert driver.call.state == PAUSED
    assert driver.call.deadline_us == driver.now_us + SECOND
    again = driver.send(uid=8)
    assert again[0] != driver.requests[0][0]
    assert again[3] == 7, "the uid is that of the first attempt: another group must not get the command"
    assert msgpack.unpackb(again[5])[1] == 1


def test_the_time_of_issue_stays_once_an_attempt_may_have_been_applied() -> None:
    driver = command()
    issued = []
    for what in ("no_leader", "silence", "no_leader", "ok"):
        driver.happens(what)
        issued.append(msgpack.unpackb(driver.requests[-1][5])[3])
    assert issued[1] == issued[2] == issued[3], "the node tells by it whether a retry comes too late"
    assert issued[0] < issued[1], "what was certainly not applied may start afresh"


def test_the_number_of_attempts_is_one_and_the_retries() -> None:
    for retry in (0, 1, 5):
        driver = command(retry=retry)
        for _ in range(retry):
            driver.happens("no_leader")
            assert driver.call.state == PAUSED
        driver.happens("no_leader")
        assert driver.call.state == DONE


def test_a_control_call_is_tried_until_its_timeout_and_not_longer() -> None:
    driver = control("groups", timeout=2.0)
    started_us = driver.now_us
    while driver.call.state != DONE:
        driver.happens("no_leader")
        assert driver.requests[-1][4] <= 2000 - (driver.requests[-1][0] - 1) * 100
    assert isinstance(driver.call.error, errors.NoLeader)
    assert started_us + 1_800_000 <= driver.now_us <= started_us + 2_100_000


# -------------------------------------------------------------------- what may be said about the outcome

OUTCOMES: list[tuple[str, type[errors.RaftFleetError] | None]] = [
    ("ok", None),
    ("no_leader ok", None),
    ("silence ok", None),
    ("lost refused ok", None),
    ("no_leader no_leader no_leader no_leader", errors.NoLeader),
    ("no_leader overloaded no_leader overloaded", errors.Overloaded),
    ("refused refused refused refused", errors.NodeNotRunning),
    ("refused not_active no_leader no_leader", errors.NoLeader),
    ("not_found", errors.GroupNotFound),
    ("no_leader not_found", errors.GroupNotFound),
    ("too_large", errors.CommandTooLarge),
    ("failed", errors.CommandFailed),
    ("silence failed", errors.CommandFailed),
    ("silence silence silence silence", errors.OutcomeUnknown),
    ("silence no_leader no_leader no_leader", errors.OutcomeUnknown),
    ("no_leader no_leader no_leader silence", errors.OutcomeUnknown),
    ("no_leader lost no_leader no_leader", errors.OutcomeUnknown),
    ("lost refused refused refused", errors.OutcomeUnknown),
    ("unknown unknown unknown unknown", errors.OutcomeUnknown),
    ("unknown no_leader no_leader no_leader", errors.OutcomeUnknown),
    ("unknown ok", None),
    ("silence not_found", errors.OutcomeUnknown),
    ("expired", errors.SessionExpired),
    ("silence expired", errors.SessionExpired),
    ("changed ok", None),
    ("no_leader changed ok", None),
    ("silence changed", errors.OutcomeUnknown),
]


@pytest.mark.parametrize(("story", "expected"), OUTCOMES)
def test_the_class_of_an_error_speaks_for_all_attempts(
    story: str, expected: type[errors.RaftFleetError] | None
) -> None:
    driver = command()
    for what in story.split():
        assert driver.call.state in (READY, PAUSED)
        driver.happens(what)
    assert driver.call.state == DONE
    if expected is None:
        assert (driver.call.error, driver.call.result) == (None, "result")
    else:
        assert type(driver.call.error) is expected, repr(driver.call.error)


QUERY_OUTCOMES: list[tuple[str, type[errors.RaftFleetError] | None]] = [
    ("silence lost refused ok", None),
    ("changed ok", None),
    ("silence silence silence silence", errors.Unanswered),
    ("lost lost lost no_leader", errors.NoLeader),
    ("silence not_found", errors.GroupNotFound),
    ("unanswered unanswered unanswered unanswered", errors.Unanswered),
]


@pytest.mark.parametrize(("story", "expected"), QUERY_OUTCOMES)
def test_a_query_never_leaves_a_doubt(story: str, expected: type[errors.RaftFleetError] | None) -> None:
    driver = query()
    for what in story.split():
        driver.happens(what)
    assert driver.call.state == DONE
    assert type(driver.call.error) is (expected or type(None))


CONTROL_OUTCOMES: list[tuple[str, str, type[errors.RaftFleetError] | None]] = [
    ("add_group", "no_leader refused not_active ok", None),
    ("add_group", "lost", errors.OutcomeUnknown),
    ("add_group", "unknown", errors.OutcomeUnknown),
    ("add_group", "silence", errors.OutcomeUnknown),
    ("add_group", "no_leader already", errors.AlreadyAdded),
    ("groups", "lost unknown refused ok", None),
    ("groups", "silence", errors.Unanswered),
]


@pytest.mark.parametrize(("method", "story", "expected"), CONTROL_OUTCOMES)
def test_a_control_call_that_changes_something_is_not_repeated_in_doubt(
    method: str, story: str, expected: type[errors.RaftFleetError] | None
) -> None:
    driver = control(method)
    for what in story.split():
        driver.happens(what)
    assert driver.call.state == DONE
    assert type(driver.call.error) is (expected or type(None)), repr(driver.call.error)


def test_an_unknown_outcome_tells_the_story_and_the_last_reason() -> None:
    driver = command()
    for what in "silence lost no_leader no_leader".split():
        driver.happens(what)
    error = driver.call.error
    assert isinstance(error, errors.OutcomeUnknown)
    assert "command to 'g'" in str(error)
    assert "4 attempts: no answer within 0.5 s; the connection to the node broke; because; because" in str(error)
    assert isinstance(error.__cause__, errors.NoLeader)


def test_a_late_result_of_an_attempt_that_was_given_up_is_used() -> None:
    driver = command()
    driver.happens("silence")
    assert driver.call.state == PAUSED
    driver.reply(ipc.OK, msgpack.packb(5), request_id=1)
    assert (driver.call.state, driver.call.result) == (DONE, 5)
    driver.reply(ipc.OK, msgpack.packb(6), request_id=1)
    assert driver.call.result == 5, "a second answer changes nothing"


def test_a_late_refusal_clears_the_doubt_of_its_own_attempt_only() -> None:
    driver = command()
    driver.happens("silence")
    driver.happens("silence")
    driver.send()
    driver.reply(ipc.NO_LEADER, request_id=1)
    assert driver.call.state == IN_FLIGHT, "the attempt under way goes on"
    driver.reply(ipc.NO_LEADER, request_id=2)
    driver.reply(ipc.NO_LEADER)
    driver.happens("no_leader")
    assert type(driver.call.error) is errors.NoLeader
    driver = command()
    driver.happens("silence")
    driver.happens("silence")
    driver.send()
    driver.reply(ipc.NO_LEADER, request_id=1)
    driver.reply(ipc.NO_LEADER)
    driver.happens("no_leader")
    assert type(driver.call.error) is errors.OutcomeUnknown


def test_a_call_that_never_could_be_sent_was_not_applied() -> None:
    driver = command(retry=1)
    for _ in range(2):
        assert driver.call.state == READY
        driver.now_us = driver.call.deadline_us
        driver.call.on_deadline(driver.now_us)
        if driver.call.state == PAUSED:
            driver.now_us = driver.call.deadline_us
            driver.call.on_deadline(driver.now_us)
    assert type(driver.call.error) is errors.NodeNotRunning
    assert isinstance(driver.call.error, errors.NotApplied)


@pytest.mark.parametrize("sent", [False, True])
def test_a_call_given_up_by_its_user_is_unknown_only_if_it_was_sent(sent: bool) -> None:
    driver = command()
    if sent:
        driver.send()
    driver.call.abandon("closed")
    assert type(driver.call.error) is (errors.OutcomeUnknown if sent else errors.NotApplied)


def test_a_group_that_keeps_changing_ends_the_call() -> None:
    driver = command()
    count = 0
    while driver.call.state != DONE:
        driver.happens("changed")
        count += 1
    assert count <= 5
    assert [request[3] for request in driver.requests] == [7] + [0] * (count - 1), "then the node looks the group up"


def test_a_result_that_is_not_msgpack_is_the_nodes_fault() -> None:
    driver = command()
    driver.send()
    driver.reply(ipc.OK, b"\xc1")
    assert type(driver.call.error) is errors.ProtocolError


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["ok", "refusal", "silence", "lost", "late"])), max_size=6))
def test_not_applied_is_never_said_of_what_was_applied(fates: list[tuple[bool, str]]) -> None:
    """Each attempt is applied (once, by its seq) or not; the node answers truly, late or not at all."""
    driver = command(retry=len(fates))
    applied = False
    late: list[tuple[int, int, Any]] = []
    for can_apply, answer in fates:
        if driver.call.state == DONE:
            break
        request_id = driver.send()[0]
        takes_effect = can_apply and answer != "refusal"
        applied = applied or takes_effect
        truth = (ipc.OK, msgpack.packb("result")) if takes_effect else (ipc.NO_LEADER, "because")
        if answer in ("ok", "refusal"):
            driver.reply(*truth)
        elif answer == "lost":
            driver.call.on_lost(driver.now_us)
        else:
            if answer == "late":
                late.append((request_id, *truth))
            driver.now_us = driver.call.deadline_us
            driver.call.on_deadline(driver.now_us)
        if late and not can_apply:
            request_id, code, body = late.pop()
            driver.reply(code, body, request_id=request_id)
    while driver.call.state != DONE:
        driver.happens("no_leader")
    if isinstance(driver.call.error, errors.NotApplied):
        assert not applied
    elif driver.call.error is None:
        assert applied


# -------------------------------------------------------------------- sessions


def test_seqs_count_from_one_for_each_group_and_acked_follows_the_oldest() -> None:
    client = ClientCore(CLIENT)
    drivers = [command(client) for _ in range(4)]
    headers = [msgpack.unpackb(driver.send()[5])[1:3] for driver in drivers]
    assert headers == [[1, 0], [2, 0], [3, 0], [4, 0]]
    drivers[1].reply(ipc.OK, msgpack.packb(None))
    assert msgpack.unpackb(command(client).send()[5])[1:3] == [5, 0], "seq 1 may still be asked for"
    drivers[0].reply(ipc.GROUP_NOT_FOUND)
    assert msgpack.unpackb(command(client).send()[5])[1:3] == [6, 2]
    other = Driver(client.command("h", "inc", 0.5, 3, 1.0), client)
    assert msgpack.unpackb(other.send()[5])[1:3] == [1, 0]


@given(st.permutations(range(1, 30)))
def test_acked_is_the_end_of_the_unbroken_row_of_ended_seqs(order: list[int]) -> None:
    session = Session("g")
    session.next_seq = 30
    ended: set[int] = set()
    for seq in order:
        session.end(seq)
        ended.add(seq)
        expected = next(number for number in itertools.count() if number + 1 not in ended)
        assert session.acked == expected


def test_at_most_a_window_of_commands_is_under_way_and_the_rest_wait_in_order() -> None:
    client = ClientCore(CLIENT)
    under_way = [command(client) for _ in range(WINDOW)]
    waiting = [command(client) for _ in range(3)]
    assert [driver.call.state for driver in waiting] == [QUEUED] * 3
    for driver in under_way:
        driver.send()
    under_way[1].reply(ipc.OK, msgpack.packb(None))
    assert client.turn(under_way[1].call, 0) == [], "the oldest counts: what the node must remember begins there"
    under_way[0].reply(ipc.OK, msgpack.packb(None))
    admitted = client.turn(under_way[0].call, under_way[0].now_us)
    assert admitted == [waiting[0].call, waiting[1].call]
    assert msgpack.unpackb(waiting[0].send()[5])[1:3] == [WINDOW + 1, 2]
    assert command(client).call.state == QUEUED, "nobody overtakes"


def test_a_command_that_never_has_its_turn_was_not_applied_and_takes_no_seq() -> None:
    client = ClientCore(CLIENT)
    under_way = [command(client) for _ in range(WINDOW)]
    waiting = command(client)
    waiting.call.on_deadline(waiting.call.deadline_us)
    assert type(waiting.call.error) is errors.Overloaded
    assert client.turn(waiting.call, 0) == []
    given_up = command(client)
    given_up.call.abandon("cancelled")
    assert isinstance(given_up.call.error, errors.NotApplied)
    under_way[0].send()
    under_way[0].reply(ipc.OK, msgpack.packb(None))
    assert client.turn(under_way[0].call, 0) == []
    assert msgpack.unpackb(command(client).send()[5])[1] == WINDOW + 1


# -------------------------------------------------------------------- arguments

NOT_CARRIED = [
    ({1, 2}, TypeError),
    (object(), TypeError),
    ([lambda: None], TypeError),
    ({(1, 2): 3}, TypeError),
    (1 << 64, ValueError),
    ([-(1 << 63) - 1], ValueError),
    ("\ud800", ValueError),
]


@pytest.mark.parametrize(("arg", "error"), NOT_CARRIED, ids=repr)
def test_an_argument_that_msgpack_cannot_carry_is_refused_before_anything_happens(
    arg: Any, error: type[Exception]
) -> None:
    client = ClientCore(CLIENT)
    with pytest.raises(error, match="argument"):
        client.command("g", arg, 0.5, 3, 1.0)
    with pytest.raises(error, match="argument"):
        client.query("g", arg, "stale", 0.5, 3, 1.0)
    assert msgpack.unpackb(command(client).send()[5])[1] == 1, "no seq was spent"


def test_an_argument_nested_too_deep_is_a_value_error() -> None:
    deep: list[Any] = []
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(ValueError, match="argument"):
        core.pack_argument(deep, "the argument")


def test_an_argument_larger_than_a_frame_names_the_limit() -> None:
    with pytest.raises(errors.CommandTooLarge, match=str(core.ARG_BYTES_MAX)):
        core.pack_argument(b"x" * (ipc.FRAME_BYTES_MAX + 1), "the argument")


@pytest.mark.parametrize("arg", [None, True, -(1 << 63), (1 << 64) - 1, 1.5, "é", b"\xff", [1, [2]], {1: {"a": None}}])
def test_what_msgpack_carries_arrives_as_it_was(arg: Any) -> None:
    assert core.unpack(core.pack_argument(arg, "x")) == arg


@pytest.mark.parametrize("timeout", [-1, "1", None, True, float("nan"), float("inf"), 1e12])
def test_a_timeout_is_a_number_of_seconds(timeout: Any) -> None:
    with pytest.raises(ValueError, match="timeout"):
        ClientCore(CLIENT).command("g", None, timeout, 3, 1.0)
    with pytest.raises(ValueError, match="timeout"):
        ClientCore(CLIENT).control("groups", {}, timeout)
    with pytest.raises(ValueError, match="retry_interval"):
        ClientCore(CLIENT).query("g", None, "stale", 1.0, 3, timeout)


@pytest.mark.parametrize("retry", [-1, 1.0, True, None, "3"])
def test_retry_is_a_count(retry: Any) -> None:
    with pytest.raises(ValueError, match="retry"):
        ClientCore(CLIENT).command("g", None, 0.5, retry, 1.0)


@pytest.mark.parametrize("name", ["", "$fleet", "x" * 256, None, 5, "a\0b", ["g"]])
def test_a_name_that_no_group_can_have_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="name"):
        ClientCore(CLIENT).command(name, None, 0.5, 3, 1.0)
    with pytest.raises(ValueError, match="name"):
        ClientCore(CLIENT).query(name, None, "stale", 0.5, 3, 1.0)


def test_consistency_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="linearizable, stale"):
        ClientCore(CLIENT).query("g", None, "eventual", 0.5, 3, 1.0)


def test_calls_go_to_the_shard_that_owns_the_name_or_to_the_manager() -> None:
    client = ClientCore(CLIENT)
    call = client.command("g", None, 0.5, 3, 1.0)
    for workers in (1, 2, 5, 3, 2):
        assert client.where(call, workers) == shard_of("g", workers)
    assert client.where(client.control("groups", {}, 1.0), 2) == CONTROL
    assert client.where(client.control("shard_info", {}, 1.0, where=1), 2) == 1


# ---------------------------------------------------------------- runs


def started_calls(client: ClientCore, *makers: Any) -> list[Call]:
    calls = [make() for make in makers]
    for call in calls:
        client.start(call, 0)
    return calls


def shape(calls: list[Call]) -> list[list[int]]:
    """The runs of ``calls`` by their places in the list."""
    return [[calls.index(call) for call in run] for run in core.runs(calls)]


def test_first_attempts_for_one_group_that_leave_together_are_a_run() -> None:
    client = ClientCore(CLIENT)
    command = [lambda name=name: client.command(name, "inc", 0.5, 3, 1.0) for name in "ababa"]
    query = [lambda how=how: client.query("a", "get", how, 0.5, 3, 1.0) for how in ("linearizable", "stale") * 2]
    assert shape(started_calls(client, *command, *query)) == [[0, 2, 4], [1, 3], [5, 7], [6, 8]]


def test_what_differs_travels_apart() -> None:
    client = ClientCore(CLIENT)
    calls = started_calls(
        client,
        lambda: client.command("a", "inc", 0.5, 3, 1.0),
        lambda: client.command("a", "inc", 5.0, 3, 1.0),
        lambda: client.command("a", "x" * 5000, 5.0, 3, 1.0),
        lambda: client.command("a", "inc", 5.0, 3, 1.0),
        lambda: client.command("a", "inc", 5.0, 3, 1.0),
        lambda: client.control("groups", {}, 5.0),
    )
    calls[3].abandon("cancelled")
    assert shape(calls) == [[0], [1], [2], [4], [5]], "timeouts, long arguments, gaps of the seqs, calls of no group"


def test_a_run_has_a_bound() -> None:
    client = ClientCore(CLIENT)
    calls = started_calls(client, *[lambda: client.query("a", "get", "stale", 0.5, 3, 1.0)] * 600)
    assert [len(run) for run in core.runs(calls)] == [256, 256, 88]


def test_a_command_of_a_run_is_tried_again_alone_with_its_own_seq_and_time_of_issue() -> None:
    client = ClientCore(CLIENT)
    calls = started_calls(client, *[lambda: client.command("a", "inc", 0.5, 3, 1.0)] * 3)
    [run] = core.runs(calls)
    item = core.attempt_run(run, 11, 7, 0, 10**15)
    assert item[:6] == [11, ipc.COMMAND_RUN, "a", 7, 500, 3]
    assert msgpack.unpackb(item[6]) == [CLIENT, 1, 0, 10**15, [msgpack.packb("inc")] * 3]
    second = calls[1]
    second.on_deadline(ATTEMPT_US)
    second.on_deadline(second.deadline_us)
    assert core.runs(calls) == [[second]]
    [again] = [core.attempt_run([second], 20, 9, 2 * SECOND, 10**15 + 2 * SECOND)]
    assert again[:5] == [20, ipc.COMMAND, "a", 7, 500]
    assert msgpack.unpackb(again[5]) == [CLIENT, 2, 0, 10**15, msgpack.packb("inc")]
    second.on_reply(20, ipc.OVERLOADED, "full", 3 * SECOND)
    second.abandon("enough")
    assert isinstance(second.error, errors.OutcomeUnknown), "the attempt in the run is still in doubt"


@pytest.mark.parametrize(
    "body",
    [
        None,
        b"\x90",
        [0, 0],
        [0, 0, b"\xc1"],
        [0, 0, b"\x01"],
        [1, 0, msgpack.packb([b"", b"", b""])],
        [-1, 1, msgpack.packb([b"", b"", b""])],
        [0, -1, msgpack.packb([b"", b"", b"", b""])],
    ],
)
def test_an_answer_that_does_not_fit_the_run_is_refused(body: object) -> None:
    with pytest.raises(WireError, match="does not fit"):
        core.run_results(body, 3)
    assert core.run_results([1, 1, msgpack.packb([b"x"])], 3) == (1, 1, [b"x"])

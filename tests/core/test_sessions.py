"""Exactly-once (DESIGN 11), at the table itself and through a cluster."""

from __future__ import annotations

from typing import Any

import msgpack
from core.harness import CLIENT, SECOND_US, WALL_US, Cluster, Journal, Lone, pack
from hypothesis import given, settings
from hypothesis import strategies as st

from raftfleet.core.codes import BAD_REQUEST, OK, TOO_LARGE
from raftfleet.core.sessions import OVERLOADED, SESSION_EXPIRED, Session, Sessions

OTHER = b"client-number-02"
TTL_US = 10 * SECOND_US


def run(table: Sessions, seq: int, now_us: int, *, acked: int = 0, issued_us: int | None = None) -> object:
    """Admit a command as an entry of ``now_us`` would; returns "ran" or the stored answer."""
    table.expire(now_us)
    admitted = table.admit(CLIENT, seq, acked, now_us if issued_us is None else issued_us, now_us)
    if isinstance(admitted, Session):
        admitted.results[seq] = (0, f"result {seq}".encode())
        return "ran"
    return admitted


def test_the_first_client_of_one_group_is_none_of_another() -> None:
    one, other, third = (Sessions(TTL_US, 10) for _ in range(3))
    assert run(one, 1, WALL_US) == "ran"
    assert other.by_client == {} == third.by_client and list(one.by_client) == [CLIENT]
    third.load(one.dump())
    assert run(third, 1, WALL_US) == (0, b"result 1") and run(other, 1, WALL_US) == "ran"
    third.load([])
    assert run(third, 1, WALL_US) == "ran" and Sessions(TTL_US, 10).by_client == {}


def test_a_repeated_command_gets_its_first_result_and_does_not_run_again() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    assert cluster.command("a", seq=1) == 1
    assert cluster.command("b", seq=2) == 2
    assert cluster.command("a", seq=1) == 1
    assert cluster.state(leader) == ["a", "b"]


def test_a_retry_at_the_next_leader_gets_the_first_result() -> None:
    cluster = Cluster()
    old = cluster.settle()
    cluster.drop(lambda a, b, m: False)
    answer = cluster.propose(old, "once", seq=1)
    cluster.run_for(0.05)
    assert answer.value == 1
    cluster.change("transfer", max({1, 2, 3} - {old}))
    cluster.run_for(0.1)
    assert cluster.leader() != old
    assert cluster.command("once", seq=1) == 1
    assert cluster.state(cluster.leader()) == ["once"]


def test_the_same_command_twice_in_one_batch_runs_once() -> None:
    lone = Lone(voters=(1,))
    lone.pass_time(2)

    def twice(shard: object) -> None:
        for token in ("one", "two"):
            lone.shard.propose(1, pack("x", 1), token)

    lone.turn(twice)
    assert lone.member.state == ["x"]
    assert [answer[1:] for answer in lone.answers] == [(0, b"\x01"), (0, b"\x01")]


def test_a_failure_is_a_result_too_and_is_not_tried_again() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    for _ in range(2):
        answer = cluster.propose(leader, "boom", seq=1)
        cluster.run_for(0.05)
        assert answer.code == 1


def test_results_above_acknowledged_are_kept_and_those_below_forgotten() -> None:
    table = Sessions(TTL_US, 100)
    for seq in range(1, 6):
        assert run(table, seq, WALL_US) == "ran"
    assert run(table, 6, WALL_US, acked=3) == "ran"
    assert sorted(table.by_client[CLIENT].results) == [4, 5, 6]
    assert run(table, 4, WALL_US, acked=3) == (0, b"result 4")
    assert run(table, 2, WALL_US) == (SESSION_EXPIRED, b"\xc0"), "forgotten: never a second execution"


def test_commands_may_come_out_of_order() -> None:
    table = Sessions(TTL_US, 100)
    assert run(table, 3, WALL_US) == "ran"
    assert run(table, 1, WALL_US) == "ran"
    assert run(table, 2, WALL_US) == "ran"
    assert run(table, 3, WALL_US) == (0, b"result 3")


def test_a_retry_issued_longer_ago_than_half_the_ttl_is_refused() -> None:
    table = Sessions(TTL_US, 100)
    assert run(table, 1, WALL_US, issued_us=WALL_US - TTL_US // 2) == "ran"
    assert run(table, 2, WALL_US, issued_us=WALL_US - TTL_US // 2 - 1) == (SESSION_EXPIRED, b"\xc0")


def test_a_command_from_the_future_is_refused_as_well() -> None:
    """A client whose clock is ahead could otherwise outlive its own session."""
    table = Sessions(TTL_US, 100)
    assert run(table, 1, WALL_US, issued_us=WALL_US + TTL_US // 2 + 1) == (SESSION_EXPIRED, b"\xc0")


def test_after_a_client_is_forgotten_no_command_of_its_time_runs_again() -> None:
    """At every moment of the first run and of the retry: it ran once, or it is refused."""
    for issued_after in range(-6, 7):
        for retried_after in range(0, 40):
            table = Sessions(TTL_US, 100)
            issued_us = WALL_US + issued_after * SECOND_US
            if run(table, 1, WALL_US, issued_us=issued_us) != "ran":
                continue
            outcome = run(table, 1, WALL_US + retried_after * SECOND_US, issued_us=issued_us)
            assert outcome != "ran", (issued_after, retried_after)


def test_an_idle_client_is_forgotten_by_the_time_in_the_entries() -> None:
    table = Sessions(TTL_US, 100)
    run(table, 1, WALL_US)
    table.expire(WALL_US + TTL_US)
    assert CLIENT in table.by_client
    table.expire(WALL_US + TTL_US + 1)
    assert CLIENT not in table.by_client


def test_a_session_that_is_used_lives_on() -> None:
    table = Sessions(TTL_US, 100)
    for step in range(10):
        assert run(table, step + 1, WALL_US + step * TTL_US // 2) == "ran"
    assert run(table, 10, WALL_US + 45 * SECOND_US) == (0, b"result 10")


def test_more_clients_than_the_limit_are_refused_as_overloaded() -> None:
    table = Sessions(TTL_US, 1)
    run(table, 1, WALL_US)
    assert table.admit(OTHER, 1, 0, WALL_US, WALL_US) == (OVERLOADED, b"\xc0")


def test_a_table_survives_its_dump() -> None:
    table = Sessions(TTL_US, 100)
    for seq in (1, 2, 3):
        run(table, seq, WALL_US, acked=0)
    copy = Sessions(TTL_US, 100)
    copy.load(table.dump())
    assert copy.dump() == table.dump()
    assert run(copy, 2, WALL_US) == (0, b"result 2")


def test_two_clients_with_the_same_seq_do_not_meet() -> None:
    cluster = Cluster()
    leader = cluster.settle()
    assert cluster.command("a", seq=1) == 1
    assert cluster.command("b", seq=1, client=OTHER) == 2
    assert cluster.state(leader) == ["a", "b"]


def test_a_command_in_the_log_of_a_deposed_leader_is_answered_as_unknown() -> None:
    cluster = Cluster()
    old = cluster.settle()
    cluster.isolate(old)
    answer = cluster.propose(old, "lost")
    cluster.run_for(3)
    assert answer.code == 91
    new = cluster.leader()
    assert new != old
    assert cluster.command("lost", seq=1) == 1, "the retry runs, once"


def test_bytes_that_are_no_command_are_refused_alone() -> None:
    lone = Lone(voters=(1,))
    lone.pass_time(2)
    lone.turn(lambda shard: [shard.propose(1, data, data) for data in (b"\xc1", pack("good", 1), b"", b"\x95")])
    codes = {token: code for token, code, _ in lone.answers}
    assert codes == {b"\xc1": 17, pack("good", 1): 0, b"": 17, b"\x95": 17}
    assert lone.member.state == ["good"]


# ---------------------------------------------------------------- runs


def pack_run(args: list[Any], seq: int, *, acked: int = 0, client: bytes = CLIENT, issued_us: int = WALL_US) -> bytes:
    """Many commands of one client as one, with consecutive seqs from ``seq`` on."""
    return bytes(msgpack.packb([client, seq, acked, issued_us, [msgpack.packb(arg) for arg in args]]))


def led_by_itself(**fields: Any) -> Lone:
    lone = Lone(voters=(1,), **fields)
    lone.pass_time(2)
    return lone


def outcomes_of(lone: Lone, batch: list[bytes]) -> list[tuple[int, Any]]:
    """``(code, body)`` of each command of ``batch``, put into one entry; a run counts as its commands."""
    first = len(lone.answers)
    lone.turn(lambda shard: [shard.propose(1, command, n) for n, command in enumerate(batch)])
    outcomes: list[tuple[int, Any]] = []
    for _, code, body in lone.answers[first:]:
        rows = body if isinstance(body, list) and code == OK else [body if code == OK else [code, body]]
        outcomes += [(OK, row) if isinstance(row, bytes) else tuple(row) for row in rows]
    return outcomes


@settings(deadline=None)
@given(st.data())
def test_a_run_does_what_its_commands_would_do_one_by_one(data: st.DataObject) -> None:
    in_runs, one_by_one = led_by_itself(), led_by_itself()
    acked = 0
    for _ in range(data.draw(st.integers(1, 6))):
        runs, singles = [], []
        for _ in range(data.draw(st.integers(1, 3))):
            acked = max(acked, data.draw(st.integers(0, 12)))
            seq = data.draw(st.integers(acked + 1, acked + 12))
            args = data.draw(st.lists(st.sampled_from(["a", "b", "boom"]), min_size=1, max_size=8))
            client = data.draw(st.sampled_from([CLIENT, OTHER]))
            issued_us = WALL_US + data.draw(st.sampled_from([0, 3600 * SECOND_US]))
            fields: dict[str, Any] = {"acked": acked, "client": client, "issued_us": issued_us}
            runs.append(pack_run(args, seq, **fields))
            singles += [pack(arg, seq + number, **fields) for number, arg in enumerate(args)]
        assert outcomes_of(in_runs, runs) == outcomes_of(one_by_one, singles)
        assert in_runs.member.state == one_by_one.member.state
        assert in_runs.member.session_table.dump() == one_by_one.member.session_table.dump()


def test_a_run_that_was_partly_applied_before_runs_only_what_is_new() -> None:
    lone = led_by_itself()
    assert outcomes_of(lone, [pack("a", 2)]) == [(OK, b"\x01")]
    assert outcomes_of(lone, [pack_run(["x", "a", "b"], 1)]) == [(OK, b"\x02"), (OK, b"\x01"), (OK, b"\x03")]
    assert lone.member.state == ["a", "x", "b"]


def test_each_command_of_a_run_has_its_own_place_in_the_batch() -> None:
    class Places(Journal):
        def command(self, state: list[Any], arg: Any) -> tuple[Any, list[Any]]:
            return self.context.position, [*state, self.context.position]

    lone = led_by_itself()
    lone.member.machine.command = Places.command.__get__(lone.member.machine)
    outcomes_of(lone, [pack("a", 1), pack_run(["b", "c"], 2), b"garbage", pack_run(["a", "d"], 1), pack("e", 9)])
    assert lone.member.state == [0, 1, 2, 6], "the stored answers, and what is no command, keep their places"


def test_a_run_of_too_many_commands_or_of_anything_else_is_refused_as_a_whole() -> None:
    lone = led_by_itself()
    bad = [
        pack_run(["a"] * 257, 1),
        pack_run([], 1),
        msgpack.packb([CLIENT, 1, 0, WALL_US, [b"\xa1a", 7]]),
        msgpack.packb([CLIENT, (1 << 63) - 1, 0, WALL_US, [b"\xa1a", b"\xa1b"]]),
    ]
    assert [code for code, _ in outcomes_of(lone, bad)] == [BAD_REQUEST] * 4
    assert lone.member.state == []
    assert outcomes_of(lone, [pack_run(["a"] * 256, 1)])[-1] == (OK, msgpack.packb(256))


def test_the_limit_of_a_commands_size_is_for_each_command_of_a_run() -> None:
    lone = led_by_itself(command_bytes_max=100)
    assert [code for code, _ in outcomes_of(lone, [pack_run(["x" * 90] * 20, 1)])] == [OK] * 20
    [(code, message)] = outcomes_of(lone, [pack_run(["x", "y" * 200], 21)])
    assert code == TOO_LARGE
    assert "command_bytes_max = 100" in message
    [(code, _)] = outcomes_of(lone, [b"\xc1" * 1000])
    assert code == TOO_LARGE


def test_results_of_a_run_survive_a_snapshot() -> None:
    table = Sessions(TTL_US, 100)
    assert run(table, 1, WALL_US) == "ran"
    session = table.admit_run(CLIENT, 2, 2, 0, WALL_US, WALL_US)
    assert session is not None
    session.results[2] = b"two"
    session.results[3] = (1, b"failed")
    copy = Sessions(TTL_US, 100)
    copy.load(msgpack.unpackb(msgpack.packb(table.dump())))
    assert [run(copy, seq, WALL_US) for seq in (1, 2, 3)] == [(0, b"result 1"), (0, b"two"), (1, b"failed")]
    assert copy.dump() == table.dump()

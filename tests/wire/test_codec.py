"""The frame codec: every kind goes round, and no input raises anything but WireError."""

from __future__ import annotations

import random
import time
from typing import Any, NamedTuple

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raftfleet.core import host_messages as host
from raftfleet.core import manager_messages as manager
from raftfleet.core import messages as m
from raftfleet.core.sessions import RUN_COMMANDS_MAX
from raftfleet.wire import codec
from raftfleet.wire.codec import FrameLimits, decode_frame, encode_frame, register_messages
from raftfleet.wire.errors import WireError

FLEET = bytes(range(16))
U63_MAX = 2**63 - 1
u63 = st.integers(0, U63_MAX)
u64 = st.integers(0, 2**64 - 1)
index = st.one_of(st.just(-1), u63)
data = st.binary(max_size=200)
text = st.text(max_size=50)
boolean = st.booleans()
values = st.recursive(
    st.none() | boolean | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | text | data,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=10,
)
maps = st.dictionaries(text, values, max_size=4)
pairs = st.lists(st.tuples(u63, u63), max_size=5)
instances = st.lists(u63, max_size=5)

STRATEGIES: dict[int, st.SearchStrategy[Any]] = {
    m.APPEND: st.builds(
        m.Append,
        *[st.just(m.APPEND), u63, u63, u63, u63, u63, u63, u63],
        st.lists(st.builds(m.Entry, u63, st.sampled_from(m.ENTRY_KINDS), data), max_size=4),
    ),
    m.APPEND_ANSWER: st.builds(m.AppendAnswer, st.just(m.APPEND_ANSWER), u63, u63, boolean, *[u63] * 5),
    m.VOTE: st.builds(m.Vote, st.just(m.VOTE), u63, u63, boolean, u63, u63, boolean),
    m.VOTE_ANSWER: st.builds(m.VoteAnswer, st.just(m.VOTE_ANSWER), u63, u63, boolean, boolean),
    m.SNAPSHOT: st.builds(m.Snapshot, st.just(m.SNAPSHOT), *[u63] * 8, data, u63),
    m.SNAPSHOT_ANSWER: st.builds(m.SnapshotAnswer, st.just(m.SNAPSHOT_ANSWER), *[u63] * 5, boolean, u63, u63),
    m.TIMEOUT_NOW: st.builds(m.TimeoutNow, st.just(m.TIMEOUT_NOW), u63, u63),
    m.STEP_DOWN: st.builds(m.StepDown, st.just(m.STEP_DOWN), u63, u63),
    m.GONE: st.builds(m.Gone, st.just(m.GONE), u63, u63, index),
    m.LOST: st.builds(m.Lost, st.just(m.LOST), u63, u63, u63),
    m.LOSS_QUERY: st.builds(m.LossQuery, st.just(m.LOSS_QUERY), u63, u63, u63),
    m.RECOVER_QUERY: st.builds(m.RecoverQuery, st.just(m.RECOVER_QUERY), u63, u63, instances),
    m.RECOVER_ANSWER: st.builds(m.RecoverAnswer, st.just(m.RECOVER_ANSWER), u63, u63, u63, u63),
    m.FORCE_CONFIG: st.builds(m.ForceConfig, st.just(m.FORCE_CONFIG), u63, u63, instances, instances),
    m.DIGEST: st.builds(m.Digest, st.just(m.DIGEST), u63, u63, u63, u63, u64, u64),
    m.BEAT: st.builds(m.Beat, st.just(m.BEAT), u63, u64, u63),
    m.BEAT_ANSWER: st.builds(m.BeatAnswer, st.just(m.BEAT_ANSWER), u63, u64),
    m.LINK_LIST: st.builds(m.LinkList, st.just(m.LINK_LIST), u63, u63, u63, u63, pairs),
    m.LINK_LIST_ANSWER: st.builds(m.LinkListAnswer, st.just(m.LINK_LIST_ANSWER), u63, u63, pairs),
    host.INTRODUCE: st.builds(host.Introduce, st.just(host.INTRODUCE), text, text, text),
    host.LEADERS: st.builds(
        host.Leaders, st.just(host.LEADERS), st.lists(st.builds(host.Leadership, u63, u63, u63), max_size=4)
    ),
    host.FORWARD: st.builds(
        host.Forward,
        st.just(host.FORWARD),
        st.lists(
            st.builds(
                *(host.ForwardRequest, u63, st.sampled_from([1, 2]), u63, u63, st.sampled_from([0, 1])),
                *(st.integers(0, RUN_COMMANDS_MAX), data),
            ),
            max_size=4,
        ),
    ),
    host.FORWARD_ANSWER: st.builds(
        host.ForwardAnswer,
        st.just(host.FORWARD_ANSWER),
        st.lists(st.builds(host.ForwardReply, u63, u63, values), max_size=4),
    ),
    host.RPC: st.builds(host.Rpc, st.just(host.RPC), u63, text, maps),
    host.RPC_ANSWER: st.builds(host.RpcAnswer, st.just(host.RPC_ANSWER), u63, u63, values),
}


def _field(field: Any) -> st.SearchStrategy[Any]:
    """Values that fit one field of a table."""
    if isinstance(field, list):
        return st.lists(_field(field[0]), max_size=3)
    if isinstance(field, tuple):
        return st.tuples(*[_field(item) for item in field])
    return {"u63": u63, "str": text, "bin": data, "bool": boolean, "map": maps, "value": values}[field]


for _kind, _type in manager.MESSAGE_TYPES.items():
    STRATEGIES[_kind] = st.builds(_type, st.just(_kind), *[_field(field) for field in manager.FIELDS[_kind]])
ALL_TYPES: dict[int, Any] = {**m.MESSAGE_TYPES, **host.MESSAGE_TYPES, **manager.MESSAGE_TYPES}
any_message = st.one_of(*STRATEGIES.values())


def _example(kind: int, fill: Any = 1) -> Any:
    """A message of ``kind`` from fixed values, for tests that need one and not a thousand."""
    entry = m.Entry(1, m.COMMANDS, b"data")
    examples = {
        m.APPEND: m.Append(m.APPEND, 1, 2, 3, 4, 5, 6, 7, [entry]),
        m.DIGEST: m.Digest(m.DIGEST, 1, 2, 3, 0, 2**64 - 1, 5),
        m.BEAT: m.Beat(m.BEAT, 1, 2**64 - 1, 3),
        host.FORWARD: host.Forward(host.FORWARD, [host.ForwardRequest(1, 1, 2, 500, 0, 3, b"body")]),
        host.RPC: host.Rpc(host.RPC, 1, "method", {"fill": fill}),
    }
    return examples[kind]


def _refused(data: bytes, reason: str | None = None, limits: FrameLimits = codec.DEFAULT_LIMITS) -> None:
    with pytest.raises(WireError) as caught:
        decode_frame(data, limits)
    if reason is not None:
        assert caught.value.reason == reason, caught.value


def _survives(data: bytes) -> bool:
    try:
        decode_frame(data)
    except WireError:
        return False
    return True


def test_every_kind_of_core_hosts_and_managers_is_known() -> None:
    assert set(ALL_TYPES) == codec.registered_kinds() == set(STRATEGIES)
    assert len(ALL_TYPES) == len(m.MESSAGE_TYPES) + len(host.MESSAGE_TYPES) + len(manager.MESSAGE_TYPES)


@given(st.lists(any_message, max_size=6), st.integers(1, U63_MAX), u63, st.binary(min_size=16, max_size=16))
def test_every_message_comes_back_as_it_went(sent: list[Any], sender: int, receiver: int, fleet: bytes) -> None:
    frame = decode_frame(encode_frame(fleet, sender, receiver, sent))
    assert frame == (fleet, sender, receiver, sent)
    assert [type(message) for message in frame.messages] == [type(message) for message in sent]
    for message in frame.messages:
        if type(message) is m.Append:
            assert all(type(entry) is m.Entry for entry in message.entries)
        if type(message) is host.Forward:
            assert all(type(request) is host.ForwardRequest for request in message.requests)


@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_wire_error(garbage: bytes) -> None:
    _survives(garbage)


@given(values)
def test_any_msgpack_value_in_place_of_a_frame_raises_nothing_but_wire_error(value: Any) -> None:
    _refused(msgpack.packb(value))


@given(st.sampled_from(sorted(STRATEGIES)), st.lists(values, max_size=12))
def test_any_fields_under_a_known_kind_raise_nothing_but_wire_error(kind: int, fields: list[Any]) -> None:
    _survives(msgpack.packb([1, FLEET, 1, 2, [[kind, *fields]]]))


@settings(max_examples=200)
@given(any_message, st.data())
def test_one_field_replaced_by_any_value_raises_nothing_but_wire_error(message: Any, draw: st.DataObject) -> None:
    fields = list(message)
    fields[draw.draw(st.integers(0, len(fields) - 1))] = draw.draw(values)
    _survives(msgpack.packb([1, FLEET, 1, 2, [fields]]))


@given(any_message)
def test_a_truncated_frame_is_refused(message: Any) -> None:
    frame = encode_frame(FLEET, 1, 2, [message])
    for length in range(0, len(frame), max(1, len(frame) // 40)):
        _refused(frame[:length], "not msgpack")


@given(any_message, st.binary(min_size=1, max_size=5))
def test_a_frame_with_bytes_behind_it_is_refused(message: Any, tail: bytes) -> None:
    _refused(encode_frame(FLEET, 1, 2, [message]) + tail, "not msgpack")


def test_mutated_frames_raise_nothing_but_wire_error() -> None:
    rng = random.Random(7)
    frame = encode_frame(FLEET, 1, 2, [_example(kind) for kind in (m.APPEND, m.BEAT, host.FORWARD, host.RPC)])
    survived = 0
    for _ in range(20_000):
        mutated = bytearray(frame)
        for _ in range(rng.randint(1, 4)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        survived += _survives(bytes(mutated))
    assert 0 < survived < 20_000  # some hit only data, and both outcomes have been seen


def test_what_was_decoded_can_be_packed_again_after_adding_one() -> None:
    largest = m.AppendAnswer(m.APPEND_ANSWER, U63_MAX, U63_MAX, True, *[U63_MAX] * 5)
    (decoded,) = decode_frame(encode_frame(FLEET, 1, 2, [largest])).messages
    encode_frame(FLEET, 1, 2, [decoded._replace(term=decoded.term + 1, index=decoded.index + 65536)])
    for position in (1, 2, 4, 5, 6, 7, 8):
        for bad in (-1, 2**63, 2**64 - 1, True, 1.0, None, "1", b"1"):
            fields: list[Any] = list(largest)
            fields[position] = bad
            _refused(msgpack.packb([1, FLEET, 1, 2, [fields]]), "bad field")


@pytest.mark.parametrize("kind", sorted(set(STRATEGIES)))
def test_a_bool_is_not_an_int_and_none_is_nothing(kind: int) -> None:
    for bad in (True, None):
        fields: list[Any] = [kind] + [bad] * (len(ALL_TYPES[kind]._fields) - 1)
        _refused(msgpack.packb([1, FLEET, 1, 2, [fields]]), "bad field")


@pytest.mark.parametrize("kind", sorted(set(STRATEGIES)))
def test_too_few_and_too_many_fields_are_refused(kind: int) -> None:
    count = len(ALL_TYPES[kind]._fields)
    for length in (count - 1, count + 1):
        _refused(msgpack.packb([1, FLEET, 1, 2, [[kind] + [0] * (length - 1)]]), "bad field")


def test_an_oversize_frame_is_refused_unread() -> None:
    _refused(bytes(2000), "frame too large", FrameLimits(frame_bytes_max=1999))


@pytest.mark.parametrize("version", [0, 2, -1, 2**64 - 1])
def test_another_protocol_version_is_refused_by_name_even_if_the_rest_differs(version: int) -> None:
    _refused(msgpack.packb([version, FLEET, 1, 2, []]), "other protocol")
    _refused(msgpack.packb([version, "a future header"]), "other protocol")


@pytest.mark.parametrize(
    "frame",
    [
        [],
        {},
        [True, FLEET, 1, 2, []],
        [1],
        [1, FLEET, 1, 2],
        [1, FLEET, 1, 2, [], None],
        [1, FLEET[:15], 1, 2, []],
        [1, "x" * 16, 1, 2, []],
        [1, FLEET, 0, 2, []],
        [1, FLEET, -1, 2, []],
        [1, FLEET, 2**63, 2, []],
        [1, FLEET, 1, -2, []],
        [1, FLEET, True, 2, []],
        [1, FLEET, 1, None, []],
        [1, FLEET, 1, 2, {}],
        [1, FLEET, 1, 2, [[]]],
        [1, FLEET, 1, 2, [1]],
        [1, FLEET, 1, 2, [["1"]]],
        [1, FLEET, 1, 2, [[True]]],
    ],
)
def test_a_wrong_header_is_refused(frame: Any) -> None:
    _refused(msgpack.packb(frame), "not a frame")


def test_an_unknown_kind_is_refused_with_the_whole_frame() -> None:
    _refused(msgpack.packb([1, FLEET, 1, 2, [list(_example(m.BEAT)), [31, 1, 2]]]), "unknown kind")
    _refused(msgpack.packb([1, FLEET, 1, 2, [[2**64 - 1]]]), "unknown kind")


def test_deep_nesting_is_refused_on_every_level() -> None:
    for depth in (40, 500, 5000, 100_000):
        _refused(b"\x91" * depth + b"\xc0")
        prefix = msgpack.packb([1, FLEET, 1, 2])[1:]
        for value in (b"\x91" * depth + b"\xc0", b"\x81\xa1a" * depth + b"\xc0"):
            message = b"\x94" + msgpack.packb(host.RPC) + b"\x01\xa1m" + b"\x81\xa1a" + value
            _refused(b"\x95" + prefix + b"\x91" + message)


@pytest.mark.parametrize("bad", [msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 2)])
def test_ext_types_are_refused(bad: Any) -> None:
    _refused(msgpack.packb([1, FLEET, 1, 2, [[host.RPC, 1, "m", {"a": bad}]]]))
    _refused(msgpack.packb([1, FLEET, 1, 2, bad]))


@pytest.mark.parametrize("key", [1, b"bytes", None, 1.5])
def test_keys_that_are_no_str_are_refused(key: Any) -> None:
    _refused(msgpack.packb([1, FLEET, 1, 2, [[host.RPC, 1, "m", {key: 1}]]]))


def test_text_that_is_no_utf8_is_refused() -> None:
    frame = encode_frame(FLEET, 1, 2, [host.Introduce(host.INTRODUCE, "node", "tcp://h:1", "")])
    _refused(frame.replace(b"node", b"n\xff\xfee"), "not msgpack")


def test_huge_lists_announced_in_few_bytes_cost_nothing() -> None:
    started = time.thread_time()
    for header in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"):
        _refused(header)
        _refused(header * 200)
        _refused(b"\x95\x01" + header * 100 + bytes(1000))
    _refused(b"\xdc\xff\xff" * 500 + bytes(70_000))  # the worst that the limits let through
    assert time.thread_time() - started < 5.0


def test_lists_longer_than_the_limit_are_refused() -> None:
    limits = FrameLimits(list_length_max=10)
    decode_frame(encode_frame(FLEET, 1, 2, [_example(m.BEAT)] * 10), limits)
    _refused(encode_frame(FLEET, 1, 2, [_example(m.BEAT)] * 11), "not msgpack", limits)


class _Ping(NamedTuple):
    kind: int
    number: int
    note: str | None
    peers: list[tuple[str, int]]


def test_other_kinds_are_plugged_in_by_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_checks", dict(codec._checks))
    register_messages({120: _Ping}, {120: ("u63", "str?", [("str", "u63")])})
    register_messages({120: _Ping}, {120: ("u63", "str?", [("str", "u63")])})  # the same again: a module imported twice
    for ping in (_Ping(120, 1, None, [("a", 1)]), _Ping(120, 2**63 - 1, "note", [])):
        frame = decode_frame(encode_frame(FLEET, 1, 2, [ping]))
        assert frame.messages == [ping]
        assert type(frame.messages[0]) is _Ping
    bad: list[list[Any]] = [[-1, None, []], [1, 2, []], [1, "", [["a"]]], [1, "", ["a"]], [1, "", {}]]
    for fields in bad:
        with pytest.raises(WireError, match="_Ping"):
            decode_frame(msgpack.packb([1, FLEET, 1, 2, [[120, *fields]]]))
    with pytest.raises(ValueError, match="taken"):
        register_messages({m.APPEND: _Ping}, {m.APPEND: ("u63", "str", "value")})
    with pytest.raises(ValueError, match="3 fields"):
        register_messages({121: _Ping}, {121: ("u63",)})
    with pytest.raises(ValueError, match="unknown field description"):
        register_messages({121: _Ping}, {121: ("u63", "string", "value")})
    with pytest.raises(ValueError, match="no description"):
        register_messages({121: _Ping}, {})


def test_encoding_goes_on_after_a_value_that_cannot_be_packed() -> None:
    with pytest.raises(TypeError):
        encode_frame(FLEET, 1, 2, [host.Rpc(host.RPC, 1, "m", {"a": object()})])
    beat = _example(m.BEAT)
    assert decode_frame(encode_frame(FLEET, 1, 2, [beat])).messages == [beat]

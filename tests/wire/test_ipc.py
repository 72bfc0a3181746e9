"""The client's wire: frames from a stream, requests and replies, codes and exceptions."""

from __future__ import annotations

import struct

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from raftfleet import errors
from raftfleet.wire import ipc
from raftfleet.wire.errors import WireError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False) | st.text()
    | st.binary(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)  # fmt: skip
ITEMS = st.lists(st.lists(VALUES, min_size=1), max_size=5)


@given(frames=st.lists(ITEMS, max_size=5), cuts=st.lists(st.integers(0, 2000)))
def test_frames_survive_any_cutting_of_the_stream(frames: list[list[object]], cuts: list[int]) -> None:
    stream = b"".join(ipc.pack_frame(frame) for frame in frames)
    reader = ipc.FrameReader()
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    received = [frame for a, b in zip(edges, edges[1:], strict=False) for frame in reader.feed(stream[a:b])]
    assert received == frames
    assert reader.pending_bytes == 0


def test_frames_survive_one_byte_at_a_time() -> None:
    frames = [[[1, 2, "x"]], [], [[b"y" * 300], [None]]]
    reader = ipc.FrameReader()
    stream = b"".join(ipc.pack_frame(frame) for frame in frames)
    assert [frame for byte in stream for frame in reader.feed(bytes([byte]))] == frames


@given(st.lists(st.binary(max_size=200)))
@example([struct.pack(">I", 1) + b"\xc1"])
@example([struct.pack(">I", 5) + b"\xdd\xff\xff\xff\xff"])
@example([struct.pack(">I", 1000) + b"\x91" * 1000])
@example([struct.pack(">I", 3) + b"\x81\x90\x00"])
@example([struct.pack(">I", 6) + b"\x91\xd6\xff\xff\xff\xff"])
@example([struct.pack(">I", 4) + b"\x91\x91\xa1\xff"])
def test_random_bytes_raise_nothing_but_wire_error(chunks: list[bytes]) -> None:
    reader = ipc.FrameReader()
    try:
        for chunk in chunks:
            for frame in reader.feed(chunk):
                for item in frame:
                    ipc.check_request(item)
    except WireError as error:
        assert error.reason in ("oversize", "garbage", "request")


@given(st.binary(max_size=300))
def test_random_bodies_of_frames_raise_nothing_but_wire_error(body: bytes) -> None:
    try:
        for frame in ipc.FrameReader().feed(struct.pack(">I", len(body)) + body):
            for item in frame:
                ipc.check_reply(item)
    except WireError as error:
        assert error.reason in ("garbage", "reply")


@given(VALUES | ITEMS)
def test_any_value_as_a_frame_raises_nothing_but_wire_error(value: object) -> None:
    body = msgpack.packb(value)
    try:
        for frame in ipc.FrameReader().feed(struct.pack(">I", len(body)) + body):
            for item in frame:
                ipc.check_request(item)
    except WireError as error:
        assert error.reason in ("garbage", "request")


def test_a_frame_of_100_mb_is_refused_by_its_length_alone() -> None:
    with pytest.raises(WireError) as caught:
        ipc.FrameReader().feed(struct.pack(">I", 100 << 20))
    assert caught.value.reason == "oversize"
    assert str(16 << 20) in str(caught.value)


def test_a_frame_that_the_other_side_would_refuse_is_not_sent() -> None:
    with pytest.raises(WireError, match="oversize"):
        ipc.pack_frame([[1, b"x" * ipc.FRAME_BYTES_MAX]])


def test_an_announced_array_longer_than_any_of_ours_is_refused() -> None:
    body = b"\x91\xdd" + struct.pack(">I", ipc.ITEMS_MAX + 1) + bytes(ipc.ITEMS_MAX + 1)
    with pytest.raises(WireError) as caught:
        ipc.FrameReader().feed(struct.pack(">I", len(body)) + body)
    assert caught.value.reason == "garbage"


def test_a_receive_buffer_can_be_used_again_at_once() -> None:
    frame = ipc.pack_frame([[1, b"abcdefgh"]])
    buffer = bytearray(frame[:9])
    reader = ipc.FrameReader()
    assert reader.feed(memoryview(buffer)) == []
    buffer[:] = b"\xff" * len(buffer)
    assert reader.feed(frame[9:]) == [[[1, b"abcdefgh"]]]


CLIENT = bytes(16)
GOOD_REQUESTS = [
    [0, ipc.HELLO, 1, CLIENT],
    [1, ipc.COMMAND, "g", 0, 500, b""],
    [2, ipc.QUERY, "g", 7, 500, ipc.STALE, b"x"],
    [3, ipc.CALL, "groups", {"a": 1}, 5000],
    [4, ipc.COMMAND_RUN, "g", 7, 500, 2, b""],
    [5, ipc.QUERY_RUN, "g", 7, 500, ipc.LINEARIZABLE, 256, b"x"],
]
BAD_REQUESTS = [
    [0],
    [1, 9],
    [1, True, "g", 0, 500, b""],
    [True, 1, "g", 0, 500, b""],
    [0, ipc.COMMAND, "g", 0, 500, b""],
    [-1, ipc.COMMAND, "g", 0, 500, b""],
    [1, ipc.HELLO, 1, CLIENT],
    [0, ipc.HELLO, 1, CLIENT[1:]],
    [1, ipc.COMMAND, b"g", 0, 500, b""],
    [1, ipc.COMMAND, "g", -1, 500, b""],
    [1, ipc.COMMAND, "g", 1 << 63, 500, b""],
    [1, ipc.COMMAND, "g", 0, True, b""],
    [1, ipc.COMMAND, "g", 0, 1 << 50, b""],
    [1, ipc.COMMAND, "g", 0, 500, "text"],
    [1, ipc.COMMAND, "g", 0, 500],
    [1, ipc.COMMAND, "g", 0, 500, b"", b""],
    [2, ipc.QUERY, "g", 7, 500, 2, b"x"],
    [3, ipc.CALL, "groups", {b"a": 1}, 5000],
    [3, ipc.CALL, "groups", [], 5000],
    [3, [], "groups", {}, 5000],
    [4, ipc.COMMAND_RUN, "g", 7, 500, 0, b""],
    [4, ipc.COMMAND_RUN, "g", 7, 500, 257, b""],
    [4, ipc.COMMAND_RUN, "g", 7, 500, True, b""],
    [4, ipc.COMMAND_RUN, "g", 7, 500, b""],
    [5, ipc.QUERY_RUN, "g", 7, 500, 2, 3, b"x"],
    [5, ipc.QUERY_RUN, "g", 7, 500, 0, 300, b"x"],
    [5, ipc.QUERY_RUN, "g", 7, 500, 0, 3, ["x"]],
]


@pytest.mark.parametrize("item", GOOD_REQUESTS)
def test_a_request_passes(item: list[object]) -> None:
    assert ipc.check_request(item) is item


@pytest.mark.parametrize("item", BAD_REQUESTS, ids=repr)
def test_a_request_with_a_wrong_field_is_refused(item: list[object]) -> None:
    with pytest.raises(WireError) as caught:
        ipc.check_request(item)
    assert caught.value.reason == "request"


@pytest.mark.parametrize("code", sorted(ipc.EXCEPTIONS))
def test_every_error_code_survives_the_way_to_the_client(code: int) -> None:
    body = ["ValueError", "no"] if code in (ipc.COMMAND_FAILED, ipc.QUERY_FAILED, ipc.NOT_IMPORTABLE) else "because"
    error = ipc.error_of(code, body)
    assert type(error) is ipc.EXCEPTIONS[code]
    assert ("no" if isinstance(body, list) else "because") in str(error)
    again, again_body = ipc.code_of(error)
    assert ipc.EXCEPTIONS[again] is ipc.EXCEPTIONS[code]
    assert again_body == body
    assert ipc.error_of(code, msgpack.packb(body)).args == error.args


@given(code=st.integers(1, 99), body=VALUES | st.binary())
def test_an_error_reply_with_any_body_gives_its_exception(code: int, body: object) -> None:
    error = ipc.error_of(code, body)
    assert type(error) is ipc.EXCEPTIONS.get(code, errors.ProtocolError)
    assert str(error)


def test_families_of_codes_are_families_of_exceptions() -> None:
    for code, exception in ipc.EXCEPTIONS.items():
        assert issubclass(exception, errors.NotApplied) == (10 <= code < 30)
        assert issubclass(exception, errors.OutcomeUnknown) == (30 <= code < 40)


def test_an_exception_without_a_code_goes_as_its_family() -> None:
    class Odd(errors.NotApplied):
        """Odd."""

    assert ipc.code_of(Odd())[0] == ipc.REFUSED
    assert ipc.code_of(errors.SessionExpired())[0] == ipc.SESSION_EXPIRED
    assert ipc.code_of(errors.ConfigError("x"))[0] == ipc.OUTCOME_UNKNOWN

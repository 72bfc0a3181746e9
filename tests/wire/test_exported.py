"""Exported states: what is written is read back, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import msgpack
import pytest

from raftfleet.storage.files import OsFiles
from raftfleet.storage.snapshots import write_snapshot
from raftfleet.wire.exported import ExportedState

STATE = ExportedState(
    name="lamps",
    state=b"\x01\x02the state",
    machine_version=3,
    replicas=5,
    config={"machine": "m:M"},
    uid=1 << 40,
    index=77,
    term=(1 << 32) | 4,
    wall_us=1_700_000_000_000_000,
    is_linearizable=True,
    node="n1",
)


def test_what_is_packed_is_unpacked() -> None:
    assert ExportedState.unpack(STATE.pack()) == STATE


def test_an_empty_state_is_kept() -> None:
    empty = ExportedState(name="g", state=b"", machine_version=1)
    assert ExportedState.unpack(empty.pack()) == empty


def test_a_flipped_bit_anywhere_is_noticed() -> None:
    packed = STATE.pack()
    for offset in range(len(packed)):
        damaged = bytearray(packed)
        damaged[offset] ^= 1
        with pytest.raises(ValueError):
            ExportedState.unpack(bytes(damaged))


def test_a_file_that_was_cut_short_anywhere_is_noticed() -> None:
    packed = STATE.pack()
    for size in range(len(packed)):
        with pytest.raises(ValueError):
            ExportedState.unpack(packed[:size])
    with pytest.raises(ValueError, match="cut short"):
        ExportedState.unpack(packed + b"x")


def test_a_later_format_is_said() -> None:
    packed = bytearray(STATE.pack())
    packed[8] = 9
    with pytest.raises(ValueError, match="format 9"):
        ExportedState.unpack(bytes(packed))


def snapshot(tmp_path: Path, *waits: object) -> bytes:
    body = msgpack.packb([1, 0, b"", 123, [], 2, b"a state", *waits])
    info = write_snapshot(OsFiles(), str(tmp_path), 7, 40, 3, 9, {"name": "lamps"}, body)
    return Path(info.path).read_bytes()


def test_an_archived_snapshot_is_a_state_without_a_config(tmp_path: Path) -> None:
    state = ExportedState.unpack(snapshot(tmp_path))
    assert (state.name, state.state, state.machine_version) == ("lamps", b"a state", 2)
    assert (state.uid, state.index, state.term, state.config) == (7, 40, 3, {})


def test_a_snapshot_that_waits_for_its_own_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no whole state"):
        ExportedState.unpack(snapshot(tmp_path, [10, 1, b"half"]))
    with pytest.raises(ValueError, match="cannot be restored"):
        ExportedState.unpack(snapshot(tmp_path)[:-3])

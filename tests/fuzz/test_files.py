"""Files that a person or an editor wrote: each wrong one is named with its path, by the declared error."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz.garbage import damaged, fuzzed
from hypothesis import given
from hypothesis import strategies as st

from raftfleet.errors import ConfigError
from raftfleet.node import config, data_dir, leader_table
from raftfleet.node.leader_table import LeaderTableReader, RegionWriter, create_table
from raftfleet.transport import curve
from raftfleet.transport.errors import KeyFileError

TOML = b"""
name = "n1"
zone = "z1"
bind = "127.0.0.1:7400"
peers = ["127.0.0.1:7400", "127.0.0.1:7410"]
workers = 2
node-purge-failure-time-window = 600
beat-interval = 0.2
insecure = false
log_level = "info"
"""
LAYOUT = b'{"format": 1, "node": "n1", "workers": 2}'
KEYS = b"# a list\nrq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7 n1\n"


def read_config(path: Path) -> None:
    config.load({"run_dir": str(path.parent / "run")}, {}, path)


def read_layout(path: Path) -> None:
    data_dir.read_layout(path.rename(path.parent / data_dir.LAYOUT_NAME).parent)


READERS: dict[str, tuple[Callable[[Path], Any], type[BaseException], bytes]] = {
    "config": (read_config, ConfigError, TOML),
    "layout of a data directory": (read_layout, data_dir.DataDirRefused, LAYOUT),
    "public keys": (curve.load_public_keys, KeyFileError, KEYS),
    "secret key": (curve.load_secret_key, KeyFileError, KEYS[9:49]),
}

toml_values = st.recursive(
    st.one_of(st.integers(), st.booleans(), st.floats(), st.text(max_size=10)),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize("name", sorted(READERS))
def test_nothing_but_the_declared_error_comes_of_a_file(name: str) -> None:
    read, declared, example = READERS[name]

    @fuzzed
    @given(damaged([example], packed=False))
    def attack(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            path.write_bytes(data)
            path.chmod(0o600)
            try:
                read(path)
            except declared:
                pass

    attack()


@fuzzed
@given(st.dictionaries(st.sampled_from([s.flag[2:] for s in config.SOURCES]), toml_values, max_size=4))
def test_any_value_of_any_option_is_taken_or_refused_by_name(options: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "raftfleet.toml"
        path.write_text("\n".join(f"{key} = {toml(value)}" for key, value in options.items()), encoding="utf-8")
        try:
            config.load({"run_dir": str(Path(folder) / "run")}, {}, path)
        except ConfigError as error:
            assert str(path) in str(error) or any(key in str(error).replace("_", "-") for key in options), error


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(c):08X}" for c in value if not 0xD800 <= ord(c) <= 0xDFFF) + '"'
    return repr(value)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path


def test_a_leader_table_with_anything_in_it_gives_a_hint_or_none(run_dir: Path) -> None:
    table = create_table(run_dir, "n1", 2)
    writers = [RegionWriter(run_dir, index) for index in (0, 1)]
    for number in range(20):
        writers[leader_table.shard_of(f"group {number}", 2)].set_leader(f"group {number}", number + 1, 1, "n2", 7)
    clean = table.path.read_bytes()
    reader = LeaderTableReader(run_dir)

    @fuzzed
    @given(st.lists(st.tuples(st.integers(64, len(clean) - 1), st.binary(min_size=1, max_size=16)), max_size=20))
    def attack(changes: list[tuple[int, bytes]]) -> None:
        with table.path.open("r+b") as file:
            file.write(clean)
            for at, data in changes:
                file.seek(at)
                file.write(data[: len(clean) - at])
        for number in range(20):
            slot = reader.lookup(f"group {number}")
            assert slot is None or (type(slot.uid) is int and type(slot.term) is int)

    try:
        attack()
    finally:
        reader.close()
        for writer in writers:
            writer.close()
        table.close()

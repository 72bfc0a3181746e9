"""``export`` and ``restore`` where no node is needed: files, names, what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from raftfleet.errors import AlreadyAdded, ConfigError
from raftfleet.node import cli, cli_states
from raftfleet.node.cli_states import SUFFIX, config_for, file_name, read_state, write_whole
from raftfleet.storage.files import OsFiles
from raftfleet.storage.snapshots import write_snapshot
from raftfleet.wire.exported import ExportedState

STATE = ExportedState(name="g", state=b"\x01", machine_version=1, replicas=5, config={"machine": "m:M"})


@settings(deadline=None)
@given(st.text(min_size=1, max_size=255))
def test_every_group_has_a_file_name(group: str) -> None:
    try:
        group.encode()
    except UnicodeEncodeError:
        return
    name = file_name(group)
    assert name.endswith(SUFFIX) and len(name.encode()) <= 255
    assert "/" not in name and "\0" not in name and not name.startswith(".")


def test_two_groups_never_share_a_file_name() -> None:
    groups = ["a/b", "a%2Fb", "a b", ".", "..", ".a", "x" * 200, "x" * 201, "ä" * 80, "ä" * 81, "A", "a"]
    assert len({file_name(group) for group in groups}) == len(groups)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "folder", b"three")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["folder", "state"]


def test_a_file_that_is_no_state_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"something else")
    with pytest.raises(ConfigError, match="x cannot be restored from: this is neither"):
        read_state(path)


def test_a_damaged_snapshot_from_an_archive_is_refused(tmp_path: Path) -> None:
    info = write_snapshot(
        OsFiles(), str(tmp_path), 7, 4, 3, 9, {"name": "g"}, b"\x97\x01\x00\xc4\x00\x05\x90\x02\xc4\x01s"
    )
    path = Path(info.path)
    assert read_state(path).state == b"s"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged data"):
        read_state(path)


def test_who_knows_no_machine_is_asked_for_one() -> None:
    bare = ExportedState(name="g", state=b"", machine_version=1)
    with pytest.raises(ConfigError, match="--machine"):
        config_for(bare, Path("f"), None)
    config = config_for(bare, Path("f"), "m:M")
    assert config is not None and config.machine == "m:M"
    assert config_for(STATE, Path("f"), None) is None
    other = config_for(STATE, Path("f"), "n:N")
    assert other is not None and other.machine == "n:N"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["export", "g"], "GROUP and FILE"),
        (["export", "--all"], "--all and DIR"),
        (["export", "--all", "a", "b"], "--all and DIR"),
        (["restore"], "FILE|DIR"),
        (["restore", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_a_wrong_call_exits_with_2_and_a_hint(words: list[str], hint: str) -> None:
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 2
    assert hint in done.output


def test_a_name_for_several_files_is_a_usage_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_whole(tmp_path / f"{name}{SUFFIX}", STATE.pack())
    done = CliRunner().invoke(cli.main, ["restore", str(tmp_path), "--name", "x"])
    assert done.exit_code == 2 and "there are 2" in done.output
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(cli.main, ["restore", str(tmp_path / "empty")])
    assert done.exit_code == 2 and "holds no file" in done.output


class FleetWith:
    """A fleet in which some groups are there already."""

    def __init__(self, *there: str) -> None:
        self.groups = set(there)

    def add_consensus_group(self, name: str, *args: Any, **options: Any) -> None:
        if name in self.groups:
            raise AlreadyAdded(f"group {name} is there already")
        self.groups.add(name)


def run_with(fleet: FleetWith, monkeypatch: pytest.MonkeyPatch, *words: object) -> Any:
    @contextlib.contextmanager
    def connected(run_dir: Path | None) -> Iterator[FleetWith]:
        yield fleet

    monkeypatch.setattr(cli_states, "connected", connected)
    return CliRunner().invoke(cli.main, list(map(str, words)))


def test_a_restore_of_many_that_is_run_again_names_what_is_there_and_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        state = ExportedState(name=name, state=b"", machine_version=1, replicas=3, config={"machine": "m:M"})
        write_whole(tmp_path / f"{name}{SUFFIX}", state.pack())
    fleet = FleetWith("a")
    done = run_with(fleet, monkeypatch, "restore", tmp_path)
    assert done.exit_code == 0, done.output
    assert fleet.groups == {"a", "b"}
    assert "the groups of 1 files were there already" in done.output and "a.raftstate" in done.output
    again = run_with(fleet, monkeypatch, "restore", tmp_path)
    assert again.exit_code == 0 and "2 files were there already" in again.output and "failed" not in again.output
    (tmp_path / f"c{SUFFIX}").write_bytes(b"no state")
    assert run_with(fleet, monkeypatch, "restore", tmp_path).exit_code == 1, "what failed is a failure"
    single = run_with(fleet, monkeypatch, "restore", tmp_path / f"a{SUFFIX}")
    assert single.exit_code == 1 and "was not restored" in single.output


def test_an_export_to_a_folder_that_is_missing_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_with(FleetWith("g"), monkeypatch, "export", "g", tmp_path / "nowhere" / "x")
    assert done.exit_code == 2
    assert "nowhere is not a directory" in done.output and ".tmp" not in done.output

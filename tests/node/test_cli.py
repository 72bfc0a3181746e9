"""The command line without a node: help, usage, and how answers and errors are shown."""

from __future__ import annotations

import inspect
import json
import re
import stat
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from client.fake_node import FakeNode

from raftfleet import errors
from raftfleet.node import cli, cli_output
from raftfleet.node.config import SOURCES
from raftfleet.transport.curve import load_secret_key

COMMANDS = {
    "start", "status", "groups", "nodes", "members", "activate", "deactivate", "stop", "add-group", "remove-group",
    "command", "query", "transfer", "remove-dead-node", "leaderless", "keygen", "demo",
    "wal", "repair", "audit", "export", "restore",
}  # fmt: skip


def options(command: click.Command) -> list[click.Option]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


def test_every_command_of_the_contract_is_there() -> None:
    assert set(cli.main.commands) == COMMANDS


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_names_an_environment_variable_for_every_option(name: str) -> None:
    shown = CliRunner().invoke(cli.main, [name, "--help"], terminal_width=200)
    assert shown.exit_code == 0
    text = re.sub(r"\s+", " ", shown.output)
    for option in options(cli.main.commands[name]):
        assert re.search(rf"{option.opts[0]}\b.*?\[env( var)?: (RAFTFLEET_[A-Z_]+|NO_COLOR)", text), option.opts


def test_start_offers_exactly_the_settings_that_a_node_has() -> None:
    fields = {option.name for option in options(cli.main.commands["start"])} - {"config_file"}
    assert fields == {source.field for source in SOURCES}
    shown = re.sub(r"\s+", " ", CliRunner().invoke(cli.main, ["start", "--help"]).output)
    for source in SOURCES:
        assert f"[env: {source.variable}]" in shown, source.variable


@pytest.mark.parametrize("name", sorted(COMMANDS - {"start", "keygen", "demo", "wal"}))
def test_every_command_that_asks_a_node_takes_a_run_dir(name: str) -> None:
    assert "run_dir" in {option.name for option in options(cli.main.commands[name])}


def test_an_error_is_told_with_its_causes_and_the_next_step(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        try:
            raise ConnectionRefusedError("connection refused")
        except ConnectionRefusedError as cause:
            raise errors.NodeNotRunning("no node answers in /run/raftfleet/n1") from cause
    except errors.NodeNotRunning as error:
        cli_output.say_error(error, command="status")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "raftfleet-node status: no node answers in /run/raftfleet/n1.",
        "  Because: connection refused.",
        "Next: Start a node with `raftfleet-node start`, or name its run directory with --run-dir.",
    ]


def all_errors(top: type[BaseException]) -> list[type[BaseException]]:
    return [top, *(below for kind in top.__subclasses__() for below in all_errors(kind))]


@pytest.mark.parametrize("kind", all_errors(errors.RaftFleetError), ids=lambda kind: kind.__name__)
def test_every_error_names_what_to_do_next(kind: type[errors.RaftFleetError]) -> None:
    try:
        error = kind()
    except TypeError:
        error = kind(*["text"] * len(inspect.signature(kind).parameters))
    assert cli_output.next_step(error).endswith(".")


def test_json_carries_what_msgpack_carries(capsys: pytest.CaptureFixture[str]) -> None:
    cli_output.print_json({"a": [1, None, True, 1.5], "b": b"\x00\xff", 7: "é"})
    printed = capsys.readouterr().out
    assert printed == '{"a": [1, null, true, 1.5], "b": {"base64": "AP8="}, "7": "é"}\n'
    json.loads(printed)


def test_a_table_lines_up_and_leaves_no_trailing_space(capsys: pytest.CaptureFixture[str]) -> None:
    cli_output.print_table(("NAME", "N"), [("long name", 1), ("x", 22)])
    assert capsys.readouterr().out == "NAME       N\nlong name  1\nx          22\n"


def test_a_term_shows_its_epoch_only_after_a_repair() -> None:
    assert cli_output.term_text(7) == "7"
    assert cli_output.term_text((2 << 32) | 3) == "2/3"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["command", "counter", "inc"], "'\"inc\"'"),
        (["add-group", "g", "--machine", "m:C", "--set", "x"], "FIELD=JSON"),
        (["add-group", "g", "--machine", "m:C", "--set", "election_timeout_s=-1"], "election_timeout_s"),
        (["add-group", "g", "--machine", "mC"], "module:Class"),
        (["start", "--bind", "nonsense"], "HOST:PORT"),
        (["start", "--bind", "10.0.0.1:7400"], "--insecure"),
        (["start", "--workers", "0"], "workers: at least one"),
        (["start", "--beat-interval", "0"], "beat_interval_s: from 0.005"),
        (["start", "--node-purge-failure-time-window", "0"], "node_purge_failure_time_window_s: from 1"),
        (["command", "counter", "[" * 100_000], "JSON"),
    ],
)
def test_a_wrong_call_exits_with_2_and_a_hint(
    words: list[str], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raftfleet.node.supervisor.run", lambda config: 0)  # what is not refused must not run for ever
    monkeypatch.setenv("RAFTFLEET_RUN_DIR", str(tmp_path))
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 2, done.output
    assert hint in done.output


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["command", "g", "1", "--timeout", "nan"], "timeout is a number of seconds"),
        (["command", "g", "1", "--timeout", "inf"], "timeout is a number of seconds"),
        (["query", "g", "1", "--timeout", "1e308"], "timeout is a number of seconds"),
        (["command", "g", "18446744073709551616"], "more than 64 bits"),
        (["add-group", "", "--machine", "m:C"], "a group name has 1 to 255 bytes"),
        (["add-group", "g", "--machine", "m:C", "--replicas", "9" * 20], "more than 64 bits"),
        (["add-group", "g", "--machine", "m:C", "--timeout", "inf"], "timeout is a number of seconds"),
    ],
)
def test_an_argument_that_the_client_refuses_is_a_wrong_call(words: list[str], hint: str, tmp_path: Path) -> None:
    with FakeNode(tmp_path) as node:
        done = CliRunner().invoke(cli.main, [*words, "--run-dir", str(node.run_dir)])
    assert done.exit_code == 2, done.output
    assert hint in re.sub(r"\s+", " ", done.stderr) and done.stdout == ""


def test_keygen_writes_the_secret_key_for_its_owner_alone_and_prints_the_public_one(tmp_path: Path) -> None:
    file = tmp_path / "secret.key"
    done = CliRunner().invoke(cli.main, ["keygen", str(file)])
    assert done.exit_code == 0, done.output
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    keys = load_secret_key(file)
    assert done.stdout == keys.public_key + "\n"
    assert keys.secret_key not in done.output and str(file) in done.stderr


def test_keygen_overwrites_nothing(tmp_path: Path) -> None:
    file = tmp_path / "secret.key"
    file.write_text("somebody's key")
    done = CliRunner().invoke(cli.main, ["keygen", str(file)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "is there already" in done.stderr
    assert file.read_text() == "somebody's key"


def test_keygen_in_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.main, ["keygen", str(tmp_path / "no" / "secret.key")])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "No such file" in done.stderr

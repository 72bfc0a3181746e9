"""docs/operations.md, the command line and the code say the same."""

from __future__ import annotations

import re
from pathlib import Path

from raftfleet.node.cli import main
from raftfleet.node.config import SOURCES
from raftfleet.node.exit_codes import ExitCode

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()


def test_every_option_is_in_the_table_with_its_variable() -> None:
    rows = dict(re.findall(r"^\| `(--[\w-]+)` \| `(RAFTFLEET_\w+)` \|", PAGE, re.MULTILINE))
    assert rows.pop("--config") == "RAFTFLEET_CONFIG"
    assert rows == {source.flag: source.variable for source in SOURCES}


def test_the_command_line_has_every_option_and_names_its_variable() -> None:
    parameters = {parameter.opts[0]: parameter for parameter in main.commands["start"].params}
    assert set(parameters) == {source.flag for source in SOURCES} | {"--config"}
    for source in SOURCES:
        assert parameters[source.flag].name == source.field
        assert source.variable in (getattr(parameters[source.flag], "help", None) or "")


def test_every_exit_code_is_in_the_table() -> None:
    rows = {int(number): name for number, name in re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", PAGE, re.MULTILINE)}
    assert rows == {code.value: code.name for code in ExitCode}


def test_systemd_does_not_repeat_what_cannot_succeed() -> None:
    (codes,) = re.findall(r"^RestartPreventExitStatus=([\d ]+)$", PAGE, re.MULTILINE)
    assert {int(code) for code in codes.split()} == {
        ExitCode.USAGE,
        ExitCode.CANNOT_BOOT,
        ExitCode.RUN_DIR_BUSY,
        ExitCode.DATA_DIR_REFUSED,
    }

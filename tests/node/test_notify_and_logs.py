"""What a node says to its service manager and on stderr."""

from __future__ import annotations

import json
import logging
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raftfleet.node import logs
from raftfleet.node.notify import sd_notify


@pytest.fixture(autouse=True)
def root_logger_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(tmp_path: Path, abstract: bool) -> None:
    path = f"\0rf-{tmp_path}"[:100] if abstract else str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        environ = {"NOTIFY_SOCKET": path.replace("\0", "@")}
        assert sd_notify("READY=1", "STATUS=active in z1", environ=environ)
        assert manager.recv(1000) == b"READY=1\nSTATUS=active in z1"


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "/no/such"}, {"NOTIFY_SOCKET": "x"}])
def test_without_a_service_manager_nothing_happens(environ: dict[str, str]) -> None:
    assert not sd_notify("READY=1", environ=environ)


def test_a_text_line_names_node_and_process(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="info", format="text", node="n1", process="shard-0")
    logging.getLogger("raftfleet.x").warning("group %s is slow", "g1")
    logging.getLogger("raftfleet.x").debug("not shown")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("Z WARNING n1/shard-0 group g1 is slow")


def test_a_json_line_is_one_object_with_its_exception(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="debug", format="json", node="n1", process="manager")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("raftfleet.x").error("it failed", exc_info=sys.exc_info())
    (line,) = capsys.readouterr().err.splitlines()
    fields = json.loads(line)
    assert fields.pop("time").endswith("Z")
    assert "ValueError: two\nlines" in fields.pop("exception")
    assert fields == {
        "level": "error",
        "node": "n1",
        "process": "manager",
        "logger": "raftfleet.x",
        "message": "it failed",
    }

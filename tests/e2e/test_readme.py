"""Every code block of README.md and docs/tutorial.md is run here, in the order of the page.

* ``python`` whose first line is ``# name.py``: becomes that file. Other ``python`` is run as a script.
* ``console``: lines that begin with ``$ `` go to one bash, others are what it must print (stdout and stderr), where
  ``…`` stands for anything. A question to a node is asked again until the answer is right, since nodes come and go at
  their own pace.
* ``sh``: the two commands of the README's first screen, run in a copy of the checkout.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import NamedTuple

import pytest

from raftfleet.testing.ports import PortBlocks

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": ROOT / "README.md", "tutorial.md": ROOT / "docs" / "tutorial.md"}

ANSWER_DEADLINE_S = 30.0
QUESTIONS = ("raftfleet-node nodes", "raftfleet-node groups", "raftfleet-node query", "raftfleet-node status")


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], text.count("\n", 0, match.start()) + 1) for match in found]


class Shell:
    """One bash in a folder of its own, with ``raftfleet-node`` and ``python`` of this interpreter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tools = folder / ".tools"
        tools.mkdir()
        _write_script(tools / "python", f'exec {sys.executable} "$@"')
        _write_script(tools / "raftfleet-node", f'exec {sys.executable} -m raftfleet.node.cli "$@"')
        environ = {name: value for name, value in os.environ.items() if not name.startswith("RAFTFLEET_")}
        environ["PATH"] = f"{tools}:{environ['PATH']}"
        self._bash = subprocess.Popen(
            ["bash"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env=environ,
            start_new_session=True,
        )
        self._lines: Queue[str] = Queue()
        self._reader = threading.Thread(target=self._read, name="bash's output")
        self._reader.start()

    def _read(self) -> None:
        assert self._bash.stdout is not None
        for line in self._bash.stdout:
            # A bash that is not interactive tells of a killed job at its next command, or later: nobody sees it typed.
            if not re.match(r"bash: line \d+: +\d+ (Killed|Terminated)", line):
                self._lines.put(line.rstrip("\n"))

    def run(self, command: str, deadline_s: float = 90.0) -> str:
        """Run one line and return what it printed. `ready` lines of nodes in the background are left out."""
        assert self._bash.stdin is not None
        self._bash.stdin.write(f'{command}\necho "<end $?>"\n')
        self._bash.stdin.flush()
        printed = []
        end = time.monotonic() + deadline_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except Empty:
                raise AssertionError(f"{command!r} took longer than {deadline_s:g} s; it printed {printed}") from None
            if line.startswith("<end "):
                return "\n".join(printed)
            if not line.startswith("ready "):
                printed.append(line)

    def close(self) -> None:
        """End bash and all nodes that were started in it."""
        assert self._bash.stdin is not None
        self._bash.stdin.write("kill $(jobs -p) 2>/dev/null; wait\n")
        self._bash.stdin.close()
        try:
            self._bash.wait(20.0)
        finally:
            self._bash.kill()
            self._bash.wait()
            self._reader.join(10.0)
            assert self._bash.stdout is not None
            self._bash.stdout.close()


def _write_script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short folder: run directories are made in it, and the path of a Unix socket has at most 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="rf-", dir="/tmp"))
    yield path
    for link in path.glob("run/*/leader_table"):  # of the node that the page kills
        Path(os.readlink(link)).unlink(missing_ok=True)
    shutil.rmtree(path)


@pytest.fixture
def free_ports() -> Iterator[PortBlocks]:
    ports = PortBlocks()
    yield ports
    ports.release()


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_block_does_what_the_page_says(page: str, folder: Path, free_ports: PortBlocks) -> None:
    ports: dict[str, int] = {}
    shell = Shell(folder)
    try:
        for block in blocks(PAGES[page]):
            text = re.sub(r"\b74\d0\b", lambda match: str(_port(match[0], ports, free_ports)), block.text)
            where = f"{page}:{block.line}"
            if block.language == "python":
                run_python(shell, text, where)
            elif block.language == "console":
                run_console(shell, text, where)
            else:
                assert block.language == "sh", f"{where}: a block of {block.language!r} is not run by any test"
    except AssertionError:
        for log in sorted(folder.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text()[-4000:]}", file=sys.stderr)
        raise
    finally:
        shell.close()


def _port(written: str, ports: dict[str, int], free_ports: PortBlocks) -> int:
    if written not in ports:
        ports[written] = free_ports.take_block(3)
    return ports[written]


def run_python(shell: Shell, text: str, where: str) -> None:
    name = re.match(r"# ([a-z_]+\.py)\n", text)
    path = shell.folder / (name[1] if name else "script.py")
    path.write_text(text)
    if not name:
        printed = shell.run("python script.py && echo '<well>'")
        assert printed.endswith("<well>"), f"{where}:\n{printed}"


def run_console(shell: Shell, text: str, where: str) -> None:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        pattern = ".*".join(re.escape(piece) for piece in expected.rstrip("\n").split("…"))
        deadline = time.monotonic() + ANSWER_DEADLINE_S
        while not re.fullmatch(pattern, printed := shell.run(command), re.DOTALL):
            again = any(question in command for question in QUESTIONS) and time.monotonic() < deadline
            assert again, f"{where}: $ {command}\nshould print\n{expected}\nand printed\n{printed}"
            time.sleep(0.2)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the checkout's committed and new files, as a fresh clone has them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    clone = tmp_path / "clone"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name, follow_symlinks=False)
    return clone


def first_screen(word: str) -> str:
    (command,) = [b.text for b in blocks(PAGES["README.md"]) if b.language == "sh" and b.text.rstrip().endswith(word)]
    return command


def test_the_first_command_sets_up_a_fresh_venv_and_runs_the_demo(checkout: Path) -> None:
    done = subprocess.run(
        ["bash", "-ec", first_screen("demo")], cwd=checkout, capture_output=True, text=True, timeout=240.0
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified" in done.stdout


def test_the_second_command_sets_up_tox_and_runs_it(checkout: Path) -> None:
    """All of tox would run this very test again, so TOXENV picks the environment that tries the installed wheel."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("TOX_", "COV"))}
    environ["TOXENV"] = "smoke"
    done = subprocess.run(
        ["bash", "-ec", first_screen("tox")], cwd=checkout, capture_output=True, text=True, timeout=240.0, env=environ
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "congratulations" in done.stdout

"""The pytest plugin as a user's test folder sees it: a pytest of its own, in a folder of its own."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MACHINE = """
import raftfleet

class Count(raftfleet.StateMachine):
    def new(self): return 0
    def command(self, i, arg): return i, i + 1
    def query(self, i, arg): return i
"""


def run_pytest(folder: Path, text: str, *options: str) -> str:
    """What pytest printed. Where raftfleet was installed before it had the plugin, it is named."""
    (folder / "my_count.py").write_text(MACHINE)
    (folder / "test_mine.py").write_text(text)
    known = {entry.name for entry in entry_points(group="pytest11")}
    plugin = [] if "raftfleet" in known else ["-p", "raftfleet.testing.plugin"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RAFTFLEET_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *plugin, "--strict-markers", *options],
        cwd=folder, capture_output=True, text=True, timeout=120.0, env=environ,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_the_plugin_is_installed_with_the_package() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["options.entry_points"]["pytest11"].split() == ["raftfleet", "=", "raftfleet.testing.plugin"]


def test_raftfleet_testing_works_without_pytest() -> None:
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "import raftfleet.testing as t\n"
        "[getattr(t, name) for name in t.__all__]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60.0)


def test_a_simulated_fleet_serves_the_users_machine(tmp_path: Path) -> None:
    told = run_pytest(
        tmp_path,
        """
import pytest, raftfleet

def test_default(fleet):
    assert list(fleet.nodes) == ["n1", "n2", "n3"] and fleet.seed == 1
    fleet.add_group("count", 3, raftfleet.GroupConfig("my_count:Count"))
    client = fleet.client("n2")
    assert client.result(client.command("count", None)) == 0
    fleet.kill_node("n3")
    assert client.result(client.query("count", None, retry=10)) == 1

@pytest.mark.raftfleet(nodes={"a": "x"}, workers=1, seed=7)
def test_marked(fleet):
    assert list(fleet.nodes) == ["a"] and fleet.nodes["a"].workers_count == 1 and fleet.seed == 7

@pytest.mark.raftfleet(nodes={})
class TestEmpty:
    @pytest.mark.raftfleet(seeds=[3, 4])
    def test_inner(self, fleet, raftfleet_seed):
        assert not fleet.nodes and fleet.seed == raftfleet_seed
""",
        "-v",
    )
    assert "4 passed" in told, told
    assert "test_inner[seed3] PASSED" in told and "test_inner[seed4] PASSED" in told


FAILING = """
import pytest

@pytest.mark.raftfleet(seeds=[3, 4])
def test_wrong(fleet):
    fleet.kill_node("n2")
    assert fleet.seed == 3
"""


def test_a_failure_under_a_seed_says_how_to_repeat_it(tmp_path: Path) -> None:
    told = run_pytest(tmp_path, FAILING)
    assert "1 failed, 1 passed" in told, told
    assert "seed 4; repeat it with: pytest 'test_mine.py::test_wrong[seed4]' --raftfleet-seed 4" in told
    assert "n2 is killed" in told
    again = run_pytest(tmp_path, FAILING, "--raftfleet-seed", "4", "test_mine.py::test_wrong[seed4]")
    assert "1 failed" in again and "passed" not in again, again


def test_the_option_is_the_seed_of_a_test_that_names_none(tmp_path: Path) -> None:
    told = run_pytest(tmp_path, "def test_it(fleet): assert fleet.seed == 9", "--raftfleet-seed", "9")
    assert "1 passed" in told, told


def test_the_option_is_the_seed_of_check_under_faults(tmp_path: Path) -> None:
    text = """
from my_count import Count
from raftfleet.testing import check_under_faults

def test_it():
    assert check_under_faults(Count, [None], queries=[None], seeds=range(50), seconds=1.0).seeds == 1
"""
    assert "1 passed" in run_pytest(tmp_path, text, "--raftfleet-seed", "5")


def test_a_wrong_argument_of_the_marker_is_refused_by_name(tmp_path: Path) -> None:
    text = "import pytest\n\n@pytest.mark.raftfleet(sed=3)\ndef test_it(fleet): pass\n"
    told = run_pytest(tmp_path, text)
    assert "takes the arguments app_dirs, nodes, options, seed, seeds, workers, by name; not sed" in told, told


def test_a_users_own_fixture_of_the_same_name_wins(tmp_path: Path) -> None:
    text = """
import pytest

@pytest.fixture
def fleet(): return "mine"

@pytest.mark.raftfleet(seeds=[1, 2])
def test_it(fleet): assert fleet == "mine"
"""
    assert "1 passed" in run_pytest(tmp_path, text)


@pytest.mark.e2e
def test_real_nodes_import_from_the_tests_folder_and_are_gone_afterwards(tmp_path: Path) -> None:
    text = """
import pytest, raftfleet

@pytest.mark.raftfleet(nodes={"a": "z1", "b": "z2"}, options={"beat_interval": 0.1})
def test_it(local_fleet):
    client = local_fleet.connect("a")
    client.add_consensus_group("count", 3, raftfleet.GroupConfig("my_count:Count"))
    assert client.command("count", None) == 0
    assert "--beat-interval" in local_fleet.command_line("b")

@pytest.mark.raftfleet(nodes={})
def test_wrong(local_fleet):
    local_fleet.start_node("only", "z1")
    assert False
"""
    told = run_pytest(tmp_path, text)
    assert "1 failed, 1 passed" in told, told
    assert "log of node only" in told

"""Under tox, what is tested is the wheel that users get, not the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import raftfleet
from raftfleet import workers

FILES = [raftfleet.__file__, workers.__file__]


@pytest.mark.skipif("TOX_ENV_NAME" not in os.environ, reason="not under tox")
def test_tests_import_the_installed_package() -> None:
    assert all("site-packages" in Path(file).parts for file in FILES)


@pytest.mark.skipif("TOX_ENV_NAME" not in os.environ, reason="not under tox")
def test_nodes_that_tests_start_import_the_installed_package() -> None:
    shown = subprocess.run(
        [sys.executable, "-c", "import raftfleet, raftfleet.workers as w; print(raftfleet.__file__, w.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert shown.stdout.split() == FILES


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(raftfleet.__file__).parent / "py.typed").exists()

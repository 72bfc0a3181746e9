"""Fixtures of the tests on real nodes. Everything in this folder is marked ``e2e``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from raftfleet.testing import LocalFleet

HERE = Path(__file__).parent
APPS = HERE / "apps"
ROOT = HERE.parent.parent

_FAILED = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("e2e")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" and report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.fixture
def fleet(request: pytest.FixtureRequest) -> Iterator[LocalFleet]:
    """A fleet without nodes yet. Its logs are shown when the test failed; it is stopped in any case."""
    with LocalFleet(app_dirs=[APPS]) as local_fleet:
        yield local_fleet
        if request.node.stash.get(_FAILED, False):
            local_fleet.report_logs()

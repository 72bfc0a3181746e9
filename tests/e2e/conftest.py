"""Fixtures of the tests on real nodes. Everything in this folder is marked ``e2e``."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
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


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No process, thread, descriptor or shared-memory segment survives a test."""
    before = _belongings()
    yield
    deadline = time.monotonic() + 5.0
    while (left := {what: now - before[what] for what, now in _belongings().items()}) and any(left.values()):
        assert time.monotonic() < deadline, f"left behind: { {what: some for what, some in left.items() if some} }"
        time.sleep(0.05)


def _belongings() -> dict[str, set[str]]:
    this = psutil.Process()
    return {
        "processes": {f"{child.pid} {child.name()}" for child in _living(this)},
        "threads": {thread.name for thread in threading.enumerate()},
        "descriptors": _open_sockets_and_maps(),
        "segments": {name for name in os.listdir("/dev/shm") if name.startswith(f"raftfleet-{os.getuid()}-")},
        "folders": {name for name in os.listdir("/tmp") if name.startswith("rf-")},
    }


def _living(this: psutil.Process) -> Iterator[psutil.Process]:
    for child in this.children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE:
                yield child
        except psutil.NoSuchProcess:
            pass


def _open_sockets_and_maps() -> set[str]:
    """Sockets and segments that are open, by target: other files are pytest's own business."""
    targets = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:
            continue
        if target.startswith(("socket:", "/dev/shm/raftfleet-")):
            targets.add(f"{descriptor} {target}")
    return targets

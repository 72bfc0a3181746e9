"""What holds for every test: it ends with no process, thread, descriptor, shared segment or folder left behind.

Helpers of tests are plain modules below tests/, imported from there: ``from sim.harness import ...``.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator

import pytest
from leaks import leaks_since, snapshot

GRACE_S = 20.0  # for what is on its way out when a test returns: a killed process, a joined thread's kernel task


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-transcripts", action="store_true", help="write tests/core/transcripts anew, to be reviewed as a diff"
    )


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves something behind. `@pytest.mark.leaves("why")` is for the few that must."""
    before = snapshot()
    yield
    if request.node.get_closest_marker("leaves") or not leaks_since(before):
        return
    gc.collect()
    deadline = time.monotonic() + GRACE_S
    leaks = leaks_since(before)
    while leaks and time.monotonic() < deadline:
        time.sleep(0.02)
        leaks = leaks_since(before)
    if leaks:
        pytest.fail("left behind: " + "; ".join(leaks), pytrace=False)


@pytest.fixture
def eventually() -> Callable[..., None]:
    """``eventually(condition, what, within_s=60)``: poll until the condition holds, or fail naming it."""

    def wait(condition: Callable[[], object], what: str, within_s: float = 60.0) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            if time.monotonic() >= deadline:
                pytest.fail(f"within {within_s:g} s this did not come about: {what}")
            time.sleep(0.01)

    return wait

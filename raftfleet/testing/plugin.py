"""The pytest plugin: fixtures ``fleet`` and ``local_fleet``, the marker ``raftfleet``, the option ``--raftfleet-seed``.

Installed with raftfleet (entry point ``pytest11``), so a test need not import or enable anything::

    def test_jobs_survive_a_dead_node(fleet):  # three simulated nodes; milliseconds
        fleet.add_group("jobs", 3, GroupConfig("job_queue:JobQueue"))
        client = fleet.client("n1")
        client.result(client.command("jobs", ["push", "sweep"]))
        fleet.kill_node("n3")
        assert client.result(client.query("jobs", "length", retry=10)) == 1


    @pytest.mark.raftfleet(nodes={"n1": "z1", "n2": "z2"}, app_dirs=["../app"])
    def test_jobs_on_real_nodes(local_fleet):  # real processes; seconds
        client = local_fleet.connect("n1")

The marker's arguments, all optional:

* ``nodes``: ``{name: zone}``, default n1, n2, n3 in zones z1, z2, z3; ``{}``: the test starts them itself.
* ``workers``: shard workers of each node: two for ``fleet``, one for ``local_fleet``.
* ``seed``, or ``seeds`` for one run of the test each: of ``fleet``. ``--raftfleet-seed N`` takes precedence over both,
  and over the seeds of :func:`~raftfleet.testing.faults.check_under_faults`.
* ``app_dirs``: where the nodes of ``local_fleet`` import state machines from, relative to the test's folder, which is
  the default. ``fleet`` imports them as the test itself does.
* ``options``: command line options for every node of ``local_fleet``, such as ``{"beat_interval": 0.05}``.

A simulated fleet that is broken by a test's seed says the seed with the failure, and what happened before. The only
module of raftfleet that imports pytest; nothing else of raftfleet is imported before a fixture is used.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from raftfleet.testing import seeds as seeds_module

if TYPE_CHECKING:
    from raftfleet.testing.fleet import SimFleet
    from raftfleet.testing.local_fleet import LocalFleet

NODES = {"n1": "z1", "n2": "z2", "n3": "z3"}
ARGUMENTS = frozenset(("nodes", "workers", "seed", "seeds", "app_dirs", "options"))

_FLEET = pytest.StashKey["SimFleet"]()
_FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--raftfleet-seed N``."""
    group = parser.getgroup("raftfleet")
    group.addoption(
        "--raftfleet-seed",
        type=int,
        metavar="N",
        help="play simulated fleets with this seed alone, to repeat a failure",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known, and the seed that was asked for."""
    config.addinivalue_line(
        "markers",
        "raftfleet(nodes, workers, seed, seeds, app_dirs, options): what the fixtures fleet and local_fleet are like",
    )
    seeds_module.only_seed = config.getoption("raftfleet_seed", None)


def pytest_unconfigure() -> None:
    """The next run in this process has a seed of its own."""
    seeds_module.only_seed = None


def _settings(node: Any) -> dict[str, Any]:
    """The arguments of the nearest marker; those of outer ones where it says nothing."""
    settings: dict[str, Any] = {}
    for marker in node.iter_markers("raftfleet"):
        if marker.args or not ARGUMENTS.issuperset(marker.kwargs):
            raise pytest.UsageError(
                f"{node.nodeid}: the marker raftfleet takes the arguments {', '.join(sorted(ARGUMENTS))}, by name; not"
                f" {', '.join([*map(repr, marker.args), *sorted(set(marker.kwargs) - ARGUMENTS)])}"
            )
        settings = {**marker.kwargs, **settings}
    return settings


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One run for each of the marker's ``seeds``."""
    if "raftfleet_seed" in metafunc.fixturenames:
        wanted = _settings(metafunc.definition).get("seeds")
        if wanted is not None:
            metafunc.parametrize("raftfleet_seed", seeds_module.chosen_seeds(wanted), ids=lambda seed: f"seed{seed}")


@pytest.fixture
def raftfleet_seed(request: pytest.FixtureRequest) -> int:
    """The seed of ``fleet``: from the option, the marker, or 1."""
    (seed,) = seeds_module.chosen_seeds([_settings(request.node).get("seed", 1)])
    return seed


@pytest.fixture
def fleet(request: pytest.FixtureRequest, raftfleet_seed: int) -> SimFleet:
    """A simulated fleet (:class:`raftfleet.testing.SimFleet`) whose nodes run already."""
    from raftfleet.testing.fleet import SimFleet, SimFleetOptions

    settings = _settings(request.node)
    nodes = settings.get("nodes", NODES)
    made = SimFleet(raftfleet_seed, SimFleetOptions(workers=settings.get("workers", 2)))
    request.node.stash[_FLEET] = made
    if nodes:
        made.start(nodes)
    return made


@pytest.fixture
def local_fleet(request: pytest.FixtureRequest) -> Iterator[LocalFleet]:
    """A fleet of real nodes (:class:`raftfleet.testing.LocalFleet`) that run already; stopped after the test."""
    from raftfleet.testing.local_fleet import LocalFleet

    settings = _settings(request.node)
    folder = request.path.parent
    app_dirs = [folder / Path(name) for name in settings.get("app_dirs", ["."])]
    with LocalFleet(app_dirs=app_dirs, options=settings.get("options")) as made:
        nodes = settings.get("nodes", NODES)
        if nodes:
            made.start_nodes(nodes, workers=settings.get("workers", 1))
        yield made
        if request.node.stash.get(_FAILED, False):
            made.report_logs()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    """A failed test tells its fleet's seed and story."""
    report = yield
    if report.when == "call" and report.failed:
        item.stash[_FAILED] = True
    made = item.stash.get(_FLEET, None)
    if made is not None and report.when in ("setup", "call") and report.failed:
        again = f"seed {made.seed}; repeat it with: pytest {item.nodeid!r} --raftfleet-seed {made.seed}"
        report.sections.append(("simulated fleet", f"{again}\n{made.report()}"))
    return report

"""The repository keeps its own shape: which folders are packages, and who may import whom.

These tests read the sources of the checkout; they import nothing of raftfleet.
"""

from __future__ import annotations

import ast
import configparser
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# package -> what it may import of ours, besides itself. `errors` and `machine` are leaves: they import core at most.
LEAVES = {"raftfleet.errors", "raftfleet.machine"}
ARROWS: dict[str, set[str]] = {
    "raftfleet.core": set(),
    "raftfleet.fleet": {"raftfleet.core"} | LEAVES,
    "raftfleet.wire": {"raftfleet.core"} | LEAVES,
    "raftfleet.storage": {"raftfleet.core", "raftfleet.fleet", "raftfleet.wire"} | LEAVES,
    "raftfleet.transport": {"raftfleet.core", "raftfleet.fleet", "raftfleet.wire"} | LEAVES,
    # The two modules of node are what a client needs to find its node: no process, no ZeroMQ behind them.
    "raftfleet.client": {"raftfleet.core", "raftfleet.wire", "raftfleet.node.leader_table", "raftfleet.node.rundir"}
    | LEAVES,
    "raftfleet.workers": {
        "raftfleet.core",
        "raftfleet.fleet",
        "raftfleet.wire",
        "raftfleet.storage",
        "raftfleet.transport",
        "raftfleet.node",
    }
    | LEAVES,
    "raftfleet.node": {"raftfleet"},
    "raftfleet.testing": {"raftfleet"},
}
LEAF_ARROWS = {"raftfleet.errors": set[str](), "raftfleet.machine": {"raftfleet.core", "raftfleet.errors"}}

# Sans-IO: time and randomness arrive as arguments, bytes come and go as values.
SANS_IO = ("raftfleet.core", "raftfleet.fleet", "raftfleet.wire", "raftfleet.client.core")
IO_MODULES = set(
    "asyncio concurrent datetime mmap multiprocessing os pathlib random secrets select selectors shutil signal "
    "socket ssl subprocess tempfile threading time uuid zmq".split()
)
ZMQ_USERS = ("raftfleet.transport", "raftfleet.workers", "raftfleet.testing", "raftfleet.node")
NEVER = {"pickle", "marshal", "shelve", "workers"}


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def packages() -> list[str]:
    return setup_cfg()["options"]["packages"].split()


def folder_of(package: str) -> Path:
    if package == "raftfleet.workers":
        return ROOT / "workers"
    return ROOT / package.replace(".", "/")


def sources(package: str) -> dict[str, Path]:
    """Module name -> file, of the modules that lie directly in the package."""
    found = {}
    for path in sorted(folder_of(package).glob("*.py")):
        found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


def all_sources() -> dict[str, Path]:
    return {module: path for package in packages() for module, path in sources(package).items()}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(path: Path, module: str, *, at_run_time: bool) -> Iterator[str]:
    """What a file imports, inside functions too; `at_run_time` leaves out what only type checkers see."""

    def visit(node: ast.AST) -> Iterator[str]:
        if at_run_time and is_type_checking(node):
            assert isinstance(node, ast.If)
            for child in node.orelse:
                yield from visit(child)
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = path.name == "__init__.py"
                parts = module.split(".")
                up = parts[: len(parts) - node.level + (1 if is_package else 0)]
                base = ".".join([*up, *([base] if base else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(), str(path)))


def is_within(name: str, area: str) -> bool:
    return name == area or name.startswith(area + ".")


def package_of(module: str) -> str:
    return max((package for package in packages() if is_within(module, package)), key=len)


def test_the_list_of_packages_is_the_list_of_folders() -> None:
    folders = {"raftfleet", "raftfleet.workers"}
    for top in (ROOT / "raftfleet", ROOT / "workers"):
        prefix = "raftfleet" if top.name == "raftfleet" else "raftfleet.workers"
        for folder, _names, files in os.walk(top):  # does not follow the link raftfleet/workers
            if any(name.endswith(".py") for name in files):
                below = Path(folder).relative_to(top).parts
                folders.add(".".join([prefix, *below]))
    assert sorted(packages()) == sorted(folders)


def test_every_package_says_in_its_first_line_what_it_is() -> None:
    for package in packages():
        docstring = ast.get_docstring(ast.parse((folder_of(package) / "__init__.py").read_text()))
        assert docstring, f"{package} has no docstring"


def test_every_module_opens_with_a_docstring() -> None:
    silent = [module for module, path in all_sources().items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent


def test_workers_is_a_link_that_can_be_committed() -> None:
    link = ROOT / "raftfleet" / "workers"
    assert link.is_symlink(), "a checkout without symlinks builds a wheel that lacks raftfleet.workers"
    assert os.readlink(link) == "../workers"
    assert setup_cfg()["options"]["package_dir"].split() == ["raftfleet.workers", "=", "workers"]


@pytest.mark.parametrize("package", sorted(ARROWS))
def test_imports_follow_the_arrows(package: str) -> None:
    allowed = ARROWS[package] | {package}
    wrong = [
        f"{module} imports {name}"
        for module, path in sources(package).items()
        for name in imports(path, module, at_run_time=False)
        if is_within(name, "raftfleet") and not any(is_within(name, area) for area in allowed)
    ]
    assert not wrong


def test_every_package_has_its_arrows() -> None:
    assert set(packages()) - {"raftfleet"} == set(ARROWS)


@pytest.mark.parametrize("module", sorted(LEAF_ARROWS))
def test_leaves_stay_leaves(module: str) -> None:
    path = all_sources()[module]
    wrong = [
        name
        for name in imports(path, module, at_run_time=False)
        if is_within(name, "raftfleet") and not any(is_within(name, area) for area in LEAF_ARROWS[module] | {module})
    ]
    assert not wrong


def test_tests_are_not_imported_by_production_code() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in all_sources().items()
        # The demo is a local fleet that is shown to a person.
        if not is_within(module, "raftfleet.testing") and module not in ("raftfleet.node.demo", "raftfleet.node.cli")
        for name in imports(path, module, at_run_time=False)
        if is_within(name, "raftfleet.testing")
    ]
    assert not wrong


@pytest.mark.parametrize("area", SANS_IO)
def test_sans_io_code_knows_no_socket_clock_or_dice(area: str) -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in all_sources().items()
        if is_within(module, area)
        for name in imports(path, module, at_run_time=True)
        if name.split(".")[0] in IO_MODULES
    ]
    assert not wrong


def test_nobody_relies_on_the_salted_hash() -> None:
    """Python's own hash of str and bytes differs between processes: no digest, shard or order may come from it."""

    def calls(node: ast.AST) -> Iterator[int]:
        if isinstance(node, ast.FunctionDef) and node.name == "__hash__":
            return  # for dicts of this process
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hash":
            yield node.lineno
        for child in ast.iter_child_nodes(node):
            yield from calls(child)

    wrong = [
        f"{module}:{line}"
        for module, path in all_sources().items()
        if any(is_within(module, area) for area in SANS_IO)
        for line in calls(ast.parse(path.read_text()))
    ]
    assert not wrong


def test_clients_hold_no_zeromq_context() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in all_sources().items()
        if not any(is_within(module, area) for area in ZMQ_USERS)
        for name in imports(path, module, at_run_time=True)
        if is_within(name, "zmq")
    ]
    assert not wrong


def test_nothing_imports_pickle_or_a_top_level_workers() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in all_sources().items()
        for name in imports(path, module, at_run_time=False)
        if name.split(".")[0] in NEVER
    ]
    assert not wrong


@pytest.mark.parametrize("module", ["raftfleet.node.supervisor", "raftfleet.node.restart", "raftfleet.node.rundir"])
def test_the_supervisor_has_no_threads_no_zeromq_and_no_user_code(module: str) -> None:
    path = all_sources()[module]
    wrong = [
        name
        for name in imports(path, module, at_run_time=True)
        if name.split(".")[0] in {"threading", "asyncio", "zmq", "multiprocessing", "concurrent", "importlib"}
        or is_within(name, "raftfleet.machine")
    ]
    assert not wrong

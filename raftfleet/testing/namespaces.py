"""Real nodes in network namespaces, each with an address of its own, whose links a test takes down.

:class:`NamespaceFleet` is a :class:`~raftfleet.testing.local_fleet.LocalFleet` whose nodes do not share loopback: each
lives in a network namespace, whose ``eth0`` is one end of a pair; the other end is a port of a bridge in a namespace of
its own, the *hub*. Nothing of it is in the machine's own namespace, and nothing leaves: the hub has no way out. Clients
speak to nodes over Unix sockets, which namespaces do not separate::

    if reason := why_no_namespaces():
        pytest.skip(reason)
    with NamespaceFleet() as fleet:
        fleet.start_nodes({"n1": "z1", "n2": "z2", "n3": "z3"})
        fleet.unplug("n3")            # the cable is pulled: its link is down
        fleet.split("n1", "n2")       # these ports are on another bridge: two halves of a network
        fleet.plug_all()

Needs root (or CAP_NET_ADMIN and CAP_SYS_ADMIN), iproute2 and util-linux. Namespaces are named ``rf-PID-…``: those that
a killed test left are removed by the next fleet that is made.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raftfleet.testing.local_fleet import LocalFleet, LocalFleetError, LocalNode

__all__ = ["NamespaceFleet", "why_no_namespaces"]

PREFIX = "rf-"
NETNS = Path("/run/netns")
NETWORK = "10.77.0"
COMMAND_DEADLINE_S = 20.0
BRIDGES = ("br0", "br1")


def why_no_namespaces() -> str | None:
    """The reason why this machine has none to offer; None: it has."""
    missing = [tool for tool in ("ip", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"no {' and no '.join(missing)} here (Debian: apt-get install iproute2 util-linux)"
    name = f"{PREFIX}{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", name)
    except LocalFleetError as error:
        return f"network namespaces are not allowed here: {error}"
    try:
        _run("ip", "-n", name, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", name, "link", "add", "end0", "type", "veth", "peer", "name", "end1")
        _run("nsenter", f"--net={NETNS / name}", "true")
    except LocalFleetError as error:
        return f"bridges or links in namespaces are not allowed here: {error}"
    finally:
        _run("ip", "netns", "del", name)
    return None


class NamespaceFleet(LocalFleet):
    """See the module's text; all arguments are LocalFleet's."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._names = f"{PREFIX}{os.getpid()}-{self.folder.name.removeprefix('rf-')}"
        self._hub = f"{self._names}-hub"
        self._made: list[str] = []
        try:
            remove_abandoned()
            self._add(self._hub)
            for bridge in BRIDGES:
                self._ip(self._hub, "link", "add", bridge, "type", "bridge")
                self._ip(self._hub, "link", "set", bridge, "up")
        except BaseException:
            self.close()
            raise

    # ---------------------------------------------------------------- nodes

    def define_node(self, name: str, zone: str | None, *, workers: int = 1, **options: Any) -> LocalNode:
        """As in LocalFleet; the node gets a namespace, an address and a port of the hub."""
        # Links between machines are not loopback: a node wants keys there, or to be told that none are needed.
        node = super().define_node(name, zone, workers=workers, **{"insecure": True, **options})
        number = len(self.nodes)
        node.host = f"{NETWORK}.{number}"
        space, port = self._space(name), f"p{number}"
        self._add(space)
        self._ip(space, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self._hub)
        self._ip(space, "address", "add", f"{node.host}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            self._ip(space, "link", "set", link, "up")
        self._ip(self._hub, "link", "set", port, "master", BRIDGES[0], "up")
        return node

    def command_line(self, name: str) -> list[str]:
        """As in LocalFleet, within the node's namespace."""
        return ["nsenter", f"--net={NETNS / self._space(name)}", "--", *super().command_line(name)]

    def close(self) -> None:
        """Everything is plugged in, stopped and removed."""
        try:
            with contextlib.suppress(LocalFleetError):
                self.plug_all()
            super().close()
        finally:
            for space in reversed(self._made):
                with contextlib.suppress(LocalFleetError):
                    _run("ip", "netns", "del", space)
            self._made.clear()

    # ---------------------------------------------------------------- links

    def unplug(self, name: str) -> None:
        """Take the node's link down: it hears nobody, and nobody hears it."""
        self._ip(self._hub, "link", "set", self._port(name), "down")

    def plug(self, name: str) -> None:
        """Bring the node's link up again."""
        self._ip(self._hub, "link", "set", self._port(name), "up")

    def split(self, *names: str) -> None:
        """Cut the network in two: these nodes hear each other, the others hear each other."""
        for name in self.nodes:
            bridge = BRIDGES[name in names]
            self._ip(self._hub, "link", "set", self._port(name), "master", bridge)

    def plug_all(self) -> None:
        """One network, every link up."""
        self.split()
        for name in self.nodes:
            self.plug(name)

    # ---------------------------------------------------------------- inside

    def _space(self, name: str) -> str:
        return f"{self._names}-{name}"

    def _port(self, name: str) -> str:
        return f"p{list(self.nodes).index(name) + 1}"

    def _add(self, space: str) -> None:
        _run("ip", "netns", "add", space)
        self._made.append(space)

    def _ip(self, space: str, *words: str) -> None:
        _run("ip", "-n", space, *words)


def namespaces() -> list[str]:
    """Names of all namespaces that a fleet of ours made, on this machine."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(name for name in os.listdir(NETNS) if name.startswith(PREFIX))
    return []


def remove_abandoned() -> None:
    """Remove the namespaces of processes that are no more."""
    for name in namespaces():
        pid = name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            with contextlib.suppress(LocalFleetError):
                _run("ip", "netns", "del", name)


def _run(*words: str) -> None:
    """Run a command of the system.

    Raises:
        LocalFleetError: it failed; with what it said.
    """
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S, check=False
    )
    if done.returncode:
        raise LocalFleetError(f"{_line(words)}: {done.stderr.strip() or f'exit code {done.returncode}'}")


def _line(words: Iterable[str]) -> str:
    return " ".join(words)

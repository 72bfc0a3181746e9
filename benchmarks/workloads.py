"""What commands and queries cost: the table of workloads, and how one of them is measured.

All systems run in each round, started anew, one after another; a figure is the median of its rounds. So a slow minute
of the machine hits all systems alike, and rounds do not share a lucky leader.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import psutil
from measuring import Cpu, Histogram, say
from systems import NotInstalled, Raftfleet, System

WARM_UP_PART = 0.25


class Workload(NamedTuple):
    """One row for one system.

    Attributes:
        op: command, query (ReadIndex), lease, stale.
        in_flight: operations under way, of all clients together.
        groups: how many groups they go to in turn.
        where: the clients' node: "here" is the leader's (of the first group), "elsewhere" another.
        clients: client processes.
        value_bytes: size of the argument.
        sync: by the synchronous client.
        batch: messages in one frame (the echo only).
    """

    op: str = "command"
    in_flight: int = 1
    groups: int = 1
    where: str = "here"
    clients: int = 1
    value_bytes: int = 16
    sync: bool = False
    batch: int = 1

    @property
    def key(self) -> str:
        """A short name, such as ``command/64/1g/here``."""
        parts = [self.op, str(self.in_flight), f"{self.groups}g", self.where]
        parts += [f"{self.clients}clients"] * (self.clients > 1)
        parts += [f"{self.value_bytes}B"] * (self.value_bytes != 16)
        parts += ["sync"] * self.sync + [f"batch{self.batch}"] * (self.batch > 1)
        return "/".join(parts)


IN_FLIGHT = (1, 16, 64, 256, 1024)
PEERS_IN_FLIGHT = (1, 64, 256)


def workloads_of(system: type[System], quick: bool) -> list[Workload]:
    """The rows that are measured for a system."""
    if quick:
        rows = [Workload(in_flight=1), Workload(in_flight=64)]
        if issubclass(system, Raftfleet) and not system.durable:
            rows += [Workload(sync=True), Workload(in_flight=64, where="elsewhere"), Workload("query", 64)]
            rows += [Workload("lease", 64), Workload("stale", 64), Workload(in_flight=64, clients=2, groups=60)]
        return rows
    if system.key == "echo":
        return [Workload(in_flight=count) for count in IN_FLIGHT] + [
            Workload(in_flight=count, batch=64) for count in (64, 256, 1024)
        ]
    if not issubclass(system, Raftfleet):
        return [Workload(in_flight=count) for count in PEERS_IN_FLIGHT] + [Workload(in_flight=64, value_bytes=1024)]
    if system.durable:
        return [
            *(Workload(in_flight=count) for count in PEERS_IN_FLIGHT),
            Workload(in_flight=256, groups=60),
            Workload(in_flight=64, value_bytes=1024),
        ]
    if system.key == "raftfleet-zeromq":
        return [
            Workload(sync=True),
            Workload(sync=True, where="elsewhere"),
            *(Workload(in_flight=count) for count in PEERS_IN_FLIGHT),
            Workload(in_flight=256, groups=60),
        ]
    return [
        Workload(sync=True),
        Workload(sync=True, where="elsewhere"),
        *(Workload(in_flight=count) for count in IN_FLIGHT),
        *(Workload(in_flight=count, where="elsewhere") for count in (64, 256)),
        *(Workload(in_flight=count, groups=60) for count in (64, 256, 1024)),
        *(Workload(in_flight=count, groups=1000) for count in (64, 1024)),
        *(Workload(in_flight=64, clients=4), Workload(in_flight=256, clients=4, groups=60)),
        *(Workload(in_flight=64, value_bytes=1024), Workload(in_flight=256, groups=60, value_bytes=1024)),
        *(Workload(op, 64) for op in ("query", "lease", "stale")),
        Workload("stale", 64, where="elsewhere"),
    ]


def measure(system: System, workload: Workload, seconds: float) -> dict[str, Any]:
    """One row, once: rate, latencies, CPU time per operation and role."""
    if workload.op == "lease":
        assert isinstance(system, Raftfleet)
        groups = [system.lease_group()]
    else:
        groups = system.groups(workload.groups)
    clients = [system.client(workload.where, number) for number in range(workload.clients)]
    job = {
        "op": workload.op,
        "groups": groups,
        "in_flight": max(1, workload.in_flight // workload.clients),
        "seconds": seconds * WARM_UP_PART,
        "value_bytes": workload.value_bytes,
        "sync": workload.sync,
        "batch": workload.batch,
    }
    for client in clients:
        client.tell(job)
    for client in clients:
        client.answer()
    roles = system.roles(workload.where)
    roles["client"] = [psutil.Process(client.process.pid) for client in clients]
    leader_pids = {process.pid for process in roles.get("leader", [])}
    if any(client.process.pid in leader_pids for client in clients):
        del roles["client"]  # the client's calls are made in the leader's process
    cpu = Cpu(roles)
    for client in clients:
        client.tell({**job, "seconds": seconds})
    answers = [client.answer() for client in clients]
    spent_s = cpu.spent_s()
    histogram = Histogram()
    for answer in answers:
        histogram.merge(Histogram(answer["counts"], answer["max_us"]))
    if not histogram.count:
        raise RuntimeError(f"{system.title}: not one operation of {workload.key} was done")
    return {
        "count": histogram.count,
        "per_second": histogram.count / max(answer["took_s"] for answer in answers),
        "p50_us": histogram.quantile_us(0.5),
        "p99_us": histogram.quantile_us(0.99),
        "p999_us": histogram.quantile_us(0.999),
        "max_us": histogram.max_us,
        "cpu_us": {role: 1e6 * s / histogram.count for role, s in spent_s.items()},
    }


def run_rounds(
    systems: list[type[System]], rounds: int, seconds: float, quick: bool, rows: list[str] | None = None
) -> Iterator[tuple[str, Any]]:
    """Measure everything, or the rows of these keys.

    Yields ``("row", {...})``, ``("version", (key, text))``, and ``(key, why)`` after ``"skipped"`` or ``"failed"``.
    """
    skipped: set[str] = set()
    for number in range(rounds):
        for kind in systems:
            if kind.key in skipped:
                continue
            say(f"round {number + 1} of {rounds}: {kind.title}")
            try:
                with kind() as system:
                    if number == 0:
                        yield "version", (kind.key, system.version())
                    for workload in workloads_of(kind, quick):
                        if rows and workload.key not in rows:
                            continue
                        row = measure(system, workload, seconds)
                        say(f"  {workload.key}: {row['per_second']:,.0f}/s, p50 {row['p50_us']:,.0f} µs")
                        yield "row", {"system": kind.key, "workload": workload.key, "round": number, **row}
            except RuntimeError as error:  # one system's failure must not cost the figures of the others
                say(f"  failed: {error}")
                yield "failed", (f"{kind.key}, round {number + 1}", str(error))
            except NotInstalled as error:
                skipped.add(kind.key)
                say(f"  skipped: {error}")
                yield "skipped", (kind.key, str(error))

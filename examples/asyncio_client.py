"""Many commands at once from one coroutine: the asyncio client.

Run it:  python examples/asyncio_client.py

A thousand increments of ten counters are under way together on one connection, and the answers of each counter are
exactly 0, 1, 2, …: each was applied once, in some order. Then the outcomes a program should tell apart are shown.
"""

import asyncio
import time

import raftfleet
from raftfleet import errors
from raftfleet.testing import LocalFleet

GROUPS = [f"counter{number}" for number in range(10)]
INCREMENTS_PER_GROUP = 100


async def count(run_dir):
    async with raftfleet.aio.connect(run_dir) as fleet:
        config = raftfleet.GroupConfig("raftfleet.testing.machines:JustAnInt")
        await asyncio.gather(*(fleet.add_consensus_group(name, 3, config) for name in GROUPS))

        began = time.perf_counter()
        names = [name for name in GROUPS for _ in range(INCREMENTS_PER_GROUP)]
        results = await asyncio.gather(*(fleet.command(name, "inc") for name in names))
        took = time.perf_counter() - began
        print(f"{len(results)} increments in flight took {took * 1000:.0f} ms")

        for name in GROUPS:
            seen = sorted(result for group, result in zip(names, results, strict=True) if group == name)
            assert seen == list(range(INCREMENTS_PER_GROUP)), f"{name} answered {seen}"
        print("every counter answered 0 to 99, each once")

        try:
            await fleet.command("counter0", "multiply")
        except errors.CommandFailed as error:  # the state machine raised: the state is what it was
            print("refused by the state machine:", error)
        try:
            await fleet.command("no such counter", "inc")
        except errors.NotApplied as error:  # it did not happen and will not
            print("not applied:", error)
        # errors.OutcomeUnknown would mean: it happened once or not at all. Ask before doing it again.


def main():
    with LocalFleet() as fleet:
        fleet.start_nodes({"n1": "zone1", "n2": "zone2", "n3": "zone3"})
        asyncio.run(count(fleet.nodes["n1"].run_dir))


if __name__ == "__main__":
    main()

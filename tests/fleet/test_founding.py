"""Founding cannot make two fleets, and makes one: many short lives of a few nodes, each from a seed."""

from __future__ import annotations

import random

import pytest
from fleet.founding_world import MS, SECOND, World

SEEDS = 800


def live_badly(world: World, rounds: int) -> None:
    """Nodes start at random moments; partitions, one-way cuts, kills and restarts, lossy and slow networks."""
    rng = world.rng
    world.loss = rng.choice([0.0, 0.05, 0.3])
    world.duplication = rng.choice([0.0, 0.1])
    world.delay_us_max = rng.choice([5 * MS, 50 * MS, 400 * MS])
    if rng.random() < 0.3:  # a fleet that has found itself before trouble comes
        for node in world.nodes:
            world.start(node)
        world.run(rng.randrange(1, 6) * SECOND)
    for _ in range(rounds):
        one_trouble(world, rng)
        world.run(rng.choice([1 * MS, 20 * MS, 100 * MS, 300 * MS, 1000 * MS, 1000 * MS, 4000 * MS]))


def one_trouble(world: World, rng: random.Random) -> None:
    node = rng.choice(world.nodes)
    dice = rng.random()
    if dice < 0.40:
        world.start(node)
    elif dice < 0.50:
        world.kill(node)
    elif dice < 0.54:
        world.kill_manager(node)
    elif dice < 0.58:
        world.kill_shard(node, rng.randrange(world.worker_count))
    elif dice < 0.66:
        other = rng.choice(world.nodes)
        world.cut.add((node.port, other.port))
        if rng.random() < 0.5:
            world.cut.add((other.port, node.port))
    elif dice < 0.84:
        side = set(rng.sample(world.nodes, rng.randrange(1, len(world.nodes))))
        world.cut = {(a.port, b.port) for a in world.nodes for b in world.nodes if (a in side) != (b in side)}
        if rng.random() < 0.5:  # one side loses power and comes back by itself
            for lost in sorted(side, key=lambda n: n.port):
                world.kill(lost)
                world.start(lost)
    else:
        world.cut.clear()


@pytest.mark.simulation
@pytest.mark.parametrize("chunk", range(10))
def test_three_peers_never_found_two_fleets_and_end_in_one(chunk: int) -> None:
    for seed in range(chunk * SEEDS // 10, (chunk + 1) * SEEDS // 10):
        world = World(seed, 3, extra_count=seed % 4)
        try:
            live_badly(world, 14)
            world.heal()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.simulation
@pytest.mark.parametrize("chunk", range(4))
def test_five_peers_and_a_guest_never_found_two_fleets_and_end_in_one(chunk: int) -> None:
    for seed in range(chunk * SEEDS // 20, (chunk + 1) * SEEDS // 20):
        world = World(10_000 + seed, 5, extra_count=seed % 2)
        try:
            live_badly(world, 20)
            world.heal()
        except Exception as error:
            raise AssertionError(f"seed {10_000 + seed}: {error}") from error

"""Shards on disks that lose power, tear, rot, fill up and fail, while members come and go: nothing told is lost.

One seed is one run; it prints itself when it fails. More of them by hand: RAFTFLEET_TEST_CHAOS_SEEDS=1000.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import Any

import pytest
from core.disks import DurableCluster
from core.harness import SECOND_US, WALL_US, Answer, pack

from raftfleet.core.change import ConfigChangeRefused
from raftfleet.core.shard import Effects, Shard
from raftfleet.storage.base import StorageError, StoragePoisoned
from raftfleet.testing.disk import CRASH, EIO, ENOSPC, TEAR, PowerLoss

SEEDS = int(os.environ.get("RAFTFLEET_TEST_CHAOS_SEEDS", "6"))
FIRST = int(os.environ.get("RAFTFLEET_TEST_CHAOS_FIRST", "1"))
INSTANCES = (1, 2, 3, 4)
UIDS = (1, 2)
ROUNDS = 120


class Chaos(DurableCluster):
    """A cluster whose turns are those of a worker: appends leave before the disk is asked, and it may fail then."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.down: dict[int, int] = {}  # instance -> when it comes back
        self.has_rotted = False
        self.removed_us = -5 * SECOND_US
        self.is_calm = False
        self.counts: Counter[str] = Counter()
        super().__init__(len(INSTANCES), uids=(), seed=seed, log_entries_kept=4)
        for uid in UIDS:
            self.create(uid, (1, 2, 3))
        for files in self.files.values():
            files.plan = self.fault

    def fault(self, number: int, name: str) -> int | None:
        if self.is_calm or name not in ("pwrite", "fdatasync", "fallocate", "rename", "sync_dir", "unlink"):
            return None
        draw = self.dice.random()
        if draw < 0.01:
            return CRASH
        if draw < 0.015:
            return EIO
        if draw < 0.03 and name in ("pwrite", "fallocate"):
            return self.dice.choice((ENOSPC, ENOSPC, TEAR)) if name == "pwrite" else ENOSPC
        return None

    def turn(self, instance: int, work: Any = None) -> Effects:
        if instance not in self.shards:
            return Effects({}, [], [])
        try:
            self._turn(instance, work)
        except (PowerLoss, StoragePoisoned) as error:
            self.counts[type(error).__name__] += 1
            self.lose(instance, keep=1.0 if isinstance(error, StoragePoisoned) else self.dice.random())
        return Effects({}, [], [])

    def _turn(self, instance: int, work: Any) -> None:
        shard, keeper = self.durable(instance), self.keepers[instance]
        now_us = self.local_us(instance)
        keeper.now_us = now_us
        shard.begin(now_us, WALL_US + self.now_us)
        if work is not None:
            work(shard)
        if shard.next_deadline_us() <= now_us:
            shard.tick()
        for _ in range(20):
            shard.flush()
            self._emit(instance, shard.take_sends())
            shard.persist()
            self._emit(instance, shard.take_saved_sends())
            shard.apply()
            shard.settle(now_us)
            for token, code, body in shard.take_replies():
                assert isinstance(token, Answer)
                assert token.code is None, "answered twice"
                token.code, token.body = code, body
            self.events += [(instance, *event) for event in shard.take_events()]
            if not shard.has_work:
                break
        shard.check_invariants()
        self.checker.check_members(instance, shard.members)
        (keeper.rest if self.dice.random() < 0.3 else keeper.work)(now_us)
        if shard.is_full:
            self.counts["full"] += 1

    def _emit(self, instance: int, sends: dict[int, list[Any]]) -> None:
        for to, messages in sends.items():
            self.checker.check_sends(instance, to, messages)
            self._post(instance, to, messages)

    def lose(self, instance: int, *, keep: float) -> None:
        """The process is gone; it is started again soon."""
        del self.shards[instance]
        del self.keepers[instance]
        self.files[instance].crash(self.dice, keep=keep)
        if not self.has_rotted and self.dice.random() < 0.2:
            self.rot(instance)
        self.down[instance] = self.now_us + self.dice.randrange(10_000, 3 * SECOND_US)

    def rot(self, instance: int) -> None:
        """Flip a bit of what has long been durable, on a disk whose loss every group can bear.

        A group that is about to lose another voter, by a removal that is not committed everywhere, could not: so there
        are none for a while before, and none after.
        """
        if len(self.shards) < len(INSTANCES) - 1 or self.now_us - self.removed_us < 5 * SECOND_US:
            return
        for shard in self.shards.values():
            for member in shard.members.values():
                if instance in member.voters and len(member.voters) < 3:
                    return
        paths = sorted(name for name in self.files[instance].names if name.endswith(".wal"))
        file = self.files[instance].names[self.dice.choice(paths)]
        assert file is not None
        used = len(file.now.rstrip(b"\0"))
        if used < 8192:
            return
        at = self.dice.randrange(4096, used // 2)  # marks behind it say that it was durable
        for content in (file.now, file.durable):
            content[at] ^= 1 << self.dice.randrange(8)
        self.has_rotted = True
        self.counts["rotten bits"] += 1

    def bring_back(self) -> None:
        for instance, due_us in list(self.down.items()):
            if due_us > self.now_us and not self.is_calm:
                continue
            try:
                self.add_shard(instance)
                del self.down[instance]
                self.counts["restarts"] += 1
            except (PowerLoss, StorageError):
                self.files[instance].crash(self.dice, keep=self.dice.random())

    def advance(self, seconds: float) -> None:
        end_us = self.now_us + int(seconds * SECOND_US)
        while self.now_us < end_us:
            self.bring_back()
            if self.shards:
                self.run_for(min(0.05, (end_us - self.now_us) / SECOND_US))
            else:
                self.now_us += 50_000

    def change_something(self, uid: int) -> None:
        """A leader adds, promotes or removes one, or hands over; refusals are part of it."""
        leader = self.leader(uid)
        if not leader:
            return
        member = self.member(leader, uid)
        other = self.dice.choice([i for i in INSTANCES if i != leader])
        if other in member.learners:
            what = self.dice.choice(("promote", "promote", "promote", "remove_member"))
        elif other in member.voters:
            spares = len(member.voters) > 2 and not self.has_rotted
            what = self.dice.choice(("remove_member", "transfer")) if spares else "transfer"
        else:
            what = "add_learner"

        def work(shard: Shard) -> None:
            try:
                getattr(shard, what)(uid, other)
                self.counts[what] += 1
                if what == "remove_member":
                    self.removed_us = self.now_us
            except ConfigChangeRefused:
                pass

        self.turn(leader, work)

    def remove_the_lost(self) -> None:
        """What the fleet's reconciling does: whose disk lost a member is taken out, and may come in again."""
        for uid in UIDS:
            leader = self.leader(uid)
            lead = self.member(leader, uid).lead if leader else None
            if lead is not None:
                for peer, progress in list(lead.progress.items()):
                    if progress.is_lost:
                        self.turn(leader, lambda shard, peer=peer, uid=uid: _try_remove(shard, uid, peer))  # type: ignore[misc]


def _try_remove(shard: Shard, uid: int, peer: int) -> None:
    try:
        shard.remove_member(uid, peer)
    except (ConfigChangeRefused, KeyError):
        pass


def run(seed: int) -> Counter[str]:
    chaos = Chaos(seed)
    sent: dict[tuple[int, str], Answer] = {}
    for number in range(ROUNDS):
        for uid in UIDS:
            leader = chaos.leader(uid)
            if leader:
                text = f"{uid}-{number}-" + "x" * chaos.dice.choice((1, 10, 2000))
                answer = sent[uid, text] = Answer()
                command = pack(text, len(sent), issued_us=WALL_US + chaos.now_us)
                chaos.turn(leader, lambda shard, u=uid, c=command, a=answer: shard.propose(u, c, a))  # type: ignore[misc]
            if chaos.dice.random() < 0.1:
                chaos.change_something(uid)
        chaos.remove_the_lost()
        chaos.advance(chaos.dice.choice((0.01, 0.1, 0.3)))
    chaos.is_calm = True
    chaos.advance(30)
    for uid in UIDS:
        leader = chaos.settle(uid)
        state = Counter(chaos.state(leader, uid))
        acknowledged = [text for (its_uid, text), answer in sent.items() if its_uid == uid and answer.code == 0]
        lost = [text for text in acknowledged if state[text] != 1]
        assert not lost, f"acknowledged and not there exactly once: {lost[:3]}"
        assert set(state) <= {text for its_uid, text in sent if its_uid == uid}
        assert max(state.values(), default=0) <= 1, "nothing was sent twice"
        chaos.counts["acknowledged"] += len(acknowledged)
        chaos.counts["refused for lack of room"] += sum(a.code == 21 for (u, _), a in sent.items() if u == uid)
    return chaos.counts


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_nothing_acknowledged_is_lost_whatever_the_disks_do(seed: int) -> None:
    counts = run(seed)
    assert counts["acknowledged"] > 10, counts
    assert counts["restarts"] > 0, counts

"""The store against a dict: random work, restarts of all kinds, always the same answer."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from storage.model import Driver
from storage.test_crashes import start

from raftfleet.testing.disk import FakeFiles

UIDS = st.integers(0, 4)


class StoreAgainstDict(RuleBasedStateMachine):
    """Every rule does the same to both; `settle` compares after each restart."""

    @initialize()
    def begin(self) -> None:
        self.disk = FakeFiles()
        self.driver = Driver()
        self.store = start(self.disk, self.driver)
        self.lives = 0

    def known(self, uid: int) -> bool:
        return uid in self.driver.now.groups

    @rule(uid=UIDS)
    def save_group(self, uid: int) -> None:
        self.lives += 1
        self.driver.group(self.store, uid, self.lives, None if uid % 2 else (1, 2))

    @rule(uid=UIDS, up=st.integers(0, 2), vote=st.integers(0, 3))
    def vote(self, uid: int, up: int, vote: int) -> None:
        if self.known(uid):
            group = self.driver.now.groups[uid]
            self.driver.vote(self.store, uid, max(group.term, group.term_at(group.last) or 0) + up, vote)

    @rule(uid=UIDS, back=st.integers(0, 4), count=st.integers(0, 12), up=st.integers(0, 1), size=st.integers(0, 120))
    def append(self, uid: int, back: int, count: int, up: int, size: int) -> None:
        if self.known(uid):
            group = self.driver.now.groups[uid]
            # What a snapshot covers was committed: it is never replaced.
            kept = max((info.index for info in self.store.groups[uid].snapshots), default=0)
            back = min(back, max(group.last - kept, 0))
            term = (group.term_at(group.last) or 1) + up
            if count or back:
                self.driver.append(self.store, uid, back, count, term, size)

    @rule(uid=UIDS, behind=st.integers(0, 3))
    def snapshot(self, uid: int, behind: int) -> None:
        acked = self.driver.acked.groups.get(uid)
        if acked is not None and self.known(uid) and acked.life == self.driver.now.groups[uid].life:
            newest = self.store.snapshot_of(uid)
            if newest is None or max(acked.last - behind, acked.base[0]) >= newest.index:
                self.driver.snapshot(self.store, uid, behind)

    @rule(uid=UIDS, ahead=st.integers(1, 9))
    def install(self, uid: int, ahead: int) -> None:
        if self.known(uid) and uid in self.driver.acked.groups:
            self.driver.sync(self.store)
            self.driver.install(self.store, uid, ahead, 1)

    @rule(uid=UIDS)
    def forget(self, uid: int) -> None:
        self.driver.forget(self.store, uid)
        self.driver.sync(self.store)

    @rule(uid=UIDS)
    def bury(self, uid: int) -> None:
        self.lives += 1
        self.driver.bury(self.store, uid, self.lives)
        self.driver.sync(self.store)

    @rule(key=st.sampled_from("ab"), value=st.binary(max_size=20))
    def note(self, key: str, value: bytes) -> None:
        self.driver.note(self.store, key, value)

    @rule()
    def sync(self) -> None:
        self.driver.sync(self.store)

    @rule(times=st.integers(1, 8), bytes_max=st.integers(1, 2000))
    def work(self, times: int, bytes_max: int) -> None:
        self.driver.work(self.store, times, bytes_max)

    @precondition(lambda self: not self.store.is_dirty)
    @rule()
    def mark(self) -> None:
        self.store.mark()

    @rule()
    def close_and_open(self) -> None:
        self.store.close()
        self.driver.acked = self.driver.now
        self.driver.installs = []
        self.store = start(self.disk, self.driver)

    @rule(seed=st.integers(0, 1000), keep=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    def lose_power(self, seed: int, keep: float) -> None:
        self.disk.crash(random.Random(seed), keep=keep)
        self.store = start(self.disk, self.driver)

    @rule()
    def kill(self) -> None:
        self.disk.kill()
        self.store = start(self.disk, self.driver)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.disk.crash(keep=0.0)
            start(self.disk, self.driver).close()


TestStoreAgainstDict = StoreAgainstDict.TestCase
TestStoreAgainstDict.settings = settings(
    max_examples=80,
    stateful_step_count=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

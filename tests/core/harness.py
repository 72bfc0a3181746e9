"""A few shards driven by hand: every message and every microsecond is the test's to give.

``Cluster`` has no faults of its own. A test cuts, holds or drops what it likes (``cut``, ``hold``, ``drop``), lets time
pass (``run_for``) and looks at members. Messages take 100 µs; all clocks are equal unless ``rates`` says otherwise.
``Lone`` is one shard whose peers the test plays itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgpack

from raftfleet.core.config import GroupConfig
from raftfleet.core.member import Member
from raftfleet.core.messages import NOOP, VOTE_ANSWER, Append, Entry, VoteAnswer
from raftfleet.core.shard import Effects, Shard, ShardSettings
from raftfleet.machine import StateMachine
from raftfleet.testing.checkers import ClusterChecker

START_US = 1_000_000_000
WALL_US = 1_700_000_000_000_000
LATENCY_US = 100
SECOND_US = 1_000_000
CLIENT = b"client-number-01"

Rule = Callable[[int, int, Any], bool]
"""``rule(from instance, to instance, message)``: whether it concerns the message."""


class Journal(StateMachine):
    """Remembers every command, and at what time, index and term of its entry it ran. ``"boom"`` raises."""

    def new(self) -> list[Any]:
        return []

    def command(self, state: list[Any], arg: Any) -> tuple[int, list[Any]]:
        if arg == "boom":
            raise ValueError("boom")
        if arg == "time":
            arg = ["time", self.context.time_us, self.context.index, self.context.seed() & 0xFFFF]
        return len(state) + 1, [*state, arg]

    def query(self, state: list[Any], arg: Any) -> list[Any]:
        if arg == "boom":
            raise KeyError("boom")
        return state


def config(**fields: Any) -> GroupConfig:
    """A group of journals; election timeout 1 s."""
    return GroupConfig(machine="tests:Journal", **fields)


class Answer:
    """A token that fills itself when the core answers."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.body: Any = None

    @property
    def value(self) -> Any:
        assert self.code == 0, (self.code, self.body)
        return msgpack.unpackb(self.body)

    def __repr__(self) -> str:
        return f"Answer({self.code}, {self.body!r})"


def pack(arg: Any, seq: int, *, acked: int = 0, client: bytes = CLIENT, issued_us: int = WALL_US) -> bytes:
    """A command as the client makes it."""
    return bytes(msgpack.packb([client, seq, acked, issued_us, msgpack.packb(arg)]))


class Cluster:
    """Shards 1 to ``count``, the groups in ``uids`` with all of them as voters."""

    def __init__(
        self,
        count: int = 3,
        *,
        uids: tuple[int, ...] = (1,),
        voters: tuple[int, ...] | None = None,
        rates: dict[int, float] | None = None,
        seed: int = 1,
        **fields: Any,
    ) -> None:
        self.config = config(**fields)
        self.now_us = 0
        self.rates = rates or {}
        self.shards: dict[int, Shard] = {}
        self.checker = ClusterChecker()
        self.sent: list[tuple[int, int, Any]] = []  # everything ever sent
        self.events: list[tuple[Any, ...]] = []  # (instance, kind, ...)
        self.held: list[tuple[int, int, Any]] = []
        self._frames: list[tuple[int, int, int, list[Any]]] = []  # (due, from, to, messages)
        self._drops: list[Rule] = []
        self._holds: list[Rule] = []
        self._seq = 0
        self._rng = random.Random(seed)
        for instance in range(1, count + 1):
            self.add_shard(instance)
        for uid in uids:
            self.create(uid, voters or tuple(range(1, count + 1)))

    # -- shards ----------------------------------------------------------------------------------------------------

    def add_shard(self, instance: int) -> Shard:
        shard = Shard(instance, random.Random(self._rng.getrandbits(64)), ShardSettings())
        shard.may_create = lambda uid: (f"group-{uid}", self.config, Journal(), None)
        self.shards[instance] = shard
        return shard

    def create(self, uid: int, voters: tuple[int, ...], campaign: int = 1) -> None:
        for instance in voters:
            self.turn(
                instance,
                lambda shard, i=instance: shard.create_group(  # type: ignore[misc]
                    uid, f"group-{uid}", self.config, Journal(), voters, campaign=i == campaign
                ),
            )

    def crash(self, instance: int) -> None:
        """The shard and its memory are gone."""
        del self.shards[instance]

    def member(self, instance: int, uid: int = 1) -> Member:
        return self.shards[instance].members[uid]

    def leader(self, uid: int = 1) -> int:
        """The leader with the highest term; 0 if there is none."""
        leaders = [(s.members[uid].term, i) for i, s in self.shards.items() if uid in s.members and s.members[uid].lead]
        return max(leaders)[1] if leaders else 0

    def state(self, instance: int, uid: int = 1) -> list[Any]:
        state: list[Any] = self.member(instance, uid).state
        return state

    # -- the network -----------------------------------------------------------------------------------------------

    def drop(self, rule: Rule) -> None:
        """Lose what the rule concerns, from now on."""
        self._drops.append(rule)

    def hold(self, rule: Rule) -> None:
        """Keep what the rule concerns in ``held``, from now on."""
        self._holds.append(rule)

    def cut(self, *pairs: tuple[int, int]) -> None:
        """Lose everything in these directions."""
        self.drop(lambda a, b, m: (a, b) in pairs)

    def isolate(self, *instances: int) -> None:
        """Lose everything between these and the others."""
        self.drop(lambda a, b, m: (a in instances) != (b in instances))

    def heal(self) -> None:
        """No drops and holds any more; what is held stays held until ``release``."""
        self._drops.clear()
        self._holds.clear()

    def release(self) -> None:
        """What was held arrives now."""
        held, self.held = self.held, []
        for a, b, message in held:
            self._frames.append((self.now_us + LATENCY_US, a, b, [message]))

    def inject(self, sender: int, receiver: int, message: Any) -> None:
        """Let ``receiver`` receive a message at once, whoever made it."""
        self.turn(receiver, lambda shard: shard.receive(sender, [message]))

    # -- time ------------------------------------------------------------------------------------------------------

    def local_us(self, instance: int) -> int:
        return START_US + int(self.now_us * self.rates.get(instance, 1.0))

    def turn(self, instance: int, work: Callable[[Shard], object] | None = None) -> Effects:
        """One turn of a shard's loop."""
        shard = self.shards[instance]
        shard.begin(self.local_us(instance), WALL_US + self.now_us)
        if work is not None:
            work(shard)
        if shard.next_deadline_us() <= self.local_us(instance):
            shard.tick()
        effects = shard.finish()
        for to, messages in effects.sends.items():
            self._post(instance, to, messages)
        for token, code, body in effects.replies:
            assert isinstance(token, Answer)
            assert token.code is None, f"answered twice: {token} {code}"
            token.code, token.body = code, body
        self.events += [(instance, *event) for event in effects.events]
        shard.check_invariants()
        self.checker.check_members(instance, shard.members)
        for to, messages in effects.sends.items():
            self.checker.check_sends(instance, to, messages)
        return effects

    def _post(self, sender: int, receiver: int, messages: list[Any]) -> None:
        passed = []
        for message in messages:
            self.sent.append((sender, receiver, message))
            if any(rule(sender, receiver, message) for rule in self._drops):
                continue
            if any(rule(sender, receiver, message) for rule in self._holds):
                self.held.append((sender, receiver, message))
                continue
            passed.append(message)
        if passed:
            self._frames.append((self.now_us + LATENCY_US, sender, receiver, passed))

    def run_for(self, seconds: float) -> None:
        """Let time pass: frames arrive, timers run."""
        end_us = self.now_us + int(seconds * SECOND_US)
        while True:
            due = [(frame[0], 0) for frame in self._frames]
            for instance, shard in self.shards.items():
                rate = self.rates.get(instance, 1.0)
                due.append((int((shard.next_deadline_us() - START_US) / rate) + 1, instance))
            time_us, instance = min(due, default=(end_us + 1, 0))
            if time_us > end_us:
                self.now_us = end_us
                return
            self.now_us = max(self.now_us, time_us)
            if instance:
                self.turn(instance)
                continue
            index = min(range(len(self._frames)), key=lambda i: self._frames[i][0])
            _, sender, receiver, messages = self._frames.pop(index)
            if receiver in self.shards:
                self.turn(receiver, lambda shard: shard.receive(sender, messages))  # noqa: B023

    def settle(self, uid: int = 1) -> int:
        """Run until there is an established leader; returns it."""
        for _ in range(100):
            leader = self.leader(uid)
            if leader and self.member(leader, uid).is_established:
                self.run_for(0.3)
                if self.leader(uid) == leader:
                    return leader
            self.run_for(0.1)
        raise AssertionError("no leader within 10 s")

    # -- requests --------------------------------------------------------------------------------------------------

    def propose(self, instance: int, arg: Any, uid: int = 1, **header: Any) -> Answer:
        """Hand a command to a shard; time does not move."""
        if "seq" not in header:
            self._seq += 1
            header["seq"] = self._seq
        answer = Answer()
        header.setdefault("issued_us", WALL_US + self.now_us)
        self.turn(instance, lambda shard: shard.propose(uid, pack(arg, **header), answer))
        return answer

    def command(self, arg: Any, uid: int = 1, **header: Any) -> Any:
        """Run a command to its result."""
        answer = self.propose(self.leader(uid), arg, uid, **header)
        self.run_for(0.05)
        return answer.value

    def query(self, instance: int, arg: Any = "all", uid: int = 1, *, stale: bool = False) -> Answer:
        """Hand a query to a shard; time does not move."""
        answer = Answer()
        self.turn(instance, lambda shard: shard.query(uid, msgpack.packb(arg), answer, stale=stale))
        return answer

    def change(self, what: str, instance: int, uid: int = 1) -> None:
        """``add_learner``, ``promote``, ``remove_member`` or ``transfer`` at the leader."""
        self.turn(self.leader(uid), lambda shard: getattr(shard, what)(uid, instance))

    def told(self, kind: type, since: int = 0) -> list[tuple[int, int, Any]]:
        """What was sent of one kind of message."""
        return [row for row in self.sent[since:] if type(row[2]) is kind]

    def happened(self, kind: str) -> list[tuple[Any, ...]]:
        """Events of one kind."""
        return [event for event in self.events if event[1] == kind]


class Lone:
    """Shard 1 with a member of group 1 among ``voters``; the test is everyone else."""

    def __init__(self, voters: tuple[int, ...] | None = (1, 2, 3), **fields: Any) -> None:
        self.shard = Shard(1, random.Random(1), ShardSettings())
        self.now_us = START_US
        self.sends: list[tuple[int, Any]] = []
        self.answers: list[tuple[object, int, Any]] = []
        self.shard.begin(self.now_us, WALL_US)
        self.shard.may_create = lambda uid: (f"group-{uid}", config(**fields), Journal(), None)
        if voters is not None:
            self.shard.create_group(1, "group-1", config(**fields), Journal(), voters)
        self.turn()

    @property
    def member(self) -> Member:
        return self.shard.members[1]

    def turn(self, work: Callable[[Shard], object] | None = None, *, tick: bool = False) -> list[tuple[int, Any]]:
        """One turn 1 ms later; returns ``(receiver, message)`` of what it sent."""
        self.now_us += 1000
        self.shard.begin(self.now_us, WALL_US + self.now_us - START_US)
        if work is not None:
            work(self.shard)
        if tick and self.shard.next_deadline_us() <= self.now_us:
            self.shard.tick()
        effects = self.shard.finish()
        self.shard.check_invariants()
        sends = [(to, message) for to, messages in effects.sends.items() for message in messages]
        self.sends += sends
        self.answers += effects.replies
        return sends

    def receive(self, sender: int, *messages: Any) -> list[Any]:
        """Messages from ``sender``; returns what is sent back to it."""
        return [m for to, m in self.turn(lambda shard: shard.receive(sender, list(messages))) if to == sender]

    def elect(self, voter: int) -> None:
        """Wait until it campaigns and let ``voter`` vote for it."""
        self.pass_time(3)
        member = self.member
        self.receive(voter, VoteAnswer(VOTE_ANSWER, 1, member.term + 1, True, True))
        self.receive(voter, VoteAnswer(VOTE_ANSWER, 1, member.term, False, True))
        assert member.lead is not None, member.role

    def pass_time(self, seconds: float) -> list[tuple[int, Any]]:
        """Let time pass, turn by turn at each deadline; returns what was sent."""
        end_us = self.now_us + int(seconds * SECOND_US)
        first = len(self.sends)
        while self.shard.next_deadline_us() < end_us:
            self.now_us = max(self.now_us, self.shard.next_deadline_us())
            self.turn(tick=True)
        self.now_us = end_us
        return self.sends[first:]


def append(
    term: int, prev: tuple[int, int], terms: list[int], *, commit: int = 0, stamp: int = 1, life: int = 0, uid: int = 1
) -> Append:
    """An append of empty entries: ``prev`` = (index, term), ``terms`` of the entries after it."""
    entries = [Entry(t, NOOP, b"") for t in terms]
    return Append(1, uid, term, prev[0], prev[1], commit, stamp, life, entries)

"""A cluster that writes down what it does, as prose that a person reviews: the source of ``transcripts/*.txt``.

Times are seconds since the scene began, by the test's clock. A line tells a message when it is sent, or an event of
the core; ``(lost)`` and ``(held)`` are what the scene does to a message. Beats are left out unless a scene is about
them. Terms are written as they are counted: ``term 3``, or ``epoch 1 term 3`` after a repair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
from core.harness import LATENCY_US, SECOND_US, Answer, Cluster

from raftfleet.core import messages as m
from raftfleet.core import sessions
from raftfleet.core.membership import Membership
from raftfleet.core.shard import Effects, Shard

HEADER = "# Written by tests/core/test_transcripts.py; rewrite with: pytest tests/core --rewrite-transcripts\n"
WIDTH = 118


class Story(Cluster):
    """See the module's text. ``lines`` is the transcript."""

    def __init__(self, count: int = 3, *, opening: str = "", with_beats: bool = False, **options: Any) -> None:
        self.lines: list[str] = []
        self._with_beats = with_beats
        self._is_silent = not opening
        self._pending: list[str] = []
        self._told_at = ""
        if opening:
            self.say(opening)
        super().__init__(count, **options)
        self._is_silent = False

    # -- what a scene says itself ----------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """A line of the narrator."""
        self.lines += ["", f"-- {text}"]
        self._told_at = ""

    def end(self, uid: int = 1) -> None:
        """How everything stands."""
        self.say("in the end")
        for instance, shard in sorted(self.shards.items()):
            member = shard.members.get(uid)
            if member is None:
                self.lines.append(f"        {instance} has no member of the group")
                continue
            role = "learner" if member.is_learner else member.role
            self.lines.append(
                f"        {instance}: {role} in {term(member.term)}, log {member.log.first_index} to"
                f" {member.last_index}, commit {member.commit}, {who(member.membership)}, state {member.state}"
            )

    def skip(self, seconds: float) -> None:
        """Let time pass without a word."""
        self._is_silent = True
        self.run_for(seconds)
        self._is_silent = False

    def ask(self, instance: int, arg: Any) -> Answer:
        """A command, with the answer told when it comes."""
        self._tell(f"a client asks {instance}: {arg!r}")
        return self.propose(instance, arg)

    def read(self, instance: int, *, stale: bool = False) -> Answer:
        """A query, with the answer told when it comes."""
        self._tell(f"a client asks {instance}: what is the state?" + " (stale will do)" * stale)
        return self.query(instance, stale=stale)

    # -- what the cluster does -------------------------------------------------------------------------------------

    def turn(self, instance: int, work: Callable[[Shard], object] | None = None) -> Effects:
        before = len(self.events)
        effects = super().turn(instance, work)
        for event in self.events[before:]:
            self._tell(_event(event))
        for line in self._pending:
            self._tell(line)
        self._pending.clear()
        for token, code, body in effects.replies:
            assert isinstance(token, Answer)
            self._tell(f"{instance} answers the client: {_answer(code, body)}")
        return effects

    def _post(self, sender: int, receiver: int, messages: list[Any]) -> None:
        passed = []
        for message in messages:
            self.sent.append((sender, receiver, message))
            fate = ""
            if any(rule(sender, receiver, message) for rule in self._drops):
                fate = "  (lost)"
            elif any(rule(sender, receiver, message) for rule in self._holds):
                self.held.append((sender, receiver, message))
                fate = "  (held)"
            else:
                passed.append(message)
            told = describe(message)
            if self._with_beats or message[0] not in (m.BEAT, m.BEAT_ANSWER):
                self._pending.append(f"{sender} to {receiver}: {told}{fate}")
        if passed:
            self._frames.append((self.now_us + LATENCY_US, sender, receiver, passed))

    def _tell(self, text: str) -> None:
        if self._is_silent:
            return
        at = f"{self.now_us / SECOND_US:7.4f}"
        line = f"{at if at != self._told_at else '':7} {text}"
        self._told_at = at
        self.lines.append(line if len(line) <= WIDTH else line[: WIDTH - 1] + "…")

    def text(self) -> str:
        return HEADER + "\n".join(self.lines).strip("\n") + "\n"


# ---------------------------------------------------------------- words for things


def term(number: int) -> str:
    epoch, count = number >> 32, number & 0xFFFF_FFFF
    return f"epoch {epoch} term {count:x}" if epoch else f"term {count}"


def who(membership: Membership) -> str:
    learners = f", learners {_list(membership.learners)}" if membership.learners else ""
    return f"voters {_list(membership.voters)}{learners}"


def _list(items: Any) -> str:
    return " ".join(map(str, items)) if items else "none"


def _entry(index: int, entry: m.Entry) -> str:
    if entry.kind == m.NOOP:
        what = "nothing"
    elif entry.kind == m.COMMANDS:
        what = _commands(entry.data)
    elif entry.kind == m.CONFIG:
        what = who(Membership.unpack(entry.data, index))
    elif entry.kind == m.CHECK:
        what = "compare"
    else:
        assert entry.kind == m.VERSION, entry
        what = f"version {msgpack.unpackb(entry.data)}"
    return f"{index} ({term(entry.term)}: {what})"


def _commands(data: bytes) -> str:
    _, commands = sessions.unpack_batch(data)
    args: list[Any] = []
    for command in commands:
        arg = sessions.parse_command(command)[4]
        args += arg if isinstance(arg, list) else [arg]
    return ", ".join(repr(msgpack.unpackb(arg)) for arg in args)


def _append(a: m.Append) -> str:
    if not a.entries:
        return f"nothing new after {a.prev_index} ({term(a.prev_term)}); committed are {a.commit}; do you follow?"
    entries = ", ".join(_entry(a.prev_index + 1 + offset, entry) for offset, entry in enumerate(a.entries))
    return f"append after {a.prev_index} ({term(a.prev_term)}): {entries}; committed are {a.commit}"


def _append_answer(a: m.AppendAnswer) -> str:
    if a.accepted:
        return f"I agree up to {a.index}"
    return f"{term(a.term)}: I do not have {a.index} as you do; try after {a.hint_index} ({term(a.hint_term)})"


def _vote(v: m.Vote) -> str:
    asked = "would you vote" if v.pre else "vote"
    mark = "?" if v.pre else "!"
    why = ", the leader sends me" if v.transfer else ""
    return f"{asked} for me in {term(v.term)}{mark} my log ends at {v.last_index} ({term(v.last_term)}){why}"


def _vote_answer(v: m.VoteAnswer) -> str:
    said = ("I would" if v.pre else "I do") if v.granted else ("I would not" if v.pre else "I do not")
    return f"{said} ({term(v.term)})"


def _snapshot_answer(s: m.SnapshotAnswer) -> str:
    return f"the snapshot of {s.index} is in place" if s.done else f"I have {s.next_offset} bytes of snapshot {s.index}"


_WORDS: dict[int, Callable[[Any], str]] = {
    m.APPEND: _append,
    m.APPEND_ANSWER: _append_answer,
    m.VOTE: _vote,
    m.VOTE_ANSWER: _vote_answer,
    m.SNAPSHOT: lambda s: (
        f"snapshot of {s.index} ({term(s.index_term)}), bytes {s.offset} to {s.offset + len(s.data)} of {s.total}"
    ),
    m.SNAPSHOT_ANSWER: _snapshot_answer,
    m.TIMEOUT_NOW: lambda t: f"lead in my place, at once ({term(t.term)})",
    m.STEP_DOWN: lambda s: f"I lead no more ({term(s.term)})",
    m.GONE: lambda g: (
        "the group is no more" if g.index == -1 else f"you are no member as of {g.index} ({term(g.term)})"
    ),
    m.RECOVER_QUERY: lambda r: f"{_list(r.dead)} are gone for good; how far does your log go?",
    m.RECOVER_ANSWER: lambda r: f"my log ends at {r.last_index} ({term(r.last_term)})",
    m.FORCE_CONFIG: lambda f: f"yours is the most complete log: go on with {_list(f.voters)} in {term(f.term)}",
    m.LOST: lambda x: f"what I held is damaged (life {x.life}): take me out",
    m.LOSS_QUERY: lambda x: f"is what you held in life {x.life} damaged too?",
    m.DIGEST: lambda d: f"at {d.index} I have come to state {d.state % 10_000:04} by log {d.log % 10_000:04}",
    m.BEAT: lambda b: f"beat {b.seq}",
    m.BEAT_ANSWER: lambda b: f"beat {b.seq} heard",
    m.LINK_LIST: lambda x: f"I lead you in {_list(f'group {uid} ({term(t)})' for uid, t in x.groups)}",
    m.LINK_LIST_ANSWER: lambda x: f"but I do not follow in {_list(f'group {uid}' for uid, _ in x.exceptions)}",
}


def describe(message: Any) -> str:
    """A message in words."""
    return _WORDS[message[0]](message)


def _event(event: tuple[Any, ...]) -> str:
    instance, kind, _, *rest = event
    words = {
        "elected": lambda: f"{instance} is elected in {term(rest[0])}",
        "leader": lambda: f"{instance} has committed in {term(rest[0])}: its leadership is established",
        "stepped_down": lambda: f"{instance} leads no more",
        "leaderless": lambda: f"{instance} has no leader any more",
        "caught_up": lambda: f"{instance} sees that {rest[0]} has caught up",
        "config": lambda: f"{instance} sees committed: voters {_list(rest[0])}, learners {_list(rest[1])}",
        "member_gone": lambda: f"{instance} drops its member",
        "transfer_failed": lambda: f"{instance} goes on leading: nobody took over in time",
        "recovered": lambda: f"{instance} goes on after a lost majority",
        "diverged": lambda: f"{instance} finds that {_list(rest[1])} differ at {rest[0]}",
        "quarantined": lambda: f"{instance} quarantines itself",
        "outliers": lambda: f"{instance} would have it made anew",
    }
    return words[kind]()


def _answer(code: int, body: Any) -> str:
    if code == 0:
        return repr(msgpack.unpackb(body))
    names = {1: "failed", 90: "I do not lead", 91: "unknown: I was deposed"}
    return f"{names[code]} {list(body) if isinstance(body, (tuple, list)) else body}"

"""The core's behaviour as prose, in files: whoever changes it sees in the diff what it says and does otherwise.

``pytest tests/core --rewrite-transcripts`` writes the files anew; review the diff as you would code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from core import story
from core.story import Story

from raftfleet.core import messages

FOLDER = Path(__file__).parent / "transcripts"
SCENES: dict[str, Callable[[], Story]] = {}


def scene(function: Callable[[], Story]) -> Callable[[], Story]:
    SCENES[function.__name__] = function
    return function


@scene
def election() -> Story:
    s = Story(opening="three first members; 1 was named to begin")
    s.run_for(0.3)
    s.say("a command")
    s.ask(1, "x")
    s.run_for(0.3)
    s.say("1 falls silent")
    s.isolate(1)
    s.run_for(2)
    s.say("1 is back, with a term that is over")
    s.heal()
    s.run_for(0.5)
    s.end()
    return s


@scene
def two_candidates() -> Story:
    s = Story()
    s.skip(0.5)
    s.say("the leader is gone, and 2 and 3 do not hear each other's questions in time")
    s.crash(1)
    s.hold(lambda a, b, message: message[0] == messages.VOTE)
    s.run_for(2.0)
    s.say("now all questions arrive at once")
    s.heal()
    s.release()
    s.run_for(2)
    s.end()
    return s


@scene
def conflict() -> Story:
    s = Story()
    s.skip(0.5)
    s.say("1 is cut off and takes commands that nobody else hears of")
    s.isolate(1)
    for name in ("lost 1", "lost 2", "lost 3"):
        s.ask(1, name)
        s.run_for(0.01)
    s.say("another leader comes, and commits")
    s.run_for(2.5)
    leader = s.leader()
    s.ask(leader, "kept")
    s.run_for(0.01)
    s.say("1 is back: its tail gives way from the first entry that conflicts")
    s.heal()
    s.run_for(0.5)
    s.end()
    return s


@scene
def back_tracking() -> Story:
    s = Story(log_entries_kept=1000)
    s.skip(0.5)
    s.say("3 misses what 1 appends, and stays its follower")
    s.drop(lambda a, b, message: (a, b) == (1, 3) and message[0] == messages.APPEND)
    for number in range(4):
        s.ask(1, number)
        s.skip(0.01)
    s.say("2 takes over and believes 3 to be where it is itself; one refusal tells it where their logs part")
    s.heal()
    s.change("transfer", 2)
    s.run_for(0.15)
    s.end()
    return s


@scene
def lost_frames() -> Story:
    s = Story()
    s.skip(0.5)
    s.say("appends to 3 are lost; a beat that is answered proves it, and they are sent again")
    s.drop(lambda a, b, message: (a, b) == (1, 3) and message[0] == messages.APPEND)
    s.ask(1, "x")
    s.run_for(0.1)
    s.heal()
    s.run_for(0.5)
    s.end()
    return s


@scene
def check_quorum() -> Story:
    s = Story()
    s.skip(0.5)
    s.say("1 hears nobody, and steps down by itself; who asks it meanwhile gets no false answer")
    s.cut((2, 1), (3, 1))
    s.read(1)
    s.ask(1, "x")
    s.run_for(1.6)
    s.end()
    return s


@scene
def pre_vote() -> Story:
    s = Story()
    s.skip(0.5)
    s.say("3 is cut off for long: it asks in vain, and its term does not rise")
    s.isolate(3)
    s.run_for(3)
    s.say("3 is back and disturbs nobody")
    s.heal()
    s.run_for(0.5)
    s.end()
    return s


@scene
def membership_change() -> Story:
    s = Story(4, voters=(1, 2, 3))
    s.skip(0.5)
    s.ask(1, "x")
    s.skip(0.3)
    s.say("4 comes in as a learner")
    s.change("add_learner", 4)
    s.run_for(0.5)
    s.say("4 has caught up and may vote")
    s.change("promote", 4)
    s.run_for(0.5)
    s.say("2 is surplus")
    s.change("remove_member", 2)
    s.run_for(0.5)
    s.end()
    return s


@scene
def leader_removes_itself() -> Story:
    s = Story()
    s.skip(0.5)
    s.say("1 takes itself out: it leads until that is committed, and then no more")
    s.change("remove_member", 1)
    s.run_for(1.5)
    s.end()
    return s


@scene
def transfer() -> Story:
    s = Story()
    s.skip(0.5)
    s.say("2 is to lead; a command that comes meanwhile waits")
    s.change("transfer", 2)
    s.ask(1, "x")
    s.run_for(0.5)
    s.say("the way to 3 is cut: the transfer comes to nothing in time, and 2 goes on")
    s.ask(2, "y")
    s.run_for(0.3)
    s.cut((2, 3), (3, 2))
    s.change("transfer", 3)
    s.ask(2, "z")
    s.run_for(1.5)
    s.end()
    return s


@scene
def snapshot() -> Story:
    s = Story(log_entries_kept=2)
    s.skip(0.5)
    s.say("3 is away while the log behind it is given up")
    s.isolate(3)
    for number in range(8):
        s.ask(1, number)
        s.skip(0.05)
    s.heal()
    s.run_for(1)
    s.end()
    return s


@scene
def read_index() -> Story:
    s = Story(with_beats=True)
    s.skip(0.55)
    s.say("a read is answered when a quorum has confirmed a beat that was sent after it came")
    s.read(1)
    s.run_for(0.01)
    s.say("without a quorum there is no answer")
    s.isolate(1)
    s.read(1)
    s.run_for(0.1)
    s.say("a stale read asks nobody")
    s.read(2, stale=True)
    return s


@scene
def lease() -> Story:
    s = Story(clock_drift_margin=0.1, with_beats=True)
    s.skip(0.55)
    s.say("under a lease a read is answered at once")
    s.read(1)
    s.say("1 is cut off: the lease runs out before anybody else may be elected")
    s.isolate(1)
    s.run_for(0.5)
    s.read(1)
    s.skip(0.45)
    s.read(1)
    s.skip(0.15)
    s.end()
    return s


@scene
def lost_majority() -> Story:
    s = Story(5)
    s.skip(0.5)
    s.ask(1, "kept")
    s.skip(0.3)
    s.say("three of five are gone, one of the others lacks the last command; nobody does anything about it")
    s.isolate(5)
    s.ask(1, "known to 4, not to 5")
    s.skip(0.3)
    for instance in (1, 2, 3):
        s.crash(instance)
    s.heal()
    s.run_for(4)
    s.say("an operator declares them dead")
    for shard in s.shards.values():
        shard.gone.update(dict.fromkeys((1, 2, 3), "operator"))
    s.run_for(5)
    s.end()
    return s


@scene
def divergence() -> Story:
    s = Story(divergence_check_entries=3)
    s.skip(0.5)
    s.say("the memory of 3 rots; the next check notices")
    s.member(3).state = [*s.member(3).state, "rot"]
    for name in ("a", "b", "c"):
        s.ask(1, name)
        s.run_for(0.05)
    s.run_for(0.3)
    s.read(3, stale=True)
    s.end()
    return s


@scene
def divergent_leader() -> Story:
    s = Story(divergence_check_entries=3)
    s.skip(0.5)
    s.say("the memory of the leader rots")
    s.member(1).state = [*s.member(1).state, "rot"]
    for name in ("a", "b"):
        s.ask(1, name)
        s.skip(0.05)
    s.ask(1, "c")
    s.run_for(1.5)
    s.end()
    return s


@pytest.mark.parametrize("name", sorted(SCENES))
def test_the_core_still_says_and_does_what_the_transcript_tells(name: str, request: pytest.FixtureRequest) -> None:
    path = FOLDER / f"{name}.txt"
    text = SCENES[name]().text()
    if request.config.getoption("rewrite_transcripts"):
        path.write_text(text)
    written = path.read_text() if path.exists() else ""
    assert text.splitlines() == written.splitlines(), (
        f"the core behaves otherwise than {path.name} says: if it should, rewrite with --rewrite-transcripts"
    )


def test_every_transcript_has_its_scene() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(SCENES)


def test_every_kind_of_message_has_words() -> None:
    assert set(story._WORDS) == set(messages.MESSAGE_TYPES)

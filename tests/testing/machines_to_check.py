"""State machines that are right, or wrong in one way each: what the checks for users must tell apart."""

from __future__ import annotations

import datetime
import os
import random
import time
import uuid
from random import choice
from typing import Any

import raftfleet


class Tags(raftfleet.StateMachine):
    """Right: a set, sorted wherever it shows. Time and dice come from the context."""

    def new(self) -> set[str]:
        return set()

    def command(self, state: set[str], arg: Any) -> tuple[Any, set[str]]:
        if arg == "clear":
            return len(state), set()
        if arg == "roll":
            return random.Random(self.context.seed()).randrange(6) + self.context.time_us % 7, state
        if not isinstance(arg, str):
            raise ValueError(f"a tag is a str, not {arg!r}")
        return sorted(state), state | {arg}

    def query(self, state: set[str], arg: Any) -> list[str]:
        return sorted(state)

    def dump(self, state: set[str]) -> bytes:
        return "\n".join(sorted(state)).encode()

    def load(self, data: bytes) -> set[str]:
        return set(data.decode().split("\n")) - {""}


class SetOrder(Tags):
    def command(self, state: set[str], arg: Any) -> tuple[Any, set[str]]:
        state = state | {arg}
        return list(state), state


class SetOrderInDump(Tags):
    def dump(self, state: set[str]) -> bytes:
        return "\n".join(state).encode()


class Clock(Tags):
    def command(self, state: set[str], arg: Any) -> tuple[Any, set[str]]:
        return time.time(), state


class Today(Tags):
    def command(self, state: set[str], arg: Any) -> tuple[Any, set[str]]:
        return datetime.datetime.now().year, state


class QuietClock(Tags):
    """The clock's answer does not show in three commands, and would in a year."""

    def command(self, state: set[str], arg: Any) -> tuple[Any, set[str]]:
        return time.monotonic() < 0, state


class Dice(Tags):
    def command(self, state: set[str], arg: Any) -> tuple[Any, set[str]]:
        return choice("abcdefghijklmnopqrstuvwxyz"), state


class UnseededRandom(Tags):
    def command(self, state: set[str], arg: Any) -> tuple[Any, set[str]]:
        return random.Random().randrange(1 << 30), state


class Uuids(Tags):
    def command(self, state: set[str], arg: Any) -> tuple[Any, set[str]]:
        return str(uuid.uuid4()), state


class Address(Tags):
    def command(self, state: set[str], arg: Any) -> tuple[Any, set[str]]:
        return id(state) % 1_000_003, state


class Process(Tags):
    def command(self, state: set[str], arg: Any) -> tuple[Any, set[str]]:
        return os.getpid() % 1000, state


class Files(Tags):
    def command(self, state: set[str], arg: Any) -> tuple[Any, set[str]]:
        with open("/proc/self/comm") as file:
            return file.read(), state


class HalfDone(Tags):
    """Changes its state in place, then raises."""

    def command(self, state: set[str], arg: Any) -> tuple[Any, set[str]]:
        state.add(str(arg))
        if arg == "b":
            raise ValueError("no b, please")
        return None, state


class Forgetful(Tags):
    """What ``load`` makes is not what ``dump`` was given."""

    def load(self, data: bytes) -> set[str]:
        return set()


class Grumpy(Tags):
    def new(self) -> set[str]:
        raise RuntimeError("not today")


class WrongDigest(Tags):
    """What it gives for a digest is another thing each time."""

    def digest(self, state: set[str]) -> bytes:
        return random.randbytes(8)


class Sleepless(Tags):
    def command(self, state: set[str], arg: Any) -> tuple[Any, set[str]]:
        while True:
            pass


class InItself(Tags):
    """Keeps a count in itself, which no snapshot carries."""

    def __init__(self) -> None:
        self.count = 0

    def command(self, state: set[str], arg: Any) -> tuple[Any, set[str]]:
        self.count += 1
        return self.count, state


class Memory(Tags):
    """Answers queries from what its own member saw last, which may be another state than the one it is asked about."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def command(self, state: set[str], arg: Any) -> tuple[Any, set[str]]:
        result, after = super().command(state, arg)
        if self.context.index % 3 == 0:
            self.seen = sorted(after)
        return result, after

    def query(self, state: set[str], arg: Any) -> list[str]:
        return self.seen


class ChangesByQuery(Tags):
    def query(self, state: set[str], arg: Any) -> list[str]:
        state.add("asked")
        return sorted(state)

"""The other side of :mod:`raftfleet.testing.determinism`: one interpreter that runs a machine and records its sins.

The outside world is replaced before the user's module is imported, so that ``from time import time`` gets the
replacement. It behaves as ever until a method of the machine runs; then clocks show a time that depends on the variant
alone, random numbers come from a generator that the variant seeds, and each call is noted with its line. What cannot
be replaced (files, sockets, ``id``) is seen by an audit hook.

Not seen: what a C extension asks the operating system for by itself, and what was read when the module was imported.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import json
import os
import platform
import random
import socket
import sys
import sysconfig
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import msgpack

from raftfleet.core.context import CommandContext
from raftfleet.machine import StateMachine

CLOCKS = (
    "time time_ns monotonic monotonic_ns perf_counter perf_counter_ns process_time process_time_ns thread_time"
    " thread_time_ns"
).split()
LOCAL_TIMES = "localtime ctime mktime".split()
AUDITED = {
    "open": "open",
    "os.listdir": "os.listdir",
    "os.scandir": "os.scandir",
    "os.system": "os.system",
    "socket.connect": "socket.connect",
    "socket.getaddrinfo": "socket.getaddrinfo",
    "subprocess.Popen": "subprocess.Popen",
}
HARMLESS = {"copy", "logging", "reprlib", "pprint", "threading", "traceback", "warnings", "linecache", "weakref", "abc"}
"""Modules of the standard library that ask for the time, or for an id, and let nothing of it out into a result."""

STDLIB = os.path.realpath(sysconfig.get_paths()["stdlib"])
EPOCH_US = 1_700_000_000_000_000
YEAR_S = 31_557_600
USES_MAX = 1000


class Watch:
    """What the machine asks of the outside world while it is on, and what it is told instead."""

    def __init__(self, world: int, allow: list[str]) -> None:
        self.is_on = False
        self.step = 0
        self.uses: dict[tuple[int, str, str, str], None] = {}
        self._allow = set(allow)
        self._rng = random.Random(world)
        self._us = world * YEAR_S * 1_000_000 // 3
        self._thread = threading.get_ident()

    @contextmanager
    def on(self, step: int) -> Iterator[None]:
        """While the machine's own code runs."""
        self.step = step
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False

    def note(self, kind: str, what: str) -> bool:
        """Record a call, unless it comes from where it does no harm; returns whether to answer it by a fake."""
        if not self.is_on or what in self._allow:
            return False
        caller: FrameType | None = sys._getframe(1)
        while caller is not None and caller.f_globals is globals():  # the replacement itself
            caller = caller.f_back
        where = _user_line(caller, is_strict=kind == "id")
        if where and len(self.uses) < USES_MAX:
            self.uses[self.step, kind, what, where] = None
        return bool(where)

    def next_us(self) -> int:
        """A clock that moves with every look."""
        self._us += 1000 + self._rng.randrange(1000)
        return EPOCH_US + self._us

    def bytes(self, count: int) -> bytes:
        """In place of the operating system's randomness."""
        return self._rng.randbytes(count)

    def number(self) -> int:
        """In place of a process id and its like."""
        return self._rng.randrange(2, 1 << 22)


def _user_line(frame: FrameType | None, *, is_strict: bool) -> str:
    """``file:line in function`` of the nearest frame that is no part of the standard library, or of raftfleet.

    Empty: the call is the library's own business. ``is_strict``: it must be made by the user's code itself.
    """
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        file = frame.f_code.co_filename
        if name.startswith("importlib") or file.startswith("<frozen") or name.split(".")[0] in HARMLESS:
            return ""
        if name.startswith(("raftfleet.", "msgpack")):
            return ""
        if not _is_stdlib(file):
            return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"
        if is_strict:
            return ""
        frame = frame.f_back
    return ""


def _is_stdlib(file: str) -> bool:
    path = os.path.realpath(file) if file.startswith("/") else file
    return path.startswith(STDLIB + os.sep) and "site-packages" not in path


# ---------------------------------------------------------------- the replaced world


def replace_world(watch: Watch) -> None:
    """Put watched functions in place of those that tell replicas apart."""
    for name in CLOCKS:
        _replace_clock(watch, name)
    for name in LOCAL_TIMES:
        _replace(watch, time, name, "clock", f"time.{name}")
    _replace(watch, time, "sleep", "clock", "time.sleep", lambda *_: None)
    _replace_datetime(watch)
    _replace_random(watch)
    for module, name in ((os, "getpid"), (os, "getppid"), (threading, "get_ident"), (threading, "get_native_id")):
        _replace(watch, module, name, "outside", f"{module.__name__}.{name}", lambda *_: watch.number())
    for module, name in ((socket, "gethostname"), (platform, "node"), (os, "uname"), (os, "getenv"), (os, "getcwd")):
        _replace(watch, module, name, "outside", f"{module.__name__}.{name}")
    _replace(watch, type(os.environ), "__getitem__", "outside", "os.environ")
    sys.addaudithook(lambda event, args: _audit(watch, event))


def _replace(watch: Watch, owner: Any, name: str, kind: str, what: str, fake: Callable[..., Any] | None = None) -> None:
    real = getattr(owner, name)

    def watched(*args: Any, **options: Any) -> Any:
        if watch.note(kind, what) and fake is not None:
            return fake(*args, **options)
        return real(*args, **options)

    setattr(owner, name, watched)


def _replace_clock(watch: Watch, name: str) -> None:
    def fake() -> float | int:
        now_us = watch.next_us()
        return now_us * 1000 if name.endswith("_ns") else now_us / 1e6

    _replace(watch, time, name, "clock", f"time.{name}", fake)


def _replace_datetime(watch: Watch) -> None:
    real, real_date = datetime.datetime, datetime.date

    class LikeDatetime(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, real)

    class LikeDate(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, real_date)

    class Datetime(real, metaclass=LikeDatetime):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            is_watched = watch.note("clock", "datetime.now")
            return real.fromtimestamp(watch.next_us() / 1e6, tz) if is_watched else real.now(tz)

        @classmethod
        def utcnow(cls) -> Any:
            is_watched = watch.note("clock", "datetime.utcnow")
            now_us = watch.next_us() if is_watched else time.time_ns() // 1000
            return real.fromtimestamp(now_us / 1e6, datetime.timezone.utc).replace(tzinfo=None)

        @classmethod
        def today(cls) -> Any:
            is_watched = watch.note("clock", "datetime.today")
            return real.fromtimestamp(watch.next_us() / 1e6) if is_watched else real.now()

    class Date(real_date, metaclass=LikeDate):  # type: ignore[misc, valid-type]
        @classmethod
        def today(cls) -> Any:
            is_watched = watch.note("clock", "date.today")
            return real_date.fromtimestamp(watch.next_us() / 1e6) if is_watched else real_date.today()

    Datetime.__name__, Date.__name__ = "datetime", "date"
    datetime.datetime, datetime.date = Datetime, Date  # type: ignore[misc]


def _replace_random(watch: Watch) -> None:
    _replace(watch, os, "urandom", "random", "os.urandom", watch.bytes)
    _replace(watch, random, "_urandom", "random", "os.urandom", watch.bytes)
    shared = random.Random(watch.bytes(8))
    for name in random.__all__:
        if name.islower():
            _replace(watch, random, name, "random", f"random.{name}", getattr(shared, name))
    seed = random.Random.seed

    def watched_seed(self: random.Random, a: Any = None, version: int = 2) -> None:
        if a is None and watch.note("random", "random.Random() without a seed"):
            a = watch.bytes(8)
        seed(self, a, version)

    random.Random.seed = watched_seed  # type: ignore[method-assign]
    for name in ("uuid1", "uuid4"):
        _replace(watch, uuid, name, "random", f"uuid.{name}", lambda *_, **__: uuid.UUID(bytes=watch.bytes(16)))
    _replace(watch, uuid, "getnode", "outside", "uuid.getnode", watch.number)


def _audit(watch: Watch, event: str) -> None:
    if not watch.is_on:
        return
    if event == "builtins.id":
        watch.note("id", "id()")
    elif event in AUDITED:
        watch.note("outside", AUDITED[event])


# ---------------------------------------------------------------- running


def find_class(module_name: str, qualified: str, file: str | None) -> type[StateMachine]:
    """The machine's class, from wherever the other process had it."""
    found: Any = None
    if module_name != "__main__":
        try:
            found = importlib.import_module(module_name)
        except ImportError:
            if file is None:
                raise
    if found is None or not hasattr(found, qualified.split(".")[0]):
        # A script, or a module of a test runner that imports by path.
        assert file is not None, f"{module_name} has no {qualified}"
        spec = importlib.util.spec_from_file_location("checked_for_determinism", file)
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = found
        spec.loader.exec_module(found)
    for part in qualified.split("."):
        found = getattr(found, part)
    if not (isinstance(found, type) and issubclass(found, StateMachine)):
        raise TypeError(f"{module_name}:{qualified} is not a subclass of raftfleet.StateMachine")
    return found


class Runner:
    """Runs the commands; ``steps`` and ``faults`` are what is told."""

    def __init__(self, made: Callable[[], StateMachine], watch: Watch, *, is_restored: bool) -> None:
        self.steps: list[tuple[str, bytes, bytes, bytes]] = []
        self.faults: list[str] = []
        self._watch = watch
        self._is_restored = is_restored
        with watch.on(0):
            self._machine = made()
            self._machine.context = CommandContext(1)
            self._machine.context.version = self._machine.version
            self._state = self._machine.new()
        self._keep("new", b"\xc0")

    def run(self, number: int, packed: bytes) -> None:
        """One command, as a member applies it."""
        context = self._machine.context
        context.index, context.term, context.time_us = number + 1, 1, EPOCH_US + number * 1_000_003
        before = self.steps[-1][2]
        arg = msgpack.unpackb(packed, raw=False, strict_map_key=False)
        try:
            with self._watch.on(number + 1):
                result, after = self._machine.command(self._state, arg)
            told = msgpack.packb(result, use_bin_type=True)
        except Exception as error:
            self._keep("raised", msgpack.packb([type(error).__name__, str(error)]))
            if self.steps[-1][2] != before:
                self.faults.append(
                    f"command {number}, {arg!r}, raised {type(error).__name__} after it had changed its state: check"
                    " first, change last"
                )
        else:
            self._state = after
            self._keep("returned", told)

    def _keep(self, kind: str, told: bytes) -> None:
        with self._watch.on(self._watch.step):
            dumped = self._machine.dump(self._state)
            has_digest = type(self._machine).digest is not StateMachine.digest
            digest = bytes(self._machine.digest(self._state)) if has_digest else b""
            if self._is_restored:
                self._state = self._machine.load(dumped)
        self.steps.append((kind, told, bytes(dumped), digest))


def main() -> None:
    """``python -c … OPTIONS``: a job on standard input, what came of it on standard output."""
    options = json.loads(sys.argv[1])
    module, qualified, file, path, commands, allow = msgpack.unpackb(sys.stdin.buffer.read(), raw=False)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the machine prints is narration
    sys.path[:] = path
    watch = Watch(options["world"], allow)
    replace_world(watch)
    try:
        made = find_class(module, qualified, file)
        runner = Runner(made, watch, is_restored=options["is_restored"])
        for number, packed in enumerate(commands):
            runner.run(number, packed)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    uses = [list(use) for use in watch.uses]
    out.write(msgpack.packb([runner.steps, uses, runner.faults], use_bin_type=True))
    out.close()

"""The one epoll of a process, and log lines at a limited rate."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time

import pytest

from raftfleet.transport.poller import READ, WRITE, Poller
from raftfleet.transport.ratelimit import KEYS_MAX, LimitedLog


def test_a_handler_is_called_while_there_is_something_to_read() -> None:
    poller = Poller()
    a, b = socket.socketpair()
    masks: list[int] = []
    poller.register(a.fileno(), masks.append)
    assert poller.wait(0) == 0
    b.send(b"x")
    assert poller.wait(None) == 1
    assert poller.wait(0) == 1  # level-triggered: it has not been read
    assert masks == [READ, READ]
    poller.modify(a.fileno(), WRITE)
    poller.wait(None)
    assert masks[-1] == WRITE
    poller.unregister(a.fileno())
    poller.unregister(a.fileno())
    assert poller.wait(0) == 0
    with pytest.raises(ValueError, match="registered already"):
        poller.register(b.fileno(), masks.append)
        poller.register(b.fileno(), masks.append)
    for thing in (a, b, poller):
        thing.close()


def test_a_descriptor_that_an_earlier_handler_closed_is_not_called() -> None:
    poller = Poller()
    pairs = [socket.socketpair() for _ in range(2)]
    called = []

    def close_all(_mask: int) -> None:
        called.append(1)
        for mine, _ in pairs:
            poller.unregister(mine.fileno())

    for mine, theirs in pairs:
        poller.register(mine.fileno(), close_all)
        theirs.send(b"x")
    assert poller.wait(None) == 1
    assert called == [1]
    poller.close()
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_a_timeout_ends_a_wait() -> None:
    poller = Poller()
    started = time.monotonic()
    assert poller.wait(20_000) == 0
    assert time.monotonic() - started >= 0.019
    poller.close()


def test_a_signal_ends_a_wait_and_is_told_from_the_loop() -> None:
    before = (signal.getsignal(signal.SIGUSR2), len(os.listdir("/proc/self/fd")))
    poller = Poller()
    told: list[int] = []
    poller.watch_signals(told.append, signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert told == []
    poller.wait(5_000_000)
    assert set(told) == {signal.SIGUSR2}
    with pytest.raises(ValueError, match="already"):
        poller.watch_signals(told.append, signal.SIGUSR2)
    poller.close()
    assert (signal.getsignal(signal.SIGUSR2), len(os.listdir("/proc/self/fd"))) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_lines_beyond_the_burst_are_counted_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    log = LimitedLog(logging.getLogger("test"), burst=2, interval_us=1000)
    with caplog.at_level(logging.WARNING):
        assert [log.warning(now_us, "a", "bad %s", now_us) for now_us in (0, 1, 2, 3)] == [True, True, False, False]
        assert log.warning(4, "b", "another")
        assert log.warning(1000, "a", "bad %s", 1000)
    assert [record.getMessage() for record in caplog.records] == [
        "bad 0",
        "bad 1",
        "another",
        "bad 1000 (2 more like this were not logged)",
    ]


def test_inventing_keys_buys_no_log_lines() -> None:
    log = LimitedLog(logging.getLogger("test"), burst=1, interval_us=1000)
    assert sum(log.warning(5, f"key {number}", "x") for number in range(10 * KEYS_MAX)) == KEYS_MAX + 1
    assert log.warning(5000, "new", "x")

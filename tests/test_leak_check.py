"""The leak check notices what it is for."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from leaks import leaks_since, snapshot


def test_a_process_is_noticed() -> None:
    before = snapshot()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    try:
        assert any(f"process {process.pid} " in leak for leak in leaks_since(before))
    finally:
        process.communicate()


def test_an_orphan_of_a_fork_is_noticed() -> None:
    before = snapshot()
    result_r, result_w = os.pipe()
    hold_r, hold_w = os.pipe()
    child = os.fork()
    if child == 0:
        orphan = os.fork()
        if orphan == 0:
            os.close(hold_w)
            os.read(hold_r, 1)  # until the test closes its end
        else:
            os.write(result_w, f"{orphan}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    orphan = int(os.read(result_r, 20))
    try:
        assert any(f"process {orphan} " in leak for leak in leaks_since(before))
    finally:
        for descriptor in (result_r, result_w, hold_r, hold_w):
            os.close(descriptor)


def test_a_thread_is_noticed() -> None:
    before = snapshot()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="a-leaked-thread")
    thread.start()
    try:
        assert "thread a-leaked-thread" in leaks_since(before)
    finally:
        stop.set()
        thread.join()


def test_a_descriptor_is_noticed() -> None:
    before = snapshot()
    descriptor = os.open(os.devnull, os.O_RDONLY)
    try:
        assert any(leak.startswith(f"descriptor {descriptor} ") for leak in leaks_since(before))
    finally:
        os.close(descriptor)


def test_a_segment_of_a_dead_node_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAFTFLEET_TEST_NEIGHBOURS", raising=False)
    before = snapshot()
    path = Path(f"/dev/shm/raftfleet-leak-check-{os.getpid()}")
    path.write_bytes(bytes(64))
    try:
        assert f"shared memory {path}" in leaks_since(before)
    finally:
        path.unlink()


def test_a_folder_is_noticed() -> None:
    before = snapshot()
    folder = tempfile.mkdtemp()
    try:
        assert f"folder {folder}" in leaks_since(before)
    finally:
        os.rmdir(folder)

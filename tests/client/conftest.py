"""Fixtures for the clients' tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from client.fake_node import FakeNode


@pytest.fixture
def node(tmp_path: Path) -> Iterator[FakeNode]:
    """A running fake node of two workers."""
    with FakeNode(tmp_path) as node:
        yield node

"""Key files: what is written, what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raftfleet.transport.curve import (
    generate_keys,
    is_loopback,
    is_public_key,
    load_public_keys,
    load_secret_key,
    write_secret_key,
)
from raftfleet.transport.errors import KeyFileError


def test_a_secret_key_comes_back_with_its_public_key_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    keys = generate_keys()
    path = tmp_path / "node.key"
    write_secret_key(path, keys)
    assert load_secret_key(path) == keys
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert keys.secret_key not in repr(keys)
    with pytest.raises(FileExistsError):
        write_secret_key(path, generate_keys())


def test_a_secret_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    write_secret_key(path, generate_keys())
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_secret_key(path)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff\xfe", b"%" * 40, b'"' * 40, b"x" * 41])
def test_a_file_that_holds_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(KeyFileError):
        load_secret_key(path)
    with pytest.raises(KeyFileError):
        load_secret_key(tmp_path / "missing")


def test_a_list_of_public_keys_has_comments_and_names(tmp_path: Path) -> None:
    first, second = generate_keys().public_key, generate_keys().public_key
    path = tmp_path / "fleet.keys"
    path.write_text(f"# the fleet\n\n{first} node-1\n  {second}   # node 2\n")
    assert load_public_keys(path) == {first, second}
    path.write_text(f"{first}\nnonsense\n")
    with pytest.raises(KeyFileError, match="line 2"):
        load_public_keys(path)


def test_only_this_machine_is_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "10.0.0.1", "::", "example.org", "*", ""))


def test_the_shape_of_a_key() -> None:
    assert is_public_key(generate_keys().public_key)
    assert not any(is_public_key(text) for text in ("", "x" * 39, "#" * 40, "é" * 40, "x" * 40 + "\n"))

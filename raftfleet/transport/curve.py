"""CURVE: who may speak to this node over the network.

Each node has a key pair; the fleet has a list of public keys, one file on every node. A connection is let in if it
proves that it holds the secret key of a listed public key; it is encrypted from then on. A node connects only to
nodes whose public key it was told.

ZeroMQ asks an "authenticator" (ZAP, RFC 27) about each connection over an in-process socket. pyzmq's own ones run in a
thread or an asyncio loop; ours is a plain socket in the process's one epoll.

Files: a secret key file holds the 40 characters (z85) of the secret key, mode 0600, and nothing else. A list of public
keys holds one key a line; what follows it on the line, and lines that begin with ``#``, are for people.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from raftfleet.transport.errors import KeyFileError

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
ZAP_DOMAIN = b"raftfleet"
_KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


@dataclass(frozen=True)
class NodeKeys:
    """A node's CURVE key pair, each 40 characters of z85."""

    public_key: str
    secret_key: str

    def __repr__(self) -> str:
        return f"NodeKeys(public_key={self.public_key!r})"  # the secret belongs in no log


def is_public_key(text: str) -> bool:
    """Whether ``text`` has the shape of a z85 key: 40 characters of its alphabet."""
    if _KEY.fullmatch(text) is None:
        return False
    try:
        z85.decode(text.encode("ascii"))
    except Exception:  # five characters may stand for more than 32 bits
        return False
    return True


def generate_keys() -> NodeKeys:
    """A new random key pair."""
    public_key, secret_key = zmq.curve_keypair()
    return NodeKeys(public_key.decode("ascii"), secret_key.decode("ascii"))


def write_secret_key(path: Path, keys: NodeKeys) -> None:
    """Write the secret key to a new file of mode 0600. FileExistsError if there is one: a key is never overwritten."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(keys.secret_key + "\n")


def load_secret_key(path: Path) -> NodeKeys:
    """Read a secret key and derive the public one.

    Raises:
        KeyFileError: no such file, others may read it, or it holds no key.
    """
    try:
        with open(path, encoding="ascii") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"cannot read the secret key {path}: {error}") from error
    if mode & 0o077:
        raise KeyFileError(f"others may read the secret key {path} (mode {mode:04o}): chmod 600 it")
    if not is_public_key(text):
        raise KeyFileError(f"{path} does not hold a CURVE secret key (40 characters of z85)")
    return NodeKeys(zmq.curve_public(text.encode("ascii")).decode("ascii"), text)


def load_public_keys(path: Path) -> frozenset[str]:
    """Read the fleet's list of public keys.

    Raises:
        KeyFileError: no such file, or a line does not begin with a key (the message names the line).
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"cannot read the list of public keys {path}: {error}") from error
    keys = set()
    for number, line in enumerate(lines, start=1):
        words = line.split()
        # "#" is in the alphabet of z85 as well: a comment is what begins with it and is no key.
        if not words or (words[0].startswith("#") and not is_public_key(words[0])):
            continue
        if not is_public_key(words[0]):
            raise KeyFileError(f"{path}, line {number}: does not begin with a CURVE public key (40 characters of z85)")
        keys.add(words[0])
    return frozenset(keys)


def is_loopback(host: str) -> bool:
    """Whether ``host`` is only reachable from this machine: 127.0.0.0/8, ::1 or ``localhost``. Other names are not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class ZapHandler:
    """Answers ZeroMQ's question whether a connection may come in. Create it before the socket that it guards."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed_keys: Iterable[str]) -> None:
        self.accepted_count = 0
        self.refused_count = 0
        self._allowed: frozenset[bytes] = frozenset()
        self.set_allowed(allowed_keys)
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.bind(ZAP_ENDPOINT)
        self.fd = int(self._socket.get(zmq.FD))

    def set_allowed(self, public_keys: Iterable[str]) -> None:
        """Replace the list. Connections that are there already stay."""
        self._allowed = frozenset(z85.decode(key.encode("ascii")) for key in public_keys)

    def drain(self) -> list[str]:
        """Answer all questions that have come. Returns the addresses that were refused."""
        refused = []
        while int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            parts = self._socket.recv_multipart(zmq.NOBLOCK)
            if len(parts) < 8:  # id, "", version, request id, domain, address, identity, mechanism, credentials...
                continue
            allowed = parts[7] == b"CURVE" and len(parts) == 9 and parts[8] in self._allowed
            if allowed:
                self.accepted_count += 1
            else:
                self.refused_count += 1
                refused.append(parts[5].decode("ascii", "replace")[:100])
            code, text = (b"200", b"OK") if allowed else (b"400", b"public key not in the fleet's list")
            self._socket.send_multipart([parts[0], b"", b"1.0", parts[3], code, text, b"", b""], zmq.NOBLOCK)
        return refused

    def close(self) -> None:
        """Close the socket. Connections are refused from then on."""
        self._socket.close(linger=0)

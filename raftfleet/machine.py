"""What a user writes: a deterministic state machine, and, if wanted, a hook that runs on the leader."""

from __future__ import annotations

from typing import Any

import msgpack

from raftfleet.core.context import CommandContext

PIECE_BYTES = 256 << 10
"""A large state is unpacked from pieces of this size: a millisecond or two each."""

__all__ = ["CommandContext", "LeaderHook", "StateMachine"]


class StateMachine:
    """Base class of every replicated value (raft_fleet's ``RaftedValue.Data``).

    One instance serves one member. Arguments, results and, unless ``dump`` and ``load`` are overridden, states are what
    msgpack carries: None, bool, int (64 bit), float, str, bytes, list, dict. A tuple arrives as a list.

    ``command`` must be deterministic: no clock, no randomness, no I/O, no iteration over sets of str. What it may use
    instead is in :attr:`context`. It returns the next state and must not change the state it was given when it raises;
    the simplest way is never to change it in place.

    Attributes:
        version: the newest version that this code knows. Raise it when ``command`` changes its meaning, and keep the
            old meaning too: until all members' nodes run the new code, the group works as ``context.version``, which
            is older. Then it goes over, at one entry of its log, by :meth:`upgrade`.
        context: :class:`~raftfleet.core.context.CommandContext` of the command being applied.
    """

    version: int = 1
    context: CommandContext = CommandContext()

    def new(self) -> Any:
        """The state of a new group."""
        raise NotImplementedError

    def command(self, state: Any, arg: Any) -> tuple[Any, Any]:
        """Apply one command: return ``(result, next state)``."""
        raise NotImplementedError

    def query(self, state: Any, arg: Any) -> Any:
        """Answer from ``state`` without changing it."""
        raise NotImplementedError

    def dump(self, state: Any) -> bytes:
        """Bytes from which :meth:`load` makes an equal state: for snapshots."""
        return bytes(msgpack.packb(state, use_bin_type=True))

    def load(self, data: bytes) -> Any:
        """The inverse of :meth:`dump`."""
        if len(data) > PIECE_BYTES:
            return _unpack_in_pieces(data)
        return msgpack.unpackb(data, raw=False, strict_map_key=False)

    def digest(self, state: Any) -> bytes:
        """Bytes that are equal where states are equal: members compare them to notice that they differ.

        The dump, unless overridden: for a large state by something cheap, such as a checksum that ``command`` keeps up
        in the state; for a state that has several right dumps (one with a set in it) by one that has one (sorted).
        """
        return self.dump(state)

    def upgrade(self, state: Any, from_version: int) -> Any:
        """Bring a state of an older version up to ``context.version``. Deterministic, like ``command``."""
        return state


class LeaderHook:
    """Called on the leader after the fact (raft_fleet's ``LeaderHook``).

    Once for each event, as a rule. A leader that dies between a commit and its own applying of it calls nobody, and one
    that takes over may see the same entry applied by others before: use a hook to tell, not to keep count.
    ``on_restored`` alone is called where the state was restored, which is a follower.

    What a hook raises is logged and counted; it stops nothing. ``group`` is the group's name.
    """

    def on_command_committed(self, group: str, before: Any, arg: Any, result: Any, after: Any) -> None:
        """A command was committed and applied."""

    def on_query_answered(self, group: str, state: Any, arg: Any, result: Any) -> None:
        """A linearizable query was answered."""

    def on_member_added(self, group: str, node: str) -> None:
        """A member on ``node`` became part of the group."""

    def on_member_removed(self, group: str, node: str) -> None:
        """The member on ``node`` is no longer part of the group."""

    def on_elected(self, group: str) -> None:
        """This node's member became leader and has committed in its term."""

    def on_restored(self, group: str, state: Any) -> None:
        """The state was restored from a snapshot or from disk."""


class _Pieces:
    """Bytes as a file, a piece at a time."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def read(self, count: int) -> bytes:
        piece = self._data[self._at : self._at + count]
        self._at += len(piece)
        return piece


def _unpack_in_pieces(data: bytes) -> Any:
    """As ``unpackb``, but every now and then Python runs: a signal is handled between two pieces.

    By a signal a worker keeps its links alive while a user's code runs. One call into C for all of a large state may
    last longer than an election timeout.
    """
    unpacker = msgpack.Unpacker(
        _Pieces(data), read_size=PIECE_BYTES, max_buffer_size=len(data) + PIECE_BYTES, raw=False, strict_map_key=False
    )
    try:
        state = unpacker.unpack()
    except msgpack.OutOfData as error:
        raise ValueError(f"a state is cut off after {len(data)} bytes") from error
    if unpacker.tell() != len(data):
        raise ValueError(f"a state of {unpacker.tell()} bytes is followed by {len(data) - unpacker.tell()} more")
    return state

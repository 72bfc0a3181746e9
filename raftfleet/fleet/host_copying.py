"""Copies of whole states: out of a group in pieces, and into one that was added to begin with such a state.

This module knows nothing of files; a state goes to whoever asks for it, and comes from there. Rules:

* The leader's shard makes the copy, after the same proof of leadership as for any linearizable query, and holds it for
  a while so that it can be fetched in pieces. A stale copy is made by any member, even without a leader.
* Few copies at a time, dropped when nobody has asked for a piece for a while: memory has a bound.
* A piece for a group that is being restored goes to its leader, which answers how far the group has come by then
  (:mod:`raftfleet.core.restoring`). Whoever sends pieces may thus try again whenever it hears nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

from raftfleet.core.codes import (
    BAD_REQUEST,
    DROPPED,
    GONE_UID,
    GROUP_NOT_FOUND,
    NOT_LEADER,
    OK,
    OVERLOADED,
    QUERY_FAILED,
    UNANSWERED,
)
from raftfleet.core.host_messages import OP_COMMAND, OP_QUERY
from raftfleet.core.reads import STATE_WANTED
from raftfleet.core.restoring import PIECE_BYTES_MAX
from raftfleet.fleet.host_rpc import RpcLayer
from raftfleet.fleet.requests import FROM_RPC, ON_ITS_WAY, Request

COPIES_MAX = 4
COPY_IDLE_US = 30_000_000
COPY_US = 20_000_000
"""A large state takes its time to be dumped."""
PIECE_US = 5_000_000
Answer = Callable[[int, Any], None]


class CopyingLayer(RpcLayer):
    """Hands out copies of states, and takes pieces of them in. See the module's text."""

    def _run_rpc(self, method: str, args: dict[str, Any], answer: Answer) -> None:
        try:
            if method == "copy_begin":
                self._rpc_copy_begin(int(args["uid"]), bool(args["stale"]), answer)
            elif method == "copy_read":
                answer(*self._rpc_copy_read(int(args["id"]), int(args["offset"])))
            elif method == "copy_end":
                self._copies.pop(int(args["id"]), None)
                answer(OK, {})
            elif method == "restore_piece":
                self._rpc_restore_piece(int(args["uid"]), int(args["offset"]), args["data"], answer)
            else:
                super()._run_rpc(method, args, answer)
        except (KeyError, ValueError, TypeError) as error:
            answer(BAD_REQUEST, f"{method}: {type(error).__name__}: {error}")

    # ------------------------------------------------------------------ out of a group

    def _rpc_copy_begin(self, uid: int, stale: bool, answer: Answer) -> None:
        self._drop_idle_copies()
        if len(self._copies) >= COPIES_MAX:
            answer(OVERLOADED, f"{COPIES_MAX} copies of states are being fetched from this worker: try again later")
            return
        member = self.shard.members.get(uid)
        if member is None or (stale and not member.applied):
            answer(GONE_UID if self._is_dead(uid) else NOT_LEADER, [0, 0])
            return

        def copied(code: int, body: Any) -> None:
            if code == OK:
                body = self._keep_copy(uid, member.name, *body)
            elif code == QUERY_FAILED:
                body = list(body)
            answer(code, body)

        if stale:
            copied(*member.evaluate(STATE_WANTED))
        else:
            member.read(STATE_WANTED, self._asked_of_member(uid, OP_QUERY, STATE_WANTED, COPY_US, copied))

    def _keep_copy(self, uid: int, name: str, index: int, term: int, version: int, data: bytes) -> dict[str, Any]:
        copy_id = self._next_id
        self._next_id += 1
        self._copies[copy_id] = [data, self.now_us]
        return {
            "id": copy_id,
            "instance": self.instance,
            "node": self.settings.node,
            "name": name,
            "uid": uid,
            "index": index,
            "term": term,
            "machine_version": version,
            "size_bytes": len(data),
            "crc": zlib.crc32(data),
            "wall_us": self.shard.wall_us,
        }

    def _rpc_copy_read(self, copy_id: int, offset: int) -> tuple[int, Any]:
        copy = self._copies.get(copy_id)
        if copy is None or offset < 0:
            return UNANSWERED, "that copy of the state is here no more: begin again"
        copy[1] = self.now_us
        return OK, copy[0][offset : offset + PIECE_BYTES_MAX]

    def _drop_idle_copies(self) -> None:
        for copy_id in [i for i, (_, used_us) in self._copies.items() if self.now_us - used_us > COPY_IDLE_US]:
            del self._copies[copy_id]

    # ------------------------------------------------------------------ into a group

    def _rpc_restore_piece(self, uid: int, offset: int, data: Any, answer: Answer) -> None:
        if type(data) is not bytes or len(data) > PIECE_BYTES_MAX or offset < 0:
            raise ValueError(f"a piece is at most {PIECE_BYTES_MAX} bytes, at an offset from 0")
        member = self.shard.members.get(uid)
        if member is None:
            answer(GONE_UID if self._is_dead(uid) else NOT_LEADER, [0, 0])
            return
        member.propose_piece(offset, data, self._asked_of_member(uid, OP_COMMAND, data, PIECE_US, answer))

    def _asked_of_member(self, uid: int, op: int, body: bytes, timeout_us: int, answer: Answer) -> Request:
        """A token for what a member here is asked for another shard: it is answered by the member, or overdue."""

        def answered(code: int, body: Any) -> None:
            if code in (NOT_LEADER, DROPPED):
                # Either way it is tried again: a piece that did get into the log has no effect the second time.
                code, body = NOT_LEADER, [0, 0]
            elif code == GONE_UID:
                code, body = GROUP_NOT_FOUND, "the group was removed"
            answer(code, body)

        request = Request(FROM_RPC, 0, 0, op, self._name(uid), uid, self.now_us + timeout_us, 0, body, answered)
        request.maybe = ON_ITS_WAY
        self._open[request] = None
        self._open_bytes += len(body)
        return request

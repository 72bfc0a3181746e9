"""A node's manager without its sockets: founding, joining, pings, removal of the dead, what the command line asks for.

This module and its parts do not know about sockets, files or clocks. Time arrives as an argument; what is to be done
leaves as :data:`~raftfleet.fleet.manager_outputs.Output` values, which the driver carries out in their order (a
:class:`~raftfleet.fleet.founding.Persist` before the sends behind it).

A node is in one of these states (``status --json`` shows them):

    inactive      in no fleet and not wanting to be; it still answers as an acceptor of founding
    activating    it wants to be active: it looks for a fleet to join among its peers, or founds one with them
    active        the fleet's state names it, with its present instances
    deactivating  its members move away; then it leaves

The parts, each a class on top of the one before it, with its rules at the head of its file:

    manager_state        the fields, what follows from them, tools (calls, proposals, deadlines)
    manager_pings        who answers, who is unreachable
    manager_shards       this node's shards; the copy of the fleet's state that shard 0 feeds
    manager_entry        into a fleet by founding or joining, and out of it
    manager_resharding   another number of workers than the data were written with
    manager_membership   this node's entry in the fleet's state: join, instances, zone, deactivation
    manager_rpc          calls between managers
    manager_removal      the operator's word, the purge, abandoning
    manager_repair       what a lost majority costs to repair, and the repair
    manager_calls        calls of clients and the command line
    manager_core         this file: what goes in, what comes out, what a tick does and in which order

:mod:`raftfleet.fleet.manager_outputs` has what goes out and the settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raftfleet.core.manager_messages import (
    ACCEPT,
    ACCEPTED,
    FOUNDED,
    MANAGER_RPC,
    MANAGER_RPC_ANSWER,
    PING,
    PONG,
    PREPARE,
    PROMISE,
    shaped,
)
from raftfleet.fleet.founding import Chosen, Send
from raftfleet.fleet.manager_calls import ManagerCalls
from raftfleet.fleet.manager_outputs import MS, SECOND, Output, StateChanged
from raftfleet.fleet.manager_removal import ABANDON_AFTER_US


class ManagerCore(ManagerCalls):
    """One node's manager: what its driver calls, besides the ``on_shard_...`` of its parts and ``call``."""

    def take_outputs(self) -> list[Output]:
        """What is to be done, in this order. The list is emptied."""
        self._pull_founding()
        outputs, self._outputs = self._outputs, []
        return outputs

    def next_deadline_us(self) -> int:
        """When :meth:`tick` should be called next. Duties are checked ten times a second while something is amiss."""
        settled = self.node_state in ("active", "inactive") and not self._removals and not self._waiters
        return self._ticked_us + (200 * MS if settled else 50 * MS)

    def receive(self, now_us: int, message: Any) -> None:
        """A message from another manager (or this one). Malformed ones are dropped."""
        self._now_us = now_us
        try:
            message = shaped(message)
        except (ValueError, TypeError, IndexError):
            return
        if message.kind in _HANDLERS:
            _HANDLERS[message.kind](self, message)

    def tick(self, now_us: int, wall_us: int) -> None:
        """Do what is due."""
        self._now_us = self._ticked_us = now_us
        self._wall_us = wall_us
        self._expire()
        if self.is_ready:
            if self.fleet:
                self._tick_in_fleet()
            else:
                self._tick_without_fleet()
        if self.node_state != self._last_state:
            self._last_state = self.node_state
            self._outputs.append(StateChanged(self._last_state))

    def _tick_in_fleet(self) -> None:
        if self._due("poll", 300 * MS if not self.shards[0].fleet_leader else SECOND):
            self._poll_shards()
        self._set_fleet()
        if not self.shards[0].watched and self._due("watch", 300 * MS):
            self._watch()
        self._ping_nodes()
        if self.shards[0].fleet_leader:
            self._leaderless_since_us = self._now_us
            self._trouble = ""
        elif self._now_us - self._leaderless_since_us > ABANDON_AFTER_US and self._due("abandon", 500 * MS):
            self._consider_abandoning()
        if not self.fleet:
            return
        if self.state is not None and self.state.fleet_id:
            self._status = ""
            self._tend_membership(self.state)
        elif self._is_first_voter():
            if self.shards[0].fleet_leader and self._due("found", 300 * MS):
                self._propose_founding()
        elif self.zone is not None and self._due("join", SECOND):
            # Entered, but no feed comes: the fleet may know this node by instances that are no more.
            self._join_through_another()
        if self.state is not None and self.fleet:
            self._tend_removals(self.state)

    def _pull_founding(self) -> None:
        """Take over what founding wants done; messages to this node itself are delivered at once."""
        while True:
            outputs = self.founding.take_outputs()
            if not outputs:
                return
            for output in outputs:
                if isinstance(output, Chosen):
                    self._announce(output.value)
                elif isinstance(output, Send) and output.address == self.founding.address:
                    _HANDLERS[output.message.kind](self, output.message)
                else:
                    self._outputs.append(output)


_HANDLERS: dict[int, Callable[[ManagerCore, Any], None]] = {
    PING: ManagerCore._on_ping,
    PONG: ManagerCore._on_pong,
    PREPARE: ManagerCore._on_candidate,
    ACCEPT: ManagerCore._on_candidate,
    PROMISE: ManagerCore._on_promise,
    ACCEPTED: ManagerCore._on_accepted,
    FOUNDED: ManagerCore._on_founded_message,
    MANAGER_RPC: ManagerCore._on_rpc,
    MANAGER_RPC_ANSWER: ManagerCore._on_rpc_answer,
}

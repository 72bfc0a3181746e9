"""What an instance said rests on its disk: whether it is there when it comes back.

A process that ends between two turns, and had room on its disk, has saved everything that it is: term, vote and log. So
what the next one of its instance finds can be compared with what the last one was, at once and in full, instead of
waiting until a lost entry is missed. (What ends in the middle of a call to the disk, or without room, may come back as
it was before that turn, after it, or in parts; that is judged by what it does later.)

This module changes nothing. It reads members' own fields and knows nothing of files.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from raftfleet.testing.model import Violation


class _Kept(NamedTuple):
    """A member as its process ended. ``saved``: up to where its log was safe; ``terms`` from ``first`` to the end."""

    term: int
    vote: int
    first: int
    saved: int
    terms: list[int]


class RestartChecker:
    """One for each simulation; see the module's text."""

    def __init__(self) -> None:
        self._kept: dict[int, dict[int, _Kept]] = {}

    def ended(self, instance: int, shard: Any) -> None:
        """A process ends between two turns; its disk stays."""
        self._kept.pop(instance, None)
        if shard.is_saved:
            self._kept[instance] = {uid: _keep(shard, member) for uid, member in shard.members.items()}

    def forget(self, instance: int) -> None:
        """It ended in the middle of something, or its disk is gone."""
        self._kept.pop(instance, None)

    def came_back(self, instance: int, restored: dict[int, Any]) -> None:
        """The next process of the instance has read its disk."""
        for uid, kept in self._kept.pop(instance, {}).items():
            member = restored.get(uid)
            if member is None:
                raise Violation(f"restart: {instance} comes back without its member of group {uid}")
            if (member.term, member.vote) != (kept.term, kept.vote):
                raise Violation(
                    f"restart: {instance} was in term {kept.term} of group {uid}, with vote {kept.vote}, and comes back"
                    f" with {member.term} and {member.vote}"
                )
            self._check_log(instance, uid, member.log, kept)

    def _check_log(self, instance: int, uid: int, log: Any, kept: _Kept) -> None:
        end = kept.first + len(kept.terms) - 1
        if not kept.saved <= log.last_index <= max(end, kept.saved):
            raise Violation(
                f"restart: the log of {instance} in group {uid} was saved up to {kept.saved}, ended at {end}, and comes"
                f" back ending at {log.last_index}"
            )
        for index in range(max(kept.first, log.first_index), kept.saved + 1):
            if log.term_at(index) != kept.terms[index - kept.first]:
                raise Violation(
                    f"restart: entry {index} of group {uid} was of term {kept.terms[index - kept.first]} at {instance},"
                    f" and comes back as one of term {log.term_at(index)}"
                )


def _keep(shard: Any, member: Any) -> _Kept:
    log = member.log
    terms = [log.term_at(index) for index in range(log.first_index, log.last_index + 1)]
    saved = max(shard.saved_index(member), log.first_index - 1)
    return _Kept(member.term, member.vote, log.first_index, saved, terms)

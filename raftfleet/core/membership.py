"""Who belongs to a group: voters and learners, changed one at a time.

This module knows nothing of messages or time. A membership travels in CONFIG entries and in snapshots as msgpack
``[[[instance, is_voter, added_index], ...], audit]`` where ``audit`` lists the repairs of a lost majority that this
group has been through, oldest first, a map each (DESIGN 5.15): every later configuration carries the last
``AUDIT_RECORDS_MAX`` on, so that they stay with the group. ``added_index`` is the index of the CONFIG entry that
brought the instance in (0 for a first member): it tells one life of an instance from the next. Within the very entry
that adds it, the value is -1 and is read as the entry's own index; so is a record's ``"index"`` in the entry that made
it.
"""

from __future__ import annotations

from typing import Any

import msgpack

AUDIT_RECORDS_MAX = 16
"""More repairs than a group should live to see; at some 300 bytes each they cost nothing where no entry is rare."""


class Membership:
    """One configuration. Immutable; ``lives`` maps each instance to its ``added_index``."""

    __slots__ = ("audit", "learners", "lives", "quorum", "voters")

    def __init__(
        self, voters: tuple[int, ...], learners: tuple[int, ...], lives: dict[int, int], audit: list[Any] | None = None
    ) -> None:
        self.voters = voters
        self.learners = learners
        self.lives = lives
        self.audit = audit or []
        self.quorum = len(voters) // 2 + 1

    @classmethod
    def first(cls, voters: tuple[int, ...]) -> Membership:
        """The membership with which a group is created."""
        return cls(tuple(sorted(voters)), (), dict.fromkeys(sorted(voters), 0))

    def __contains__(self, instance: int) -> bool:
        return instance in self.lives

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Membership)
            and self.voters == other.voters
            and self.learners == other.learners
            and self.lives == other.lives
        )

    def __hash__(self) -> int:
        return hash((self.voters, self.learners))

    def __repr__(self) -> str:
        return f"Membership(voters={self.voters}, learners={self.learners})"

    def with_learner(self, instance: int) -> Membership:
        """Add ``instance`` as a learner."""
        assert instance not in self.lives
        lives = {**self.lives, instance: -1}
        return Membership(self.voters, tuple(sorted((*self.learners, instance))), lives, self.audit)

    def with_promoted(self, instance: int) -> Membership:
        """Make a learner a voter."""
        assert instance in self.learners
        learners = tuple(i for i in self.learners if i != instance)
        return Membership(tuple(sorted((*self.voters, instance))), learners, self.lives, self.audit)

    def without(self, instance: int) -> Membership:
        """Remove a voter or learner."""
        assert instance in self.lives
        return Membership(
            tuple(i for i in self.voters if i != instance),
            tuple(i for i in self.learners if i != instance),
            {i: life for i, life in self.lives.items() if i != instance},
            self.audit,
        )

    def demoted(self, instance: int) -> Membership:
        """Make a voter a learner (the fleet group moves its voters so)."""
        assert instance in self.voters
        voters = tuple(i for i in self.voters if i != instance)
        return Membership(voters, tuple(sorted((*self.learners, instance))), self.lives, self.audit)

    def forced(self, voters: tuple[int, ...], lives: dict[int, int], record: dict[str, Any]) -> Membership:
        """Go on with these voters after the loss of a majority; ``record`` says what was done."""
        learners = tuple(sorted(i for i in lives if i not in voters))
        audit = [*self.audit, {**record, "index": -1}][-AUDIT_RECORDS_MAX:]
        return Membership(tuple(sorted(voters)), learners, lives, audit)

    def is_forced_at(self, index: int) -> bool:
        """Whether the CONFIG entry at ``index``, which this is, was made by a repair and not by a leader's change."""
        return any(record.get("index") == index for record in self.audit)

    def pack(self) -> bytes:
        """Data of a CONFIG entry."""
        voters = set(self.voters)
        rows = [[instance, instance in voters, life] for instance, life in sorted(self.lives.items())]
        return bytes(msgpack.packb([rows, self.audit]))

    @classmethod
    def unpack(cls, data: bytes, index: int) -> Membership:
        """Read the data of the CONFIG entry at ``index``.

        Raises:
            ValueError: the bytes are not a membership.
        """
        try:
            rows, audit = msgpack.unpackb(data, strict_map_key=False)
            lives = {int(instance): (index if life == -1 else int(life)) for instance, _, life in rows}
            voters = tuple(sorted(int(row[0]) for row in rows if row[1]))
            learners = tuple(sorted(int(row[0]) for row in rows if not row[1]))
            audit = [{**record, "index": index if record["index"] == -1 else record["index"]} for record in audit or ()]
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, msgpack.UnpackException) as error:
            raise ValueError(f"not a membership: {data[:64]!r}") from error
        return cls(voters, learners, lives, audit)

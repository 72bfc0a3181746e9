"""A group's settings, fixed for all its members: frozen, validated, carried in the fleet's log as a plain dict."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

VERSION_MAX = (1 << 31) - 1
RESTORE_BYTES_MAX = 2 << 30
"""A state is held in memory, once more while it arrives: what is larger has no place in one group."""
ON_MAJORITY_LOSS = ("wait", "survivor", "new")


@dataclass(frozen=True)
class GroupConfig:
    """How one consensus group behaves.

    Attributes:
        machine: ``"module:Class"`` of the user's :class:`raftfleet.StateMachine`, imported from ``--app-dir``.
        hook: ``"module:Class"`` of a :class:`raftfleet.LeaderHook`, or None.
        election_timeout_s: seconds without a leader's beat before members campaign. Five default beats.
        clock_drift_margin: None: linearizable reads ask a quorum (ReadIndex). A fraction such as 0.1: the clocks of
            all nodes run at rates at most that far apart, and reads use the leader's lease (DESIGN 5.10).
        session_ttl_s: seconds after which an idle client's results are forgotten (DESIGN 11).
        on_majority_loss: ``"wait"`` for an operator, or, once the lost instances are provably gone, go on with the
            ``"survivor"`` that has the most complete log, or start ``"new"`` and empty.
        command_bytes_max: largest packed argument of a command, in bytes.
        log_entries_kept: entries kept behind the applied ones for followers that lag; older ones need a snapshot.
        session_count_max: clients remembered at a time; more are refused as overloaded.
        divergence_check_entries: batches of commands after which members compare digests of what they have come to;
            0: never. See :mod:`raftfleet.core.divergence`.
        divergence_state_bytes_max: states whose digest (the dump, by default) is larger are not looked at.
        machine_version: the state machine's version that the group begins as; None: the highest that all nodes of its
            first members support. It rises by itself when all members support more.
        restore: ``(size in bytes, CRC32)`` of the dumped state that the group begins with and waits for, or None. Set
            by whoever adds a group with ``restore=…``; settled then.
    """

    machine: str
    hook: str | None = None
    election_timeout_s: float = 1.0
    clock_drift_margin: float | None = None
    session_ttl_s: float = 600.0
    on_majority_loss: str = "wait"
    command_bytes_max: int = 1 << 20
    log_entries_kept: int = 1024
    session_count_max: int = 100_000
    divergence_check_entries: int = 1000
    divergence_state_bytes_max: int = 1 << 20
    machine_version: int | None = None
    restore: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise ValueError, naming the field and the reason, if any value is of no use."""
        _check_spec("machine", self.machine)
        if self.hook is not None:
            _check_spec("hook", self.hook)
        _check_range("election_timeout_s", self.election_timeout_s, 0.05, 3600.0)
        if self.clock_drift_margin is not None:
            _check_range("clock_drift_margin", self.clock_drift_margin, 0.0, 0.5)
        _check_range("session_ttl_s", self.session_ttl_s, 1.0, 30 * 86400.0)
        if self.on_majority_loss not in ON_MAJORITY_LOSS:
            raise ValueError(f"on_majority_loss is one of {', '.join(ON_MAJORITY_LOSS)}, not {self.on_majority_loss!r}")
        _check_range("command_bytes_max", self.command_bytes_max, 1, 8 << 20, whole=True)
        _check_range("log_entries_kept", self.log_entries_kept, 1, 10_000_000, whole=True)
        _check_range("divergence_check_entries", self.divergence_check_entries, 0, 1_000_000_000, whole=True)
        _check_range("divergence_state_bytes_max", self.divergence_state_bytes_max, 0, 1 << 30, whole=True)
        _check_range("session_count_max", self.session_count_max, 1, 100_000_000, whole=True)
        if self.machine_version is not None:
            _check_range("machine_version", self.machine_version, 1, VERSION_MAX, whole=True)
        if self.restore is not None:
            if not isinstance(self.restore, tuple) or len(self.restore) != 2:
                raise ValueError(f"restore is (size in bytes, CRC32) of a state, not {self.restore!r:.100}")
            _check_range("the size in restore", self.restore[0], 0, RESTORE_BYTES_MAX, whole=True)
            _check_range("the CRC32 in restore", self.restore[1], 0, 0xFFFFFFFF, whole=True)

    @cached_property
    def election_timeout_us(self) -> int:
        """The election timeout in microseconds: one object for all members of one config."""
        return int(self.election_timeout_s * 1_000_000)

    @cached_property
    def session_ttl_us(self) -> int:
        """The life of an idle client's results in microseconds, likewise."""
        return int(self.session_ttl_s * 1_000_000)

    def to_dict(self) -> dict[str, Any]:
        """The fields as msgpack and JSON carry them."""
        fields = dataclasses.asdict(self)
        if self.restore is not None:
            fields["restore"] = list(self.restore)
        return fields

    @classmethod
    def from_dict(cls, fields: object) -> GroupConfig:
        """The inverse of :meth:`to_dict`; unknown fields are a ValueError that names them."""
        if not isinstance(fields, dict):
            raise ValueError(f"a group config is a dict of fields, not {type(fields).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(str(name) for name in fields if name not in known)
        if unknown:
            raise ValueError(f"unknown fields in a group config: {', '.join(unknown)}")
        if "machine" not in fields:
            raise ValueError("a group config names its machine")
        if isinstance(fields.get("restore"), list):
            fields = {**fields, "restore": tuple(fields["restore"])}
        return cls(**fields)


def _check_spec(field: str, value: object) -> None:
    parts = value.split(":") if isinstance(value, str) else []
    if len(parts) != 2 or not all(all(p.isidentifier() for p in part.split(".")) for part in parts):
        raise ValueError(f"{field} is 'module:Class', such as 'just_an_int:JustAnInt', not {value!r}")


def _check_range(field: str, value: object, low: float, high: float, *, whole: bool = False) -> None:
    good_type = isinstance(value, int) or (not whole and isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not good_type or not low <= value <= high:  # type: ignore[operator]
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{field} is {kind} from {low:g} to {high:g}, not {value!r}")

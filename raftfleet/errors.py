"""Every error that raftfleet raises on purpose, as one tree split by what the caller should do.

* :class:`NotApplied`: it did not happen and will not. Safe to do again.
* :class:`OutcomeUnknown`: it may have happened, once, never twice.
* :class:`CommandFailed` / :class:`QueryFailed`: the user's own code raised.
* :class:`NodeError`: the node could not be started, found or understood.

The class of an error speaks for all attempts of a call together: once one attempt may have reached a leader, a later
``NoLeader`` is reported as ``OutcomeUnknown``. The first sentence of each docstring is its default message.
"""

from __future__ import annotations


class RaftFleetError(Exception):
    """Something went wrong in raftfleet."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").split("\n")[0])


class NotApplied(RaftFleetError):
    """It did not happen and will not: safe to do again."""


class NoLeader(NotApplied):
    """The group had no leader that could be reached before the deadline."""


class Unanswered(NotApplied):
    """The query got no answer before the deadline: safe to repeat, since a query changes nothing."""


class Overloaded(NotApplied):
    """A queue is full: try again later, or offer less load."""


class DiskFull(NotApplied):
    """The group's leader has no room on its disk: free some there. Queries are answered meanwhile."""


class GroupNotFound(NotApplied):
    """There is no consensus group of that name."""


class AlreadyAdded(NotApplied):
    """A consensus group of that name exists already."""


class NoActiveNode(NotApplied):
    """The fleet has no active node that could host a member."""


class NotActive(NotApplied):
    """This node is not an active member of a fleet (yet): see ``raftfleet-node status``."""


class CommandTooLarge(NotApplied):
    """The packed argument is larger than the limit."""


class Refused(NotApplied):
    """The request was understood and refused: the message says why."""


class StateMachineNotImportable(NotApplied):
    """The state machine cannot be imported on a node that would host it."""

    def __init__(self, node: str = "", reason: str = "") -> None:
        super().__init__(f"state machine cannot be used on node {node}: {reason}" if node else None)
        self.node = node
        self.reason = reason


class BeingRestored(NotApplied):
    """The group waits for the state that it is to begin with: nothing was done."""


class OutcomeUnknown(RaftFleetError):
    """No answer came: it may have happened once, never twice."""


class SessionExpired(OutcomeUnknown):
    """The retry came too late to tell whether the first attempt was applied; it was not applied again."""


class UserCodeFailed(RaftFleetError):
    """The user's state machine raised."""

    def __init__(self, exception_type: str = "", message: str = "") -> None:
        super().__init__(f"{exception_type}: {message}" if exception_type else None)
        self.exception_type = exception_type
        self.exception_message = message


class CommandFailed(UserCodeFailed):
    """``command`` raised: the state is what it was before."""


class QueryFailed(UserCodeFailed):
    """``query`` raised."""


class NodeError(RaftFleetError):
    """The local node could not be used."""


class NodeNotRunning(NodeError, NotApplied):
    """No node answers in this run directory: start one with ``raftfleet-node start``."""


class ConfigError(NodeError, ValueError):
    """An option is missing or wrong."""


class ProtocolError(NodeError):
    """The other side said something that this version does not understand."""

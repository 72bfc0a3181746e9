"""The codes of answers, all in one place: what a client, a host or a member is told about its request.

This module knows nothing but numbers. They cross the wire, so one that was given never changes its meaning:

* 0 is success, 1 and 2 are exceptions of the user's own code;
* 10 to 19, 21 and 22 say for certain that nothing was done; 20 says it of a query only, whose answer was lost;
* 30 to 32 are about what became of a command;
* 90 to 92 are said between hosts, and turned into one of the others before a client hears them;
* 100 is no answer at all.

The body that goes with a code is a message (str) unless the code says otherwise. :mod:`raftfleet.wire.ipc` turns codes
into the exceptions of :mod:`raftfleet.errors` and back.
"""

from __future__ import annotations

OK = 0
"""Body: the packed result (bin) of a command or query, any value for a call."""
COMMAND_FAILED = 1
"""The user's ``command`` raised. Body ``[type, message]``."""
QUERY_FAILED = 2
"""The user's ``query`` raised. Body ``[type, message]``."""

NO_LEADER = 10
OVERLOADED = 11
GROUP_NOT_FOUND = 12
TOO_LARGE = 13
ALREADY_ADDED = 14
NO_ACTIVE_NODE = 15
NOT_IMPORTABLE = 16
"""Body ``[node, reason]``."""
BAD_REQUEST = 17
NOT_ACTIVE = 18
REFUSED = 19
UNANSWERED = 20
DISK_FULL = 21
RESTORING = 22
"""The group's state has not arrived yet (:mod:`raftfleet.core.restoring`)."""

OUTCOME_UNKNOWN = 30
SESSION_EXPIRED = 31
GROUP_CHANGED = 32
"""The uid of the request is not (or no more) that of the group with this name, and no member was given the request in
this attempt. A client without earlier attempts in doubt asks the present group; where a member may have taken the
request before its group was removed, the answer is OUTCOME_UNKNOWN."""

NOT_LEADER = 90
"""This member does not lead. Body ``[leader's instance or 0, term]``."""
DROPPED = 91
"""The command was in the log of a leader that was deposed; its outcome is unknown."""
GONE_UID = 92
"""The group with this uid is no more."""

PUSH = 100
"""Not an answer: id 0, body ``[topic, ...]``."""

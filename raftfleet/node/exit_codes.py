"""Exit codes are a protocol: between a child and its supervisor, and between the node and whoever started it.

The values are stable. Those below 3 are what every command line tool says; none is above 63, so that none can be
taken for a death by signal (128 + n in a shell) or for one of ``sysexits.h`` (64 to 78).
"""

from __future__ import annotations

import signal
from enum import IntEnum


class ExitCode(IntEnum):
    """Why a process of a node ended; ``sentence`` says it to a person."""

    sentence: str

    def __new__(cls, value: int, sentence: str) -> ExitCode:
        code = int.__new__(cls, value)
        code._value_ = value
        code.sentence = sentence
        return code

    OK = 0, "ended as asked"
    FAILED = 1, "failed; the log above says why"
    USAGE = 2, "an option is missing or wrong"
    CANNOT_BOOT = 3, "cannot start with these options on this machine, and another attempt would not change that"
    RESTART_FRESH = 4, "asks to be started again at once with an empty memory"
    BUDGET_EXCEEDED = 5, "a child process ended too often within a short time"
    ADDRESS_IN_USE = 6, "an address to listen on is taken by another process"
    RUN_DIR_BUSY = 7, "another node runs in this run directory"
    SUPERVISOR_GONE = 8, "the supervisor was gone before the child had started"
    DATA_DIR_REFUSED = 9, "the data directory is another's, in use, newer than this version, or beyond reading"
    DISK_FAILED = 10, "a write to the data directory failed; the next start reads again what is there"
    RETIRED = 11, "is not needed any more, since its node has fewer workers now"


def describe_status(status: int) -> str:
    """A sentence fragment for a child's end, from a wait status as :func:`os.waitstatus_to_exitcode` gives it.

    Args:
        status: the exit code, or minus the number of the signal that killed the process.
    """
    if status < 0:
        try:
            return f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"was killed by signal {-status}"
    code = next((code for code in ExitCode if code == status), None)
    if code is None:
        return f"exited with code {status}"
    return f"exited with code {status} ({code.name}: {code.sentence})"

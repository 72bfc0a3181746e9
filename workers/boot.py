"""The first thing that runs in a forked child: makes a process of its own out of a copy of the supervisor.

In this order:

1. die with the supervisor: ``PR_SET_PDEATHSIG``, then a second look at the parent, since it may have died in between;
2. a name of its own, for ``ps`` and ``top``;
3. signals: the supervisor had them blocked, so none was lost or taken for its; dispositions are reset, then unblocked.
   SIGINT and SIGHUP are ignored: a terminal sends them to all processes, and the supervisor stops the node in order;
4. no standard input: a debugger's prompt must not wait for the terminal of a node; as many descriptors as the system
   allows: a link takes two, a client one, and the usual soft limit of 1024 is for programs that still use select(2);
5. randomness of its own; log lines with its own name;
6. ``gc.freeze()``: what came from the supervisor never dies and need not be walked (nor copied, page by page).

There are no siblings' descriptors to close: the supervisor opens none for its children. What is inherited is kept on
purpose: the run directory's lock, which outlives the supervisor as long as a child does, and the leader table.

The body runs until it returns. It sets its own SIGTERM handler, tolerates a second SIGTERM and, once started up, calls
``gc.freeze()`` again.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import gc
import logging
import os
import random
import resource
import signal
import sys
from collections.abc import Callable

from raftfleet.errors import ConfigError
from raftfleet.node import logs
from raftfleet.node.context import ChildContext
from raftfleet.node.exit_codes import ExitCode
from raftfleet.storage.base import StorageError, StorageFull, StoragePoisoned

Body = Callable[[ChildContext], None]

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
COMM_BYTES_MAX = 15

_logger = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)


def run_child(context: ChildContext, body: Body) -> int:
    """Become the child that ``context`` describes, run its body, return the exit code. Never raises.

    The caller leaves by ``os._exit`` with the code: the frames below are the supervisor's.
    """
    try:
        if not _die_with(context.supervisor_pid):
            return ExitCode.SUPERVISOR_GONE
        _prctl(PR_SET_NAME, f"rf-{context.title}".encode()[:COMM_BYTES_MAX])
        _reset_signals()
        _drop_stdin()
        _raise_descriptor_limit()
        random.seed()
        logs.configure(
            level=context.config.log_level,
            format=context.config.log_format,
            node=context.config.name,
            process=context.title,
        )
        gc.freeze()
        body(context)
        return ExitCode.OK
    except BaseException as error:
        return _exit_code_of(error)
    finally:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                pass  # whoever read it is gone


def _exit_code_of(error: BaseException) -> int:
    """The code that tells the supervisor what this end means; the log tells the reason."""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or ExitCode.OK
        _logger.error("%s", error.code)
        return ExitCode.FAILED
    if isinstance(error, ConfigError):
        _logger.error("%s", error)
        return ExitCode.CANNOT_BOOT
    if isinstance(error, StorageError):
        _logger.error("%s", error)
        # What a disk does not give now it may give later; a directory that may not be touched stays so.
        return ExitCode.DISK_FAILED if isinstance(error, (StoragePoisoned, StorageFull)) else ExitCode.DATA_DIR_REFUSED
    if getattr(error, "errno", None) == errno.EADDRINUSE:  # an OSError or a ZMQError, which is none
        _logger.error("%s", error)
        return ExitCode.ADDRESS_IN_USE
    _logger.critical("ended by an error that nothing handled", exc_info=error)
    return ExitCode.FAILED


def _die_with(supervisor_pid: int) -> bool:
    """Have the kernel kill this process when its parent dies; False if it is dead already.

    SIGKILL, not SIGTERM: a child that hangs must not survive, and a member's memory need not be saved.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == supervisor_pid


def _prctl(option: int, argument: int | bytes) -> None:
    value = ctypes.c_char_p(argument) if isinstance(argument, bytes) else ctypes.c_ulong(argument)
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1):  # may have been ignored by whoever started us
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    faulthandler.enable()  # a crash in a C library shows where Python was


def _raise_descriptor_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _drop_stdin() -> None:
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)

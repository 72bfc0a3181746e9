"""The client's head: what to send, when to try again, and what may be said about the outcome.

This module does not know about sockets, threads or clocks. A driver (:mod:`raftfleet.client.sync`,
:mod:`raftfleet.client.aio`) makes a :class:`Call` per call of the user, does what its state asks for, and tells it what
happened; time is an argument, in microseconds: ``now_us`` of a monotonic clock, ``wall_us`` since 1970.

========== ================================================== =======================================================
state      what the driver does                               what it reports
========== ================================================== =======================================================
QUEUED     nothing: too many commands are under way           ``on_deadline``; or :meth:`ClientCore.turn` admits it
READY      connect if need be, send :meth:`Call.attempt`      ``on_refused`` if that fails, or ``on_deadline``
IN_FLIGHT  read replies                                       ``on_reply``, ``on_lost``, ``on_deadline``
PAUSED     nothing                                            ``on_deadline``, and replies that come late
DONE       hand over ``result`` or raise ``error``            :meth:`ClientCore.turn`, once
========== ================================================== =======================================================

Every state but DONE has a ``deadline_us``.

Rules:

1. **The class of an error speaks for all attempts together.** Each attempt that was sent is a *doubt*, until its own
   answer says that it was not applied. A call that ends while a doubt is left ends as OutcomeUnknown, whatever its last
   attempt said; only a result (or the state machine's own exception) settles all doubts, since a session answers every
   attempt of a command alike.
2. All attempts of a command carry the same seq. They carry the same time of issue, too, from the first one that left a
   doubt: the node refuses what is too old to be told apart from a second execution.
3. A seq is *acknowledged* when its call has ended, so the node keeps no result that nobody waits for. At most
   :data:`WINDOW` seqs from the oldest that is not; the others wait here, in order.
4. A query, or a control call that changes nothing, leaves no doubt and is tried again freely. A control call that
   changes something has no session to protect it: it ends with its first doubt.
5. An answer to an attempt that was given up already is used if the call still runs, and dropped if not.
6. First attempts that leave together for one group travel as a **run** (:func:`runs`): one request, one answer or a few
   parts of one. Every call in it stays a call of its own, with its deadline, doubts and retries. A retry goes alone.
7. Where more than :data:`RUNS_UNHELD_MAX` runs are under way, a driver may hold the next run to a group until the one
   before it has come back, for :data:`HOLD_US_MAX` at most: it has grown by then, and every run has its price on all
   the way to the followers' logs. With few under way nothing is held, for then it would only cost time.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack

from raftfleet import errors
from raftfleet.core.names import check_group_name, shard_of
from raftfleet.core.sessions import RUN_COMMANDS_MAX
from raftfleet.wire import ipc
from raftfleet.wire.errors import WireError

if TYPE_CHECKING:
    from raftfleet.node.leader_table import LeaderSlot

WINDOW = 1024
"""Commands of one client and group from the oldest unfinished one to the newest: what the group must remember of us."""

RUNS_UNHELD_MAX = 16
HOLD_US_MAX = 50_000
"""See rule 7."""

GRACE_US = 100_000
"""How much longer than the node an attempt is waited for: the node's own answer says more than our silence."""

CONTROL_RETRY_INTERVAL_US = 100_000
CONTROL_RETRY_COUNT = 1 << 30  # a control call is bounded by its timeout alone

ARG_BYTES_MAX = ipc.FRAME_BYTES_MAX - 4096
"""Of a packed argument, with room for the names around it. Groups have limits of their own (``command_bytes_max``)."""

CONTROL = -1
"""Where a control call goes: the manager's socket. Shards are 0, 1, ..."""

READ_METHODS = frozenset(
    "active_nodes groups groups_detail members group_status unreachable_nodes leaderless_groups status".split()
) | frozenset("shard_info watch_fleet fleet_query local_groups".split())
"""Control calls that change nothing and so can be repeated whatever became of the last attempt."""

CONSISTENCIES = {"linearizable": ipc.LINEARIZABLE, "stale": ipc.STALE}

QUEUED: Final = 0
READY: Final = 1
IN_FLIGHT: Final = 2
PAUSED: Final = 3
DONE: Final = 4

_RETRIED_CODES = frozenset(
    (ipc.NO_LEADER, ipc.OVERLOADED, ipc.NOT_ACTIVE, ipc.UNANSWERED, ipc.DISK_FULL, ipc.RESTORING)
)
_SETTLING_CODES = frozenset((ipc.OK, ipc.COMMAND_FAILED, ipc.QUERY_FAILED))
_GROUP_CHANGES_MAX = 3
_ROUTES_MAX = 1 << 17
_STORY_LENGTH_MAX = 8
_RUN_ARG_BYTES_MAX = 4096
"""A longer argument travels alone: so a run never has more than a megabyte."""

_pack = msgpack.Packer(use_bin_type=True).pack
"""Only for what no code of the user's takes part in packing: otherwise another thread could come in between."""
_unpack = msgpack.unpackb
_LEAF_TYPES = frozenset((str, bytes, int, float, bool, type(None)))


class Leader(NamedTuple):
    """Who leads a group.

    Attributes:
        node: name of the node that hosts the leader.
        term: in which it was elected; a later leader has a higher one.
    """

    node: str
    term: int


def leader_of(slot: LeaderSlot | None) -> Leader | None:
    """Who leads, from a slot of the leader table."""
    return None if slot is None or slot.node is None else Leader(slot.node, slot.term)


def leader_in(status: object) -> Leader | None:
    """Who leads, from an answer to ``group_status``."""
    if isinstance(status, dict) and isinstance(status.get("leader"), str):
        return Leader(status["leader"], int(status.get("term") or 0))
    return None


def serves(slot: LeaderSlot | None, uid: int) -> bool:
    """Whether the leader table knows a leader of the group ``uid``, or of a later one of its name."""
    return slot is not None and slot.uid >= uid and slot.node is not None


def without_leader(lookup: Callable[[str], LeaderSlot | None], groups: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Those of the groups ``(name, uid)`` of which the leader table knows no leader yet."""
    return [(name, uid) for name, uid in groups if not serves(lookup(name), uid)]


def pack_argument(arg: object, what: str) -> bytes:
    """The user's argument as it travels; ``what`` names it in errors.

    Raises:
        TypeError: it holds something that msgpack does not carry, or a map whose keys could not be unpacked again.
        ValueError: it holds an integer of more than 64 bits, a str that is not valid Unicode, or is nested too deep.
        CommandTooLarge: it does not fit into a frame.
    """
    packed: bytes
    try:
        if type(arg) in _LEAF_TYPES:
            packed = _pack(arg)
        else:
            packed = msgpack.packb(arg)
            unpack(packed)  # a key such as (1, 2) would be packed and arrive as a list, which no dict takes as a key
    except TypeError as error:
        raise TypeError(f"{what} cannot be carried by msgpack: {error}") from error
    except OverflowError as error:
        raise ValueError(f"{what} holds an integer of more than 64 bits") from error
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"{what} cannot be carried by msgpack: {error}") from error
    if len(packed) > ARG_BYTES_MAX:
        raise errors.CommandTooLarge(f"{what} has {len(packed)} bytes when packed; a frame carries {ARG_BYTES_MAX}")
    return packed


def unpack(packed: bytes) -> Any:
    """The value that :func:`pack_argument`, or a node, packed."""
    return msgpack.unpackb(packed, strict_map_key=False)


def microseconds(seconds: object, what: str) -> int:
    """A span of time given by the user, in microseconds.

    Raises:
        ValueError: it is not a number of seconds from 0 to ten years; ``what`` names it.
    """
    if isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 <= seconds <= 10 * 365 * 86400:
        return int(seconds * 1e6)
    raise ValueError(f"{what} is a number of seconds from 0 to ten years, not {seconds!r}")


class Session:
    """What a client remembers of its commands to one group: which seqs are given out, and which have ended."""

    __slots__ = ("_ended", "acked", "name", "next_seq", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.next_seq = 1
        self.acked = 0  # all seqs up to here have ended
        self._ended: set[int] = set()  # those above acked that have
        self.waiting: deque[Call] = deque()

    @property
    def has_room(self) -> bool:
        """Whether one more command may be under way."""
        return self.next_seq - 1 - self.acked < WINDOW

    def end(self, seq: int) -> None:
        """Nobody waits for the result of ``seq`` any more."""
        if seq == self.acked + 1 and not self._ended:
            self.acked = seq
            return
        self._ended.add(seq)
        while self.acked + 1 in self._ended:
            self.acked += 1
            self._ended.discard(self.acked)


class Call:
    """One call of the user, over all its attempts. See the module's table for who does what.

    Attributes:
        state: QUEUED, READY, IN_FLIGHT, PAUSED or DONE.
        deadline_us: when the driver must call :meth:`on_deadline`, if nothing else happened.
        request_id: of the last attempt.
        result: of a call that is DONE without an error.
        error: what a call that is DONE raises, or None.
        waiter: the driver's own.
        kin: equal for calls that may share a run; None for what goes alone: a control call, a retry, a long argument.
    """

    # What a call begins with is the class's: only what differs is written into each one. (Measured: with slots and all
    # of it written, making a call cost as much as packing, sending and reading it.)
    _client_id = b""
    _session: Session | None = None
    _seq = 0
    _consistency = ipc.LINEARIZABLE
    _uid: int | None = None  # None: before the first attempt
    _issued_us = 0
    _started_us = 0
    _total_deadline_us = 0  # 0: bounded by the number of retries
    _doubt = 0  # an attempt whose outcome is not known; most calls never have more than one
    _more_doubts: set[int] | None = None
    _attempt_count = 0
    _group_changes = 0
    _story: list[str] | None = None
    where: int | None = None  # for control calls that go elsewhere than to the manager
    state: int = QUEUED
    deadline_us = 0
    request_id = 0
    result: Any = None
    error: BaseException | None = None
    waiter: Any = None
    kin: Any = None

    def __init__(self, kind: int, name: str, arg: Any, timeout_us: int, retry: int, retry_interval_us: int) -> None:
        self._kind = kind
        self.name = name  # of the group, or of the method
        self._arg = arg
        self._timeout_us = timeout_us
        self._retry_left = retry
        self._retry_interval_us = retry_interval_us
        self._leaves_doubt = kind == ipc.COMMAND

    @property
    def is_control(self) -> bool:
        """Whether this goes to the manager, not to the shard that owns a group's name."""
        return self._kind == ipc.CALL

    @property
    def is_patient(self) -> bool:
        """Whether there is time enough to let it wait for :data:`HOLD_US_MAX`, once."""
        return self._timeout_us >= 4 * HOLD_US_MAX

    @property
    def _is_repeatable(self) -> bool:
        """Whether an attempt may follow one that may have been carried out: a control call has no session."""
        return self._kind != ipc.CALL or not self._leaves_doubt

    def attempt(self, request_id: int, uid: int, now_us: int, wall_us: int) -> list[Any]:
        """The request of the next attempt; the state becomes IN_FLIGHT. It counts as sent until told otherwise.

        Args:
            request_id: never used before by this client.
            uid: of the group as the leader table has it now, or 0. Only the first attempt's is used.
            now_us: monotonic.
            wall_us: since 1970.
        """
        self.request_id = request_id
        self.state = IN_FLIGHT
        self._attempt_count += 1
        if self._kind == ipc.CALL:
            if self._leaves_doubt:
                self._add_doubt(request_id)
            remaining_ms = max(1, (self._total_deadline_us - GRACE_US - now_us + 999) // 1000)
            return [request_id, ipc.CALL, self.name, self._arg, remaining_ms]
        if self._uid is None:
            self._uid = uid
        timeout_ms = (self._timeout_us + 999) // 1000
        if self._kind == ipc.QUERY:
            return [request_id, ipc.QUERY, self.name, self._uid, timeout_ms, self._consistency, self._arg]
        assert self._session is not None
        if not self._has_doubt:
            self._issued_us = wall_us
        self._add_doubt(request_id)
        command = _pack((self._client_id, self._seq, self._session.acked, self._issued_us, self._arg))
        return [request_id, ipc.COMMAND, self.name, self._uid, timeout_ms, command]

    def on_unsent(self) -> None:
        """Not all bytes of the last attempt were accepted by the socket: READY again, as if it had not been made.

        A frame that is not whole is never read, so there is no doubt.
        """
        self._drop_doubt(self.request_id)
        self._attempt_count -= 1
        self.state = READY

    def on_refused(self, reason: str, now_us: int) -> None:
        """The node could not be reached, so nothing was sent."""
        if self.state == IN_FLIGHT:
            self._drop_doubt(self.request_id)
        elif self.state == READY:
            self._attempt_count += 1
        self._fail(errors.NodeNotRunning(reason), now_us, is_retried=True)

    def on_lost(self, now_us: int) -> None:
        """The connection broke after the last attempt was sent, and before its answer."""
        if self.state == IN_FLIGHT:
            self._fail(self._silence("the connection to the node broke"), now_us, is_retried=self._is_repeatable)

    def on_reply(self, request_id: int, code: int, body: Any, now_us: int) -> None:
        """A reply to one of this call's attempts, be it the last one or not."""
        if self.state == DONE:
            return
        if code == ipc.OK:
            self.on_result(body)
            return
        error = ipc.error_of(code, body)
        if code in _SETTLING_CODES or (code == ipc.SESSION_EXPIRED and self._leaves_doubt):
            self._finish(error)
            return
        if isinstance(error, errors.NotApplied):
            self._drop_doubt(request_id)
        if self.state != IN_FLIGHT or request_id != self.request_id:
            return  # an attempt that was given up: its answer only settles its own doubt
        if code == ipc.GROUP_CHANGED:
            self._on_group_changed(error, now_us)
        elif code == ipc.OUTCOME_UNKNOWN:
            self._fail(error, now_us, is_retried=self._is_repeatable)
        else:
            self._fail(error, now_us, is_retried=code in _RETRIED_CODES)

    def on_deadline(self, now_us: int) -> None:
        """``deadline_us`` has come."""
        if self.state == PAUSED:
            self._make_ready(now_us)
        elif self.state == IN_FLIGHT:
            silence = self._silence(f"no answer within {self._timeout_us / 1e6:g} s")
            self._fail(silence, now_us, is_retried=self._is_repeatable)
        elif self.state == READY:
            self._attempt_count += 1
            self._fail(errors.NodeNotRunning("the node accepts no request"), now_us, is_retried=True)
        elif self.state == QUEUED:
            assert self._session is not None
            self._session.waiting.remove(self)
            self._finish(errors.Overloaded(f"{WINDOW} commands of this client to {self.name!r} are under way already"))

    def abandon(self, reason: str) -> None:
        """The user, or the driver, gives up now."""
        if self.state == QUEUED and self._session is not None and self in self._session.waiting:
            self._session.waiting.remove(self)
        if self.state != DONE:
            self._finish(errors.NotApplied(reason))

    # ---------------------------------------------------------------- how it goes on

    def _make_ready(self, now_us: int) -> None:
        self.state = READY
        if self._attempt_count:
            self.kin = None  # a retry goes alone
        self.deadline_us = self._total_deadline_us or now_us + self._timeout_us + GRACE_US

    def _on_group_changed(self, error: errors.RaftFleetError, now_us: int) -> None:
        """The table was behind: another group has this name now. The node did not take the request for either."""
        self._drop_doubt(self.request_id)
        self._group_changes += 1
        if self._has_doubt or self._group_changes > _GROUP_CHANGES_MAX:
            self._finish(error)  # attempts may have been applied by the group that is no more
        else:
            self._uid = 0  # let the node, which knows better, look it up
            self._make_ready(now_us)

    def _fail(self, error: errors.RaftFleetError, now_us: int, *, is_retried: bool) -> None:
        """The last attempt came to nothing: pause and try again, or end."""
        if self._story is None:
            self._story = []
        if len(self._story) < _STORY_LENGTH_MAX:
            self._story.append(str(error))
        resume_us = now_us + self._retry_interval_us
        out_of_time = self._total_deadline_us != 0 and resume_us >= self._total_deadline_us - GRACE_US
        if not is_retried or self._retry_left <= 0 or out_of_time:
            self._finish(error, now_us)
            return
        self._retry_left -= 1
        self.state = PAUSED
        self.deadline_us = resume_us

    def _silence(self, reason: str) -> errors.RaftFleetError:
        return errors.OutcomeUnknown(reason) if self._leaves_doubt else errors.Unanswered(reason)

    def on_result(self, body: Any) -> None:
        """The answer OK to one of this call's attempts, while it is not DONE."""
        if self._kind != ipc.CALL:
            try:
                body = _unpack(body, strict_map_key=False)
            except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
                self.error = errors.ProtocolError(f"the node sent a result that is not msgpack: {error}")
                body = None
        self.result = body
        self.state = DONE
        session = self._session
        if session is not None:
            session.end(self._seq)

    def _finish(self, error: errors.RaftFleetError, now_us: int | None = None) -> None:
        """End with ``error``, or with OutcomeUnknown where a doubt is left that it does not settle."""
        is_settled = isinstance(error, (errors.UserCodeFailed, errors.OutcomeUnknown))
        story = self._story or []
        if self._has_doubt and not is_settled:
            told = "; ".join(story) or str(error)
            unknown = errors.OutcomeUnknown(
                f"{self._what()}: it may have been applied once ({self._attempt_count} attempts: {told})"
            )
            unknown.__cause__ = error
            self.error = unknown
        else:
            if self._attempt_count > 1 and now_us is not None and error.args:
                took_s = (now_us - self._started_us) / 1e6
                error.args = (f"{error} ({self._attempt_count} attempts in {took_s:.1f} s)", *error.args[1:])
            self.error = error
        self._end()

    def _end(self) -> None:
        self.state = DONE
        self._arg = b""
        session = self._session
        if session is not None and self._seq:
            session.end(self._seq)

    def _what(self) -> str:
        if self._kind == ipc.CALL:
            return f"call {self.name}"
        return f"{'command' if self._kind == ipc.COMMAND else 'query'} to {self.name!r}"

    @property
    def _has_doubt(self) -> bool:
        return bool(self._doubt or self._more_doubts)

    def _add_doubt(self, request_id: int) -> None:
        if not self._doubt:
            self._doubt = request_id
        elif self._more_doubts is None:
            self._more_doubts = {request_id}
        else:
            self._more_doubts.add(request_id)

    def _drop_doubt(self, request_id: int) -> None:
        if self._doubt == request_id:
            self._doubt = 0
        elif self._more_doubts is not None:
            self._more_doubts.discard(request_id)


def runs(calls: list[Call]) -> list[list[Call]]:
    """``calls`` that are READY, in the order in which they should leave: those of one list travel as one run.

    Of commands that is: first attempts of one session with consecutive seqs; of queries: first attempts with the same
    group and consistency.
    """
    result: list[list[Call]] = []
    growing: dict[Any, list[Call]] = {}
    for call in calls:
        if call.state != READY:
            continue
        kin = call.kin
        if kin is None:
            result.append([call])
            continue
        run = growing.get(kin)
        if run is not None and len(run) < RUN_COMMANDS_MAX:
            last = run[-1]
            if last._timeout_us == call._timeout_us and (not call._seq or last._seq + 1 == call._seq):
                run.append(call)
                continue
        growing[kin] = run = [call]
        result.append(run)
    return result


def attempt_run(run: list[Call], first_id: int, uid: int, now_us: int, wall_us: int) -> list[Any]:
    """The request for a list of :func:`runs`; as :meth:`Call.attempt` for each, with ids from ``first_id`` on."""
    first = run[0]
    if len(run) == 1:
        return first.attempt(first_id, uid, now_us, wall_us)
    request_id = first_id
    for call in run:
        call.request_id = request_id
        call.state = IN_FLIGHT
        call._attempt_count = 1
        call._uid = uid
        if call._leaves_doubt:
            call._issued_us = wall_us
            call._doubt = request_id
        request_id += 1
    args = [call._arg for call in run]
    timeout_ms = (first._timeout_us + 999) // 1000
    session = first._session
    if session is None:
        return [first_id, ipc.QUERY_RUN, first.name, uid, timeout_ms, first._consistency, len(run), _pack(args)]
    body = _pack((first._client_id, first._seq, session.acked, wall_us, args))
    return [first_id, ipc.COMMAND_RUN, first.name, uid, timeout_ms, len(run), body]


def run_results(body: object, count: int) -> tuple[int, int, list[Any]]:
    """A part of the answer to a run of ``count`` calls: how many come before it, how many after it, and what it holds.

    Raises:
        WireError: it is no such thing.
    """
    if type(body) is list and len(body) == 3 and int is type(body[0]) is type(body[1]) and type(body[2]) is bytes:
        offset, left, packed = body
        with contextlib.suppress(ValueError, TypeError, msgpack.UnpackException):
            results = _unpack(packed, strict_map_key=False)
            if type(results) is list and offset >= 0 and left >= 0 and offset + len(results) + left == count:
                return offset, left, results
    raise WireError("reply", "an answer to a run that does not fit it")


class ClientCore:
    """Makes calls and keeps the sessions of one client.

    Not safe for threads: a driver with threads locks around :meth:`command`, :meth:`start` and :meth:`turn`, and around
    whatever may end a call (``on_...``), since that ends a seq of its session.

    Args:
        client_id: 16 random bytes that no other client, and no fork of this one, has.
    """

    def __init__(self, client_id: bytes) -> None:
        if len(client_id) != ipc.CLIENT_ID_BYTES:
            raise ValueError(f"a client id has {ipc.CLIENT_ID_BYTES} bytes, not {len(client_id)}")
        self.client_id = client_id
        self._sessions: dict[str, Session] = {}
        # Replaced as one, so that a thread which is late writes into what nobody reads any more.
        self._routes: tuple[int, dict[str, int]] = (0, {})
        self._options: tuple[object, object, object, int, int] = (None, None, None, 0, 0)

    def hello(self) -> list[Any]:
        """The first request on every connection."""
        return [0, ipc.HELLO, ipc.PROTOCOL, self.client_id]

    def command(self, name: str, arg: object, timeout: float, retry: int, retry_interval: float) -> Call:
        """A command; see :meth:`raftfleet.client.sync.Fleet.command` for the arguments and :meth:`start` for more.

        Raises:
            TypeError, ValueError, CommandTooLarge: an argument is of no use; nothing happened.
        """
        packed = pack_argument(arg, "the argument of a command")
        call = self._group_call(ipc.COMMAND, name, packed, timeout, retry, retry_interval)
        session = self._sessions.get(name) if isinstance(name, str) else None
        if session is None:
            session = self._sessions.setdefault(name, Session(check_group_name(name)))
        call._session = session
        call.kin = session if len(packed) <= _RUN_ARG_BYTES_MAX else None
        call._client_id = self.client_id
        return call

    def query(
        self, name: str, arg: object, consistency: str, timeout: float, retry: int, retry_interval: float
    ) -> Call:
        """A query; see :meth:`raftfleet.client.sync.Fleet.query` for the arguments.

        Raises:
            TypeError, ValueError, CommandTooLarge: an argument is of no use; nothing happened.
        """
        if consistency not in CONSISTENCIES:
            raise ValueError(f"consistency is one of {', '.join(CONSISTENCIES)}, not {consistency!r}")
        packed = pack_argument(arg, "the argument of a query")
        if type(name) is not str or name not in self._routes[1]:
            check_group_name(name)
        call = self._group_call(ipc.QUERY, name, packed, timeout, retry, retry_interval)
        call._consistency = CONSISTENCIES[consistency]
        if len(packed) <= _RUN_ARG_BYTES_MAX:
            call.kin = name if consistency == "linearizable" else f"{name}\0{consistency}"
        return call

    def control(self, method: str, args: dict[str, Any], timeout: float, where: int | None = None) -> Call:
        """A call of a method of the manager, or of shard ``where``. ``timeout`` bounds all its attempts together.

        Raises:
            TypeError, ValueError, CommandTooLarge: an argument is of no use; nothing happened.
        """
        if not all(isinstance(key, str) for key in args):
            raise TypeError(f"names of arguments are str: {args!r}")
        pack_argument(args, f"an argument of {method}")
        timeout_us = microseconds(timeout, "timeout")
        call = Call(ipc.CALL, method, args, timeout_us, CONTROL_RETRY_COUNT, CONTROL_RETRY_INTERVAL_US)
        call._leaves_doubt = method not in READ_METHODS
        call.where = where
        return call

    def start(self, call: Call, now_us: int) -> None:
        """Let a new call begin: READY, or QUEUED if its session has no room."""
        call._started_us = now_us
        session = call._session
        if session is not None:
            seq = session.next_seq
            if session.waiting or seq - session.acked > WINDOW:
                session.waiting.append(call)
                attempts_us = (call._timeout_us + GRACE_US) * (call._retry_left + 1)
                call.deadline_us = now_us + attempts_us + call._retry_interval_us * call._retry_left
                return
            call._seq = seq
            session.next_seq = seq + 1
        elif call._kind == ipc.CALL:
            call._total_deadline_us = now_us + call._timeout_us + GRACE_US
        call.state = READY
        call.deadline_us = now_us + call._timeout_us + GRACE_US

    def turn(self, call: Call, now_us: int) -> list[Call]:
        """To be called once when ``call`` is DONE: calls of its session that have become READY by that."""
        session = call._session
        if session is None or not session.waiting:
            return []
        admitted = []
        while session.waiting and session.has_room:
            waiting = session.waiting.popleft()
            waiting._seq = session.next_seq
            session.next_seq += 1
            waiting._make_ready(now_us)
            admitted.append(waiting)
        return admitted

    def where(self, call: Call, workers: int) -> int:
        """The socket for this call on a node with so many workers: a shard's index, or :data:`CONTROL`."""
        if call._kind == ipc.CALL:
            return CONTROL if call.where is None else call.where
        known_workers, routes = self._routes
        if workers != known_workers or len(routes) >= _ROUTES_MAX:
            self._routes = (workers, routes := {})
        index = routes.get(call.name)
        if index is None:
            index = routes[call.name] = shard_of(call.name, workers)
        return index

    def _group_call(
        self, kind: int, name: str, packed: bytes, timeout: float, retry: int, retry_interval: float
    ) -> Call:
        known = self._options
        if (
            known[0] is timeout and known[1] is retry and known[2] is retry_interval
        ):  # mostly the defaults, checked once
            return Call(kind, name, packed, known[3], retry, known[4])
        if type(retry) is not int or not 0 <= retry < 1 << 31:
            raise ValueError(f"retry is a whole number of attempts after the first, not {retry!r}")
        timeout_us, interval_us = microseconds(timeout, "timeout"), microseconds(retry_interval, "retry_interval")
        self._options = (timeout, retry, retry_interval, timeout_us, interval_us)
        return Call(kind, name, packed, timeout_us, retry, interval_us)

"""Small state machines that ship with raftfleet: for the demo, the benchmarks and a first try.

They are ordinary user code: nothing here is known to the rest of the package. Use one as
``raftfleet.GroupConfig("raftfleet.testing.machines:JustAnInt")``; no ``--app-dir`` is needed, since every node has
raftfleet itself installed.
"""

from __future__ import annotations

from typing import Any

from raftfleet.machine import StateMachine


class JustAnInt(StateMachine):
    """One integer (the example of raft_fleet's README).

    Commands: ``["set", j]`` and ``"inc"``; both return the integer as it was before. Query: ``"get"``.
    """

    def new(self) -> int:
        return 0

    def command(self, state: int, arg: Any) -> tuple[int, int]:
        match arg:
            case ["set", int(value)]:
                return state, value
            case "inc":
                return state, state + 1
        raise ValueError(f'JustAnInt knows the commands "inc" and ["set", int], not {arg!r}')

    def query(self, state: int, arg: Any) -> int:
        if arg == "get":
            return state
        raise ValueError(f'JustAnInt knows the query "get", not {arg!r}')


class KeyValue(StateMachine):
    """A dict of str to any value.

    Commands: ``["put", key, value]`` and ``["delete", key]`` return the former value or None; ``["add", key, n]``
    returns the new sum (a missing key counts as 0). Queries: ``["get", key]``, ``["size"]`` and ``["keys"]`` (sorted).
    """

    def new(self) -> dict[str, Any]:
        return {}

    def command(self, state: dict[str, Any], arg: Any) -> tuple[Any, dict[str, Any]]:
        # The state is changed in place: the runtime keeps no other reference to it. All that can raise comes first,
        # because a command that raises must leave the state as it was.
        match arg:
            case ["put", str(key), value]:
                before = state.get(key)
                state[key] = value
                return before, state
            case ["delete", str(key)]:
                return state.pop(key, None), state
            case ["add", str(key), int(amount)]:
                total = state.get(key, 0) + amount
                if not -(1 << 63) <= total < 1 << 63:
                    raise OverflowError(f"the sum under {key!r} leaves 64 bits")
                state[key] = total
                return total, state
        raise ValueError(f"KeyValue does not know the command {arg!r}")

    def query(self, state: dict[str, Any], arg: Any) -> Any:
        match arg:
            case ["get", str(key)]:
                return state.get(key)
            case ["size"]:
                return len(state)
            case ["keys"]:
                return sorted(state)
        raise ValueError(f"KeyValue does not know the query {arg!r}")


class Echo(StateMachine):
    """Keeps nothing and returns its argument: the cost of a command without any user code (benchmarks)."""

    def new(self) -> None:
        return None

    def command(self, state: None, arg: Any) -> tuple[Any, None]:
        return arg, None

    def query(self, state: None, arg: Any) -> Any:
        return arg

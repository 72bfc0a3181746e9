"""State machines that behave badly, each in its own way."""

import os
import time

import raftfleet


class Awkward(raftfleet.StateMachine):
    """Counts its commands; some of them raise, return what msgpack cannot carry, or take long."""

    def new(self):
        return 0

    def command(self, state, arg):
        match arg:
            case "inc":
                return state, state + 1
            case "raise":
                raise ZeroDivisionError("on purpose")
            case "unpackable":
                return object(), state + 1000
            case "no pair":
                return None
            case ["sleep", seconds]:
                time.sleep(seconds)
                return "slept", state
        raise ValueError(arg)

    def query(self, state, arg):
        match arg:
            case "get":
                return state
            case "raise":
                raise KeyError("on purpose")
            case "unpackable":
                return object()
        raise ValueError(arg)


class Liar(Awkward):
    """Differs on purpose: in the process whose id is in the file that a first command names, it counts in thousands."""

    def command(self, state, arg):
        match arg:
            case ["inc unless", str(path)]:
                with open(path) as file:
                    is_liar = file.read() == str(os.getpid())
                return None, state + (1000 if is_liar else 1)
        return super().command(state, arg)


class NewRaises(raftfleet.StateMachine):
    """Cannot even begin."""

    def new(self):
        raise RuntimeError("no beginning")


class NotAMachine:
    """Can be imported, but is not a state machine."""

"""A counter that is asked for more than it can do."""

import time

import raftfleet


class SlowCounter(raftfleet.StateMachine):
    """Counts; each command takes a fifth of a millisecond."""

    def new(self):
        return 0

    def command(self, state, arg):
        time.sleep(0.0002)
        return state, state + 1

    def query(self, state, arg):
        return state

"""The registers of the simulations on real nodes: the checkers need not know where a history was made."""

from raftfleet.core.context import CommandContext
from raftfleet.testing.model import GroupRecord, RegistersMachine


class Nobody(GroupRecord):
    """On a real node there is no one record that all members share: the test compares afterwards."""

    def applied(self, operation, version, chain):
        pass

    def answered(self, version, chain):
        pass


TIMELESS = CommandContext()


class Registers(RegistersMachine):
    """Also answers ``["journal"]``: the operations that took effect, in order. Of their times it keeps nothing."""

    def __init__(self):
        super().__init__(Nobody(0))

    def command(self, state, arg):
        context, self.context = self.context, TIMELESS
        try:
            return super().command(state, arg)
        finally:
            self.context = context

    def query(self, state, arg):
        if arg == ["journal"]:
            return [state.version, state.chain, list(state.seen)]
        return super().query(state, arg)

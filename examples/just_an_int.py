"""The example of raft_fleet's README: four nodes, two zones, five groups of three members.

Run it:  python examples/just_an_int.py

It is two things at once: the module from which the nodes import the state machine (their ``--app-dir`` is this
folder), and a script that starts four nodes on this machine, uses them and stops them.
"""

from pathlib import Path

import raftfleet
from raftfleet.testing import LocalFleet


class JustAnInt(raftfleet.StateMachine):
    def new(self):
        return 0

    def command(self, i, arg):
        match arg:
            case ["set", j]:
                return i, j
            case "inc":
                return i, i + 1

    def query(self, i, arg):
        if arg == "get":
            return i


def main():
    with LocalFleet(app_dirs=[Path(__file__).parent]) as fleet:
        # Each node: raftfleet-node start --name n1 --zone zone1 --bind … --peers … --app-dir examples
        fleet.start_nodes({"n1": "zone1", "n2": "zone2", "n3": "zone1", "n4": "zone2"})
        n1, n2, n3 = (fleet.connect(name) for name in ("n1", "n2", "n3"))

        config = raftfleet.GroupConfig("just_an_int:JustAnInt")
        for number in range(1, 6):
            n1.add_consensus_group(f"consensus{number}", 3, config)
        print("groups:", n1.consensus_groups())

        print("query from n1:", n1.query("consensus1", "get"))
        print("command from n2:", n2.command("consensus1", "inc"))
        print("query from n3:", n3.query("consensus1", "get"))
        print("the leader is on", n1.whereis_leader("consensus1").node)

        for number in range(1, 6):
            n1.remove_consensus_group(f"consensus{number}")
        print("groups:", n1.consensus_groups())


if __name__ == "__main__":
    main()

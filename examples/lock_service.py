"""A small lock service: named locks with leases and fencing tokens.

Run it:  python examples/lock_service.py

The state machine shows what makes one deterministic although leases run out by time: it never reads a clock. The
leader stamps every command with its own (``self.context.time_us``), so all members see the same time for it.

A client that was paused may believe that it still holds a lock whose lease ran out. That is what the token is for:
it rises with every acquisition, and whatever the lock protects refuses a token lower than one it has seen.
"""

import threading
from pathlib import Path

import raftfleet
from raftfleet.testing import LocalFleet


class LockService(raftfleet.StateMachine):
    """Commands:

    * ``["acquire", lock, owner, lease_ms]`` -> ``{"token", "until_us"}``, or None while another owner holds it.
      The owner may acquire again to renew: the token stays.
    * ``["release", lock, token]`` -> whether that token held it.

    Queries: ``["holder", lock]`` -> owner or None; ``["count"]``. A query has no time of its own, so a holder is
    shown until somebody else acquires, even if its lease has run out.
    """

    def new(self):
        return {"next_token": 1, "locks": {}}

    def command(self, state, arg):
        match arg:
            case ["acquire", str(lock), str(owner), int(lease_ms)] if lease_ms > 0:
                return self._acquire(state, lock, owner, lease_ms)
            case ["release", str(lock), int(token)]:
                return self._release(state, lock, token)
        raise ValueError(f"no such command: {arg!r}")

    def query(self, state, arg):
        match arg:
            case ["holder", str(lock)]:
                held = state["locks"].get(lock)
                return held and held["owner"]
            case ["count"]:
                return len(state["locks"])
        raise ValueError(f"no such query: {arg!r}")

    def _acquire(self, state, lock, owner, lease_ms):
        now_us = self.context.time_us
        held = state["locks"].get(lock)
        is_free = held is None or held["until_us"] <= now_us
        if not is_free and held["owner"] != owner:
            return None, state
        token = state["next_token"] if is_free else held["token"]
        mine = {"owner": owner, "token": token, "until_us": now_us + lease_ms * 1000}
        # A new state, not a changed one: when a command raises, the state before it must be untouched.
        after = {"next_token": max(state["next_token"], token + 1), "locks": {**state["locks"], lock: mine}}
        return {"token": token, "until_us": mine["until_us"]}, after

    def _release(self, state, lock, token):
        held = state["locks"].get(lock)
        if held is None or held["token"] != token:
            return False, state
        return True, {**state, "locks": {name: held for name, held in state["locks"].items() if name != lock}}


def work(client, owner, log, tries):
    """Acquire, work, release, a few times; note who worked and with which token."""
    done = 0
    while done < tries:
        lease = client.command("locks", ["acquire", "printer", owner, 2000])
        if lease is None:
            threading.Event().wait(0.005)  # held by another: ask again in a moment
            continue
        log.append((lease["token"], owner))
        client.command("locks", ["release", "printer", lease["token"]])
        done += 1


def main():
    with LocalFleet(app_dirs=[Path(__file__).parent]) as fleet:
        fleet.start_nodes({"n1": "zone1", "n2": "zone2", "n3": "zone3"})
        n1 = fleet.connect("n1")
        n1.add_consensus_group("locks", 3, raftfleet.GroupConfig("lock_service:LockService"))

        log = []
        owners = {f"worker-{name}": fleet.connect(name) for name in ("n1", "n2", "n3")}
        threads = [threading.Thread(target=work, args=(client, owner, log, 10)) for owner, client in owners.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        tokens = [token for token, _ in log]
        assert tokens == list(range(1, 31)), tokens
        print(f"{len(owners)} workers on 3 nodes held the lock {len(log)} times, one after the other")

        # A holder that dies does not hold for ever.
        first = n1.command("locks", ["acquire", "printer", "crashed", 200])
        second = None
        while second is None:
            second = n1.command("locks", ["acquire", "printer", "patient", 2000])
        assert second["token"] > first["token"]
        print(f"the lease of token {first['token']} ran out; token {second['token']} fences its owner off")
        print("the printer is held by", n1.query("locks", ["holder", "printer"]))


if __name__ == "__main__":
    main()

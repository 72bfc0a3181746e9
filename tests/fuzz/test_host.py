"""Frames that decode and lie: whatever a peer says, nothing may raise out of a worker's loop.

Such frames come from no node of ours; they come from one with a bug, or with a key that it should not have. What they
say may cost what the group promises (Raft trusts its members), but not the worker, and with it all other groups.
"""

from __future__ import annotations

from typing import Any

import msgpack
from fuzz.garbage import changed, fuzzed, pack
from hypothesis import given
from hypothesis import strategies as st

from raftfleet.core.config import GroupConfig
from raftfleet.testing.fleet import COUNTER, SimFleet, SimFleetOptions
from raftfleet.testing.sim_worker import SimWorker
from raftfleet.wire.codec import decode_frame
from raftfleet.wire.errors import WireError

CONFIG = GroupConfig(COUNTER.machine, divergence_check_entries=3, log_entries_kept=2)


class LooseFleet(SimFleet):
    """Looks at nothing, and keeps the frames: ``(sender's endpoint, data)``."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, SimFleetOptions(workers=1, is_checked=False, may_diverge=True))
        self.frames: list[bytes] = []

    def stepped(self, worker: SimWorker) -> None:
        """Invariants do not hold among liars."""

    def sent(self, worker: SimWorker, instance: int, messages: list[Any]) -> None:
        """The same."""

    def send(self, worker: SimWorker, endpoint: str, instance: int, frame: bytes) -> None:
        self.frames.append(frame)
        super().send(worker, endpoint, instance, frame)


def lively_fleet() -> LooseFleet:
    """Elections, commands, a snapshot, a change of members: most kinds of messages have been sent."""
    fleet = LooseFleet(1)
    fleet.start({"n1": "z1", "n2": "z2", "n3": "z3"})
    fleet.add_group("counter", 3, CONFIG)
    client = fleet.client("n1")
    for _ in range(8):
        client.result(client.command("counter", "inc", retry=5))
    client.result(client.query("counter", "get", retry=5))
    return fleet


def frames_of_a_busy_time() -> list[bytes]:
    fleet = lively_fleet()
    fleet.kill_node("n3")
    fleet.run_for(2)
    fleet.restart_node("n3")
    fleet.wait_settled()
    kinds: dict[int, list[bytes]] = {}
    for frame in fleet.frames:
        for message in decode_frame(frame).messages:
            kinds.setdefault(message[0], []).append(frame)
    return [frame for kind in sorted(kinds) for frame in (kinds[kind][:2] + kinds[kind][-2:])]


FRAMES = frames_of_a_busy_time()


@fuzzed
@given(st.data())
def test_no_frame_of_a_peer_raises_out_of_the_loop(data: st.DataObject) -> None:
    fleet = lively_fleet()
    uid = fleet.uid_of("counter")
    for _ in range(data.draw(st.integers(1, 4))):
        _, _, _, _, contents = msgpack.unpackb(data.draw(st.sampled_from(FRAMES)), raw=False, strict_map_key=False)
        contents = data.draw(changed(contents))
        workers = fleet.live_workers()
        receiver, sender = data.draw(st.sampled_from([(a, b) for a in workers for b in workers if a is not b]))
        frame = pack([1, fleet.fleet_id, sender.instance, receiver.instance, aimed(data, contents, fleet, uid)])
        try:
            decoded = decode_frame(frame)
        except WireError:
            continue
        receiver.work(lambda host, s=sender, d=decoded: host.receive(s.instance, d.messages))  # type: ignore[misc]
        fleet.run_for(0.3)
    fleet.run_for(3)


def aimed(data: st.DataObject, contents: Any, fleet: LooseFleet, uid: int) -> Any:
    """Messages about this fleet's groups and terms, so that they are not all put aside as unknown."""
    if not isinstance(contents, list):
        return contents
    for message in contents:
        if isinstance(message, list) and len(message) > 2 and type(message[0]) is int and message[0] < 32:
            if data.draw(st.booleans()):
                message[1] = data.draw(st.sampled_from([uid, 0]))
            if data.draw(st.booleans()):
                terms = [member.term for _, member in fleet.members_of(uid)]
                message[2] = max(terms) + data.draw(st.integers(0, 1))
    return contents

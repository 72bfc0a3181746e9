"""A host on a simulated disk: what comes back, what rests, and what is not begun twice."""

from __future__ import annotations

import random
from typing import Any

import msgpack
import pytest

from raftfleet.core.config import GroupConfig
from raftfleet.core.durable import DurableShard
from raftfleet.core.host_messages import RPC_ANSWER, RpcAnswer
from raftfleet.core.member import Member
from raftfleet.core.messages import GONE, NOOP, VOTE_ANSWER, Append, Entry, Gone, Vote, VoteAnswer
from raftfleet.core.names import FLEET_UID
from raftfleet.fleet.host import Host, HostSettings, Outputs
from raftfleet.fleet.machine import FleetState
from raftfleet.fleet.reconcile import Transfer
from raftfleet.storage.keeper import load_state, open_keeper
from raftfleet.testing.disk import FakeFiles
from raftfleet.testing.machines import JustAnInt

FLEET = bytes(range(16))
MACHINE = GroupConfig("raftfleet.testing.machines:JustAnInt")
PEER = 7_000


class Node:
    """Worker ``index`` of node n1; ``knows`` says whether its code can be imported."""

    def __init__(self, files: FakeFiles | None = None, *, knows: bool = True, index: int = 1, workers: int = 2) -> None:
        self.files = files or FakeFiles()
        self.knows = knows
        self.keeper, self.found = open_keeper("/d", node="n1", new_instance=1, files=self.files, segment_bytes=1 << 16)
        settings = HostSettings("n1", index, workers, "tcp://127.0.0.1:1")
        self.host = Host(self.found.instance, settings, random.Random(1), self.make_machine, self.keeper)
        self.now_us = 1_000_000
        self.host.begin(self.now_us, 0)
        assert isinstance(self.host.shard, DurableShard)
        self.shard = self.keeper.shard = self.host.shard
        self.host.restore(self.found, lambda info: load_state(self.keeper.store, info))
        self.out = self.turn()

    def make_machine(self, config: GroupConfig) -> tuple[Any, Any]:
        if not self.knows:
            raise ModuleNotFoundError("no module named 'just_an_int'")
        from raftfleet.core.context import CommandContext

        machine = JustAnInt()
        machine.context = CommandContext()
        return machine, None

    def turn(self, *, us: int = 1000) -> Outputs:
        self.now_us += us
        self.host.begin(self.now_us, 0)
        if self.now_us >= self.host.next_deadline_us():
            self.host.tick()
        out = self.host.finish()
        self.keeper.now_us = self.now_us
        self.keeper.rest(self.now_us)
        return out

    def feed(self, state: FleetState, index: int = 10) -> Outputs:
        self.host.on_feed_reset(index, state.dump())
        return self.turn()

    def again(self, *, knows: bool = True, keep: float = 0.0, workers: int = 2) -> Node:
        self.files.crash(keep=keep)
        return Node(self.files, knows=knows, index=self.host.settings.index, workers=workers)


def fleet_state(*groups: str, removed: tuple[str, ...] = ()) -> FleetState:
    """A fleet of n1 (instances 2 and 1: this worker is its second) and two others."""
    state = FleetState()
    nodes = []
    for number, instances in ((1, [2, 1]), (2, [PEER, PEER + 1]), (3, [PEER + 2, PEER + 3])):
        fields = {"name": f"n{number}", "zone": f"z{number}", "host": "127.0.0.1", "port": 1000 * number}
        nodes.append({**fields, "public_key": "", "instances": instances})
    state.apply(["found", FLEET, nodes], 0)
    for name in (*groups, *removed):
        state.apply(["add_group", name, 3, MACHINE.to_dict()], 0)
    for name in removed:
        state.apply(["remove_group", name], 0)
    return state


def names_of_worker_1(count: int) -> list[str]:
    from raftfleet.core.names import shard_of

    return [name for name in (f"g{number}" for number in range(100)) if shard_of(name, 2) == 1][:count]


def node_with_groups(*names: str) -> Node:
    node = Node()
    node.host.set_fleet(FLEET)
    node.keeper.store.set_fleet(FLEET)
    node.feed(fleet_state(*names))
    assert sorted(member.name for member in node.shard.members.values()) == sorted(names)
    return node


def test_members_fleet_and_addresses_come_back_before_anybody_is_heard() -> None:
    names = names_of_worker_1(3)
    node = node_with_groups(*names).again()
    assert sorted(member.name for member in node.shard.members.values()) == sorted(names)
    assert node.host.fleet_id == FLEET
    assert node.out.addresses[PEER] == ("tcp://127.0.0.1:2001", "")
    assert not any(member.is_leader for member in node.shard.members.values())


def test_a_member_whose_code_is_missing_rests_untouched_and_comes_back_with_the_code() -> None:
    (name,) = names_of_worker_1(1)
    first = node_with_groups(name)
    uid = next(iter(first.shard.members))
    first.host.receive(PEER + 1, [Append(1, uid, 5, 0, 0, 0, 1, 0, [Entry(5, NOOP, b"")])])
    first.turn()
    node = first.again(knows=False)
    assert node.shard.members == {}
    assert node.shard.resting == {uid}
    assert any("rests on the disk" in text for _, text in node.out.notes)
    node.feed(fleet_state(name))
    node.host.receive(PEER + 1, [Append(1, uid, 6, 0, 0, 0, 1, 9, [Entry(6, NOOP, b"")])])
    node.turn()
    assert node.shard.members == {}, "neither the fleet's log nor a leader begins it anew"
    node.knows = True
    for _ in range(12):
        node.turn(us=1_000_000)
    assert (node.shard.members[uid].term >= 5, node.shard.members[uid].last_index) == (True, 1)
    assert node.shard.resting == set()


def test_a_group_removed_while_the_worker_was_down_is_forgotten_and_an_unknown_one_kept() -> None:
    old, new = names_of_worker_1(2)
    node = node_with_groups(old)
    uid = next(iter(node.shard.members))
    node = node.again()
    node.feed(fleet_state())  # older than this member: it knows of no group yet
    assert uid in node.shard.members, "unknown is not removed"
    node.feed(fleet_state(new, removed=()), index=11)
    node = node.again()
    state = fleet_state(removed=(old,))
    node.feed(state, index=12)
    assert uid not in node.shard.members
    assert uid not in {group.uid for group in node.again().found.groups}


def test_a_member_on_a_surplus_worker_is_not_given_up_while_its_group_is_not_known_there_yet() -> None:
    """Found by the storm of seed 69: it was begun anew, with its vote and its log forgotten (DESIGN 5.7)."""
    old, young = names_of_worker_1(2)
    node = node_with_groups(old, young)
    uid = next(uid for uid, member in node.shard.members.items() if member.name == young)
    node = node.again(workers=1)
    node.feed(fleet_state(old), index=10)  # worker 0 has read the log as far as this
    member = node.shard.members[uid]
    node.host.on_feed(11, [msgpack.packb(["remove_group", old])], 0)
    node.turn()
    assert set(node.shard.members.values()) == {member}
    state = fleet_state(old, young)
    for name in (old, young):
        state.apply(["remove_group", name], 0)
    node.feed(state, index=20)
    assert node.shard.members == {}


@pytest.mark.parametrize("early", [False, True])
def test_a_removed_group_is_not_begun_anew_after_a_restart_from_what_was_known_before(early: bool) -> None:
    """Found by a storm (284): its members voted twice in one term, and might have served with an empty state."""
    old, young, new = names_of_worker_1(3)
    node = node_with_groups(old, young)
    uid = next(uid for uid, member in node.shard.members.items() if member.name == old)
    removal: bytes = msgpack.packb(["remove_group", old])
    if early:  # whoever removed the group says so before the fleet's log does
        node.host._run_rpc("drop_group", {"uid": uid}, lambda code, body: None)
    else:
        node.host.on_feed(11, [removal], 0)
    node.turn()
    for _ in range(2):
        node = node.again()
        node.feed(fleet_state(old, young, new), index=10)
        for _ in range(3):
            node.turn(us=11_000_000)
        assert [member.name for member in node.shard.members.values()] == [young]
    node.host.on_feed(11, [removal], 0)
    node.turn()
    assert sorted(member.name for member in node.shard.members.values()) == sorted([young, new])


def test_removals_that_a_repaired_fleet_has_lost_hold_nothing_up_after_a_restart() -> None:
    old, young = names_of_worker_1(2)
    node = node_with_groups(old)
    node.host.on_feed(11, [msgpack.packb(["remove_group", old])], 0)
    node.turn()
    node = node.again()
    state = fleet_state(old, young)
    state.epoch = 1
    node.feed(state, index=5)
    assert sorted(member.name for member in node.shard.members.values()) == sorted([old, young])


def test_a_removed_member_is_not_begun_anew_from_the_fleets_log_after_a_restart() -> None:
    (name,) = names_of_worker_1(1)
    node = node_with_groups(name)
    member = next(iter(node.shard.members.values()))
    node.shard.drop_member(member)
    node.turn()
    node = node.again()
    node.feed(fleet_state(name))
    assert node.shard.members == {}


def test_an_empty_member_that_was_removed_while_the_worker_was_down_asks_those_who_hold_the_group_and_goes() -> None:
    """Begun by a leader, and removed before anything came: it lies on the disk with nobody in it to ask."""
    node = Node()
    node.host.set_fleet(FLEET)
    node.keeper.store.set_fleet(FLEET)
    state = fleet_state()
    names = names_of_worker_1(9)
    for name in names:
        state.apply(["add_group", name, 1, MACHINE.to_dict()], 0)
    group = next(state.by_name[name] for name in names if state.desired(state.by_name[name])[0][1] != 1)
    (holder,) = (instance for _, instance in state.desired(group))
    node.feed(state)
    assert group.uid not in node.shard.members
    node.host.receive(PEER + 1, [Append(1, group.uid, 5, 9, 5, 0, 1, 7, [Entry(5, NOOP, b"")])])
    node.turn()
    node = node.again()
    assert not node.shard.members[group.uid].membership.lives
    node.feed(state)
    asked = []
    for _ in range(10):
        asked += [(to, m) for to, ms in node.turn(us=500_000).sends.items() for m in ms if isinstance(m, Vote)]
    assert [to for to, m in asked if m.uid == group.uid and m.pre][:1] == [holder]
    assert all(m.pre for _, m in asked if m.uid == group.uid), "who may be no member disturbs nobody"
    node.host.receive(holder, [Gone(GONE, group.uid, 5, 12)])
    node.turn()
    assert group.uid not in node.shard.members
    assert group.uid not in {stored.uid for stored in node.again().found.groups}


def test_a_config_that_changed_while_the_worker_was_down_is_taken_over_and_kept() -> None:
    (name,) = names_of_worker_1(1)
    node = node_with_groups(name).again()
    state = fleet_state(name)
    settings = GroupConfig(MACHINE.machine, log_entries_kept=7).to_dict()
    state.apply(["change_config", name, settings], 0)
    node.feed(state)
    assert [member.config.log_entries_kept for member in node.shard.members.values()] == [7]
    assert [group.config["log_entries_kept"] for group in node.again().found.groups] == [7]


def test_no_member_is_begun_while_there_is_no_room_and_all_are_when_there_is() -> None:
    names = names_of_worker_1(2)
    node = node_with_groups(names[0])
    node.files.plan = lambda number, call: 28 if call in ("pwrite", "fallocate") else None
    uid = next(iter(node.shard.members))
    node.host.receive(PEER + 1, [Append(1, uid, 5, 0, 0, 0, 1, 0, [Entry(5, NOOP, b"")])])
    node.turn()
    assert node.shard.is_full
    node.feed(fleet_state(*names))
    assert len(node.shard.members) == 1
    node.files.plan = lambda number, call: None
    for _ in range(12):
        node.turn(us=1_000_000)
    assert not node.shard.is_full
    assert len(node.shard.members) == 2


def test_the_fleets_own_member_comes_back_with_its_snapshot_and_feeds_from_it() -> None:
    node = Node(index=0)
    node.host.set_fleet(FLEET)
    node.host.start_fleet((1, PEER), [], campaign=False)
    node.turn()
    member = node.shard.members[FLEET_UID]
    state = fleet_state()
    state.nodes["n1"].instances = (1, 2)
    member.state = state
    index, term, data = 40, 3, b""
    member.applied = member.commit = index
    member.log.reset_to(index, term)
    member.term = term
    _, _, data = member.make_snapshot()
    assert node.keeper.save_snapshot(FLEET_UID, index, term, data)
    node.keeper.store.reset(FLEET_UID, index, term)
    node.keeper.store.save_vote(FLEET_UID, term, 0)
    assert node.keeper.sync()
    node = node.again()
    assert node.host.fleet_known
    assert node.host.fleet_index == index
    assert set(node.host.fleet.nodes) == {"n1", "n2", "n3"}


def test_what_is_answered_to_other_workers_waits_for_the_disk_too() -> None:
    (name,) = names_of_worker_1(1)
    node = node_with_groups(name)
    uid = next(iter(node.shard.members))
    answered: list[Any] = []
    node.host.begin(node.now_us + 1, 0)
    node.host._run_rpc("drop_group", {"uid": uid}, lambda code, body: answered.append(code))
    node.host._send(PEER, "the answer")
    node.host.flush()
    assert "the answer" not in [m for messages in node.host.collect_sends().values() for m in messages]
    assert not node.shard.is_saved
    assert "the answer" in [m for messages in node.host.persist().values() for m in messages]
    assert node.shard.is_saved


def test_the_numbers_of_requests_and_beats_rise_from_one_process_of_an_instance_to_the_next() -> None:
    node = node_with_groups(*names_of_worker_1(1))
    seen = []
    for _ in range(3):
        seen.append((node.host._next_id, node.shard.link(PEER).seq))
        node = node.again()
    assert seen == sorted(seen)
    assert all(later[0] - earlier[0] > 1 << 38 for earlier, later in zip(seen, seen[1:], strict=False))
    assert all(later[1] - earlier[1] > 1 << 38 for earlier, later in zip(seen, seen[1:], strict=False))
    assert seen[-1][0] < 1 << 62


def test_an_answer_to_the_former_process_is_not_taken_for_one_to_a_new_request() -> None:
    node = node_with_groups(*names_of_worker_1(1))
    first_id = node.host._next_id
    node = node.again()
    answered: list[Any] = []
    node.host.rpc(PEER, "who_leads", {"uid": 1}, lambda code, body: answered.append(code), 1_000_000)
    node.host.receive(PEER, [RpcAnswer(RPC_ANSWER, first_id, 0, None)])
    assert answered == []


def test_a_leadership_that_nobody_took_is_not_handed_over_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = names_of_worker_1(1)
    node = node_with_groups(name)
    (member,) = node.shard.members.values()
    tried: list[int] = []
    monkeypatch.setattr(Member, "transfer", lambda self, target: tried.append(target))
    node.host._take_step(member, Transfer(PEER))
    node.host._on_event(("transfer_failed", member.uid))
    node.host._take_step(member, Transfer(PEER))
    assert tried == [PEER], "commands wait while a leadership is handed over"
    node.host.begin(node.now_us + 20_000_000, 0)
    node.host._take_step(member, Transfer(PEER))
    assert tried == [PEER, PEER]


@pytest.mark.parametrize(
    ("level", "handed_over"),
    [(0, False), (1, False), (2, True)],
)
def test_without_room_a_leadership_goes_only_where_a_quorum_has_room(
    monkeypatch: pytest.MonkeyPatch, level: int, handed_over: bool
) -> None:
    (name,) = names_of_worker_1(1)
    node = node_with_groups(name)
    (member,) = node.shard.members.values()
    member.campaign(pre=False)
    node.turn()
    peers = [voter for voter in member.voters if voter != node.host.instance]
    assert len(peers) == 2
    for peer in peers:
        node.host.receive(peer, [VoteAnswer(VOTE_ANSWER, member.uid, member.term, False, True)])
    node.turn()
    lead = member.lead
    assert lead is not None
    tried: list[int] = []
    monkeypatch.setattr(Member, "transfer", lambda self, target: tried.append(target))
    monkeypatch.setattr(Member, "live_members", lambda self: set(member.voters))
    for number, peer in enumerate(peers):
        lead.progress[peer].match = member.log.last_index if number < level else member.log.last_index - 1
    node.shard.is_full = True
    node.host.drain()
    assert bool(tried) == handed_over
    node.shard.is_full = False
    tried.clear()
    node.host.drain()
    assert tried, "a node that is stopped hands over to whoever lacks least"

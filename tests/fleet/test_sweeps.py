"""What is done slowly, behind the events, costs the same for any number of groups, and misses none of them."""

from __future__ import annotations

import pytest

from raftfleet.core.member import Member
from raftfleet.core.names import FLEET_UID, shard_of
from raftfleet.fleet import host as host_module
from raftfleet.fleet import host_calls
from raftfleet.testing.fleet import COUNTER, SimFleet
from raftfleet.testing.sim_worker import SimWorker

FIVE = {"n1": "z1", "n2": "z2", "n3": "z3", "n4": "z1", "n5": "z2"}
SWEEP_S = host_module.SWEEP_US / 1_000_000


def started(group_count: int) -> SimFleet:
    fleet = SimFleet(1)
    fleet.start(FIVE)
    for number in range(group_count):
        fleet.add_group(f"group {number}")
    fleet.run_for(3 * SWEEP_S)
    return fleet


def watch_announcements(worker: SimWorker, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Uids, as the worker announces that it leads them."""
    announced: list[int] = []
    announce = worker.host._announce

    def noted(member: Member) -> None:
        announced.append(member.uid)
        announce(member)

    monkeypatch.setattr(worker.host, "_announce", noted)
    return announced


def owned(worker: SimWorker) -> dict[int, tuple[int, int]]:
    """Leaders that the worker knows of the groups whose name it owns, but for those that it leads itself."""
    host = worker.host
    names = {group.uid: group.name for group in host.fleet.groups.values()}
    return {
        uid: known
        for uid, known in host.leaders.items()
        if uid in names
        and shard_of(names[uid], host.settings.workers) == host.settings.index
        and known[1] != host.instance
    }


def test_a_sweep_says_again_what_a_few_members_lead_and_reaches_all_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = started(40)
    monkeypatch.setattr(host_module, "SWEEP_MEMBERS_MAX", 3)
    worker = max(fleet.live_workers(), key=lambda w: sum(m.lead is not None for m in w.host.shard.members.values()))
    led = {uid for uid, member in worker.host.shard.members.items() if member.lead is not None}
    assert len(led) > 3
    fleet.run_for(2 * SWEEP_S)  # what is left of the turn that began before
    announced = watch_announcements(worker, monkeypatch)
    fleet.run_for(SWEEP_S)
    assert len(announced) <= 3
    fleet.run_for(SWEEP_S * (2 * len(worker.host.shard.members) // 3 + 2))
    assert set(announced) == led


def test_a_new_leader_says_so_once_more_at_the_next_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module.Host, "_sweep_turn", lambda host: [])
    fleet = started(1)
    old = fleet.leader_of("group 0")
    assert old is not None
    uid = fleet.uid_of("group 0")
    watched = [watch_announcements(worker, monkeypatch) for worker in fleet.live_workers()]
    fleet.kill_node(old.node.name)
    fleet.run_until(lambda: fleet.leader_of("group 0"), "another leader", 30)
    fleet.run_for(2 * SWEEP_S)
    assert sum(announced.count(uid) for announced in watched) >= 2
    for announced in watched:
        announced.clear()
    fleet.run_for(3 * SWEEP_S)
    assert not any(announced.count(uid) for announced in watched), "and then it is silent"


def test_a_worker_that_comes_up_asks_the_others_what_they_lead() -> None:
    fleet = started(30)
    for worker in fleet.live_workers():
        before = owned(worker)
        worker.host.leaders.clear()
        worker.host._asked_for_leaders = False
        worker.host._nodes_changed()
        fleet.run_for(1.5)
        missing = before.keys() - owned(worker).keys()
        assert not missing, f"{worker.node.name}/{worker.index} has not heard of {missing}"


def test_a_wrong_guess_teaches_who_leads() -> None:
    fleet = started(12)
    state = fleet.any_state()
    assert state is not None
    taught = 0
    for group in state.groups.values():
        members = {worker.instance for worker, _ in fleet.members_of(group.uid)}
        for worker in fleet.live_workers():
            host = worker.host
            known = host.leaders.get(group.uid)
            if worker.instance in members or known is None or not host._owns(group.name):
                continue
            follower = next(instance for instance in members if instance != known[1])
            host.leaders[group.uid] = (known[0] - 1, follower)
            client = fleet.client(worker.node.name)
            client.result(client.command(group.name, "inc"))
            assert host.leaders[group.uid] == known
            taught += 1
    assert taught > 3


def test_a_member_that_could_not_start_is_tried_again() -> None:
    fleet = started(1)
    fleet.add_group("probe", 5)  # its import check is remembered
    fleet.nodes["n3"].broken_specs.add(COUNTER.machine)
    fleet.add_group("late", 5)
    uid = fleet.uid_of("late")
    fleet.run_for(SWEEP_S)
    assert "n3" not in {worker.node.name for worker, _ in fleet.members_of(uid)}
    fleet.nodes["n3"].broken_specs.clear()
    fleet.run_for(2 * SWEEP_S)
    assert "n3" in {worker.node.name for worker, _ in fleet.members_of(uid)}
    fleet.wait_settled()
    assert all(not worker.host._unstarted for worker in fleet.live_workers())


def test_who_has_many_members_counts_them_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = started(10)
    worker = fleet.live_workers()[0]
    members = worker.host.shard.members
    led = sum(uid != FLEET_UID and member.lead is not None for uid, member in members.items())
    assert worker.host._census() == (led, [])
    monkeypatch.setattr(host_calls, "CENSUS_US_PER_MEMBER", 10_000_000)
    monkeypatch.setattr(worker.host, "_counted", (77, []))
    fleet.run_for(5)
    assert worker.host._census()[0] == 77
    fleet.run_for(10 * len(members) + 1)
    assert worker.host._census()[0] == led

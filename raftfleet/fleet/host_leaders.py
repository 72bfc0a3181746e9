"""Who leads: learned, announced, written to the leader table, and asked for when nobody said it.

This module elects nobody; members do (:mod:`raftfleet.core.member`). Rules:

* A leader that has committed in its term announces itself to the worker that owns the group's name, on every node. That
  worker writes the node's leader table. News of a lower term than is known is old news.
* A leader that becomes known sets the requests free that wait for one. Those that wait for the answer of the leader
  before it go to the new one.
* News can be lost. Where none comes, some member is asked, each time another, since the first may be the very one that
  is down; and a member here that follows a leader again says so itself.
"""

from __future__ import annotations

from typing import Any

from raftfleet.core.codes import GONE_UID, OK
from raftfleet.core.host_messages import Leadership
from raftfleet.core.member import Member
from raftfleet.core.names import FLEET_GROUP, FLEET_UID
from raftfleet.fleet.host_asking import AskingLayer
from raftfleet.fleet.requests import IN_A_LOG

ASK_WHO_LEADS_US = 250_000
ASK_FOR_LEADERS_US = 1_000_000
ASK_FOR_LEADERS_ATTEMPTS = 10
LEADERSHIPS_SHARED_MAX = 10_000


class LeaderLayer(AskingLayer):
    """Learns, tells and asks who leads. See the module's text."""

    def _learn_leader(self, uid: int, term: int, instance: int) -> None:
        known = self.leaders.get(uid)
        if known is not None and known[0] > term:
            return
        if known != (term, instance):
            if len(self._leaderships) >= LEADERSHIPS_SHARED_MAX:
                self._leaderships.clear()
            self.leaders[uid] = self._leaderships.setdefault((term, instance), (term, instance))
            if self._forwarded:
                self._moved[uid] = None
            group = self.fleet.groups.get(uid)
            if group is not None:
                if self._known.get(group.name) == uid:
                    self._table_leader(group.name, uid, term, instance)
            elif uid == FLEET_UID:
                self._table_leader(FLEET_GROUP, uid, term, instance)
            elif not self._is_dead(uid):
                pass  # announced before the fleet's log told of it; used when it does
            else:
                del self.leaders[uid]
        waiting = self._parked.pop(uid, None)
        if waiting:
            for request in waiting:
                if not request.done:
                    self._route(request)

    def _lost_leader(self, uid: int) -> None:
        member = self.shard.members.get(uid)
        self.leaders.pop(uid, None)
        if member is not None:
            self._leaderless[uid] = None
            if uid == FLEET_UID or self._known.get(member.name) == uid:
                self._out.table.append(("leaderless", member.name, uid))

    def _look_for_leaders(self) -> None:
        """Members that lost their leader and follow one again.

        The same one does not announce itself twice, and the notice of another may have come in the very turn in which
        the loss was told, and been undone by it.
        """
        for uid in list(self._leaderless):
            member = self.shard.members.get(uid)
            if member is None or member.lead is not None or uid in self.leaders:
                del self._leaderless[uid]
            elif member.leader:
                del self._leaderless[uid]
                self._learn_leader(uid, member.term, member.leader)

    def _follow_leaders(self) -> None:
        """Requests that wait for the answer of a leader that was replaced go to the new one.

        A session answers a command that comes twice with what its first execution gave.
        """
        moved, self._moved = self._moved, {}
        for request in [r for r in self._forwarded.values() if r.uid in moved]:
            known = self.leaders.get(request.uid)
            if known is not None and known[1] != request.sent_to:
                self._forwarded.pop(request.forward_id, None)
                request.forward_id = 0
                request.maybe |= IN_A_LOG
                self._route(request)

    def _table_leader(self, name: str, uid: int, term: int, instance: int) -> None:
        node = self.settings.node if instance == self.instance else self._node_of(instance)
        self._out.table.append(("leader", name, uid, term, node, instance))

    def _announce(self, member: Member) -> None:
        """Tell the owning worker of every node who leads."""
        notice = Leadership(member.uid, member.term, self.instance)
        for node in self.fleet.nodes.values():
            instance = node.instance_for(member.name)
            if instance != self.instance:
                self._notices.setdefault(instance, {})[member.uid] = notice

    def _ask_for_leaders(self) -> None:
        """This worker has come up and heard no announcements: have every other one say what it leads of ours."""

        def ask(instance: int, attempts_left: int) -> None:
            def answered(code: int, body: Any) -> None:
                if code != OK and attempts_left and instance in self.addresses:
                    row = (self.now_us + ASK_FOR_LEADERS_US, lambda: ask(instance, attempts_left - 1))
                    self._delayed.append(row)

            self.rpc(instance, "announce", {"to": self.instance}, answered, ASK_FOR_LEADERS_US)

        for instance in list(self.addresses):
            ask(instance, ASK_FOR_LEADERS_ATTEMPTS)

    def _announce_all_to(self, instance: int) -> bool:
        """What the worker ``instance`` has asked for by :meth:`_ask_for_leaders`; False if it is not known here yet."""
        home = self.fleet.instance_home(instance)
        node = self.fleet.nodes.get(home[0]) if home is not None else None
        if node is None or home is None:
            return False
        for member in self.shard.members.values():
            if member.is_established and node.instance_for(member.name) == instance:
                notice = Leadership(member.uid, member.term, self.instance)
                self._notices.setdefault(instance, {})[member.uid] = notice
        return True

    def _ask_who_leads(self, uid: int) -> None:
        """Ask some member, one at a time. The requests themselves wait meanwhile.

        They are sent only to whom somebody holds for the leader: one that was sent to a guess, and got no answer, could
        not be told any more that it was not applied.
        """
        if uid in self._asking:
            return
        instance = self._guess(uid)
        if not instance:
            return
        self._asking[uid] = None

        def answered(code: int, body: Any) -> None:
            self._asking.pop(uid, None)
            if code == GONE_UID:
                for request in self._parked.pop(uid, ()):
                    if not request.done:
                        self._dead_uid_met(request)
            elif code == OK and body[0] and body[0] != self.instance:
                self._learn_leader(uid, body[1], body[0])

        self.rpc(instance, "who_leads", {"uid": uid}, answered, ASK_WHO_LEADS_US)

    def _guess(self, uid: int) -> int:
        """Some member of the group, each time another: it will say who leads."""
        if uid == FLEET_UID:
            candidates = [node.instances[0] for node in self.fleet.nodes.values()]
        else:
            group = self.fleet.groups.get(uid)
            if group is None:
                return 0
            candidates = [instance for _, instance in self.fleet.desired(group)]
            candidates += [instance for _, instance in group.members if instance not in candidates]
        candidates = [i for i in candidates if i != self.instance and i not in self.fleet.gone]
        if not candidates:
            return 0
        # Another one each time, over all requests: the first may be the very node that is down.
        self._guess_count += 1
        return candidates[self._guess_count % len(candidates)]

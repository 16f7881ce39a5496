"""A worker's part in giving a shard that has lost its memory what it needs to go on: a promise, and the last results."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ps_accordion.config import Settings
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Send

from .exchange import Exchange
from .member import COORDINATOR, Membership
from .pushes import server_name

__all__ = ["Restoring"]


class Restoring:
    """Promises when it is asked to, and repeats what blank shards lack until its own round goes on.

    What has a payload is repeated after twice the time each time: a link that is slow must not be filled with copies of what it
    still carries.

    Args:
        membership: Who this worker is, and in which view.
        exchanges: Its layouts, by number; stays the caller's.
    """

    def __init__(self, membership: Membership, exchanges: Mapping[int, Exchange]) -> None:
        self._membership = membership
        self._exchanges = exchanges
        self._due = self._results_due = math.inf
        self._results_wait = 0.0
        self._answered: dict[tuple[int, int, int], tuple[float, float]] = {}
        """When a push was last sent again, and for how long it then is not, by layout, key and round."""

    @property
    def _settings(self) -> Settings:
        return self._membership.settings

    def on_freeze(self, freeze: m.Freeze) -> list[Send]:
        """Decide no round and take over no state before a view of that number, and say how far this worker is."""
        membership = self._membership
        if not membership.member or (membership.view is not None and freeze.p <= membership.view.p):
            return []
        layouts = []
        for exchange in self._exchanges.values():
            exchange.rounds.promised = max(exchange.rounds.promised, freeze.p)
            if not (exchange.behind or exchange.starting):
                layouts.append(exchange.rounds.retained.standing(exchange.rounds.round))
        return [Send((COORDINATOR,), m.Promise(freeze.p, membership.slot, membership.incarnation, layouts, membership.finished))]

    def on_view(self, now: float) -> list[Send]:
        """Give the blank shards of a new view what they lack."""
        self._due = self._results_due = -math.inf
        self._results_wait = self._settings.timeouts.resend
        self._answered = {}
        return self.tick(now)

    def tick(self, now: float) -> list[Send]:
        """Say it again: every message may be lost. Offers every `timeouts.resend`; results after 1, 2, 4 ... times that."""
        view, membership = self._membership.view, self._membership
        if now < self._due or view is None or not view.restore or not membership.member:
            return []
        self._due = now + self._settings.timeouts.resend
        links = {shard: server_name(shard, self._settings) for shard, _ in view.restore}
        who = (membership.slot, membership.incarnation)
        results = now >= self._results_due
        if results:
            self._results_due, self._results_wait = now + self._results_wait, 2 * self._results_wait
        sends: list[Send] = []
        for exchange in self._exchanges.values():
            rounds, retained = exchange.rounds, exchange.rounds.retained
            if results and not exchange.behind:
                sends += retained.restores(view, rounds.round, rounds.plan_version, who=who, server_of=links)
            if exchange.behind or rounds.round <= view.cut_of(exchange.number)[0]:
                sends += retained.offers(view, rounds.open_pushes, who=who, server_of=links)
        return sends

    def on_recall(self, link: str, recall: m.Recall, now: float) -> list[Send]:
        """Push again what a blank shard asks for, by which it folds rounds that are over; unless that was done a moment ago."""
        view, exchange = self._membership.view, self._exchanges.get(recall.layout)
        if view is None or exchange is None:
            return []
        boots, sends = dict(view.restore), list[Send]()
        for key, round_ in recall.wanted:
            boot = boots.get(exchange.layout.keys[key].shard) if key < len(exchange.layout.keys) else None
            if boot is not None and self._may_send((recall.layout, key, round_), now):
                rounds = exchange.rounds
                sends += rounds.retained.replays([(key, round_)], rounds.open_pushes, boot=boot, link=link)
        return sends

    def _may_send(self, push: tuple[int, int, int], now: float) -> bool:
        """Note that a push is sent again at `now`; False where it may still be on its way, after 1/2, 1, 2 ... resend times."""
        sent, wait = self._answered.get(push, (-math.inf, self._settings.timeouts.resend / 4))
        if now < sent + wait:
            return False
        self._answered[push] = (now, 2 * wait)
        return True

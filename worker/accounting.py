"""Tells the coordinator what a worker's pushes have come to: a few words a second, and the whole account at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ps_accordion.ledger import Tally, added
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Send

from .exchange import Coder, Exchange
from .member import COORDINATOR, Membership

__all__ = ["Accounting"]

REPORT_S = 1.0
"""How old the norm of a residual may be that dies with its worker."""
REPEAT_S = 0.1
"""How often the whole account is said again, until the goodbye that comes behind it is answered."""


class Accounting:
    """The account of one worker.

    Args:
        membership: Who it is.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._incarnations: list[int] = []
        self._due = -math.inf
        self._last: m.Account | None = None

    def tick(self, exchanges: Iterable[Exchange], now: float) -> list[Send]:
        """Say how much there is in the residuals, or again what was said at the end; on the socket's thread."""
        membership = self._membership
        if now < self._due or not membership.joined:
            return []
        self._due = now + (REPORT_S if self._last is None else REPEAT_S)
        return [self._send(self._last or self._account(exchanges))]

    def close(self, exchanges: Iterable[Exchange]) -> list[Send]:
        """Make the whole account, once all rounds have ended and no codec thread has anything to do."""
        exchanges = list(exchanges)
        shards: dict[int, list[Tally]] = {}
        for exchange in exchanges:
            for coder in exchange.coders:
                if not coder.key.buffer:
                    shards.setdefault(coder.key.shard, []).append(_closed(coder))
        entries = [(shard, *added(tallies)) for shard, tallies in sorted(shards.items())]
        self._last, self._due = self._account(exchanges, entries), -math.inf
        return [self._send(self._last)]

    def _account(self, exchanges: Iterable[Exchange], entries: m.Entries | None = None) -> m.Account:
        membership = self._membership
        if membership.incarnation not in self._incarnations:
            self._incarnations.append(membership.incarnation)
        exchanges = list(exchanges)
        accounts = [coder.account for exchange in exchanges for coder in exchange.coders]
        return m.Account(
            membership.slot,
            membership.incarnation,
            self._incarnations[:-1],
            max((exchange.rounds.round - 1 for exchange in exchanges), default=-1),
            math.hypot(*(account.norm for account in accounts)),
            final=entries is not None,
            whole=all(exchange.whole for exchange in exchanges),
            entries=[] if entries is None else entries,
        )

    @staticmethod
    def _send(account: m.Account) -> Send:
        return Send((COORDINATOR,), account)


def _closed(coder: Coder) -> Tally:
    return coder.account.closed(coder.host_residual())

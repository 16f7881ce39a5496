"""How many bytes of pushes may be under way to each server: the rest waits here until some have arrived.

Connections that share a link do not share it evenly. Without a limit one worker may have sent a server all that it has for it
before another's first push is through, and a round of a key takes both: nothing is answered while all push, and then all are
answered at once, though a link carries both ways at the same time. With a limit who is ahead waits for the others.

What waits goes in the order of its keys' numbers, which is that in which backward makes gradients, and not in that in which
codec threads were done: a worker has several, and none waits for another. Workers would soon be pushing different keys, each
waiting for what another holds back.

A push has arrived when its result is there, or when the server says that it holds it. It says so when it is asked, after
`timeouts.resend` without any result: so workers that push keys in another order than others come out of waiting for each other,
and the limit is doubled when that happens. Every round without that halves it again. What is sent again was lost, and does not
count. Pure.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass, field

__all__ = ["Credit"]


@dataclass
class _Way:
    """What is under way to a server, and what waits, a heap: by key in bytes."""

    limit: int
    under_way: dict[int, int] = field(default_factory=dict)
    waiting: list[tuple[int, int]] = field(default_factory=list)
    total: int = 0
    eased: bool = False

    def fits(self, nbytes: int) -> bool:
        return not self.total or self.total + nbytes <= self.limit

    def go(self, key: int, nbytes: int) -> None:
        self.total += nbytes - self.under_way.get(key, 0)
        self.under_way[key] = nbytes


class Credit:
    """The pushes of one layout's open round.

    Args:
        limit: Bytes that may be under way to a server; one push may always be. 0: any number. Every layout has its own.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._ways: defaultdict[str, _Way] = defaultdict(lambda: _Way(limit))

    def may_go(self, server: str, key: int, nbytes: int) -> bool:
        """Return whether a push may be sent now. If not, `released` returns its key when it may."""
        if not self._limit or not nbytes:
            return True
        way = self._ways[server]
        if way.waiting or not way.fits(nbytes):
            heapq.heappush(way.waiting, (key, nbytes))
            return False
        way.go(key, nbytes)
        return True

    def arrived(self, server: str, key: int) -> bool:
        """Note that a push is at its server; return whether it was under way until now."""
        nbytes = self._ways[server].under_way.pop(key, 0) if self._limit else 0
        self._ways[server].total -= nbytes
        return nbytes > 0

    def ease(self, server: str) -> None:
        """Double the limit if something waits: a server holds what has arrived just now, and is waiting for others."""
        way = self._ways[server]
        if way.waiting:
            way.limit, way.eased = 2 * way.limit, True

    def released(self) -> list[int]:
        """Return the keys of pushes that may be sent now, the lowest number first of each server."""
        keys = []
        for way in self._ways.values():
            while way.waiting and way.fits(way.waiting[0][1]):
                key, nbytes = heapq.heappop(way.waiting)
                way.go(key, nbytes)
                keys.append(key)
        return keys

    def end(self) -> None:
        """Forget the round."""
        for way in self._ways.values():
            way.under_way, way.waiting, way.total = {}, [], 0
            way.limit, way.eased = way.limit if way.eased else max(self._limit, way.limit // 2), False

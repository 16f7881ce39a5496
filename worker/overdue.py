"""Which servers a worker waits for, and since when."""

from __future__ import annotations

from collections.abc import Mapping

from .exchange import Exchange

__all__ = ["Overdue"]


class Overdue:
    """Remembers since when each layout's round has been pushed whole, and which servers have not answered all of it."""

    def __init__(self) -> None:
        self._since: dict[int, tuple[int, float]] = {}

    def look(self, exchanges: Mapping[int, Exchange], now: float) -> dict[str, float]:
        """Return the servers that owe results, by name, each with the time since which this worker waits for them."""
        waits: dict[str, float] = {}
        for number, exchange in exchanges.items():
            rounds = exchange.rounds
            if not rounds.waits or rounds.out:
                self._since.pop(number, None)
                continue
            round_, since = self._since.get(number, (-1, now))
            if round_ != rounds.round:
                since = now
                self._since[number] = rounds.round, since
            if since < now:  # a round takes less than the time between two looks, mostly
                for name in rounds.owing():
                    waits[name] = min(since, waits.get(name, since))
        return waits

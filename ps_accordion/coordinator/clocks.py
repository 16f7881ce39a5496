"""Who holds up the others: the clock of training, where the clock of silence sees only whether a process lives.

A worker whose threads answer may still compute for ever, wait for a lock, or sit at a breakpoint. So each says, with its sign of
life, which rounds it is in and whether it has pushed all of one and waits. Who computes while another waits, and gets no further
for too long, is stuck, unless it has said that it is busy. Where all wait for rounds of different models, and none of these is
decided yet, nobody ever gets further.
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Collection, Iterable

from ..config import Timeouts
from .roster import Worker

__all__ = ["Progress"]

STEPS = 20
"""Latest steps whose median counts."""
MANY_STEPS = 10.0
"""A step may take that many times the median before it counts as stuck, if that is longer than `timeouts.stuck`."""


class Progress:
    """What the signs of life say of the rounds.

    Args:
        timeouts: The settings.
    """

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._steps: collections.deque[float] = collections.deque(maxlen=STEPS)
        self._highest = 0
        self._at = 0.0

    def alive(self, worker: Worker, rounds: dict[int, int], waits: Collection[int], now: float) -> None:
        """Take in what a worker says: the open round of each layout, and the layouts whose rounds it waits for."""
        if rounds != worker.rounds or waits != worker.waits:
            worker.since = now
        worker.rounds, worker.waits = rounds, waits
        total = sum(rounds.values())
        if total > self._highest:
            if self._highest:
                self._steps.append((now - self._at) / (total - self._highest))
            self._highest, self._at = total, now

    def limit(self, worker: Worker) -> float:
        """Return how many seconds this worker may take for a step while others wait."""
        limit = self._timeouts.stuck
        if self._steps:
            limit = max(limit, MANY_STEPS * statistics.median(self._steps))
        # Before its first rounds a model is loaded and compiled, which one worker may do much faster than another.
        return limit if any(worker.rounds.values()) else max(limit, self._timeouts.join)

    def stuck(self, members: Iterable[Worker], now: float) -> list[Worker]:
        """Return the members that compute for too long while others wait for them."""
        members = list(members)
        return [
            worker
            for worker in members
            if not worker.waits
            and not worker.busy
            and any(other.waits and min(now - worker.since, now - other.since) > self.limit(worker) for other in members)
        ]

    def deadlock(self, members: Iterable[Worker], now: float) -> str:
        """Say how the members wait for each other, if all do and nothing has moved for too long; empty if not.

        Those that have left or are gone do not count: what they said last does not change, and a view without them follows.
        """
        members = [worker for worker in members if not (worker.left or worker.gone)]
        if not members or any(not worker.waits or worker.busy or now - worker.since <= self.limit(worker) for worker in members):
            return ""
        everywhere = set.intersection(*(set(worker.waits) for worker in members))
        if everywhere or any(self._is_behind(worker, members) for worker in members):
            return ""  # what somebody wants is there, or will be: a server or a link is slow, and that passes, or is found dead
        where = [
            f"{worker.name} in round {worker.rounds.get(waits, 0)} of model {waits}"
            for worker in members
            for waits in worker.waits
        ]
        return f"all workers wait for each other: {', '.join(where)}; take models in the same order in every worker"

    @staticmethod
    def _is_behind(worker: Worker, members: Iterable[Worker]) -> bool:
        """Whether a worker waits for a round that another has decided: it has yet to get the results."""
        return any(other.rounds.get(waits, 0) > worker.rounds.get(waits, 0) for waits in worker.waits for other in members)

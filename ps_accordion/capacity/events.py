"""What a simulated cluster is made of: a clock, cores that threads share, threads with a queue, and links.

Times are seconds, sizes bytes. Everything that happens at one time happens in the order in which it was planned, so a simulation
always goes the same way.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["Call", "Clock", "Cores", "Host", "Port", "Thread", "send"]

Call = Callable[..., object]


class Clock:
    """Simulated time, and what is planned for later."""

    def __init__(self) -> None:
        self.now = 0.0
        self._planned: list[tuple[float, int, Call, tuple[Any, ...]]] = []
        self._number = 0

    def at(self, time: float, call: Call, *args: Any) -> None:
        """Plan a call for a time that is not past."""
        self._number += 1
        heapq.heappush(self._planned, (time, self._number, call, args))

    def run(self) -> None:
        """Let time pass until nothing is planned any more."""
        planned, pop = self._planned, heapq.heappop
        while planned:
            self.now, _, call, args = pop(planned)
            call(*args)


class Cores:
    """Processor cores that every running thread has an equal share of, at most one core each.

    All shares are the same, so it is enough to count what each thread has been given since the start (`_given`): a piece of work
    ends when that has grown by as much as it takes.

    Args:
        clock: The clock.
        count: How many; None means that every thread has one of its own.
    """

    def __init__(self, clock: Clock, count: int | None) -> None:
        self.count = count
        self.busy = 0.0
        """Processor seconds so far."""
        self._clock = clock
        self._running: list[tuple[float, int, Call, tuple[Any, ...]]] = []
        self._given = 0.0
        self._since = 0.0
        self._number = 0
        self._plan = 0

    def run(self, work: float, then: Call, *args: Any) -> None:
        """Do `work` seconds on one core's worth of time, then call."""
        self.busy += work
        clock = self._clock
        if self.count is None:
            clock.at(clock.now + work, then, *args)
            return
        self._account()
        self._number += 1
        heapq.heappush(self._running, (self._given + work, self._number, then, args))
        self._plan_end()

    def _rate(self) -> float:
        assert self.count is not None
        return min(1.0, self.count / len(self._running))

    def _account(self) -> None:
        if self._running:
            self._given += (self._clock.now - self._since) * self._rate()
        self._since = self._clock.now

    def _plan_end(self) -> None:
        self._plan += 1  # what was planned before no longer holds: shares have changed
        left = max(0.0, self._running[0][0] - self._given)
        self._clock.at(self._clock.now + left / self._rate(), self._end, self._plan)

    def _end(self, plan: int) -> None:
        if plan != self._plan:
            return
        self._account()
        self._given, _, then, args = heapq.heappop(self._running)  # exactly: sums of shares would drift
        if self._running:
            self._plan_end()
        then(*args)


class Thread:
    """Does one piece of work after the other, in the order in which they come."""

    def __init__(self, cores: Cores) -> None:
        self.busy = 0.0
        """Processor seconds of its work so far."""
        self._cores = cores
        self._queue: deque[tuple[float, Call, tuple[Any, ...]]] = deque()
        self._working = False

    def submit(self, work: float, then: Call, *args: Any) -> None:
        """Do `work` seconds after all that was submitted before, then call."""
        self.busy += work
        if self._working:
            self._queue.append((work, then, args))
        else:
            self._working = True
            self._cores.run(work, self._done, then, args)

    def _done(self, then: Call, args: tuple[Any, ...]) -> None:
        if self._queue:
            work, *following = self._queue.popleft()
            self._cores.run(work, self._done, *following)
        else:
            self._working = False
        then(*args)


class Port:
    """One direction of a host's link, first come first served.

    Args:
        rate: Bytes a second.
        delay: Seconds that a byte is on its way, between here and the middle of the network.
    """

    def __init__(self, rate: float, delay: float) -> None:
        self.rate = rate
        self.delay = delay
        self.busy = 0.0
        """Seconds of carrying so far."""
        self._free = 0.0

    def book(self, now: float, nbytes: float) -> tuple[float, float]:
        """Return when the first byte goes and when the last one has gone."""
        begin = max(now, self._free)
        taken = nbytes / self.rate
        self.busy += taken
        self._free = begin + taken
        return begin, self._free


class Host:
    """A machine: cores, and a link with two directions."""

    def __init__(self, clock: Clock, cores: Cores, *, rate: float = math.inf, delay: float = 0.0) -> None:
        self.clock = clock
        self.cores = cores
        self.up, self.down = Port(rate, delay), Port(rate, delay)


def send(source: Host, target: Host, leaving: float, coming: float, then: Call, *args: Any) -> None:
    """Carry a message from host to host, then call.

    Its bytes come in while others of it still leave, and the switch between holds what has to wait: many senders to one receiver
    share what it can take in. Nothing passes a link within a host.

    Args:
        source: Where it leaves.
        target: Where it comes in.
        leaving: Bytes that leave; more than `coming` if it goes to several like the target.
        coming: Bytes that come in.
        then: Called when the last byte is there.
        *args: For `then`.
    """
    clock = source.clock
    if source is target:
        clock.at(clock.now, then, *args)
        return
    begin, end = source.up.book(clock.now, leaving)
    delay = source.up.delay + target.down.delay
    # Booked when the first byte is there, not now: what another host sends earlier must not stand behind it.
    clock.at(begin + delay, _come_in, target, coming, end + delay, then, args)


def _come_in(target: Host, nbytes: float, last: float, then: Call, args: tuple[Any, ...]) -> None:
    clock = target.clock
    _, end = target.down.book(clock.now, nbytes)
    clock.at(max(end, last), then, *args)

"""How a run ends: a pure state machine from exits and interrupts to signals and one exit code.

    running  -- a child fails ------------------> failing      others may end by themselves, saying why
             -- all workers ended with 0 -------> draining     coordinator and servers finish
             -- Ctrl-C or SIGTERM --------------> interrupted  the workers get the signal
    failing, draining, interrupted -- grace is over, or only roles are left after an interrupt --> terminating (SIGTERM)
    any of the above -- second interrupt -------> killing      (SIGKILL)
    terminating -- grace is over ---------------> killing
    any -- nobody is left ----------------------> done

The cause of a failure is the first child that failed by itself, and two things are weighed to find it:

* a child that ended with the code of `RunAborted` says that another one was first, so it is the cause only where nobody else is;
* the coordinator names the process that it ended the run for. If it did so before anybody had ended, that one is the cause, even
  if others end sooner: a training script that is told of the end raises, and its exit code is then 1 like any other's.
  That holds too if it was still busy ending when its grace was over: the signal that ended it is ours, so its code counts as 1.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from ps_accordion.errors import PsAccordionError, RunAborted

from .child import Kind

__all__ = ["Order", "Outcome", "Phase"]


class Phase(Enum):
    """Where a run stands."""

    RUNNING = "running"
    FAILING = "failing"
    DRAINING = "draining"
    INTERRUPTED = "interrupted"
    TERMINATING = "terminating"
    KILLING = "killing"
    DONE = "done"


class Order(NamedTuple):
    """A signal to send.

    Attributes:
        number: The signal.
        members: Names of the children that get it.
    """

    number: int
    members: tuple[str, ...]


class Outcome:
    """What has happened to a run so far, and what follows from it. Times are seconds of any one clock."""

    def __init__(self, kinds: Mapping[str, Kind], *, grace: float) -> None:
        """Args: `kinds`, every child's role by name; `grace`, seconds that a child told to end may take."""
        self.phase = Phase.RUNNING
        self.deadline: float | None = None
        self.codes: dict[str, int] = {}
        self.stuck: tuple[str, ...] = ()
        """Roles that had not finished by themselves when all workers had ended well."""
        self._kinds = dict(kinds)
        self._alive = dict.fromkeys(kinds)
        self._failures: dict[str, float] = {}
        self._ended_by_us: set[str] = set()
        self._accused: tuple[str, float] | None = None
        self._interrupt: int | None = None
        self._grace = grace

    @property
    def alive(self) -> tuple[str, ...]:
        """Names of the children that have not ended."""
        return tuple(self._alive)

    @property
    def cause(self) -> str | None:
        """Name of the child that failed first by itself, or None."""
        first = next((name for name in self._failures if self.codes[name] != RunAborted.exit_code), None)
        if self._accused is not None:
            name, when = self._accused
            ended_badly = name in self._failures or name in self._ended_by_us
            if ended_badly and (first is None or when <= self._failures[first]):
                return name
        return first if first is not None else next(iter(self._failures), None)

    @property
    def interrupt(self) -> int | None:
        """The signal that ended the run, or None."""
        return self._interrupt

    @property
    def exit_code(self) -> int:
        """The launcher's exit code, were the run over now."""
        if self.cause is not None:
            return PsAccordionError.exit_code if self.cause in self._ended_by_us else self.codes[self.cause]
        if self._interrupt is not None:
            return 128 + self._interrupt
        return PsAccordionError.exit_code if self.stuck else 0

    def exited(self, name: str, code: int, now: float) -> list[Order]:
        """Take in that a child ended with `code` (128 + N for signal N)."""
        del self._alive[name]
        self.codes[name] = code
        ordered = self.phase in (Phase.INTERRUPTED, Phase.TERMINATING, Phase.KILLING)  # its code is our doing
        if code and not ordered:
            self._failures[name] = now
        elif code and self._interrupt is None:
            self._ended_by_us.add(name)
        if not self._alive:
            self._enter(Phase.DONE, None)
        elif self._failures and self.phase in (Phase.RUNNING, Phase.DRAINING):
            self._enter(Phase.FAILING, now + self._grace)
        elif not self._workers():
            if self.phase is Phase.RUNNING:
                self._enter(Phase.DRAINING, now + self._grace)
            elif self.phase is Phase.INTERRUPTED:
                return self._terminate(now)
        return []

    def accused(self, name: str, when: float) -> None:
        """Take in that the coordinator ended the run because of `name`, at the time `when`."""
        self._accused = (name, when)

    def interrupted(self, number: int, now: float) -> list[Order]:
        """Take in SIGINT or SIGTERM: the first one asks, the second kills."""
        if self.phase is Phase.DONE:
            return []
        if self._interrupt is not None:
            self._enter(Phase.KILLING, None)
            return [Order(signal.SIGKILL, self.alive)]
        self._interrupt = number
        if self.phase is Phase.RUNNING and self._workers():
            self._enter(Phase.INTERRUPTED, now + self._grace)
            return [Order(number, self._workers())]
        return self._terminate(now)

    def tick(self, now: float) -> list[Order]:
        """Take in that time has passed."""
        if self.deadline is None or now < self.deadline:
            return []
        if self.phase is Phase.TERMINATING:
            self._enter(Phase.KILLING, None)
            return [Order(signal.SIGKILL, self.alive)]
        if self.phase is Phase.DRAINING:
            self.stuck = self.alive
        return self._terminate(now)

    def _terminate(self, now: float) -> list[Order]:
        self._enter(Phase.TERMINATING, now + self._grace)
        return [Order(signal.SIGTERM, self.alive)]

    def _enter(self, phase: Phase, deadline: float | None) -> None:
        self.phase, self.deadline = phase, deadline

    def _workers(self) -> tuple[str, ...]:
        return tuple(name for name in self._alive if self._kinds[name] == "worker")

"""How a run ends: a pure state machine from exits and interrupts to signals and one exit code.

    running  -- a child is killed --------------> running      it is started again after a pause, as often as is allowed
             -- a worker is lost ---------------> running      the others go on without it, if they are enough
             -- too few workers are left -------> terminating  nobody could come back: waiting would not help
             -- a child fails ------------------> failing      others may end by themselves, saying why
             -- all workers ended with 0 -------> draining     coordinator and servers finish
             -- Ctrl-C or SIGTERM --------------> interrupted  the workers get the signal
    failing, draining, interrupted -- grace is over, or only roles are left after an interrupt --> terminating (SIGTERM)
    any of the above -- second interrupt -------> killing      (SIGKILL)
    terminating -- grace is over ---------------> killing
    any -- nobody is left ----------------------> done

A child that is killed by a signal says nothing about the program that it ran, so it may be started again: `restarts` times, each
pause twice as long as the one before, and a child that has lived for a minute has its count back. A child that ends with a code
of its own has said how the run ends. Once the run is ending, nobody is started; who still waited to be is counted as failed,
unless it was an interrupt that ended the run.

A worker that was killed and may not be started again is lost. All workers are needed until all have joined, and so many as
`minimum` says from then on: as long as they are there the run goes on. It ends with the code of the worker lost first, however
well the others do. The coordinator or a server in that place is a failure: no run goes on without it.

The cause of a failure is the worker lost first; else the first child that failed by itself, and two things are weighed to find
it:

* a child that ended with the code of `RunAborted` says that another one was first, so it is the cause only where nobody else is,
  not even one that waited to be started again;
* the coordinator names the process that it ended the run for. If it did so before anybody had ended, that one is the cause, even
  if others end sooner: a training script that is told of the end raises, and its exit code is then 1 like any other's.
  That holds too if it was still busy ending when its grace was over: the signal that ended it is ours, so its code counts as 1.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from ps_accordion.errors import PsAccordionError, RunAborted

from .child import Kind

__all__ = ["Action", "Lost", "Order", "Outcome", "Phase", "Restart", "Start", "killed_by"]

FIRST_PAUSE_SECONDS = 0.1
"""Before a first restart. Long enough that a port or a lock of the dead process is free, too short for others to miss it."""
LONGEST_PAUSE_SECONDS = 10.0
"""What kills a child every time, such as a full memory, may pass; looking more rarely than this would waste what is left."""
FORGET_SECONDS = 60.0
"""A child that has lived this long was started well: its restarts count anew."""


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


class Restart(NamedTuple):
    """A child that was killed and will be started again; nothing is to be done yet.

    Attributes:
        name: Which.
        number: How many restarts count against it, this one included.
        pause: Seconds until its start.
    """

    name: str
    number: int
    pause: float


class Start(NamedTuple):
    """A child to start again, now.

    Attributes:
        name: Which.
        restart: How often it has been started again in all, this time included.
    """

    name: str
    restart: int


class Lost(NamedTuple):
    """A worker that was killed, and will not be started again.

    Attributes:
        name: Which.
        left: How many workers are left, those included that have finished or wait to be started again.
        needed: How many the run needs. With fewer it ends, and the next action is to end it.
    """

    name: str
    left: int
    needed: int


Action = Order | Restart | Start | Lost


@dataclass
class _Lives:
    """What a child has lived through: when it began its present life, restarts that count, and all of them."""

    begun: float = math.inf
    counted: int = 0
    restarted: int = 0


class Outcome:
    """What has happened to a run so far, and what follows from it. Times are seconds of any one clock."""

    def __init__(self, kinds: Mapping[str, Kind], *, grace: float, restarts: int = 0, minimum: int = 1) -> None:
        """Take in what there is.

        Args:
            kinds: Every child's role by name.
            grace: Seconds that a child told to end may take.
            restarts: How often a child that was killed is started again.
            minimum: Workers that the run goes on with, once all have joined.
        """
        self.phase = Phase.RUNNING
        self.codes: dict[str, int] = {}
        self.stuck: tuple[str, ...] = ()
        """Roles that had not finished by themselves when all workers had ended well."""
        self._kinds = dict(kinds)
        self._alive = dict.fromkeys(kinds)
        self._lives = {name: _Lives() for name in kinds}
        self._waiting: dict[str, float] = {}
        """When each that waits to be started again will be."""
        self.lost: list[str] = []
        """Workers that the others went on without, or could not; in this order."""
        self.joined = False
        """Whether all workers have joined; the owner says so."""
        self._minimum = minimum
        self._given_up: list[str] = []
        """Those that waited when the run failed."""
        self._failures: dict[str, float] = {}
        self._ended_by_us: set[str] = set()
        self._accused: tuple[str, float] | None = None
        self._interrupt: int | None = None
        self._deadline: float | None = None
        self.grace = grace
        self.restarts = restarts

    @property
    def alive(self) -> tuple[str, ...]:
        """Names of the children that have not ended. One that waits to be started again is not among them."""
        return tuple(self._alive)

    @property
    def deadline(self) -> float | None:
        """When `tick` has something to do, or None."""
        return min(self._waiting.values(), default=self._deadline)

    @property
    def cause(self) -> str | None:
        """Name of the child that failed first by itself, or None. The exit code of the run is its own."""
        return next(iter(self.lost), self.ender)

    @property
    def ender(self) -> str | None:
        """Name of the child that the run ended because of, or None: another than the cause where workers were lost before."""
        first = next((name for name in self._failures if self.codes[name] != RunAborted.exit_code), None)
        if self._accused is not None:
            name, when = self._accused
            ended_badly = name in self._failures or name in self._ended_by_us or name in self._given_up or name in self.lost
            if ended_badly and (first is None or when <= self._failures[first]):
                return name
        return first or next(iter([*self._given_up, *self._failures]), None)

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

    def started(self, name: str, now: float) -> None:
        """Take in that a child has been started, the first time or again."""
        self._lives[name].begun = now

    def exited(self, name: str, code: int, now: float) -> list[Action]:
        """Take in that a child ended with `code` (128 + N for signal N)."""
        del self._alive[name]
        self.codes[name] = code
        if self.phase is Phase.RUNNING and killed_by(code) is not None:
            if restart := self._restart(name, now):
                return [restart]
            if self._kinds[name] == "worker":
                return self._lose(name, now)
        ordered = self.phase in (Phase.INTERRUPTED, Phase.TERMINATING, Phase.KILLING)  # its code is our doing
        if code and not ordered:
            self._failures[name] = now
        elif code and self._interrupt is None:
            self._ended_by_us.add(name)
        return self._go_on(now)

    def _go_on(self, now: float) -> list[Action]:
        """Enter the phase that an exit leads to."""
        if self.phase is Phase.RUNNING and (self._failures or not self._workers()):
            self._give_up()
        if not self._alive and not self._waiting:
            self._enter(Phase.DONE, None)
        elif (self._failures or self._given_up) and self.phase in (Phase.RUNNING, Phase.DRAINING):
            self._enter(Phase.FAILING, now + self.grace)
        elif not self._workers():
            if self.phase is Phase.RUNNING:
                self._enter(Phase.DRAINING, now + self.grace)
            elif self.phase is Phase.INTERRUPTED:
                return self._terminate(now)
        return []

    def _lose(self, name: str, now: float) -> list[Action]:
        """Go on without a worker, if the others are enough."""
        self.lost.append(name)
        workers = [each for each, kind in self._kinds.items() if kind == "worker"]
        lost = Lost(name, len(workers) - len(self.lost), self._minimum if self.joined else len(workers))
        if lost.left >= lost.needed and lost.left:
            return [lost, *self._go_on(now)]
        self._give_up()
        if not self._alive:
            self._enter(Phase.DONE, None)
            return [lost]
        return [lost, *self._terminate(now)]

    def _give_up(self) -> None:
        """Start nobody again any more."""
        self._given_up += self._waiting
        self._waiting.clear()

    def states(self, now: float) -> dict[str, str]:
        """Return what is the matter with each child, in words; empty where nothing is."""
        return {name: self._state(name, now) for name in self._kinds}

    def _state(self, name: str, now: float) -> str:
        if name in self._waiting:
            number = self._lives[name].counted
            return f"restarting in {max(0.0, self._waiting[name] - now):.1f} s, {number} of {self.restarts}"
        if name in self._alive or not self.codes.get(name):
            return ""
        return "lost" if name in self.lost else f"ended with {self.codes[name]}"

    def accused(self, name: str, when: float) -> None:
        """Take in that the coordinator ended the run because of `name`, at the time `when`."""
        self._accused = (name, when)

    def interrupted(self, number: int, now: float) -> list[Action]:
        """Take in SIGINT or SIGTERM: the first one asks, the second kills."""
        if self.phase is Phase.DONE:
            return []
        if self._interrupt is not None:
            self._enter(Phase.KILLING, None)
            return [Order(signal.SIGKILL, self.alive)]
        self._interrupt = number
        self._waiting.clear()
        if not self._alive:
            self._enter(Phase.DONE, None)
            return []
        if self.phase is Phase.RUNNING and self._workers():
            self._enter(Phase.INTERRUPTED, now + self.grace)
            return [Order(number, self._workers())]
        return self._terminate(now)

    def tick(self, now: float) -> list[Action]:
        """Take in that time has passed."""
        if self._waiting:  # and so the run goes on, which has no end of time
            return [self._start(name) for name, due in list(self._waiting.items()) if now >= due]
        if self._deadline is None or now < self._deadline:
            return []
        if self.phase is Phase.TERMINATING:
            self._enter(Phase.KILLING, None)
            return [Order(signal.SIGKILL, self.alive)]
        if self.phase is Phase.DRAINING:
            self.stuck = self.alive
        return self._terminate(now)

    def _restart(self, name: str, now: float) -> Restart | None:
        """Have a child that was killed started again, if it may be."""
        lives = self._lives[name]
        if now - lives.begun >= FORGET_SECONDS:
            lives.counted = 0
        if lives.counted >= self.restarts:
            return None
        pause = min(FIRST_PAUSE_SECONDS * 2 ** min(lives.counted, 32), LONGEST_PAUSE_SECONDS)
        lives.counted += 1
        self._waiting[name] = now + pause
        return Restart(name, lives.counted, pause)

    def _start(self, name: str) -> Start:
        del self._waiting[name]
        del self.codes[name]
        self._alive[name] = None
        self._lives[name].restarted += 1
        return Start(name, self._lives[name].restarted)

    def _terminate(self, now: float) -> list[Action]:
        self._enter(Phase.TERMINATING, now + self.grace)
        return [Order(signal.SIGTERM, self.alive)]

    def _enter(self, phase: Phase, deadline: float | None) -> None:
        self.phase, self._deadline = phase, deadline

    def _workers(self) -> tuple[str, ...]:
        """Return the workers that have not ended for good."""
        return tuple(name for name in (*self._alive, *self._waiting) if self._kinds[name] == "worker")


def killed_by(code: int) -> str | None:
    """Return the name of the signal that a shell's exit code tells of, or None where the process ended by itself."""
    number = code - 128
    if not 0 < number < signal.NSIG:
        return None
    try:
        return signal.Signals(number).name
    except ValueError:  # one of those between SIGRTMIN and SIGRTMAX
        return f"signal {number}"

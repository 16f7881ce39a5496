"""Run programs side by side until all have ended, in one thread: read their output, carry signals, reap them.

`Outcome` decides, also who is started again; this loop only carries out. It waits for three things at once: output of
children, signals (through a wake-up descriptor, SIGCHLD among them), and the next deadline.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ps_accordion.errors import RunAborted
from ps_accordion.role import RESTART_VARIABLE
from ps_accordion.telemetry.events import JsonLines

from .child import Child, Guard, LineReader, Program
from .outcome import Action, Lost, Order, Outcome, Phase, Restart, Start, killed_by
from .screen import Screen

__all__ = ["Ending", "supervise"]

TICK_SECONDS = 0.5
"""How often the progress line is looked at."""
DRAIN_SECONDS = 1.0
"""How long output that ended children left in their pipes may take to arrive. Only a process that left its session on
purpose can still hold such a pipe open."""
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        exit_code: 0 only if every worker ended with 0 and the coordinator and servers finished.
        codes: Exit code of every child, as a shell would give it.
        cause: Name of the child that failed first by itself, or None.
        seconds: From the first start to the last end.
    """

    exit_code: int
    codes: dict[str, int]
    cause: str | None
    seconds: float


def supervise(
    programs: Sequence[Program],
    *,
    screen: Screen,
    guard: Guard,
    grace: float,
    restarts: int = 0,
    minimum: int = 1,
    joined: Callable[[], bool] = lambda: True,
    events: JsonLines | None = None,
    progress: Callable[[Mapping[str, str]], str | None] | None = None,
    accused: Callable[[], tuple[str, float] | None] | None = None,
) -> Ending:
    """Start all programs, start those again that are killed, wait for all to end, and leave no process behind.

    Args:
        programs: What to start, in this order; names are unique.
        screen: Where their output goes.
        guard: The guard that ends them should this process be killed.
        grace: Seconds that a child told to end may take, before the next harder signal.
        restarts: How often a child is started again that a signal killed which was not ours; see `outcome`.
        minimum: Workers that the run goes on with when others are lost, once all have joined.
        joined: Called when a worker dies; returns whether all workers had joined.
        events: Gets a line for every start, exit and restart, every worker that is lost, and every phase of the end; stays the
            caller's.
        progress: Called twice a second with what is the matter with each child (empty: nothing); returns a new progress line
            or None.
        accused: Called at the end of a run that failed; returns whom the coordinator ended it for, and when (of the machine's
            monotonic clock), or None.

    Raises:
        ConfigError: A program does not exist. Those already started have been ended.
    """
    kinds = {program.name: program.kind for program in programs}
    outcome = Outcome(kinds, grace=grace, restarts=restarts, minimum=minimum)
    return _Supervision(programs, outcome, screen, guard, events or JsonLines(None), joined, progress, accused).run()


class _Supervision:
    def __init__(
        self,
        programs: Sequence[Program],
        outcome: Outcome,
        screen: Screen,
        guard: Guard,
        events: JsonLines,
        joined: Callable[[], bool],
        progress: Callable[[Mapping[str, str]], str | None] | None,
        accused: Callable[[], tuple[str, float] | None] | None,
    ) -> None:
        self._programs = {program.name: program for program in programs}
        self._outcome = outcome
        self._screen = screen
        self._guard = guard
        self._events = events
        self._joined = joined
        self._progress = progress
        self._accused = accused
        self._children: dict[str, Child] = {}
        """Who bears each name now; those that were killed and started again are in `_former`, while anything is left of them."""
        self._former: list[Child] = []
        self._selector = selectors.DefaultSelector()
        self._open_streams = 0
        self._phase = outcome.phase

    def run(self) -> Ending:
        start = time.monotonic()
        with self._selector, _wakeup() as wakeup:
            self._selector.register(wakeup, selectors.EVENT_READ, None)
            try:
                for name in self._programs:
                    self._start(name)
                while self._outcome.phase is not Phase.DONE:
                    self._step(wakeup)
                self._drain()
            finally:
                for child in (*self._children.values(), *self._former):
                    child.kill(self._guard)
        self._conclude()
        outcome = self._outcome
        return Ending(outcome.exit_code, dict(outcome.codes), outcome.cause, time.monotonic() - start)

    def _start(self, name: str, restart: int = 0) -> None:
        program = self._programs[name]
        if restart:
            program = replace(program, environment={**program.environment, RESTART_VARIABLE: str(restart)})
            self._former = [child for child in (*self._former, self._children[name]) if not child.gone]
        child = self._children[name] = Child(program, self._guard)
        self._outcome.started(name, child.started)
        self._events.write(event="start", name=name, pid=child.pid, restart=restart)
        for stream, error in zip(child.streams, (False, True), strict=True):
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, selectors.EVENT_READ, (child, stream, LineReader(), error))
            self._open_streams += 1

    def _step(self, wakeup: socket.socket) -> None:
        now = time.monotonic()
        deadline = self._outcome.deadline
        timeout = TICK_SECONDS if deadline is None else min(TICK_SECONDS, max(0.0, deadline - now))
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                for number in wakeup.recv(_CHUNK):
                    if number != signal.SIGCHLD:
                        self._interrupt(number)
            else:
                self._read(key)
        self._reap()
        self._obey(self._outcome.tick(time.monotonic()))
        self._note_phase()
        self._show_progress()

    def _reap(self) -> None:
        ended = []
        for name in self._outcome.alive:
            code = self._children[name].poll()
            if code is not None:
                ended.append((name, code))
        # Where several are found dead at one look, one that says "another failed first" was not the first.
        for name, code in sorted(ended, key=lambda item: item[1] == RunAborted.exit_code):
            child = self._children[name]
            child.end_session(self._guard)
            self._events.write(event="exit", name=name, pid=child.pid, code=code, seconds=round(child.seconds, 3))
            before = self._outcome.phase
            if killed_by(code) is not None:
                self._outcome.joined = self._outcome.joined or self._joined()
            self._obey(self._outcome.exited(name, code, time.monotonic()))
            ender = self._outcome.ender
            if ender and before in (Phase.RUNNING, Phase.DRAINING) and self._outcome.phase is Phase.FAILING:
                self._screen.say(f"{self._death(ender)}; the others have {self._outcome.grace:g} s to end")

    def _interrupt(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._outcome.interrupt is None:
            self._screen.say(f"{name}: ending the run; once more kills it at once")
        self._obey(self._outcome.interrupted(number, time.monotonic()))

    def _obey(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Order):
                for name in action.members:
                    self._children[name].signal(action.number)
            elif isinstance(action, Restart):
                self._announce(action)
            elif isinstance(action, Start):
                self._start(action.name, action.restart)
            else:
                self._mourn(action)

    def _announce(self, restart: Restart) -> None:
        name, number, pause = restart
        self._events.write(event="restart", name=name, number=number, allowed=self._outcome.restarts, pause=pause)
        self._screen.say(
            f"{name} was killed by {killed_by(self._outcome.codes[name])} after {self._children[name].seconds:.1f} s; "
            f"starting it again in {pause:g} s (restart {number} of {self._outcome.restarts})"
        )

    def _mourn(self, lost: Lost) -> None:
        name, left, needed = lost
        self._events.write(event="lost", name=name, left=left, needed=needed)
        if left >= needed:
            follows = f"the others go on without it: {_workers(left)} left"
        elif self._outcome.joined:
            follows = f"{_workers(left)} left, and workers.minimum is {needed}: ending the run"
        else:
            follows = f"not all {needed} workers had joined: ending the run"
        self._screen.say(f"{self._death(name)}; {follows}")

    def _death(self, name: str) -> str:
        """Say how a child ended for good."""
        code, restarts = self._outcome.codes[name], self._outcome.restarts
        why = f", after as many restarts as it has ({restarts}, run.restarts)" if killed_by(code) and restarts else ""
        return f"{name} ended with {_code(code)}{why}"

    def _note_phase(self) -> None:
        if self._outcome.phase is not self._phase:
            self._phase = self._outcome.phase
            self._events.write(event="phase", phase=self._phase.value)

    def _read(self, key: selectors.SelectorKey) -> None:
        child, stream, reader, error = key.data
        try:
            data = os.read(key.fd, _CHUNK)
        except BlockingIOError:
            return
        for line in reader.feed(data):
            if error:
                child.tail.append(line)
            self._screen.line(child.program.name, line, error=error)
        if not data:
            self._selector.unregister(key.fileobj)
            self._open_streams -= 1
            stream.close()

    def _drain(self) -> None:
        give_up = time.monotonic() + DRAIN_SECONDS
        while self._open_streams and (left := give_up - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                if key.data is None:
                    self._selector.unregister(key.fileobj)
                else:
                    self._read(key)
        self._show_progress()

    def _show_progress(self) -> None:
        line = self._progress(self._outcome.states(time.monotonic())) if self._progress is not None else None
        if line is not None:
            self._screen.progress(line)

    def _conclude(self) -> None:
        self._screen.close()
        outcome = self._outcome
        accusation = self._accused() if outcome.cause is not None and self._accused is not None else None
        if accusation is not None:
            name, when = accusation
            outcome.accused(name, when)
        for name in dict.fromkeys(name for name in (outcome.cause, outcome.ender) if name is not None):
            child = self._children[name]
            self._screen.heading(f"{name} failed: {_code(outcome.codes[name])}, after {child.seconds:.1f} s")
            for line in child.tail or ["(it wrote nothing to standard error)"]:
                self._screen.plain(line)
        if outcome.cause is None and outcome.stuck:
            self._screen.heading("the workers ended, but the run did not")
            self._screen.plain(
                f"all workers ended with 0, but {', '.join(outcome.stuck)} still waited for them {outcome.grace:g} s later; "
                "did the command call ps_accordion.worker.connect(), in every worker?"
            )


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"


def _code(code: int) -> str:
    name = killed_by(code)
    return f"exit code {code}" if name is None else f"exit code {code}, killed by {name}"


@contextlib.contextmanager
def _wakeup() -> Iterator[socket.socket]:
    """Turn signals into bytes on a socket for as long as this lasts."""
    read, write = socket.socketpair()
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    with read, write:
        read.setblocking(False)
        write.setblocking(False)
        before_fd = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda *_: None) for number in handled}
        try:
            yield read
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before_fd)

"""The coordinator as a state machine: messages and a time in, actions out.

    gathering ──all are in──> running ──a worker's rounds have ended──> ending ──all have left──> ended
        └───────── a failure ────┴──────────> aborted

Gathering admits workers and servers in any order; when all are there, view 1 names them and the rounds may begin.
`membership.py` keeps the view as it should be from then on, and `ending.py` tells everybody when the run is over.

What the next coordinator of the run must know is a `Record`, in front of the messages that tell it to others: one that was killed
is started again with the records, and goes on. Members and servers have `timeouts.dead` to be heard by it.

Every answer may be lost, so everything is repeated until the other side shows that it knows: a join until the welcome, a freeze
until the promise, a view until the sign of life that carries its number, a plan until every member reports its version.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from typing_extensions import Buffer

from ..config import Settings
from ..errors import ConfigError, RunAborted, WireError
from ..regimes import check_settings
from ..selection import check as check_codecs
from ..wire import messages as m
from ..wire.actions import Action, Note, Peer, Send
from ..wire.silence import Silence
from . import history
from .admission import Admission
from .checkpoints import Checkpoints
from .clocks import Progress
from .ending import Ending
from .history import History
from .layouts import Resume
from .membership import LOST_BEATS, WAITING_NOTE_S, Membership
from .roster import Server, Worker, forgotten, refused
from .run import Run

__all__ = ["Coordinator"]


class Coordinator:
    """Membership, layouts and plans of one run.

    Args:
        settings: The settings of the job, which bind everybody who joins.
        now: The time at the start, in seconds of any monotonic clock; all later times are of the same clock.
        records: What earlier coordinators of the run have asked to `Record`, in order; this one goes on from there.
        resume: The checkpoint that the run goes on from.

    Raises:
        ConfigError: `[regime]` names no policy or no window, or more workers are needed than there are.
        CodecError: `[codec]` names something that is no codec, or a level that the codec does not have.
    """

    def __init__(
        self, settings: Settings, now: float, *, records: Iterable[Mapping[str, Any]] = (), resume: Resume | None = None
    ) -> None:
        # Now, not when the first model is declared: by then others would wait for an answer.
        check_settings(settings.regime)
        check_codecs(settings.codec)
        if settings.workers.minimum > settings.workers.count:
            raise ConfigError(
                f"workers.minimum is {settings.workers.minimum}; expected at most workers.count, {settings.workers.count}"
            )
        if settings.workers.places < settings.workers.count:
            raise ConfigError(
                f"workers.maximum is {settings.workers.maximum}; expected 0, or at least workers.count, {settings.workers.count}"
            )
        past = History.of(records)
        self.settings = settings
        self.run = Run(settings, past, now, resume)
        self.workers = self.run.workers
        self.servers = self.run.servers
        self.layouts = self.run.layouts
        self.views = self.run.views
        self._ending = Ending(self.run, past, now)
        self._admission = Admission(self.run, self._ending)
        self._progress = Progress(settings.timeouts)
        self._membership = Membership(self.run, self._ending, self._progress)
        self.checkpoints = Checkpoints(self.run, past.kept)
        self._noted = now
        self._silence = Silence(settings.timeouts.heartbeat)
        self._handlers: dict[type[m.Message], Callable[..., list[Action]]] = {
            m.Join: self._admission.join,
            m.Declare: self._on_declare,
            m.Alive: self._on_alive,
            m.ServerAlive: self._admission.server,
            m.Frozen: lambda _peer, frozen, _, now: self._membership.frozen(frozen, now),
            m.Promise: self._on_promise,
            m.Report: self._on_report,
            m.Rate: self._on_rate,
            m.Account: self._on_account,
            m.Books: self._on_books,
            m.Saved: lambda peer, saved, _, now: self.checkpoints.saved(peer, saved, now),
            m.Leave: self._on_leave,
            m.Fault: self._on_fault,
            m.Bye: self._on_bye,
        }

    @property
    def phase(self) -> str:
        """`gathering`, `running`, `ending`, `ended` or `aborted`."""
        if self.over is not None:
            return "ended" if isinstance(self.over, m.Ended) else "aborted"
        if self.run.ending:
            return "ending"
        return "gathering" if self.view is None else "running"

    @property
    def over(self) -> m.Ended | m.Abort | None:
        """What everybody is told at the end; None while the run goes on."""
        return self._ending.over

    @property
    def view(self) -> m.View | None:
        """The last view; None before the first."""
        return self.views.view

    # ------------------------------------------------------------ in

    def handle(self, peer: Peer, message: m.Message, payload: Sequence[Buffer], now: float) -> list[Action]:
        """Take in a message; return what to do."""
        handler = self._handlers.get(type(message))
        if handler is None:
            return [Note("unexpected", {"message": type(message).__name__})]
        if self.over is not None and not isinstance(message, (m.Account, m.Books, m.Bye)):
            return [Send((peer,), self.over)]
        return handler(peer, message, payload, now)

    def garbage(self, peer: Peer, error: WireError) -> list[Action]:
        """Take in frames that are no message of this protocol: say so to the sender, who sees both versions."""
        return [Note("garbage", {"reason": str(error)}), Send((peer,), m.Refused("", str(error)))]

    def lost(self, peer: Peer, now: float) -> list[Action]:
        """Note that a connection broke. A process that lives is heard again at once; a dead one is not."""
        everybody: list[Worker | Server] = [*self.workers.values(), *self.servers.values()]
        for other in everybody:
            if other.peer == peer:
                other.lost = now
        return []

    def away(self, seconds: float, now: float) -> list[Action]:
        """Note that this process has heard nobody for a time, because it was stopped: nobody was silent in it.

        Args:
            seconds: How long.
            now: The time, at which it listens again.
        """
        everybody: list[Worker | Server] = [*self.workers.values(), *self.servers.values()]
        for other in everybody:
            other.seen = min(now, other.seen + seconds)
            other.lost += seconds
        for worker in self.workers.values():
            worker.since = min(now, worker.since + seconds)
            worker.asked += seconds
        return [Note("away", {"for_s": round(seconds, 3)})]

    def tick(self, now: float) -> list[Action]:
        """Look at the clock: who is silent, what has not happened, what is to be said again."""
        if self.over is not None:
            return self._ending.tick(now)
        notes = [*self._silence.look(self.run.heard(), now), *self._look_at_servers(now)]
        if (missed := self._missed(now)) is not None:
            return notes + missed
        if self.view is None:
            return notes + self._gather(now)
        return notes + self._membership.tick(now) + self._pending_plans() + self.checkpoints.tick(now)

    def _look_at_servers(self, now: float) -> list[Action]:
        """Note which servers are taken for dead."""
        limits, notes = self.settings.timeouts, list[Action]()
        for server in self.servers.values():
            if server.gone:
                continue
            if now - server.seen > limits.dead:
                server.gone = f"has been silent for {limits.dead:g} s"
            elif now - server.lost > LOST_BEATS * limits.heartbeat:
                server.gone = "has closed its connection"
            if server.gone:
                notes.append(Note("gone", {"server": server.number, "why": server.gone}))
        return notes

    def _missed(self, now: float) -> list[Action] | None:
        """End the run when a server has been away for too long."""
        limits = self.settings.timeouts
        for server in self.servers.values():
            silent = now - server.seen
            if not self.settings.state_directory and silent > limits.dead:
                return self._abort(server.name, f"{server.name} has been silent for {limits.dead:g} s", now)
            if silent > limits.server:
                reason = f"{server.name} {server.gone}, and was not started again within {limits.server:g} s (timeouts.server)"
                return self._abort(server.name, f"{reason}; {_residuals(server)} are lost with it", now)
        return None

    def _gather(self, now: float) -> list[Action]:
        limits = self.settings.timeouts
        for worker in self.workers.values():
            if now - worker.seen > limits.dead:
                return self._abort(worker.name, f"{worker.name} has been silent for {limits.dead:g} s", now)
        missing = self._admission.missing()
        if now - self.run.born > limits.join:
            return self._abort("coordinator", f"waited {limits.join:g} s for all to join; still missing {missing}", now)
        if now - self._noted > WAITING_NOTE_S:
            self._noted = now
            return [Note("waiting", {"missing": missing, "since_s": round(now - self.run.born)})]
        return []

    # ------------------------------------------------------------ layouts

    def _was_removed(self, said: m.Leave) -> bool:
        return self.views.was_removed(said.slot, said.incarnation)

    def _stranger(self, peer: Peer, slot: int, incarnation: int) -> list[Action]:
        """Answer a process that has no part in the run: any more, which the view tells it, or at all."""
        if self.view is not None and self.views.was_removed(slot, incarnation):
            return [Send((peer,), m.Pulse()), Send((peer,), self.view)]
        return [Send((peer,), m.Refused("", f"worker {slot} is not in this run"))]

    def _on_declare(self, peer: Peer, declare: m.Declare, payload: Sequence[Buffer], now: float) -> list[Action]:
        worker = self.run.member(declare.slot, declare.incarnation)
        if worker is None:
            return self._stranger(peer, declare.slot, declare.incarnation)
        worker.seen, worker.lost = now, math.inf
        try:
            actions = self.layouts.declare(worker, peer, declare, payload, self.servers.values())
        except RunAborted as different:
            reason = str(different)
            return [*self._abort(worker.name, reason, now), Send((peer,), m.Refused("", reason[: m.MAX_TEXT]))]
        return actions + self.layouts.open(self.views.members, self.servers.values(), again=declare.layout)

    # ------------------------------------------------------------ while it runs

    def _on_alive(self, peer: Peer, alive: m.Alive, _: Sequence[Buffer], now: float) -> list[Action]:
        if alive.view > self.run.number:
            reason = forgotten(f"worker {alive.slot}", alive.view)
            return [Note("refused", {"slot": alive.slot, "reason": reason}), refused("", peer, reason)]
        worker = self.run.member(alive.slot, alive.incarnation)
        if worker is None:
            return self._stranger(peer, alive.slot, alive.incarnation)
        worker.peer, worker.seen, worker.lost = peer, now, math.inf
        worker.plans = {layout: version for layout, _, version in alive.layouts}
        worker.synced, worker.ready = alive.synced, alive.ready
        rounds = {layout: round_ for layout, round_, _ in alive.layouts}
        self._progress.alive(worker, rounds, alive.waits, now)
        # While a server is away nobody has a connection to it.
        lives = [number for number in alive.cut if number in self.servers and not self.servers[number].gone]
        worker.cut = {number: worker.cut.get(number, now) for number in lives}
        ended = self._rounds_ended(worker) if alive.done else []
        if self.run.ending:
            # The END changes no state: who has not got its results, or has just come, needs to know no more than this.
            return [*ended, Send((peer,), m.Ended())]
        actions: list[Action] = [Send((peer,), m.Pulse())]
        if alive.busy != worker.busy:
            worker.busy, worker.since = alive.busy, now
            actions.append(Note("busy", {"slot": worker.slot, "what": worker.busy}))
        actions += self.checkpoints.waits(worker.slot, rounds, alive.waits)
        if self.view is not None and alive.view < self.view.p:
            actions.append(Send((peer,), self.view))
        return actions

    def _on_report(self, peer: Peer, report: m.Report, payload: Sequence[Buffer], now: float) -> list[Action]:
        worker, entry = self.run.member(report.slot, report.incarnation), self.layouts.entries.get(report.layout)
        if worker is None or entry is None:
            return []
        worker.seen = now
        if len(payload) != 1 or memoryview(payload[0]).nbytes != 4 * len(entry.layout.tensors):
            return self._abort(worker.name, f"{worker.name} reported norms of the wrong length for layout {report.layout}", now)
        norms = np.frombuffer(memoryview(payload[0]), np.float32)
        try:
            entry.planner.report(
                report.slot, window=report.window, round_=report.round, norms=norms, rate=report.rate, loss=report.loss,
                members=sorted(self.views.members),
            )  # fmt: skip
        except WireError as error:
            return self._abort(worker.name, str(error), now)
        heard: list[Action] = [Send((peer,), m.Heard(report.layout, report.window))]
        return heard + self.layouts.plans(entry, self.run.members(), self.servers)

    def _on_rate(self, _peer: Peer, rate: m.Rate, _: Sequence[Buffer], now: float) -> list[Action]:
        worker, entry = self.run.member(rate.slot, rate.incarnation), self.layouts.entries.get(rate.layout)
        if worker is None or entry is None:
            return []
        worker.seen = now
        entry.planner.rate(rate.slot, rate.rate, rate.round, members=sorted(self.views.members))
        return self.layouts.plans(entry, self.run.members(), self.servers)

    def _pending_plans(self) -> list[Action]:
        entries = self.layouts.entries.values()
        return [action for entry in entries for action in self.layouts.pending(entry, self.run.members(), self.servers)]

    # ------------------------------------------------------------ the end

    def _on_account(self, _peer: Peer, account: m.Account, _: Sequence[Buffer], _now: float) -> list[Action]:
        worker = self.run.member(account.slot, account.incarnation)
        return [] if worker is None else self.run.accounts.worker(account)

    def _on_books(self, _peer: Peer, books: m.Books, _: Sequence[Buffer], _now: float) -> list[Action]:
        view = self.view
        return self.run.accounts.books(books, {} if view is None else {number: boot for number, boot, _ in view.shards})

    def _on_leave(self, peer: Peer, leave: m.Leave, _: Sequence[Buffer], now: float) -> list[Action]:
        worker = self.run.member(leave.slot, leave.incarnation)
        if leave.early and not (leave.code or leave.error or self.run.ending):
            return self._membership.left(peer, leave, now)
        if worker is None:
            return self._stranger(peer, leave.slot, leave.incarnation) if self._was_removed(leave) else []
        if worker.peer is None and not (leave.code or leave.error):
            return []  # known from the log only: its next sign of life tells whether it has trained, and it says goodbye again
        first, actions = not worker.left, list[Action]()
        worker.peer, worker.seen, worker.left = peer, now, True
        self._ending.known.add(worker.name)
        if leave.code or leave.error:
            return self._abort(worker.name, leave.error or f"{worker.name} ended with code {leave.code}", now)
        actions += self._rounds_ended(worker)
        if self.view is not None and (end := self._ending.all_left(now)):
            return actions + end
        return [*actions, Note("leave", {"slot": leave.slot})] if first else actions

    def _on_promise(self, _peer: Peer, promise: m.Promise, _: Sequence[Buffer], now: float) -> list[Action]:
        worker = self.run.member(promise.slot, promise.incarnation)
        # A view would begin anew what has ended.
        ended = self._rounds_ended(worker) if worker is not None and promise.done else []
        return ended + self._membership.promised(promise, now)

    def _rounds_ended(self, worker: Worker) -> list[Action]:
        """Note that a worker which says goodbye has seen its rounds end.

        Who has taken part in rounds leaves when they have ended, for all. Who has not goes by itself.
        """
        # One that came back as another incarnation does not declare again, so its signs of life count as well.
        trained = bool(worker.plans) or any(worker.slot in entry.declared for entry in self.layouts.entries.values())
        if not trained or not self.run.is_in(worker) or self.run.ending:
            return []
        self.run.ending = True
        return [history.ending()]

    def _on_fault(self, _peer: Peer, fault: m.Fault, _: Sequence[Buffer], now: float) -> list[Action]:
        return self._abort(fault.culprit, f"server {fault.server}: {fault.reason}", now)

    def _on_bye(self, _peer: Peer, bye: m.Bye, _: Sequence[Buffer], now: float) -> list[Action]:
        return self._ending.bye(bye.name, now)

    def crash(self, error: BaseException, now: float) -> list[Action]:
        """Tell everybody that this process itself has failed."""
        return [] if self.over is not None else self._abort("coordinator", f"{type(error).__name__}: {error}", now)

    def _abort(self, culprit: str, reason: str, now: float) -> list[Action]:
        return self._ending.abort(culprit, reason, now)


def _residuals(server: Server) -> str:
    return f"the residuals of shard{'s'[: len(server.shards) > 1]} {', '.join(str(number) for number, _ in server.shards)}"

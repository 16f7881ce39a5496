"""The coordinator as a state machine: messages and a time in, actions out.

    gathering ──all are in──> running ──a worker's rounds have ended──> ending ──all have left──> ended
        └───────── a failure ────┴──────────> aborted

Gathering admits workers and servers in any order; when all are there, view 1 names them and the rounds may begin.
A worker that dies, falls silent or is stuck costs the run a new view without it, and the others go on; one that comes back, or
another in its place, asks for a place and gets a view of its own. A server that dies is waited for: who is started in its place
has its memory. What cannot be survived ends the run for all, with its reason.

Every answer may be lost, so everything is repeated until the other side shows that it knows: a join until the welcome, a freeze
until the promise, a view until the sign of life that carries its number, a plan until every member reports its version.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from typing_extensions import Buffer

from ..codecs import get
from ..config import Settings
from ..errors import ConfigError, RunAborted, WireError
from ..regimes import check_settings
from ..wire import messages as m
from ..wire.actions import Action, Note, Peer, Send, Stop
from .clocks import Progress
from .layouts import Layouts
from .roster import Server, Worker, disagreement
from .views import Views

__all__ = ["Coordinator"]

WAITING_NOTE_S = 10.0
"""How often the log says whom it still waits for."""
LOST_BEATS = 1.5
"""Heartbeats that a process whose connection broke may take to be heard again. One that lives connects anew within 0.05 s."""


class Coordinator:
    """Membership, layouts and plans of one run.

    Args:
        settings: The settings of the job, which bind everybody who joins.
        now: The time at the start, in seconds of any monotonic clock; all later times are of the same clock.

    Raises:
        ConfigError: `[regime]` names no policy or no window, or more workers are needed than there are.
        CodecError: `[codec]` names no codec, or a level that it does not have.
    """

    def __init__(self, settings: Settings, now: float) -> None:
        # Now, not when the first model is declared: by then others would wait for an answer.
        check_settings(settings.regime)
        for level in (settings.codec.light, settings.codec.heavy):
            get(settings.codec.name).check_level(level)
        if settings.workers.minimum > settings.workers.count:
            raise ConfigError(
                f"workers.minimum is {settings.workers.minimum}; expected at most workers.count, {settings.workers.count}"
            )
        self.settings = settings
        self.workers: dict[int, Worker] = {}
        self.servers: dict[int, Server] = {}
        self.layouts = Layouts(settings)
        self.views = Views()
        self.ending = False
        """Whether some worker's rounds have ended: from here on views do not change."""
        self.over: m.Ended | m.Abort | None = None
        self._known: dict[str, Peer] = {}
        self._incarnations = 0
        self._born = now
        self._noted = now
        self._short_since = math.inf
        self._progress = Progress(settings.timeouts)
        self._stop_at = math.inf
        self._handlers: dict[type[m.Message], Callable[..., list[Action]]] = {
            m.Join: self._on_join,
            m.Declare: self._on_declare,
            m.Alive: self._on_alive,
            m.ServerAlive: self._on_server,
            m.Frozen: self._on_frozen,
            m.Report: self._on_report,
            m.Rate: self._on_rate,
            m.Leave: self._on_leave,
            m.Fault: self._on_fault,
            m.Bye: self._on_bye,
        }

    @property
    def phase(self) -> str:
        """`gathering`, `running`, `ending`, `ended` or `aborted`."""
        if self.over is not None:
            return "ended" if isinstance(self.over, m.Ended) else "aborted"
        if self.ending:
            return "ending"
        return "gathering" if self.view is None else "running"

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
        if self.over is not None and not isinstance(message, m.Bye):
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

    def tick(self, now: float) -> list[Action]:
        """Look at the clock: who is silent, what has not happened, what is to be said again."""
        if self.over is not None:
            if now >= self._stop_at or not self._known:
                return [self._stop()]
            return []
        notes = self._look_at_servers(now)
        if (missed := self._missed(now)) is not None:
            return notes + missed
        if self.view is None:
            return notes + self._gather(now)
        notes += self._look(now)
        return notes + self._next(now) + self._pending_plans()

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
        missing = self._missing()
        if now - self._born > limits.join:
            return self._abort("coordinator", f"waited {limits.join:g} s for all to join; still missing {missing}", now)
        if now - self._noted > WAITING_NOTE_S:
            self._noted = now
            return [Note("waiting", {"missing": missing, "since_s": round(now - self._born)})]
        return []

    # ------------------------------------------------------------ views

    def _look(self, now: float) -> list[Action]:
        """Note who is taken for dead, and who is not any more."""
        limits, notes = self.settings.timeouts, list[Action]()
        stuck = [] if self._waits_for_servers else self._progress.stuck(self._members(), now)
        for worker in list(self.workers.values()):
            silent = now - worker.seen
            if silent > limits.dead:
                gone = f"has been silent for {limits.dead:g} s"
            elif now - worker.lost > LOST_BEATS * limits.heartbeat:
                gone = "has closed its connection"
            elif worker in stuck:
                gone = (
                    f"computes for more than {self._progress.limit(worker):.0f} s while others wait; session.busy() allows that"
                )
            else:
                gone = ""
            if worker.left or bool(gone) == bool(worker.gone):
                continue
            worker.gone = gone
            if self._is_in(worker):
                notes.append(
                    Note("gone" if gone else "back", {"slot": worker.slot, "incarnation": worker.incarnation, "why": gone})
                )
        return notes

    @property
    def _waits_for_servers(self) -> bool:
        """Whether a server is away: then nobody can get further, and it is no worker's fault."""
        return any(server.gone for server in self.servers.values())

    def _members(self) -> list[Worker]:
        """Return the processes that the view names, as far as they have not been replaced."""
        return [worker for worker in self.workers.values() if self._is_in(worker)]

    def _is_in(self, worker: Worker) -> bool:
        return self.views.members.get(worker.slot) == worker.incarnation

    def _wanted(self) -> dict[int, int]:
        """Return who should be in: those who are and live, and who is ready, as long as somebody can hand out the state."""
        kept = [worker for worker in self._members() if not worker.gone and not worker.left]
        new = [worker for worker in self.workers.values() if worker.ready and not worker.gone and not self._is_in(worker)]
        if not any(worker.synced for worker in kept):
            new = []
        return {worker.slot: worker.incarnation for worker in (*kept, *new)}

    def _next(self, now: float) -> list[Action]:
        """Make the next view, if the last one is not as it should be."""
        if self.ending:
            return self._all_left(now)
        proposal, wanted = self.views.proposal, self._wanted()
        if not self._waits_for_servers and (reason := self._progress.deadlock(self._members(), now)):
            return self._abort("coordinator", reason, now)
        moved = proposal is None and self.view is not None and self.view.shards != self._shards()
        if wanted == (proposal.members if proposal is not None else self.views.members) and not moved:
            self._short_since = math.inf
            return self._freeze() if proposal is not None else []
        gone = [worker.name for worker in self._members() if worker.gone]
        if all(worker.left for worker in self._members()):
            return self._all_left(now)
        if not any(worker.synced and wanted.get(worker.slot) == worker.incarnation for worker in self._members()):
            return self._wait_for_more("nobody else has the model's state", gone, now)
        if self._is_starting(wanted):
            who = ", ".join(gone)
            return self._abort(gone[0], f"{who} is gone before all had the parameters that training starts from", now)
        if len(wanted) < self.settings.workers.minimum:
            return self._wait_for_more(f"workers.minimum is {self.settings.workers.minimum}", gone, now)
        self._short_since = math.inf
        proposal = self.views.propose(wanted)
        note = Note("proposal", {"p": proposal.p, "members": sorted(wanted.items())})
        return [note, *self._freeze()]

    def _is_starting(self, wanted: dict[int, int]) -> bool:
        """Whether the donor of the first parameters of some model is gone while somebody still fetches them from it."""
        assert self.view is not None
        members = self._members()
        donor = next((worker for worker in members if worker.slot == self.view.donor), None)
        if donor is None or donor.slot in wanted or all(worker.synced for worker in members if worker.slot in wanted):
            return False
        return any(not any(worker.rounds.get(layout) for worker in members) for layout in self.layouts.entries)

    def _wait_for_more(self, why: str, gone: list[str], now: float) -> list[Action]:
        """Let the rounds stand still until somebody comes, or comes back; those that are gone stay in the view."""
        limits = self.settings.timeouts
        if math.isinf(self._short_since):
            self._short_since, self._noted = now, -math.inf
        since = now - self._short_since
        missing = ", ".join(gone) or "all"
        if since > limits.join:
            reason = f"{missing} gone for {since:.0f} s, and {why}"
            return self._abort(gone[0] if gone else "coordinator", reason, now)
        if now - self._noted > WAITING_NOTE_S:
            self._noted = now
            return [Note("waiting", {"missing": f"{missing} ({why})", "since_s": round(since)})]
        return []

    def _freeze(self) -> list[Action]:
        """Ask the shards that have not promised yet."""
        assert self.views.proposal is not None
        per_server = self.settings.servers.shards_per_server
        servers = sorted({number // per_server for number in self.views.missing(self._shards())})
        return [Send(tuple(self.servers[number].peer for number in servers), m.Freeze(self.views.proposal.p))] if servers else []

    def _on_frozen(self, _peer: Peer, frozen: m.Frozen, _: Sequence[Buffer], now: float) -> list[Action]:
        self.views.promised(frozen)
        proposal = self.views.proposal
        if proposal is None or self.views.missing(self._shards()) or self.ending:
            return []
        kept = [worker for worker in self._members() if proposal.members.get(worker.slot) == worker.incarnation]
        if proposal.members != self._wanted() or not kept:
            return []  # somebody has come or gone meanwhile: the next look makes a proposal that knows
        before = self.views.members
        donor = min(kept, key=lambda worker: (not worker.synced, worker.slot)).slot
        view = self.views.commit(self._shards(), donor=donor, layouts=self.layouts.opened)
        removed = sorted(slot for slot, incarnation in before.items() if proposal.members.get(slot) != incarnation)
        new = sorted(slot for slot, incarnation in proposal.members.items() if before.get(slot) != incarnation)
        for worker in self._members():
            worker.since = now
            worker.ready = False
        notes: list[Action] = []
        for layout, cut, _epoch in view.cuts:
            if new:  # whoever comes has other statistics, or none: all tensors are light until the next check
                self.layouts.entries[layout].planner.rejoined(sorted(proposal.members), cut)
                notes += self.layouts.plans(self.layouts.entries[layout], self._members(), self.servers)
        fields = {"p": view.p, "members": view.members, "cuts": view.cuts, "removed": removed, "new": new, "donor": donor}
        tell = Send(self._everybody(), view)
        return [Note("view", fields), tell, *notes, *self.layouts.open(self.views.members, self.servers.values())]

    def _shards(self) -> list[tuple[int, int, str]]:
        return [(number, boot, server.address) for _, server in sorted(self.servers.items()) for number, boot in server.shards]

    # ------------------------------------------------------------ joining

    def _on_join(self, peer: Peer, join: m.Join, _: Sequence[Buffer], now: float) -> list[Action]:
        for worker in self.workers.values():
            if worker.token == join.token:
                worker.peer, worker.seen, worker.lost = peer, now, math.inf
                return [Send((peer,), self._welcome(worker))]
        if self.ending:
            return [Send((peer,), m.Ended())]
        reason = self._refusal(join)
        slot = join.slot if join.slot >= 0 else self._free_slot()
        if not reason and slot is None:
            reason = f"the run is full: workers.count = {self.settings.workers.count}, and all of them are in"
        if reason:
            return [Note("refused", {"slot": join.slot, "reason": reason}), _refused(join.token, peer, reason)]
        assert slot is not None
        holder = self.workers.get(slot)
        if holder is not None and self._is_suspect(holder, now) and not self._may_replace(holder, join):
            return []  # it is silent, and may be dead: that turns out before the joiner gives up
        if holder is not None and not self._may_replace(holder, join):
            reason = f"rank {slot} is taken by another process of this run; start each worker with its own rank"
            return [Note("refused", {"slot": join.slot, "reason": reason}), _refused(join.token, peer, reason)]
        self._incarnations += 1
        self.layouts.forget(slot)
        worker = Worker(slot, self._incarnations, join.token, peer, now, restart=join.restart, since=now)
        worker.synced = self.view is None
        self.workers[slot] = worker
        self._known[worker.name] = peer
        joined: list[Action] = [Note("join", {"slot": slot, "incarnation": worker.incarnation, "restart": join.restart})]
        return [*joined, Send((peer,), self._welcome(worker)), *self._begin(now)]

    def _refusal(self, join: m.Join) -> str:
        count = self.settings.workers.count
        who = f"worker {join.slot}" if join.slot >= 0 else "the worker that joins"
        if reason := disagreement(join.terms, self.settings, who):
            return reason
        if join.slot >= count:
            return f"expected a worker rank of 0 to {count - 1} (workers.count = {count}), got {join.slot}"
        return ""

    def _free_slot(self) -> int | None:
        """Return the lowest slot that nobody holds, or whose holder is out of the run for good."""
        free = (
            slot
            for slot in range(self.settings.workers.count)
            if (holder := self.workers.get(slot)) is None or self._is_out(holder)
        )
        return next(free, None)

    def _is_out(self, worker: Worker) -> bool:
        return self.views.was_removed(worker.slot, worker.incarnation)

    def _is_suspect(self, worker: Worker, now: float) -> bool:
        return bool(worker.gone) or worker.lost < now or now - worker.seen > 2 * self.settings.timeouts.heartbeat

    def _may_replace(self, holder: Worker, join: m.Join) -> bool:
        return self._is_out(holder) or bool(holder.gone) or join.restart > holder.restart

    def _welcome(self, worker: Worker) -> m.Welcome:
        return m.Welcome(worker.token, worker.slot, worker.incarnation, self.settings.terms())

    def _on_server(self, peer: Peer, alive: m.ServerAlive, _: Sequence[Buffer], now: float) -> list[Action]:
        per_server = self.settings.servers.shards_per_server
        expected = [alive.server * per_server + index for index in range(per_server)]
        known = self.servers.get(alive.server)
        reason = ""
        if alive.server >= self.settings.servers.count:
            reason = f"expected server numbers 0 to {self.settings.servers.count - 1}, got {alive.server}"
        elif [number for number, _ in alive.shards] != expected:
            reason = (
                f"server {alive.server} holds shards {[number for number, _ in alive.shards]}, this job expects {expected}; "
                "give it the coordinator's shards_per_server"
            )
        elif known is not None and known.shards != tuple(alive.shards) and not self._is_away(known):
            reason = f"server number {alive.server} is taken by another process, at {known.address}"
        elif alive.view > (-1 if self.view is None else self.view.p):
            reason = (
                f"server {alive.server} has the memory of another run, which had come to view {alive.view}; name another "
                "directory (servers.state_directory, run.directory), or remove what is in it"
            )
        reason = reason or disagreement(alive.terms, self.settings, f"server {alive.server}")
        if reason:
            return [Note("refused", {"server": alive.server, "reason": reason}), _refused("", peer, reason)]
        if known is not None and known.shards != tuple(alive.shards):
            if self.view is not None:
                return self._lost_memory(known, peer, alive, now)
            known = None  # nothing has begun, so nothing is lost with the one before
        actions: list[Action] = [Send((peer,), m.Pulse())]
        if known is None:
            known = Server(alive.server, alive.address, tuple(alive.shards), peer, now)
            self.servers[alive.server] = known
            actions.append(Note("server", {"server": alive.server, "address": alive.address}))
        elif known.gone or known.address != alive.address:
            actions.append(Note("back", {"server": alive.server, "address": alive.address, "why": ""}))
            for worker in self._members():
                worker.since = now  # they have waited for it, not for each other
        self._known[known.name] = peer
        known.peer, known.seen, known.address, known.lost, known.gone = peer, now, alive.address, math.inf, ""
        known.layouts = dict(alive.layouts)
        actions += self.layouts.missing_at(known)
        actions += self._begin(now)
        if self.view is not None and alive.view < self.view.p:
            actions.append(Send((peer,), self.view))
        return actions + self.layouts.open(self.views.members, self.servers.values())

    def _is_away(self, server: Server) -> bool:
        """Whether a process that claims to be this server may be the one that was started in its place."""
        return bool(server.gone) or not math.isinf(server.lost)

    def _lost_memory(self, server: Server, peer: Peer, alive: m.ServerAlive, now: float) -> list[Action]:
        """End the run: what was started in a server's place is not what it was."""
        why = alive.lost or "nothing of it was found (servers.state_directory, run.directory)"
        reason = f"{server.name} has come back without its memory: {why}; {_residuals(server)} are lost"
        server.peer = peer
        return self._abort(server.name, reason, now)

    def _missing(self) -> str:
        settings = self.settings
        workers = [slot for slot in range(settings.workers.count) if slot not in self.workers]
        servers = [number for number in range(settings.servers.count) if number not in self.servers]
        return ", ".join(f"{kind} {numbers}" for kind, numbers in (("workers", workers), ("servers", servers)) if numbers)

    def _begin(self, now: float) -> list[Action]:
        """Make the first view when all are in."""
        settings = self.settings
        if self.view is not None or len(self.workers) < settings.workers.count or len(self.servers) < settings.servers.count:
            return []
        view = self.views.first({slot: worker.incarnation for slot, worker in self.workers.items()}, self._shards())
        note = Note("view", {"p": 1, "members": view.members, "waited_s": round(now - self._born, 3)})
        return [note, Send(self._everybody(), view), *self.layouts.open(self.views.members, self.servers.values())]

    def _everybody(self) -> tuple[Peer, ...]:
        others: list[Worker | Server] = [*self.servers.values(), *self.workers.values()]
        return tuple(other.peer for other in others)

    def _member(self, slot: int, incarnation: int) -> Worker | None:
        """Return a process that was let in, as long as nobody else has its slot."""
        worker = self.workers.get(slot)
        return worker if worker is not None and worker.incarnation == incarnation else None

    def _was_removed(self, said: m.Leave) -> bool:
        return self.views.was_removed(said.slot, said.incarnation)

    def _stranger(self, peer: Peer, slot: int, incarnation: int) -> list[Action]:
        """Answer a process that has no part in the run: any more, which the view tells it, or at all."""
        if self.view is not None and self.views.was_removed(slot, incarnation):
            return [Send((peer,), m.Pulse()), Send((peer,), self.view)]
        return [Send((peer,), m.Refused("", f"worker {slot} is not in this run"))]

    def _on_declare(self, peer: Peer, declare: m.Declare, payload: Sequence[Buffer], now: float) -> list[Action]:
        worker = self._member(declare.slot, declare.incarnation)
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
        worker = self._member(alive.slot, alive.incarnation)
        if worker is None:
            return self._stranger(peer, alive.slot, alive.incarnation)
        worker.peer, worker.seen, worker.lost = peer, now, math.inf
        worker.plans = {layout: version for layout, _, version in alive.layouts}
        worker.synced, worker.ready = alive.synced, alive.ready
        self._progress.alive(worker, {layout: round_ for layout, round_, _ in alive.layouts}, alive.waits, now)
        if self.ending:
            # The END changes no state: who has not got its results, or has just come, needs to know no more than this.
            return [Send((peer,), m.Ended())]
        actions: list[Action] = [Send((peer,), m.Pulse())]
        if alive.busy != worker.busy:
            worker.busy, worker.since = alive.busy, now
            actions.append(Note("busy", {"slot": worker.slot, "what": worker.busy}))
        if self.view is not None and alive.view < self.view.p:
            actions.append(Send((peer,), self.view))
        return actions

    def _on_report(self, peer: Peer, report: m.Report, payload: Sequence[Buffer], now: float) -> list[Action]:
        worker, entry = self._member(report.slot, report.incarnation), self.layouts.entries.get(report.layout)
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
        return heard + self.layouts.plans(entry, self._members(), self.servers)

    def _on_rate(self, _peer: Peer, rate: m.Rate, _: Sequence[Buffer], now: float) -> list[Action]:
        worker, entry = self._member(rate.slot, rate.incarnation), self.layouts.entries.get(rate.layout)
        if worker is None or entry is None:
            return []
        worker.seen = now
        entry.planner.rate(rate.slot, rate.rate, rate.round, members=sorted(self.views.members))
        return self.layouts.plans(entry, self._members(), self.servers)

    def _pending_plans(self) -> list[Action]:
        entries = self.layouts.entries.values()
        return [action for entry in entries for action in self.layouts.pending(entry, self._members(), self.servers)]

    # ------------------------------------------------------------ the end

    def _on_leave(self, peer: Peer, leave: m.Leave, _: Sequence[Buffer], now: float) -> list[Action]:
        worker = self._member(leave.slot, leave.incarnation)
        if worker is None:
            return self._stranger(peer, leave.slot, leave.incarnation) if self._was_removed(leave) else []
        first = not worker.left
        worker.peer, worker.seen, worker.left = peer, now, True
        self._known[worker.name] = peer
        if leave.code or leave.error:
            return self._abort(worker.name, leave.error or f"{worker.name} ended with code {leave.code}", now)
        # Who has taken part in rounds leaves when they have ended, for all. Who has not goes by itself.
        trained = any(worker.slot in entry.declared for entry in self.layouts.entries.values())
        self.ending = self.ending or (trained and self._is_in(worker))
        if self.view is not None and (end := self._all_left(now)):
            return end
        return [Note("leave", {"slot": leave.slot})] if first else []

    def _all_left(self, now: float) -> list[Action]:
        """End the run when nobody is left in it."""
        # No view will tell the others where a server is that has moved. All they lack is its word that all have finished.
        moved = self.ending and self.view is not None and self.view.shards != self._shards()
        if not moved and not all(worker.left or worker.gone for worker in self._members()):
            return []
        return self._finish(m.Ended(), now, Note("end", {"after_s": round(now - self._born, 3)}))

    def _on_fault(self, _peer: Peer, fault: m.Fault, _: Sequence[Buffer], now: float) -> list[Action]:
        return self._abort(fault.culprit, f"server {fault.server}: {fault.reason}", now)

    def _on_bye(self, _peer: Peer, bye: m.Bye, _: Sequence[Buffer], now: float) -> list[Action]:
        if self.over is None:
            told = [worker for worker in self.workers.values() if self.ending and worker.name == bye.name]
            for worker in told:
                worker.left = True
            return self._all_left(now) if told else []
        self._known.pop(bye.name, None)
        return [] if self._known else [self._stop()]

    def crash(self, error: BaseException, now: float) -> list[Action]:
        """Tell everybody that this process itself has failed."""
        return [] if self.over is not None else self._abort("coordinator", f"{type(error).__name__}: {error}", now)

    def _abort(self, culprit: str, reason: str, now: float) -> list[Action]:
        note = Note("error", {"culprit": culprit, "reason": reason})
        return self._finish(m.Abort(culprit[:64], reason[: m.MAX_TEXT]), now, note)

    def _finish(self, over: m.Ended | m.Abort, now: float, note: Note) -> list[Action]:
        self.over = over
        self._stop_at = now + self.settings.timeouts.grace
        return [note, Send(self._everybody(), over)]

    def _stop(self) -> Stop:
        if isinstance(self.over, m.Abort):
            return Stop(RunAborted.exit_code, self.over.culprit, self.over.reason)
        return Stop(0)


def _residuals(server: Server) -> str:
    return f"the residuals of shard{'s'[: len(server.shards) > 1]} {', '.join(str(number) for number, _ in server.shards)}"


def _refused(token: str, peer: Peer, reason: str) -> Send:
    return Send((peer,), m.Refused(token, reason[: m.MAX_TEXT]))

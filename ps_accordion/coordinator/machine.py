"""The coordinator as a state machine: messages and a time in, actions out.

    gathering ──all are in──> running ──all workers left──> ended
        └──────────── a failure, or somebody silent ──────> aborted

Gathering admits workers and servers in any order; when all are there, view 1 names them and the rounds may begin.
Every answer may be lost, so everything is repeated until the other side shows that it knows: a join until the welcome, a view
until the sign of life that carries its number, a plan until every member reports its version.

In this release membership does not change while a run goes on: a process that fails ends the run for all, with its reason.
The messages and the shards' records already carry views, incarnations and boots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from typing_extensions import Buffer

from ..codecs import get
from ..config import Settings
from ..errors import LayoutError, RunAborted, WireError
from ..layout import Layout
from ..regimes import check_settings
from ..wire import messages as m
from ..wire.actions import Action, Note, Peer, Send, Stop
from ..wire.framing import split_frames
from .planning import Planner
from .roster import LayoutEntry, Server, Worker, disagreement

__all__ = ["Coordinator"]

WAITING_NOTE_S = 10.0
"""How often the log says whom it still waits for."""


class Coordinator:
    """Membership, layouts and plans of one run.

    Args:
        settings: The settings of the job, which bind everybody who joins.
        now: The time at the start, in seconds of any monotonic clock; all later times are of the same clock.

    Raises:
        ConfigError: `[regime]` names no policy or no window.
        CodecError: `[codec]` names no codec, or a level that it does not have.
    """

    def __init__(self, settings: Settings, now: float) -> None:
        # Now, not when the first model is declared: by then others would wait for an answer.
        check_settings(settings.regime)
        for level in (settings.codec.light, settings.codec.heavy):
            get(settings.codec.name).check_level(level)
        self.settings = settings
        self.workers: dict[int, Worker] = {}
        self.servers: dict[int, Server] = {}
        self.layouts: dict[int, LayoutEntry] = {}
        self.view: m.View | None = None
        self.over: m.Ended | m.Abort | None = None
        self._known: dict[str, Peer] = {}
        self._incarnations = 0
        self._born = now
        self._noted = now
        self._stop_at = math.inf
        self._handlers: dict[type[m.Message], Callable[..., list[Action]]] = {
            m.Join: self._on_join,
            m.Declare: self._on_declare,
            m.Alive: self._on_alive,
            m.ServerAlive: self._on_server,
            m.Report: self._on_report,
            m.Rate: self._on_rate,
            m.Leave: self._on_leave,
            m.Fault: self._on_fault,
            m.Bye: self._on_bye,
        }

    @property
    def phase(self) -> str:
        """`gathering`, `running`, `ended` or `aborted`."""
        if self.over is not None:
            return "ended" if isinstance(self.over, m.Ended) else "aborted"
        return "gathering" if self.view is None else "running"

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

    def tick(self, now: float) -> list[Action]:
        """Look at the clock: who is silent, what has not happened, what is to be said again."""
        if self.over is not None:
            if now >= self._stop_at or not self._known:
                return [self._stop()]
            return []
        limits = self.settings.timeouts
        present: list[Worker | Server] = [*self.servers.values()]
        present += [worker for worker in self.workers.values() if not worker.left]
        for other in present:
            if now - other.seen > limits.dead:
                return self._abort(other.name, f"{other.name} has been silent for {limits.dead:g} s", now)
        if self.view is None:
            missing = self._missing()
            if now - self._born > limits.join:
                return self._abort("coordinator", f"waited {limits.join:g} s for all to join; still missing {missing}", now)
            if now - self._noted > WAITING_NOTE_S:
                self._noted = now
                return [Note("waiting", {"missing": missing, "since_s": round(now - self._born)})]
        return self._pending_plans()

    # ------------------------------------------------------------ joining

    def _on_join(self, peer: Peer, join: m.Join, _: Sequence[Buffer], now: float) -> list[Action]:
        for worker in self.workers.values():
            if worker.token == join.token:
                worker.peer = peer
                worker.seen = now
                return [Send((peer,), self._welcome(worker))]
        reason = self._refusal(join)
        if reason:
            return [Note("refused", {"slot": join.slot, "reason": reason}), _refused(join.token, peer, reason)]
        free = (slot for slot in range(self.settings.workers.count) if slot not in self.workers)
        slot = join.slot if join.slot >= 0 else next(free)
        self._incarnations += 1
        worker = Worker(slot, self._incarnations, join.token, peer, now)
        self.workers[slot] = worker
        self._known[worker.name] = peer
        joined: list[Action] = [Note("join", {"slot": slot, "incarnation": worker.incarnation})]
        return [*joined, Send((peer,), self._welcome(worker)), *self._begin(now)]

    def _refusal(self, join: m.Join) -> str:
        count = self.settings.workers.count
        who = f"worker {join.slot}" if join.slot >= 0 else "the worker that joins"
        if reason := disagreement(join.terms, self.settings, who):
            return reason
        if join.slot >= count:
            return f"expected a worker rank of 0 to {count - 1} (workers.count = {count}), got {join.slot}"
        if join.slot in self.workers:
            return f"rank {join.slot} is taken by another process of this run; start each worker with its own rank"
        if self.view is not None or len(self.workers) >= count:
            return f"the run is full: workers.count = {count}, and all of them are in"
        return ""

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
        elif known is not None and known.shards != tuple(alive.shards):
            reason = f"server number {alive.server} is taken by another process, at {known.address}"
        reason = reason or disagreement(alive.terms, self.settings, f"server {alive.server}")
        if reason:
            return [Note("refused", {"server": alive.server, "reason": reason}), _refused("", peer, reason)]
        actions: list[Action] = [Send((peer,), m.Pulse())]
        if known is None:
            known = Server(alive.server, alive.address, tuple(alive.shards), peer, now)
            self.servers[alive.server] = known
            self._known[known.name] = peer
            actions.append(Note("server", {"server": alive.server, "address": alive.address}))
        known.peer, known.seen = peer, now
        known.layouts = dict(alive.layouts)
        for entry in self.layouts.values():
            if not entry.held_by(known):
                actions.append(self._new_layout(entry, (peer,)))
        actions += self._begin(now)
        if self.view is not None and alive.view < self.view.p:
            actions.append(Send((peer,), self.view))
        return actions + [action for entry in self.layouts.values() for action in self._ready(entry)]

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
        self.view = m.View(
            p=1,
            members=[(slot, self.workers[slot].incarnation) for slot in sorted(self.workers)],
            cuts=[],
            shards=[
                (number, boot, server.address) for _, server in sorted(self.servers.items()) for number, boot in server.shards
            ],
            restore=[],
            donor=min(self.workers),
            removed=[],
        )
        note = Note("view", {"p": 1, "members": self.view.members, "waited_s": round(now - self._born, 3)})
        return [note, Send(self._everybody(), self.view)]

    def _everybody(self) -> tuple[Peer, ...]:
        others: list[Worker | Server] = [*self.servers.values(), *self.workers.values()]
        return tuple(other.peer for other in others)

    # ------------------------------------------------------------ layouts

    def _member(self, slot: int, incarnation: int) -> Worker | None:
        worker = self.workers.get(slot)
        return worker if worker is not None and worker.incarnation == incarnation else None

    def _on_declare(self, peer: Peer, declare: m.Declare, payload: Sequence[Buffer], now: float) -> list[Action]:
        worker = self._member(declare.slot, declare.incarnation)
        if worker is None:
            return [Send((peer,), m.Refused("", f"worker {declare.slot} is not in this run"))]
        worker.seen = now
        settings = self.settings
        try:
            layout = Layout.from_table(
                b"".join(payload),
                num_shards=settings.num_shards,
                partition_elements=settings.layout.partition_elements,
            )
        except LayoutError as error:
            return [_refused("", peer, str(error))]
        if declare.digest != layout.digest:
            return [
                _refused(
                    "", peer, f"layout {declare.layout} has digest {declare.digest} at {worker.name} and {layout.digest} here, "
                    "from the same table; install the same release everywhere"
                )
            ]  # fmt: skip
        entry = self.layouts.get(declare.layout)
        actions: list[Action] = []
        if entry is None:
            entry = LayoutEntry(declare.layout, layout, Planner.for_layout(declare.layout, layout, settings))
            self.layouts[declare.layout] = entry
            note = {"layout": declare.layout, "digest": layout.digest, "tensors": len(layout.tensors), "keys": len(layout.keys)}
            actions += [Note("layout", note), self._new_layout(entry, tuple(server.peer for server in self.servers.values()))]
        elif difference := entry.layout.difference(layout):
            first = min(entry.declared, default=declare.slot)
            reason = (
                f"{worker.name} and worker {first} hold different models (layout {declare.layout}): {difference}; "
                f"there means worker {first}, here {worker.name}. Build the same model in the same order in every worker"
            )
            return [*self._abort(worker.name, reason, now), Send((peer,), m.Refused("", reason[: m.MAX_TEXT]))]
        entry.declared[declare.slot] = peer
        return actions + self._ready(entry)

    def _new_layout(self, entry: LayoutEntry, peers: tuple[Peer, ...]) -> Action:
        return Send(peers, m.NewLayout(entry.number, entry.layout.digest), split_frames(entry.layout.table))

    def _ready(self, entry: LayoutEntry) -> list[Action]:
        """Tell those who wait that a layout is held everywhere; they declare it until they hear so."""
        if self.view is None or set(entry.declared) != set(self.workers):
            return []
        if not all(entry.held_by(server) for server in self.servers.values()):
            return []
        return [Send(tuple(self.workers[slot].peer for slot in entry.declared), m.Ready(entry.number, entry.layout.digest))]

    # ------------------------------------------------------------ while it runs

    def _on_alive(self, peer: Peer, alive: m.Alive, _: Sequence[Buffer], now: float) -> list[Action]:
        worker = self._member(alive.slot, alive.incarnation)
        if worker is None:
            return [Send((peer,), m.Refused("", f"worker {alive.slot} is not in this run"))]
        worker.peer, worker.seen = peer, now
        worker.plans = {layout: version for layout, _, version in alive.layouts}
        actions: list[Action] = [Send((peer,), m.Pulse())]
        if alive.busy != worker.busy:
            worker.busy = alive.busy
            actions.append(Note("busy", {"slot": worker.slot, "what": worker.busy}))
        if self.view is not None and alive.view < self.view.p:
            actions.append(Send((peer,), self.view))
        return actions

    def _on_report(self, peer: Peer, report: m.Report, payload: Sequence[Buffer], now: float) -> list[Action]:
        worker, entry = self._member(report.slot, report.incarnation), self.layouts.get(report.layout)
        if worker is None or entry is None:
            return []
        worker.seen = now
        if len(payload) != 1 or memoryview(payload[0]).nbytes != 4 * len(entry.layout.tensors):
            return self._abort(worker.name, f"{worker.name} reported norms of the wrong length for layout {report.layout}", now)
        norms = np.frombuffer(memoryview(payload[0]), np.float32)
        try:
            entry.planner.report(
                report.slot, window=report.window, round_=report.round, norms=norms, rate=report.rate, loss=report.loss,
                members=sorted(self.workers),
            )  # fmt: skip
        except WireError as error:
            return self._abort(worker.name, str(error), now)
        heard: list[Action] = [Send((peer,), m.Heard(report.layout, report.window))]
        return heard + self._plan_notes(entry) + self._pending_plan(entry)

    def _on_rate(self, _peer: Peer, rate: m.Rate, _: Sequence[Buffer], now: float) -> list[Action]:
        worker, entry = self._member(rate.slot, rate.incarnation), self.layouts.get(rate.layout)
        if worker is None or entry is None:
            return []
        worker.seen = now
        entry.planner.rate(rate.slot, rate.rate, rate.round, members=sorted(self.workers))
        return self._plan_notes(entry) + self._pending_plan(entry)

    def _plan_notes(self, entry: LayoutEntry) -> list[Action]:
        return [Note("plan", event) for event in entry.planner.events()]

    def _pending_plans(self) -> list[Action]:
        return [action for entry in self.layouts.values() for action in self._pending_plan(entry)]

    def _pending_plan(self, entry: LayoutEntry) -> list[Action]:
        """Hand a plan to the server with key 0 until every member reports it."""
        pending = entry.planner.pending([worker.plans.get(entry.number, 0) for worker in self.workers.values()])
        server = self.servers.get(entry.layout.keys[0].shard // self.settings.servers.shards_per_server)
        if pending is None or server is None:
            return []
        version, plan = pending
        return [Send((server.peer,), m.NewPlan(entry.number, version), (plan,))]

    # ------------------------------------------------------------ the end

    def _on_leave(self, peer: Peer, leave: m.Leave, _: Sequence[Buffer], now: float) -> list[Action]:
        worker = self._member(leave.slot, leave.incarnation)
        if worker is None:
            return []
        worker.peer, worker.seen, worker.left = peer, now, True
        self._known[worker.name] = peer
        if leave.code or leave.error:
            return self._abort(worker.name, leave.error or f"{worker.name} ended with code {leave.code}", now)
        if len(self.workers) == self.settings.workers.count and all(other.left for other in self.workers.values()):
            return self._finish(m.Ended(), now, Note("end", {"after_s": round(now - self._born, 3)}))
        return [Note("leave", {"slot": leave.slot})]

    def _on_fault(self, _peer: Peer, fault: m.Fault, _: Sequence[Buffer], now: float) -> list[Action]:
        return self._abort(fault.culprit, f"server {fault.server}: {fault.reason}", now)

    def _on_bye(self, _peer: Peer, bye: m.Bye, _: Sequence[Buffer], now: float) -> list[Action]:
        if self.over is None:
            return []
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


def _refused(token: str, peer: Peer, reason: str) -> Send:
    return Send((peer,), m.Refused(token, reason[: m.MAX_TEXT]))

"""Who is let into a run: workers and servers come in any order, and when all are there the first view names them.

Later, too: a worker that was started again takes its slot, or one that is free; a server that was takes its number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from typing_extensions import Buffer

from ..wire import messages as m
from ..wire.actions import Action, Note, Peer, Send
from . import history
from .ending import Ending
from .history import Joined
from .roster import Server, Worker, disagreement, forgotten, refused
from .run import Run

__all__ = ["Admission"]


class Admission:
    """Lets workers and servers into a run.

    Args:
        run: The run.
        ending: Told of everybody who is to hear of the end.
    """

    def __init__(self, run: Run, ending: Ending) -> None:
        self._run = run
        self._ending = ending
        self._settings = run.settings

    def join(self, peer: Peer, join: m.Join, _: Sequence[Buffer], now: float) -> list[Action]:
        """Let a worker in, or say why not; nothing, while it is not known whether who holds its slot is dead."""
        for worker in self._run.workers.values():
            if worker.token == join.token:
                worker.peer, worker.seen, worker.lost = peer, now, math.inf
                return [Send((peer,), self._welcome(worker))]
        if self._run.ending:
            return [Send((peer,), m.Ended())]
        reason = self._refusal(join)
        slot = join.slot if join.slot >= 0 else self._free_slot()
        if not reason and slot is None:
            reason = f"the run is full: {self._places()}, and all of them are in"
        if reason:
            return [Note("refused", {"slot": join.slot, "reason": reason}), refused(join.token, peer, reason)]
        assert slot is not None
        holder = self._run.workers.get(slot)
        if holder is not None and self._is_suspect(holder, now) and not self._may_replace(holder, join):
            return []  # it is silent, and may be dead: that turns out before the joiner gives up
        if holder is not None and not self._may_replace(holder, join):
            reason = f"rank {slot} is taken by another process of this run; start each worker with its own rank"
            return [Note("refused", {"slot": join.slot, "reason": reason}), refused(join.token, peer, reason)]
        self._run.incarnations += 1
        self._run.layouts.forget(slot)
        joined = Joined(slot, self._run.incarnations, join.token, join.restart)
        worker = Worker(slot, joined.incarnation, join.token, peer, now, restart=join.restart, since=now)
        worker.synced = self._run.views.view is None
        self._run.workers[slot] = worker
        self._ending.known.add(worker.name)
        note = Note("join", {"slot": slot, "incarnation": worker.incarnation, "restart": join.restart})
        return [joined.record(), note, Send((peer,), self._welcome(worker)), *self._begin(now)]

    def _refusal(self, join: m.Join) -> str:
        places = self._settings.workers.places
        who = f"worker {join.slot}" if join.slot >= 0 else "the worker that joins"
        if reason := disagreement(join.terms, self._settings, who):
            return reason
        if join.slot >= places:
            return f"expected a worker rank of 0 to {places - 1} ({self._places()}), got {join.slot}"
        return ""

    def _places(self) -> str:
        workers = self._settings.workers
        return f"workers.maximum = {workers.maximum}" if workers.maximum else f"workers.count = {workers.count}"

    def _free_slot(self) -> int | None:
        """Return the lowest slot that nobody holds, or whose holder is out of the run for good."""
        free = (
            slot
            for slot in range(self._settings.workers.places)
            if (holder := self._run.workers.get(slot)) is None
            or self._is_out(holder)
            or self._has_left(holder)
            or (holder.gone and not self._run.is_in(holder))
        )
        return next(free, None)

    def _is_out(self, worker: Worker) -> bool:
        return self._run.views.was_removed(worker.slot, worker.incarnation)

    def _is_suspect(self, worker: Worker, now: float) -> bool:
        return bool(worker.gone) or worker.lost < now or now - worker.seen > 2 * self._settings.timeouts.heartbeat

    def _may_replace(self, holder: Worker, join: m.Join) -> bool:
        return self._is_out(holder) or bool(holder.gone) or self._has_left(holder) or join.restart > holder.restart

    def _has_left(self, worker: Worker) -> bool:
        return (worker.slot, worker.incarnation) in self._run.left

    def _welcome(self, worker: Worker) -> m.Welcome:
        return m.Welcome(worker.token, worker.slot, worker.incarnation, self._settings.terms())

    def server(self, peer: Peer, alive: m.ServerAlive, _: Sequence[Buffer], now: float) -> list[Action]:
        """Let a server in, or say why not; one that is in says at every heartbeat where it stands."""
        run = self._run
        known = run.servers.get(alive.server)
        if reason := self._objection(alive, known):
            return [Note("refused", {"server": alive.server, "reason": reason}), refused("", peer, reason)]
        actions: list[Action] = [Send((peer,), m.Pulse())]
        if known is not None and known.shards != tuple(alive.shards):
            # Where nothing has begun, nothing is lost with the one before.
            actions += self._lost_memory(alive)
            known = None
        if known is None:
            known = Server(alive.server, alive.address, tuple(alive.shards), peer, now)
            run.servers[alive.server] = known
            self._ending.known.add(known.name)
            actions.append(Note("server", {"server": alive.server, "address": alive.address}))
        elif known.gone or known.address != alive.address:
            actions.append(Note("back", {"server": alive.server, "address": alive.address, "why": ""}))
            for worker in run.members():
                worker.since = now  # they have waited for it, not for each other
        known.peer, known.seen, known.address, known.lost, known.gone = peer, now, alive.address, math.inf, ""
        known.layouts = dict(alive.layouts)
        actions += run.layouts.missing_at(known)
        actions += self._begin(now)
        view = run.views.view
        # A view that does not name it is not for it: it waits for the next.
        if view is not None and alive.view < view.p and set(alive.shards) <= {(number, boot) for number, boot, _ in view.shards}:
            actions.append(Send((peer,), view))
        return actions + run.layouts.open(run.views.members, run.servers.values())

    def _objection(self, alive: m.ServerAlive, known: Server | None) -> str:
        """Say why a server is not let in; empty where it is."""
        servers = self._settings.servers
        first = alive.server * servers.shards_per_server
        expected = list(range(first, first + servers.shards_per_server))
        if alive.server >= servers.count:
            return f"expected server numbers 0 to {servers.count - 1}, got {alive.server}"
        if [number for number, _ in alive.shards] != expected:
            return (
                f"server {alive.server} holds shards {[number for number, _ in alive.shards]}, this job expects {expected}; "
                "give it the coordinator's shards_per_server"
            )
        if known is not None and known.shards != tuple(alive.shards) and not self._is_away(known):
            return f"server number {alive.server} is taken by another process, at {known.address}"
        if alive.view > self._run.number:
            return forgotten(f"server {alive.server}", alive.view)
        return disagreement(alive.terms, self._settings, f"server {alive.server}")

    def _is_away(self, server: Server) -> bool:
        """Whether a process that claims to be this server may be the one that was started in its place."""
        return bool(server.gone) or not math.isinf(server.lost) or server.peer is None

    def _lost_memory(self, alive: m.ServerAlive) -> list[Action]:
        """Note what is lost with a server's memory: what was started in its place is not what it was, and begins anew."""
        why = alive.lost or "nothing of it was found (servers.state_directory, run.directory)"
        view, boots = self._run.view, dict(alive.shards)
        return [
            action
            for number, boot, _ in (view.shards if view is not None else [])
            if boots.get(number, boot) != boot
            for action in self._run.accounts.shard_lost(number, boot, why, successor=boots[number])
        ]

    def missing(self) -> str:
        """Say who has not come yet; empty when all are in."""
        settings = self._settings
        workers = [slot for slot in range(settings.workers.count) if slot not in self._run.workers]
        servers = [number for number in range(settings.servers.count) if number not in self._run.servers]
        return ", ".join(f"{kind} {numbers}" for kind, numbers in (("workers", workers), ("servers", servers)) if numbers)

    def _begin(self, now: float) -> list[Action]:
        """Make the first view when all are in."""
        settings, run = self._settings, self._run
        wanted = (settings.workers.count, settings.servers.count)
        if run.views.view is not None or len(run.workers) < wanted[0] or len(run.servers) < wanted[1]:
            return []
        members = {slot: worker.incarnation for slot, worker in run.workers.items()}
        view = run.views.first(members, run.shards(), run.first_rounds)
        note = Note("view", {"p": 1, "members": view.members, "waited_s": round(now - run.born, 3)})
        tell: list[Action] = [history.viewed(view, []), note, Send(run.everybody(), view)]
        return [*tell, *run.layouts.open(run.views.members, run.servers.values())]

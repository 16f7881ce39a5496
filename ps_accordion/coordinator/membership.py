"""Who should be in, from what is heard and what is not, and the view that follows from it.

A worker that dies, falls silent or is stuck costs the run a new view without it, and the others go on; one that comes back, or
another in its place, asks for a place and gets a view of its own. What cannot be survived ends the run for all, with its reason.
"""

from __future__ import annotations

import math

from ..wire import messages as m
from ..wire.actions import Action, Note, Peer, Send
from . import history
from .clocks import Progress
from .ending import Ending
from .roster import peers_of
from .run import Run

__all__ = ["LOST_BEATS", "WAITING_NOTE_S", "Membership"]

WAITING_NOTE_S = 10.0
"""How often the log says whom it still waits for."""
LOST_BEATS = 1.5
"""Heartbeats that a process whose connection broke may take to be heard again. One that lives connects anew within 0.05 s."""


class Membership:
    """Keeps the view as it should be.

    Args:
        run: What is known of the run.
        ending: How it ends where nobody can go on.
        progress: The clock of training.
    """

    def __init__(self, run: Run, ending: Ending, progress: Progress) -> None:
        self._run = run
        self._ending = ending
        self._progress = progress
        self._noted = -math.inf
        self._short_since = math.inf

    def tick(self, now: float) -> list[Action]:
        """Look who is there, and make the next view if the last one is not as it should be."""
        return self._look(now) + self._next(now)

    @property
    def _waits_for_servers(self) -> bool:
        """Whether a server is away: then nobody can get further, and it is no worker's fault."""
        return any(server.gone for server in self._run.servers.values())

    def _look(self, now: float) -> list[Action]:
        """Note who is taken for dead, and who is not any more."""
        run, notes = self._run, list[Action]()
        limits = run.settings.timeouts
        stuck = [] if self._waits_for_servers else self._progress.stuck(run.members(), now)
        for worker in list(run.workers.values()):
            silent = now - worker.seen
            if silent > limits.dead:
                gone = f"has been silent for {limits.dead:g} s"
            elif now - worker.lost > LOST_BEATS * limits.heartbeat:
                gone = "has closed its connection"
            elif now - worker.asked > limits.dead:
                gone = f"has not answered for {limits.dead:g} s, though a shard has to be restored"
            elif cut := [self._run.servers[number].name for number, since in worker.cut.items() if now - since > limits.stuck]:
                gone = f"has had no connection to {', '.join(cut)} for {limits.stuck:g} s, which lives"
            elif worker in stuck:
                gone = (
                    f"computes for more than {self._progress.limit(worker):.0f} s while others wait; session.busy() allows that"
                )
            else:
                gone = ""
            if worker.left or bool(gone) == bool(worker.gone):
                continue
            worker.gone = gone
            if run.is_in(worker):
                notes.append(
                    Note("gone" if gone else "back", {"slot": worker.slot, "incarnation": worker.incarnation, "why": gone})
                )
        return notes

    def _wanted(self) -> dict[int, int]:
        """Return who should be in: those who are and live, and who is ready, as long as somebody can hand out the state.

        Who has no connection to a server is not let in: the others would wait for it until it is taken out again.
        """
        run = self._run
        kept = [worker for worker in run.members() if not worker.gone and not worker.left]
        ready = [each for each in run.workers.values() if each.ready and not each.cut]
        new = [each for each in ready if not (each.gone or each.left or run.was_in(each))]
        if not any(worker.synced for worker in kept):
            new = []
        return {worker.slot: worker.incarnation for worker in (*kept, *new)}

    def _next(self, now: float) -> list[Action]:
        """Make the next view, if the last one is not as it should be."""
        run, views = self._run, self._run.views
        if run.ending:
            return self._ending.all_left(now)
        if any(worker.peer is None and not (worker.gone or worker.left) for worker in run.members()):
            return []  # known from the log only: whether it lives, and has the state, is not known yet
        wanted = self._wanted()
        if not self._waits_for_servers and (reason := self._progress.deadlock(run.members(), now)):
            return self._ending.abort("coordinator", reason, now)
        moved = views.proposal is None and views.view is not None and views.view.shards != run.shards()
        if wanted == views.aim and not moved:
            enough = self._enough(now)
            # All may have promised while somebody was taken for dead who is heard again: then nobody will say so once more.
            return enough + ((self._freeze(now) or self._commit(now)) if views.proposal is not None else [])
        gone = [worker.name for worker in run.members() if worker.gone or worker.left]
        # Not only those that nobody has replaced: who was killed and started again may be none of them, and has not finished.
        if all(who in run.left for who in views.members.items()):
            return self._ending.all_left(now)
        if not any(worker.synced and wanted.get(worker.slot) == worker.incarnation for worker in run.members()):
            return self._wait_for_more("nobody else has the model's state", gone, now)
        if self._is_starting(wanted):
            who = ", ".join(gone)
            return self._ending.abort(gone[0], f"{who} is gone before all had the parameters that training starts from", now)
        if len(wanted) < run.settings.workers.minimum:
            return self._wait_for_more(f"workers.minimum is {run.settings.workers.minimum}", gone, now)
        enough = self._enough(now)
        proposal = views.propose(wanted)
        note = Note("proposal", {"p": proposal.p, "members": sorted(wanted.items())})
        return [*enough, history.proposed(proposal.p, wanted), note, *self._freeze(now)]

    def _is_starting(self, wanted: dict[int, int]) -> bool:
        """Whether the donor of the first parameters of some model is gone while somebody still fetches them from it."""
        assert self._run.view is not None
        members = self._run.members()
        donor = next((worker for worker in members if worker.slot == self._run.view.donor), None)
        if donor is None or donor.slot in wanted or all(worker.synced for worker in members if worker.slot in wanted):
            return False
        return any(not any(worker.rounds.get(layout) for worker in members) for layout in self._run.layouts.entries)

    def _wait_for_more(self, why: str, gone: list[str], now: float) -> list[Action]:
        """Let the rounds stand still until somebody comes, or comes back; those that are gone stay in the view.

        Who is taken for gone because it has not answered is asked on: its link may have been cut.
        """
        return self._still_waiting(why, gone, now) + (self._freeze(now) if self._run.views.proposal is not None else [])

    def _still_waiting(self, why: str, gone: list[str], now: float) -> list[Action]:
        limits = self._run.settings.timeouts
        if math.isinf(self._short_since):
            self._short_since, self._noted = now, -math.inf
        since = now - self._short_since
        missing = ", ".join(gone) or "all workers that have trained"
        if since > limits.join:
            reason = f"{missing} gone for {since:.0f} s, and {why}"
            return self._ending.abort(gone[0] if gone else "coordinator", reason, now)
        if now - self._noted > WAITING_NOTE_S:
            self._noted = now
            return [Note("waiting", {"missing": f"{missing} ({why})", "since_s": round(since)})]
        return []

    def _enough(self, now: float) -> list[Action]:
        """Note that the rounds go on, where they have stood still."""
        since, self._short_since = self._short_since, math.inf
        return [] if math.isinf(since) else [Note("resumed", {"after_s": round(now - since, 3)})]

    def _freeze(self, now: float) -> list[Action]:
        """Ask the shards that have not promised yet, and workers where a shard is blank."""
        run = self._run
        assert run.views.proposal is not None
        per_server = run.settings.servers.shards_per_server
        servers = sorted({number // per_server for number in run.views.missing(run.shards())})
        workers = [worker for worker in run.members() if worker.slot in run.views.missing_workers(run.shards())]
        for worker in workers:
            worker.asked = min(worker.asked, now)
        peers = peers_of([*(run.servers[number] for number in servers), *workers])
        return [Send(peers, m.Freeze(run.views.proposal.p))] if peers else []

    def left(self, peer: Peer, leave: m.Leave, now: float) -> list[Action]:
        """Let a worker go that has handed over its residuals while the others go on; the next view is without it.

        It hears so once the log has it, and its account is here: nothing is missing then if it is never heard again.
        """
        run, who = self._run, (leave.slot, leave.incarnation)
        worker = run.member(*who)
        if worker is not None:
            worker.peer, worker.seen = peer, now
        elif not run.views.was_removed(*who):
            return []
        if not run.accounts.is_final(leave.incarnation):
            return []
        answer = Send((peer,), leave)
        if who in run.left:
            return [answer]
        flushed = dict(leave.flushed)
        if run.views.took_back(*who, flushed):
            return [answer]  # it was taken out before that round counted: what was said of it then holds
        run.left[who] = flushed
        if flushed or not run.views.was_removed(*who):
            run.accounts.settled(leave.incarnation)  # else it had finished when it was taken out, with its residuals
        actions: list[Action] = [
            history.left(*who, flushed),
            Note("leave", {"slot": leave.slot, "incarnation": leave.incarnation, "early": True, "flushed": leave.flushed}),
            answer,
        ]
        if worker is not None:
            worker.left, worker.gone = True, ""
            self._ending.known.discard(worker.name)  # it will not be there to say goodbye at the end
            actions += self._next(now)
        return actions

    def frozen(self, report: m.Frozen, now: float) -> list[Action]:
        """Take in a shard's promise; make the view with the last one."""
        self._run.views.promised(report)
        return self._commit(now)

    def promised(self, promise: m.Promise, now: float) -> list[Action]:
        """Take in a worker's promise; make the view with the last one."""
        worker = self._run.member(promise.slot, promise.incarnation)
        if worker is not None:
            worker.asked = math.inf
        self._run.views.worker_promised(promise)
        return self._commit(now)

    def _commit(self, now: float) -> list[Action]:
        run, views = self._run, self._run.views
        proposal, shards = views.proposal, run.shards()
        if proposal is None or views.missing(shards) or views.missing_workers(shards) or run.ending:
            return []
        kept = [worker for worker in run.members() if proposal.members.get(worker.slot) == worker.incarnation]
        if proposal.members != self._wanted() or not kept:
            return []  # somebody has come or gone meanwhile: the next look makes a proposal that knows
        if layouts := views.unrestorable(shards, run.layouts.opened, run.first_rounds):
            numbers = ", ".join(str(number) for number, _ in views.blank(shards))
            reason = f"shard {numbers} has lost its memory, and nobody has the last results of layout {layouts[0]}"
            return self._ending.abort("coordinator", f"{reason}, by which it could go on", now)
        before = views.members
        donor = min(kept, key=lambda worker: (not worker.synced, worker.slot)).slot
        view = views.commit(run.shards(), donor=donor, layouts=run.layouts.opened)
        removed = sorted(slot for slot, incarnation in before.items() if proposal.members.get(slot) != incarnation)
        new = sorted(slot for slot, incarnation in proposal.members.items() if before.get(slot) != incarnation)
        for worker in run.members():
            worker.since, worker.asked = now, math.inf
            worker.ready = False
        notes: list[Action] = []
        for layout, cut, _epoch in view.cuts:
            if new:  # whoever comes has other statistics, or none: all tensors are light until the next check
                run.layouts.entries[layout].planner.rejoined(sorted(proposal.members), cut)
                notes += run.layouts.plans(run.layouts.entries[layout], run.members(), run.servers)
        restore = [number for number, _ in view.restore]
        fields = {
            "p": view.p,
            "restore": restore,
            "members": view.members,
            "cuts": view.cuts,
            "removed": removed,
            "new": new,
            "donor": donor,
        }
        lost = self._lost({slot: before[slot] for slot in removed})
        told: list[Action] = [*lost, history.viewed(view, views.removed), Note("view", fields), Send(run.everybody(), view)]
        return [*told, *notes, *run.layouts.open(views.members, run.servers.values())]

    def _lost(self, removed: dict[int, int]) -> list[Action]:
        """Itemise the residuals that are not in the run any more, after a view.

        Args:
            removed: Slot and incarnation of who is not in it, and was in the one before.
        """
        run, actions = self._run, list[Action]()
        for slot, incarnation in removed.items():
            if (slot, incarnation) not in run.left:
                out = run.member(slot, incarnation)
                why = "another has taken its place" if out is None else out.gone
                actions += run.accounts.gone(slot, incarnation, why)
        for who, flushed in list(run.left.items()):
            if run.views.took_back(*who, flushed):
                del run.left[who]
                actions += run.accounts.gone(*who, "the round with what it handed over is made again, because a shard lost it")
        return actions

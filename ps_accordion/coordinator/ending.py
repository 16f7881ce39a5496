"""How a run ends: everybody is told until all know, well or because of somebody; the first reason is the one that counts."""

from __future__ import annotations

import math

from ..errors import LedgerError, RunAborted
from ..wire import messages as m
from ..wire.actions import Action, Note, Send, Stop
from . import history
from .history import History
from .run import Run

__all__ = ["Ending"]


class Ending:
    """The end of a run.

    Args:
        run: What is known of it.
        past: What earlier coordinators of the run have logged.
        now: The time.

    Attributes:
        over: What everybody is told; None while the run goes on.
        known: Names of those that have joined and have not said goodbye, nor left the others.
    """

    def __init__(self, run: Run, past: History, now: float) -> None:
        self._run = run
        self.over = past.over
        workers = [worker for worker in run.workers.values() if (worker.slot, worker.incarnation) not in run.left]
        self.known = {worker.name for worker in workers} | {server.name for server in run.servers.values()}
        self._stop_at = math.inf
        if self.over is not None:
            # Whoever has heard it is gone; the others have the same time to ask as if it were said now.
            self._stop_at = now + run.settings.timeouts.grace
            self.known |= {f"server {number}" for number in range(run.settings.servers.count)}

    def abort(self, culprit: str, reason: str, now: float) -> list[Action]:
        """End the run for all because of `culprit`."""
        note = Note("error", {"culprit": culprit, "reason": reason})
        return self._finish(m.Abort(culprit[:64], reason[: m.MAX_TEXT]), now, note)

    def all_left(self, now: float) -> list[Action]:
        """End the run when nobody is left in it. Who is gone may come back, as long as rounds go on."""
        # No view will tell the others where a server is that has moved. All they lack is its word that all have finished.
        run = self._run
        moved = run.ending and run.view is not None and run.view.shards != run.shards()
        if not moved and not all(self._has_left(slot, incarnation) for slot, incarnation in run.views.members.items()):
            return []
        return self._finish(m.Ended(), now, Note("end", {"after_s": round(now - self._run.born, 3)}))

    def _has_left(self, slot: int, incarnation: int) -> bool:
        worker = self._run.member(slot, incarnation)
        if self._run.ending:
            return worker is None or worker.left or bool(worker.gone)
        return (slot, incarnation) in self._run.left or (worker is not None and worker.left)

    def _finish(self, over: m.Ended | m.Abort, now: float, note: Note) -> list[Action]:
        self.over = over
        self._stop_at = now + self._run.settings.timeouts.grace
        return [history.over(over), note, Send(self._run.everybody(), over)]

    def bye(self, name: str, now: float) -> list[Action]:
        """Note that somebody knows; a worker may, once the rounds of some have ended."""
        if self.over is None:
            told = [worker for worker in self._run.workers.values() if self._run.ending and worker.name == name]
            for worker in told:
                worker.left = True
                self.known.discard(name)  # It says so once, and is gone.
            return self.all_left(now) if told else []
        self.known.discard(name)
        return [] if self.known else self._stop()

    def tick(self, now: float) -> list[Action]:
        """Stop when all know, or have had the time to."""
        return self._stop() if now >= self._stop_at or not self.known else []

    def _stop(self) -> list[Action]:
        """Balance the ledger, of what everybody has said before goodbye."""
        run, ended = self._run, isinstance(self.over, m.Ended)
        verdict = run.accounts.verdict(run.views.members, range(run.settings.num_shards), ended=ended)
        notes: list[Action] = [] if verdict is None else [Note("ledger", verdict.fields)]
        if isinstance(self.over, m.Abort):
            return [*notes, Stop(RunAborted.exit_code, self.over.culprit, self.over.reason)]
        if verdict is not None and verdict.wrong:
            return [*notes, Stop(LedgerError.exit_code, "coordinator", str(verdict))]
        return [*notes, Stop(0)]

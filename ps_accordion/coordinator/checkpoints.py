"""Checkpoints at the coordinator: it collects what workers and shards have written, and says when one is complete.

    workers stop at a step, write, and say so ──all have──> shards are asked to write ──all have──> due ──on the disk──> kept

Nobody has pushed anything of the next round by then, so what shards and planners hold is the state behind the last one. A worker
that dies meanwhile is no member of the next view, and is not waited for. Who says it again hears the answer again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from .. import checkpoint
from ..checkpoint import LayoutAt, Manifest, Part
from ..wire import messages as m
from ..wire.actions import Action, Note, Peer, Send
from . import history
from .roster import peers_of
from .run import Run

__all__ = ["TRAINING", "Checkpoints", "Due"]

REPEAT_S = 1.0
"""How often a shard is asked again that has not answered."""
TRAINING = "training.safetensors"
"""The part that the lowest slot alone writes."""


@dataclass(frozen=True)
class Due:
    """A checkpoint of which all parts are there but the coordinator's own.

    Attributes:
        manifest: Without that part.
        planners: What is to be in it.
    """

    manifest: Manifest
    planners: bytes


class Checkpoints:
    """The checkpoint that is being made, if one is, and the answer to the last.

    Args:
        run: What the coordinator knows of the run.
        kept: The answer to the last one that an earlier coordinator completed.
    """

    def __init__(self, run: Run, kept: m.Kept | None) -> None:
        self._run = run
        self._kept = kept
        self._workers: dict[int, m.Saved] = {}
        self._shards: dict[int, m.Saved] = {}
        self._asked: float | None = None
        self._began = 0.0
        self.due: Due | None = None
        """What the loop is to put on the disk; then it calls `kept`."""

    @property
    def step(self) -> int:
        """The step of the one that is being made; -1 while none is."""
        return next((saved.step for saved in self._workers.values()), -1)

    @property
    def _attempt(self) -> int:
        return max((saved.attempt for saved in self._workers.values()), default=0)

    def _answer_to(self, saved: m.Saved) -> m.Kept | None:
        """Return what has become of a worker's part already; None where it is news, as another try after a failure is."""
        kept = self._kept
        if kept is None or saved.step > kept.step or (saved.step == kept.step and kept.error and saved.attempt > kept.attempt):
            return None
        return kept

    def saved(self, peer: Peer, saved: m.Saved, now: float) -> list[Action]:
        """Take in that a part is on the disk."""
        if not saved.shard and (kept := self._answer_to(saved)) is not None:
            return [Send((peer,), msgspec.structs.replace(kept, step=saved.step, attempt=saved.attempt))]
        if saved.shard:
            if (saved.step, saved.attempt) == (self.step, self._attempt) and self._asked is not None:
                self._shards[saved.number] = saved
        elif self._run.views.members.get(saved.number) == saved.incarnation:
            if not self._workers:
                self._began = now
            self._workers[saved.number] = saved
        if saved.error:
            return self._give_up(saved.error)
        return self._go_on(now)

    def tick(self, now: float) -> list[Action]:
        """Look whether the view has changed, and ask shards again."""
        members = self._run.views.members
        self._workers = {slot: saved for slot, saved in self._workers.items() if members.get(slot) == saved.incarnation}
        if self._asked is not None and now - self._asked > REPEAT_S:
            self._asked = None
        return self._go_on(now) if self._workers else []

    def waits(self, slot: int, rounds: Mapping[int, int], layouts: Iterable[int]) -> list[Action]:
        """Take in that a worker has pushed all of a round of each of these layouts.

        The others cannot be in it, if they stand at a checkpoint.
        """
        if not self._workers or slot in self._workers:
            return []
        stand = {number: round_ for number, round_, _ in next(iter(self._workers.values())).layouts}
        layout = next((each for each in layouts if each in stand and rounds.get(each, -1) >= stand[each]), None)
        if layout is None:
            return []
        return self._give_up(
            f"worker {slot} waits in round {rounds[layout]}, which the others have not begun: it waits in join(), is leaving, "
            "or has none to make at this step; a checkpoint is made where all workers stand between the same two steps"
        )

    def _go_on(self, now: float) -> list[Action]:
        if len({saved.step for saved in self._workers.values()}) > 1:
            steps = ", ".join(f"worker {slot} at {saved.step}" for slot, saved in sorted(self._workers.items()))
            return self._give_up(f"the workers are at different steps: {steps}; call session.checkpoint() at the same in each")
        if self._workers and (lacking := checkpoint.lacking(self._run.views.members, self._run.settings.workers.count)):
            return self._give_up(lacking)
        if self.due is not None or not self._workers or set(self._workers) != set(self._run.views.members):
            return []
        first = self._workers[min(self._workers)]
        if any(saved.layouts != first.layouts for saved in self._workers.values()):
            return self._give_up("the workers stand in different rounds")
        if not any(file == TRAINING for saved in self._workers.values() for file, *_ in saved.parts):
            return self._give_up("the worker that was to write the parameters is gone")
        missing = {number for number, *_ in self._run.shards()} - self._shards.keys()
        if missing:
            if self._asked is not None:
                return []
            self._asked = now
            pending: list[Action] = []
            for entry in self._run.layouts.entries.values():  # so that the shard with key 0 writes the newest plan, too
                pending += self._run.layouts.pending(entry, self._run.members(), self._run.servers)
            return [*pending, Send(peers_of(self._run.servers.values()), m.Save(first.step, first.layouts, self._attempt))]
        self.due = self._made(first)
        return []

    def _made(self, first: m.Saved) -> Due:
        entries = self._run.layouts.entries
        layouts = [LayoutAt(number, round_, bytes(entries[number].layout.table)) for number, round_, _ in first.layouts]
        said = [*self._workers.values(), *self._shards.values()]
        parts = {file: Part(file, nbytes, digest) for saved in said for file, nbytes, digest in saved.parts}
        planners = {number: entry.planner.state() for number, entry in entries.items()}
        manifest = Manifest(first.step, self._run.settings.terms(), layouts, sorted(parts.values(), key=lambda part: part.file))
        return Due(manifest, msgspec.msgpack.encode(planners))

    def kept(self, path: str, nbytes: int, error: str, now: float) -> list[Action]:
        """Take in what has become of the one that was due; tell the workers."""
        if error:
            return self._give_up(error)
        kept = m.Kept(self.step, path, nbytes, attempt=self._attempt)
        fields: dict[str, Any] = {"step": kept.step, "path": path, "nbytes": nbytes, "seconds": round(now - self._began, 3)}
        return [history.kept(kept), Note("checkpoint", fields), *self._tell(kept)]

    def _give_up(self, error: str) -> list[Action]:
        step = max((saved.step for saved in self._workers.values()), default=-1)
        if step < 0:
            return []
        kept = m.Kept(step, "", 0, error[: m.MAX_TEXT], self._attempt)
        return [Note("no checkpoint", {"step": step, "reason": error}), *self._tell(kept)]

    def _tell(self, kept: m.Kept) -> list[Action]:
        actions: list[Action] = []
        for slot, saved in self._workers.items():
            worker = self._run.member(slot, saved.incarnation)
            if worker is not None and worker.peer is not None:
                actions.append(Send((worker.peer,), msgspec.structs.replace(kept, step=saved.step, attempt=saved.attempt)))
        self._kept, self._workers, self._shards, self._asked, self.due = kept, {}, {}, None, None
        return actions

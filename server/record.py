"""What a shard keeps of one key: the record that outlives a round, and the pushes of the round that is open."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ps_accordion.codecs.base import Changes, Coding, FloatVector, Hint, Payload
from ps_accordion.layout import Key
from ps_accordion.ledger import NO_TALLY, Tally
from ps_accordion.wire import messages as m
from ps_accordion.wire.actions import Peer

__all__ = ["NO_CODING", "Finished", "Held", "KeyRecord", "Outcome"]


class Finished(NamedTuple):
    """The result of a finished round, as it was sent and is sent again to who lost it."""

    message: m.Result
    frames: tuple[memoryview, ...]


class Held(NamedTuple):
    """One member's push of the open round. The shard owns `payload` until the round is finished."""

    peer: Peer
    message: m.Push
    payload: Payload | None


NO_CODING = Coding("", 0.0, 0, 0, 0)
"""What the header of a result without a payload says of it."""


class Outcome(NamedTuple):
    """What a finished round comes to.

    Attributes:
        kind: Of the result.
        used: Bit i is set when some member had a gradient for slice i.
        coding: Of the payload.
        frames: The payload.
        before: The half from which the fold started.
        after: The half that it left.
        bound: Size of the reply's bound in bytes, or the last one's where there is no payload.
        lost: Norm of what a switch of level threw away of the residual.
        tally: The key's account with this round in it.
    """

    kind: m.ResultKind
    used: int
    coding: Coding
    frames: tuple[memoryview, ...]
    before: int
    after: int
    bound: int
    lost: float
    tally: Tally


@dataclass
class KeyRecord:
    """A key between rounds.

    The residual is double-buffered: a fold reads one half and writes the other, so the half that it read is the undo.

    Attributes:
        key: The key.
        round: Last finished round; -1 before the first.
        epoch: View under which it was finished.
        memory: Where the halves lie once they are written, two times float32[elements]; None makes new arrays.
        halves: Two residuals, float32[elements] in mean-gradient units; None is zero, whatever lies in its memory.
        before: The half from which the last fold started.
        after: The half that it left; equal to `before` where it wrote nothing.
        result: What was answered; None where there is nothing to repeat.
        plan: Version of the last plan that this key's results have carried.
        plan_before: The same before the last finished round: a view that undoes the round takes the plan back too.
        bound: Size of the last reply's bound in bytes: a larger one means that compression has turned lighter.
        bound_before: The same before the last finished round.
        tally: What was pushed and answered up to the last finished round (`ledger.py`).
        tally_before: The same before that round.
        current: Slots whose worker has the state after the last finished round: who trained in it, or came together in a JOIN.
            None means all, before the first round.
        current_before: The same before the last finished round.
        open: Pushes of round `round + 1`, by slot.
        lent: Memory of results by round, where workers read it from here: held as long as they may.
        hint: What makes the next fold faster; forgotten with the process.
        changes: What the last fold changed, and the half that it left: the other half is the same but for that. None where it
            is not known; forgotten with the process, and as soon as anybody asks for a half to write.
    """

    key: Key
    memory: tuple[FloatVector, FloatVector] | None = None
    round: int = -1
    epoch: int = -1
    halves: list[FloatVector | None] = field(default_factory=lambda: [None, None])
    before: int = 0
    after: int = 0
    result: Finished | None = None
    plan: int = 0
    plan_before: int = 0
    bound: int = 0
    bound_before: int = 0
    tally: Tally = NO_TALLY
    tally_before: Tally = NO_TALLY
    current: frozenset[int] | None = None
    current_before: frozenset[int] | None = None
    open: dict[int, Held] = field(default_factory=dict)
    lent: dict[int, Payload] = field(default_factory=dict)
    hint: Hint = field(default_factory=Hint)
    changes: tuple[int, Changes] | None = None
    norm: float = 0.0
    """About the L2 norm of the residual as it was within the last rounds, for people; not kept."""

    def start(self, *, skipped: bool) -> int:
        """Return the half from which the next fold starts: the last round's own start if that round was skipped."""
        return self.before if skipped else self.after

    def residual(self) -> FloatVector:
        """Return the residual that the last finished round left, float32[elements], to read only."""
        half = self.halves[self.after]
        return half if half is not None else np.zeros(self.key.elements, np.float32)

    def changed(self, start: int) -> Changes | None:
        """Return what the half from which a fold starts has that its target has not; None where that is not known."""
        return self.changes[1] if self.changes is not None and self.changes[0] == start else None

    def target(self, start: int) -> FloatVector:
        """Return the half that a fold from `start` writes, float32[elements]."""
        self.changes = None
        half = self.halves[1 - start]
        if half is None:
            room = np.zeros(self.key.elements, np.float32) if self.memory is None else self.memory[1 - start]
            half = self.halves[1 - start] = room
        return half

    def finish(self, finished: Finished, outcome: Outcome, current: frozenset[int], *, skipped: bool) -> None:
        """Mark the open round finished. Only then may its result leave."""
        self.round, self.epoch = finished.message.round, finished.message.epoch
        self.bound_before = self.bound_before if skipped else self.bound
        self.bound = outcome.bound
        self.tally_before = self.tally_before if skipped else self.tally
        self.tally = outcome.tally
        self.before, self.after = outcome.before, outcome.after
        self.current_before, self.current = self.current, current
        self.result = finished
        self.open = {}

    def let_go(self) -> None:
        """Lend the result of no round but the last finished one: all members have pushed for the next.

        So each has decided the last one, and has no use for those before. The last one's it may have to give to a blank shard.
        """
        self.lent = {round_: memory for round_, memory in self.lent.items() if round_ == self.round}

    def restore(self, finished: Finished, *, bound: int, version: int, again: KeyRecord | None = None) -> None:
        """Go on after a round that a former self of the shard has finished.

        Args:
            finished: Its result, from a worker.
            bound: Size of its bound in bytes.
            version: Of the plan in force after it.
            again: The record that a replay came to; its residuals are copied. None: nothing is left of them.
        """
        self.round, self.epoch, self.result = finished.message.round, finished.message.epoch, finished
        again = again or KeyRecord(self.key, bound=bound, bound_before=bound)
        self.halves, self.changes = [None, None], None
        for place, half in enumerate(again.halves):
            if half is not None:
                self.target(1 - place)[:] = half
        self.before, self.after = again.before, again.after
        self.bound, self.bound_before = again.bound, again.bound_before
        self.tally, self.tally_before = again.tally, again.tally_before
        self.plan = self.plan_before = version
        self.open = {}
        self.current = self.current_before = frozenset([finished.message.lead])  # of those that have the state, one is known

    def admit(self, members: Collection[int], new: set[int], *, donor: int) -> None:
        """Note that a view has changed the members: who is new takes over the donor's state before it pushes."""
        if self.current is not None:
            has_state = self.current - new
            self.current = frozenset(slot for slot in has_state | (new if donor in has_state else set()) if slot in members)

    def undo(self, cut: int, previous_epoch: int) -> None:
        """Take back round `cut`, if it is finished: a view says that it does not count."""
        if self.round < cut:
            return
        assert self.round == cut, f"key {self.key.number}: a view may undo one round, not {self.round - cut + 1}"
        self.round, self.epoch = cut - 1, previous_epoch
        self.after, self.plan, self.bound = self.before, self.plan_before, self.bound_before
        self.tally = self.tally_before
        self.current = self.current_before
        self.result = None
        self.open = {}  # they were for the round after this one

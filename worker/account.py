"""A worker's account of one key: what its gradients came to, what of that was pushed, and what it took back (`ledger.py`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ps_accordion.codecs.base import Codec, Coding, FloatVector, Payload
from ps_accordion.layout import Key, Slice
from ps_accordion.ledger import LOOK_EVERY, NO_TALLY, NOTHING, SILENCE, Probe, Tally

__all__ = ["Account"]


class Account:
    """The sums of one key. All calls come from the thread that owns the key, but for those that look at the end.

    Args:
        layout: Number of the layout.
        key: The key.

    Attributes:
        tally: Gradients, pushes that count, what was thrown away.
        applied: Results that count. A number of its own, because it is the socket's thread that decides rounds.
        norm: L2 norm of the whole residual as it was within the last rounds, from the elements that are watched.
    """

    def __init__(self, layout: int, key: Key) -> None:
        self.probe = Probe(layout, key)
        self.tally = NO_TALLY
        self.applied = 0.0
        self.norm = 0.0
        self._seen = 0.0
        self._rounds = 0
        self._result = 0.0
        self._went, self._counted = NOTHING, NOTHING

    @property
    def due(self) -> bool:
        """Whether the next push wants to see the residual that it leaves."""
        return self._rounds % LOOK_EVERY == 0

    def mass(self, vector: FloatVector | None) -> float:
        """Return m(v) of float32[key.elements]; None is zero."""
        return self.probe.vector(vector).mass

    def pushed(
        self,
        codec: Codec,
        payload: Payload,
        coding: Coding,
        gradient: FloatVector | None,
        unused: Sequence[Slice] = (),
        before: FloatVector | None = None,
        residual: FloatVector | None = None,
        thrown: float = 0.0,
    ) -> None:
        """Note a push of kind DATA.

        Args:
            codec: Decodes the payload.
            payload: What is sent.
            coding: What its header says.
            gradient: float32[key.elements], what it was made from.
            unused: Slices of it that do not count.
            before: The residual that went with it, where the level is noisy; None is zero.
            residual: What it left behind; looked at only where that is `due`.
            thrown: Mass that a switch of level threw away before.
        """
        if self.due:
            self.norm = self.probe.norm(residual)
            self._seen = self.norm * math.sqrt(self.probe.share)
        self._rounds += 1
        if not self.probe.counts:
            return
        came, went = self.probe.vector(gradient, unused), self.probe.payload(codec, payload, coding)
        noise = SILENCE
        if gradient is not None and codec.noisy(coding.level):
            encoded = self.probe.cut(gradient, unused) + self.probe.cut(before, unused)
            noise = self.probe.noise(codec, payload, coding, encoded)
        self._went = went
        norms = (came.norm, went.norm, self._seen)
        self.tally = self.tally.plus(came=came.mass, went=went.mass, lost=thrown, norms=norms, noise=noise)

    def taken_back(self, codec: Codec, payload: Payload, coding: Coding) -> None:
        """Note that a push does not count, and is in the residual again."""
        went = self.probe.payload(codec, payload, coding)
        self.tally = self.tally.plus(went=-went.mass, norms=(went.norm, self._seen))

    def replaced(self, before: FloatVector | None, after: FloatVector) -> None:
        """Note that a residual of another time takes the place of this one's: what it has more, came with it."""
        found = self.probe.vector(after)
        self._seen = found.norm
        self.tally = self.tally.plus(came=found.mass - self.mass(before))

    def result(self, codec: Codec, payload: Payload, coding: Coding) -> None:
        """Note a result of the open round, in the place of one that a view has taken back."""
        self._result = self.probe.payload(codec, payload, coding).mass

    def decided(self, *, counted: bool, applied: bool, out: bool = False) -> None:
        """Note that the open round is decided.

        Args:
            counted: Whether its pushes count.
            applied: Whether its results do, too: where nobody has a gradient, what is handed over stays in the residual there.
            out: Whether it is over for this worker alone, which was taken out of the run in the middle of it.
        """
        if applied:
            self.applied += self._result
        if not out:
            self._counted = self._went if counted else NOTHING
        self._result, self._went = 0.0, NOTHING

    def uncounted(self) -> float:
        """Note that the last round that was decided here has been made again without this worker; return about what is lost.

        Its push has left the residual and counts nowhere. How long it was is known of keys that are in the account.
        """
        lost, self._counted = self._counted, NOTHING
        self.tally = self.tally.plus(went=-lost.mass, lost=lost.mass)
        return lost.norm / math.sqrt(self.probe.share)

    def closed(self, residual: FloatVector | None) -> Tally:
        """Return the account with what is left in the residual, float32[key.elements]; None is zero."""
        return self.tally._replace(kept=self.mass(residual), other=self.applied)

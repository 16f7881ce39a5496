"""The loss ledger: what was pushed is applied, in a residual, or itemised as lost; nothing vanishes, nothing counts twice.

Vectors are too large to be added up for an account, and norms do not add. So of each key one *probe* is kept, a number that is
linear in the vector:

    m(v) = sum over i < L of s_i * v_(a + i)        s_i = +1 or -1, L = `WATCHED` elements or all of a smaller key

The stretch lies at a fixed pseudo-random place a, the same at workers and servers; signs follow from i alone. A push that is
dropped, doubled, or counted in a round that it was taken back from changes a sum by its own m, wherever it happens.
Of a model with many keys the first few are probed and one in `EVERY` of the others, so that the account costs a few hundredths of
a round however large the model is: what goes wrong with whole workers, rounds or shards is seen, and so is what goes wrong again
and again, but not what happens once to a key that nobody probes. The tests have few keys, so there it is every one.

    worker   gradients = pushes that count + residual + lost                                   (`Tally`, a key)
    server   mean of the pushes that count = results + residual + lost
    between  the pushes that workers count = those that servers count; the results that each worker applied = the servers'

Sums are float64, what they are sums of is rounded to float32 in every round. `slack` adds up what rounding can make of that, so a
difference is judged against the arithmetic, not against a share that somebody chose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .codecs.base import Codec, Coding, FloatVector, Payload
from .layout import Key, Slice
from .seeds import mix64

__all__ = ["NOTHING", "NO_TALLY", "WATCHED", "Probe", "Probed", "Tally", "added"]

WATCHED = 1 << 11
"""Elements of a key that are watched. Of a partition of 256 Ki that is one in 128: at 1 % a push has some 20 entries there,
and a probe takes microseconds where a pass over all elements would take as long as encoding them."""
ALWAYS, EVERY = 8, 16
"""Keys that are probed: those of the lowest numbers, and of the others one in so many."""
_PART = 1 << 15
"""A watched stretch does not cross a multiple of this, so that a sparse payload is searched in one place."""
ROUNDING = 4 * 2.0**-24
"""A round rounds an element a few times, by 2^-24 of it at most. Over all elements of a stretch these partly cancel; over rounds
they need not, so slack grows with their number."""

_SIGNS: NDArray[np.float64] = np.array([1.0 - 2.0 * (mix64(i) & 1) for i in range(WATCHED)])
_SIGNS.flags.writeable = False


class Probed(NamedTuple):
    """What a probe saw of one vector.

    Attributes:
        mass: m(v).
        norm: L2 norm of the stretch that is watched.
    """

    mass: float
    norm: float


NOTHING = Probed(0.0, 0.0)


class Probe:
    """Looks at the same stretch of every vector of one key. Stateless; any thread.

    Args:
        layout: Number of the layout.
        key: The key.
    """

    def __init__(self, layout: int, key: Key) -> None:
        self.length = min(WATCHED, key.elements)
        self.start = _place(mix64(mix64(layout) ^ key.number), key.elements, self.length)
        self.share = self.length / key.elements
        """Of the key's elements that are watched."""
        self.counts = key.number < ALWAYS or mix64(key.number) % EVERY == 0
        """Whether this key is in the account. One that is not has no mass."""

    def norm(self, vector: FloatVector | None) -> float:
        """Return about the L2 norm of a vector, float32[key.elements], of any key; None is zero."""
        if vector is None:
            return 0.0
        values = vector[self.start : self.start + self.length].astype(np.float64)
        return math.sqrt(float(values @ values) / self.share)

    def vector(self, vector: FloatVector | None, unused: Sequence[Slice] = ()) -> Probed:
        """Look at a vector, float32[key.elements], which is only read; None is zero.

        Args:
            vector: The vector.
            unused: Slices that count as zero, whatever they hold.
        """
        if vector is None or not self.counts:
            return NOTHING
        return self.stretch(vector[self.start : self.start + self.length], unused)

    def stretch(self, stretch: FloatVector, unused: Sequence[Slice] = ()) -> Probed:
        """Look at the stretch itself, float32[length], which is only read."""
        values = stretch.astype(np.float64)
        for part in unused:
            first, last = part.offset - self.start, part.offset + part.length - self.start
            values[max(0, first) : max(0, last)] = 0.0
        return Probed(float(values @ _SIGNS[: self.length]), math.sqrt(float(values @ values)))

    def payload(self, codec: Codec, payload: Payload, coding: Coding) -> Probed:
        """Look at D(payload), of which only the stretch is decoded. The payload has been validated."""
        if not self.counts:
            return NOTHING
        stretch = np.empty(self.length, np.float32)
        codec.peek(payload, coding, self.start, stretch)
        return self.stretch(stretch)


def _place(number: int, elements: int, length: int) -> int:
    """Return where a stretch begins: anywhere in one of the parts of `_PART` elements that has room for it."""
    parts = max(1, elements // _PART)
    part = number % parts
    room = min(_PART, elements - part * _PART) - length
    return part * _PART + (number >> 32) % (room + 1)


class Tally(NamedTuple):
    """One side's account of one key, or the sum over several.

    Attributes:
        came: What was to be sent: at a worker its gradients, at a server the means of the pushes.
        went: What was sent and counts: at a worker its pushes, at a server its results.
        kept: What is in the residual; looked at when the account is closed, zero before.
        lost: What a switch of level threw away.
        other: What the other side says of the same: at a worker the results that it applied, at a server the sum of all pushes.
        slack: How far sums may be apart because of rounding.
    """

    came: float = 0.0
    went: float = 0.0
    kept: float = 0.0
    lost: float = 0.0
    other: float = 0.0
    slack: float = 0.0

    @property
    def difference(self) -> float:
        """What is missing (or too much, if negative) on this side."""
        return self.came - self.went - self.kept - self.lost

    def plus(
        self, *, came: float = 0.0, went: float = 0.0, lost: float = 0.0, other: float = 0.0, norms: Iterable[float] = ()
    ) -> Tally:
        """Return the account after one more round.

        Args:
            came: Mass that came.
            went: Mass that went.
            lost: Mass that was thrown away.
            other: As in the account.
            norms: Of the vectors that were rounded.
        """
        slack = self.slack + ROUNDING * math.hypot(*norms)
        return Tally(self.came + came, self.went + went, self.kept, self.lost + lost, self.other + other, slack)


NO_TALLY = Tally()
"""Of a key that has had no round."""


def added(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of accounts. Slack adds up as independent errors do."""
    columns = list(zip(*tallies, strict=True)) or [(0.0,)] * 6
    came, went, kept, lost, other = (math.fsum(column) for column in columns[:5])
    return Tally(came, went, kept, lost, other, math.hypot(*columns[5]))

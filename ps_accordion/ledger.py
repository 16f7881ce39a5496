"""The loss ledger: what was pushed is applied, in a residual, or itemised as lost; nothing vanishes, nothing counts twice.

Vectors are too large to be added up for an account, and norms do not add. So of each key one *probe* is kept, a number that is
linear in the vector:

    m(v) = sum over i < L of s_i * v_(a + i)        s_i = +1 or -1, L = `WATCHED` elements or all of a smaller key

The stretch lies at a fixed pseudo-random place a, the same at workers and servers; signs follow from i alone. A push that is
dropped, doubled, or counted in a round that it was taken back from changes a sum by its own m, wherever it happens.
Of a model with many keys the first few are probed and one in `EVERY` of the others, so that the account costs a few hundredths of
a round however large the model is: what goes wrong with whole workers, rounds or shards is seen, and so is what goes wrong again
and again, but not what happens once to a key that nobody probes. The tests have few keys, so there it is every one.

    worker   gradients = pushes that count + residual + lost + noise                           (`Tally`, a key)
    server   mean of the pushes that count = results + residual + lost + noise
    between  the pushes that workers count = those that servers count; the results that each worker applied = the servers'

Noise is what a codec that rounds at random (`Codec.noisy`) adds and nobody keeps: v - D(C(v)), element by element.
That alone would make any payload fit any vector, so two things are demanded of it:

* each element was rounded to one of its two neighbours. What lies beyond them is no noise, stands in no item, and is missing;
* rounding is even: the sum of m(noise), and that of noise towards zero, are within `SURE` * spread, with
  spread^2 = sum of (distance of the neighbours / 2)^2 over all elements and rounds. By the Azuma-Hoeffding inequality, which
  holds for any vectors and any number of rounds, each fails by chance with a probability below 2 exp(-SURE^2 / 2).

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

__all__ = ["LOOK_EVERY", "NOTHING", "NO_TALLY", "SILENCE", "SURE", "WATCHED", "Noise", "Probe", "Probed", "Tally", "added"]

WATCHED = 1 << 11
"""Elements of a key that are watched. Of a partition of 512 Ki that is one in 256: at 1 % a push has some 20 entries there,
and a probe takes microseconds where a pass over all elements would take as long as encoding them."""
ALWAYS, EVERY = 8, 16
"""Keys that are probed: those of the lowest numbers, and of the others one in so many."""
_PART = 1 << 15
"""A watched stretch does not cross a multiple of this, so that a sparse payload is searched in one place."""
LOOK_EVERY = 8
"""Rounds between two looks at a residual's norm: it changes slowly, and is asked for by rounding and by people only."""
ROUNDING = 4 * 2.0**-24
"""A round rounds an element a few times, by 2^-24 of it at most. Over all elements of a stretch these partly cancel; over rounds
they need not, so slack grows with their number."""

SURE = 8.0
"""Chance exceeds so many times the spread once in 10^13 runs."""
_SPARE = 1.0 + 2.0**-10
"""Neighbours may be so much further apart: the kernels round in float32, to about 2^-16 of their distance."""

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


class Noise(NamedTuple):
    """What a probe saw of one rounding at random.

    Attributes:
        mass: m(v - D(C(v))), of what two neighbours explain.
        drift: Sum of sign(v) (v - D(C(v))): by how much it is shorter.
        spread: Root of the sum of (distance of the neighbours / 2)^2.
        cut: m of what was clipped before.
    """

    mass: float = 0.0
    drift: float = 0.0
    spread: float = 0.0
    cut: float = 0.0


SILENCE = Noise()


class Probe:
    """Looks at the same stretch of every vector of one key. Stateless; any thread.

    Args:
        layout: Number of the layout.
        key: The key.
    """

    def __init__(self, layout: int, key: Key) -> None:
        self.elements = key.elements
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
        return self.stretch(self.cut(vector, unused))

    def cut(self, vector: FloatVector | None, unused: Sequence[Slice] = ()) -> FloatVector:
        """Return a copy of the stretch of a vector, float32[length], with unused slices zero."""
        if vector is None:
            return np.zeros(self.length, np.float32)
        stretch = vector[self.start : self.start + self.length].copy()
        for part in unused:
            first, last = part.offset - self.start, part.offset + part.length - self.start
            stretch[max(0, first) : max(0, last)] = 0.0
        return stretch

    def stretch(self, stretch: FloatVector) -> Probed:
        """Look at the stretch itself, float32[length], which is only read."""
        values = stretch.astype(np.float64)
        return Probed(float(values @ _SIGNS[: self.length]), math.sqrt(float(values @ values)))

    def image(self, stretch: FloatVector) -> FloatVector:
        """Return float32[key.elements] of which only the stretch is set, and only that takes memory; of a vector far away."""
        vector = np.empty(self.elements, np.float32)
        vector[self.start : self.start + self.length] = stretch
        return vector

    def decoded(self, codec: Codec, payload: Payload, coding: Coding) -> FloatVector:
        """Return the stretch of D(payload), float32[length]; nothing else of it is decoded. The payload has been validated."""
        stretch = np.empty(self.length, np.float32)
        codec.peek(payload, coding, self.start, stretch)
        return stretch

    def payload(self, codec: Codec, payload: Payload, coding: Coding) -> Probed:
        """Look at D(payload)."""
        return self.stretch(self.decoded(codec, payload, coding)) if self.counts else NOTHING

    def noise(self, codec: Codec, payload: Payload, coding: Coding, stretch: FloatVector) -> Noise:
        """Look at what rounding at random did to the stretch, float32[length], of a vector that was encoded at a noisy level."""
        clipped = stretch.copy()
        reach = codec.rounding(payload, coding, self.start, clipped) * _SPARE
        away = clipped.astype(np.float64) - self.decoded(codec, payload, coding)
        signs = _SIGNS[: self.length]
        explained = np.clip(away, -reach, reach)
        cut = float((stretch.astype(np.float64) - clipped) @ signs)
        return Noise(float(explained @ signs), float(explained @ np.sign(clipped)), 0.5 * math.sqrt(float(reach @ reach)), cut)


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
        lost: What a switch of level threw away, or a codec cut off.
        other: What the other side says of the same: at a worker the results that it applied, at a server the sum of all pushes.
        slack: How far sums may be apart because of rounding in float32.
        noise: What rounding at random added to what came, with the sign turned.
        drift: By how much it shortened what came.
        spread: How far either is from zero in the mean, at most.
    """

    came: float = 0.0
    went: float = 0.0
    kept: float = 0.0
    lost: float = 0.0
    other: float = 0.0
    slack: float = 0.0
    noise: float = 0.0
    drift: float = 0.0
    spread: float = 0.0

    @property
    def difference(self) -> float:
        """What is missing (or too much, if negative) on this side."""
        return self.came - self.went - self.kept - self.lost - self.noise

    @property
    def even(self) -> bool:
        """Whether noise adds up to what chance and float32 explain, and does not shorten or lengthen what came."""
        return max(abs(self.noise), abs(self.drift)) <= self.chance

    @property
    def chance(self) -> float:
        """What chance and float32 explain of noise."""
        return SURE * self.spread + self.slack

    def plus(
        self,
        *,
        came: float = 0.0,
        went: float = 0.0,
        lost: float = 0.0,
        other: float = 0.0,
        norms: Iterable[float] = (),
        noise: Noise = SILENCE,
    ) -> Tally:
        """Return the account after one more round.

        Args:
            came: Mass that came.
            went: Mass that went.
            lost: Mass that was thrown away.
            other: As in the account.
            norms: Of the vectors that were rounded.
            noise: Of a rounding at random. What was cut off before is lost.
        """
        slack = self.slack + ROUNDING * math.hypot(*norms)
        return Tally(
            self.came + came,
            self.went + went,
            self.kept,
            self.lost + lost + noise.cut,
            self.other + other,
            slack,
            self.noise + noise.mass,
            self.drift + noise.drift,
            math.hypot(self.spread, noise.spread),
        )


NO_TALLY = Tally()
"""Of a key that has had no round."""


def added(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of accounts. Slack and spread add up as independent errors do."""
    columns = list(zip(*tallies, strict=True)) or [(0.0,)] * len(Tally._fields)
    sums = {name: math.fsum(column) for name, column in zip(Tally._fields, columns, strict=True)}
    return Tally(**sums)._replace(slack=math.hypot(*columns[5]), spread=math.hypot(*columns[8]))

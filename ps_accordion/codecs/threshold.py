"""threshold: every element of at least some magnitude, and where it is (Strom, Interspeech 2015).

Sent is every element with |v| >= float32(level). Everything else stays in the residual, and so does what rounding loses.
So one level serves a whole model: tensors whose gradients are large send much, others little, and what is sent follows the
training without a plan.

The number of entries is bounded by a cap, k = max(1, ceil(cap * n)): where more elements reach the threshold, the k largest are
sent, as `topk` would, ties going to the lowest index, and the others wait in the residual. The price of a level is that of the
cap; what a round takes is usually much less.

*Light* is a low threshold, *heavy* a high one. All thresholds have the same bound, so no threshold is a switch to lighter
compression from another (`codecs/switch.py`), and residuals are kept: below the cap, every element of a residual is smaller than
the threshold that left it there, and a lower threshold sends at most cap * n of them a round.

`codecs/entries.py` has the payload.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import CodecError
from . import kernels
from .base import FloatVector, Hint
from .entries import EntriesCodec
from .largest import Chosen, learn, mix_listing, room_for
from .packing import INFINITE
from .workspace import borrow

__all__ = ["CAPS", "Threshold", "bits_of"]

CAPS = (0.0, 0.25)
"""Legal caps are above the first and at most the second. With more, the bound would not be below that of half precision in every
format, and everything would go dense without anybody having asked for it."""
LEVELS = (2.0**-126, 1e9)
"""Legal levels, both ends included: normal float32 numbers, up to the largest level that a plan carries."""

KEPT = 1024
"""Pairs of length and cap whose count is remembered: it is asked for a dozen times a key and round."""


@dataclass(frozen=True)
class Threshold(EntriesCodec):
    """The elements that reach a threshold. Level: the threshold, in the unit of the gradients.

    Attributes:
        cap: The fraction of elements that is sent at most, in (0, 1/4]. A payload with more entries is refused, so that all
            members must agree.
    """

    name: ClassVar[str] = "threshold"
    cap: float = 0.125

    def __post_init__(self) -> None:
        """Refuse a cap or a number format that does not exist."""
        super().__post_init__()
        if not CAPS[0] < self.cap <= CAPS[1]:
            raise CodecError(f"threshold: expected a cap in ({CAPS[0]:g}, {CAPS[1]:g}], a fraction of elements, got {self.cap!r}")

    def check_level(self, level: float) -> None:
        """Raise `CodecError` unless `level` is among `LEVELS`."""
        if not LEVELS[0] <= level <= LEVELS[1]:
            raise CodecError(
                f"threshold: expected a level from 2^-126 to {LEVELS[1]:g} (the magnitude from which elements are sent), "
                f"got {level!r}"
            )

    def lightness(self, level: float) -> float:
        """Return the level with its sign changed: a low threshold sends more."""
        return -level

    def kept(self, elements: int, level: float) -> int:
        """Return how many of `elements` are sent at most, `max(1, ceil(cap * elements))` in float64, whatever the level."""
        self.check_level(level)
        return _capped(elements, self.cap)

    def choose(
        self, a: FloatVector, scale: np.float32, b: FloatVector | None, out: FloatVector, level: float, hint: Hint | None
    ) -> Chosen | None:
        """Set `out := a * scale + b`, and list what reaches the threshold as it goes; see `EntriesCodec.choose`.

        Where more than the cap did the last time, what is listed begins near the last of those that were sent then: else it could
        be nearly all, and take many times as long.
        """
        most, least = self.kept(out.size, level), bits_of(level)
        low = max(least, hint.threshold) if hint is not None else least
        index, words = listing = room_for(out.size)
        scratch = borrow("scratch", index.size, np.uint32)
        counts, seen = borrow("counts", kernels.choose.BINS, np.int32), borrow("seen", 2, np.int32)
        if b is None:
            kernels.vector.scaled_into(a, scale, out)
            found = kernels.choose.collect(out, low, index, words)
        else:
            found = mix_listing(a, scale, b, out, low, listing)
        if found < most and low > least:
            low = least
            found = kernels.choose.collect(out, low, index, words)
        count = kernels.choose.narrow(most, low, found, index, words, scratch, counts, seen)
        peak, smallest = seen.tolist()
        if peak >= INFINITE:  # what is not finite has the largest bits of all, and is in the list
            return None
        if hint is not None:
            if low > least or found > most:
                learn(hint, smallest, low, found, most)
            else:
                hint.threshold = hint.smallest = 0
        return Chosen(index[:count], words[:count].view(np.float32), peak)


def bits_of(level: float) -> int:
    """Return the threshold as magnitude bits."""
    return int(np.float32(level).view(np.int32))


@functools.lru_cache(maxsize=KEPT)
def _capped(elements: int, cap: float) -> int:
    return min(elements, max(1, math.ceil(cap * elements)))

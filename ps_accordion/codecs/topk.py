"""topk: the largest elements and where they are (Aji and Heafield, 2017; with feedback: Stich et al., 2018).

The k = max(1, ceil(level * n)) elements of largest magnitude, exactly, ties going to the lowest index; zeros are never sent.
Everything else stays in the residual, and so does what rounding the values loses.
`codecs/entries.py` has the payload.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import FloatVector, Hint
from .entries import EntriesCodec
from .fraction import check_fraction
from .largest import Chosen, mix

__all__ = ["TopK"]

KEPT = 1024
"""Pairs of length and level whose count is remembered: it is asked for a dozen times a key and round."""


@dataclass(frozen=True)
class TopK(EntriesCodec):
    """The largest elements. Level: the fraction that is kept, in (0, 1]."""

    name: ClassVar[str] = "topk"

    def check_level(self, level: float) -> None:
        """Raise `CodecError` unless `level` is in (0, 1]."""
        check_fraction(self.name, level)

    def kept(self, elements: int, level: float) -> int:
        """Return k: how many of `elements` are sent at most, `max(1, ceil(level * elements))` in float64."""
        return _kept(elements, level)

    def choose(
        self, a: FloatVector, scale: np.float32, b: FloatVector | None, out: FloatVector, level: float, hint: Hint | None
    ) -> Chosen | None:
        """Set `out := a * scale + b` and choose the k largest elements; see `EntriesCodec.choose`."""
        return mix(a, scale, b, out, self.kept(out.size, level), hint)


@functools.lru_cache(maxsize=KEPT)
def _kept(elements: int, level: float) -> int:
    check_fraction(TopK.name, level)
    return min(elements, max(1, math.ceil(level * elements)))

"""topk: the largest elements and where they are (Aji and Heafield, 2017; with feedback: Stich et al., 2018).

The k = max(1, ceil(level * n)) elements of largest magnitude, exactly, ties going to the lowest index; zeros are never sent.
Everything else stays in the residual, and so does what rounding the values loses.
`codecs/entries.py` has the payload.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from . import kernels, values
from .base import Changes, Coding, FloatVector, Hint, Payload, Refolded
from .entries import CHUNK, MAX_ELEMENTS, EntriesCodec, chunks_of, is_packed, positions_of
from .fraction import check_fraction
from .largest import Chosen, choose, expected, mix, room_for
from .packing import need_rest
from .workspace import borrow

__all__ = ["TopK"]

SPARSE = 8
"""Members that send more than one element in so many are summed as dense vectors: then most lines of the cache change anyway."""

NOTHING: FloatVector = np.zeros(0, np.float32)
NO_CHANGES = Changes(np.zeros(0, np.uint32), NOTHING, 0)

KEPT = 1024
"""Pairs of length and level whose count is remembered: it is asked for a dozen times a key and round."""


@dataclass(frozen=True)
class TopK(EntriesCodec):
    """The largest elements. Level: the fraction that is kept, in (0, 1]."""

    name: ClassVar[str] = "topk"
    adds_as_topk: ClassVar[bool] = True
    """Whether this very class adds entries as is done here. A subclass that does says so anew, and folds sparsely."""

    def libraries(self) -> frozenset[str]:
        """Return the modules of `kernels` that it runs; see `Codec.libraries`."""
        return super().libraries() | (set() if self.values == "packed" else {"merge"})

    def check_level(self, level: float) -> None:
        """Raise `CodecError` unless `level` is in (0, 1]."""
        check_fraction(self.name, level)

    def kept(self, elements: int, level: float) -> int:
        """Return k: how many of `elements` are sent at most, `max(1, ceil(level * elements))` in float64."""
        return _kept(self.name, elements, level)

    def choose(
        self, a: FloatVector, scale: np.float32, b: FloatVector | None, out: FloatVector, level: float, hint: Hint | None
    ) -> Chosen | None:
        """Set `out := a * scale + b` and choose the k largest elements; see `EntriesCodec.choose`."""
        return mix(a, scale, b, out, self.kept(out.size, level), hint)

    def fold(
        self,
        payloads: Sequence[Payload],
        codings: Sequence[Coding],
        weights: Sequence[np.float32],
        scale: np.float32,
        residual: FloatVector | None,
        new_residual: FloatVector | None,
        *,
        level: float,
        seed: int,
        out: Payload,
        scratch: FloatVector,
        hint: Hint | None = None,
        changes: Changes | None = None,
    ) -> Refolded | None:
        """Sum sparse payloads without a dense sum, where they are sparse enough; see `Codec.fold`."""
        need_rest(self, new_residual, level)
        assert new_residual is not None
        n, entries = new_residual.size, sum(coding.count for coding in codings)
        # Zero times a scale that is not finite is no zero, and who changes how entries are added changes this, too.
        dense = entries * SPARSE > n or n >= MAX_ELEMENTS or not np.isfinite(scale)
        dense = dense or not vars(type(self)).get("adds_as_topk", False)
        if dense or any(is_packed(payload) for payload in payloads):
            return super().fold(
                *(payloads, codings, weights, scale, residual, new_residual),
                level=level, seed=seed, out=out, scratch=scratch, hint=hint,
            )  # fmt: skip
        how = kernels.merge.COPY
        if residual is None:
            how, residual = kernels.merge.ANEW, NOTHING
        elif changes is not None:
            how = kernels.merge.UPDATE
        old = changes if how == kernels.merge.UPDATE and changes is not None else NO_CHANGES
        k = self.kept(n, level)
        places, values = np.empty(entries + 1 + k, np.uint32), np.empty(entries + 1 + k, np.float32)
        listing, low, seen = room_for(n), expected(hint), borrow("seen", 2, np.int32)
        found = kernels.merge.merge(
            *_together(payloads, codings, n), np.array(weights, np.float32), _heads(codings), scale,
            how, residual, old.places, old.values, old.split,
            borrow("total", min(n, CHUNK), np.float32), new_residual, places, values, low, *listing, seen,
        )  # fmt: skip
        touched, odd = seen.tolist()
        chosen = choose(new_residual, k, hint, low, found, listing)
        if chosen is None:
            return None
        encoded = self.write(chosen, new_residual, out)
        if odd or how == kernels.merge.ANEW:
            return Refolded(encoded, None)
        end = touched + chosen.places.size
        places[touched:end], values[touched:end] = chosen.places, self.left(chosen, new_residual)
        return Refolded(encoded, Changes(places[:end], values[:end], touched))


@functools.lru_cache(maxsize=KEPT)
def _kept(name: str, elements: int, level: float) -> int:
    check_fraction(name, level)
    return min(elements, max(1, math.ceil(level * elements)))


def _together(
    payloads: Sequence[Payload], codings: Sequence[Coding], elements: int
) -> tuple[FloatVector, NDArray[np.uint16], NDArray[np.uint16]]:
    """Return values, places and counts of all payloads, one behind another: the thread's scratch."""
    chunks, entries = chunks_of(elements, CHUNK), sum(coding.count for coding in codings)
    all_values, all_places = borrow("decoded", entries, np.float32), borrow("places", entries, np.uint16)
    all_counts = borrow("chunks", chunks * len(codings), np.uint16)
    at = 0
    for member, (payload, coding) in enumerate(zip(payloads, codings, strict=True)):
        end = at + coding.count
        values.load_into(payload, all_values[at:end])
        places, counts = positions_of(payload, elements, coding.count)
        all_places[at:end] = places
        all_counts[chunks * member : chunks * (member + 1)] = counts
        at = end
    return all_values, all_places, all_counts


def _heads(codings: Sequence[Coding]) -> NDArray[np.int32]:
    """Return the first entry of each payload where they stand one behind another."""
    return np.array(list(accumulate((coding.count for coding in codings[:-1]), initial=0)), np.int32)

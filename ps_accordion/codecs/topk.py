"""topk: the largest elements and where they are (Aji and Heafield, 2017; with feedback: Stich et al., 2018).

The k = max(1, ceil(level * n)) elements of largest magnitude, exactly, ties going to the lowest index; zeros are never sent.
Everything else stays in the residual, and so does what rounding the values to halves loses.

Payload, little-endian, with C = ceil(n / 32768) chunks:

    block   preamble and `count` values, in order of index (`codecs/values.py`)
    u16     index within its chunk, one a value, rising within a chunk
    u16     values in each chunk, C of them
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

from ..errors import CodecError, PayloadError
from . import kernels, values
from .base import Changes, Codec, Coding, Encoded, FloatVector, Hint, Payload, Refolded
from .fraction import check_fraction
from .largest import Chosen, choose, expected, mix, room_for
from .packing import ONE, need_rest
from .values import ValueFormat
from .workspace import borrow

__all__ = ["CHUNK", "TopK"]

CHUNK = 1 << 15
"""Elements that a 16-bit index reaches. A power of two, and half of what fits, so that a chunk's count fits too."""
MAX_ELEMENTS = 1 << 32
"""Indices are 32 bits wide while they are chosen."""

SPARSE = 8
"""Members that send more than one element in so many are summed as dense vectors: then most lines of the cache change anyway."""

NOTHING: FloatVector = np.zeros(0, np.float32)
NO_CHANGES = Changes(np.zeros(0, np.uint32), NOTHING, 0)

KEPT = 1024
"""Pairs of length and level whose count is remembered: it is asked for a dozen times a key and round."""


@dataclass(frozen=True)
class TopK(Codec):
    """The largest elements. Level: the fraction that is kept, in (0, 1].

    Attributes:
        values: Number format of the kept values, `fp16` (scaled by a power of two) or `fp32`.
            Encoders use it; decoders read it from the payload.
    """

    name: ClassVar[str] = "topk"
    values: ValueFormat = "fp16"

    def __post_init__(self) -> None:
        """Refuse a number format that does not exist."""
        if self.values not in ("fp16", "fp32"):
            raise CodecError(f"topk: expected values to be 'fp16' or 'fp32', got {self.values!r}")

    def check_level(self, level: float) -> None:
        """Raise `CodecError` unless `level` is in (0, 1]."""
        check_fraction(self.name, level)

    def kept(self, elements: int, level: float) -> int:
        """Return k: how many of `elements` are sent at most, `max(1, ceil(level * elements))` in float64."""
        return _kept(elements, level)

    def payload_bound(self, elements: int, level: float) -> int:
        """Return the length in bytes of a payload with k values, which is every payload unless fewer are not zero."""
        return self._length(elements, self.kept(elements, level), self.values)

    def encode(
        self,
        gradient: FloatVector,
        residual: FloatVector | None,
        *,
        level: float,
        seed: int,
        out: Payload,
        rest: FloatVector | None = None,
        hint: Hint | None = None,
    ) -> Encoded | None:
        """Encode at a worker; see `Codec.encode`."""
        need_rest(self, residual, level)
        v = borrow("v", gradient.size, np.float32) if rest is None else rest
        encoded = self._pack(gradient, ONE, residual, v, level, out, hint)
        if rest is None and residual is not None and encoded is not None:
            np.copyto(residual, v)
        return encoded

    def reencode(
        self,
        total: FloatVector,
        scale: np.float32,
        residual: FloatVector | None,
        new_residual: FloatVector | None,
        *,
        level: float,
        seed: int,
        out: Payload,
        hint: Hint | None = None,
    ) -> Encoded | None:
        """Encode at a server; see `Codec.reencode`."""
        need_rest(self, new_residual, level)
        assert new_residual is not None
        return self._pack(total, scale, residual, new_residual, level, out, hint)

    def _pack(
        self,
        a: FloatVector,
        scale: np.float32,
        b: FloatVector | None,
        v: FloatVector,
        level: float,
        out: Payload,
        hint: Hint | None,
    ) -> Encoded | None:
        """Set `v := a * scale + b`, write its largest elements to `out`, and leave in `v` what they do not carry."""
        n = v.size
        if n >= MAX_ELEMENTS:
            raise CodecError(f"topk: expected fewer than {MAX_ELEMENTS} elements, got {n}; cut the tensor into partitions")
        chosen = mix(a, scale, b, v, self.kept(n, level), hint)
        return None if chosen is None else self._write(chosen, v, out)[0]

    def _write(self, chosen: Chosen, v: FloatVector, out: Payload) -> tuple[Encoded, FloatVector]:
        """Write what was chosen of `v` to `out`, and in `v` to its places what the payload does not carry; return that, too."""
        index, sent, peak = chosen
        count, n = index.size, v.size
        lost = borrow("lost", count, np.float32)
        places_at = values.store(sent, peak, self.values, lost, out)
        counts_at = places_at + 2 * count
        end = counts_at + 2 * _chunks(n)
        kernels.sparse.locate(index, out[places_at:counts_at].view(np.uint16), out[counts_at:end].view(np.uint16))
        kernels.sparse.put(lost, index, v)
        return Encoded(end, count), lost

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
        if entries * SPARSE > n:
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
        encoded, lost = self._write(chosen, new_residual, out)
        if odd or how == kernels.merge.ANEW:
            return Refolded(encoded, None)
        end = touched + encoded.count
        places[touched:end], values[touched:end] = chosen.places, lost
        return Refolded(encoded, Changes(places[:end], values[:end], touched))

    def validate(self, payload: Payload, coding: Coding) -> None:
        """Raise `PayloadError` unless counts, places and values fit each other and the header."""
        n, count = coding.elements, coding.count
        try:
            most = self.kept(n, coding.level)
        except CodecError as error:
            raise PayloadError(str(error)) from None
        form, _ = values.read_preamble(payload)
        expected = self._length(n, count, "fp16" if form == values.FP16 else "fp32")
        if not 0 <= count <= most or payload.size != expected:
            raise PayloadError(
                f"topk: expected at most {most} of {n} entries at level {coding.level!r}, and {expected} bytes for {count}, "
                f"got {count} entries in {payload.size} bytes"
            )
        values.check(payload, form, count)
        places, counts = _positions(payload, n, count)
        if not kernels.sparse.check(places, counts, n):
            raise PayloadError(
                f"topk: expected {count} indices below {n}, rising within chunks of {CHUNK} whose counts add up; got others"
            )

    def decode(self, payload: Payload, coding: Coding, out: FloatVector) -> None:
        """Write the values to their places in `out`, and zero elsewhere."""
        places, counts = _positions(payload, coding.elements, coding.count)
        row = borrow("row", kernels.vector.ROW, np.float32)
        kernels.sparse.spread(values.load(payload, coding.count), places, counts, row, out)

    def peek(self, payload: Payload, coding: Coding, start: int, out: FloatVector) -> None:
        """Write the values of a stretch to their places in `out`, and zero elsewhere: indices rise, so it is searched for."""
        out.fill(0.0)
        places, counts = _positions(payload, coding.elements, coding.count)
        form, exponent = values.read_preamble(payload)
        codes, end = values.values_of(payload, form, coding.count), start + out.size
        for chunk in range(start // CHUNK, -(-end // CHUNK)):
            base, first = chunk * CHUNK, int(counts[:chunk].sum(dtype=np.int64))
            here = places[first : first + int(counts[chunk])]
            # In the type of the places: else all of them would be converted.
            low, high = np.searchsorted(here, np.array((max(0, start - base), min(CHUNK, end - base)), np.uint16)).tolist()
            found = codes[first + low : first + high]
            if form == values.FP16:
                found = values.decoded(found.view(np.uint16), exponent)
            out[here[low:high] + np.int64(base - start)] = found

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Add `weight` times the values at their places in `total`."""
        places, counts = _positions(payload, coding.elements, coding.count)
        kernels.sparse.add(values.load(payload, coding.count), places, counts, weight, total)

    @staticmethod
    def _length(elements: int, count: int, form: ValueFormat) -> int:
        return values.PREAMBLE + count * (values.width(form) + 2) + 2 * _chunks(elements)


@functools.lru_cache(maxsize=KEPT)
def _kept(elements: int, level: float) -> int:
    check_fraction(TopK.name, level)
    return min(elements, max(1, math.ceil(level * elements)))


def _together(
    payloads: Sequence[Payload], codings: Sequence[Coding], elements: int
) -> tuple[FloatVector, NDArray[np.uint16], NDArray[np.uint16]]:
    """Return values, places and counts of all payloads, one behind another: the thread's scratch."""
    chunks, entries = _chunks(elements), sum(coding.count for coding in codings)
    all_values, all_places = borrow("decoded", entries, np.float32), borrow("places", entries, np.uint16)
    all_counts = borrow("chunks", chunks * len(codings), np.uint16)
    at = 0
    for member, (payload, coding) in enumerate(zip(payloads, codings, strict=True)):
        end = at + coding.count
        values.load_into(payload, all_values[at:end])
        places, counts = _positions(payload, elements, coding.count)
        all_places[at:end] = places
        all_counts[chunks * member : chunks * (member + 1)] = counts
        at = end
    return all_values, all_places, all_counts


def _heads(codings: Sequence[Coding]) -> NDArray[np.int32]:
    """Return the first entry of each payload where they stand one behind another."""
    return np.array(list(accumulate((coding.count for coding in codings[:-1]), initial=0)), np.int32)


def _chunks(elements: int) -> int:
    return -(-elements // CHUNK)


def _positions(payload: Payload, elements: int, count: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Return the places and the counts of a payload whose length has been checked: they end it."""
    counts_at = payload.size - 2 * _chunks(elements)
    return payload[counts_at - 2 * count : counts_at].view(np.uint16), payload[counts_at:].view(np.uint16)

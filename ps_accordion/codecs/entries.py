"""What codecs that send single elements share: a payload of entries, each a value and its place.

Subclasses choose which elements are sent. Everything else stays in the residual, and so does what rounding the values loses.

The payload begins with the preamble of `codecs/values.py`, which says how values are written. All is little-endian.
With `fp16`, `fp32` or `int8` values, and C = ceil(n / 32768) chunks:

    block   preamble and `count` values, in order of index
    u16     index within its chunk, one a value, rising within a chunk
    u16     values in each chunk, C of them

`packed` has 16 bits for both (`kernels/packed.py`), and chunks of 4,096 elements:

    preamble
    f32     unit
    u16     entries in order of index: index within the chunk, a binary exponent and a sign
    u16     entries in each chunk, ceil(n / 4096) of them
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError, PayloadError
from . import kernels, values
from .base import Codec, Coding, Encoded, FloatVector, Hint, Payload
from .cache import goes_past
from .largest import Chosen
from .packing import ONE, joined, need_rest
from .values import FORMS, ValueFormat
from .workspace import borrow

__all__ = [
    "CHUNK",
    "MAX_ELEMENTS",
    "PACKED_AT",
    "PACKED_CHUNK",
    "EntriesCodec",
    "Packed",
    "chunk_of",
    "chunks_of",
    "is_packed",
    "length_of",
    "packed_entries",
    "positions_of",
]

CHUNK = 1 << 15
"""Elements that a 16-bit index reaches. A power of two, and half of what fits, so that a chunk's count fits too."""
PACKED_CHUNK = 1 << 12
"""Elements that a 12-bit index reaches."""
PACKED_AT = values.PREAMBLE + 4
"""Where packed entries begin: behind the unit."""
MAX_ELEMENTS = 1 << 32
"""Indices are 32 bits wide while they are chosen."""
MOST_JOINED = 1 << 30
"""Bytes of payloads that are added up at once: places in them are 32 bits wide."""


class Packed(NamedTuple):
    """A packed payload as views.

    Attributes:
        unit: What exponent 0 stands for.
        entries: uint16[count].
        counts: uint16[chunks].
    """

    unit: np.float32
    entries: NDArray[np.uint16]
    counts: NDArray[np.uint16]


_LIBRARIES: dict[ValueFormat, frozenset[str]] = {
    "fp16": frozenset({"half", "sparse"}),
    "fp32": frozenset({"sparse"}),
    "int8": frozenset({"octets", "sparse"}),
    "packed": frozenset({"codes", "packed"}),
}
"""Kernels that entries of a format take."""


@dataclass(frozen=True)
class EntriesCodec(Codec):
    """Some elements and where they are.

    Attributes:
        values: How values are written: `fp16` and `int8` with a power of two that they share, `fp32`, or `packed` with their
            places. Encoders use it; decoders read it from the payload.
    """

    values: ValueFormat = "fp16"

    def __post_init__(self) -> None:
        """Refuse a number format that does not exist."""
        if self.values not in FORMS:
            known = ", ".join(map(repr, FORMS[:-1]))
            raise CodecError(f"{self.name}: expected values to be {known} or {FORMS[-1]!r}, got {self.values!r}")

    def libraries(self) -> frozenset[str]:
        """Return the modules of `kernels` that it runs; see `Codec.libraries`."""
        return super().libraries() | {"choose"} | _LIBRARIES[self.values]

    @abstractmethod
    def kept(self, elements: int, level: float) -> int:
        """Return how many of `elements` are sent at most, 1 at least; raise `CodecError` if the level is not legal."""

    @abstractmethod
    def choose(
        self, a: FloatVector, scale: np.float32, b: FloatVector | None, out: FloatVector, level: float, hint: Hint | None
    ) -> Chosen | None:
        """Set `out := a * scale + b` and choose what is sent of it: never a zero; None if something in it is not finite.

        Args:
            a: float32[n], n from 1 to 2^32 - 1.
            scale: A factor.
            b: float32[n]; None means zero.
            out: float32[n], overwritten; may be `a` or `b`.
            level: The codec's setting.
            hint: What is known from the last time, for speed only.
        """

    def payload_bound(self, elements: int, level: float) -> int:
        """Return the length in bytes of a payload with as many entries as there may be."""
        return length_of(elements, self.kept(elements, level), self.values)

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
        """Set `v := a * scale + b`, write what is sent of it to `out`, and leave in `v` what that does not carry."""
        n = v.size
        if n >= MAX_ELEMENTS:
            raise CodecError(f"{self.name}: expected fewer than {MAX_ELEMENTS} elements, got {n}; cut the tensor into partitions")
        chosen = self.choose(a, scale, b, v, level, hint)
        return None if chosen is None else self.write(chosen, v, out)

    def write(self, chosen: Chosen, v: FloatVector, out: Payload) -> Encoded:
        """Write what was chosen of `v` to `out`, and leave in `v`, at the same places, what that does not carry."""
        if self.values == "packed":
            return _write_packed(chosen, v, out)
        index, sent, peak = chosen
        count, n = index.size, v.size
        lost = borrow("lost", count, np.float32)
        places_at = values.store(sent, peak, self.values, lost, out)
        counts_at = places_at + 2 * count
        end = counts_at + 2 * chunks_of(n, CHUNK)
        kernels.sparse.locate(index, out[places_at:counts_at].view(np.uint16), out[counts_at:end].view(np.uint16))
        kernels.sparse.put(lost, index, v)
        return Encoded(end, count)

    def left(self, chosen: Chosen, v: FloatVector) -> FloatVector:
        """Return what `write` has just left in `v` at the places of what was chosen; valid until this thread writes again.

        Whoever writes in another way says here, too, what that leaves.
        """
        return v[chosen.places] if self.values == "packed" else borrow("lost", chosen.places.size, np.float32)

    def validate(self, payload: Payload, coding: Coding) -> None:
        """Raise `PayloadError` unless counts, places and values fit each other and the header."""
        n, count = coding.elements, coding.count
        try:
            most = self.kept(n, coding.level)
        except CodecError as error:
            raise PayloadError(str(error)) from None
        form, _ = values.read_preamble(payload)
        expected = length_of(n, count, FORMS[form])
        if not 0 <= count <= most or payload.size != expected:
            raise PayloadError(
                f"{self.name}: expected at most {most} of {n} entries at level {coding.level!r}, and {expected} bytes for {count}"
                f", got {count} entries in {payload.size} bytes"
            )
        if form == values.PACKED:
            packed = packed_entries(payload, coding)
            if not kernels.codes.check(payload[values.PREAMBLE : PACKED_AT].view(np.float32)):
                raise PayloadError(f"{self.name}: expected a unit from 2^-126 to 2^120, got {packed.unit!r}")
            rising = kernels.packed.check(packed.entries, packed.counts, n)
        else:
            values.check(payload, form, count)
            rising = kernels.sparse.check(*positions_of(payload, n, count), n)
        if not rising:
            chunk = chunk_of(FORMS[form])
            raise PayloadError(
                f"{self.name}: expected {count} indices below {n}, rising within chunks of {chunk} whose counts add up; "
                "got others"
            )

    def decode(self, payload: Payload, coding: Coding, out: FloatVector) -> None:
        """Write the values to their places in `out`, and zero elsewhere."""
        if is_packed(payload):
            kernels.vector.clear(out)
            packed = packed_entries(payload, coding)
            kernels.packed.scatter(packed.entries, packed.counts, packed.unit, out)
            return
        places, counts = positions_of(payload, coding.elements, coding.count)
        row = borrow("row", kernels.vector.ROW, np.float32)
        kernels.sparse.spread(values.load(payload, coding.count), places, counts, row, goes_past(out.size), out)

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Add `weight` times the values at their places in `total`."""
        if is_packed(payload):
            packed = packed_entries(payload, coding)
            kernels.packed.add(packed.entries, packed.counts, packed.unit, weight, total)
            return
        places, counts = positions_of(payload, coding.elements, coding.count)
        kernels.sparse.add(values.load(payload, coding.count), places, counts, weight, total)

    def begin_all(
        self, payloads: Sequence[Payload], codings: Sequence[Coding], weights: Sequence[np.float32], total: FloatVector
    ) -> None:
        """Sum payloads of halves in one pass over `total`; see `Codec.begin_all`."""
        another = type(self).accumulate is not EntriesCodec.accumulate or any(payload[0] != values.FP16 for payload in payloads)
        if another or sum(payload.size for payload in payloads) >= MOST_JOINED:
            super().begin_all(payloads, codings, weights, total)
            return
        counts = [coding.count for coding in codings]
        behind = accumulate((payload.size // 2 for payload in payloads[:-1]), initial=values.PREAMBLE // 2)
        heads = np.array([*zip(behind, counts, strict=True)], np.uint32).ravel()
        room, at = borrow("decoded", sum(counts), np.float32), borrow("at", 2 * len(counts), np.int32)
        kernels.sparse.sum_halves(joined(payloads).view(np.uint16), heads, np.array(weights), room, at, total)

    def peek(self, payload: Payload, coding: Coding, start: int, out: FloatVector) -> None:
        """Write the values of a stretch to their places in `out`, and zero elsewhere: indices rise, so it is searched for."""
        out.fill(0.0)
        if is_packed(payload):
            _peek_packed(packed_entries(payload, coding), coding.elements, start, out)
            return
        places, counts = positions_of(payload, coding.elements, coding.count)
        end = start + out.size
        for chunk in range(start // CHUNK, -(-end // CHUNK)):
            base, first = chunk * CHUNK, int(counts[:chunk].sum(dtype=np.int64))
            here = places[first : first + int(counts[chunk])]
            # In the type of the places: else all of them would be converted.
            low, high = np.searchsorted(here, np.array((max(0, start - base), min(CHUNK, end - base)), np.uint16)).tolist()
            found = values.load(payload, coding.count, first + low, first + high)
            out[here[low:high] + np.int64(base - start)] = found


def chunk_of(form: ValueFormat) -> int:
    """Return the elements of a chunk in which indices are written."""
    return PACKED_CHUNK if form == "packed" else CHUNK


def length_of(elements: int, count: int, form: ValueFormat) -> int:
    """Return the length in bytes of a payload of `count` entries."""
    if form == "packed":
        return PACKED_AT + 2 * count + 2 * chunks_of(elements, PACKED_CHUNK)
    return values.block_length(form, count) + 2 * count + 2 * chunks_of(elements, CHUNK)


def chunks_of(elements: int, chunk: int) -> int:
    """Return how many chunks of a length there are."""
    return -(-elements // chunk)


def is_packed(payload: Payload) -> bool:
    """Return whether the entries of a payload that has been validated are packed."""
    return int(payload[0]) == values.PACKED


def positions_of(payload: Payload, elements: int, count: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Return the places and the counts of a payload whose length has been checked: they end it."""
    counts_at = payload.size - 2 * chunks_of(elements, CHUNK)
    return payload[counts_at - 2 * count : counts_at].view(np.uint16), payload[counts_at:].view(np.uint16)


def packed_entries(payload: Payload, coding: Coding) -> Packed:
    """Return the parts of a packed payload whose length has been checked."""
    counts_at = PACKED_AT + 2 * coding.count
    unit = payload[values.PREAMBLE : PACKED_AT].view(np.float32)[0]
    return Packed(unit, payload[PACKED_AT:counts_at].view(np.uint16), payload[counts_at:].view(np.uint16))


def _write_packed(chosen: Chosen, v: FloatVector, out: Payload) -> Encoded:
    """Write what is chosen of `v` and can be packed; take it away from `v`."""
    index, sent, peak = chosen
    unit, border = values.packed_unit(peak)
    values.write_preamble(out, values.PACKED)
    out[values.PREAMBLE : PACKED_AT].view(np.float32)[0] = unit
    room, chunks = out[PACKED_AT : PACKED_AT + 2 * index.size].view(np.uint16), chunks_of(v.size, PACKED_CHUNK)
    counts = borrow("chunked", chunks, np.uint16)
    count = int(kernels.packed.write(index, sent, unit, border, room, counts, v))
    counts_at = PACKED_AT + 2 * count
    end = counts_at + 2 * chunks
    out[counts_at:end].view(np.uint16)[:] = counts
    return Encoded(end, count)


def _peek_packed(packed: Packed, elements: int, start: int, out: FloatVector) -> None:
    """Write the values of a stretch, whose chunks are decoded whole and cut."""
    first, last = start // PACKED_CHUNK, chunks_of(start + out.size, PACKED_CHUNK)
    whole = borrow("peeked", min(last * PACKED_CHUNK, elements) - first * PACKED_CHUNK, np.float32)
    whole.fill(0.0)
    skipped, counts = int(packed.counts[:first].sum(dtype=np.int64)), packed.counts[first:last]
    kernels.packed.scatter(packed.entries[skipped:], counts, packed.unit, whole)
    out[:] = whole[start - first * PACKED_CHUNK :][: out.size]

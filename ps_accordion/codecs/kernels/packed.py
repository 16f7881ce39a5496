"""Entries of 16 bits: a place within 4,096 elements, a binary exponent and a sign.

    bits 0 to 11    index within the chunk
    bits 12 to 14   exponent e: the value is unit * 2^e
    bit 15          1 if it is negative

A value is rounded to the nearest power of two times the unit on a logarithmic scale: between unit * 2^e and unit * 2^(e + 1) the
border is at sqrt(2) times the lower. So it lies within a factor of sqrt(2) of what stands for it, and their difference is exact
in float32 (Sterbenz). Borders are an exponent apart, so that their bits are 2^23 apart: rounding is one shift of integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import F32, F32_IN, U16, U16_IN, U32_IN, bits, boolean, float32, helper, int64, kernel, real, void

__all__ = ["CHUNK_SHIFT", "add", "check", "scatter", "write"]

CHUNK_SHIFT = 12
"""Indices are written as 12 bits within chunks of 4,096 elements."""

_CHUNK = 1 << CHUNK_SHIFT
_PLACE = np.int32(_CHUNK - 1)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_EXPONENT_BITS = np.int32(23)
_SMALLEST_BITS = np.int32(1 << 23)
_LARGEST = np.int32(7)
_SIGN = np.int32(0x8000)


@helper
def _value(unit: Any, entry: Any) -> Any:
    """Return what an entry stands for; `unit` as bits."""
    word = np.int32(unit + np.int32(np.int32((entry >> 12) & _LARGEST) << _EXPONENT_BITS))
    return real(np.int32(word | np.int32(np.int32(entry & _SIGN) << 16)))


@kernel(int64(U32_IN, F32_IN, float32, int64, U16, U16, F32))
def write(index: Any, values: Any, unit: Any, border: Any, entries: Any, counts: Any, v: Any) -> Any:
    """Write entries of the elements of `v` that are large enough, and subtract there what they stand for.

    Args:
        index: uint32[m], rising.
        values: float32[m], the elements of `v` there.
        unit: What exponent 0 stands for.
        border: Magnitude bits of sqrt(1/2) times the unit. What is smaller, or denormal, is not written.
        entries: uint16[m], to be written.
        counts: uint16[chunks of `v`], to be written.
        v: float32[n].

    Returns:
        How many entries there are.
    """
    low = np.int32(border)
    base, least = bits(unit), max(low, _SMALLEST_BITS)
    for chunk in range(counts.shape[0]):
        counts[chunk] = 0
    written: Any = 0
    for j in range(index.shape[0]):
        word = bits(values[j])
        magnitude = np.int32(word & _MAGNITUDE)
        if magnitude >= least:
            at = np.int64(index[j])
            exponent = min(np.int32(np.int32(magnitude - low) >> _EXPONENT_BITS), _LARGEST)
            sign = np.int32(np.int32(word >> 16) & _SIGN)
            entry = np.int32(np.int32(np.int32(at) & _PLACE) | np.int32(np.int32(exponent << 12) | sign))
            entries[written] = np.uint16(entry)
            v[at] -= _value(base, entry)
            counts[at >> CHUNK_SHIFT] += np.uint16(1)
            written += 1
    return written


@kernel(boolean(U16_IN, U16_IN, int64))
def check(entries: Any, counts: Any, elements: Any) -> Any:
    """Return whether entries and counts describe rising indices below `elements`. Safe on any numbers."""
    first: Any = 0
    for chunk in range(counts.shape[0]):
        length = min(_CHUNK, elements - chunk * _CHUNK)
        last = first + np.int64(counts[chunk])
        if last > entries.shape[0]:
            return False
        before: Any = -1
        for j in range(first, last):
            place = np.int64(entries[j]) & np.int64(_PLACE)
            if place <= before or place >= length:
                return False
            before = place
        first = last
    return first == entries.shape[0]


@helper
def _scatter_chunk(entries: Any, unit: Any, out: Any) -> None:
    for j in range(entries.shape[0]):
        entry = np.int32(entries[j])
        out[np.int64(entry & _PLACE)] = _value(unit, entry)


@helper
def _add_chunk(entries: Any, unit: Any, weight: Any, total: Any) -> None:
    for j in range(entries.shape[0]):
        entry = np.int32(entries[j])
        total[np.int64(entry & _PLACE)] += weight * _value(unit, entry)


@kernel(void(U16_IN, U16_IN, float32, F32))
def scatter(entries: Any, counts: Any, unit: Any, out: Any) -> None:
    """Write what entries stand for to their places in `out`; the others keep what they hold. The payload has been checked."""
    base, first = bits(unit), np.int64(0)
    for chunk in range(counts.shape[0]):
        last = first + np.int64(counts[chunk])
        _scatter_chunk(entries[first:last], base, out[chunk * _CHUNK :])
        first = last


@kernel(void(U16_IN, U16_IN, float32, float32, F32))
def add(entries: Any, counts: Any, unit: Any, weight: Any, total: Any) -> None:
    """Add `weight` times what entries stand for at their places in `total` (two roundings). The payload has been checked."""
    base, first = bits(unit), np.int64(0)
    for chunk in range(counts.shape[0]):
        last = first + np.int64(counts[chunk])
        _add_chunk(entries[first:last], base, weight, total[chunk * _CHUNK :])
        first = last

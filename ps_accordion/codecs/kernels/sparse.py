"""Read and write sparse vectors: values, and where they are. `choose.py` finds which."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import (
    F32,
    F32_IN,
    I32,
    U16,
    U16_IN,
    U32_IN,
    boolean,
    fetch,
    float32,
    flush,
    helper,
    int64,
    kernel,
    off_line,
    real,
    void,
)
from .half import from_half
from .vector import ROW, store_row

__all__ = ["CHUNK_SHIFT", "add", "check", "locate", "put", "spread", "sum_halves"]

CHUNK_SHIFT = 15
"""Indices are written as 16 bits within chunks of 32,768 elements."""

_CHUNK = 1 << CHUNK_SHIFT
_AHEAD = 48  # places in a vector that has left the cache are brought this many entries before they are written
_ZERO = np.float32(0.0)


@kernel(void(F32_IN, U32_IN, F32))
def put(values: Any, index: Any, out: Any) -> None:
    """Write `values` to `out[index]`."""
    last = index.shape[0] - 1
    for j in range(index.shape[0]):
        fetch(out, np.int64(index[min(j + _AHEAD, last)]))
        out[np.int64(index[j])] = values[j]


@kernel(void(U32_IN, U16, U16))
def locate(index: Any, places: Any, counts: Any) -> None:
    """Split rising indices into places within their chunk, and how many lie in each chunk."""
    for j in range(index.shape[0]):
        places[j] = np.uint16(index[j] & np.uint32(_CHUNK - 1))
    first: Any = 0
    for chunk in range(counts.shape[0]):
        end = (chunk + 1) << CHUNK_SHIFT
        low, high = first, index.shape[0]
        while low < high:
            middle = (low + high) // 2
            if np.int64(index[middle]) < end:
                low = middle + 1
            else:
                high = middle
        counts[chunk] = np.uint16(low - first)
        first = low


@kernel(boolean(U16_IN, U16_IN, int64))
def check(places: Any, counts: Any, elements: Any) -> Any:
    """Return whether places and counts describe rising indices below `elements`. Safe on any numbers."""
    first: Any = 0
    for chunk in range(counts.shape[0]):
        length = min(_CHUNK, elements - chunk * _CHUNK)
        last = first + np.int64(counts[chunk])
        if last > places.shape[0]:
            return False
        before: Any = -1
        for j in range(first, last):
            place = np.int64(places[j])
            if place <= before or place >= length:
                return False
            before = place
        first = last
    return first == places.shape[0]


@helper
def _add_chunk(values: Any, places: Any, weight: Any, total: Any) -> None:
    for j in range(places.shape[0]):
        total[np.int64(places[j])] += weight * values[j]


@kernel(void(F32_IN, U16_IN, U16_IN, F32, int64, F32))
def spread(values: Any, places: Any, counts: Any, row: Any, past: Any, out: Any) -> None:
    """Write values to their places in `out`, and zero elsewhere, past the cache unless `past` is 0.

    The payload has been checked; `row` is float32[ROW], scratch.
    """
    n, off = out.shape[0], off_line(out)
    first: Any = 0
    row[:ROW] = _ZERO
    for chunk in range(counts.shape[0]):
        base = chunk << CHUNK_SHIFT
        last = first + np.int64(counts[chunk])
        for low in range(0, min(_CHUNK, n - base), ROW):
            high = min(low + ROW, n - base)
            at = first
            while at < last and np.int64(places[at]) < high:
                row[np.int64(places[at]) - low] = values[at]
                at += 1
            store_row(row, out, base + low, base + high, off, past)
            for j in range(first, at):
                row[np.int64(places[j]) - low] = _ZERO
            first = at
    flush(out)


@kernel(void(F32_IN, U16_IN, U16_IN, float32, F32))
def add(values: Any, places: Any, counts: Any, weight: Any, total: Any) -> None:
    """Add `weight * values` at their places in `total` (two roundings). The payload has been checked."""
    first: Any = 0
    for chunk in range(counts.shape[0]):
        last = first + np.int64(counts[chunk])
        _add_chunk(values[first:last], places[first:last], weight, total[chunk * _CHUNK :])
        first = last


@helper
def _decode(codes: Any, inverse: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        out[i] = from_half(np.int32(codes[i])) * inverse


@kernel(void(U16_IN, U32_IN, F32_IN, F32, I32, F32))
def sum_halves(payloads: Any, heads: Any, weights: Any, values: Any, at: Any, total: Any) -> None:
    """Set `total := 0 + weight * value` of each member at its places, member by member, as `half.decode` and `add` do.

    Args:
        payloads: uint16, payloads of halves, one behind another. They have been checked.
        heads: uint32[2 * members], where the halves of each begin, and how many there are. Their exponent lies before them,
            places and counts behind.
        weights: float32[members].
        values: float32[all entries], scratch.
        at: int32[2 * members], scratch.
        total: float32[n].
    """
    members, n, behind = weights.shape[0], total.shape[0], np.int64(0)
    for m in range(members):
        first, count = np.int64(heads[2 * m]), np.int64(heads[2 * m + 1])
        exponent = np.int32(payloads[first - 1] ^ np.uint16(0x8000)) - np.int32(0x8000)  # it has a sign
        inverse = real(np.int32(np.int32(exponent + 127) << 23))
        _decode(payloads[first : first + count], inverse, values[behind : behind + count])
        at[2 * m], at[2 * m + 1] = np.int32(behind), np.int32(first + count)
        behind += count
    for chunk in range((n + _CHUNK - 1) >> CHUNK_SHIFT):
        part = total[chunk << CHUNK_SHIFT : min((chunk + 1) << CHUNK_SHIFT, n)]
        part[:] = _ZERO
        for m in range(members):
            first, place = np.int64(at[2 * m]), np.int64(at[2 * m + 1])
            count = np.int64(payloads[np.int64(heads[2 * m]) + 2 * np.int64(heads[2 * m + 1]) + chunk])
            _add_chunk(values[first : first + count], payloads[place : place + count], weights[m], part)
            at[2 * m], at[2 * m + 1] = np.int32(first + count), np.int32(place + count)

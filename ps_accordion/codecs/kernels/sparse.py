"""Read and write sparse vectors: values, and where they are. `choose.py` finds which."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import F32, F32_IN, U16, U16_IN, U32_IN, boolean, float32, helper, int64, kernel, void

__all__ = ["CHUNK_SHIFT", "add", "check", "locate", "put", "scatter"]

CHUNK_SHIFT = 15
"""Indices are written as 16 bits within chunks of 32,768 elements."""

_CHUNK = 1 << CHUNK_SHIFT


@kernel(void(F32_IN, U32_IN, F32))
def put(values: Any, index: Any, out: Any) -> None:
    """Write `values` to `out[index]`."""
    for j in range(index.shape[0]):
        out[index[j]] = values[j]


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
def _scatter_chunk(values: Any, places: Any, out: Any) -> None:
    for j in range(places.shape[0]):
        out[np.int64(places[j])] = values[j]


@helper
def _add_chunk(values: Any, places: Any, weight: Any, total: Any) -> None:
    for j in range(places.shape[0]):
        total[np.int64(places[j])] += weight * values[j]


@kernel(void(F32_IN, U16_IN, U16_IN, F32))
def scatter(values: Any, places: Any, counts: Any, out: Any) -> None:
    """Write values to their places in `out`; the others keep what they hold. The payload has been checked."""
    first: Any = 0
    for chunk in range(counts.shape[0]):
        last = first + np.int64(counts[chunk])
        _scatter_chunk(values[first:last], places[first:last], out[chunk * _CHUNK :])
        first = last


@kernel(void(F32_IN, U16_IN, U16_IN, float32, F32))
def add(values: Any, places: Any, counts: Any, weight: Any, total: Any) -> None:
    """Add `weight * values` at their places in `total` (two roundings). The payload has been checked."""
    first: Any = 0
    for chunk in range(counts.shape[0]):
        last = first + np.int64(counts[chunk])
        _add_chunk(values[first:last], places[first:last], weight, total[chunk * _CHUNK :])
        first = last

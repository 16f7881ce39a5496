"""Draw one place of each stretch of a vector by a keyed hash, and take or add what lies there; `codecs/random_k.py` says why."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import F32, F32_IN, U32, U32_IN, float32, int64, kernel, void
from .noise import hashed

__all__ = ["add", "draw", "take"]


@kernel(int64(int64, int64, int64, int64, int64, int64, U32))
def draw(first: Any, length: Any, low: Any, high: Any, turn: Any, elements: Any, places: Any) -> Any:
    """Write a place of each stretch; return how many of them, all but perhaps the last, are below `elements`.

    Args:
        first: Number of the first stretch.
        length: Elements of a stretch.
        low: Lower word of the key, below 2^32.
        high: Upper word of the key, below 2^32.
        turn: What is added to each place, modulo `length`; below it.
        elements: Of the vector, below 2^32.
        places: uint32[stretches], to be written.
    """
    low_word, high_word = np.uint32(low), np.uint32(high)
    count = places.shape[0]
    for i in range(count):
        at = first + i
        word = np.uint64(hashed(np.uint32(at), low_word, high_word))
        place = np.int64((word * np.uint64(length)) >> np.uint64(32)) + turn
        place = place - length if place >= length else place
        places[i] = np.uint32(at * length + place)
    if count > 0 and np.int64(places[count - 1]) >= elements:
        count -= 1
    return count


@kernel(void(U32_IN, F32, F32))
def take(places: Any, values: Any, v: Any) -> None:
    """Write the elements of `v` at `places` to `values`, and zero to `v` there."""
    for j in range(places.shape[0]):
        at = places[j]
        values[j] = v[at]
        v[at] = np.float32(0.0)


@kernel(void(F32_IN, U32_IN, float32, F32))
def add(values: Any, places: Any, weight: Any, total: Any) -> None:
    """Add `weight * values` at `places` in `total` (two roundings)."""
    for j in range(places.shape[0]):
        total[places[j]] += weight * values[j]

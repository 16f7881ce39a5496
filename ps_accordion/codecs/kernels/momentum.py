"""Momentum that workers build up before they encode, and forget where they have sent something; `codecs/dgc.py` says why."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import F32, F32_IN, U16_IN, fetch, float32, kernel, void
from .packed import CHUNK_SHIFT as PACKED_SHIFT
from .sparse import CHUNK_SHIFT

__all__ = ["advance", "clear", "clear_packed"]

_PLACE = (1 << PACKED_SHIFT) - 1
_AHEAD = 32  # entries: places are brought into the cache that many before they are written
_ZERO = np.float32(0.0)


@kernel(void(F32_IN, float32, F32_IN, F32))
def advance(velocity: Any, momentum: Any, gradient: Any, out: Any) -> None:
    """Write `velocity * momentum + gradient` to `out` (two roundings)."""
    for i in range(out.shape[0]):
        out[i] = velocity[i] * momentum + gradient[i]


@kernel(void(F32_IN, U16_IN, U16_IN, F32))
def clear(values: Any, places: Any, counts: Any, velocity: Any) -> None:
    """Set zero at the places of values that are not zero. The payload has been checked."""
    first: Any = 0
    for chunk in range(counts.shape[0]):
        base, last = chunk << CHUNK_SHIFT, first + np.int64(counts[chunk])
        for j in range(first, last):
            fetch(velocity, base + np.int64(places[min(j + _AHEAD, last - 1)]))
            if values[j] != _ZERO:
                velocity[base + np.int64(places[j])] = _ZERO
        first = last


@kernel(void(U16_IN, U16_IN, F32))
def clear_packed(entries: Any, counts: Any, velocity: Any) -> None:
    """Set zero at the places of packed entries, none of which is zero. The payload has been checked."""
    first: Any = 0
    for chunk in range(counts.shape[0]):
        base, last = chunk << PACKED_SHIFT, first + np.int64(counts[chunk])
        for j in range(first, last):
            fetch(velocity, base + (np.int64(entries[min(j + _AHEAD, last - 1)]) & _PLACE))
            velocity[base + (np.int64(entries[j]) & _PLACE)] = _ZERO
        first = last

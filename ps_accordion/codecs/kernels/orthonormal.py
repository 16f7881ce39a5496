"""Vectors that are made orthonormal, one after another, in float64; and what else becomes of vectors that are mixed."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import F32, F32_IN, F64, float64, fold64, helper, int64, kernel, void

__all__ = ["LANES", "against", "mix"]

LANES = 64
_NOTHING = 2.0**-30
"""What is left of a vector by itself, where it is so much shorter than before, is rounding: float32 has 24 bits."""


@helper
def _multiply(a: Any, b: Any, lanes: Any) -> None:
    for j in range(a.shape[0]):
        lanes[j] += a[j] * b[j]


@helper
def _product(a: Any, b: Any, lanes: Any) -> Any:
    """Return the product of two vectors of float64, in lane order."""
    lanes[:] = 0.0
    for start in range(0, a.shape[0], LANES):
        end = min(start + LANES, a.shape[0])
        _multiply(a[start:end], b[start:end], lanes)
    return fold64(lanes)


@helper
def _away(a: Any, factor: Any, b: Any) -> None:
    for j in range(a.shape[0]):
        a[j] -= factor * b[j]


@kernel(float64(F64, int64, int64, F64, F64), brief=False)
def against(vectors: Any, length: Any, place: Any, mixing: Any, lanes: Any) -> Any:
    """Make a vector orthogonal to those before it, twice over, and of length 1; return how long what was left of it was.

    Args:
        vectors: float64[at least (place + 1) * length]; those before are orthonormal already.
        length: Of a vector.
        place: Which one.
        mixing: float64[at least place], receives how much of each one before it was in it.
        lanes: float64[64], scratch.

    Returns:
        0 where nothing but rounding was left; the vector is then of no use.
    """
    a = vectors[place * length : (place + 1) * length]
    before = np.sqrt(_product(a, a, lanes))
    for k in range(place):
        mixing[k] = 0.0
    for _ in range(2):
        for k in range(place):
            b = vectors[k * length : (k + 1) * length]
            share = _product(a, b, lanes)
            mixing[k] += share
            _away(a, share, b)
    left = np.sqrt(_product(a, a, lanes))
    if not left > before * _NOTHING:
        return 0.0
    for j in range(length):
        a[j] /= left
    return left


@kernel(void(F64, int64, F32_IN, F32), brief=False)
def mix(mixing: Any, rank: Any, vectors: Any, out: Any) -> None:
    """Write `out[k] = mixing[k, k] * vectors[k] + mixing[k, k + 1] * vectors[k + 1] + ...`, summed in float64.

    Args:
        mixing: float64[rank * rank], row k first.
        rank: Vectors of a factor.
        vectors: float32[rank * length].
        out: float32[rank * length], other memory.
    """
    length = vectors.shape[0] // rank
    for k in range(rank):
        for j in range(length):
            x = 0.0
            for m in range(k, rank):
                x += mixing[k * rank + m] * np.float64(vectors[m * length + j])
            out[k * length + j] = np.float32(x)

"""Signs without sizes: a bit an element, and a coin for zeros.

The coins of 32 elements are one hash of the place of their word, so they cost nothing that could be measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import F32, F32_IN, U32, boolean, fetch, float32, helper, int64, kernel, mask64, take_signs64
from .noise import hashed

__all__ = ["cast"]

_ZERO = np.float32(0.0)
_INFINITE = np.int32(0x7F800000)
_LEAST = np.int32(1)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@helper
def _sum(a: Any, scale: Any, b: Any, out: Any) -> None:
    """Write `a * scale + b` (two roundings) to `out`. An empty `b` is zero."""
    if b.shape[0] == 0:
        for j in range(out.shape[0]):
            out[j] = a[j] * scale + _ZERO
    else:
        for j in range(out.shape[0]):
            out[j] = a[j] * scale + b[j]


@kernel(boolean(F32_IN, float32, F32_IN, F32, int64, int64, U32))
def cast(a: Any, scale: Any, b: Any, v: Any, low: Any, high: Any, words: Any) -> Any:
    """Write the signs of `a * scale + b`: bit j of word w is 1 if element 32 w + j is below zero, or zero and its coin is 1.

    Args:
        a: float32[n].
        scale: A factor.
        b: float32[n], or empty for zero.
        v: float32[a multiple of 64], scratch: so many elements are made at a time.
        low: Lower word of the key of the coins: those of word w are the bits of `hashed(w)`.
        high: Upper word of it.
        words: uint32[ceil(n / 32)], written; what is beyond n is 0.

    Returns:
        Whether all elements are finite; else what is written is undefined.
    """
    n, step = a.shape[0], v.shape[0]
    key, more = np.uint32(low), np.uint32(high)
    finite = True
    for start in range(0, n, step):
        end = min(n, start + step)
        row = v[: end - start]
        _sum(a[start:end], scale, b[start:end], row)
        for at in range(end - start, (end - start + 63) // 64 * 64):
            v[at] = _ZERO
        for at in range(0, end - start, 64):
            finite = finite and mask64(v, at, _INFINITE) == np.uint64(0)
            there: Any = mask64(v, at, _LEAST)
            # A size of zero: what is taken away leaves every element as it is.
            below: Any = take_signs64(v, at, _ZERO, v, at)
            # What comes next is brought while this is computed, which takes longer than memory does.
            for line in range(start + step + at, start + step + at + 64, 16):
                fetch(a, line)
                fetch(b, line)
            word = (start + at) // 32
            coins = hashed(np.uint32(word), key, more)
            words[word] = np.uint32(np.uint32(below & _LOW) | np.uint32(coins & ~np.uint32(there & _LOW)))
            if word + 1 < words.shape[0]:
                coins = hashed(np.uint32(word + 1), key, more)
                words[word + 1] = np.uint32(np.uint32(below >> _HALF) | np.uint32(coins & ~np.uint32(there >> _HALF)))
    if n % 32 != 0:
        words[n // 32] &= np.uint32((np.uint32(1) << np.uint32(n % 32)) - np.uint32(1))
    return finite

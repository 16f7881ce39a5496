"""Signs and one size a chunk: sums that are halved into a bit an element and what that does not carry.

The size of a chunk is the mean of its magnitudes. They are added in float64, in `LANES` lanes: lane j adds elements j, j + 64,
j + 128, ... of the chunk in order; the lanes are then added pairwise, 32 to 32, 16 to 16, and so on; the sum is divided by the
number of elements and rounded to float32. It is finite exactly if every element is, since no such sum overflows float64.

A chunk is a multiple of 64 elements, and only the last may be shorter. It is made, added up and halved while it is in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import (
    F32,
    F32_IN,
    F64,
    U32,
    U32_IN,
    add_signs64,
    boolean,
    float32,
    flush,
    fold64,
    helper,
    int64,
    kernel,
    masses64,
    off_line,
    take_signs64,
    take_signs_past64,
    void,
)
from .vector import ROW, store_row

__all__ = ["add", "split", "spread"]

_ZERO = np.float32(0.0)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@helper
def _mean(a: Any, scale: Any, b: Any, start: Any, end: Any, row: Any, lanes: Any) -> Any:
    """Set `row := a * scale + b` from `start` to `end`; return the mean magnitude there."""
    at = masses64(a, scale, b, start, row, (end - start) // 64, lanes)
    for i in range(at, end - start):
        row[i] = a[start + i] * scale + b[start + i]
        lanes[i - at] += np.float64(abs(row[i]))
    return np.float32(fold64(lanes) / np.float64(end - start))


@helper
def _halve(row: Any, length: Any, size: Any, words: Any, v: Any, start: Any, past: Any) -> None:
    """Write the signs of a row to words, and the rest to `v`, from `start` on."""
    whole, first = length // 64 * 64, start // 32
    for at in range(0, whole, 64):
        mask: Any = take_signs_past64(row, at, size, v, start + at) if past else take_signs64(row, at, size, v, start + at)
        words[first + at // 32] = np.uint32(mask & _LOW)
        words[first + at // 32 + 1] = np.uint32(mask >> _HALF)
    for word in range(whole // 32, (length + 31) // 32):
        mask = np.uint64(0)
        for i in range(32 * word, min(32 * word + 32, length)):
            if row[i] < _ZERO:
                mask |= np.uint64(1) << np.uint64(i - 32 * word)
                v[start + i] = row[i] + size
            else:
                v[start + i] = row[i] - size
        words[first + word] = np.uint32(mask)


@kernel(boolean(F32_IN, float32, F32_IN, F32, int64, int64, F32, U32, F32, F64))
def split(a: Any, scale: Any, b: Any, v: Any, past: Any, chunk: Any, sizes: Any, words: Any, row: Any, lanes: Any) -> Any:
    """Set `v := a * scale + b` (two roundings), write its signs and sizes, and leave in `v` what they do not carry.

    Args:
        a: float32[n].
        scale: A factor.
        b: float32[n].
        v: float32[n]; may be `a` or `b`.
        past: 1 if it is other memory, and is to be written past the cache, else 0.
        chunk: Elements of a chunk, a multiple of 64.
        sizes: float32[ceil(n / chunk)], receives the mean magnitudes.
        words: uint32[ceil(n / 32)], receives the signs: bit j of word w says `v[32 w + j] < 0`; what is beyond n is 0.
        row: float32[chunk or more], scratch.
        lanes: float64[64], scratch.

    Returns:
        False if an element of `v` is not finite; then everything that is written to is undefined.
    """
    n = v.shape[0]
    beyond = past != 0 and off_line(v) == 0
    for place in range(sizes.shape[0]):
        start, end = place * chunk, min((place + 1) * chunk, n)
        size = _mean(a, scale, b, start, end, row, lanes)
        if not np.isfinite(size):
            return False
        sizes[place] = size
        _halve(row, end - start, size, words, v, start, beyond)
    flush(v)
    return True


@kernel(void(U32_IN, int64, int64, F32_IN, int64, int64, int64, F32))
def add(words: Any, first: Any, stride: Any, sizes: Any, members: Any, chunk: Any, fresh: Any, total: Any) -> None:
    """Add, member by member, `-size` to `total` where a sign bit is set and `size` elsewhere; from zero if `fresh` is not 0.

    Args:
        words: uint32, the signs of each member as `split` writes them.
        first: Where those of the first member begin.
        stride: How far those of the next begin behind.
        sizes: float32[members * ceil(n / chunk)], the sizes of each member, times its weight.
        members: 1 at least.
        chunk: Elements of a chunk, a multiple of 64.
        fresh: 1 if what `total` holds counts as zero, else 0.
        total: float32[n].
    """
    n = total.shape[0]
    step = sizes.shape[0] // members
    whole = n - n % 64
    for at in range(0, whole, 64):
        add_signs64(words, first + at // 32, stride, sizes, at // chunk, step, members, fresh != 0, total, at)
    for i in range(whole, n):
        value: Any = _ZERO if fresh != 0 else total[i]
        for m in range(members):
            size = sizes[m * step + i // chunk]
            negative = (np.uint64(words[first + m * stride + i // 32]) >> np.uint64(i % 32)) & np.uint64(1)
            value += -size if negative else size
        total[i] = value


@kernel(void(U32_IN, F32_IN, int64, F32, int64, F32))
def spread(words: Any, sizes: Any, chunk: Any, row: Any, past: Any, out: Any) -> None:
    """Write `0 + -size` to `out` where a sign bit is set and `0 + size` elsewhere.

    Args:
        words: uint32[ceil(n / 32)], signs as `split` writes them.
        sizes: float32[ceil(n / chunk)].
        chunk: Elements of a chunk, a multiple of 64.
        row: float32[ROW], scratch.
        past: 1 to write past the cache, else 0.
        out: float32[n].
    """
    n, off = out.shape[0], off_line(out)
    for start in range(0, n, ROW):
        end = min(start + ROW, n)
        whole = (end - start) // 64 * 64
        for at in range(0, whole, 64):
            add_signs64(words, (start + at) // 32, 0, sizes, (start + at) // chunk, 0, 1, True, row, at)
        for i in range(start + whole, end):
            size = sizes[i // chunk]
            negative = (np.uint64(words[i // 32]) >> np.uint64(i % 32)) & np.uint64(1)
            row[i - start] = _ZERO + (-size if negative else size)
        store_row(row, out, start, end, off, past)
    flush(out)

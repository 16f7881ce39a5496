"""Random rotations: random signs, and the fast Walsh-Hadamard transform.

A vector is cut into tiles of `WIDTH` columns and R rows, R a power of two: element i of a tile is in row i / 16, column i % 16.
Whole tiles have `ROWS` rows; the last has as few as hold what is left, and zeros behind it. Columns are what is transformed, so
neighbours go through the same additions in the lanes of one register, and nothing is shuffled. For h = R / 2, R / 4, ..., 1 in
turn, rows r and r + h, where bit h of r is 0, become their sum and their difference. The order of the additions is part of the
format: every host and device that keeps it gets the same bits.

The transform is not scaled: done twice, it multiplies by R. Signs are those of bits of a hash: element i of the vector has bit
i % 32 of `hashed(i / 32)`.

In memory, the rows of a tile lie in groups of 32, `PITCH` elements apart: at a distance of 512, the 32 rows that are transformed
together would all lie in the same two sets of the first-level cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import F32, F32_IN, butterfly32, fetch, flush, helper, int64, kernel, off_line, signed16, stream16, void
from .noise import hashed

__all__ = ["GROUP", "PITCH", "ROOM", "ROWS", "TILE", "WIDTH", "rotate", "rows_of", "transform", "turn", "unturn"]

WIDTH = 16
ROWS = 1024
TILE = ROWS * WIDTH
"""Elements of a whole tile: 64 KiB, which stay in a second-level cache."""
GROUP = 32 * WIDTH
PITCH = GROUP + WIDTH
ROOM = 32 * PITCH
"""Elements of memory for a tile."""


@helper
def rows_of(elements: Any) -> Any:
    """Return how many rows a tile of so many elements has: the power of two that holds them."""
    rows = 1
    while WIDTH * rows < elements:
        rows *= 2
    return rows


@helper
def _butterfly(low: Any, high: Any) -> None:
    for j in range(low.shape[0]):
        a, b = low[j], high[j]
        low[j] = a + b
        high[j] = a - b


@helper
def transform(t: Any, rows: Any) -> None:
    """Transform a tile in place, float32[ROOM]."""
    groups = rows // 32
    if groups == 32:
        for r in range(32):
            butterfly32(t, r * WIDTH, PITCH, t, r * WIDTH, PITCH)
    half = 0 if groups == 32 else groups // 2
    while half > 0:
        for g in range(groups):
            if g & half == 0:
                one, two = g * PITCH, (g + half) * PITCH
                _butterfly(t[one : one + GROUP], t[two : two + GROUP])
        half //= 2
    for g in range(groups):
        butterfly32(t, g * PITCH, WIDTH, t, g * PITCH, WIDTH)
    half = 0 if groups > 0 else rows // 2
    while half > 0:
        for r in range(rows):
            if r & half == 0:
                one, two = r * WIDTH, (r + half) * WIDTH
                _butterfly(t[one : one + WIDTH], t[two : two + WIDTH])
        half //= 2


@helper
def turn(v: Any, rows: Any, first: Any, low: Any, high: Any, factors: Any, t: Any) -> None:
    """Write a tile of `v`, times random signs and a factor a column, to `t`; `first` is the number of its first element."""
    for r in range(0, rows, 2):
        word = hashed(np.uint32(first // 32 + r // 2), low, high)
        at = (r // 32) * PITCH + (r % 32) * WIDTH
        signed16(v, r * WIDTH, word, factors, t, at)
        if rows > 1:
            signed16(v, (r + 1) * WIDTH, np.uint32(word >> np.uint32(16)), factors, t, at + WIDTH)


@helper
def unturn(t: Any, rows: Any, first: Any, low: Any, high: Any, factors: Any) -> None:
    """Do with a tile in `t` what `turn` does, in place."""
    for r in range(0, rows, 2):
        word = hashed(np.uint32(first // 32 + r // 2), low, high)
        at = (r // 32) * PITCH + (r % 32) * WIDTH
        signed16(t, at, word, factors, t, at)
        if rows > 1:
            signed16(t, at + WIDTH, np.uint32(word >> np.uint32(16)), factors, t, at + WIDTH)


@helper
def _ahead(x: Any, start: Any) -> None:
    """Fetch a group of elements, or as many as there are."""
    for at in range(start, min(start + GROUP, x.shape[0]), WIDTH):
        fetch(x, at)


@kernel(void(F32_IN, int64, int64, F32, int64, F32))
def rotate(a: Any, low: Any, high: Any, work: Any, past: Any, out: Any) -> None:
    """Write the transform of `a`, times random signs, to `out`: for tests and for the clock.

    Args:
        a: float32[a multiple of TILE].
        low: Lower word of the key of the signs.
        high: Upper word of it.
        work: float32[ROOM + 16], scratch.
        past: 1 to write past the cache, where lines allow that, else 0.
        out: Like `a`.
    """
    key, more = np.uint32(low), np.uint32(high)
    t, ones = work[:ROOM], work[ROOM : ROOM + WIDTH]
    ones[:] = np.float32(1.0)
    beyond = past != 0 and off_line(out) == 0
    for start in range(0, a.shape[0], TILE):
        turn(a[start : start + TILE], ROWS, start, key, more, ones, t)
        # As `transform` does it, but while the processor adds, memory brings what is needed next.
        for r in range(32):
            if not beyond:
                _ahead(out, start + r * GROUP)
            butterfly32(t, r * WIDTH, PITCH, t, r * WIDTH, PITCH)
        for g in range(32):
            _ahead(a, start + TILE + g * GROUP)
            if beyond:
                butterfly32(t, g * PITCH, WIDTH, t, g * PITCH, WIDTH)
                for at in range(0, GROUP, WIDTH):
                    stream16(t, g * PITCH + at, out, start + g * GROUP + at)
            else:
                butterfly32(t, g * PITCH, WIDTH, out, start + g * GROUP, WIDTH)
    flush(out)

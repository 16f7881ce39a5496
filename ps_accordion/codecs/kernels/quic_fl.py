"""Rotate, round at random to levels that lie closer towards zero, and rotate back: the work is shared between four kernels.

`hadamard.py` says what a tile is, and how its columns are rotated. A rotated tile has the layout of its memory there, `ROOM`
elements, and is what the transform makes of `v / R`, R rows: so no sum on the way exceeds the largest magnitude of `v`.
Workers `rotate` and `quantise`, and receivers `collect` and `restore`; servers `collect` and `quantise`, and transform nothing.

With M = 2^bits - 1, code c is the odd number k = 2 c - M, and stands for level(k) times the size of its column:

    level(k) = k / (2 M - |k|)          from -1 to 1
    place(z) = M z / (1 + |z|) + M / 2  where a number from -1 to 1 lies between the codes: the inverse, level(2 place(z) - M) = z

Codes share bytes as in `eden.py`. One word of noise serves two elements, in either half of a group.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import F32, F32_IN, I32, U8, U8_IN, bits, float32, helper, int32, int64, kernel, real, void
from .hadamard import GROUP, PITCH, ROOM, TILE, WIDTH, rows_of, transform, turn, unturn
from .noise import hashed
from .tiles import add_to, pack_bits
from .vector import summed

__all__ = ["LARGEST", "SMALLEST", "collect", "quantise", "restore", "rotate"]

SMALLEST = 2.0**-126
"""The smallest size but 0: sizes are normal numbers, and so are their inverses."""
LARGEST = 2.0**117
"""A column with a rotated element from there on is not sent. 1,024 rows times the largest size below it are finite."""

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITE = np.int32(0x7F800000)
_UNIFORM = np.int32(0x7FFF)
_SMALLEST = np.float32(SMALLEST)
_LARGEST = np.float32(LARGEST)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_TWO = np.float32(2.0)
_HALF = np.float32(0.5)
_UNIT = np.float32(2.0**-15)


@kernel(int32(F32_IN, float32, F32_IN, int64, int64, int64, F32, F32))
def rotate(a: Any, scale: Any, b: Any, first: Any, low: Any, high: Any, work: Any, rotated: Any) -> Any:
    """Rotate `v = a * scale + b`.

    Args:
        a: float32[n].
        scale: A factor.
        b: float32[n], or empty for zero.
        first: Where `a` begins in the vector, a multiple of TILE.
        low: Lower word of the key of the signs.
        high: Upper word of it.
        work: float32[TILE + 16], scratch.
        rotated: float32[ROOM * tiles], written.

    Returns:
        The bits of a largest magnitude in `v`. Where it is not finite, what has been written is undefined.
    """
    n = a.shape[0]
    key, more = np.uint32(low), np.uint32(high)
    v, factors = work[:TILE], work[TILE : TILE + WIDTH]
    peak = np.int32(0)
    for place in range((n + TILE - 1) // TILE):
        start, end = place * TILE, min(n, (place + 1) * TILE)
        top = summed(a[start:end], scale, b[start:end], v[: end - start])
        peak = max(peak, top)
        if top >= _INFINITE:
            return top
        rows = rows_of(end - start)
        v[end - start : WIDTH * rows] = _ZERO
        factors[:] = np.float32(_ONE / np.float32(rows))
        t = rotated[place * ROOM : (place + 1) * ROOM]
        turn(v, rows, first + start, key, more, factors, t)
        transform(t, rows)
    return peak


@helper
def _scale(y: Any, scale: Any, tops: Any) -> None:
    """Multiply by a factor, and raise the bits of largest magnitudes in `tops`."""
    for j in range(y.shape[0]):
        v = y[j] * scale
        y[j] = v
        tops[j] = max(tops[j], np.int32(bits(v) & _MAGNITUDE))


@helper
def _code(y: Any, inverse: Any, noise: Any, most: Any) -> Any:
    """Return the code of `y`, rounded by a noise of 15 bits, with `most` = M."""
    z = y * inverse
    lower = np.float32(np.int32(min(most * (z / (_ONE + abs(z))) + most * _HALF, most - _ONE)))
    k, twice = _TWO * lower - most, _TWO * most
    below, above = k / (twice - abs(k)), (k + _TWO) / (twice - abs(k + _TWO))
    up = z - below > (np.float32(noise) + _HALF) * _UNIT * (above - below)
    return np.uint8(np.int32(lower + (_ONE if up else _ZERO)))


@helper
def _dither(y: Any, inverse: Any, first: Any, low: Any, high: Any, most: Any, codes: Any) -> None:
    half = y.shape[0] // 2
    front, back, front_codes, back_codes = y[:half], y[half:], codes[:half], codes[half : 2 * half]
    for j in range(half):
        word = np.int32(hashed(np.uint32(first + np.uint32(j)), low, high))
        front_codes[j] = _code(front[j], inverse[j], np.int32(np.int32(word >> 17) & _UNIFORM), most)
        back_codes[j] = _code(back[j], inverse[j], np.int32(word & _UNIFORM), most)


@kernel(int32(F32, float32, int64, int64, int64, int64, int64, F32, U8, I32, F32, U8))
def quantise(
    rotated: Any,
    scale: Any,
    elements: Any,
    first: Any,
    width: Any,
    low: Any,
    high: Any,
    sizes: Any,
    codes: Any,
    tops: Any,
    inverse: Any,
    wide: Any,
) -> Any:
    """Encode rotated tiles, times a factor, and leave the product there.

    Args:
        rotated: float32[ROOM * tiles].
        scale: A factor.
        elements: Of the vector that they are made of.
        first: Where it begins in the whole one, a multiple of TILE.
        width: Bits of a code: 8, 4 or 2.
        low: Lower word of the key of the noise.
        high: Upper word of it.
        sizes: float32[16 * tiles], written.
        codes: uint8[bytes of all codes], written.
        tops: int32[GROUP], scratch.
        inverse: float32[GROUP], scratch.
        wide: uint8[GROUP], scratch.

    Returns:
        The bits of a largest magnitude in the product. Where it is not finite, what has been written is undefined.
    """
    key, more, most = np.uint32(low), np.uint32(high), np.float32((1 << width) - 1)
    peak = np.int32(0)
    at = 0
    for place in range(sizes.shape[0] // WIDTH):
        rows = rows_of(min(elements - place * TILE, TILE))
        size, groups = min(GROUP, WIDTH * rows), max(1, rows // 32)
        t = rotated[place * ROOM : (place + 1) * ROOM]
        tops[:] = 0
        for g in range(groups):
            _scale(t[g * PITCH : g * PITCH + size], scale, tops[:size])
        half = size // 2
        while half >= WIDTH:
            for j in range(half):
                tops[j] = max(tops[j], tops[half + j])
            half //= 2
        for j in range(WIDTH):
            peak = max(peak, tops[j])
            top = real(tops[j])
            size_of = _ZERO if top == _ZERO or top >= _LARGEST else max(top, _SMALLEST)
            sizes[place * WIDTH + j] = size_of
            inverse[j] = _ZERO if size_of == _ZERO else _ONE / size_of
        if peak >= _INFINITE:
            return peak
        for j in range(WIDTH, size):
            inverse[j] = inverse[j - WIDTH]
        for g in range(groups):
            begin = np.uint32(first + place * TILE + g * GROUP)
            _dither(t[g * PITCH : g * PITCH + size], inverse, begin, key, more, most, wide)
            pack_bits(wide, 0, width, codes[at : at + size * width // 8])
            at += size * width // 8
    return peak


@helper
def _gather(codes: Any, shift: Any, mask: Any, size: Any, y: Any) -> None:
    """Add what the codes from bit `shift` up of each byte stand for."""
    most = np.float32(mask)
    for j in range(y.shape[0]):
        k = _TWO * np.float32(np.int32(np.int32(np.int32(codes[j]) >> shift) & mask)) - most
        y[j] += size[j] * (k / (_TWO * most - abs(k)))


@kernel(void(U8_IN, F32_IN, int64, int64, float32, int64, F32, F32))
def collect(
    codes: Any,
    sizes: Any,
    elements: Any,
    width: Any,
    weight: Any,
    fresh: Any,
    work: Any,
    rotated: Any,
) -> None:
    """Add what codes stand for to rotated tiles: `y := y + (weight * size) * level` (three roundings).

    Args:
        codes: uint8[bytes of the codes], of whole tiles.
        sizes: float32[16 * tiles].
        elements: Of the vector that they are made of.
        width: Bits of a code: 8, 4 or 2.
        weight: A factor.
        fresh: 1 if what `rotated` holds counts as zero, else 0.
        work: float32[GROUP], scratch.
        rotated: float32[ROOM * tiles].
    """
    mask = np.int32((1 << width) - 1)
    at = 0
    for place in range(sizes.shape[0] // WIDTH):
        rows = rows_of(min(elements - place * TILE, TILE))
        size, groups = min(GROUP, WIDTH * rows), max(1, rows // 32)
        count = size * width // 8
        for j in range(WIDTH):
            work[j] = weight * sizes[place * WIDTH + j]
        for j in range(WIDTH, size):
            work[j] = work[j - WIDTH]
        for g in range(groups):
            start = place * ROOM + g * PITCH
            y = rotated[start : start + size]
            if fresh != 0:
                y[:] = _ZERO
            for i in range(8 // width):
                part = slice(i * count, (i + 1) * count)
                _gather(codes[at : at + count], np.int32(i * width), mask, work[part], y[part])
            at += count


@kernel(void(F32, int64, int64, int64, float32, int64, F32, F32))
def restore(rotated: Any, first: Any, low: Any, high: Any, weight: Any, fresh: Any, ones: Any, total: Any) -> None:
    """Rotate back, in place, to D, and set `total := total + weight * D` (two roundings), or `0 + weight * D`.

    Args:
        rotated: float32[ROOM * tiles], overwritten.
        first: Where `total` begins in the vector, a multiple of TILE.
        low: Lower word of the key of the signs.
        high: Upper word of it.
        weight: A factor.
        fresh: 1 if what `total` holds counts as zero, else 0.
        ones: float32[16], scratch.
        total: float32[n].
    """
    n = total.shape[0]
    key, more = np.uint32(low), np.uint32(high)
    ones[:] = _ONE
    for place in range((n + TILE - 1) // TILE):
        start, end = place * TILE, min(n, (place + 1) * TILE)
        rows = rows_of(end - start)
        size, groups = min(GROUP, WIDTH * rows), max(1, rows // 32)
        t = rotated[place * ROOM : (place + 1) * ROOM]
        transform(t, rows)
        unturn(t, rows, first + start, key, more, ones)
        for g in range(groups):
            part = total[min(end, start + g * GROUP) : min(end, start + g * GROUP + size)]
            add_to(t[g * PITCH : g * PITCH + size], weight, fresh, part)

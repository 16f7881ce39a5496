"""Rotate, quantise to the best levels for normal numbers, and rotate back: tile by tile, while a tile is in the cache.

`hadamard.py` says what a tile is, and how its columns are rotated. Rotated, they are close to normal numbers, whatever they were;
divided by their deviation, each element becomes the nearest of 2^bits levels, those with the least squared error for normal
numbers (Max 1960, Lloyd 1982). A column has one size, by which levels are multiplied.

A code has the sign in its highest bit and the number of the magnitude below it. Codes of a group of `GROUP` elements, or of all
that a smaller tile has, share bytes as in `buckets.py`: with w bytes, byte j holds elements j, j + w, and so on, from the lowest
bits up. Codes of 3 bits are codes of the lower 2, and behind them codes of the highest.

Sums over a column are float32, in lanes of 1,024: lane j adds elements j, j + 1024, ... of a tile in order; then lane j adds lane
j + 512, j + 256, and so on, until a lane is a column.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import F32, F32_IN, U8, U8_IN, bits, float32, helper, int32, int64, kernel, real, void
from .hadamard import GROUP, PITCH, ROOM, TILE, WIDTH, rows_of, transform, turn, unturn
from .tiles import add_to, pack, unpack
from .vector import summed

__all__ = ["LARGEST", "LEVELS", "MEAN", "STEEPEST", "THRESHOLDS", "TOO_LARGE", "WORK", "add", "encode"]

WORK = ROOM + TILE + 3 * 1024 + GROUP + WIDTH
"""Elements of scratch."""
LARGEST = 2.0**114
"""The largest size: 1,024 times the largest level times this is below 2^126."""
TOO_LARGE = 253
"""Exponent bits of 2^126. A tile with a magnitude from there on is not sent, or what is kept, `v - D`, might be infinite."""

_LANES = 1024
_SIGN = np.int32(-(2**31))
_INFINITE = np.int32(0x7F800000)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
MEAN = 0.7978845608
"""Mean magnitude of standard normal numbers, the square root of 2 / pi."""
STEEPEST = 2.0**100
"""By which a column is multiplied at most."""
THRESHOLDS: dict[int, tuple[float, ...]] = {
    1: (),
    2: (0.9815988,),
    3: (0.5005497, 1.0499573, 1.7479275),
    4: (0.2582217, 0.5224037, 0.7995498, 1.0992858, 1.4371388, 1.8435318, 2.4008034),
}
"""From which magnitude on the next level is nearer, by bits."""
LEVELS: dict[int, tuple[float, ...]] = {
    1: (MEAN,),
    2: (0.4527800, 1.5104176),
    3: (0.2450942, 0.7560053, 1.3439093, 2.1519457),
    4: (0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
}
"""The levels that lose least of standard normal numbers, by bits: a level is the mean of what is nearest to it, a threshold the
middle of two levels. All of it is float32 where it is used."""

_MEAN = np.float32(MEAN)
_STEEPEST = np.float32(STEEPEST)
_LARGEST = np.float32(LARGEST)
_T2 = np.float32(THRESHOLDS[2][0])
_T3 = tuple(np.float32(each) for each in THRESHOLDS[3])
_T4 = tuple(np.float32(each) for each in THRESHOLDS[4])
_L2 = tuple(np.float32(each) for each in LEVELS[2])
_L3 = tuple(np.float32(each) for each in LEVELS[3])
_L4 = tuple(np.float32(each) for each in LEVELS[4])


@helper
def _nearest(z: Any, width: Any) -> Any:
    """Return the number of the magnitude nearest to `z`, which is not below zero, and that magnitude, as float32."""
    number, level = _ZERO, _MEAN
    if width == 2:
        number, level = (_ONE, _L2[1]) if z >= _T2 else (_ZERO, _L2[0])
    elif width == 3:
        number, level = (_ONE, _L3[1]) if z >= _T3[0] else (_ZERO, _L3[0])
        number, level = (np.float32(2.0), _L3[2]) if z >= _T3[1] else (number, level)
        number, level = (np.float32(3.0), _L3[3]) if z >= _T3[2] else (number, level)
    elif width == 4:
        number, level = (_ONE, _L4[1]) if z >= _T4[0] else (_ZERO, _L4[0])
        number, level = (np.float32(2.0), _L4[2]) if z >= _T4[1] else (number, level)
        number, level = (np.float32(3.0), _L4[3]) if z >= _T4[2] else (number, level)
        number, level = (np.float32(4.0), _L4[4]) if z >= _T4[3] else (number, level)
        number, level = (np.float32(5.0), _L4[5]) if z >= _T4[4] else (number, level)
        number, level = (np.float32(6.0), _L4[6]) if z >= _T4[5] else (number, level)
        number, level = (np.float32(7.0), _L4[7]) if z >= _T4[6] else (number, level)
    return number, level


@helper
def _level(number: Any, width: Any) -> Any:
    """Return the magnitude that has this number."""
    if width == 1:
        return _MEAN
    if width == 2:
        return _L2[1] if number >= 1 else _L2[0]
    if width == 3:
        low, high = _L3[1] if number >= 1 else _L3[0], _L3[3] if number >= 3 else _L3[2]
        return high if number >= 2 else low
    one, two = _L4[1] if number >= 1 else _L4[0], _L4[3] if number >= 3 else _L4[2]
    three, four = _L4[5] if number >= 5 else _L4[4], _L4[7] if number >= 7 else _L4[6]
    low, high = two if number >= 2 else one, four if number >= 6 else three
    return high if number >= 4 else low


@helper
def _masses(y: Any, lanes: Any) -> None:
    for j in range(y.shape[0]):
        lanes[j] += abs(y[j])


@helper
def _fold(lanes: Any) -> None:
    """Add lanes until `WIDTH` are left."""
    half = _LANES // 2
    while half >= WIDTH:
        low, high = lanes[:half], lanes[half : 2 * half]
        for j in range(half):
            low[j] += high[j]
        half //= 2


@helper
def _to_levels(y: Any, inverse: Any, width: Any, marks: Any, up: Any, down: Any) -> None:
    half = np.float32(1 << (width - 1))
    for j in range(y.shape[0]):
        v = y[j]
        magnitude = abs(v)
        number, level = _nearest(magnitude * inverse[j], width)
        marks[j] = number + (half if bits(v) < np.int32(0) else _ZERO)
        up[j] += level * magnitude
        down[j] += level * level
        y[j] = real(np.int32(bits(level) | np.int32(bits(v) & _SIGN)))


@helper
def _quantise(y: Any, inverse: Any, width: Any, marks: Any, wide: Any, up: Any, down: Any) -> None:
    """Write codes of `y * inverse` to `wide` and what they stand for to `y`; add what a size is made of to two rows of lanes."""
    # A loop for each width: one for all would decide anew at every element.
    if width == 1:
        _to_levels(y, inverse, 1, marks, up, down)
    elif width == 2:
        _to_levels(y, inverse, 2, marks, up, down)
    elif width == 3:
        _to_levels(y, inverse, 3, marks, up, down)
    else:
        _to_levels(y, inverse, 4, marks, up, down)
    for j in range(y.shape[0]):
        wide[j] = np.uint8(np.int32(marks[j]))


@helper
def _from_codes(wide: Any, width: Any, y: Any) -> None:
    numbers = np.int32((1 << (width - 1)) - 1)
    for j in range(y.shape[0]):
        code = np.int32(wide[j])
        level = _level(np.int32(code & numbers), width)
        y[j] = -level if code > numbers else level


@helper
def _numbers(wide: Any, width: Any, y: Any) -> None:
    """Write what codes stand for to `y`."""
    if width == 1:
        _from_codes(wide, 1, y)
    elif width == 2:
        _from_codes(wide, 2, y)
    elif width == 3:
        _from_codes(wide, 3, y)
    else:
        _from_codes(wide, 4, y)


@helper
def _subtract(d: Any, rest: Any) -> None:
    for j in range(rest.shape[0]):
        rest[j] -= d[j]


@kernel(int32(F32_IN, float32, F32_IN, F32, int64, int64, int64, F32, U8, F32, U8))
def encode(
    a: Any,
    scale: Any,
    b: Any,
    rest: Any,
    width: Any,
    low: Any,
    high: Any,
    sizes: Any,
    codes: Any,
    work: Any,
    wide: Any,
) -> Any:
    """Encode `v = a * scale + b`, and write what its codes do not carry to `rest`.

    Args:
        a: float32[n].
        scale: A factor.
        b: float32[n], or empty for zero.
        rest: float32[n]; may be `a`.
        width: Bits of a code, 1 to 4.
        low: Lower word of the key of the signs.
        high: Upper word of it.
        sizes: float32[16 * tiles], written.
        codes: uint8[bytes of all codes], written.
        work: float32[WORK], scratch.
        wide: uint8[GROUP], scratch.

    Returns:
        The bits of a largest magnitude in `v`. Where it is not finite, what has been written is undefined.
    """
    n = a.shape[0]
    key, more = np.uint32(low), np.uint32(high)
    t, padded = work[:ROOM], work[ROOM : ROOM + TILE]
    sums = work[ROOM + TILE : ROOM + TILE + 3 * _LANES]
    lanes, up, down = sums[:_LANES], sums[_LANES : 2 * _LANES], sums[2 * _LANES :]
    even = work[ROOM + TILE + 3 * _LANES : ROOM + TILE + 3 * _LANES + GROUP]
    factors = work[WORK - WIDTH : WORK]
    peak = np.int32(0)
    at = 0
    for place in range(sizes.shape[0] // WIDTH):
        start, end = place * TILE, min(n, (place + 1) * TILE)
        row = rest[start:end]
        top = summed(a[start:end], scale, b[start:end], row)
        peak = max(peak, top)
        if top >= _INFINITE:
            return top
        # A power of two brings the largest element near one, so that no sum overflows and none is denormal.
        exponent = np.int32(min(max(np.int32(top >> 23), np.int32(1)), np.int32(TOO_LARGE)))
        factors[:] = real(np.int32(np.int32(254 - exponent) << 23))
        rows = rows_of(end - start)
        if end - start < WIDTH * rows:
            for j in range(end - start):
                padded[j] = row[j]
            padded[end - start : WIDTH * rows] = _ZERO
            turn(padded, rows, start, key, more, factors, t)
        else:
            turn(row, rows, start, key, more, factors, t)
        transform(t, rows)
        size, groups = min(GROUP, WIDTH * rows), max(1, rows // 32)
        sums[:] = _ZERO
        for g in range(groups):
            _masses(t[g * PITCH : g * PITCH + size], lanes[g % 2 * GROUP : g % 2 * GROUP + size])
        _fold(lanes)
        share = np.float32(_ONE / np.float32(rows))
        for j in range(WIDTH):
            even[j] = min(_MEAN / (lanes[j] * share), _STEEPEST)
        for j in range(WIDTH, GROUP):
            even[j] = even[j - WIDTH]
        for g in range(groups):
            y, half = t[g * PITCH : g * PITCH + size], g % 2 * GROUP
            _quantise(y, even[:size], width, lanes[:size], wide[:size], up[half : half + size], down[half : half + size])
            pack(wide, width, size, codes[at : at + size * width // 8])
            at += size * width // 8
        _fold(up)
        _fold(down)
        back, limit = real(np.int32(exponent << 23)), _LARGEST if exponent < TOO_LARGE else _ZERO
        for j in range(WIDTH):
            sizes[place * WIDTH + j] = min(up[j] / down[j] * share * back, limit)
        transform(t, rows)
        unturn(t, rows, start, key, more, sizes[place * WIDTH : (place + 1) * WIDTH])
        for g in range(groups):
            _subtract(t[g * PITCH : g * PITCH + size], row[g * GROUP : g * GROUP + size])
    return peak


@kernel(void(U8_IN, F32_IN, int64, int64, int64, int64, float32, int64, F32, U8, F32))
def add(
    codes: Any,
    sizes: Any,
    width: Any,
    first: Any,
    low: Any,
    high: Any,
    weight: Any,
    fresh: Any,
    work: Any,
    wide: Any,
    total: Any,
) -> None:
    """Set `total := total + weight * D` (two roundings), or `0 + weight * D` if `fresh` is not 0.

    Args:
        codes: uint8[bytes of the codes], of whole tiles.
        sizes: float32[16 * tiles].
        width: Bits of a code, 1 to 4.
        first: Where `total` begins in the vector, a multiple of TILE.
        low: Lower word of the key of the signs.
        high: Upper word of it.
        weight: A factor.
        fresh: 1 if what `total` holds counts as zero, else 0.
        work: float32[WORK], scratch.
        wide: uint8[GROUP], scratch.
        total: float32[n].
    """
    n = total.shape[0]
    key, more = np.uint32(low), np.uint32(high)
    t = work[:ROOM]
    at = 0
    for place in range(sizes.shape[0] // WIDTH):
        start, end = place * TILE, min(n, (place + 1) * TILE)
        rows = rows_of(end - start)
        size, groups = min(GROUP, WIDTH * rows), max(1, rows // 32)
        for g in range(groups):
            unpack(codes[at : at + size * width // 8], width, size, wide)
            at += size * width // 8
            _numbers(wide, width, t[g * PITCH : g * PITCH + size])
        transform(t, rows)
        factors = work[WORK - WIDTH : WORK]
        for j in range(WIDTH):
            factors[j] = sizes[place * WIDTH + j]
        unturn(t, rows, first + start, key, more, factors)
        for g in range(groups):
            part = total[min(end, start + g * GROUP) : min(end, start + g * GROUP + size)]
            add_to(t[g * PITCH : g * PITCH + size], weight, fresh, part)

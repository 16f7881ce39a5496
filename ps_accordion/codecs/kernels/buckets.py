"""Quantise bucket by bucket: each has a scale of its own, and each of its elements a code of 8, 4 or 2 bits.

A bucket stays in the first-level cache from the sum that makes it to the codes and the residual that it becomes, so that encoding
with feedback reads and writes every vector once.

*Linear* codes stand for (code - half) * scale, with half = 2^(bits - 1). Code 0 is never written.
*Natural* codes, of 8 bits, are a sign and a 7-bit exponent: 2^(exponent - 127) * scale, and 0 where the exponent is 0.

Codes of 4 and 2 bits share bytes in halves and quarters, never side by side: with w bytes a bucket, byte j holds elements j,
j + w, and so on, from the lowest bits up. So neighbours are packed together, without shuffles.

Rounding is by addition. Near `_MAGIC` float32 counts in steps of one, so the sum rounds to a whole number, ties to even, and its
lowest bits are the code.
From 256 to 512 it counts in steps of 2^-15, so the sum with `_FIXED` is a number with 15 binary places, and its bits those of
an integer: stochastic rounding adds 15 bits of noise to it and cuts the places off. What lies a fraction f above a whole number
goes up with probability f, to 2^-16. The largest number that is rounded, `limit` scaled down and up again, is at most
limit (1 + 2^-23), which the steps round to `limit`: no code overflows, and none has to be checked.
Noise is a hash of an element's place and a 64-bit key, the same wherever it is computed. A hash costs as much as the rest, so it
serves two elements, one in either half of a bucket.

While a bucket is made, what comes a page later is fetched from memory: computing and waiting would otherwise take turns. Where
there is one vector to read and nothing to add up, that is done in less than memory takes to answer, and so it is fetched earlier.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import (
    F32,
    F32_IN,
    F64,
    U8,
    bits,
    dither4,
    dither8,
    float32,
    flush,
    helper,
    int32,
    int64,
    kernel,
    off_line,
    peak64,
    powers8,
    real,
    round4,
    round8,
    round_past4,
    round_past8,
)
from .noise import hashed
from .vector import store_row, summed

__all__ = ["DEVIATIONS", "LANES", "LARGEST", "SMALLEST", "dither", "natural", "nearest"]

_PAIRS = 128
"""Elements of which both halves are whole lanes, as those of every bucket but the last are."""

SMALLEST = np.float32(2.0**-126)
"""Scales are normal numbers, and so are their inverses."""
LARGEST = np.float32(2.0**120)
"""Any code of 8 bits stands for something finite. Buckets that need more are clipped."""
DEVIATIONS = 2.5
"""TernGrad clips at so many standard deviations."""
LANES = 64
FAR = 7 << 10
"""How much earlier what is encoded as it is, without a sum, is fetched, in elements: a page and seven pages are 32 KiB."""

_MAGNITUDE = np.int32(0x7FFFFFFF)
_MANTISSA = np.int32(0x007FFFFF)
_INFINITE = np.int32(0x7F800000)
_SMALLEST_BITS = np.int32(1 << 23)
_LARGEST_BITS = np.int32(247 << 23)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_MAGIC = np.float32(1.5 * 2.0**23)
_FIXED = np.float32(256.0)
_STEEPEST = np.float32(2.0**126)
_UNIFORM = np.int32(0x7FFF)
_NOISE = np.int32(0x007FFF80)
_MIDDLE = np.int32(0x40)
_CODE = np.int32(0xFF)
_SIGN = np.int32(0x80)
_EXPONENT = np.int32(0x7F)


@helper
def _peak_rest(a: Any, top: Any) -> Any:
    for j in range(a.shape[0]):
        top = max(top, np.int32(bits(a[j]) & _MAGNITUDE))
    return top


@helper
def _peak(a: Any) -> Any:
    """Return the bits of the largest magnitude."""
    rows = a.shape[0] // LANES
    return _peak_rest(a[LANES * rows :], peak64(a, rows))


@helper
def _clip(v: Any, largest: Any) -> None:
    for j in range(v.shape[0]):
        v[j] = min(max(v[j], -largest), largest)


@helper
def _round_clipped(rest: Any, inverse: Any, scale: Any, limit: Any, magic: Any, codes: Any) -> None:
    """Write codes of `rest` to `codes`, a byte each, and what they do not carry to `rest`."""
    for j in range(rest.shape[0]):
        v = rest[j]
        shifted = min(max(v * inverse, -limit), limit) + magic
        codes[j] = np.uint8(bits(shifted) & _CODE)
        rest[j] = v - (shifted - magic) * scale


@helper
def _round_rows(
    a: Any, row: Any, scale: Any, magic: Any, width: Any, codes: Any, wide: Any, rest: Any, start: Any, straight: Any
) -> None:
    """Do what `_round` does with a whole number of lanes, and nothing to clip."""
    inverse, rows = _ONE / scale, row.shape[0] // _PAIRS
    if straight:
        if width == 4:
            round_past4(row, inverse, scale, magic, codes, rest, start, a, rows)
        else:
            round_past8(row, inverse, scale, magic, codes if width == 8 else wide, rest, start, a, rows)
    elif width == 4:
        round4(row, inverse, scale, magic, codes, a, rows)
    else:
        round8(row, inverse, scale, magic, codes if width == 8 else wide, a, rows)


@helper
def _round(
    a: Any, row: Any, scale: Any, limit: Any, magic: Any, width: Any, codes: Any, wide: Any, rest: Any, start: Any, straight: Any
) -> Any:
    """Write codes of a row, which is made of `a`, to `codes`; return whether what they do not carry is in `rest` already.

    It is where that goes `straight` past the cache, to `rest` from `start` on. Elsewhere it is in the row.
    """
    # Where a scale is the largest, some codes would be too large.
    whole = row.shape[0] % _PAIRS == 0 and scale != LARGEST
    if whole:
        _round_rows(a, row, scale, magic, width, codes, wide, rest, start, straight)
    else:
        _round_clipped(row, _ONE / scale, scale, limit, magic, codes if width == 8 else wide)
        if width == 4:
            _pack(wide, width, row.shape[0], codes)
    if width == 2:
        _pack(wide, width, row.shape[0], codes)
    return whole and straight


@helper
def _code(v: Any, inverse: Any, noise: Any, magic: Any) -> Any:
    """Return the linear code of `v`, rounded by a noise of 15 bits."""
    return np.uint8(np.int32(np.int32(bits(v * inverse + magic) + noise) >> 15) & _CODE)


@helper
def _dither(a: Any, v: Any, inverse: Any, magic: Any, first: Any, low: Any, high: Any, width: Any, codes: Any, wide: Any) -> None:
    """Write stochastically rounded codes of `v` to `codes`; fetch what lies a page behind in `a`."""
    rows = 0 if v.shape[0] % _PAIRS else v.shape[0] // _PAIRS
    if rows and width == 4:
        dither4(v, inverse, magic, first, low, high, codes, a, rows)
        return
    rounded = codes if width == 8 else wide
    if rows:
        dither8(v, inverse, magic, first, low, high, rounded, a, rows)
    else:
        middle = (v.shape[0] + 1) // 2
        for j in range(v.shape[0]):
            word = np.int32(hashed(np.uint32(first + np.uint32(j if j < middle else j - middle)), low, high))
            rounded[j] = _code(v[j], inverse, np.int32(np.int32(word >> 17 if j < middle else word) & _UNIFORM), magic)
    if width != 8:
        _pack(wide, width, v.shape[0], codes)


@helper
def _power_code(v: Any, inverse: Any, noise: Any) -> Any:
    """Return the natural code of `v`, rounded by a noise of 23 bits."""
    # The mantissa is how far it is to the next power of two; below the smallest normal number it is how far from zero.
    # One is the largest, and nothing but noise in its mantissa: the exponent is 127 at most, and the sign stays what it is.
    word = np.int32(bits((v + _ZERO) * inverse) + noise)
    return np.uint8(np.int32(np.int32(word >> 23) & _EXPONENT) | np.int32(np.int32(word >> 24) & _SIGN))


@helper
def _to_powers(a: Any, v: Any, inverse: Any, first: Any, low: Any, high: Any, codes: Any) -> None:
    """Write natural codes of `v`, rounded to a power of two below or above in proportion, to `codes`; `a` as in `_dither`."""
    if v.shape[0] % _PAIRS == 0:
        powers8(v, inverse, first, low, high, codes, a, v.shape[0] // _PAIRS)
        return
    middle = (v.shape[0] + 1) // 2
    for j in range(v.shape[0]):
        word = np.int32(hashed(np.uint32(first + np.uint32(j if j < middle else j - middle)), low, high))
        half = np.int32(word >> 9) if j < middle else np.int32(word << 7)
        codes[j] = _power_code(v[j], inverse, np.int32(np.int32(half & _NOISE) | _MIDDLE))


@helper
def _pack(wide: Any, width: Any, elements: Any, out: Any) -> None:
    """Put codes of 4 or 2 bits, a byte each in `wide`, into `out`; overwrites `wide` behind the elements."""
    count = out.shape[0]
    wide[elements : count * (8 // width)] = 0
    if width == 4:
        one, two = wide[:count], wide[count : 2 * count]
        for j in range(count):
            out[j] = np.uint8(one[j] | np.uint8(two[j] << 4))
    else:
        one, two, three, four = wide[:count], wide[count : 2 * count], wide[2 * count : 3 * count], wide[3 * count : 4 * count]
        for j in range(count):
            out[j] = np.uint8(
                np.uint8(one[j] | np.uint8(two[j] << 2)) | np.uint8(np.uint8(three[j] << 4) | np.uint8(four[j] << 6))
            )


@helper
def _squares(v: Any, lanes: Any) -> Any:
    """Return the sum of squares in the order of `vector.py`."""
    lanes[:] = 0.0
    for start in range(0, v.shape[0], LANES):
        row = v[start : min(start + LANES, v.shape[0])]
        for j in range(row.shape[0]):
            x = np.float64(row[j])
            lanes[j] += x * x
    half = LANES // 2
    while half > 0:
        for j in range(half):
            lanes[j] += lanes[j + half]
        half //= 2
    return lanes[0]


@helper
def _limited(scale: Any) -> Any:
    return min(max(scale, SMALLEST), LARGEST)


@kernel(int32(F32_IN, float32, F32_IN, F32, int64, int64, int64, F32, U8, U8, F32))
def nearest(
    a: Any, scale: Any, b: Any, rest: Any, past: Any, width: Any, bucket: Any, scales: Any, codes: Any, wide: Any, v: Any
) -> Any:
    """Encode `v = a * scale + b` in linear codes, rounded to nearest, and write what they do not carry to `rest`.

    Args:
        a: float32[n].
        scale: A factor.
        b: float32[n], or empty for zero.
        rest: float32[n]; may be `a`.
        past: 1 to write it past the cache, else 0.
        width: Bits of a code: 8, 4 or 2.
        bucket: Elements of a bucket.
        scales: float32[buckets], written.
        codes: uint8[bytes of all codes], written.
        wide: uint8[bucket + 3], scratch.
        v: float32[bucket], scratch.

    Returns:
        The bits of a largest magnitude in `v`. Where it is not finite, the rest is undefined.
    """
    n, per_byte, off = rest.shape[0], 8 // width, off_line(rest)
    limit, half = np.float32((1 << (width - 1)) - 1), np.float32(1 << (width - 1))
    magic = np.float32(_MAGIC + half)
    straight = past != 0 and off == 0
    peak = np.int32(0)
    for i in range(scales.shape[0]):
        start, end = i * bucket, min(n, (i + 1) * bucket)
        row = v[: end - start]
        top = summed(a[start:end], scale, b[start:end], row)
        peak = max(peak, top)
        if top >= _INFINITE:
            return top
        unit = _limited(real(top) / limit)
        scales[i] = unit
        at = start // per_byte
        out = codes[at : at + (end - start + per_byte - 1) // per_byte]
        if not _round(a[start:end], row, unit, limit, magic, width, out, wide, rest, start, straight):
            store_row(row, rest, start, end, off, past)
    flush(rest)
    return peak


@kernel(int32(F32_IN, float32, F32_IN, F32, int64, int64, int64, int64, int64, F32, U8, U8, F64))
def dither(
    a: Any,
    scale: Any,
    b: Any,
    v: Any,
    width: Any,
    bucket: Any,
    clipped: Any,
    low: Any,
    high: Any,
    scales: Any,
    codes: Any,
    wide: Any,
    lanes: Any,
) -> Any:
    """Encode `v = a * scale + b` in linear codes, rounded stochastically.

    Args:
        a: float32[n].
        scale: A factor.
        b: float32[n], or empty for zero.
        v: float32[bucket], scratch.
        width: Bits of a code: 8, 4 or 2.
        bucket: Elements of a bucket.
        clipped: 1 to clip at `DEVIATIONS` times the root of the mean square of a bucket, else 0.
        low: Lower word of the key of the noise.
        high: Upper word of it.
        scales: float32[buckets], written.
        codes: uint8[bytes of all codes], written.
        wide: uint8[bucket + 3], scratch.
        lanes: float64[LANES], scratch.

    Returns:
        The bits of a largest magnitude in `v`. Where it is not finite, the rest is undefined.
    """
    n, per_byte = a.shape[0], 8 // width
    limit, half = np.float32((1 << (width - 1)) - 1), np.float32(1 << (width - 1))
    magic = np.float32(_FIXED + half)
    key, more = np.uint32(low), np.uint32(high)
    # There is nothing to add up: `a` is what is to be encoded, and needs no copy.
    bare = b.shape[0] == 0 and scale == _ONE and clipped == 0
    peak = np.int32(0)
    for i in range(scales.shape[0]):
        start, end = i * bucket, min(n, (i + 1) * bucket)
        row = v[: end - start]
        top = _peak(a[start:end]) if bare else summed(a[start:end], scale, b[start:end], row)
        peak = max(peak, top)
        if top >= _INFINITE:
            return top
        largest = min(real(top), limit * LARGEST)
        if clipped != 0:
            largest = min(largest, np.float32(DEVIATIONS * np.sqrt(_squares(row, lanes) / (end - start))))
        scales[i] = max(largest / limit, SMALLEST)
        inverse = min(limit / largest, _STEEPEST)
        at = start // per_byte
        out = codes[at : at + (end - start + per_byte - 1) // per_byte]
        if bare and largest == real(top):
            _dither(a[min(start + FAR, n) :], a[start:end], inverse, magic, np.uint32(start), key, more, width, out, wide)
        else:
            if bare:
                summed(a[start:end], scale, b[start:end], row)
            if largest < real(top):
                _clip(row, largest)
            _dither(a[start:end], row, inverse, magic, np.uint32(start), key, more, width, out, wide)
    return peak


@kernel(int32(F32_IN, float32, F32_IN, F32, int64, int64, int64, F32, U8))
def natural(a: Any, scale: Any, b: Any, v: Any, bucket: Any, low: Any, high: Any, scales: Any, codes: Any) -> Any:
    """Encode `v = a * scale + b` in natural codes; see `dither`."""
    n = a.shape[0]
    key, more = np.uint32(low), np.uint32(high)
    bare = b.shape[0] == 0 and scale == _ONE
    peak = np.int32(0)
    for i in range(scales.shape[0]):
        start, end = i * bucket, min(n, (i + 1) * bucket)
        row = v[: end - start]
        top = _peak(a[start:end]) if bare else summed(a[start:end], scale, b[start:end], row)
        peak = max(peak, top)
        if top >= _INFINITE:
            return top
        # The power of two that is no smaller than the largest.
        unit = real(np.int32(min(max(np.int32(np.int32(top + _MANTISSA) & ~_MANTISSA), _SMALLEST_BITS), _LARGEST_BITS)))
        scales[i] = unit
        if bare and real(top) <= unit:
            _to_powers(a[min(start + FAR, n) :], a[start:end], _ONE / unit, np.uint32(start), key, more, codes[start:end])
        else:
            if bare:
                summed(a[start:end], scale, b[start:end], row)
            if real(top) > unit:
                _clip(row, unit)
            _to_powers(a[start:end], row, _ONE / unit, np.uint32(start), key, more, codes[start:end])
    return peak

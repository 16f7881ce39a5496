"""Quantise bucket by bucket: each has a scale of its own, and each of its elements a code of 8, 4 or 2 bits.

A bucket stays in the first-level cache from the sum that makes it to the codes and the residual that it becomes, so that encoding
with feedback reads and writes every vector once.

*Linear* codes stand for (code - half) * scale, with half = 2^(bits - 1). Code 0 is never written.
*Natural* codes, of 8 bits, are a sign and a 7-bit exponent: 2^(exponent - 127) * scale, and 0 where the exponent is 0.

Codes of 4 and 2 bits share bytes in halves and quarters, never side by side: with w bytes a bucket, byte j holds elements j,
j + w, and so on, from the lowest bits up. So neighbours are packed together, without shuffles.

Rounding is by addition: near `_MAGIC` float32 counts in steps of one, so the sum rounds to a whole number, ties to even, and its
lowest bits are the code.
Stochastic rounding adds noise in (-1/2, 1/2) first: what lies a fraction f above a whole number goes up with probability f.
Noise is a hash of an element's place and a 64-bit key, the same wherever it is computed. A hash costs as much as the rest, so it
serves two elements, one in either half of a bucket, with 16 bits each: probabilities are right to 2^-17.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import F32, F32_IN, F64, U8, U8_IN, bits, boolean, float32, helper, int32, int64, kernel, real, void

__all__ = ["DEVIATIONS", "LANES", "LARGEST", "SMALLEST", "add", "begin", "check", "dither", "natural", "nearest"]

SMALLEST = np.float32(2.0**-126)
"""Scales are normal numbers, and so are their inverses."""
LARGEST = np.float32(2.0**120)
"""Any code of 8 bits stands for something finite. Buckets that need more are clipped."""
DEVIATIONS = 2.5
"""TernGrad clips at so many standard deviations."""
LANES = 64

_MAGNITUDE = np.int32(0x7FFFFFFF)
_MANTISSA = np.int32(0x007FFFFF)
_INFINITE = np.int32(0x7F800000)
_SMALLEST_BITS = np.int32(1 << 23)
_LARGEST_BITS = np.int32(247 << 23)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_HALF = np.float32(0.5)
_MAGIC = np.float32(1.5 * 2.0**23)
_STEP = np.float32(2.0**-16)
_NOISE = np.int32(0x007FFF80)
_MIDDLE = np.int32(0x40)
_CODE = np.int32(0xFF)
_SIGN = np.int32(0x80)
_EXPONENT = np.int32(0x7F)


@helper
def _sum(a: Any, scale: Any, b: Any, out: Any) -> Any:
    """Write `a * scale + b` (two roundings) to `out`; return the bits of its largest magnitude. An empty `b` is zero."""
    top = np.int32(0)
    if b.shape[0] == 0:
        for j in range(out.shape[0]):
            v = a[j] * scale + _ZERO
            out[j] = v
            top = max(top, np.int32(bits(v) & _MAGNITUDE))
    else:
        for j in range(out.shape[0]):
            v = a[j] * scale + b[j]
            out[j] = v
            top = max(top, np.int32(bits(v) & _MAGNITUDE))
    return top


@helper
def _noise(place: Any, low: Any, high: Any) -> Any:
    """Return 32 bits that follow from a place and a key of two words."""
    # 32 bits wide at every step, or it is computed in 64, at half the speed.
    x = np.uint32(place ^ low)
    x = np.uint32(x ^ np.uint32(x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ np.uint32(x >> np.uint32(15)))
    x = np.uint32(np.uint32(x ^ high) * np.uint32(0x846CA68B))
    return np.uint32(x ^ np.uint32(x >> np.uint32(16)))


@helper
def _round(rest: Any, inverse: Any, scale: Any, limit: Any, magic: Any, codes: Any) -> None:
    """Write codes of `rest` to `codes`, and what they do not carry to `rest`."""
    for j in range(rest.shape[0]):
        v = rest[j]
        shifted = min(max(v * inverse, -limit), limit) + magic
        codes[j] = np.uint8(bits(shifted) & _CODE)
        rest[j] = v - (shifted - magic) * scale


@helper
def _code(v: Any, inverse: Any, noise: Any, limit: Any, magic: Any) -> Any:
    """Return the linear code of `v`, rounded by a noise of 16 signed bits."""
    shifted = min(max(v * inverse + (np.float32(noise) + _HALF) * _STEP, -limit), limit) + magic
    return np.uint8(bits(shifted) & _CODE)


@helper
def _dither(v: Any, inverse: Any, limit: Any, magic: Any, first: Any, low: Any, high: Any, codes: Any) -> None:
    """Write stochastically rounded codes of `v` to `codes`."""
    middle = (v.shape[0] + 1) // 2
    front, back, front_codes, back_codes = v[:middle], v[middle:], codes[:middle], codes[middle : v.shape[0]]
    for j in range(back.shape[0]):
        word = np.int32(_noise(np.uint32(first + np.uint32(j)), low, high))
        front_codes[j] = _code(front[j], inverse, np.int32(word >> 16), limit, magic)
        back_codes[j] = _code(back[j], inverse, np.int32(np.int32(word << 16) >> 16), limit, magic)
    for j in range(back.shape[0], middle):
        word = np.int32(_noise(np.uint32(first + np.uint32(j)), low, high))
        front_codes[j] = _code(front[j], inverse, np.int32(word >> 16), limit, magic)


@helper
def _power_code(v: Any, inverse: Any, noise: Any) -> Any:
    """Return the natural code of `v`, rounded by a noise of 23 bits."""
    word = bits(v * inverse)
    # The mantissa is how far it is to the next power of two; below the smallest normal number it is how far from zero.
    exponent = min(np.int32(np.int32(np.int32(word & _MAGNITUDE) + noise) >> 23), _EXPONENT)
    return np.uint8(exponent | np.int32(np.int32(word >> 24) & _SIGN))


@helper
def _to_powers(v: Any, inverse: Any, first: Any, low: Any, high: Any, codes: Any) -> None:
    """Write natural codes of `v`, rounded to a power of two below or above in proportion, to `codes`."""
    middle = (v.shape[0] + 1) // 2
    front, back, front_codes, back_codes = v[:middle], v[middle:], codes[:middle], codes[middle : v.shape[0]]
    for j in range(back.shape[0]):
        word = np.int32(_noise(np.uint32(first + np.uint32(j)), low, high))
        front_codes[j] = _power_code(front[j], inverse, np.int32(np.int32(np.int32(word >> 9) & _NOISE) | _MIDDLE))
        back_codes[j] = _power_code(back[j], inverse, np.int32(np.int32(np.int32(word << 7) & _NOISE) | _MIDDLE))
    for j in range(back.shape[0], middle):
        word = np.int32(_noise(np.uint32(first + np.uint32(j)), low, high))
        front_codes[j] = _power_code(front[j], inverse, np.int32(np.int32(np.int32(word >> 9) & _NOISE) | _MIDDLE))


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
def _unpack(codes: Any, width: Any, wide: Any) -> None:
    """Write codes of 4 or 2 bits to `wide`, a byte each."""
    count = codes.shape[0]
    if width == 4:
        one, two = wide[:count], wide[count : 2 * count]
        for j in range(count):
            one[j] = np.uint8(codes[j] & 15)
            two[j] = np.uint8(codes[j] >> 4)
    else:
        one, two, three, four = wide[:count], wide[count : 2 * count], wide[2 * count : 3 * count], wide[3 * count : 4 * count]
        for j in range(count):
            one[j] = np.uint8(codes[j] & 3)
            two[j] = np.uint8(np.uint8(codes[j] >> 2) & 3)
            three[j] = np.uint8(np.uint8(codes[j] >> 4) & 3)
            four[j] = np.uint8(codes[j] >> 6)


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


@kernel(int32(F32_IN, float32, F32_IN, F32, int64, int64, F32, U8, U8))
def nearest(a: Any, scale: Any, b: Any, rest: Any, width: Any, bucket: Any, scales: Any, codes: Any, wide: Any) -> Any:
    """Encode `v = a * scale + b` in linear codes, rounded to nearest, and write what they do not carry to `rest`.

    Args:
        a: float32[n].
        scale: A factor.
        b: float32[n], or empty for zero.
        rest: float32[n]; may be `a`.
        width: Bits of a code: 8, 4 or 2.
        bucket: Elements of a bucket.
        scales: float32[buckets], written.
        codes: uint8[bytes of all codes], written.
        wide: uint8[bucket + 3], scratch.

    Returns:
        The bits of a largest magnitude in `v`. Where it is not finite, the rest is undefined.
    """
    n, per_byte = rest.shape[0], 8 // width
    limit, half = np.float32((1 << (width - 1)) - 1), np.float32(1 << (width - 1))
    magic = np.float32(_MAGIC + half)
    peak = np.int32(0)
    for i in range(scales.shape[0]):
        start, end = i * bucket, min(n, (i + 1) * bucket)
        row = rest[start:end]
        top = _sum(a[start:end], scale, b[start:end], row)
        peak = max(peak, top)
        if top >= _INFINITE:
            return top
        unit = _limited(real(top) / limit)
        scales[i] = unit
        at = start // per_byte
        out = codes[at : at + (end - start + per_byte - 1) // per_byte]
        if width == 8:
            _round(row, _ONE / unit, unit, limit, magic, out)
        else:
            _round(row, _ONE / unit, unit, limit, magic, wide)
            _pack(wide, width, end - start, out)
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
    magic = np.float32(_MAGIC + half)
    key, more = np.uint32(low), np.uint32(high)
    peak = np.int32(0)
    for i in range(scales.shape[0]):
        start, end = i * bucket, min(n, (i + 1) * bucket)
        row = v[: end - start]
        top = _sum(a[start:end], scale, b[start:end], row)
        peak = max(peak, top)
        if top >= _INFINITE:
            return top
        largest = real(top)
        if clipped != 0:
            largest = min(largest, np.float32(DEVIATIONS * np.sqrt(_squares(row, lanes) / (end - start))))
        unit = _limited(largest / limit)
        scales[i] = unit
        at = start // per_byte
        out = codes[at : at + (end - start + per_byte - 1) // per_byte]
        if width == 8:
            _dither(row, _ONE / unit, limit, magic, np.uint32(start), key, more, out)
        else:
            _dither(row, _ONE / unit, limit, magic, np.uint32(start), key, more, wide)
            _pack(wide, width, end - start, out)
    return peak


@kernel(int32(F32_IN, float32, F32_IN, F32, int64, int64, int64, F32, U8))
def natural(a: Any, scale: Any, b: Any, v: Any, bucket: Any, low: Any, high: Any, scales: Any, codes: Any) -> Any:
    """Encode `v = a * scale + b` in natural codes; see `dither`."""
    n = a.shape[0]
    key, more = np.uint32(low), np.uint32(high)
    peak = np.int32(0)
    for i in range(scales.shape[0]):
        start, end = i * bucket, min(n, (i + 1) * bucket)
        row = v[: end - start]
        top = _sum(a[start:end], scale, b[start:end], row)
        peak = max(peak, top)
        if top >= _INFINITE:
            return top
        # The power of two that is no smaller than the largest.
        unit = min(max(np.int32(np.int32(top + _MANTISSA) & ~_MANTISSA), _SMALLEST_BITS), _LARGEST_BITS)
        scales[i] = real(np.int32(unit))
        _to_powers(row, _ONE / real(np.int32(unit)), np.uint32(start), key, more, codes[start:end])
    return peak


@helper
def _power(code: Any) -> Any:
    word = np.int32(code)
    return real(np.int32(np.int32(np.int32(word & _EXPONENT) << 23) | np.int32(np.int32(word & _SIGN) << 24)))


@helper
def _begin(codes: Any, half: Any, scale: Any, weight: Any, total: Any) -> None:
    for j in range(total.shape[0]):
        total[j] = _ZERO + weight * ((np.float32(codes[j]) - half) * scale)


@helper
def _add(codes: Any, half: Any, scale: Any, weight: Any, total: Any) -> None:
    for j in range(total.shape[0]):
        total[j] += weight * ((np.float32(codes[j]) - half) * scale)


@helper
def _begin_powers(codes: Any, scale: Any, weight: Any, total: Any) -> None:
    for j in range(total.shape[0]):
        total[j] = _ZERO + weight * (_power(codes[j]) * scale)


@helper
def _add_powers(codes: Any, scale: Any, weight: Any, total: Any) -> None:
    for j in range(total.shape[0]):
        total[j] += weight * (_power(codes[j]) * scale)


@kernel(void(U8_IN, F32_IN, int64, int64, int64, float32, U8, F32))
def begin(codes: Any, scales: Any, width: Any, bucket: Any, powers: Any, weight: Any, wide: Any, total: Any) -> None:
    """Set `total := 0 + weight * D`.

    Args:
        codes: uint8[bytes of all codes].
        scales: float32[buckets].
        width: Bits of a code: 8, 4 or 2.
        bucket: Elements of a bucket.
        powers: 1 where codes are natural, else 0.
        weight: A factor.
        wide: uint8[bucket + 3], scratch.
        total: float32[n].
    """
    n, per_byte, half = total.shape[0], 8 // width, np.float32(1 << (width - 1))
    for i in range(scales.shape[0]):
        start, end = i * bucket, min(n, (i + 1) * bucket)
        at = start // per_byte
        part = codes[at : at + (end - start + per_byte - 1) // per_byte]
        if powers != 0:
            _begin_powers(part, scales[i], weight, total[start:end])
        elif width == 8:
            _begin(part, half, scales[i], weight, total[start:end])
        else:
            _unpack(part, width, wide)
            _begin(wide, half, scales[i], weight, total[start:end])


@kernel(void(U8_IN, F32_IN, int64, int64, int64, float32, U8, F32))
def add(codes: Any, scales: Any, width: Any, bucket: Any, powers: Any, weight: Any, wide: Any, total: Any) -> None:
    """Set `total := total + weight * D` (three roundings); see `begin`."""
    n, per_byte, half = total.shape[0], 8 // width, np.float32(1 << (width - 1))
    for i in range(scales.shape[0]):
        start, end = i * bucket, min(n, (i + 1) * bucket)
        at = start // per_byte
        part = codes[at : at + (end - start + per_byte - 1) // per_byte]
        if powers != 0:
            _add_powers(part, scales[i], weight, total[start:end])
        elif width == 8:
            _add(part, half, scales[i], weight, total[start:end])
        else:
            _unpack(part, width, wide)
            _add(wide, half, scales[i], weight, total[start:end])


@kernel(boolean(F32_IN))
def check(scales: Any) -> Any:
    """Return whether each scale lies between `SMALLEST` and `LARGEST`."""
    least, most = _SMALLEST_BITS, _LARGEST_BITS
    for i in range(scales.shape[0]):
        word = bits(scales[i])
        least, most = min(least, word), max(most, word)
    return least == _SMALLEST_BITS and most == _LARGEST_BITS

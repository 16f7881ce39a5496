"""Make numbers of codes again, bucket by bucket; `buckets.py` says what the codes are and writes them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import (
    F32,
    F32_IN,
    U8,
    U8_IN,
    add4,
    add8,
    add_powers8,
    begin4,
    begin8,
    begin_powers8,
    bits,
    boolean,
    float32,
    helper,
    int64,
    kernel,
    real,
    void,
)
from .vector import LANES

__all__ = ["add", "begin", "check"]

_PAIRS = 128
"""Elements of which both halves are whole lanes."""
_SMALLEST_BITS = np.int32(1 << 23)
_LARGEST_BITS = np.int32(247 << 23)
_ZERO = np.float32(0.0)
_SIGN = np.int32(0x80)
_EXPONENT = np.int32(0x7F)


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


@helper
def _begin_bucket(codes: Any, width: Any, powers: Any, scale: Any, weight: Any, wide: Any, total: Any) -> None:
    n, half = total.shape[0], np.float32(1 << (width - 1))
    if n % _PAIRS == 0 and powers != 0:
        begin_powers8(codes, half, scale, weight, total, n // LANES)
    elif n % _PAIRS == 0 and width == 8:
        begin8(codes, half, scale, weight, total, n // LANES)
    elif n % _PAIRS == 0 and width == 4:
        begin4(codes, half, scale, weight, total, n // _PAIRS)
    elif powers != 0:
        _begin_powers(codes, scale, weight, total)
    elif width == 8:
        _begin(codes, half, scale, weight, total)
    else:
        _unpack(codes, width, wide)
        _begin(wide, half, scale, weight, total)


@helper
def _add_bucket(codes: Any, width: Any, powers: Any, scale: Any, weight: Any, wide: Any, total: Any) -> None:
    n, half = total.shape[0], np.float32(1 << (width - 1))
    if n % _PAIRS == 0 and powers != 0:
        add_powers8(codes, half, scale, weight, total, n // LANES)
    elif n % _PAIRS == 0 and width == 8:
        add8(codes, half, scale, weight, total, n // LANES)
    elif n % _PAIRS == 0 and width == 4:
        add4(codes, half, scale, weight, total, n // _PAIRS)
    elif powers != 0:
        _add_powers(codes, scale, weight, total)
    elif width == 8:
        _add(codes, half, scale, weight, total)
    else:
        _unpack(codes, width, wide)
        _add(wide, half, scale, weight, total)


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
    n, per_byte = total.shape[0], 8 // width
    for i in range(scales.shape[0]):
        start, end = i * bucket, min(n, (i + 1) * bucket)
        at = start // per_byte
        part = codes[at : at + (end - start + per_byte - 1) // per_byte]
        _begin_bucket(part, width, powers, scales[i], weight, wide, total[start:end])


@kernel(void(U8_IN, F32_IN, int64, int64, int64, float32, U8, F32))
def add(codes: Any, scales: Any, width: Any, bucket: Any, powers: Any, weight: Any, wide: Any, total: Any) -> None:
    """Set `total := total + weight * D` (three roundings); see `begin`."""
    n, per_byte = total.shape[0], 8 // width
    for i in range(scales.shape[0]):
        start, end = i * bucket, min(n, (i + 1) * bucket)
        at = start // per_byte
        part = codes[at : at + (end - start + per_byte - 1) // per_byte]
        _add_bucket(part, width, powers, scales[i], weight, wide, total[start:end])


@kernel(boolean(F32_IN))
def check(scales: Any) -> Any:
    """Return whether each scale lies between the smallest and the largest that an encoder writes."""
    least, most = _SMALLEST_BITS, _LARGEST_BITS
    for i in range(scales.shape[0]):
        word = bits(scales[i])
        least, most = min(least, word), max(most, word)
    return least == _SMALLEST_BITS and most == _LARGEST_BITS

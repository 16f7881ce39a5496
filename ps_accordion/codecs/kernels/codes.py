"""Make numbers of codes again, bucket by bucket; `buckets.py` says what the codes are and writes them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import (
    F32,
    F32_IN,
    U8,
    U8_IN,
    U32_IN,
    add4,
    add8,
    add_powers8,
    begin4,
    begin8,
    begin_powers8,
    bits,
    boolean,
    flush,
    helper,
    int64,
    kernel,
    off_line,
    real,
    void,
)
from .vector import LANES, store_row

__all__ = ["MOST", "PIECE", "check", "gather"]

MOST = 8
"""Members that are added up at once: each pass more reads and writes the sum again."""
PIECE = 1 << 12
"""Elements that all members are added to before the next, so that they stay in the first-level cache: the largest bucket, and
whole buckets of all other sizes."""

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


@kernel(void(int64, int64, int64, U32_IN, F32_IN, *[U8_IN] * MOST, *[F32_IN] * MOST, U8, F32, int64, F32))
def gather(  # noqa: D417  # the eight codes and scales are described once
    count: Any, begun: Any, powers: Any, shapes: Any, weights: Any,
    codes0: Any, codes1: Any, codes2: Any, codes3: Any, codes4: Any, codes5: Any, codes6: Any, codes7: Any,
    scales0: Any, scales1: Any, scales2: Any, scales3: Any, scales4: Any, scales5: Any, scales6: Any, scales7: Any,
    wide: Any, row: Any, past: Any, total: Any,
) -> None:  # fmt: skip
    """Set `total := total + weight * D` (three roundings) for one member after the other, piece by piece of `total`.

    Args:
        count: How many members there are, 1 to `MOST`. What is given for the others is not read.
        begun: 0 where `total` counts as zero, whatever it holds, and else 1.
        powers: 1 where codes are natural, else 0.
        shapes: uint32[2 * count], of each member the bits of a code, 8, 4 or 2, and the elements of a bucket.
        weights: float32[count], factors.
        codes0, ...: uint8[bytes of all codes] of each member.
        scales0, ...: float32[buckets] of each member.
        wide: uint8[elements of the largest bucket + 3], scratch.
        row: float32[PIECE], scratch.
        past: 1 to write past the cache, where `begun` is 0, else 0.
        total: float32[n].
    """
    n, off = total.shape[0], off_line(total)
    all_codes = (codes0, codes1, codes2, codes3, codes4, codes5, codes6, codes7)
    all_scales = (scales0, scales1, scales2, scales3, scales4, scales5, scales6, scales7)
    for begin in range(0, n, PIECE):
        stop = min(n, begin + PIECE)
        piece = row[: stop - begin] if past != 0 else total[begin:stop]
        for k in range(count):
            codes, scales, weight = all_codes[k], all_scales[k], weights[k]
            width, bucket = np.int64(shapes[2 * k]), np.int64(shapes[2 * k + 1])
            per_byte = 8 // width
            for i in range(begin // bucket, (stop + bucket - 1) // bucket):
                start, end = i * bucket, min(n, (i + 1) * bucket)
                at = start // per_byte
                part = codes[at : at + (end - start + per_byte - 1) // per_byte]
                if begun != 0 or k != 0:
                    _add_bucket(part, width, powers, scales[i], weight, wide, piece[start - begin : end - begin])
                else:
                    _begin_bucket(part, width, powers, scales[i], weight, wide, piece[start - begin : end - begin])
        if past != 0:
            store_row(row, total, begin, stop, off, past)
    flush(total)


@kernel(boolean(F32_IN))
def check(scales: Any) -> Any:
    """Return whether each scale lies between the smallest and the largest that an encoder writes."""
    least, most = _SMALLEST_BITS, _LARGEST_BITS
    for i in range(scales.shape[0]):
        word = bits(scales[i])
        least, most = min(least, word), max(most, word)
    return least == _SMALLEST_BITS and most == _LARGEST_BITS

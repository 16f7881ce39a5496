"""bfloat16 by integer arithmetic: the upper half of a float32, rounded to nearest even, never to infinity.

A code has the sign and the exponent of float32 and 7 of its 23 mantissa bits, so rounding is an addition to the bits, denormal
numbers included, and a carry out of the mantissa goes into the exponent where it belongs.
What would round to infinity becomes `LARGEST`. A number and its code differ by a whole multiple of the number's last place, and
by fewer than 2^16 of them: their difference is exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import F32, F32_IN, U16, U16_IN, bits, float32, helper, int32, kernel, real, void

__all__ = ["LARGEST", "add", "begin", "decode", "encode", "peak"]

LARGEST = 0x7F7F
"""Code of the largest magnitude that is written, 255 * 2^120: a code above it is infinite or not a number."""

_MAGNITUDE = np.int32(0x7FFFFFFF)
_SIGN = np.int32(-(2**31))
_BELOW_HALF = np.int32(0x7FFF)
_ONE = np.int32(1)
_KEPT = np.int32(~0xFFFF)
_LARGEST_BITS = np.int32(LARGEST << 16)
_CODE = np.int32(0xFFFF)
_ZERO = np.float32(0.0)


@helper
def _rounded(v: Any) -> Any:
    """Return the bits of what is sent for `v`."""
    word = bits(v)
    u = np.int32(word & _MAGNITUDE)
    odd = np.int32(np.int32(u >> 16) & _ONE)
    return np.int32(min(np.int32(np.int32(u + _BELOW_HALF + odd) & _KEPT), _LARGEST_BITS) | np.int32(word & _SIGN))


@helper
def _from_code(code: Any) -> Any:
    return real(np.int32(np.int32(code) << 16))


@kernel(int32(F32_IN, float32, F32_IN, U16, F32))
def encode(a: Any, scale: Any, b: Any, codes: Any, rest: Any) -> Any:
    """Encode `v = a * scale + b` (two roundings): its codes, and what they do not carry.

    Args:
        a: float32[n].
        scale: A factor.
        b: float32[n], or empty for zero.
        codes: uint16[n], written.
        rest: float32[n], written; may be `a`.

    Returns:
        The bits of the largest magnitude in `v`. Where it is not finite, what is written is undefined.
    """
    top = np.int32(0)
    if b.shape[0] == 0:
        for i in range(codes.shape[0]):
            v = a[i] * scale + _ZERO
            word = _rounded(v)
            codes[i] = np.uint16(np.int32(word >> 16) & _CODE)
            rest[i] = v - real(word)
            top = max(top, np.int32(bits(v) & _MAGNITUDE))
    else:
        for i in range(codes.shape[0]):
            v = a[i] * scale + b[i]
            word = _rounded(v)
            codes[i] = np.uint16(np.int32(word >> 16) & _CODE)
            rest[i] = v - real(word)
            top = max(top, np.int32(bits(v) & _MAGNITUDE))
    return top


@kernel(void(U16_IN, F32))
def decode(codes: Any, out: Any) -> None:
    """Write what codes stand for to `out`."""
    for i in range(codes.shape[0]):
        out[i] = _from_code(codes[i])


@kernel(void(U16_IN, float32, F32))
def begin(codes: Any, weight: Any, total: Any) -> None:
    """Set `total := 0 + weight * D`."""
    for i in range(codes.shape[0]):
        total[i] = _ZERO + weight * _from_code(codes[i])


@kernel(void(U16_IN, float32, F32))
def add(codes: Any, weight: Any, total: Any) -> None:
    """Set `total := total + weight * D` (two roundings)."""
    for i in range(codes.shape[0]):
        total[i] += weight * _from_code(codes[i])


@kernel(int32(U16_IN))
def peak(codes: Any) -> Any:
    """Return the largest magnitude code: above `LARGEST` no encoder wrote it."""
    top = np.uint16(0)
    for i in range(codes.shape[0]):
        top = max(top, np.uint16(codes[i] & np.uint16(0x7FFF)))
    return np.int32(top)

"""Half precision by integer arithmetic: IEEE binary16, round to nearest even, saturating at `LARGEST`.

No hardware conversion is used, so that hosts with and without it give the same bytes.
Both branches of each conversion are computed and one is chosen, which vectorises.
The inputs are scaled by a power of two beforehand (see `codecs/values.py`), so infinities and NaN never get here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import F32, F32_IN, U16, U16_IN, bits, float32, helper, int32, kernel, real, void

__all__ = ["LARGEST", "add", "decode", "encode", "from_half", "peak"]

LARGEST = 0x77FF
"""Code of 32752, the largest magnitude that is written. Scaled values lie below 2^15 = 32768; a code above this one could decode
to infinity at the largest exponent."""

_MAGNITUDE = np.int32(0x7FFFFFFF)
_SMALLEST_NORMAL = np.int32(0x38800000)  # bits of 2^-14 as float32
_REBIAS = np.int32(112 << 23)  # float32 exponents are biased by 127, halves by 15
_ROUND = np.int32(0x0FFF)
_ONE = np.int32(1)
_HALF = np.float32(0.5)
_HALF_BITS = np.int32(0x3F000000)
_KEPT = np.int32(~0x1FFF)
_LARGEST_BITS = np.int32(0x46FFE000)  # bits of 32752 as float32
_SIGN_BIT = np.int32(-(2**31))
_SIGN = np.int32(0x8000)
_CODE = np.int32(0x7FFF)
_FIRST_NORMAL = np.int32(0x0400)
_QUANTUM = np.float32(2.0**-24)


@helper
def from_half(code: Any) -> Any:
    """Return the number of a code, float32."""
    m = np.int32(code & _CODE)
    normal = real(np.int32(np.int32(m << 13) + _REBIAS))
    # Not by a multiplication of the shifted bits: those are denormal floats, which some threads flush to zero.
    tiny = np.float32(m) * _QUANTUM
    magnitude = normal if m >= _FIRST_NORMAL else tiny
    return real(np.int32(bits(magnitude) | np.int32(np.int32(code & _SIGN) << 16)))


@kernel(void(F32_IN, float32, float32, U16, F32))
def encode(values: Any, scale: Any, inverse: Any, codes: Any, rest: Any) -> None:
    """Write halves of `values * scale` to `codes`, and `values - half * inverse` to `rest` (other memory than `values`)."""
    for i in range(codes.shape[0]):
        x = values[i]
        word = bits(x * scale)
        u = np.int32(word & _MAGNITUDE)
        # A normal half keeps 10 of the 23 mantissa bits: round them away, ties to even.
        odd = np.int32((u >> 13) & _ONE)
        rounded = min(np.int32((u + _ROUND + odd) & _KEPT), _LARGEST_BITS)
        # In [0.5, 1) a float32 counts in steps of 2^-24, the quantum of subnormal halves: the addition rounds for us.
        shifted = real(u) + _HALF
        normal = u >= _SMALLEST_NORMAL
        code = np.int32((rounded - _REBIAS) >> 13) if normal else np.int32(bits(shifted) - _HALF_BITS)
        magnitude = real(rounded) if normal else shifted - _HALF
        codes[i] = np.uint16(code | np.int32(np.int32(word >> 16) & _SIGN))
        rest[i] = x - real(np.int32(bits(magnitude) | np.int32(word & _SIGN_BIT))) * inverse


@kernel(void(U16_IN, float32, F32))
def decode(codes: Any, inverse: Any, out: Any) -> None:
    """Write `half * inverse` to `out`."""
    for i in range(codes.shape[0]):
        out[i] = from_half(np.int32(codes[i])) * inverse


@kernel(void(U16_IN, float32, float32, F32))
def add(codes: Any, inverse: Any, weight: Any, total: Any) -> None:
    """Set `total := total + weight * (half * inverse)`."""
    for i in range(codes.shape[0]):
        total[i] += weight * (from_half(np.int32(codes[i])) * inverse)


@kernel(int32(U16_IN))
def peak(codes: Any) -> Any:
    """Return the largest magnitude code: above `LARGEST` no encoder wrote it."""
    top = np.uint16(0)
    for i in range(codes.shape[0]):
        top = max(top, np.uint16(codes[i] & np.uint16(0x7FFF)))
    return np.int32(top)

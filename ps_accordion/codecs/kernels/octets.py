"""Whole numbers in signed bytes: round to nearest, ties to even, saturating at 127; -128 is not written.

The inputs are scaled by a power of two beforehand (see `codecs/values.py`) and lie below 128: infinities and NaN never get here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import F32, F32_IN, U8, U8_IN, bits, boolean, float32, kernel, void

__all__ = ["decode", "encode", "lowest"]

_LARGEST = np.float32(127.0)
_MAGIC = np.float32(1.5 * 2.0**23)
"""Near it float32 counts in steps of one: the sum rounds to a whole number, and its lowest bits are the code."""


@kernel(void(F32_IN, float32, float32, U8, F32))
def encode(values: Any, scale: Any, inverse: Any, codes: Any, rest: Any) -> None:
    """Write `values * scale`, rounded, to `codes`, and `values - rounded * inverse` to `rest` (other memory than `values`)."""
    for i in range(codes.shape[0]):
        x = values[i]
        shifted = min(max(x * scale, -_LARGEST), _LARGEST) + _MAGIC
        codes[i] = np.uint8(bits(shifted) & np.int32(0xFF))
        rest[i] = x - (shifted - _MAGIC) * inverse


@kernel(void(U8_IN, float32, F32))
def decode(codes: Any, inverse: Any, out: Any) -> None:
    """Write `byte * inverse` to `out`."""
    for i in range(codes.shape[0]):
        out[i] = np.float32(np.int8(codes[i])) * inverse


@kernel(boolean(U8_IN))
def lowest(codes: Any) -> Any:
    """Return whether one of the bytes is -128, which no encoder writes."""
    found = False
    for i in range(codes.shape[0]):
        found = found or codes[i] == np.uint8(0x80)
    return found

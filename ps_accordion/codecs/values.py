"""How numbers stand in payloads: float32, or halves with one power-of-two scale.

A block of values is a preamble of 4 bytes and the values, little-endian:

    u8   format       0 float32, 1 half
    u8   zero
    i16  exponent     a half h stands for h * 2^exponent; 0 for float32
    ...  values

The exponent is chosen from the largest magnitude so that scaled values fill [2^14, 2^15): nothing overflows, at 1e38 or
anywhere else, and what underflows is 2^-39 of the largest. Scaling by a power of two is exact,
so the only loss is the rounding to 11 significant bits, and `value - D(value)` is exact in float32.
"""

from __future__ import annotations

import math
import struct
import sys
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import PayloadError
from . import kernels
from .base import FloatVector, Payload
from .packing import INFINITE
from .workspace import borrow

__all__ = [
    "FP16",
    "FP32",
    "PREAMBLE",
    "ValueFormat",
    "check",
    "decoded",
    "exponent_of",
    "load",
    "load_into",
    "power",
    "read_preamble",
    "store",
    "values_of",
    "width",
]

ValueFormat = Literal["fp16", "fp32"]
PREAMBLE: Final = 4
FP32: Final = 0
FP16: Final = 1

_HEAD = struct.Struct("<BBh")
_LOWEST, _HIGHEST = -126, 113
"""Exponents for which both 2^e and 2^-e are normal float32, and the largest half stays finite."""

assert sys.byteorder == "little", "payloads are little-endian, and numpy views of them are taken as they are"


def width(values: ValueFormat) -> int:
    """Return the bytes of one value."""
    return 2 if values == "fp16" else 4


def exponent_of(peak: int) -> int:
    """Return the exponent that brings a largest magnitude with bits `peak` into [2^14, 2^15)."""
    if peak == 0:
        return 0
    exponent = (peak >> 23) - 127 if peak >> 23 else peak.bit_length() - 150
    return max(exponent - 14, _LOWEST)


def power(exponent: int) -> np.float32:
    """Return 2^exponent as float32."""
    return np.float32(math.ldexp(1.0, exponent))


def store(values: FloatVector, peak: int, form: ValueFormat, rest: FloatVector, out: Payload) -> int:
    """Write a block of `values` to the front of `out`, and what it loses to `rest`; return its length in bytes.

    `rest` is other memory than `values`, and of the same length. `peak` may exceed the largest magnitude among the values.
    """
    count = values.size
    end = PREAMBLE + count * width(form)
    if form == "fp32":
        _HEAD.pack_into(out.data, 0, FP32, 0, 0)
        out[PREAMBLE:end].view(np.float32)[:] = values
        rest.fill(0.0)
        return end
    exponent = exponent_of(peak)
    _HEAD.pack_into(out.data, 0, FP16, 0, exponent)
    kernels.half.encode(values, power(-exponent), power(exponent), out[PREAMBLE:end].view(np.uint16), rest)
    return end


def read_preamble(block: Payload) -> tuple[int, int]:
    """Return (format, exponent) of a block.

    Raises:
        PayloadError: The preamble is short, or no encoder writes it.
    """
    if block.size < PREAMBLE:
        raise PayloadError(f"expected a value preamble of {PREAMBLE} bytes, got {block.size}")
    form, zero, exponent = _HEAD.unpack_from(block.data)
    legal = exponent == 0 if form == FP32 else form == FP16 and _LOWEST <= exponent <= _HIGHEST
    if zero or not legal:
        raise PayloadError(
            f"expected a value preamble (0, 0, exponent 0) or (1, 0, exponent {_LOWEST} to {_HIGHEST}), "
            f"got ({form}, {zero}, exponent {exponent})"
        )
    return form, exponent


def values_of(block: Payload, form: int, count: int) -> NDArray[np.float32] | NDArray[np.uint16]:
    """Return the values of a block as they stand: float32, or uint16 codes of halves."""
    if form == FP32:
        return block[PREAMBLE : PREAMBLE + 4 * count].view(np.float32)
    return block[PREAMBLE : PREAMBLE + 2 * count].view(np.uint16)


def check(block: Payload, form: int, count: int) -> None:
    """Raise `PayloadError` if one of `count` values is not finite, or not what an encoder writes. The length has been checked."""
    values = values_of(block, form, count)
    if form == FP32 and kernels.vector.peak(values) >= INFINITE:
        raise PayloadError(f"expected {count} finite float32 values, got one that is infinite or not a number")
    if form == FP16 and kernels.half.peak(values) > kernels.half.LARGEST:
        raise PayloadError(f"expected {count} halves of at most 32752 before scaling, got a larger one or not a number")


def load(block: Payload, count: int) -> FloatVector:
    """Return the values of a checked block as float32: a view of the block, or the thread's scratch `decoded`."""
    form, exponent = read_preamble(block)
    values = values_of(block, form, count)
    return values.view(np.float32) if form == FP32 else decoded(values.view(np.uint16), exponent)


def load_into(block: Payload, out: FloatVector) -> None:
    """Write the values of a checked block, as many as `out` has room for, to `out` as float32."""
    form, exponent = read_preamble(block)
    codes = values_of(block, form, out.size)
    if form == FP32:
        np.copyto(out, codes.view(np.float32))
    else:
        kernels.half.decode(codes.view(np.uint16), power(exponent), out)


def decoded(codes: NDArray[np.uint16], exponent: int) -> FloatVector:
    """Return what halves stand for as float32: the thread's scratch `decoded`."""
    out = borrow("decoded", codes.size, np.float32)
    kernels.half.decode(codes, power(exponent), out)
    return out

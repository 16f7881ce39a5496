"""How numbers stand in payloads: float32, or halves or bytes with one power-of-two scale.

A block of values is a preamble of 4 bytes and the values, little-endian:

    u8   format       0 float32, 1 half, 2 byte; 3 says that entries are packed, which are no block (`codecs/entries.py`)
    u8   zero
    i16  exponent     a half or a byte h stands for h * 2^exponent; 0 for float32
    ...  values; bytes are signed, and an odd number of them is followed by a zero

The exponent is chosen from the largest magnitude so that scaled values fill [2^14, 2^15), bytes [2^6, 2^7): nothing overflows, at
1e38 or anywhere else. What underflows as halves is 2^-39 of the largest; as bytes, 2^-8.
Scaling by a power of two is exact, so the only loss is the rounding to 11 significant bits or to a whole number up to 127, and
`value - D(value)` is exact in float32.
"""

from __future__ import annotations

import math
import struct
import sys
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import PayloadError
from . import kernels
from .base import FloatVector, Payload
from .packing import INFINITE
from .workspace import borrow

__all__ = [
    "FORMS",
    "FP16",
    "FP32",
    "INT8",
    "PACKED",
    "PREAMBLE",
    "ValueFormat",
    "block_length",
    "check",
    "exponent_of",
    "load",
    "load_into",
    "packed_unit",
    "power",
    "read_preamble",
    "store",
    "values_of",
    "write_preamble",
]

ValueFormat = Literal["fp16", "fp32", "int8", "packed"]
FORMS: Final[tuple[ValueFormat, ...]] = ("fp32", "fp16", "int8", "packed")
"""Formats by their number."""
PREAMBLE: Final = 4
FP32: Final = 0
FP16: Final = 1
INT8: Final = 2
PACKED: Final = 3

_HEAD = struct.Struct("<BBh")
_LOWEST: Final = -126
_HIGHEST: Final = {FP32: 0, FP16: 113, INT8: 121, PACKED: 0}
"""Exponents for which both 2^e and 2^-e are normal float32, and the largest value stays finite."""
_TOP: Final = {FP16: 14, INT8: 6}
"""The largest magnitude is scaled to have this exponent."""
_OCTAVES: Final = 7
"""A packed value is up to 2^7 units."""

assert sys.byteorder == "little", "payloads are little-endian, and numpy views of them are taken as they are"


def block_length(form: ValueFormat, count: int) -> int:
    """Return the length in bytes of a block of `count` values."""
    if form == "int8":
        return PREAMBLE + count + count % 2
    return PREAMBLE + count * (2 if form == "fp16" else 4)


def exponent_of(peak: int, form: int = FP16) -> int:
    """Return the exponent that brings a largest magnitude with bits `peak` into [2^14, 2^15), or [2^6, 2^7) for bytes."""
    if peak == 0:
        return 0
    exponent = (peak >> 23) - 127 if peak >> 23 else peak.bit_length() - 150
    return max(exponent - _TOP[form], _LOWEST)


def power(exponent: int) -> np.float32:
    """Return 2^exponent as float32."""
    return np.float32(math.ldexp(1.0, exponent))


def packed_unit(peak: int) -> tuple[np.float32, int]:
    """Return the unit of packed values of which the largest magnitude has bits `peak`, and the bits of sqrt(1/2) times the unit.

    The unit is the largest magnitude over 2^7, so that this one is exact; but not denormal, and at most 2^120, so that any packed
    value is finite.
    """
    word = min(max(peak - (_OCTAVES << 23), 1 << 23), 247 << 23)
    unit = np.int32(word).view(np.float32)
    return unit, int(np.float32(float(unit) * math.sqrt(2.0)).view(np.int32)) - (1 << 23)


def write_preamble(out: Payload, form: int, exponent: int = 0) -> None:
    """Write a preamble to the front of `out`."""
    _HEAD.pack_into(out.data, 0, form, 0, exponent)


def store(values: FloatVector, peak: int, form: ValueFormat, rest: FloatVector, out: Payload) -> int:
    """Write a block of `values` to the front of `out`, and what it loses to `rest`; return its length in bytes.

    `rest` is other memory than `values`, and of the same length. `peak` may exceed the largest magnitude among the values.
    """
    count, end = values.size, block_length(form, values.size)
    if form == "fp32":
        write_preamble(out, FP32)
        out[PREAMBLE:end].view(np.float32)[:] = values
        rest.fill(0.0)
        return end
    if form == "int8":
        exponent = exponent_of(peak, INT8)
        out[end - 1] = 0  # the byte behind an odd number of values; else it is written over
        write_preamble(out, INT8, exponent)
        kernels.octets.encode(values, power(-exponent), power(exponent), out[PREAMBLE : PREAMBLE + count], rest)
        return end
    exponent = exponent_of(peak)
    write_preamble(out, FP16, exponent)
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
    highest = _HIGHEST.get(form, -1)
    if zero or not (_LOWEST if highest > 0 else 0) <= exponent <= highest:
        raise PayloadError(
            f"expected a value preamble (0, 0, exponent 0), (1, 0, exponent {_LOWEST} to {_HIGHEST[FP16]}), "
            f"(2, 0, exponent {_LOWEST} to {_HIGHEST[INT8]}) or (3, 0, exponent 0), got ({form}, {zero}, exponent {exponent})"
        )
    return form, exponent


def values_of(block: Payload, form: int, count: int) -> NDArray[np.float32] | NDArray[np.uint16] | NDArray[np.uint8]:
    """Return the values of a block as they stand: float32, uint16 codes of halves, or uint8 codes of signed bytes."""
    if form == FP32:
        return block[PREAMBLE : PREAMBLE + 4 * count].view(np.float32)
    if form == INT8:
        return block[PREAMBLE : PREAMBLE + count]
    return block[PREAMBLE : PREAMBLE + 2 * count].view(np.uint16)


def check(block: Payload, form: int, count: int) -> None:
    """Raise `PayloadError` if one of `count` values is not finite, or not what an encoder writes. The length has been checked."""
    values = values_of(block, form, count)
    if form == FP32 and kernels.vector.peak(values) >= INFINITE:
        raise PayloadError(f"expected {count} finite float32 values, got one that is infinite or not a number")
    if form == FP16 and kernels.half.peak(values) > kernels.half.LARGEST:
        raise PayloadError(f"expected {count} halves of at most 32752 before scaling, got a larger one or not a number")
    if form == INT8 and (kernels.octets.lowest(values) or (count % 2 and block[PREAMBLE + count])):
        raise PayloadError(f"expected {count} bytes from -127 to 127, and a zero behind an odd number of them, got another")


def load(block: Payload, count: int, first: int = 0, last: int | None = None) -> FloatVector:
    """Return values `first` to `last` of a checked block as float32: a view of the block, or the thread's scratch `decoded`."""
    form, exponent = read_preamble(block)
    values = values_of(block, form, count)[first:last]
    if form == FP32:
        return values.view(np.float32)
    out = borrow("decoded", values.size, np.float32)
    _decode(values, form, exponent, out)
    return out


def load_into(block: Payload, out: FloatVector) -> None:
    """Write the values of a checked block, as many as `out` has room for, to `out` as float32."""
    form, exponent = read_preamble(block)
    values = values_of(block, form, out.size)
    if form == FP32:
        np.copyto(out, values.view(np.float32))
    else:
        _decode(values, form, exponent, out)


def _decode(codes: NDArray[Any], form: int, exponent: int, out: FloatVector) -> None:
    loop = kernels.half.decode if form == FP16 else kernels.octets.decode
    loop(codes, power(exponent), out)

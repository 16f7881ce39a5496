"""What rotating codecs do with a tile beside rotating it: share bytes between codes, and add it up."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import helper

__all__ = ["add_to", "pack", "pack_bits", "unpack"]

_ZERO = np.float32(0.0)


@helper
def pack_bits(wide: Any, shift: Any, width: Any, out: Any) -> None:
    """Put `width` bits of each code of a group, from bit `shift` up, into `out`; a width that divides 8."""
    count, mask = out.shape[0], np.uint8((1 << width) - 1)
    for j in range(count):
        out[j] = np.uint8(np.uint8(wide[j] >> shift) & mask)
    for i in range(1, 8 // width):
        part, place = wide[i * count : (i + 1) * count], np.uint8(width * i)
        for j in range(count):
            out[j] |= np.uint8(np.uint8(np.uint8(part[j] >> shift) & mask) << place)


@helper
def pack(wide: Any, width: Any, elements: Any, out: Any) -> None:
    """Put the codes of a group, a byte each in `wide`, into `out`."""
    if width == 4:
        pack_bits(wide, 0, 4, out)
    elif width == 1:
        pack_bits(wide, 0, 1, out)
    else:
        pack_bits(wide, 0, 2, out[: elements // 4])
        if width == 3:
            pack_bits(wide, 2, 1, out[elements // 4 :])


@helper
def _unpack_bits(codes: Any, width: Any, wide: Any) -> None:
    count, mask = codes.shape[0], np.uint8((1 << width) - 1)
    for i in range(8 // width):
        part, place = wide[i * count : (i + 1) * count], np.uint8(width * i)
        for j in range(count):
            part[j] = np.uint8(np.uint8(codes[j] >> place) & mask)


@helper
def _unpack_high(codes: Any, wide: Any) -> None:
    count = codes.shape[0]
    for i in range(8):
        part, place = wide[i * count : (i + 1) * count], np.uint8(i)
        for j in range(count):
            part[j] |= np.uint8(np.uint8(np.uint8(codes[j] >> place) & np.uint8(1)) << np.uint8(2))


@helper
def unpack(codes: Any, width: Any, elements: Any, wide: Any) -> None:
    """Write to `wide` what `pack` has put into `codes`."""
    if width == 4:
        _unpack_bits(codes, 4, wide)
    elif width == 1:
        _unpack_bits(codes, 1, wide)
    else:
        _unpack_bits(codes[: elements // 4], 2, wide)
        if width == 3:
            _unpack_high(codes[elements // 4 :], wide)


@helper
def add_to(d: Any, weight: Any, fresh: Any, total: Any) -> None:
    """Add `weight * d` (two roundings) to `total`; to zero where `fresh` is not 0."""
    if fresh != 0:
        for j in range(total.shape[0]):
            total[j] = _ZERO + weight * d[j]
    else:
        for j in range(total.shape[0]):
            total[j] += weight * d[j]

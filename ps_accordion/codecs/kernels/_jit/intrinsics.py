"""What kernels need and a plain loop cannot say: bits of a number, and many comparisons at once.

The bodies say what is meant, and run where numba is told not to compile (`NUMBA_DISABLE_JIT=1`).
In compiled kernels each is one or a few machine instructions, from `lowering.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["bits", "count_bits", "lowest_bit", "mask64", "mix64", "real"]


def bits(x: Any) -> Any:
    """`bits(float32) -> int32`: the same 32 bits, read as a signed integer."""
    return np.float32(x).view(np.int32)


def real(x: Any) -> Any:
    """`real(int32) -> float32`: the same 32 bits, read as a float."""
    return np.int32(x).view(np.float32)


def lowest_bit(mask: Any) -> Any:
    """`lowest_bit(uint64) -> int64`: position of the lowest set bit; 64 if there is none."""
    word = int(mask)
    return (word & -word).bit_length() - 1 if word else 64


def count_bits(mask: Any) -> Any:
    """`count_bits(uint64) -> int64`: how many bits are set."""
    return int(mask).bit_count()


def mask64(array: Any, start: Any, threshold: Any) -> Any:
    """`mask64(float32[], start, threshold) -> uint64`: bit j says `abs bits of array[start + j] >= threshold`.

    A plain loop that gathers 64 comparisons into a word does not vectorise; one wide comparison does, on every target.
    The caller promises that `start + 64` elements exist: there is no bounds check here.
    """
    reached = np.abs(array[start : start + 64]).view(np.int32) >= threshold
    return np.packbits(reached, bitorder="little").view(np.uint64)[0]


def mix64(a: Any, scale: Any, b: Any, out: Any, start: Any, threshold: Any) -> Any:
    """`mix64(float32[], float32, float32[], float32[], start, threshold) -> uint64`: a sum of 64 elements, and its `mask64`.

    Sets `out[start + j] = a[start + j] * scale + b[start + j]`, rounded twice, and answers as `mask64(out, start, threshold)`:
    what has just been computed need not be read again. The same promise is asked for, for all three arrays.
    """
    part = slice(start, start + 64)
    np.add(a[part] * np.float32(scale), b[part], out=out[part])
    return mask64(out, start, threshold)

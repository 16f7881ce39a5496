"""What kernels need and a plain loop cannot say: bits of a number, and many comparisons at once.

The bodies say what is meant, and run where numba is told not to compile (`NUMBA_DISABLE_JIT=1`).
In compiled kernels each is one or a few machine instructions, from `lowering.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "add_signs64",
    "bits",
    "butterfly32",
    "count_bits",
    "dots22",
    "dots64",
    "fetch",
    "flush",
    "fold64",
    "gather44",
    "keep",
    "lowest_bit",
    "mask64",
    "masses64",
    "mix64",
    "mix_past64",
    "off_line",
    "real",
    "signed16",
    "stream16",
    "take44",
    "take_signs64",
    "take_signs_past64",
    "within",
]


def bits(x: Any) -> Any:
    """`bits(float32) -> int32`: the same 32 bits, read as a signed integer."""
    return np.float32(x).view(np.int32)


def real(x: Any) -> Any:
    """`real(int32) -> float32`: the same 32 bits, read as a float."""
    return np.int32(x).view(np.float32)


def fetch(array: Any, place: Any) -> None:
    """`fetch(array, place)`: start to bring the line of the cache that this element lies in. Changes nothing but the time."""


def off_line(array: Any) -> Any:
    """`off_line(float32[]) -> int64`: how many elements the first whole line of the cache is away, 0 to 15."""
    return -array.ctypes.data // 4 % 16


def stream16(source: Any, at: Any, out: Any, start: Any) -> Any:
    """`stream16(float32[], at, float32[], start) -> int64`: copy 16 elements past the cache; return `start + 16`.

    A line that is written in full need not be read first, as it is by stores that go through the cache.
    The caller promises that all of them exist and that `out[start]` begins a line, and calls `flush` after the last.
    """
    out[start : start + 16] = source[at : at + 16]
    return start + 16


def flush(out: Any) -> None:
    """`flush(array)`: what has been written past the cache is there for other threads, before anything that is written later."""


def lowest_bit(mask: Any) -> Any:
    """`lowest_bit(uint64) -> int64`: position of the lowest set bit; 64 if there is none."""
    word = int(mask)
    return (word & -word).bit_length() - 1 if word else 64


def count_bits(mask: Any) -> Any:
    """`count_bits(uint64) -> int64`: how many bits are set."""
    return int(mask).bit_count()


def keep(index: Any, words: Any, start: Any, rows: Any, least: Any, into: Any) -> Any:
    """`keep(uint32[], uint32[], start, rows, int32, into) -> int64`: move some of `16 * rows` elements to `into`, in order.

    Those are moved, their places and bits, whose bits without the sign are more than `least`. Returns `into` and how many they
    are. What lies from there on, up to what has not been looked at, is undefined. The caller promises that all these elements
    exist, and that `into` is no more than `start`.
    """
    part = slice(start, start + 16 * rows)
    stay = (words[part] & np.uint32(0x7FFFFFFF)).view(np.int32) > least
    after = into + int(np.count_nonzero(stay))
    index[into:after], words[into:after] = index[part][stay], words[part][stay]
    return after


def within(words: Any, rows: Any, low: Any, high: Any, out: Any) -> Any:
    """`within(uint32[], rows, int32, int32, uint32[]) -> int64`: list those of `16 * rows` magnitudes from `low` to `high`.

    A magnitude is the bits without the sign. Returns how many they are; what lies behind them in `out`, up to `16 * rows`, is
    undefined. The caller promises that all of it exists.
    """
    magnitudes = words[: 16 * rows] & np.uint32(0x7FFFFFFF)
    found = magnitudes[(magnitudes.view(np.int32) >= low) & (magnitudes.view(np.int32) <= high)]
    out[: found.size] = found
    return found.size


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


def mix_past64(a: Any, scale: Any, b: Any, out: Any, start: Any, threshold: Any) -> Any:
    """`mix_past64`: what `mix64` does, past the cache; `out[start]` begins a line of it. `flush` after the last."""
    return mix64(a, scale, b, out, start, threshold)


def masses64(a: Any, scale: Any, b: Any, start: Any, out: Any, rows: Any, lanes: Any) -> Any:
    """`masses64(float32[], float32, float32[], start, float32[], rows, float64[64]) -> int64`: a sum and its mass.

    A mass is the sum of magnitudes.

    Sets `out[i] = a[start + i] * scale + b[start + i]`, rounded twice, for i below `64 * rows`, and lane j to
    `0 + |out[j]| + |out[64 + j]| + ...`, in that order, in float64. Returns how many elements that are.
    The lanes stay in registers. The caller promises that all these elements exist.
    """
    lanes[:] = 0.0
    for at in range(0, 64 * rows, 64):
        part, into = slice(start + at, start + at + 64), slice(at, at + 64)
        np.add(a[part] * np.float32(scale), b[part], out=out[into])
        lanes += np.abs(out[into])
    return 64 * rows


def fold64(lanes: Any) -> Any:
    """`fold64(float64[64]) -> float64`, or both float32: add 64 numbers pairwise, j to j + 32, then j to j + 16, and so on.

    The caller promises that all of them exist.
    """
    sums = np.array(lanes)
    while sums.size > 1:
        sums = sums[: sums.size // 2] + sums[sums.size // 2 :]
    return sums[0]


def dots64(a: Any, at: Any, b: Any, there: Any, rows: Any, lanes: Any) -> Any:
    """`dots64(float32[], at, float32[], there, rows, float32[64]) -> int64`: products of two rows, added up in lanes.

    Sets lane j to `0 + a[at + j] * b[there + j] + a[at + 64 + j] * b[there + 64 + j] + ...`, in that order, every operation
    rounded by itself. Returns how many elements that were of each. The lanes stay in registers. The caller promises that
    `64 * rows` elements exist from both places on.
    """
    lanes[:] = 0.0
    for row in range(rows):
        lanes += a[at + 64 * row : at + 64 * row + 64] * b[there + 64 * row : there + 64 * row + 64]
    return 64 * rows


def take44(
    v: Any, at: Any, pitch: Any, left: Any, place: Any, step: Any, right: Any, there: Any, stride: Any, rank: Any, count: Any
) -> Any:
    """`take44(float32[], at, pitch, float32[], place, step, float32[], there, stride, rank, count) -> int64`: four rows less D.

    Element j below `16 * count` of row r below 4 lies at `at + r * pitch + j`, and has this subtracted, rounded at each step:
    `(((0 + l0 * r0) + l1 * r1) + l2 * r2) + l3 * r3`, where `lk` is `left[place + r + k * step]` and `rk` is
    `right[there + j + k * stride]`; where k is not below `rank`, 1 to 4, lk is 0 and rk of another vector, which is finite.
    Fetches the same of the next four rows, which need not exist. All the rest does. Returns `16 * count`.
    """
    for r in range(4):
        total = np.zeros(16 * count, np.float32)
        for k in range(rank):
            total += left[place + r + k * step] * right[there + k * stride : there + k * stride + 16 * count]
        v[at + r * pitch : at + r * pitch + 16 * count] -= total
    return 16 * count


def gather44(
    x: Any, at: Any, pitch: Any, basis: Any, place: Any, step: Any, out: Any, there: Any, stride: Any, count: Any
) -> Any:
    """`gather44(float32[], at, pitch, float32[], place, step, float32[], there, stride, count) -> int64`: four rows, four sums.

    For k below 4 and j below `16 * count`, `out[there + k * stride + j]` has this added, rounded at each step:
    `((b0 * x0 + b1 * x1) + b2 * x2) + b3 * x3`, where `br` is `basis[place + r + k * step]` and `xr` is
    `x[at + r * pitch + j]`. All of it exists. Returns `16 * count`.
    """
    rows = [x[at + r * pitch : at + r * pitch + 16 * count] for r in range(4)]
    for k in range(4):
        total = basis[place + k * step] * rows[0]
        for r in range(1, 4):
            total = total + basis[place + r + k * step] * rows[r]
        out[there + k * stride : there + k * stride + 16 * count] += total
    return 16 * count


def dots22(a: Any, at: Any, pitch: Any, b: Any, there: Any, stride: Any, rows: Any, out: Any) -> Any:
    """`dots22(float32[], at, pitch, float32[], there, stride, rows, float32[4]) -> int64`: four products of two rows.

    Of the rows of `a` from `at` and from `at + pitch` on, and of those of `b` from `there` and from `there + stride` on: first
    with first, first with second, second with first, second with second, each what `fold64` makes of the lanes of `dots64`.
    """
    lanes = np.empty(64, np.float32)
    for place, (one, two) in enumerate((r, k) for r in (at, at + pitch) for k in (there, there + stride)):
        dots64(a, one, b, two, rows, lanes)
        out[place] = fold64(lanes)
    return 64 * rows


def take_signs64(row: Any, at: Any, size: Any, out: Any, start: Any) -> Any:
    """`take_signs64(float32[], at, float32, float32[], start) -> uint64`: signs of 64 elements, and what they do not carry.

    Bit j says `row[at + j] < 0`. Sets `out[start + j] = row[at + j] - (-size if row[at + j] < 0 else size)`. The caller promises
    that all of it exists.
    """
    part = row[at : at + 64]
    negative = part < 0
    np.subtract(part, np.where(negative, -size, size), out=out[start : start + 64])
    return np.packbits(negative, bitorder="little").view(np.uint64)[0]


def take_signs_past64(row: Any, at: Any, size: Any, out: Any, start: Any) -> Any:
    """`take_signs_past64`: what `take_signs64` does, past the cache; `out[start]` begins a line of it. `flush` after the last."""
    return take_signs64(row, at, size, out, start)


def add_signs64(
    words: Any, word: Any, stride: Any, sizes: Any, size: Any, step: Any, members: Any, fresh: Any, total: Any, start: Any
) -> Any:
    """`add_signs64(uint32[], word, stride, float32[], size, step, members, fresh, float32[], start) -> int64`: sum signs.

    Member m has 64 sign bits at `words[word + m * stride]` and the word after it, and a size at `sizes[size + m * step]`.
    Starts from zero if `fresh`, else from `total`; adds `-size` where a bit is set and `size` elsewhere, member by member.
    The 64 sums stay in registers until all members are in. The caller promises that all of it exists. Returns `start + 64`.
    """
    row = total[start : start + 64]
    if fresh:
        row[:] = 0.0
    for m in range(members):
        at = word + m * stride
        negative = np.unpackbits(words[at : at + 2].copy().view(np.uint8), bitorder="little").view(bool)
        row += np.where(negative, -sizes[size + m * step], sizes[size + m * step])
    return start + 64


def butterfly32(x: Any, start: Any, stride: Any, out: Any, at: Any, step: Any) -> Any:
    """`butterfly32(float32[], start, stride, float32[], at, step) -> int64`: Hadamard transforms of order 32, 16 side by side.

    Row r is the 16 elements from `start + r * stride` on. For h = 16, 8, 4, 2, 1, rows r and r + h, where bit h of r is 0,
    become their sum and their difference: each element goes through five additions, in an order that is part of what it is.
    Row r of the result goes to `at + r * step` in `out`, which may be `x`. All rows stay in registers, as far as there are.
    The caller promises that all of it exists. Returns `start`.
    """
    rows = [x[start + r * stride : start + r * stride + 16].copy() for r in range(32)]
    for h in (16, 8, 4, 2, 1):
        for r in range(32):
            if not r & h:
                rows[r], rows[r + h] = rows[r] + rows[r + h], rows[r] - rows[r + h]
    for r in range(32):
        out[at + r * step : at + r * step + 16] = rows[r]
    return start


def signed16(x: Any, start: Any, word: Any, factors: Any, out: Any, at: Any) -> Any:
    """`signed16(float32[], start, uint32, float32[16], float32[], at) -> int64`: sixteen elements with other signs, scaled.

    Sets `out[at + j] = (-x[start + j] if bit j of word is set else x[start + j]) * factors[j]`. The caller promises that all of
    it exists; `out` may be `x`. Returns `start`.
    """
    bits_ = np.unpackbits(np.array([word], np.uint32).view(np.uint8)[:2], bitorder="little").view(bool)
    row = x[start : start + 16]
    out[at : at + 16] = np.where(bits_, -row, row) * factors
    return start

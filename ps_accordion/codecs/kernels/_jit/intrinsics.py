"""What kernels need and a plain loop cannot say: bits of a number, and many comparisons at once.

The bodies say what is meant, and run where numba is told not to compile (`NUMBA_DISABLE_JIT=1`).
In compiled kernels each is one or a few machine instructions, from `lowering.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "add4",
    "add8",
    "add_powers8",
    "add_signs64",
    "begin4",
    "begin8",
    "begin_powers8",
    "bits",
    "butterfly32",
    "count_bits",
    "dither4",
    "dither8",
    "dots64",
    "fetch",
    "flush",
    "fold64",
    "lowest_bit",
    "mask64",
    "masses64",
    "mix64",
    "mix_past64",
    "off_line",
    "peak64",
    "powers8",
    "real",
    "round4",
    "round8",
    "scale64",
    "signed16",
    "stream16",
    "sum64",
    "take_signs64",
    "take_signs_past64",
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


def mix_past64(a: Any, scale: Any, b: Any, out: Any, start: Any, threshold: Any, row: Any) -> Any:
    """`mix_past64(float32[], float32, float32[], float32[], start, threshold, float32[64]) -> uint64`: `mix64` past the cache.

    `out[start]` begins a line of the cache; `flush` after the last. The row receives the 64 elements, too: who looks at one in
    `out` has to wait for memory. Fetches what comes a page behind in `a` and `b`, which need not exist.
    """
    mask = mix64(a, scale, b, out, start, threshold)
    row[:64] = out[start : start + 64]
    return mask


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


def take_signs64(row: Any, at: Any, size: Any, out: Any, start: Any, a: Any, b: Any, ahead: Any) -> Any:
    """`take_signs64(float32[], at, float32, float32[], start, float32[], float32[], ahead) -> uint64`: signs of 64 elements.

    Bit j says `row[at + j] < 0`. Sets `out[start + j] = row[at + j] - (-size if row[at + j] < 0 else size)`. Fetches the elements
    of `a` and `b` from `ahead` on, which need not exist. The caller promises that all the others do.
    """
    part = row[at : at + 64]
    negative = part < 0
    np.subtract(part, np.where(negative, -size, size), out=out[start : start + 64])
    return np.packbits(negative, bitorder="little").view(np.uint64)[0]


def take_signs_past64(row: Any, at: Any, size: Any, out: Any, start: Any, a: Any, b: Any, ahead: Any) -> Any:
    """`take_signs_past64`: what `take_signs64` does, past the cache; `out[start]` begins a line of it. `flush` after the last."""
    return take_signs64(row, at, size, out, start, a, b, ahead)


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


def peak64(a: Any, rows: Any) -> Any:
    """`peak64(float32[], rows) -> int32`: the bits of the largest magnitude among `64 * rows` elements; 0 if there are none.

    The caller promises that they exist.
    """
    return np.max(np.abs(a[: 64 * rows]).view(np.int32), initial=np.int32(0))


def scale64(a: Any, scale: Any, out: Any, rows: Any) -> Any:
    """`scale64(float32[], float32, float32[], rows) -> int32`: set `out := a * scale + 0` and return its `peak64`."""
    part = slice(0, 64 * rows)
    np.add(a[part] * np.float32(scale), np.float32(0), out=out[part])
    return peak64(out, rows)


def sum64(a: Any, scale: Any, b: Any, out: Any, rows: Any) -> Any:
    """`sum64(float32[], float32, float32[], float32[], rows) -> int32`: a sum, rounded twice, and its `peak64`.

    Sets `out[i] = a[i] * scale + b[i]` for i below `64 * rows`. Fetches what lies a page behind in `b`. All of it exists.
    """
    part = slice(0, 64 * rows)
    np.add(a[part] * np.float32(scale), b[part], out=out[part])
    return peak64(out, rows)


def round8(row: Any, inverse: Any, scale: Any, magic: Any, codes: Any, later: Any, rows: Any) -> Any:
    """`round8(float32[], float32, float32, float32, uint8[], float32[], rows) -> int64`: codes of `128 * rows` elements.

    With `shifted = row * inverse + magic`, a code is the lowest byte of its bits, and `row - (shifted - magic) * scale` stays
    in the row, every operation rounded by itself. Fetches what lies a page behind in `later`: to wait for it here, where there is
    most to compute, costs least. All of it exists. Returns `128 * rows`. The next four are called like it.
    """
    codes[: 128 * rows] = _rounded(row[: 128 * rows], inverse, scale, magic)
    return 128 * rows


def round4(row: Any, inverse: Any, scale: Any, magic: Any, codes: Any, later: Any, rows: Any) -> Any:
    """`round4`: what `round8` does, with two codes a byte.

    Byte j has, from the lowest bit up, the lowest four bits of the codes of elements j and `j + 64 * rows`.
    """
    codes[: 64 * rows] = _beside(_rounded(row[: 128 * rows], inverse, scale, magic))
    return 128 * rows


def dither8(v: Any, inverse: Any, magic: Any, first: Any, low: Any, high: Any, codes: Any, later: Any, rows: Any) -> Any:
    """`dither8(float32[], float32, float32, uint32, uint32, uint32, uint8[], float32[], rows) -> int64`: codes rounded by noise.

    With h the `noise.hashed` of `first + j` and the key: of the bits of `v * inverse + magic`, element j gets `h >> 17` added
    and element `j + 64 * rows` the lowest 15 bits of h; what is above the 15 lowest bits then is the code, a byte of it.
    """
    codes[: 128 * rows] = _dithered(v[: 128 * rows], inverse, magic, first, low, high)
    return 128 * rows


def dither4(v: Any, inverse: Any, magic: Any, first: Any, low: Any, high: Any, codes: Any, later: Any, rows: Any) -> Any:
    """`dither4`: what `dither8` does, with two codes a byte, as `round4` has them."""
    codes[: 64 * rows] = _beside(_dithered(v[: 128 * rows], inverse, magic, first, low, high))
    return 128 * rows


def powers8(v: Any, inverse: Any, first: Any, low: Any, high: Any, codes: Any, later: Any, rows: Any) -> Any:
    """`powers8(float32[], float32, uint32, uint32, uint32, uint8[], float32[], rows) -> int64`: signs and exponents.

    With h as in `dither8`, the bits of `(v + 0) * inverse` get the upper (for the first half) or the lower 16 bits of h added,
    and half a one, 7 places from the lowest bit. A code is the sign and the lowest 7 bits of the exponent then, and the caller
    promises that it has no eighth.
    """
    noise = np.concatenate([x << np.uint32(7) for x in _noise(first, low, high, rows, 16)]).view(np.int32) | np.int32(0x40)
    with np.errstate(under="ignore"):
        words = ((v[: 128 * rows] + np.float32(0)) * np.float32(inverse)).view(np.int32) + noise
    codes[: 128 * rows] = (words >> 23 & 0x7F) | (words >> 24 & 0x80)
    return 128 * rows


def begin8(codes: Any, half: Any, scale: Any, weight: Any, total: Any, rows: Any) -> Any:
    """`begin8(uint8[], float32, float32, float32, float32[], rows) -> int64`: `total := 0 + weight * ((codes - half) * scale)`.

    Every operation is rounded by itself. `64 * rows` elements and as many codes exist. Returns `rows`, as the next five do, which
    are called like it; for those with two codes a byte, as `round4` writes them, it is `128 * rows` elements.
    """
    return _added(codes[: 64 * rows], half, scale, weight, total, rows, fresh=True)


def begin4(codes: Any, half: Any, scale: Any, weight: Any, total: Any, rows: Any) -> Any:
    """`begin4`: what `begin8` does, with two codes a byte."""
    return _added(_apart(codes[: 64 * rows]), half, scale, weight, total, rows, fresh=True)


def begin_powers8(codes: Any, half: Any, scale: Any, weight: Any, total: Any, rows: Any) -> Any:
    """`begin_powers8`: set `total := 0 + weight * (power * scale)`, with codes as `powers8` writes them; `half` is ignored."""
    return _added(_powers(codes[: 64 * rows]), 0, scale, weight, total, rows, fresh=True)


def add8(codes: Any, half: Any, scale: Any, weight: Any, total: Any, rows: Any) -> Any:
    """`add8`: set `total := total + weight * ((codes - half) * scale)`; see `begin8`."""
    return _added(codes[: 64 * rows], half, scale, weight, total, rows, fresh=False)


def add4(codes: Any, half: Any, scale: Any, weight: Any, total: Any, rows: Any) -> Any:
    """`add4`: what `add8` does, with two codes a byte."""
    return _added(_apart(codes[: 64 * rows]), half, scale, weight, total, rows, fresh=False)


def add_powers8(codes: Any, half: Any, scale: Any, weight: Any, total: Any, rows: Any) -> Any:
    """`add_powers8`: set `total := total + weight * (power * scale)`; see `begin_powers8`."""
    return _added(_powers(codes[: 64 * rows]), 0, scale, weight, total, rows, fresh=False)


def _added(numbers: Any, half: Any, scale: Any, weight: Any, total: Any, rows: Any, *, fresh: bool) -> Any:
    part = total[: numbers.size]
    with np.errstate(under="ignore"):
        value = np.float32(weight) * ((numbers.astype(np.float32) - np.float32(half)) * np.float32(scale))
        part[:] = (np.float32(0) if fresh else part) + value
    return rows


def _apart(codes: Any) -> Any:
    return np.concatenate([codes & np.uint8(15), codes >> np.uint8(4)])


def _powers(codes: Any) -> Any:
    words = codes.astype(np.int32)
    return ((words & 0x7F) << 23 | (words & 0x80) << 24).view(np.float32)


def _rounded(row: Any, inverse: Any, scale: Any, magic: Any) -> Any:
    with np.errstate(under="ignore"):
        shifted = row * np.float32(inverse) + np.float32(magic)
        row -= (shifted - np.float32(magic)) * np.float32(scale)
    return (shifted.view(np.int32) & 0xFF).astype(np.uint8)


def _beside(codes: Any) -> Any:
    low, high = codes.reshape(2, -1)
    return (low & np.uint8(15)) | (high << np.uint8(4))


def _dithered(v: Any, inverse: Any, magic: Any, first: Any, low: Any, high: Any) -> Any:
    noise = np.concatenate(_noise(first, low, high, v.size // 128, 15)).view(np.int32)
    with np.errstate(under="ignore"):
        shifted = v * np.float32(inverse) + np.float32(magic)
    return (shifted.view(np.int32) + noise >> 15 & 0xFF).astype(np.uint8)


def _noise(first: Any, low: Any, high: Any, rows: Any, width: int) -> tuple[Any, Any]:
    """Return the highest and the lowest bits of a hash for each of `64 * rows` places."""
    x = np.uint32(first) + np.arange(64 * rows, dtype=np.uint32) ^ np.uint32(low)
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
    x = (x ^ x >> np.uint32(15) ^ np.uint32(high)) * np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x >> np.uint32(32 - width), x & np.uint32((1 << width) - 1)

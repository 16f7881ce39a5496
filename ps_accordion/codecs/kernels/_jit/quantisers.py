"""What kernels of quantising codecs need beside `intrinsics.py`, of the same kind: sums, peaks and codes of a bucket.

In compiled kernels each is a loop over lanes, from `rounding.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "add4",
    "add8",
    "add_powers8",
    "begin4",
    "begin8",
    "begin_powers8",
    "dither4",
    "dither8",
    "peak64",
    "powers8",
    "round4",
    "round8",
    "round_past4",
    "round_past8",
    "scale64",
    "sum64",
    "sum_past64",
]


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


def sum_past64(a: Any, scale: Any, b: Any, out: Any, rows: Any) -> Any:
    """`sum_past64`: what `sum64` does, past the cache, without fetching; `out` begins a line of it. `flush` after the last."""
    return sum64(a, scale, b, out, rows)


def round8(row: Any, inverse: Any, scale: Any, magic: Any, codes: Any, later: Any, rows: Any) -> Any:
    """`round8(float32[], float32, float32, float32, uint8[], float32[], rows) -> int64`: codes of `128 * rows` elements.

    With `shifted = row * inverse + magic`, a code is the lowest byte of its bits, and `row - (shifted - magic) * scale` stays
    in the row, every operation rounded by itself. Fetches what lies a page behind in `later`: to wait for it here, where there is
    most to compute, costs least. All of it exists. Returns `128 * rows`. `round4` is called like it.
    """
    codes[: 128 * rows] = _rounded(row[: 128 * rows], inverse, scale, magic)
    return 128 * rows


def round4(row: Any, inverse: Any, scale: Any, magic: Any, codes: Any, later: Any, rows: Any) -> Any:
    """`round4`: what `round8` does, with two codes a byte.

    Byte j has, from the lowest bit up, the lowest four bits of the codes of elements j and `j + 64 * rows`.
    """
    codes[: 64 * rows] = _beside(_rounded(row[: 128 * rows], inverse, scale, magic))
    return 128 * rows


def round_past8(row: Any, inverse: Any, scale: Any, magic: Any, codes: Any, rest: Any, start: Any, later: Any, rows: Any) -> Any:
    """`round_past8(float32[], float32, float32, float32, uint8[], float32[], start, float32[], rows) -> int64`: past the cache.

    What `round8` does, but what the codes do not carry goes to `rest` from `start` on, which begins a line of the cache, and the
    row is only read. `flush` after the last.
    """
    part = _copied(row, rest, start, rows)
    return round8(part, inverse, scale, magic, codes, later, rows)


def round_past4(row: Any, inverse: Any, scale: Any, magic: Any, codes: Any, rest: Any, start: Any, later: Any, rows: Any) -> Any:
    """`round_past4`: what `round_past8` does, with two codes a byte, as `round4` has them."""
    part = _copied(row, rest, start, rows)
    return round4(part, inverse, scale, magic, codes, later, rows)


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


def _copied(row: Any, rest: Any, start: Any, rows: Any) -> Any:
    part = rest[start : start + 128 * rows]
    part[:] = row[: 128 * rows]
    return part


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

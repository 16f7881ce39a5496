"""Element-wise loops over whole vectors: sums, scales, peaks and norms.

A *peak* is the largest `bits & 0x7fffffff` of a vector, as int32: the bits of its largest magnitude.
Bits of non-negative floats order like the floats, integer maxima do not depend on their order, and infinity and NaN are the
largest of all: one loop gives the scale and the finite check. A vector is finite if its peak is below `INFINITE`.

Norms are float64 sums in `LANES` lanes: lane j adds elements j, j + 64, j + 128, ... in order; the lanes are then added pairwise,
32 to 32, 16 to 16, and so on. The order is part of the contract, so that every host gets the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import (
    F32,
    F32_IN,
    F64,
    bits,
    float32,
    float64,
    flush,
    fold64,
    helper,
    int32,
    int64,
    kernel,
    off_line,
    scale64,
    stream16,
    sum64,
    sum_past64,
    void,
)

__all__ = [
    "LANES",
    "ROW",
    "add",
    "added",
    "begin",
    "both",
    "clear",
    "combine",
    "copied",
    "copy_row",
    "peak",
    "peak_of_sum",
    "scaled",
    "scaled_into",
    "shrink",
    "squares",
    "store_row",
    "sum_into",
    "sum_past",
    "sum_rows",
    "summed",
]

LANES = 64
ROW = 1 << 10
"""Elements that are made in the first-level cache before they are copied."""

_MAGNITUDE = np.int32(0x7FFFFFFF)
_ZERO = np.float32(0.0)


@kernel(int32(F32_IN))
def peak(a: Any) -> Any:
    """Return the peak of `a`."""
    top = np.int32(0)
    for i in range(a.shape[0]):
        top = max(top, np.int32(bits(a[i]) & _MAGNITUDE))
    return top


@kernel(int32(F32_IN, F32_IN))
def peak_of_sum(a: Any, b: Any) -> Any:
    """Return the peak of `a + b`, which is written nowhere."""
    top = np.int32(0)
    for i in range(a.shape[0]):
        top = max(top, np.int32(bits(a[i] + b[i]) & _MAGNITUDE))
    return top


@kernel(int32(F32_IN, F32_IN, F32))
def sum_into(a: Any, b: Any, out: Any) -> Any:
    """Write `a + b` to `out` and return its peak."""
    top = np.int32(0)
    for i in range(a.shape[0]):
        v = a[i] + b[i]
        out[i] = v
        top = max(top, np.int32(bits(v) & _MAGNITUDE))
    return top


@helper
def _scaled_rest(a: Any, scale: Any, out: Any, top: Any) -> Any:
    for j in range(out.shape[0]):
        v = a[j] * scale + _ZERO
        out[j] = v
        top = max(top, np.int32(bits(v) & _MAGNITUDE))
    return top


@helper
def _sum_rest(a: Any, scale: Any, b: Any, out: Any, top: Any) -> Any:
    for j in range(out.shape[0]):
        v = a[j] * scale + b[j]
        out[j] = v
        top = max(top, np.int32(bits(v) & _MAGNITUDE))
    return top


@helper
def summed(a: Any, scale: Any, b: Any, out: Any) -> Any:
    """Write `a * scale + b` (two roundings) to `out`; return the bits of its largest magnitude. An empty `b` is zero."""
    rows = out.shape[0] // LANES
    at = LANES * rows
    if b.shape[0] == 0:
        return _scaled_rest(a[at:], scale, out[at:], scale64(a, scale, out, rows))
    return _sum_rest(a[at:], scale, b[at:], out[at:], sum64(a, scale, b, out, rows))


@helper
def copy_row(row: Any, out: Any, start: Any, end: Any) -> None:
    """Copy a row to `out`, from `start` to `end`."""
    part = out[start:end]  # An index that may be below zero, for all the compiler knows, costs more than what it does.
    for i in range(part.shape[0]):
        part[i] = row[i]


@helper
def _stream(row: Any, out: Any, start: Any, end: Any, off: Any) -> None:
    """Copy a row past the cache; lines of `out` begin `off` elements after `start`."""
    at = min(start + off, end)
    copy_row(row, out, start, at)
    while at + 16 <= end:
        at = stream16(row, at - start, out, at)
    if at < end:
        copy_row(row[at - start :], out, at, end)


@helper
def store_row(row: Any, out: Any, start: Any, end: Any, off: Any, past: Any) -> None:
    """Copy a row to `out`, past the cache unless `past` is 0; lines begin `off` after `start`. `flush` after the last."""
    if past != 0:
        _stream(row, out, start, end, off)
    else:
        copy_row(row, out, start, end)


@helper
def _sum_row(a: Any, scale: Any, b: Any, start: Any, end: Any, row: Any, top: Any) -> Any:
    left, right = a[start:end], b[start:end]
    for i in range(left.shape[0]):
        v = left[i] * scale + right[i]
        row[i] = v
        top = max(top, np.int32(bits(v) & _MAGNITUDE))
    return top


@kernel(int32(F32_IN, float32, F32_IN, F32, int64, F32))
def sum_past(a: Any, scale: Any, b: Any, row: Any, past: Any, out: Any) -> Any:
    """Write `a * scale + b` (two roundings) to `out`, other memory, and return its peak.

    Past the cache unless `past` is 0; `row` is float32[ROW], scratch.
    """
    n, off = out.shape[0], off_line(out)
    top, begin = np.int32(0), np.int64(0)
    if past != 0 and off == 0:
        begin = n // LANES * LANES
        top = sum_past64(a, scale, b, out, n // LANES)
    for start in range(begin, n, ROW):
        end = min(start + ROW, n)
        top = _sum_row(a, scale, b, start, end, row, top)
        store_row(row, out, start, end, off, past)
    flush(out)
    return top


@kernel(int32(F32, float32, F32_IN))
def combine(total: Any, scale: Any, residual: Any) -> Any:
    """Set `total := total * scale + residual` (two roundings) and return its peak."""
    top = np.int32(0)
    for i in range(total.shape[0]):
        v = total[i] * scale + residual[i]
        total[i] = v
        top = max(top, np.int32(bits(v) & _MAGNITUDE))
    return top


@kernel(int32(F32, float32))
def scaled(total: Any, scale: Any) -> Any:
    """Set `total := total * scale + 0` and return its peak: `combine` with a zero residual, sign bits included."""
    top = np.int32(0)
    for i in range(total.shape[0]):
        v = total[i] * scale + _ZERO
        total[i] = v
        top = max(top, np.int32(bits(v) & _MAGNITUDE))
    return top


@kernel(int32(F32_IN, float32, F32))
def scaled_into(a: Any, scale: Any, out: Any) -> Any:
    """Write `a * scale + 0` to `out`, other memory than `a`, and return its peak: `scaled` that leaves `a` alone."""
    top = np.int32(0)
    for i in range(a.shape[0]):
        v = a[i] * scale + _ZERO
        out[i] = v
        top = max(top, np.int32(bits(v) & _MAGNITUDE))
    return top


@helper
def _copied_row(a: Any, start: Any, end: Any, row: Any, top: Any) -> Any:
    part = a[start:end]
    for i in range(part.shape[0]):
        v = part[i]
        row[i] = v
        top = max(top, np.int32(bits(v) & _MAGNITUDE))
    return top


@kernel(int32(F32_IN, F32, int64, F32))
def copied(a: Any, row: Any, past: Any, out: Any) -> Any:
    """Write `a` to `out`, bit for bit, past the cache unless `past` is 0, with float32[ROW] of scratch; return its peak."""
    n, off = out.shape[0], off_line(out)
    top = np.int32(0)
    for start in range(0, n, ROW):
        end = min(start + ROW, n)
        top = _copied_row(a, start, end, row, top)
        store_row(row, out, start, end, off, past)
    flush(out)
    return top


@kernel(int32(F32_IN, float32, F32_IN, float32, F32))
def added(total: Any, weight: Any, values: Any, scale: Any, out: Any) -> Any:
    """Write `(total + weight * values) * scale + 0` to `out` and return its peak: `add` and `scaled_into` at once."""
    top = np.int32(0)
    for i in range(total.shape[0]):
        v = (total[i] + weight * values[i]) * scale + _ZERO
        out[i] = v
        top = max(top, np.int32(bits(v) & _MAGNITUDE))
    return top


@kernel(int32(float32, F32_IN, float32, F32_IN, float32, F32))
def both(weight: Any, values: Any, other_weight: Any, others: Any, scale: Any, out: Any) -> Any:
    """Do `begin` with the first, then `added` with the second; `out` is other memory than both."""
    top = np.int32(0)
    for i in range(values.shape[0]):
        v = ((_ZERO + weight * values[i]) + other_weight * others[i]) * scale + _ZERO
        out[i] = v
        top = max(top, np.int32(bits(v) & _MAGNITUDE))
    return top


@kernel(int32(F32_IN, F32_IN, float32, F32))
def sum_rows(rows: Any, weights: Any, scale: Any, out: Any) -> Any:
    """Write `(0 + weight * row + ...) * scale + 0` to `out`, member by member, and return its peak: `add` and `scaled` at once.

    Args:
        rows: float32[members * n], a row a member.
        weights: float32[members].
        scale: A factor.
        out: float32[n], other memory.
    """
    n = out.shape[0]
    top = np.int32(0)
    for start in range(0, n, ROW):
        end = min(start + ROW, n)
        part = out[start:end]
        part[:] = _ZERO
        for m in range(weights.shape[0]):
            row, weight = rows[m * n + start : m * n + end], weights[m]
            for i in range(part.shape[0]):
                part[i] += weight * row[i]
        for i in range(part.shape[0]):
            v = part[i] * scale + _ZERO
            part[i] = v
            top = max(top, np.int32(bits(v) & _MAGNITUDE))
    return top


@kernel(void(F32))
def clear(out: Any) -> None:
    """Set `out` to zero, as `fill` of numpy does, which takes half as long again."""
    for i in range(out.shape[0]):
        out[i] = _ZERO


@kernel(void(float32, F32_IN, F32))
def begin(weight: Any, values: Any, total: Any) -> None:
    """Set `total := 0 + weight * values`: `clear` and `add` at once, sign bits included."""
    for i in range(total.shape[0]):
        total[i] = _ZERO + weight * values[i]


@kernel(void(float32, F32_IN, F32))
def add(weight: Any, values: Any, total: Any) -> None:
    """Set `total := total + weight * values` (two roundings)."""
    for i in range(total.shape[0]):
        total[i] += weight * values[i]


@helper
def _add_squares(row: Any, lanes: Any) -> None:
    for j in range(row.shape[0]):
        x = np.float64(row[j])
        lanes[j] += x * x


@kernel(float64(F32_IN, F64))
def squares(a: Any, lanes: Any) -> Any:
    """Return the sum of squares of `a` in lane order; `lanes` is float64[64] of scratch."""
    lanes[:] = 0.0
    for start in range(0, a.shape[0], LANES):
        _add_squares(a[start : min(start + LANES, a.shape[0])], lanes)
    return fold64(lanes)


@helper
def _shrink_row(row: Any, factor: Any, lanes: Any) -> None:
    for j in range(row.shape[0]):
        before = row[j]
        after = before * factor
        row[j] = after
        lost = np.float64(before) - np.float64(after)
        lanes[j] += lost * lost


@kernel(float64(F32, float32, F64))
def shrink(a: Any, factor: Any, lanes: Any) -> Any:
    """Set `a := a * factor` and return the sum of squares of what that took away, in lane order."""
    lanes[:] = 0.0
    for start in range(0, a.shape[0], LANES):
        _shrink_row(a[start : min(start + LANES, a.shape[0])], factor, lanes)
    return fold64(lanes)

"""Products of a matrix with a few vectors, and of two thin factors: what low-rank codecs are made of.

A matrix of `rows` times `columns` lies in memory row by row. A *factor* is `rank` vectors, one after another: a left one has
vectors as long as a column, a right one as long as a row. Two of them stand for

    D[i, j] = 0 + left[0, i] * right[0, j] + left[1, i] * right[1, j] + ...          in that order

Everything is float32, and every operation is rounded by itself, in an order that is part of the format:

* `across`, left[k, i] = row i times right vector k: 64 lanes, lane j adds the products of columns j, j + 64, ... in order; the
  lanes are then added pairwise, 32 to 32, 16 to 16, and so on.
* `down`, right[k, j] = left vector k times column j: four rows at a time, `((a + b) + c) + d`, then added to what is there; rows
  that the last four lack are zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import (
    F32,
    F32_IN,
    bits,
    dots22,
    dots64,
    float32,
    flush,
    fold64,
    gather44,
    helper,
    int32,
    int64,
    kernel,
    off_line,
    take44,
    void,
)
from .vector import store_row

__all__ = ["BLOCK", "LANES", "LINE", "WIDE", "across", "add", "down", "expand", "step_across", "step_down", "subtract"]

_MAGNITUDE = np.int32(0x7FFFFFFF)
_ZERO = np.float32(0.0)
LANES = 64
BLOCK = 4096
"""Columns of a pass down: four rows of them and as many vectors are 128 KiB, in a second-level cache. With 1,024, in the first
one, memory is read in pieces of a page, and a pass takes a quarter longer."""
WIDE = 1 << 15
"""Columns of a row of which four stay in a second-level cache, so that they may be made there first."""
LINE = 16
"""Elements of a line of the cache: where rows do not end with one, writing them past the cache takes longer."""


@helper
def _sum(a: Any, b: Any, v: Any) -> Any:
    """Set `v := a + b` and return its peak."""
    top = np.int32(0)
    for j in range(v.shape[0]):
        x = a[j] + b[j]
        v[j] = x
        top = max(top, np.int32(bits(x) & _MAGNITUDE))
    return top


@helper
def _dot(a: Any, at: Any, b: Any, there: Any, length: Any, lanes: Any) -> Any:
    """Return the product of two runs of elements."""
    done = dots64(a, at, b, there, length // LANES, lanes)
    for j in range(length - done):
        lanes[j] += a[at + done + j] * b[there + done + j]
    return fold64(lanes)


@helper
def _dots4(x: Any, at: Any, pitch: Any, basis: Any, rank: Any, rows: Any, columns: Any, i: Any, left: Any, lanes: Any) -> None:
    """Write what rows i to i + 3, which lie in `x` as `_gather` has them, are along the basis: two and two vectors at a time."""
    for k in range(0, rank - 1, 2):
        for r in range(0, 4, 2):
            dots22(x, at + r * pitch, pitch, basis, k * columns, columns, columns // LANES, lanes)
            for place in range(4):
                left[(k + place % 2) * rows + i + r + place // 2] = lanes[place]
    if rank % 2:
        k = rank - 1
        for r in range(4):
            left[k * rows + i + r] = _dot(x, at + r * pitch, basis, k * columns, columns, lanes)


@helper
def _plus4(out: Any, a: Any, b: Any, c: Any, d: Any, p: Any, q: Any, r: Any, s: Any) -> None:
    for j in range(out.shape[0]):
        out[j] = (((out[j] + a * p[j]) + b * q[j]) + c * r[j]) + d * s[j]


@helper
def _less4(v: Any, a: Any, b: Any, c: Any, d: Any, p: Any, q: Any, r: Any, s: Any) -> None:
    for j in range(v.shape[0]):
        v[j] -= (((_ZERO + a * p[j]) + b * q[j]) + c * r[j]) + d * s[j]


@helper
def _gather4(out: Any, a: Any, b: Any, c: Any, d: Any, p: Any, q: Any, r: Any, s: Any) -> None:
    for j in range(out.shape[0]):
        out[j] += ((a * p[j] + b * q[j]) + c * r[j]) + d * s[j]


@helper
def _less(v: Any, d: Any) -> None:
    for j in range(v.shape[0]):
        v[j] -= d[j]


@helper
def _more(total: Any, weight: Any, d: Any) -> None:
    for j in range(total.shape[0]):
        total[j] += weight * d[j]


@helper
def _clear(out: Any) -> None:
    for j in range(out.shape[0]):
        out[j] = _ZERO


@helper
def _at(factor: Any, vector: Any, rank: Any, length: Any, place: Any) -> Any:
    """Return an element of a vector; zero beyond the last vector, which changes no bit of a sum that begins with 0."""
    return factor[vector * length + place] if vector < rank else _ZERO


@helper
def _of(vector: Any, rank: Any, length: Any) -> Any:
    """Return where a vector begins; the last one where there is none, to be multiplied by zero."""
    return min(vector, rank - 1) * length


@helper
def _expand(left: Any, right: Any, rank: Any, rows: Any, columns: Any, i: Any, start: Any, end: Any, out: Any) -> None:
    """Write D[i, start : end] to `out`."""
    _clear(out)
    for k in range(0, rank, 4):
        a, b = _at(left, k, rank, rows, i), _at(left, k + 1, rank, rows, i)
        c, d = _at(left, k + 2, rank, rows, i), _at(left, k + 3, rank, rows, i)
        p, q, r, s = k * columns, _of(k + 1, rank, columns), _of(k + 2, rank, columns), _of(k + 3, rank, columns)
        _plus4(
            out, a, b, c, d,
            right[p + start : p + end], right[q + start : q + end], right[r + start : r + end], right[s + start : s + end],
        )  # fmt: skip


@helper
def _subtract(v: Any, left: Any, right: Any, rank: Any, rows: Any, columns: Any, i: Any, start: Any, end: Any, row: Any) -> None:
    """Take D[i, start : end] away from `v`."""
    if rank <= 4:
        a, b, c, d = left[i], _at(left, 1, rank, rows, i), _at(left, 2, rank, rows, i), _at(left, 3, rank, rows, i)
        q, r, s = _of(1, rank, columns), _of(2, rank, columns), _of(3, rank, columns)
        _less4(
            v, a, b, c, d,
            right[start:end], right[q + start : q + end], right[r + start : r + end], right[s + start : s + end],
        )  # fmt: skip
        return
    _expand(left, right, rank, rows, columns, i, start, end, row[: end - start])
    _less(v, row[: end - start])


@helper
def _gather(
    x: Any, at: Any, pitch: Any, length: Any, basis: Any, rank: Any, rows: Any, columns: Any, i: Any, start: Any, right: Any
) -> None:
    """Add what rows i to i + 3 bring to the right factor, in `length` columns from `start` on.

    What row i has there lies in `x` from `at` on, and those after it `pitch` apart.
    """
    last = rows - 1 - i  # there is always something to multiply by the zeros of rows that are not there
    two, three, four = at + min(1, last) * pitch, at + min(2, last) * pitch, at + min(3, last) * pitch
    together, done = (rank // 4 * 4 if last >= 3 else 0), np.int64(0)
    for k in range(0, together, 4):
        done = gather44(x, at, pitch, basis, k * rows + i, rows, right, k * columns + start, columns, length // 16)
    for k in range(rank):
        there, first = k * rows + i, done if k < together else np.int64(0)
        begin, end = k * columns + start + first, k * columns + start + length
        a = basis[there]
        b = basis[there + 1] if last >= 1 else _ZERO
        c = basis[there + 2] if last >= 2 else _ZERO
        d = basis[there + 3] if last >= 3 else _ZERO
        _gather4(
            right[begin:end], a, b, c, d,
            x[at + first : at + length], x[two + first : two + length],
            x[three + first : three + length], x[four + first : four + length],
        )  # fmt: skip


@helper
def _store(made: Any, v: Any, start: Any, off: Any) -> None:
    """Write a row to `v` from `start` on, past the cache; lines begin `off` elements after the beginning of `v`."""
    store_row(made, v, start, start + made.shape[0], (off - start) % LINE, 1)


@helper
def _take(
    x: Any, at: Any, left: Any, right: Any, rank: Any, rows: Any, columns: Any, i: Any, start: Any, length: Any, scratch: Any
) -> None:
    """Take D away from rows i to i + 3, or as many as there are, of which `length` elements from column `start` lie in `x`.

    What row i has there lies from `at` on, and those after it `columns` apart.
    """
    done = np.int64(0)
    if rank <= 4 and i + 4 <= rows:
        done = take44(x, at, columns, left, i, rows, right, start, columns, rank, length // 16)
    for row in range(i, min(i + 4, rows)):
        here = at + (row - i) * columns
        part = x[here + done : here + length]
        _subtract(part, left, right, rank, rows, columns, row, start + done, start + length, scratch)


@helper
def _along(x: Any, at: Any, basis: Any, rank: Any, rows: Any, columns: Any, i: Any, left: Any, lanes: Any) -> None:
    """Write what rows i to i + 3, or as many as there are, are along the basis; see `_take`."""
    if i + 4 <= rows and columns % LANES == 0:
        _dots4(x, at, columns, basis, rank, rows, columns, i, left, lanes)
        return
    for row in range(i, min(i + 4, rows)):
        for k in range(rank):
            left[k * rows + row] = _dot(x, at + (row - i) * columns, basis, k * columns, columns, lanes)


@helper
def _halve(x: Any, at: Any, basis: Any, rank: Any, rows: Any, columns: Any, i: Any, left: Any, lanes: Any, scratch: Any) -> None:
    """Write what rows i to i + 3, or as many as there are, are along the basis, and take it away; see `_take`."""
    _along(x, at, basis, rank, rows, columns, i, left, lanes)
    _take(x, at, left, basis, rank, rows, columns, i, 0, columns, scratch)


@kernel(int32(F32_IN, F32_IN, F32_IN, int64, F32, F32, int64, F32, F32, F32), brief=False)
def step_across(a: Any, b: Any, basis: Any, rank: Any, left: Any, v: Any, past: Any, lanes: Any, scratch: Any, made: Any) -> Any:
    """Set `v := a + b`, write its left factor for a right `basis`, and leave in `v` what the two do not carry; return its peak.

    Args:
        a: float32[rows * columns].
        b: float32[rows * columns].
        basis: float32[rank * columns].
        rank: Vectors of a factor.
        left: float32[rank * rows].
        v: float32[rows * columns]; may be `b`.
        past: 1 if it is other memory, and is to be written past the cache, else 0.
        lanes: float32[LANES], scratch.
        scratch: float32[columns], scratch.
        made: float32[4 * columns], scratch where `past`.
    """
    rows, columns, off = left.shape[0] // rank, basis.shape[0] // rank, off_line(v)
    top = np.int32(0)
    for i in range(0, rows, 4):
        last = min(i + 4, rows)
        for row in range(i, last):
            start, end = row * columns, (row + 1) * columns
            if past != 0:
                top = max(top, _sum(a[start:end], b[start:end], made[start - i * columns : end - i * columns]))
            else:
                top = max(top, _sum(a[start:end], b[start:end], v[start:end]))
        if past != 0:
            _halve(made, 0, basis, rank, rows, columns, i, left, lanes, scratch)
            for row in range(i, last):
                _store(made[(row - i) * columns : (row - i + 1) * columns], v, row * columns, off)
        else:
            _halve(v, i * columns, basis, rank, rows, columns, i, left, lanes, scratch)
    flush(v)
    return top


@kernel(int32(F32_IN, F32_IN, F32_IN, int64, F32, F32, int64, F32), brief=False)
def step_down(a: Any, b: Any, basis: Any, rank: Any, right: Any, v: Any, past: Any, made: Any) -> Any:
    """Set `v := a + b` and write its right factor for a left `basis`; return the peak of `v`.

    Args:
        a: float32[rows * columns].
        b: float32[rows * columns].
        basis: float32[rank * rows].
        rank: Vectors of a factor.
        right: float32[rank * columns].
        v: float32[rows * columns]; may be `b`.
        past: 1 if it is other memory, and is to be written past the cache, else 0.
        made: float32[4 * BLOCK], scratch where `past`.
    """
    rows, columns, off = basis.shape[0] // rank, right.shape[0] // rank, off_line(v)
    top = np.int32(0)
    _clear(right)
    for start in range(0, columns, BLOCK):
        length = min(BLOCK, columns - start)
        for i in range(0, rows, 4):
            for row in range(i, min(i + 4, rows)):
                first, last = row * columns + start, row * columns + start + length
                if past != 0:
                    x = made[(row - i) * BLOCK : (row - i) * BLOCK + length]
                    top = max(top, _sum(a[first:last], b[first:last], x))
                    _store(x, v, first, off)
                else:
                    top = max(top, _sum(a[first:last], b[first:last], v[first:last]))
            if past != 0:
                _gather(made, 0, BLOCK, length, basis, rank, rows, columns, i, start, right)
            else:
                _gather(v, i * columns + start, columns, length, basis, rank, rows, columns, i, start, right)
    flush(v)
    return top


@kernel(void(F32_IN, F32_IN, int64, F32, F32), brief=False)
def across(v: Any, basis: Any, rank: Any, left: Any, lanes: Any) -> None:
    """Write the left factor of `v` for a right `basis`; the arguments are those of `step_across`."""
    rows, columns = left.shape[0] // rank, basis.shape[0] // rank
    for i in range(0, rows, 4):
        _along(v, i * columns, basis, rank, rows, columns, i, left, lanes)


@kernel(void(F32_IN, F32_IN, int64, F32), brief=False)
def down(v: Any, basis: Any, rank: Any, right: Any) -> None:
    """Write the right factor of `v` for a left `basis`; the arguments are those of `step_down`."""
    rows, columns = basis.shape[0] // rank, right.shape[0] // rank
    _clear(right)
    for start in range(0, columns, BLOCK):
        length = min(BLOCK, columns - start)
        for i in range(0, rows, 4):
            _gather(v, i * columns + start, columns, length, basis, rank, rows, columns, i, start, right)


@kernel(void(F32, F32_IN, F32_IN, int64, F32), brief=False)
def subtract(v: Any, left: Any, right: Any, rank: Any, row: Any) -> None:
    """Set `v := v - D`; `row` is float32[columns] of scratch."""
    rows, columns = left.shape[0] // rank, right.shape[0] // rank
    for start in range(0, columns, BLOCK):
        length = min(BLOCK, columns - start)
        for i in range(0, rows, 4):
            _take(v, i * columns + start, left, right, rank, rows, columns, i, start, length, row)


@kernel(void(F32_IN, F32_IN, int64, float32, F32, F32), brief=False)
def add(left: Any, right: Any, rank: Any, weight: Any, total: Any, row: Any) -> None:
    """Set `total := total + weight * D`; `row` is float32[columns] of scratch."""
    rows, columns = left.shape[0] // rank, right.shape[0] // rank
    for i in range(rows):
        _expand(left, right, rank, rows, columns, i, 0, columns, row)
        _more(total[i * columns : (i + 1) * columns], weight, row)


@kernel(void(F32_IN, F32_IN, int64, int64, F32), brief=False)
def expand(left: Any, right: Any, rank: Any, start: Any, out: Any) -> None:
    """Write the elements of D from `start` on, row after row, to the whole of `out`."""
    rows, columns = left.shape[0] // rank, right.shape[0] // rank
    at, end = start, start + out.shape[0]
    while at < end:
        i = at // columns
        upto = min((i + 1) * columns, end)
        _expand(left, right, rank, rows, columns, i, at - i * columns, upto - i * columns, out[at - start : upto - start])
        at = upto

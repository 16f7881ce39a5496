"""Products of a matrix with a few vectors, and of two thin factors: what low-rank codecs are made of.

A matrix of `rows` times `columns` lies in memory row by row. A *factor* is `rank` vectors, one after another: a left one has
vectors as long as a column, a right one as long as a row. Two of them stand for

    D[i, j] = 0 + left[0, i] * right[0, j] + left[1, i] * right[1, j] + ...          in that order

Everything is float32, and every operation is rounded by itself, in an order that is part of the format:

* `across`, left[k, i] = row i times right vector k: 64 lanes, lane j adds the products of columns j, j + 64, ... in order; the
  lanes are then added pairwise, 32 to 32, 16 to 16, and so on.
* `down`, right[k, j] = left vector k times column j: four rows at a time, `((a + b) + c) + d`, then added to what is there; rows
  that the last four lack are zero.

Orthonormal vectors are made in float64 (`against`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import F32, F32_IN, F64, bits, dots64, float32, float64, fold64, helper, int32, int64, kernel, void

__all__ = ["across", "add", "against", "down", "expand", "mix", "step_across", "step_down", "subtract"]

_MAGNITUDE = np.int32(0x7FFFFFFF)
_ZERO = np.float32(0.0)
_LANES = 64
_BLOCK = 4096
"""Columns of a pass down: four rows of them and as many vectors are 128 KiB, in a second-level cache. With 1,024, in the first
one, memory is read in pieces of a page, and a pass takes a quarter longer."""
_NOTHING = 2.0**-30
"""What is left of a vector by itself, where it is so much shorter than before, is rounding: float32 has 24 bits."""


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
    done = dots64(a, at, b, there, length // _LANES, lanes)
    for j in range(length - done):
        lanes[j] += a[at + done + j] * b[there + done + j]
    return fold64(lanes)


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
def _gather(v: Any, basis: Any, rank: Any, rows: Any, columns: Any, i: Any, start: Any, end: Any, right: Any) -> None:
    """Add what rows i to i + 3 bring to columns `start` to `end` of the right factor."""
    second, third, fourth = min(i + 1, rows - 1), min(i + 2, rows - 1), min(i + 3, rows - 1)
    p, q = v[i * columns + start : i * columns + end], v[second * columns + start : second * columns + end]
    r, s = v[third * columns + start : third * columns + end], v[fourth * columns + start : fourth * columns + end]
    for k in range(rank):
        at = k * rows
        a = basis[at + i]
        b = basis[at + i + 1] if i + 1 < rows else _ZERO
        c = basis[at + i + 2] if i + 2 < rows else _ZERO
        d = basis[at + i + 3] if i + 3 < rows else _ZERO
        _gather4(right[k * columns + start : k * columns + end], a, b, c, d, p, q, r, s)


@kernel(int32(F32_IN, F32_IN, F32_IN, int64, F32, F32, F32, F32), brief=False)
def step_across(a: Any, b: Any, basis: Any, rank: Any, left: Any, v: Any, lanes: Any, row: Any) -> Any:
    """Set `v := a + b`, write its left factor for a right `basis`, and leave in `v` what the two do not carry; return its peak.

    Args:
        a: float32[rows * columns].
        b: float32[rows * columns].
        basis: float32[rank * columns].
        rank: Vectors of a factor.
        left: float32[rank * rows].
        v: float32[rows * columns]; may be `b`.
        lanes: float32[64], scratch.
        row: float32[columns], scratch.
    """
    rows, columns = left.shape[0] // rank, basis.shape[0] // rank
    top = np.int32(0)
    for i in range(rows):
        start, end = i * columns, (i + 1) * columns
        top = max(top, _sum(a[start:end], b[start:end], v[start:end]))
        for k in range(rank):
            left[k * rows + i] = _dot(v, start, basis, k * columns, columns, lanes)
        _subtract(v[start:end], left, basis, rank, rows, columns, i, 0, columns, row)
    return top


@kernel(int32(F32_IN, F32_IN, F32_IN, int64, F32, F32), brief=False)
def step_down(a: Any, b: Any, basis: Any, rank: Any, right: Any, v: Any) -> Any:
    """Set `v := a + b` and write its right factor for a left `basis`; return the peak of `v`.

    Args:
        a: float32[rows * columns].
        b: float32[rows * columns].
        basis: float32[rank * rows].
        rank: Vectors of a factor.
        right: float32[rank * columns].
        v: float32[rows * columns]; may be `b`.
    """
    rows, columns = basis.shape[0] // rank, right.shape[0] // rank
    top = np.int32(0)
    _clear(right)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        for i in range(0, rows, 4):
            for below in range(i, min(i + 4, rows)):
                first, last = below * columns + start, below * columns + end
                top = max(top, _sum(a[first:last], b[first:last], v[first:last]))
            _gather(v, basis, rank, rows, columns, i, start, end, right)
    return top


@kernel(void(F32_IN, F32_IN, int64, F32, F32), brief=False)
def across(v: Any, basis: Any, rank: Any, left: Any, lanes: Any) -> None:
    """Write the left factor of `v` for a right `basis`; the arguments are those of `step_across`."""
    rows, columns = left.shape[0] // rank, basis.shape[0] // rank
    for i in range(rows):
        for k in range(rank):
            left[k * rows + i] = _dot(v, i * columns, basis, k * columns, columns, lanes)


@kernel(void(F32_IN, F32_IN, int64, F32), brief=False)
def down(v: Any, basis: Any, rank: Any, right: Any) -> None:
    """Write the right factor of `v` for a left `basis`; the arguments are those of `step_down`."""
    rows, columns = basis.shape[0] // rank, right.shape[0] // rank
    _clear(right)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        for i in range(0, rows, 4):
            _gather(v, basis, rank, rows, columns, i, start, end, right)


@kernel(void(F32, F32_IN, F32_IN, int64, F32), brief=False)
def subtract(v: Any, left: Any, right: Any, rank: Any, row: Any) -> None:
    """Set `v := v - D`; `row` is float32[columns] of scratch."""
    rows, columns = left.shape[0] // rank, right.shape[0] // rank
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        for i in range(rows):
            _subtract(v[i * columns + start : i * columns + end], left, right, rank, rows, columns, i, start, end, row)


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


@helper
def _multiply(a: Any, b: Any, lanes: Any) -> None:
    for j in range(a.shape[0]):
        lanes[j] += a[j] * b[j]


@helper
def _product(a: Any, b: Any, lanes: Any) -> Any:
    """Return the product of two vectors of float64, in lane order."""
    lanes[:] = 0.0
    for start in range(0, a.shape[0], _LANES):
        end = min(start + _LANES, a.shape[0])
        _multiply(a[start:end], b[start:end], lanes)
    return fold64(lanes)


@helper
def _away(a: Any, factor: Any, b: Any) -> None:
    for j in range(a.shape[0]):
        a[j] -= factor * b[j]


@kernel(float64(F64, int64, int64, F64, F64), brief=False)
def against(vectors: Any, length: Any, place: Any, mixing: Any, lanes: Any) -> Any:
    """Make a vector orthogonal to those before it, twice over, and of length 1; return how long what was left of it was.

    Args:
        vectors: float64[at least (place + 1) * length]; those before are orthonormal already.
        length: Of a vector.
        place: Which one.
        mixing: float64[at least place], receives how much of each one before it was in it.
        lanes: float64[64], scratch.

    Returns:
        0 where nothing but rounding was left; the vector is then of no use.
    """
    a = vectors[place * length : (place + 1) * length]
    before = np.sqrt(_product(a, a, lanes))
    for k in range(place):
        mixing[k] = 0.0
    for _ in range(2):
        for k in range(place):
            b = vectors[k * length : (k + 1) * length]
            share = _product(a, b, lanes)
            mixing[k] += share
            _away(a, share, b)
    left = np.sqrt(_product(a, a, lanes))
    if not left > before * _NOTHING:
        return 0.0
    for j in range(length):
        a[j] /= left
    return left


@kernel(void(F64, int64, F32_IN, F32), brief=False)
def mix(mixing: Any, rank: Any, vectors: Any, out: Any) -> None:
    """Write `out[k] = mixing[k, k] * vectors[k] + mixing[k, k + 1] * vectors[k + 1] + ...`, summed in float64.

    Args:
        mixing: float64[rank * rank], row k first.
        rank: Vectors of a factor.
        vectors: float32[rank * length].
        out: float32[rank * length], other memory.
    """
    length = vectors.shape[0] // rank
    for k in range(rank):
        for j in range(length):
            x = 0.0
            for m in range(k, rank):
                x += mixing[k * rank + m] * np.float64(vectors[m * length + j])
            out[k * length + j] = np.float32(x)

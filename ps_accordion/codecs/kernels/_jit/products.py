"""How the intrinsics of thin factors become machine code; see `lowering.py`.

Rows of a matrix and vectors meet in registers, four and four or two and two: what is read of a vector serves all these rows, and
what is read of a row all vectors. A loop over both does not vectorise, since any of its outputs might be another one's input.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from . import intrinsics
from .lanes import LANES, Wide, call, codegen, fetch, lower, typed

__all__: list[str] = []

_NUMBER = ir.IntType(64)
_LANES, _ROWS = 16, 4


class _Matrix:
    """Rows of an array, in pieces of 16 elements."""

    def __init__(self, wide: Wide, kind: Any, array: Any, first: Any, pitch: Any) -> None:
        self._wide, self._kind, self._array = wide, kind, array
        self._starts = [wide.builder.add(first, wide.builder.mul(pitch, ir.Constant(_NUMBER, r))) for r in range(2 * _ROWS)]

    def load(self, row: int, at: Any) -> Any:
        return self._wide.load(self._kind, self._array, self._wide.builder.add(self._starts[row], at))

    def store(self, lanes: Any, row: int, at: Any) -> None:
        self._wide.store(lanes, self._kind, self._array, self._wide.builder.add(self._starts[row], at))

    def fetch(self, row: int, at: Any) -> None:
        fetch(self._wide.context, self._wide.builder, self._kind, self._array, self._wide.builder.add(self._starts[row], at))


def _factors(wide: Wide, kind: Any, array: Any, place: Any, step: Any, rank: Any) -> list[list[Any]]:
    """Return, for each of four vectors, the elements of four rows, each in every lane; 0 where there is no such vector."""
    builder = wide.builder
    data = wide.context.make_array(kind)(wide.context, builder, value=array).data
    every: list[list[Any]] = [[] for _ in range(_ROWS)]
    for k in range(_ROWS):
        there = builder.icmp_signed("<", ir.Constant(_NUMBER, k), rank)
        vector = builder.select(there, ir.Constant(_NUMBER, k), ir.Constant(_NUMBER, 0))
        for r in range(_ROWS):
            at = builder.add(builder.add(place, ir.Constant(_NUMBER, r)), builder.mul(vector, step))
            loaded = builder.load(builder.gep(data, [at]))
            loaded.align = 1  # inputs may begin anywhere
            every[k].append(wide.splat(builder.select(there, loaded, ir.Constant(ir.FloatType(), 0.0))))
    return every


@typed(intrinsics.take44)  # type: ignore[untyped-decorator]  # `lanes.py` says why
def _type_take44(context: Any) -> Any:
    def answer(
        v: Any, at: Any, pitch: Any, left: Any, place: Any, step: Any, right: Any, there: Any, stride: Any, rank: Any, count: Any
    ) -> Any:
        n = types.int64
        return call(n, v, n, n, left, n, n, right, n, n, n, n)

    return answer


_N = types.int64


@lower(intrinsics.take44, types.Array, _N, _N, types.Array, _N, _N, types.Array, _N, _N, _N, _N)  # type: ignore[untyped-decorator]
def _take44(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    v, at, pitch, left, place, step, right, there, stride, rank, count = arguments
    of_v, of_left, of_right = (signature.args[i] for i in (0, 3, 6))
    wide = Wide(context, builder, ir.FloatType(), _LANES)
    rows, factors = _Matrix(wide, of_v, v, at, pitch), _factors(wide, of_left, left, place, step, rank)
    starts = []
    for k in range(_ROWS):
        here = builder.icmp_signed("<", ir.Constant(_NUMBER, k), rank)
        vector = builder.select(here, ir.Constant(_NUMBER, k), ir.Constant(_NUMBER, 0))
        starts.append(builder.add(there, builder.mul(vector, stride)))
    with codegen.for_range(builder, count) as loop:
        j = builder.mul(loop.index, ir.Constant(_NUMBER, _LANES))
        vectors = [wide.load(of_right, right, builder.add(start, j)) for start in starts]
        for r in range(_ROWS):
            rows.fetch(_ROWS + r, j)
            total = wide.constant(0.0)
            for k in range(_ROWS):
                total = builder.fadd(total, builder.fmul(factors[k][r], vectors[k]))
            rows.store(builder.fsub(rows.load(r, j), total), r, j)
    return builder.mul(count, ir.Constant(_NUMBER, _LANES))


@typed(intrinsics.gather44)  # type: ignore[untyped-decorator]  # as above
def _type_gather44(context: Any) -> Any:
    def answer(
        x: Any, at: Any, pitch: Any, basis: Any, place: Any, step: Any, out: Any, there: Any, stride: Any, count: Any
    ) -> Any:
        n = types.int64
        return call(n, x, n, n, basis, n, n, out, n, n, n)

    return answer


@lower(intrinsics.gather44, types.Array, _N, _N, types.Array, _N, _N, types.Array, _N, _N, _N)  # type: ignore[untyped-decorator]
def _gather44(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    x, at, pitch, basis, place, step, out, there, stride, count = arguments
    of_x, of_basis, of_out = (signature.args[i] for i in (0, 3, 6))
    wide = Wide(context, builder, ir.FloatType(), _LANES)
    rows, sums = _Matrix(wide, of_x, x, at, pitch), _Matrix(wide, of_out, out, there, stride)
    factors = _factors(wide, of_basis, basis, place, step, ir.Constant(_NUMBER, _ROWS))
    with codegen.for_range(builder, count) as loop:
        j = builder.mul(loop.index, ir.Constant(_NUMBER, _LANES))
        parts = [rows.load(r, j) for r in range(_ROWS)]
        for k in range(_ROWS):
            total = builder.fmul(factors[k][0], parts[0])
            for r in range(1, _ROWS):
                total = builder.fadd(total, builder.fmul(factors[k][r], parts[r]))
            sums.store(builder.fadd(sums.load(k, j), total), k, j)
    return builder.mul(count, ir.Constant(_NUMBER, _LANES))


@typed(intrinsics.dots22)  # type: ignore[untyped-decorator]  # as above
def _type_dots22(context: Any) -> Any:
    def answer(a: Any, at: Any, pitch: Any, b: Any, there: Any, stride: Any, rows: Any, out: Any) -> Any:
        return call(_N, a, _N, _N, b, _N, _N, _N, out)

    return answer


@lower(intrinsics.dots22, types.Array, _N, _N, types.Array, _N, _N, _N, types.Array)  # type: ignore[untyped-decorator]  # as above
def _dots22(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    a, at, pitch, b, there, stride, rows, out = arguments
    of_a, of_b, of_out = (signature.args[i] for i in (0, 3, 7))
    wide = Wide(context, builder, ir.FloatType())
    left, right = _Matrix(wide, of_a, a, at, pitch), _Matrix(wide, of_b, b, there, stride)
    zeros, pairs = wide.constant(0.0), [(r, k) for r in range(2) for k in range(2)]
    sums = [codegen.alloca_once(builder, wide.kind) for _ in pairs]
    for total in sums:
        builder.store(zeros, total)  # allocated once, but begun at every call
    with codegen.for_range(builder, rows) as loop:
        j = builder.mul(loop.index, ir.Constant(_NUMBER, LANES))
        parts, vectors = ([matrix.load(r, j) for r in range(2)] for matrix in (left, right))
        for (r, k), total in zip(pairs, sums, strict=True):
            builder.store(builder.fadd(builder.load(total), builder.fmul(parts[r], vectors[k])), total)
    data = context.make_array(of_out)(context, builder, value=out).data
    for place, total in enumerate(sums):
        builder.store(wide.fold(builder.load(total), builder.fadd), builder.gep(data, [ir.Constant(_NUMBER, place)])).align = 4
    return builder.mul(rows, ir.Constant(_NUMBER, LANES))

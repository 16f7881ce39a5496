"""Many numbers at once, for the intrinsics: LLVM makes of them whatever registers a processor has."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.core.typing.templates import Signature
from numba.extending import lower_builtin, type_callable

__all__ = ["AHEAD", "LANES", "LINE", "WORD", "Wide", "call", "codegen", "fetch", "lower", "typed"]

LANES = 64
LINE = 64
"""Bytes of a line of the cache."""
AHEAD = 1024
"""Elements that are fetched in advance: a page. Processors fetch by themselves what comes next, but not from the next page."""
WORD = ir.IntType(32)
lower: Any = lower_builtin  # neither has hints that mypy could follow
typed: Any = type_callable
codegen: Any = cgutils


def call(result: Any, *arguments: Any) -> Any:
    """Return the signature of a call, for numba."""
    made: Any = Signature
    return made(result, arguments, None)


def fetch(context: Any, builder: Any, kind: Any, array: Any, place: Any) -> None:
    """Start to bring the line of the cache that an element lies in; `kind` is the array's type."""
    data = context.make_array(kind)(context, builder, value=array).data
    at = builder.bitcast(builder.gep(data, [place]), ir.IntType(8).as_pointer())
    shape = ir.FunctionType(ir.VoidType(), [at.type, WORD, WORD, WORD])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [at.type], shape)
    to_read, to_stay, data_not_code = (ir.Constant(WORD, number) for number in (0, 3, 1))
    builder.call(prefetch, [at, to_read, to_stay, data_not_code])


class Wide:
    """Lanes of a kind of number, in the making."""

    def __init__(self, context: Any, builder: Any, lane: Any, lanes: int = LANES) -> None:
        self.context = context
        self.builder = builder
        self.lane = lane
        self.kind = ir.VectorType(lane, lanes)

    def place(self, kind: Any, array: Any, start: Any) -> Any:
        """Return a pointer to the lanes from `start` on; `kind` is the array's type."""
        data = self.context.make_array(kind)(self.context, self.builder, value=array).data
        return self.builder.bitcast(self.builder.gep(data, [start]), self.kind.as_pointer())

    def load(self, kind: Any, array: Any, start: Any) -> Any:
        """Return the lanes from `start` on."""
        loaded = self.builder.load(self.place(kind, array, start))
        loaded.align = 1
        return loaded

    def store(self, lanes: Any, kind: Any, array: Any, start: Any) -> None:
        """Write lanes from `start` on."""
        self.builder.store(lanes, self.place(kind, array, start)).align = kind.dtype.bitwidth // 8

    def stream(self, lanes: Any, kind: Any, array: Any, start: Any) -> None:
        """Write lanes from `start` on, which begins a line of the cache, past the cache."""
        stored = self.builder.store(lanes, self.place(kind, array, start))
        stored.align = LINE  # without it there is no such instruction
        stored.set_metadata("nontemporal", self.builder.module.add_metadata([ir.Constant(WORD, 1)]))

    def fetch(self, kind: Any, array: Any, start: Any) -> None:
        """Start to bring the lines of the cache in which the lanes from `start` on lie, whether or not they exist."""
        line = LINE * 8 // kind.dtype.bitwidth
        for at in range(0, self.kind.count, line):
            fetch(self.context, self.builder, kind, array, self.builder.add(start, ir.Constant(start.type, at)))

    def constant(self, value: Any) -> Any:
        """Return a number that is known when this is compiled in every lane."""
        return ir.Constant(self.kind, [value] * self.kind.count)

    def fold(self, lanes: Any, join: Any) -> Any:
        """Join all lanes to one, the first half to the second, and so on."""
        count = self.kind.count
        while count > 1:
            count //= 2
            first, second = ([ir.Constant(WORD, at + i) for i in range(count)] for at in (0, count))
            halves = (
                self.builder.shuffle_vector(lanes, lanes, ir.Constant(ir.VectorType(WORD, count), at)) for at in (first, second)
            )
            lanes = join(*halves)
        return self.builder.extract_element(lanes, ir.Constant(WORD, 0))

    def splat(self, value: Any) -> Any:
        """Return `value` in every lane."""
        undefined = ir.Constant(self.kind, ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(WORD, 0))
        return self.builder.shuffle_vector(
            first, undefined, ir.Constant(ir.VectorType(WORD, self.kind.count), [0] * self.kind.count)
        )

    def reach(self, lanes: Any, threshold: Any) -> Any:
        """Return a word whose bit j says whether the magnitude of lane j, as bits, reaches `threshold`."""
        magnitude = self.builder.and_(lanes, ir.Constant(self.kind, [0x7FFFFFFF] * LANES))
        return self.builder.bitcast(self.builder.icmp_signed(">=", magnitude, self.splat(threshold)), ir.IntType(64))

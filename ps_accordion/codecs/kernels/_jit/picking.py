"""How the intrinsics that pick some of many elements become machine code; see `lowering.py`.

Processors with AVX-512 move the chosen ones of 16 elements together in one instruction, which LLVM does not find by itself.
Others write each of them, and go on by one where it is chosen: no guess is needed there either.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from . import intrinsics
from .lanes import WORD, Wide, call, codegen, lower, typed

__all__: list[str] = []

_NUMBER, _BIT = ir.IntType(64), ir.IntType(1)
_LANES = 16
_MAGNITUDE = 0x7FFFFFFF


class _Picker:
    """Lanes of words, some of which are moved together."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.builder = builder
        self.words = Wide(context, builder, WORD, _LANES)
        _, _, features = context.codegen().magic_tuple()
        self._at_once = "+avx512f" in features.split(",")

    def magnitudes(self, lanes: Any) -> Any:
        return self.builder.and_(lanes, self.words.constant(_MAGNITUDE))

    def store(self, lanes: Any, chosen: Any, kind: Any, array: Any, start: Any) -> None:
        """Write the chosen lanes from `start` on; what is behind them, up to 16, may be written, too."""
        if self._at_once:
            shape = ir.FunctionType(self.words.kind, [self.words.kind, self.words.kind, chosen.type])
            name = f"llvm.x86.avx512.mask.compress.v{_LANES}i32"
            compress = codegen.get_or_insert_function(self.builder.module, shape, name)
            self.words.store(self.builder.call(compress, [lanes, self.words.constant(0), chosen]), kind, array, start)
            return
        data = self.words.context.make_array(kind)(self.words.context, self.builder, value=array).data
        for lane in range(_LANES):
            at = ir.Constant(WORD, lane)
            self.builder.store(self.builder.extract_element(lanes, at), self.builder.gep(data, [start]))
            start = self.builder.add(start, self.builder.zext(self.builder.extract_element(chosen, at), _NUMBER))

    def count(self, chosen: Any) -> Any:
        """Return how many lanes are chosen."""
        mask = self.builder.bitcast(chosen, ir.IntType(_LANES))
        return self.builder.zext(self.builder.ctpop(mask), _NUMBER)


def _rows(builder: Any, rows: Any, begun: Any, some: Any) -> Any:
    """Return what comes of a count that begins at `begun`, and to which each row adds what `some(row, count)` returns."""
    count = codegen.alloca_once(builder, _NUMBER)
    builder.store(begun, count)  # allocated once, but begun at every call
    with codegen.for_range(builder, rows) as loop:
        before = builder.load(count)
        more = some(builder.mul(loop.index, ir.Constant(_NUMBER, _LANES)), before)
        builder.store(builder.add(before, more), count)
    return builder.load(count)


@typed(intrinsics.keep)  # type: ignore[untyped-decorator]  # `lanes.py` says why
def _type_keep(context: Any) -> Any:
    def answer(index: Any, words: Any, start: Any, rows: Any, least: Any, into: Any) -> Any:
        return call(types.int64, index, words, types.int64, types.int64, types.int32, types.int64)

    return answer


@lower(intrinsics.keep, types.Array, types.Array, types.int64, types.int64, types.int32, types.int64)  # type: ignore[untyped-decorator]
def _keep(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    index, words, start, rows, least, into = arguments
    of_index, of_words, *_ = signature.args
    picker = _Picker(context, builder)
    above = picker.words.splat(least)

    def some(row: Any, before: Any) -> Any:
        at = builder.add(start, row)
        places, values = picker.words.load(of_index, index, at), picker.words.load(of_words, words, at)
        chosen = builder.icmp_signed(">", picker.magnitudes(values), above)
        picker.store(places, chosen, of_index, index, before)
        picker.store(values, chosen, of_words, words, before)
        return picker.count(chosen)

    return _rows(builder, rows, into, some)


@typed(intrinsics.within)  # type: ignore[untyped-decorator]  # as above
def _type_within(context: Any) -> Any:
    def answer(words: Any, rows: Any, low: Any, high: Any, out: Any) -> Any:
        return call(types.int64, words, types.int64, types.int32, types.int32, out)

    return answer


@lower(intrinsics.within, types.Array, types.int64, types.int32, types.int32, types.Array)  # type: ignore[untyped-decorator]
def _within(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    words, rows, low, high, out = arguments
    of_words, _, _, _, of_out = signature.args
    picker = _Picker(context, builder)
    bottom, top = picker.words.splat(low), picker.words.splat(high)

    def some(row: Any, before: Any) -> Any:
        magnitudes = picker.magnitudes(picker.words.load(of_words, words, row))
        chosen = builder.and_(builder.icmp_signed(">=", magnitudes, bottom), builder.icmp_signed("<=", magnitudes, top))
        picker.store(magnitudes, chosen, of_out, out, before)
        return picker.count(chosen)

    return _rows(builder, rows, ir.Constant(_NUMBER, 0), some)

"""How the intrinsics of quantising codecs become machine code; see `lowering.py`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from . import quantisers
from .lanes import AHEAD, LANES, WORD, Wide, call, codegen, lower, typed

__all__: list[str] = []

_NUMBER, _BYTE = ir.IntType(64), ir.IntType(8)
_FLOAT = types.float32
_ROWS = types.int64


class _Lanes:
    """The kinds of lanes that rounding needs, and what it does to them."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.builder = builder
        self.floats = Wide(context, builder, ir.FloatType())
        self.words = Wide(context, builder, WORD)
        self.bytes = Wide(context, builder, _BYTE)

    def bits(self, lanes: Any) -> Any:
        return self.builder.bitcast(lanes, self.words.kind)

    def above(self, lanes: Any, places: int) -> Any:
        """Return the words without their lowest bits."""
        return self.builder.lshr(lanes, self.words.constant(places))

    def masked(self, lanes: Any, mask: int) -> Any:
        return self.builder.and_(lanes, self.words.constant(mask))

    def larger(self, one: Any, two: Any) -> Any:
        return self.builder.select(self.builder.icmp_signed(">", one, two), one, two)

    def code(self, lanes: Any) -> Any:
        """Return the lowest byte of each word."""
        return self.builder.trunc(lanes, self.bytes.kind)

    def beside(self, low: Any, high: Any) -> Any:
        """Return the lowest four bits of `low`, and `high` above them, which has none there."""
        return self.code(self.builder.or_(self.masked(low, 15), self.masked(high, 0xF0)))

    def hashed(self, places: Any, low: Any, high: Any) -> tuple[Any, Any]:
        """Return the noise of two elements a place, as `noise.hashed` has it: words whose upper and whose lower half counts."""
        builder, words = self.builder, self.words
        x = builder.xor(places, low)
        x = builder.mul(builder.xor(x, self.above(x, 16)), words.constant(0x7FEB352D))
        x = builder.mul(builder.xor(builder.xor(x, self.above(x, 15)), high), words.constant(0x846CA68B))
        return x, builder.xor(x, self.above(x, 16))


def _declare(function: Any, result: Any, arguments: tuple[Any, ...]) -> None:
    """Say what type a call has: numbers are converted to those of `arguments`, and arrays stay what they are."""

    def answer(*given: Any) -> Any:
        return call(result, *(came if kind is types.Array else kind for kind, came in zip(arguments, given, strict=True)))

    answer.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]  # what numba looks at
    typed(function)(lambda context: answer)


def _largest(function: Any, arguments: tuple[Any, ...], made: Callable[[_Lanes, Any, tuple[Any, ...], Any], Any]) -> None:
    """Lower an intrinsic that returns the bits of the largest magnitude among lanes that `made` makes from a place on."""
    _declare(function, types.int32, arguments)

    @lower(function, *arguments)  # type: ignore[untyped-decorator]  # `lanes.py` says why
    def _lowered(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        lanes = _Lanes(context, builder)
        none = lanes.words.constant(0)
        top = codegen.alloca_once_value(builder, none)
        builder.store(none, top)  # allocated once, but begun at every call
        with codegen.for_range(builder, given[-1]) as loop:
            values = made(lanes, signature.args, given, builder.mul(loop.index, ir.Constant(_NUMBER, LANES)))
            builder.store(lanes.larger(builder.load(top), lanes.masked(lanes.bits(values), 0x7FFFFFFF)), top)
        return lanes.words.fold(builder.load(top), lanes.larger)


def _fetch(lanes: _Lanes, kind: Any, array: Any, *places: Any) -> None:
    """Fetch what comes a page behind lanes."""
    for at in places:
        lanes.floats.fetch(kind, array, lanes.builder.add(at, ir.Constant(_NUMBER, AHEAD)))


def _peak(lanes: _Lanes, kinds: Any, given: Any, at: Any) -> Any:
    return lanes.floats.load(kinds[0], given[0], at)


def _scaled(lanes: _Lanes, kinds: Any, given: Any, at: Any) -> Any:
    a, scale, out, _ = given
    product = lanes.builder.fmul(lanes.floats.load(kinds[0], a, at), lanes.floats.splat(scale))
    values = lanes.builder.fadd(product, lanes.floats.constant(0.0))
    lanes.floats.store(values, kinds[2], out, at)
    return values


def _added_up(lanes: _Lanes, kinds: Any, given: Any, at: Any) -> Any:
    a, scale, b, *_ = given
    product = lanes.builder.fmul(lanes.floats.load(kinds[0], a, at), lanes.floats.splat(scale))
    return lanes.builder.fadd(product, lanes.floats.load(kinds[2], b, at))


def _summed(lanes: _Lanes, kinds: Any, given: Any, at: Any) -> Any:
    _fetch(lanes, kinds[2], given[2], at)
    values = _added_up(lanes, kinds, given, at)
    lanes.floats.store(values, kinds[3], given[3], at)
    return values


def _summed_past(lanes: _Lanes, kinds: Any, given: Any, at: Any) -> Any:
    values = _added_up(lanes, kinds, given, at)
    lanes.floats.stream(values, kinds[3], given[3], at)
    return values


_largest(quantisers.peak64, (types.Array, _ROWS), _peak)
_largest(quantisers.scale64, (types.Array, _FLOAT, types.Array, _ROWS), _scaled)
_largest(quantisers.sum64, (types.Array, _FLOAT, types.Array, types.Array, _ROWS), _summed)
_largest(quantisers.sum_past64, (types.Array, _FLOAT, types.Array, types.Array, _ROWS), _summed_past)


def _pairs(function: Any, arguments: tuple[Any, ...], made: Callable[[_Lanes, Any, tuple[Any, ...], Any, Any], None]) -> None:
    """Lower an intrinsic that works on lanes of the first and of the second half of a bucket at once, which `made` does.

    Its last arguments are a vector, of which that is fetched which comes a page behind as many elements, and how many times 64
    elements are a half. It returns how many both are.
    """
    _declare(function, types.int64, arguments)

    @lower(function, *arguments)  # type: ignore[untyped-decorator]  # `lanes.py` says why
    def _lowered(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        lanes = _Lanes(context, builder)
        half = builder.mul(given[-1], ir.Constant(_NUMBER, LANES))
        with codegen.for_range(builder, given[-1]) as loop:
            front = builder.mul(loop.index, ir.Constant(_NUMBER, LANES))
            back = builder.add(half, front)
            _fetch(lanes, signature.args[-2], given[-2], front, back)
            made(lanes, signature.args, given, front, back)
        return builder.add(half, half)


def _nearest(lanes: _Lanes, kinds: Any, given: Any, at: Any, past: bool) -> Any:
    """Return words with a code in their lowest bits; what it does not carry stays in the row, or goes `past` the cache."""
    (row, inverse, scale, magic), builder, floats = given[:4], lanes.builder, lanes.floats
    values, steady = floats.load(kinds[0], row, at), floats.splat(magic)
    shifted = builder.fadd(builder.fmul(values, floats.splat(inverse)), steady)
    kept = builder.fsub(values, builder.fmul(builder.fsub(shifted, steady), floats.splat(scale)))
    if past:
        floats.stream(kept, kinds[5], given[5], builder.add(given[6], at))
    else:
        floats.store(kept, kinds[0], row, at)
    return lanes.bits(shifted)


def _round8(past: bool, lanes: _Lanes, kinds: Any, given: Any, front: Any, back: Any) -> None:
    for at in (front, back):
        lanes.bytes.store(lanes.code(_nearest(lanes, kinds, given, at, past)), kinds[4], given[4], at)


def _round4(past: bool, lanes: _Lanes, kinds: Any, given: Any, front: Any, back: Any) -> None:
    low, high = (_nearest(lanes, kinds, given, at, past) for at in (front, back))
    high = lanes.builder.shl(high, lanes.words.constant(4))
    lanes.bytes.store(lanes.beside(low, high), kinds[4], given[4], front)


_ROUND = (types.Array, _FLOAT, _FLOAT, _FLOAT, types.Array)
for _near, _past, _made in (
    (quantisers.round8, quantisers.round_past8, _round8),
    (quantisers.round4, quantisers.round_past4, _round4),
):
    _pairs(_near, (*_ROUND, types.Array, _ROWS), functools.partial(_made, False))
    _pairs(_past, (*_ROUND, types.Array, types.int64, types.Array, _ROWS), functools.partial(_made, True))


def _noise(lanes: _Lanes, first: Any, low: Any, high: Any, front: Any) -> tuple[Any, Any]:
    builder, words = lanes.builder, lanes.words
    counted = ir.Constant(words.kind, list(range(LANES)))
    places = builder.add(words.splat(builder.add(first, builder.trunc(front, WORD))), counted)
    return lanes.hashed(places, words.splat(low), words.splat(high))


def _dithered(lanes: _Lanes, kinds: Any, given: Any, front: Any, back: Any) -> tuple[Any, Any]:
    """Return words with a code above their 15 lowest bits."""
    (v, inverse, magic, first, low, high), builder, floats = given[:6], lanes.builder, lanes.floats
    upper, lower_half = _noise(lanes, first, low, high, front)
    made = []
    for at, noise in ((front, lanes.masked(lanes.above(upper, 17), 0x7FFF)), (back, lanes.masked(lower_half, 0x7FFF))):
        shifted = builder.fadd(builder.fmul(floats.load(kinds[0], v, at), floats.splat(inverse)), floats.splat(magic))
        made.append(builder.add(lanes.bits(shifted), noise))
    return made[0], made[1]


def _dither8(lanes: _Lanes, kinds: Any, given: Any, front: Any, back: Any) -> None:
    for at, word in zip((front, back), _dithered(lanes, kinds, given, front, back), strict=True):
        lanes.bytes.store(lanes.code(lanes.above(word, 15)), kinds[6], given[6], at)


def _dither4(lanes: _Lanes, kinds: Any, given: Any, front: Any, back: Any) -> None:
    low, high = _dithered(lanes, kinds, given, front, back)
    lanes.bytes.store(lanes.beside(lanes.above(low, 15), lanes.above(high, 11)), kinds[6], given[6], front)


def _powers8(lanes: _Lanes, kinds: Any, given: Any, front: Any, back: Any) -> None:
    (v, inverse, first, low, high, codes), builder, floats = given[:6], lanes.builder, lanes.floats
    upper, lower_half = _noise(lanes, first, low, high, front)
    noises = lanes.above(upper, 9), builder.shl(lower_half, lanes.words.constant(7))
    for at, noise in zip((front, back), noises, strict=True):
        # Plus zero: it takes the sign from a zero.
        scaled = builder.fmul(builder.fadd(floats.load(kinds[0], v, at), floats.constant(0.0)), floats.splat(inverse))
        noise = builder.or_(lanes.masked(noise, 0x007FFF80), lanes.words.constant(0x40))
        word = builder.add(lanes.bits(scaled), noise)
        # No exponent has its highest bit set, so that one shift leaves room for the sign.
        code = builder.or_(lanes.above(word, 23), lanes.masked(lanes.above(word, 24), 0x80))
        lanes.bytes.store(lanes.code(code), kinds[5], codes, at)


_KEY = (types.uint32, types.uint32, types.uint32)
_DITHER = (types.Array, _FLOAT, _FLOAT, *_KEY, types.Array, types.Array, _ROWS)
_pairs(quantisers.dither8, _DITHER, _dither8)
_pairs(quantisers.dither4, _DITHER, _dither4)
_pairs(quantisers.powers8, (types.Array, _FLOAT, *_KEY, types.Array, types.Array, _ROWS), _powers8)


def _places(lanes: _Lanes, kind: Any, codes: Any, at: Any) -> Any:
    """Return codes as words, and fetch what comes later: members are read in pieces, which processors do not foresee."""
    lanes.bytes.fetch(kind, codes, lanes.builder.add(at, ir.Constant(_NUMBER, AHEAD)))
    return lanes.builder.zext(lanes.bytes.load(kind, codes, at), lanes.words.kind)


def _linear(lanes: _Lanes, code: Any, half: Any) -> Any:
    return lanes.builder.fsub(lanes.builder.uitofp(code, lanes.floats.kind), lanes.floats.splat(half))


def _power(lanes: _Lanes, code: Any) -> Any:
    builder, words = lanes.builder, lanes.words
    exponent = builder.shl(lanes.masked(code, 0x7F), words.constant(23))
    return builder.bitcast(builder.or_(exponent, builder.shl(lanes.masked(code, 0x80), words.constant(24))), lanes.floats.kind)


def _numbers8(lanes: _Lanes, kind: Any, codes: Any, half: Any, rows: Any, at: Any) -> Any:
    yield at, _linear(lanes, _places(lanes, kind, codes, at), half)


def _numbers4(lanes: _Lanes, kind: Any, codes: Any, half: Any, rows: Any, at: Any) -> Any:
    both = _places(lanes, kind, codes, at)
    yield at, _linear(lanes, lanes.masked(both, 15), half)
    behind = lanes.builder.mul(rows, ir.Constant(_NUMBER, LANES))
    yield lanes.builder.add(behind, at), _linear(lanes, lanes.above(both, 4), half)


def _numbers_of_powers8(lanes: _Lanes, kind: Any, codes: Any, half: Any, rows: Any, at: Any) -> Any:
    yield at, _power(lanes, _places(lanes, kind, codes, at))


def _decoded(function: Any, numbers: Callable[..., Any], *, fresh: bool) -> None:
    """Lower an intrinsic that adds what codes stand for to a total, or to zero: `numbers` yields places and numbers."""
    arguments = (types.Array, _FLOAT, _FLOAT, _FLOAT, types.Array, _ROWS)
    _declare(function, types.int64, arguments)

    @lower(function, *arguments)  # type: ignore[untyped-decorator]  # `lanes.py` says why
    def _lowered(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        lanes = _Lanes(context, builder)
        floats, (codes, half, scale, weight, total, rows) = lanes.floats, given
        of_codes, of_total = signature.args[0], signature.args[4]
        with codegen.for_range(builder, rows) as loop:
            at = builder.mul(loop.index, ir.Constant(_NUMBER, LANES))
            for place, number in numbers(lanes, of_codes, codes, half, rows, at):
                value = builder.fmul(floats.splat(weight), builder.fmul(number, floats.splat(scale)))
                if not fresh:
                    _fetch(lanes, of_total, total, place)
                before = floats.constant(0.0) if fresh else floats.load(of_total, total, place)
                floats.store(builder.fadd(before, value), of_total, total, place)
        return rows


_decoded(quantisers.begin8, _numbers8, fresh=True)
_decoded(quantisers.begin4, _numbers4, fresh=True)
_decoded(quantisers.begin_powers8, _numbers_of_powers8, fresh=True)
_decoded(quantisers.add8, _numbers8, fresh=False)
_decoded(quantisers.add4, _numbers4, fresh=False)
_decoded(quantisers.add_powers8, _numbers_of_powers8, fresh=False)

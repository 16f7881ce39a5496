"""How the intrinsics become machine code. Importing this module tells numba, so only the compiler does."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from . import intrinsics
from .lanes import LANES, LINE, WORD, Wide, call, codegen, fetch, lower, typed

__all__: list[str] = []


def _declare(function: Any, result: Any, argument: Any) -> None:
    """Say what type a call has; numba converts what is passed to `argument`, as it does for any function."""
    typed(function)(lambda context: lambda x: call(result, argument))


_declare(intrinsics.bits, types.int32, types.float32)
_declare(intrinsics.real, types.float32, types.int32)
_declare(intrinsics.lowest_bit, types.int64, types.uint64)
_declare(intrinsics.count_bits, types.int64, types.uint64)


@typed(intrinsics.mask64)  # type: ignore[untyped-decorator]  # as above
def _type_mask64(context: Any) -> Any:
    def answer(array: Any, start: Any, threshold: Any) -> Any:
        return call(types.uint64, array, types.int64, types.int32)

    return answer


@lower(intrinsics.bits, types.float32)  # type: ignore[untyped-decorator]  # as above
def _bits(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.bitcast(arguments[0], ir.IntType(32))


@lower(intrinsics.real, types.int32)  # type: ignore[untyped-decorator]  # as above
def _real(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.bitcast(arguments[0], ir.FloatType())


@lower(intrinsics.lowest_bit, types.uint64)  # type: ignore[untyped-decorator]  # as above
def _lowest_bit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))


@lower(intrinsics.count_bits, types.uint64)  # type: ignore[untyped-decorator]  # as above
def _count_bits(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.ctpop(arguments[0])


@typed(intrinsics.fetch)  # type: ignore[untyped-decorator]  # as above
def _type_fetch(context: Any) -> Any:
    def answer(array: Any, place: Any) -> Any:
        return call(types.none, array, types.int64)

    return answer


@lower(intrinsics.fetch, types.Array, types.int64)  # type: ignore[untyped-decorator]  # as above
def _fetch(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    fetch(context, builder, signature.args[0], *arguments)
    return context.get_dummy_value()


@typed(intrinsics.off_line)  # type: ignore[untyped-decorator]  # as above
def _type_off_line(context: Any) -> Any:
    return lambda array: call(types.int64, array)


@lower(intrinsics.off_line, types.Array)  # type: ignore[untyped-decorator]  # as above
def _off_line(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    data = context.make_array(signature.args[0])(context, builder, value=arguments[0]).data
    number = ir.IntType(64)
    beyond = builder.and_(builder.neg(builder.ptrtoint(data, number)), ir.Constant(number, LINE - 1))
    return builder.lshr(beyond, ir.Constant(number, 2))


@typed(intrinsics.stream16)  # type: ignore[untyped-decorator]  # as above
def _type_stream16(context: Any) -> Any:
    return lambda source, at, out, start: call(types.int64, source, types.int64, out, types.int64)


@lower(intrinsics.stream16, types.Array, types.int64, types.Array, types.int64)  # type: ignore[untyped-decorator]  # as above
def _stream16(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    source, at, out, start = arguments
    of_source, _, of_out, _ = signature.args
    line = Wide(context, builder, ir.FloatType(), lanes=LINE // 4)
    line.stream(line.load(of_source, source, at), of_out, out, start)
    return builder.add(start, ir.Constant(ir.IntType(64), LINE // 4))


@typed(intrinsics.flush)  # type: ignore[untyped-decorator]  # as above
def _type_flush(context: Any) -> Any:
    return lambda out: call(types.none, out)


@lower(intrinsics.flush, types.Array)  # type: ignore[untyped-decorator]  # as above
def _flush(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    builder.fence("seq_cst")
    return context.get_dummy_value()


@typed(intrinsics.mix64)  # type: ignore[untyped-decorator]  # as above
def _type_mix64(context: Any) -> Any:
    def answer(a: Any, scale: Any, b: Any, out: Any, start: Any, threshold: Any) -> Any:
        return call(types.uint64, a, types.float32, b, out, types.int64, types.int32)

    return answer


@lower(intrinsics.mask64, types.Array, types.int64, types.int32)  # type: ignore[untyped-decorator]  # as above
def _mask64(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array, start, threshold = arguments
    words = Wide(context, builder, WORD)
    return words.reach(words.load(signature.args[0], array, start), threshold)


@lower(intrinsics.mix64, types.Array, types.float32, types.Array, types.Array, types.int64, types.int32)  # type: ignore[untyped-decorator]
def _mix64(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    a, scale, b, out, start, threshold = arguments
    of_a, _, of_b, of_out, _, _ = signature.args
    floats, words = Wide(context, builder, ir.FloatType()), Wide(context, builder, WORD)
    product = builder.fmul(floats.load(of_a, a, start), floats.splat(scale))
    mixed = builder.fadd(product, floats.load(of_b, b, start))
    builder.store(mixed, floats.place(of_out, out, start)).align = 4
    return words.reach(builder.bitcast(mixed, words.kind), threshold)


@typed(intrinsics.mix_past64)  # type: ignore[untyped-decorator]  # as above
def _type_mix_past64(context: Any) -> Any:
    def answer(a: Any, scale: Any, b: Any, out: Any, start: Any, threshold: Any) -> Any:
        return call(types.uint64, a, types.float32, b, out, types.int64, types.int32)

    return answer


@lower(intrinsics.mix_past64, types.Array, types.float32, types.Array, types.Array, types.int64, types.int32)  # type: ignore[untyped-decorator]  # as above
def _mix_past64(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    a, scale, b, out, start, threshold = arguments
    of_a, _, of_b, of_out, _, _ = signature.args
    floats, words = Wide(context, builder, ir.FloatType()), Wide(context, builder, WORD)
    mixed = builder.fadd(builder.fmul(floats.load(of_a, a, start), floats.splat(scale)), floats.load(of_b, b, start))
    floats.stream(mixed, of_out, out, start)
    return words.reach(builder.bitcast(mixed, words.kind), threshold)


@typed(intrinsics.masses64)  # type: ignore[untyped-decorator]  # as above
def _type_masses64(context: Any) -> Any:
    def answer(a: Any, scale: Any, b: Any, start: Any, out: Any, rows: Any, lanes: Any) -> Any:
        return call(types.int64, a, types.float32, b, types.int64, out, types.int64, lanes)

    return answer


@typed(intrinsics.dots64)  # type: ignore[untyped-decorator]  # as above
def _type_dots64(context: Any) -> Any:
    def answer(a: Any, at: Any, b: Any, there: Any, rows: Any, lanes: Any) -> Any:
        return call(types.int64, a, types.int64, b, types.int64, types.int64, lanes)

    return answer


@typed(intrinsics.add_signs64)  # type: ignore[untyped-decorator]  # as above
def _type_add_signs64(context: Any) -> Any:
    def answer(
        words: Any, word: Any, stride: Any, sizes: Any, size: Any, step: Any, members: Any, fresh: Any, total: Any, start: Any
    ) -> Any:
        number = types.int64
        return call(number, words, number, number, sizes, number, number, number, types.boolean, total, number)

    return answer


@lower(intrinsics.masses64, types.Array, types.float32, types.Array, types.int64, types.Array, types.int64, types.Array)  # type: ignore[untyped-decorator]
def _masses64(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    a, scale, b, start, out, rows, lanes = arguments
    of_a, _, of_b, _, of_out, _, of_lanes = signature.args
    floats, words = Wide(context, builder, ir.FloatType()), Wide(context, builder, WORD)
    doubles = Wide(context, builder, ir.DoubleType())
    factor, stride = floats.splat(scale), ir.Constant(ir.IntType(64), LANES)
    sums = codegen.alloca_once_value(builder, ir.Constant(doubles.kind, [0.0] * LANES))
    builder.store(ir.Constant(doubles.kind, [0.0] * LANES), sums)  # allocated once, but begun at every call
    with codegen.for_range(builder, rows) as loop:
        into = builder.mul(loop.index, stride)
        at = builder.add(start, into)
        mixed = builder.fadd(builder.fmul(floats.load(of_a, a, at), factor), floats.load(of_b, b, at))
        builder.store(mixed, floats.place(of_out, out, into)).align = 4
        magnitude = builder.and_(builder.bitcast(mixed, words.kind), ir.Constant(words.kind, [0x7FFFFFFF] * LANES))
        wide = builder.fpext(builder.bitcast(magnitude, floats.kind), doubles.kind)
        builder.store(builder.fadd(builder.load(sums), wide), sums)
    builder.store(builder.load(sums), doubles.place(of_lanes, lanes, ir.Constant(ir.IntType(64), 0))).align = 8
    return builder.mul(rows, stride)


@typed(intrinsics.fold64)  # type: ignore[untyped-decorator]  # as above
def _type_fold64(context: Any) -> Any:
    return lambda lanes: call(lanes.dtype, lanes)


@lower(intrinsics.fold64, types.Array)  # type: ignore[untyped-decorator]  # as above
def _fold64(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    wide = Wide(context, builder, ir.DoubleType() if signature.return_type == types.float64 else ir.FloatType())
    return wide.fold(wide.load(signature.args[0], arguments[0], ir.Constant(ir.IntType(64), 0)), builder.fadd)


@lower(intrinsics.dots64, types.Array, types.int64, types.Array, types.int64, types.int64, types.Array)  # type: ignore[untyped-decorator]
def _dots64(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    a, at, b, there, rows, lanes = arguments
    of_a, _, of_b, _, _, of_lanes = signature.args
    floats, stride = Wide(context, builder, ir.FloatType()), ir.Constant(ir.IntType(64), LANES)
    zeros = ir.Constant(floats.kind, [0.0] * LANES)
    sums = codegen.alloca_once_value(builder, zeros)
    builder.store(zeros, sums)  # allocated once, but begun at every call
    with codegen.for_range(builder, rows) as loop:
        step = builder.mul(loop.index, stride)
        left = floats.load(of_a, a, builder.add(at, step))
        right = floats.load(of_b, b, builder.add(there, step))
        builder.store(builder.fadd(builder.load(sums), builder.fmul(left, right)), sums)
    builder.store(builder.load(sums), floats.place(of_lanes, lanes, ir.Constant(ir.IntType(64), 0))).align = 4
    return builder.mul(rows, stride)


def _taking(function: Any, *, past: bool) -> None:
    """Lower an intrinsic that halves lanes into signs and what they do not carry."""

    @typed(function)  # type: ignore[untyped-decorator]  # as above
    def _type(context: Any) -> Any:
        def answer(row: Any, at: Any, size: Any, out: Any, start: Any) -> Any:
            return call(types.uint64, row, types.int64, types.float32, out, types.int64)

        return answer

    @lower(function, types.Array, types.int64, types.float32, types.Array, types.int64)  # type: ignore[untyped-decorator]  # as above
    def _lowered(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, at, size, out, start = arguments
        of_row, _, _, of_out, _ = signature.args
        floats = Wide(context, builder, ir.FloatType())
        values = floats.load(of_row, row, at)
        negative = builder.fcmp_ordered("<", values, ir.Constant(floats.kind, [0.0] * LANES))
        sent = builder.select(negative, floats.splat(builder.fneg(size)), floats.splat(size))
        (floats.stream if past else floats.store)(builder.fsub(values, sent), of_out, out, start)
        return builder.bitcast(negative, ir.IntType(64))


_taking(intrinsics.take_signs64, past=False)
_taking(intrinsics.take_signs_past64, past=True)


@lower(
    intrinsics.add_signs64,
    *(types.Array, types.int64, types.int64, types.Array, types.int64, types.int64),
    *(types.int64, types.boolean, types.Array, types.int64),
)  # type: ignore[untyped-decorator]  # as above
def _add_signs64(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    words, word, stride, sizes, size, step, members, fresh, total, start = arguments
    of_words, of_sizes, of_total = (signature.args[place] for place in (0, 3, 8))
    floats, double_word = Wide(context, builder, ir.FloatType()), ir.IntType(64)
    of_word = context.make_array(of_words)(context, builder, value=words).data
    of_size = context.make_array(of_sizes)(context, builder, value=sizes).data
    zero = ir.Constant(floats.kind, [0.0] * LANES)
    begun = builder.select(fresh, zero, floats.load(of_total, total, start))
    sums = codegen.alloca_once(builder, floats.kind)
    builder.store(begun, sums)
    with codegen.for_range(builder, members) as loop:
        at = builder.gep(of_word, [builder.add(word, builder.mul(loop.index, stride))])
        bits = builder.load(builder.bitcast(at, double_word.as_pointer()))
        bits.align = 1
        value = builder.load(builder.gep(of_size, [builder.add(size, builder.mul(loop.index, step))]))
        value.align = 1
        negative = builder.bitcast(bits, ir.VectorType(ir.IntType(1), LANES))
        sent = builder.select(negative, floats.splat(builder.fneg(value)), floats.splat(value))
        builder.store(builder.fadd(builder.load(sums), sent), sums)
    builder.store(builder.load(sums), floats.place(of_total, total, start)).align = 4
    return builder.add(start, ir.Constant(double_word, LANES))


@typed(intrinsics.butterfly32)  # type: ignore[untyped-decorator]  # as above
def _type_butterfly32(context: Any) -> Any:
    def answer(x: Any, start: Any, stride: Any, out: Any, at: Any, step: Any) -> Any:
        return call(types.int64, x, types.int64, types.int64, out, types.int64, types.int64)

    return answer


@lower(intrinsics.butterfly32, types.Array, types.int64, types.int64, types.Array, types.int64, types.int64)  # type: ignore[untyped-decorator]  # as above
def _butterfly32(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    x, start, stride, out, at, step = arguments
    of_x, _, _, of_out, _, _ = signature.args
    short = Wide(context, builder, ir.FloatType(), 16)
    number = ir.IntType(64)

    def row(first: Any, apart: Any, r: int) -> Any:
        return builder.add(first, builder.mul(apart, ir.Constant(number, r)))

    rows = [short.load(of_x, x, row(start, stride, r)) for r in range(32)]
    for h in (16, 8, 4, 2, 1):
        for r in range(32):
            if not r & h:
                rows[r], rows[r + h] = builder.fadd(rows[r], rows[r + h]), builder.fsub(rows[r], rows[r + h])
    for r in range(32):
        builder.store(rows[r], short.place(of_out, out, row(at, step, r))).align = 4
    return start


@typed(intrinsics.signed16)  # type: ignore[untyped-decorator]  # as above
def _type_signed16(context: Any) -> Any:
    def answer(x: Any, start: Any, word: Any, factors: Any, out: Any, at: Any) -> Any:
        return call(types.int64, x, types.int64, types.uint32, factors, out, types.int64)

    return answer


@lower(intrinsics.signed16, types.Array, types.int64, types.uint32, types.Array, types.Array, types.int64)  # type: ignore[untyped-decorator]
def _signed16(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    x, start, word, factors, out, at = arguments
    of_x, _, _, of_factors, of_out, _ = signature.args
    short = Wide(context, builder, ir.FloatType(), 16)
    row, factor = short.load(of_x, x, start), short.load(of_factors, factors, ir.Constant(ir.IntType(64), 0))
    turned = builder.bitcast(builder.trunc(word, ir.IntType(16)), ir.VectorType(ir.IntType(1), 16))
    scaled = builder.fmul(builder.select(turned, builder.fneg(row), row), factor)
    builder.store(scaled, short.place(of_out, out, at)).align = 4
    return start

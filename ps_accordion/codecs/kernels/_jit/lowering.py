"""How the intrinsics become machine code. Importing this module tells numba, so only the compiler does."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import Signature
from numba.extending import lower_builtin, type_callable

from . import intrinsics

__all__: list[str] = []

_LANES = 64
_lower: Any = lower_builtin  # neither has hints that mypy could follow
_typed: Any = type_callable


def _call(result: Any, *arguments: Any) -> Any:
    made: Any = Signature
    return made(result, arguments, None)


def _declare(function: Any, result: Any, argument: Any) -> None:
    """Say what type a call has; numba converts what is passed to `argument`, as it does for any function."""
    _typed(function)(lambda context: lambda x: _call(result, argument))


_declare(intrinsics.bits, types.int32, types.float32)
_declare(intrinsics.real, types.float32, types.int32)
_declare(intrinsics.lowest_bit, types.int64, types.uint64)
_declare(intrinsics.count_bits, types.int64, types.uint64)


@_typed(intrinsics.mask64)  # type: ignore[untyped-decorator]  # as above
def _type_mask64(context: Any) -> Any:
    def answer(array: Any, start: Any, threshold: Any) -> Any:
        return _call(types.uint64, array, types.int64, types.int32)

    return answer


@_lower(intrinsics.bits, types.float32)  # type: ignore[untyped-decorator]  # as above
def _bits(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.bitcast(arguments[0], ir.IntType(32))


@_lower(intrinsics.real, types.int32)  # type: ignore[untyped-decorator]  # as above
def _real(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.bitcast(arguments[0], ir.FloatType())


@_lower(intrinsics.lowest_bit, types.uint64)  # type: ignore[untyped-decorator]  # as above
def _lowest_bit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))


@_lower(intrinsics.count_bits, types.uint64)  # type: ignore[untyped-decorator]  # as above
def _count_bits(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.ctpop(arguments[0])


@_lower(intrinsics.mask64, types.Array, types.int64, types.int32)  # type: ignore[untyped-decorator]  # as above
def _mask64(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    word = ir.IntType(32)
    wide = ir.VectorType(word, _LANES)
    data = context.make_array(signature.args[0])(context, builder, value=arguments[0]).data
    place = builder.bitcast(builder.gep(data, [arguments[1]]), wide.as_pointer())
    loaded = builder.load(place)
    loaded.align = 1
    magnitude = builder.and_(loaded, ir.Constant(wide, [0x7FFFFFFF] * _LANES))
    undefined = ir.Constant(wide, ir.Undefined)
    first = builder.insert_element(undefined, arguments[2], ir.Constant(word, 0))
    splat = builder.shuffle_vector(first, undefined, ir.Constant(wide, [0] * _LANES))
    return builder.bitcast(builder.icmp_signed(">=", magnitude, splat), ir.IntType(64))

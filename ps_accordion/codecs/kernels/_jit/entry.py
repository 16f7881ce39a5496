"""The code in front of a kernel: from Python objects to numbers and pointers, each checked before memory is touched.

An entry is the C function behind a built-in: `PyObject *entry(PyObject *self, PyObject *const *arguments, Py_ssize_t count)`.
Numbers are converted first, because that can run Python code, which could change an array. Then all arrays are checked and taken
apart, and the kernel runs without the GIL, unless it is brief and all are short. If something does not fit, there is a Python
error, for `library.Kernel` to explain.

Who finds the GIL taken sleeps, and wakes some 40 us later: longer than most kernels take on a partition, and than there is Python
between two of them. So a thread that comes back from a kernel says so in one word, `native.TURN`, and takes that back where its
next kernel begins. Who comes back and finds another one's name there looks for some microseconds whether it goes before it asks
for the GIL. The word is a hint: one that is left behind costs who comes next that wait, once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.np.arrayobj import populate_array

from .native import NDARRAY, TURN
from .signature import Scalar, Signature, Vector

__all__ = ["add_entry"]

_HEAD = object.__basicsize__
# struct PyArrayObject_fields, which numpy's own macros read in every extension: it stays as it is as long as numpy's ABI does.
_DATA, _DIMENSIONS, _LENGTHS, _DTYPE, _FLAGS = _HEAD, _HEAD + 8, _HEAD + 16, _HEAD + 40, _HEAD + 48
# struct PyArray_Descr, likewise.
_BYTE_ORDER, _NUMBER = _HEAD + 10, _HEAD + 12
_CONTIGUOUS, _ALIGNED, _WRITEABLE = 0x0001, 0x0100, 0x0400

_populate: Any = populate_array  # without hints
_BYTE, _INT, _LONG, _DOUBLE = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.DoubleType()
_OBJECT = _BYTE.as_pointer()

SHORT = 1 << 15
"""A brief kernel whose arrays are all shorter keeps the GIL: to get it back can take longer than such a kernel."""
LOOKS = 60_000
"""How often a thread looks whether another one has gone on: 30 to 60 us. Without the instruction that says so to the processor,
because a virtual machine may take it as an offer to run somebody else: with it all this gained nothing."""
_WORD = 8


def add_entry(module: Any, context: Any, compiled: Any, name: str, signature: Signature, *, brief: bool) -> None:
    """Add the entry of one kernel to an LLVM module.

    Args:
        module: Where the entry goes.
        context: Numba's target context, which knows how compiled functions are called.
        compiled: Numba's result for the kernel.
        name: Of the entry, for `native.entries`.
        signature: What the kernel takes and returns.
        brief: Whether it keeps the GIL where all arrays are short.
    """
    assert np.lib.NumpyVersion(np.__version__) < "3.0.0", "the layout of arrays is known for numpy 2"
    function = ir.Function(module, ir.FunctionType(_OBJECT, [_OBJECT, _OBJECT.as_pointer(), _LONG]), name)
    _Entry(module, context, function, brief).build(compiled, signature)


class _Entry:
    """One entry in the making."""

    def __init__(self, module: Any, context: Any, function: Any, brief: bool) -> None:
        self.module = module
        self.context = context
        self.function = function
        self.brief = brief
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))
        self.refused = function.append_basic_block("refused")
        """An argument is not what it should be, and no error is set yet."""
        self.failed = function.append_basic_block("failed")
        """A Python error is set."""
        self.lengths: list[Any] = []
        """Of the arrays."""

    def build(self, compiled: Any, signature: Signature) -> None:
        builder, kinds = self.builder, signature.arguments
        _, given, count = self.function.args
        self._require(builder.icmp_signed("==", count, ir.Constant(_LONG, len(kinds))))
        objects = [builder.load(builder.gep(given, [ir.Constant(_LONG, i)])) for i in range(len(kinds))]
        values: dict[int, Any] = {}
        for i, kind in enumerate(kinds):
            if isinstance(kind, Scalar):
                values[i] = self._number(objects[i], kind)
        for i, kind in enumerate(kinds):
            if isinstance(kind, Vector):
                values[i] = self._array(objects[i], kind, compiled.fndesc.argtypes[i])
        result = self._run(compiled.fndesc, [values[i] for i in range(len(kinds))])
        builder.ret(self._object(result, signature.returns))
        builder = ir.IRBuilder(self.refused)
        # Not PyExc_TypeError: where numba is loaded, LLVM finds another thing by that name.
        builder.call(self._python("PyErr_BadArgument", _INT), [])
        builder.branch(self.failed)
        ir.IRBuilder(self.failed).ret(ir.Constant(_OBJECT, None))

    def _run(self, described: Any, values: list[Any]) -> Any:
        builder, convention = self.builder, self.context.call_conv
        kind = convention.get_function_type(described.restype, described.argtypes)
        native = ir.Function(self.module, kind, described.llvm_func_name)
        turn, before, long = self._global(TURN, _LONG), builder.block, ir.Constant(ir.IntType(1), int(not self.brief))
        for length in self.lengths:
            long = builder.or_(long, builder.icmp_signed(">=", length, ir.Constant(_LONG, SHORT)))
        with builder.if_then(long):
            saved = builder.call(self._python("PyEval_SaveThread", _OBJECT), [])
            name = builder.ptrtoint(saved, _LONG)
            with builder.if_then(builder.icmp_unsigned("==", builder.load_atomic(turn, "monotonic", _WORD), name)):
                builder.store_atomic(ir.Constant(_LONG, 0), turn, "monotonic", _WORD)
            released = builder.block
        thread = builder.phi(_OBJECT)
        thread.add_incoming(ir.Constant(_OBJECT, None), before)
        thread.add_incoming(saved, released)
        status, result = convention.call_function(builder, native, described.restype, described.argtypes, values)
        with builder.if_then(long):
            self._look_at(turn)
            builder.call(self._python("PyEval_RestoreThread", ir.VoidType(), _OBJECT), [thread])
            builder.store_atomic(builder.ptrtoint(thread, _LONG), turn, "monotonic", _WORD)
        # No kernel of ours raises. One that did would be refused, but which error it was, only numba could tell.
        self._require(builder.not_(status.is_error))
        return result

    def _look_at(self, turn: Any) -> None:
        """Look until nobody's name stands there, but not for long."""
        builder, before = self.builder, self.builder.block
        again, taken, further = (self.function.append_basic_block() for _ in range(3))
        builder.branch(again)
        builder.position_at_end(again)
        left = builder.phi(_INT)
        left.add_incoming(ir.Constant(_INT, LOOKS), before)
        there = builder.icmp_unsigned("!=", builder.load_atomic(turn, "monotonic", _WORD), ir.Constant(_LONG, 0))
        builder.cbranch(builder.and_(there, builder.icmp_unsigned("!=", left, ir.Constant(_INT, 0))), taken, further)
        builder.position_at_end(taken)
        left.add_incoming(builder.sub(left, ir.Constant(_INT, 1)), taken)
        builder.branch(again)
        builder.position_at_end(further)

    def _object(self, result: Any, kind: Scalar) -> Any:
        builder = self.builder
        if kind.name == "void":
            none = self._global("_Py_NoneStruct", _BYTE)
            builder.call(self._python("Py_IncRef", ir.VoidType(), _OBJECT), [none])
            return none
        if kind.name == "boolean":
            return builder.call(self._python("PyBool_FromLong", _OBJECT, _LONG), [builder.zext(result, _LONG)])
        if kind.name == "float64":
            return builder.call(self._python("PyFloat_FromDouble", _OBJECT, _DOUBLE), [result])
        assert kind.name in ("int32", "int64"), f"kernels do not return {kind}"
        whole = builder.sext(result, _LONG) if kind.name == "int32" else result
        return builder.call(self._python("PyLong_FromLongLong", _OBJECT, _LONG), [whole])

    def _number(self, given: Any, kind: Scalar) -> Any:
        builder = self.builder
        if kind.name.startswith("float"):
            value = builder.call(self._python("PyFloat_AsDouble", _DOUBLE, _OBJECT), [given])
            suspicious = builder.fcmp_ordered("==", value, ir.Constant(_DOUBLE, -1.0))
        else:
            value = builder.call(self._python("PyLong_AsLongLong", _LONG, _OBJECT), [given])
            suspicious = builder.icmp_signed("==", value, ir.Constant(_LONG, -1))
        with builder.if_then(suspicious, likely=False):
            error = builder.call(self._python("PyErr_Occurred", _OBJECT), [])
            self._require(builder.icmp_unsigned("==", error, ir.Constant(_OBJECT, None)), self.failed)
        if kind.name == "float32":
            return builder.fptrunc(value, ir.FloatType())
        assert kind.name in ("float64", "int64"), f"kernels do not take {kind}"
        return value

    def _array(self, given: Any, kind: Vector, numba_type: Any) -> Any:
        builder = self.builder
        self._require(builder.icmp_unsigned("==", self._field(given, _HEAD - 8, _OBJECT), self._global(NDARRAY, _BYTE)))
        flags = _CONTIGUOUS | (_ALIGNED | _WRITEABLE if kind.writable else 0)
        dtype = self._field(given, _DTYPE, _OBJECT)
        for found, expected in (
            (self._field(given, _DIMENSIONS, _INT), 1),
            (builder.and_(self._field(given, _FLAGS, _INT), ir.Constant(_INT, flags)), flags),
            (self._field(dtype, _NUMBER, _INT), np.dtype(kind.element).num),
            (self._field(dtype, _BYTE_ORDER, _BYTE), ord(np.dtype(kind.element).byteorder)),  # "=", or "|" for single bytes
        ):
            self._require(builder.icmp_unsigned("==", found, ir.Constant(found.type, expected)))
        length = builder.load(self._field(given, _LENGTHS, _LONG.as_pointer()))
        self.lengths.append(length)
        size = ir.Constant(_LONG, np.dtype(kind.element).itemsize)
        array = self.context.make_array(numba_type)(self.context, builder)
        data = builder.bitcast(self._field(given, _DATA, _OBJECT), array.data.type)
        _populate(array, data=data, shape=[length], strides=[size], itemsize=size, meminfo=None, parent=None)
        return array._getvalue()

    def _field(self, base: Any, offset: int, kind: Any) -> Any:
        place = self.builder.gep(base, [ir.Constant(_LONG, offset)])
        return self.builder.load(self.builder.bitcast(place, kind.as_pointer()))

    def _require(self, condition: Any, otherwise: Any = None) -> None:
        further = self.function.append_basic_block()
        self.builder.cbranch(condition, further, otherwise or self.refused)
        self.builder.position_at_end(further)

    def _python(self, name: str, returns: Any, *arguments: Any) -> Any:
        return self.module.globals.get(name) or ir.Function(self.module, ir.FunctionType(returns, arguments), name)

    def _global(self, name: str, kind: Any) -> Any:
        found = self.module.globals.get(name)
        if found is None:
            found = ir.GlobalVariable(self.module, kind, name)
            found.linkage = "external"
        return found

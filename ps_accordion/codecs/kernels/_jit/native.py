"""Make object code callable, without numba: LLVM's loader, and a built-in function a kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

__all__ = ["NDARRAY", "TURN", "entries", "prepare"]

NDARRAY = "ps_accordion_ndarray"
"""The symbol by which object code knows numpy's array type: its address differs from process to process."""

TURN = "ps_accordion_turn"
"""The symbol of one word in which threads say that they have Python's lock; `entry.py` says what for."""

_turn = ctypes.c_uint64(0)
_FASTCALL = 0x0080
"""`METH_FASTCALL` of Python's methodobject.h: called with an array of arguments and their number."""


class _Method(ctypes.Structure):
    """`PyMethodDef` of Python's methodobject.h."""

    _fields_ = (("name", ctypes.c_char_p), ("call", ctypes.c_void_p), ("flags", ctypes.c_int), ("doc", ctypes.c_char_p))


def _keep(thing: object) -> None:
    """Let an object live as long as its process.

    Engines own the memory that the code lies in, and functions point to their methods. A list of this module would let go of them
    when the interpreter ends, before the last of the functions.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def prepare() -> Any:
    """Return llvmlite's binding, ready to load code that names `NDARRAY` and `TURN`: an unknown symbol ends the process."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.add_symbol(NDARRAY, id(np.ndarray))
    llvm.add_symbol(TURN, ctypes.addressof(_turn))
    return llvm


def entries(code: bytes, names: Iterable[str]) -> list[Callable[..., Any]]:
    """Load object code that `compiler.object_code` made, and return its entries in the order of `names`.

    An entry is a built-in function: Python hands it the arguments as they are, it checks them and runs the kernel without the
    GIL (see `entry.py`). Through ctypes the conversion of the arguments alone would take longer than the call.
    """
    llvm = prepare()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    prototype = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.POINTER(_Method), ctypes.c_void_p, ctypes.c_void_p)
    new = prototype(("PyCFunction_NewEx", ctypes.pythonapi))
    made: list[Callable[..., Any]] = []
    for name in names:
        address = engine.get_function_address(name)
        assert address, f"the object code has no entry {name}"
        method = _Method(name.encode(), address, _FASTCALL, None)
        made.append(new(method, None, None))
        _keep(method)
    _keep(engine)
    return made

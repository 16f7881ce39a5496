"""Compile libraries with numba. Only imported where there is something to compile: numba takes half a second to load."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numba
import xxhash
from numba import types
from numba.core import config
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.extending import register_jitable

from . import (
    lowering,  # noqa: F401  # tells numba how the intrinsics are compiled
    native,
    picking,  # noqa: F401  # the same for those that pick some of many elements
    products,  # noqa: F401  # the same for those of thin factors
    rounding,  # noqa: F401  # the same for those of quantising codecs
    store,
)
from .entry import add_entry
from .library import helpers
from .signature import Argument, Signature, Vector

if TYPE_CHECKING:
    from .library import Library

__all__ = ["dispatchers", "object_code"]

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}  # `_jit/__init__.py` says why
_BARE: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}
"""Our entries replace numba's wrappers, and a kernel allocates nothing: without its runtime, code needs nothing else of numba."""

_FROM_LIBC = {"memcpy", "memmove", "memset", "sqrt"}
_config: Any = config  # its settings are made at run time, where mypy cannot see them
_njit: Any = numba.njit


def _type(argument: Argument) -> Any:
    if isinstance(argument, Vector):
        element = getattr(types, argument.element)
        return types.Array(element, 1, "C") if argument.writable else types.Array(element, 1, "C", readonly=True, aligned=False)
    return getattr(types, argument.name)


def _signature(signature: Signature) -> Any:
    return _type(signature.returns)(*map(_type, signature.arguments))


_admitted: set[Callable[..., Any]] = set()


def _admit_helpers() -> None:
    for function in helpers:
        if function not in _admitted:
            register_jitable(error_model="numpy", forceinline=True)(function)
            _admitted.add(function)


def object_code(library: Library) -> bytes:
    """Return one object file with an entry for each kernel, under its name. It needs Python, libc and numpy's type, no numba."""
    _admit_helpers()
    native.prepare()  # numba loads what it has compiled
    context = cpu_target.target_context
    with global_compiler_lock:
        linked = context.codegen().create_library(f"ps_accordion.{library.name}")
        linked.enable_object_caching()
        module = linked.create_ir_module("entries")
        for kernel in library.kernels:
            dispatcher = _njit(_signature(kernel.signature), **_OPTIONS, **_BARE)(kernel.function)
            (compiled,) = dispatcher.overloads.values()
            add_entry(module, context, compiled, kernel.name, kernel.signature, brief=kernel.brief)
            linked.add_linking_library(compiled.library)
        ours = {function.name for function in module.functions} | {name for name, _ in module.globals.items()}
        linked.add_ir_module(module)
        linked.finalize()
        missing = [function.name for function in linked._final_module.functions if function.is_declaration]
        missing = [name for name in missing if not name.startswith("llvm.") and name not in ours | _FROM_LIBC]
        # A symbol that is not there ends the process that loads the code.
        assert not missing, f"kernels of {library.name} need {missing}, which only numba has"
        return bytes(linked._get_compiled_object())


def dispatchers(library: Library, settings: Mapping[str, str]) -> list[Callable[..., Any]]:
    """Return what numba itself makes of the kernels, with its own checks, cache and settings."""
    _admit_helpers()
    with _cache(settings) as works:
        return [_njit(_signature(each.signature), cache=works, **_OPTIONS)(each.function) for each in library.kernels]


@contextlib.contextmanager
def _cache(settings: Mapping[str, str]) -> Iterator[bool]:
    """Point numba at a folder of ours while it compiles; yield whether caching works.

    Numba does not tell code with bounds checks, say, from code without, so each set of settings has a folder.
    Nothing is left changed for a user's own functions.
    """
    with global_compiler_lock:
        if _config.CACHE_DIR:
            yield True
            return
        folder = store.cache_directory()
        if folder is not None:
            folder /= f"numba-{xxhash.xxh3_64_hexdigest(repr(settings).encode())}"
        if store.writable(folder) is None:
            yield False
            return
        _config.CACHE_DIR = str(folder)
        try:
            yield True
        finally:
            _config.CACHE_DIR = ""

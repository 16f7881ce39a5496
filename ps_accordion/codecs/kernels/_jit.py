"""The one place that knows how kernels are compiled.

Options, and why:

* `nogil`: a kernel runs on one thread and lets the others go on; parallelism is many keys in flight.
* `error_model="numpy"`: no branch for a division by zero.
* **no** `fastmath`: without reassociation and contraction the same bytes come out on every host.
* explicit signatures: one machine-code version a kernel, compiled when its module is imported, never in mid-training.
  Inputs are declared read-only and unaligned, because payloads are slices of received frames; writable and aligned arrays are
  accepted there too.

Machine code is cached under the user's cache directory, in a folder named after the kernels' own sources, so that an update of
any kernel module starts afresh (numba itself looks only at the file that a function stands in).
Nothing of numba's configuration is left changed for a user's own functions.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numba
import xxhash
from llvmlite import ir  # type: ignore[import-untyped]  # ships no hints
from numba import types
from numba.core import config
from numba.extending import intrinsic

__all__ = [
    "F32",
    "F32_IN",
    "F64",
    "I32",
    "U16",
    "U16_IN",
    "U32",
    "U32_IN",
    "bits",
    "cache_directory",
    "count_bits",
    "helper",
    "kernel",
    "lowest_bit",
    "mask64",
    "real",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def _input(element: Any) -> Any:
    return types.Array(element, 1, "C", readonly=True, aligned=False)


F32 = types.float32[::1]
F64 = types.float64[::1]
I32 = types.int32[::1]
U16 = types.uint16[::1]
U32 = types.uint32[::1]
F32_IN = _input(types.float32)
U16_IN = _input(types.uint16)
U32_IN = _input(types.uint32)

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
_lock = threading.Lock()
_config: Any = config  # its settings are made at run time, where mypy cannot see them
_intrinsic: Any = intrinsic
"""Called from kernels without the typing context that its definition takes, which mypy cannot know."""


def kernel(signature: Any) -> Callable[[Function], Function]:
    """Compile a function for exactly one signature, or load it from the cache."""

    def decorate(function: Function) -> Function:
        with _our_cache() as cache:
            compiled: Function = numba.njit(signature, cache=cache, **_OPTIONS)(function)
        return compiled

    return decorate


def helper(function: Function) -> Function:
    """Mark a small function that kernels call; it is compiled into them."""
    compiled: Function = numba.njit(**_OPTIONS)(function)
    return compiled


def cache_directory() -> Path | None:
    """Return where compiled kernels are kept, or None where the user has no directory to keep them in."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG rule: a path that is not absolute is ignored.
        base = Path(chosen) if Path(chosen).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "ps-accordion" / "numba" / _digest()


def _digest() -> str:
    digest = xxhash.xxh3_64()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


@contextmanager
def _our_cache() -> Iterator[bool]:
    """Point numba at our directory while one function is decorated; yield whether caching works."""
    with _lock:
        if _config.CACHE_DIR:
            yield True
            return
        directory = _writable()
        if directory is None:
            yield False
            return
        _config.CACHE_DIR = str(directory)
        try:
            yield True
        finally:
            _config.CACHE_DIR = ""


_resolved: list[Path | None] = []


def _writable() -> Path | None:
    """Return the cache directory if files can be made in it; say so once if not."""
    if not _resolved:
        directory = cache_directory()
        problem = "there is no home directory"
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                probe = directory / f".probe-{os.getpid()}"
                probe.touch()
                probe.unlink()
            except OSError as error:
                directory, problem = None, str(error)
        if directory is None:
            warnings.warn(
                f"compiled kernels cannot be kept ({problem}), so every start compiles them again for some seconds; "
                "set XDG_CACHE_HOME or NUMBA_CACHE_DIR to a directory that can be written",
                RuntimeWarning,
                stacklevel=2,
            )
        _resolved.append(directory)
    return _resolved[0]


@_intrinsic  # type: ignore[untyped-decorator]  # as above
def bits(typing: Any, x: Any) -> Any:
    """`bits(float32) -> int32`: the same 32 bits, read as a signed integer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@_intrinsic  # type: ignore[untyped-decorator]  # as above
def real(typing: Any, x: Any) -> Any:
    """`real(int32) -> float32`: the same 32 bits, read as a float."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@_intrinsic  # type: ignore[untyped-decorator]  # as above
def lowest_bit(typing: Any, mask: Any) -> Any:
    """`lowest_bit(uint64) -> int64`: position of the lowest set bit; 64 if there is none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@_intrinsic  # type: ignore[untyped-decorator]  # as above
def count_bits(typing: Any, mask: Any) -> Any:
    """`count_bits(uint64) -> int64`: how many bits are set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@_intrinsic  # type: ignore[untyped-decorator]  # as above
def mask64(typing: Any, array: Any, start: Any, threshold: Any) -> Any:
    """`mask64(float32[], start, threshold) -> uint64`: bit j says `abs bits of array[start + j] >= threshold`.

    A plain loop that gathers 64 comparisons into a word does not vectorise; one wide comparison does, on every target.
    The caller promises that `start + 64` elements exist: there is no bounds check here.
    """
    lanes = 64

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        wide = ir.VectorType(word, lanes)
        data = context.make_array(signature.args[0])(context, builder, value=arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), wide.as_pointer())
        loaded = builder.load(place)
        loaded.align = 1
        magnitude = builder.and_(loaded, ir.Constant(wide, [0x7FFFFFFF] * lanes))
        undefined = ir.Constant(wide, ir.Undefined)
        first = builder.insert_element(undefined, arguments[2], ir.Constant(word, 0))
        splat = builder.shuffle_vector(first, undefined, ir.Constant(wide, [0] * lanes))
        return builder.bitcast(builder.icmp_signed(">=", magnitude, splat), ir.IntType(64))

    return types.uint64(array, types.int64, types.int32), generate

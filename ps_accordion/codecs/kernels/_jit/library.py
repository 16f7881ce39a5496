"""Kernels and the libraries that they stand in: what `@kernel` makes, and where its machine code comes from.

```text
first call, or load() ──► numba told to behave otherwise? ──yes──► numba's dispatchers, or the functions as they stand
                               │ no
                               ▼
                          kept object code? ──no──► compile with numba, keep ─┐
                               │ yes                                          │
                               └──────────────────► native entries ◄──────────┘
```

Both ways on the right end in the same object code, called through the same entries: what is tested cold is what runs warm.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from . import native, store
from .signature import Signature

__all__ = ["Kernel", "Library", "helper", "helpers", "kernel", "load"]

Function = TypeVar("Function", bound=Callable[..., Any])

_HARMLESS = {"NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER", "NUMBA_THREADING_LAYER_PRIORITY"}
"""Settings of numba that leave the code of a kernel as it is. With any other, numba does all itself."""


class Kernel:
    """A loop with exactly one signature, called like the function that it was made from, by position."""

    def __init__(self, function: Callable[..., Any], signature: Signature, library: Library, *, brief: bool = True) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.signature, self.brief = signature, brief
        self.name = function.__name__
        self._library = library
        self.entry: Callable[..., Any] = self._first

    def __call__(self, *arguments: Any) -> Any:
        """Run the kernel without the GIL.

        Raises:
            TypeError: The arguments are not what the signature says. Nothing was read or written.
        """
        try:
            return self.entry(*arguments)
        except (TypeError, OverflowError) as error:
            raise self._refusal(arguments) from error

    def _first(self, *arguments: Any) -> Any:
        self._library.load()
        return self.entry(*arguments)

    def _refusal(self, arguments: tuple[Any, ...]) -> TypeError:
        name, came = f"{self._library.name}.{self.name}", ", ".join(map(_described, arguments))
        return TypeError(f"No matching definition: {name} is {self.signature}; it was called with ({came})")


def _described(argument: Any) -> str:
    if not isinstance(argument, np.ndarray):
        return f"{type(argument).__name__} {argument!r:.40}"
    flags = argument.flags
    traits = {"read-only": not flags.writeable, "unaligned": not flags.aligned, "not contiguous": not flags.c_contiguous}
    kind = "" if type(argument) is np.ndarray else f"{type(argument).__name__} of "
    return " ".join([trait for trait, there in traits.items() if there] + [f"{kind}{argument.dtype}{list(argument.shape)}"])


class Library:
    """The kernels of one module, compiled and kept together."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kernels: list[Kernel] = []
        self._lock = threading.RLock()
        self._loaded = False

    def load(self, *, wait: bool = True) -> bool:
        """Make every kernel ready to run. Takes seconds where nothing is kept, and nothing when done before.

        Args:
            wait: For another process that compiles the same right now.

        Returns:
            Whether it is ready; always, where this may wait.
        """
        with self._lock:
            if not self._loaded:
                entries = self._entries(wait)
                if entries is None:
                    return False
                for one, entry in zip(self.kernels, entries, strict=True):
                    one.entry = entry
                self._loaded = True
            return True

    def _entries(self, wait: bool) -> list[Callable[..., Any]] | None:
        settings = _settings()
        if settings.get("NUMBA_DISABLE_JIT", "0") != "0":
            return [_wrapping(each.function) for each in self.kernels]
        if settings:
            from . import compiler

            return compiler.dispatchers(self, settings)
        code = store.read(self.name)
        if code is None:
            with store.turn(self.name, wait=wait) as ours:
                if not ours:
                    return None
                code = store.read(self.name)
                if code is None:
                    from . import compiler

                    code = compiler.object_code(self)
                    store.keep(self.name, code)
        return native.entries(code, [each.name for each in self.kernels])


def _settings() -> dict[str, str]:
    """Return what makes numba's code other than usual, by name."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("NUMBA_") and value}
    file = Path(".numba_config.yaml")
    if file.exists():
        settings[file.name] = file.read_text()
    return {name: settings[name] for name in sorted(settings.keys() - _HARMLESS)}


def _wrapping(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as it stands, with whole numbers that wrap around silently, as they do when compiled."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*arguments)

    return run


_libraries: dict[str, Library] = {}
helpers: list[Callable[..., Any]] = []
"""Functions that kernels of any module may call, as far as the modules have been imported."""


def _library(function: Callable[..., Any]) -> Library:
    name = function.__module__.rpartition(".")[2]
    return _libraries.setdefault(function.__module__, Library(name))


def kernel(signature: Signature, *, brief: bool = True) -> Callable[[Function], Function]:
    """Make a kernel of a function: compiled for exactly one signature, together with the others of its module.

    Args:
        signature: What it takes and returns.
        brief: Whether it does about as much as its arrays are long: then it keeps the GIL where they are short.
    """

    def decorate(function: Function) -> Function:
        library = _library(function)
        made = Kernel(function, signature, library, brief=brief)
        library.kernels.append(made)
        return cast("Function", made)

    return decorate


def helper(function: Function) -> Function:
    """Mark a small function that kernels call; it is compiled into them."""
    helpers.append(function)
    return function


def load(modules: Iterable[str]) -> None:
    """Load, or compile, the kernels of modules, by their full names; they have been imported.

    Processes that start together compile different ones meanwhile: a library that another one has begun is left for the end.
    """
    libraries = [_libraries[module] for module in modules]
    begun = [library for library in libraries if not library.load(wait=False)]
    for library in begun:
        library.load()

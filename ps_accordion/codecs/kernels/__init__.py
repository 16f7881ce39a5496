"""The loops that codecs are made of, compiled by numba.

Compiling takes seconds, once a machine; after that the machine code is loaded without numba.
So a module is imported when one of its kernels is first named and loaded when one is first called, and `warm` does both at once:
a process that never compresses stays light, and a process that does calls `warm` before its first step, for what it will call.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING

from ... import imports
from . import _jit

if TYPE_CHECKING:
    from . import (
        bfloat,
        buckets,
        choose,
        codes,
        eden,
        hadamard,
        half,
        lowrank,
        merge,
        momentum,
        octets,
        orthonormal,
        packed,
        places,
        quic_fl,
        signs,
        sparse,
        vector,
        votes,
    )

__all__ = [
    "bfloat",
    "buckets",
    "choose",
    "codes",
    "eden",
    "hadamard",
    "half",
    "lowrank",
    "merge",
    "momentum",
    "octets",
    "orthonormal",
    "packed",
    "places",
    "quic_fl",
    "signs",
    "sparse",
    "vector",
    "votes",
    "warm",
]

_MODULES = (
    "bfloat",
    "buckets",
    "choose",
    "codes",
    "eden",
    "hadamard",
    "half",
    "lowrank",
    "merge",
    "momentum",
    "octets",
    "orthonormal",
    "packed",
    "places",
    "quic_fl",
    "signs",
    "sparse",
    "vector",
    "votes",
)


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def warm(names: Iterable[str] = _MODULES) -> None:
    """Compile the kernels of some modules, or load them from the cache: seconds the first time, and nothing when done before.

    Args:
        names: Of modules in this package.

    Raises:
        ModuleNotFoundError: There is none of such a name.
    """
    with imports.collection_paused():
        _jit.load([importlib.import_module(f".{name}", __name__).__name__ for name in sorted(names)])

"""The loops that codecs are made of, compiled by numba.

Compiling takes seconds, once a machine; after that the machine code is loaded without numba.
So the modules are imported when a kernel is first named and loaded when one is first called, and `warm` does both for all:
a process that never compresses stays light, and a process that does calls `warm` before its first step.
"""

from __future__ import annotations

import importlib
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
        merge,
        octets,
        packed,
        places,
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
    "merge",
    "octets",
    "packed",
    "places",
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
    "merge",
    "octets",
    "packed",
    "places",
    "signs",
    "sparse",
    "vector",
    "votes",
)


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def warm() -> None:
    """Compile every kernel, or load it from the cache. Takes seconds the first time, and nothing when done before."""
    with imports.collection_paused():
        for name in _MODULES:
            importlib.import_module(f".{name}", __name__)
        _jit.load()

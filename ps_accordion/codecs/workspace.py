"""Scratch memory of the calling thread, kept from call to call.

A fresh megabyte costs its page faults, which is more than encoding it.
A buffer is named, grows to the largest size asked for, and is the caller's until the same thread borrows the same name again.
Nothing is remembered in it.

A vector that is taken is the caller's for good; one that is not needed any more can be given in its place. So a new residual is
written beside the old one, which is then the memory of the next key's: warm, and one more vector in all.
"""

from __future__ import annotations

import threading
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["borrow", "give", "take"]

Element = TypeVar("Element", bound=np.generic)
FloatVector = NDArray[np.float32]

VECTORS = 8
"""Vectors of different lengths that a thread keeps: whole partitions, and some of what else a model has."""


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_name: dict[str, NDArray[np.uint8]] = {}
        self.vectors: dict[int, FloatVector] = {}


_buffers = _Buffers()


def borrow(name: str, elements: int, dtype: type[Element]) -> NDArray[Element]:
    """Return `dtype[elements]` with arbitrary contents, valid until this thread borrows `name` again."""
    nbytes = elements * np.dtype(dtype).itemsize
    buffer = _buffers.by_name.get(name)
    if buffer is None or buffer.nbytes < nbytes:
        buffer = np.empty(max(4096, 1 << (nbytes - 1).bit_length()), np.uint8)
        _buffers.by_name[name] = buffer
    return buffer[:nbytes].view(dtype)


def take(elements: int) -> FloatVector:
    """Return float32[elements] with arbitrary contents, which is the caller's now."""
    vector = _buffers.vectors.pop(elements, None)
    return np.empty(elements, np.float32) if vector is None else vector


def give(vector: FloatVector) -> None:
    """Hand over a vector that nobody else holds."""
    vectors = _buffers.vectors
    vectors[vector.size] = vector
    if len(vectors) > VECTORS:
        del vectors[next(iter(vectors))]

"""Scratch memory of the calling thread, kept from call to call.

A fresh megabyte costs its page faults, which is more than encoding it.
A buffer is named, grows to the largest size asked for, and is the caller's until the same thread borrows the same name again.
Nothing is remembered in it.

A vector that is taken is the caller's for good; one that is not needed any more can be given in its place. So a new residual is
written beside the old one, which is then the memory of the next key's: warm, and one more vector in all.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["borrow", "give", "on_line", "take", "zeros"]

Element = TypeVar("Element", bound=np.generic)
FloatVector = NDArray[np.float32]

LINE = 64
"""Bytes of a line of the cache, and of the longest accesses."""
VECTORS = 8
"""Vectors of different lengths that a thread keeps: whole partitions, and some of what else a model has."""


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_name: dict[str, NDArray[np.uint8]] = {}
        self.last: dict[str, tuple[int, type[np.generic], NDArray[Any]]] = {}
        self.vectors: dict[int, FloatVector] = {}


_buffers = _Buffers()


def borrow(name: str, elements: int, dtype: type[Element]) -> NDArray[Element]:
    """Return `dtype[elements]` with arbitrary contents, valid until this thread borrows `name` again."""
    last = _buffers.last.get(name)
    if last is not None and last[0] == elements and last[1] is dtype:
        return last[2]
    nbytes = elements * np.dtype(dtype).itemsize
    buffer = _buffers.by_name.get(name)
    if buffer is None or buffer.nbytes < nbytes:
        buffer = on_line(max(4096, 1 << (nbytes - 1).bit_length()))
        _buffers.by_name[name] = buffer
    view = buffer[:nbytes].view(dtype)
    _buffers.last[name] = elements, dtype, view
    return view


def take(elements: int) -> FloatVector:
    """Return float32[elements] with arbitrary contents, which is the caller's now."""
    vector = _buffers.vectors.pop(elements, None)
    return on_line(4 * elements).view(np.float32) if vector is None else vector


def zeros(elements: int) -> FloatVector:
    """Return float32[elements] of zeros, which begin a line of the cache and take no memory before they are written."""
    return _begin_line(np.zeros(4 * elements + LINE, np.uint8)).view(np.float32)


def on_line(nbytes: int) -> NDArray[np.uint8]:
    """Return uint8[nbytes] with arbitrary contents that begin a line of the cache.

    What numpy makes begins in the middle of one, so that every access of 64 bytes would be one of two lines.
    """
    return _begin_line(np.empty(nbytes + LINE, np.uint8))


def _begin_line(room: NDArray[np.uint8]) -> NDArray[np.uint8]:
    start = -room.ctypes.data % LINE
    return room[start : start + room.size - LINE]


def give(vector: FloatVector) -> None:
    """Hand over a vector that nobody else holds."""
    vectors = _buffers.vectors
    vectors[vector.size] = vector
    if len(vectors) > VECTORS:
        del vectors[next(iter(vectors))]

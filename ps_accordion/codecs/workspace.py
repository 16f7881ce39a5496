"""Scratch memory of the calling thread, kept from call to call.

A fresh megabyte costs its page faults, which is more than encoding it.
A buffer is named, grows to the largest size asked for, and is the caller's until the same thread borrows the same name again.
Nothing is remembered in it.
"""

from __future__ import annotations

import threading
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["borrow"]

Element = TypeVar("Element", bound=np.generic)


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_name: dict[str, NDArray[np.uint8]] = {}


_buffers = _Buffers()


def borrow(name: str, elements: int, dtype: type[Element]) -> NDArray[Element]:
    """Return `dtype[elements]` with arbitrary contents, valid until this thread borrows `name` again."""
    nbytes = elements * np.dtype(dtype).itemsize
    buffer = _buffers.by_name.get(name)
    if buffer is None or buffer.nbytes < nbytes:
        buffer = np.empty(max(4096, 1 << (nbytes - 1).bit_length()), np.uint8)
        _buffers.by_name[name] = buffer
    return buffer[:nbytes].view(dtype)

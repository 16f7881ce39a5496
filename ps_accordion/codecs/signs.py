"""What codecs of a sign an element share: how bits and sizes become numbers again, and sums of several members.

An element decodes to `0 + -size` where its bit is 1 and to `0 + size` where it is 0, so never to -0. What a size is, and how many
elements have one in common, is the codec's own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import PayloadError
from . import kernels
from .base import Codec, Coding, FloatVector, Payload
from .cache import goes_past
from .packing import joined
from .workspace import borrow

__all__ = ["SignCodec", "words_of"]

_ZERO = np.float32(0.0)


class SignCodec(Codec):
    """A bit an element: bit j of word w is 1 if element 32 w + j is below zero."""

    zero_kept: ClassVar[bool] = False

    def libraries(self) -> frozenset[str]:
        """Return the modules of `kernels` that it runs; see `Codec.libraries`."""
        return super().libraries() | {"signs"}

    @abstractmethod
    def parts(self, payload: Payload, elements: int, level: float) -> tuple[FloatVector, NDArray[np.uint32]]:
        """Return the sizes, one a chunk, and the words of a payload that has its length."""

    @abstractmethod
    def sizes_of(self, rows: NDArray[np.uint8], elements: int, level: float) -> NDArray[np.float32]:
        """Return the sizes of payloads of one level, float32[members, chunks]; each is a row, and ends with its words."""

    @abstractmethod
    def chunk(self, level: float) -> int:
        """Return how many elements have a size in common, a multiple of 64."""

    def check_end(self, words: NDArray[np.uint32], elements: int) -> None:
        """Raise `PayloadError` if a bit is set beyond the last element."""
        if elements % 32 and int(words[-1]) >> elements % 32:
            raise PayloadError(f"{self.name}: expected no sign beyond element {elements}, got one")

    def decode(self, payload: Payload, coding: Coding, out: FloatVector) -> None:
        """Write `0 + -size` or `0 + size` to each element of `out`."""
        sizes, words = self.parts(payload, coding.elements, coding.level)
        row = borrow("row", kernels.vector.ROW, np.float32)
        kernels.signs.spread(words, sizes, self.chunk(coding.level), row, goes_past(out.size), out)

    def peek(self, payload: Payload, coding: Coding, start: int, out: FloatVector) -> None:
        """Write D(payload)[start : start + out.size] to `out`."""
        sizes, words = self.parts(payload, coding.elements, coding.level)
        at = np.arange(start, start + out.size)
        size = sizes[at // self.chunk(coding.level)]
        negative = (words[at // 32] >> (at % 32).astype(np.uint32)) & np.uint32(1) != 0
        np.add(np.where(negative, -size, size), np.float32(0), out=out)

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Add `-weight * size` or `weight * size` to each element of `total`."""
        sizes, words = self.parts(payload, coding.elements, coding.level)
        scaled = borrow("sizes", sizes.size, np.float32)
        kernels.vector.scaled_into(sizes, weight, scaled)
        kernels.signs.add(words, 0, 0, scaled, 1, self.chunk(coding.level), 0, total)

    def begin_all(
        self, payloads: Sequence[Payload], codings: Sequence[Coding], weights: Sequence[np.float32], total: FloatVector
    ) -> None:
        """Sum all members in one pass over `total` where their chunks are alike; see `Codec.begin_all`."""
        level, n, members = codings[0].level, total.size, len(payloads)
        chunk = self.chunk(level)
        if any(coding.level != level for coding in codings):
            super().begin_all(payloads, codings, weights, total)
            return
        together = joined(payloads)
        sizes, words = borrow("sizes", members * -(-n // chunk), np.float32), together.view(np.uint32)
        scaled = sizes.reshape(members, -1)
        with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at the sum
            np.multiply(self.sizes_of(together.reshape(members, -1), n, level), np.array(weights)[:, np.newaxis], out=scaled)
        scaled += _ZERO
        stride = words.size // members
        kernels.signs.add(words, stride - words_of(n), stride, sizes, members, chunk, 1, total)


def words_of(elements: int) -> int:
    """Return how many words hold a bit of each element."""
    return -(-elements // 32)

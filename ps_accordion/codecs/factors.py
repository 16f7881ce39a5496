"""The two thin factors that a low-rank payload is, and how a factor is made orthonormal: what `powersgd` is made of.

A left factor has vectors as long as the matrix has rows, a right one as long as it has columns; `powersgd.py` says how they lie
in a payload.
"""

from __future__ import annotations

import functools
import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..seeds import mix64
from . import kernels
from .base import Coding, FloatVector, Payload
from .workspace import borrow

__all__ = ["HEADER", "LEFT", "MOST", "RIGHT", "Basis", "Parts", "apart", "nearly_square", "orthonormal", "turned"]

LEFT: Final = 0
RIGHT: Final = 1
MOST: Final = 64
"""Vectors of the largest factor. Beyond 32, which language models take, other codecs do better at the same size."""
HEADER: Final = 8
TRIES: Final = 4
"""Drawings of a vector that turns out to lie in the span of those before it, which has probability 0 but for short ones."""


class Basis(NamedTuple):
    """An orthonormal factor that a payload goes on from.

    Attributes:
        side: LEFT or RIGHT.
        vectors: float32[rank, length].
    """

    side: int
    vectors: NDArray[np.float32]


class Parts(NamedTuple):
    """A payload, taken apart.

    Attributes:
        rank: Vectors of a factor.
        side: LEFT or RIGHT, which of them is orthonormal.
        left: float32[rank * rows], a view of the payload.
        right: float32[rank * columns], a view of the payload.
    """

    rank: int
    side: int
    left: FloatVector
    right: FloatVector

    @property
    def basis(self) -> FloatVector:
        """The orthonormal factor."""
        return self.left if self.side == LEFT else self.right

    @property
    def product(self) -> FloatVector:
        """The other one."""
        return self.right if self.side == LEFT else self.left


@functools.lru_cache(maxsize=4096)
def nearly_square(elements: int) -> int:
    """Return the largest divisor up to the root."""
    return next(rows for rows in range(math.isqrt(elements), 0, -1) if elements % rows == 0)


def apart(payload: Payload, coding: Coding) -> Parts:
    """Return a payload's factors, as views of it. It has been validated, or has just been begun."""
    rows, side = (int(word) for word in payload[:HEADER].view(np.uint32))
    columns = coding.elements // rows
    rank = min(int(coding.level), rows, columns)
    factors = payload[HEADER:].view(np.float32)
    return Parts(rank, side, factors[: rank * rows], factors[rank * rows :])


def turned(parts: Parts, out: Payload) -> Parts:
    """Say in a payload that the other factor is the orthonormal one."""
    side = 1 - parts.side
    out[:HEADER].view(np.uint32)[1] = side
    return parts._replace(side=side)


def orthonormal(vectors: FloatVector, rank: int, seed: int) -> NDArray[np.float64]:
    """Make the vectors of a factor orthonormal, in place; return float64[rank, rank] by which they are mixed to what they were.

    A vector of which those before it leave nothing is replaced by one that is drawn, of which nothing is mixed in.
    """
    length = vectors.size // rank
    work, lanes = borrow("orthonormal", vectors.size, np.float64), borrow("lanes64", kernels.orthonormal.LANES, np.float64)
    work[:] = vectors
    mixing = np.zeros((rank, rank))
    shares = np.zeros(rank)
    for k in range(rank):
        left = kernels.orthonormal.against(work, length, k, shares, lanes)
        mixing[:k, k], mixing[k, k] = shares[:k], left
        drawn = 0
        while not left:
            work[k * length : (k + 1) * length] = _drawn(seed, drawn * MOST + k, length) if drawn < TRIES else 0.0
            left = kernels.orthonormal.against(work, length, k, shares, lanes) if drawn < TRIES else 1.0
            drawn += 1
    vectors[:] = work
    return mixing


def _drawn(seed: int, number: int, length: int) -> NDArray[np.float64]:
    """Return float64[length] from -1 to 1, alike everywhere: element i is mix64(mix64(seed) + number * 2^40 + i) / 2^63 - 1."""
    with np.errstate(over="ignore"):
        x = np.arange(length, dtype=np.uint64) + np.uint64((mix64(seed) + (number << 40)) % (1 << 64))
        x += np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0

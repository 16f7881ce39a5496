"""random_block: one contiguous block at a place that all members draw alike (Foroutan Eghlidi and Jaggi, arXiv 2009.09271).

No selection and no indices (`codecs/covering.py`). With independent coverage each coordinate waits n / b rounds on average, with
cyclic coverage ceil(n / b) rounds at most: blocks follow each other, around the end, without a gap.

    b = max(1, round(level * n))    start = draw mod n    covered: start, start + 1, ..., start + b - 1, modulo n
    cyclic: draw = (stream + round * b) mod n

(`round` is to nearest, ties to even.)
Payload: b little-endian float32, the covered elements in that order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..seeds import mix64, unmix64
from . import kernels
from .base import Coding, Encoded, FloatVector, Payload
from .covering import CoveringCodec
from .packing import INFINITE, ONE
from .workspace import borrow

__all__ = ["RandomBlock", "parts", "start_of"]


@dataclass(frozen=True)
class RandomBlock(CoveringCodec):
    """One shared random block. Level: the fraction that is sent, in (0, 1]."""

    name: ClassVar[str] = "random_block"

    def length(self, elements: int, level: float) -> int:
        """Return b: the elements of the block."""
        self.check_level(level)
        return min(elements, max(1, round(level * elements)))

    def covered(self, elements: int, level: float, seed: int) -> int:
        """Return b, whatever the seed."""
        return self.length(elements, level)

    def seed_of_turn(self, elements: int, level: float, *, stream: int, turn: int) -> int:
        """Return the seed of the block after `turn` blocks; see `CoveringCodec.seed_of_turn`."""
        return unmix64((stream + turn * self.length(elements, level)) % elements)

    def send(self, v: FloatVector, *, level: float, seed: int, out: Payload) -> Encoded:
        """Move the block of `v` that `seed` names to `out`; see `CoveringCodec.send`."""
        b = self.length(v.size, level)
        block = out[: 4 * b].view(np.float32)
        for part, covered in parts(v.size, b, seed):
            block[part] = v[covered]
            v[covered] = 0.0
        return Encoded(4 * b, b)

    def decode(self, payload: Payload, coding: Coding, out: FloatVector) -> None:
        """Write the block to its place in `out`, and zero elsewhere."""
        block = payload.view(np.float32)
        row = borrow("row", kernels.vector.ROW, np.float32)
        kernels.vector.clear(out)
        for part, covered in parts(coding.elements, coding.count, coding.seed):
            kernels.vector.copied(block[part], row, False, out[covered])

    def peek(self, payload: Payload, coding: Coding, start: int, out: FloatVector) -> None:
        """Write what the block covers of a stretch to `out`, and zero elsewhere."""
        block, end = payload.view(np.float32), start + out.size
        out.fill(0.0)
        for part, covered in parts(coding.elements, coding.count, coding.seed):
            first, last = max(start, covered.start), min(end, covered.stop)
            if first < last:
                shift = part.start - covered.start
                out[first - start : last - start] = block[first + shift : last + shift]

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Add `weight` times the block at its place in `total`."""
        block = payload.view(np.float32)
        for part, covered in parts(coding.elements, coding.count, coding.seed):
            kernels.vector.add(weight, block[part], total[covered])

    def release(self, residual: FloatVector, coding: Coding, payload: Payload, new_residual: FloatVector) -> bool:
        """Add the covered part of a residual to a summed block and clear it; see `Codec.release`."""
        block = payload[: 4 * coding.count].view(np.float32)
        np.copyto(new_residual, residual)
        for part, covered in parts(coding.elements, coding.count, coding.seed):
            kernels.vector.add(ONE, residual[covered], block[part])
            new_residual[covered] = 0.0
        return int(kernels.vector.peak(block)) < INFINITE


def start_of(elements: int, seed: int) -> int:
    """Return the first element that a block covers."""
    return mix64(seed) % elements


def parts(elements: int, length: int, seed: int) -> list[tuple[slice, slice]]:
    """Return (part of the block, covered elements) in order: one pair, or two where the block wraps around."""
    start = start_of(elements, seed)
    first = min(length, elements - start)
    parts = [(slice(0, first), slice(start, start + first))]
    if first < length:
        parts.append((slice(first, length), slice(0, length - first)))
    return parts

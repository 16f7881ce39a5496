"""random_block: one contiguous block at a place that all members draw alike (Foroutan Eghlidi and Jaggi, arXiv 2009.09271).

No selection and no indices: the place follows from the shared seed, so servers add payloads without decoding them, and what goes
down is as small as what went up. Each coordinate waits n / b rounds on average.

    b = max(1, round(level * n))    start = mix64(seed) mod n    covered: start, start + 1, ..., start + b - 1, modulo n

(`round` is to nearest, ties to even; `mix64` is in `seeds.py`.)
Payload: b little-endian float32, the covered elements in that order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import CodecError, PayloadError
from ..seeds import mix64
from . import kernels
from .base import Coding, Encoded, FloatVector, Hint, Payload
from .fraction import check_fraction
from .packing import INFINITE, ONE, PackingCodec
from .workspace import borrow

__all__ = ["RandomBlock", "parts"]


@dataclass(frozen=True)
class RandomBlock(PackingCodec):
    """One shared random block. Level: the fraction that is sent, in (0, 1]."""

    name: ClassVar[str] = "random_block"
    linear: ClassVar[bool] = True
    shared_seed: ClassVar[bool] = True

    def check_level(self, level: float) -> None:
        """Raise `CodecError` unless `level` is in (0, 1]."""
        check_fraction(self.name, level)

    def length(self, elements: int, level: float) -> int:
        """Return b: the elements of the block."""
        self.check_level(level)
        return min(elements, max(1, round(level * elements)))

    def payload_bound(self, elements: int, level: float) -> int:
        """Return the payload's length in bytes; every payload has it."""
        return 4 * self.length(elements, level)

    def encode(
        self,
        gradient: FloatVector,
        residual: FloatVector | None,
        *,
        level: float,
        seed: int,
        out: Payload,
        rest: FloatVector | None = None,
        hint: Hint | None = None,
    ) -> Encoded | None:
        """Encode at a worker; see `Codec.encode`. Beside the residual, what is kept takes one pass."""
        if rest is None or residual is None:
            return super().encode(gradient, residual, level=level, seed=seed, out=out, rest=rest)
        row = borrow("row", kernels.vector.ROW, np.float32)
        if kernels.vector.sum_past(gradient, residual, row, rest) >= INFINITE:
            return None
        return self._cut(rest, level=level, seed=seed, out=out)

    def pack(self, v: FloatVector, peak: int, rest: FloatVector | None, *, level: float, seed: int, out: Payload) -> Encoded:
        """Write the block of `v` that `seed` names; see `PackingCodec.pack`."""
        assert rest is not None
        np.copyto(rest, v)
        return self._cut(rest, level=level, seed=seed, out=out)

    def _cut(self, v: FloatVector, *, level: float, seed: int, out: Payload) -> Encoded:
        """Move the block of `v` that `seed` names to `out`, and leave zeros there."""
        b = self.length(v.size, level)
        block = out[: 4 * b].view(np.float32)
        for part, covered in parts(v.size, b, seed):
            block[part] = v[covered]
            v[covered] = 0.0
        return Encoded(4 * b, b)

    def validate(self, payload: Payload, coding: Coding) -> None:
        """Raise `PayloadError` unless the payload is one whole block, all of it finite."""
        try:
            b = self.length(coding.elements, coding.level)
        except CodecError as error:
            raise PayloadError(str(error)) from None
        if coding.count != b or payload.size != 4 * b:
            raise PayloadError(
                f"random_block: expected {b} entries in {4 * b} bytes at level {coding.level!r} of {coding.elements}, "
                f"got {coding.count} entries in {payload.size} bytes"
            )
        if kernels.vector.peak(payload.view(np.float32)) >= INFINITE:
            raise PayloadError("random_block: expected finite float32 values, got one that is infinite or not a number")

    def decode(self, payload: Payload, coding: Coding, out: FloatVector) -> None:
        """Write the block to its place in `out`, and zero elsewhere."""
        block = payload.view(np.float32)
        kernels.vector.clear(out)
        for part, covered in parts(coding.elements, coding.count, coding.seed):
            out[covered] = block[part]

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

    def sum_payloads(
        self, payloads: list[Payload], weights: list[np.float32], scale: np.float32, coding: Coding, out: Payload
    ) -> Encoded | None:
        """Add blocks of one place; see `Codec.sum_payloads`."""
        nbytes = 4 * coding.count
        total = out[:nbytes].view(np.float32)
        total.fill(0.0)
        for weight, payload in zip(weights, payloads, strict=True):
            kernels.vector.add(weight, payload.view(np.float32), total)
        if kernels.vector.scaled(total, scale) >= INFINITE:
            return None
        return Encoded(nbytes, coding.count)

    def release(self, residual: FloatVector, coding: Coding, payload: Payload, new_residual: FloatVector) -> bool:
        """Add the covered part of a residual to a summed block and clear it; see `Codec.release`."""
        block = payload[: 4 * coding.count].view(np.float32)
        np.copyto(new_residual, residual)
        for part, covered in parts(coding.elements, coding.count, coding.seed):
            kernels.vector.add(ONE, residual[covered], block[part])
            new_residual[covered] = 0.0
        return int(kernels.vector.peak(block)) < INFINITE


def parts(elements: int, length: int, seed: int) -> list[tuple[slice, slice]]:
    """Return (part of the block, covered elements) in order: one pair, or two where the block wraps around."""
    start = mix64(seed) % elements
    first = min(length, elements - start)
    parts = [(slice(0, first), slice(start, start + first))]
    if first < length:
        parts.append((slice(first, length), slice(0, length - first)))
    return parts

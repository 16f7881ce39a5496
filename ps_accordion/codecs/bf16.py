"""bf16: every element as bfloat16, the upper half of a float32, rounded to nearest even (Kalamkar et al., arXiv 1905.12322).

A code has 8 significant bits at any magnitude that float32 has, so there is no scale, and no pass to find one: an element is off
by 2^-8 of itself at most, however small it is beside the others. `dense` at 16 bits has 11 significant bits, down to 2^-29 of
the largest element.
What rounding loses stays in the residual, exactly. A magnitude above 255 * 2^120 is sent as that, never as infinity, and the rest
of it waits.

Payload, little-endian:

    u16   codes, n of them: bits 31 to 16 of a float32
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError, PayloadError
from . import kernels
from .base import Coding, Encoded, FloatVector, Payload
from .onepass import OnePassCodec
from .packing import INFINITE, check_length, need_rest

__all__ = ["BF16"]


@dataclass(frozen=True)
class BF16(OnePassCodec):
    """The upper halves of all elements. Level: bits an element, always 16."""

    name: ClassVar[str] = "bf16"

    def libraries(self) -> frozenset[str]:
        """Return the modules of `kernels` that it runs; see `Codec.libraries`."""
        return super().libraries() | {"bfloat"}

    def check_level(self, level: float) -> None:
        """Raise `CodecError` unless `level` is 16."""
        if level != 16:
            raise CodecError(f"bf16: expected a level of 16 (bits an element), got {level!r}")

    def takes_any(self, level: float) -> bool:
        """Return True: there are only codes, and each has a value."""
        return True

    def payload_bound(self, elements: int, level: float) -> int:
        """Return the payload's length in bytes; every payload has it."""
        self.check_level(level)
        return 2 * elements

    def fuse(
        self,
        a: FloatVector,
        scale: np.float32,
        b: FloatVector,
        rest: FloatVector | None,
        *,
        level: float,
        seed: int,
        out: Payload,
    ) -> Encoded | None:
        """Round to nearest, and keep what that loses; see `OnePassCodec.fuse`."""
        need_rest(self, rest, level)
        nbytes = self.payload_bound(a.size, level)
        if kernels.bfloat.encode(a, scale, b, _codes(out[:nbytes]), rest) >= INFINITE:
            return None
        return Encoded(nbytes, a.size)

    def validate(self, payload: Payload, coding: Coding) -> None:
        """Raise `PayloadError` unless the payload holds exactly the vector, all of it finite."""
        check_length(self, payload, coding)
        if kernels.bfloat.peak(_codes(payload)) > kernels.bfloat.LARGEST:
            raise PayloadError("bf16: expected finite bfloat16 values, got one that is infinite or not a number")

    def fits(self, payload: Payload, coding: Coding) -> None:
        """Raise `PayloadError` unless the payload is as long as the vector."""
        check_length(self, payload, coding)

    def decode(self, payload: Payload, coding: Coding, out: FloatVector) -> None:
        """Write the vector to `out`."""
        kernels.bfloat.decode(_codes(payload), out)

    def peek(self, payload: Payload, coding: Coding, start: int, out: FloatVector) -> None:
        """Write a stretch of the vector to `out`."""
        kernels.bfloat.decode(_codes(payload)[start : start + out.size], out)

    def begin(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Set `total` to `0 + weight` times the vector."""
        kernels.bfloat.begin(_codes(payload), weight, total)

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Add `weight` times the vector to `total`."""
        kernels.bfloat.add(_codes(payload), weight, total)


def _codes(payload: Payload) -> NDArray[np.uint16]:
    return payload.view(np.uint16)

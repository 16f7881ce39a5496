"""What codecs with feedback share: both sides first make the vector, check that it is finite, and then pack it.

A worker makes `v = gradient + residual`, a server makes `p = total * scale + residual`.
From there on they do the same: write a payload, and what it does not carry.
A codec that subclasses `PackingCodec` supplies `pack` and gets `encode` and `reencode`.
The residual is written only after the whole vector has been found finite.
`topk` makes and packs its vector in one pass, and is none of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from ..errors import CodecError, PayloadError
from . import kernels
from .base import Codec, Coding, Encoded, FloatVector, Hint, Payload
from .workspace import borrow

__all__ = ["INFINITE", "ONE", "PackingCodec", "check_length", "combined", "joined", "need_rest", "summed"]

INFINITE = 0x7F800000
"""Bits of float32 infinity: a vector is finite if the bits of its largest magnitude are below this."""
ONE = np.float32(1.0)


def summed(gradient: FloatVector, residual: FloatVector | None, out: FloatVector) -> int:
    """Write `gradient + residual` to `out`, other memory than both; return the bits of the largest magnitude."""
    if residual is not None:
        return int(kernels.vector.sum_into(gradient, residual, out))
    return int(kernels.vector.scaled_into(gradient, ONE, out))


def combined(total: FloatVector, scale: np.float32, residual: FloatVector | None) -> int:
    """Set `total := total * scale + residual`; return the bits of the largest magnitude."""
    if residual is not None:
        return int(kernels.vector.combine(total, scale, residual))
    return int(kernels.vector.scaled(total, scale))


def joined(payloads: Sequence[Payload]) -> Payload:
    """Return the payloads one behind another, for a kernel to go through them all.

    A kernel a member would let go of the GIL for each, and so would numpy to copy one; who works on another key waits for it.
    """
    return np.frombuffer(b"".join([payload.data for payload in payloads]), np.uint8)


def need_rest(codec: Codec, rest: FloatVector | None, level: float) -> None:
    """Raise `CodecError` if there is no memory for what a codec that is not exact keeps."""
    if rest is None:
        raise CodecError(
            f"{codec.name} at level {level!r} loses part of what it encodes: expected a residual to keep it in, got None; "
            "hand in float32 zeros of the vector's length"
        )


def check_length(codec: Codec, payload: Payload, coding: Coding) -> None:
    """Raise `PayloadError` unless a payload has an entry an element, and all the bytes of its bound."""
    try:
        length = codec.payload_bound(coding.elements, coding.level)
    except CodecError as error:
        raise PayloadError(str(error)) from None
    if coding.count != coding.elements or payload.size != length:
        raise PayloadError(
            f"{codec.name}: expected {coding.elements} entries in {length} bytes at level {coding.level!r}, "
            f"got {coding.count} entries in {payload.size} bytes"
        )


class PackingCodec(Codec):
    """A codec that compresses a finished vector."""

    @abstractmethod
    def pack(self, v: FloatVector, peak: int, rest: FloatVector | None, *, level: float, seed: int, out: Payload) -> Encoded:
        """Write the payload of `v` to the front of `out`, and `v - D(payload)` to the whole of `rest`.

        Args:
            v: float32[n], finite; may be overwritten.
            peak: Bits of the largest magnitude in `v`.
            rest: float32[n], other memory than `v`; None where nothing is to be kept.
            level: The codec's setting.
            seed: 64-bit counter seed.
            out: uint8[>= payload_bound(n, level)], 4-byte aligned.
        """

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
        """Encode at a worker; see `Codec.encode`."""
        self._need_rest(residual, level)
        v = borrow("v", gradient.size, np.float32)
        peak = summed(gradient, residual, v)
        if peak >= INFINITE:
            return None
        return self.pack(v, peak, residual if rest is None else rest, level=level, seed=seed, out=out)

    def reencode(
        self,
        total: FloatVector,
        scale: np.float32,
        residual: FloatVector | None,
        new_residual: FloatVector | None,
        *,
        level: float,
        seed: int,
        out: Payload,
        hint: Hint | None = None,
    ) -> Encoded | None:
        """Encode at a server; see `Codec.reencode`."""
        self._need_rest(new_residual, level)
        peak = combined(total, scale, residual)
        if peak >= INFINITE:
            return None
        return self.pack(total, peak, new_residual, level=level, seed=seed, out=out)

    def _need_rest(self, rest: FloatVector | None, level: float) -> None:
        if self.keeps(level):
            need_rest(self, rest, level)

"""What codecs share that make, encode and subtract a piece of the vector while it is in the cache.

A worker makes `v = gradient + residual`, a server makes `p = total * scale + residual`: both are `a * scale + b`, and so one loop
serves both. A codec that subclasses `OnePassCodec` supplies `fuse` and gets `encode` and `reencode`.
What is not finite may turn up in the last piece, so what is kept is written beside the residual, and takes its place afterwards.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from .base import Codec, Encoded, FloatVector, Hint, Payload
from .packing import ONE
from .workspace import borrow

__all__ = ["NOTHING", "OnePassCodec"]

NOTHING: FloatVector = np.empty(0, np.float32)
"""What stands for zeros in kernels that take `b`."""
NOTHING.flags.writeable = False


class OnePassCodec(Codec):
    """A codec that makes its vector while it encodes it."""

    @abstractmethod
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
        """Write the payload of `v = a * scale + b` (two roundings), and all that is to be kept to `rest`.

        Args:
            a: float32[n].
            scale: A factor.
            b: float32[n], or empty for zero.
            rest: float32[n], other memory than `b`; None where there is no residual.
            level: The codec's setting; it has not been checked.
            seed: 64-bit counter seed.
            out: uint8[>= payload_bound(n, level)], 4-byte aligned.

        Returns:
            How much was written; None when any element of `v` is not finite, and then all that is written to is undefined.
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
        kept = rest
        if kept is None and residual is not None:
            kept = borrow("v", gradient.size, np.float32)
        before = NOTHING if residual is None else residual
        encoded = self.fuse(gradient, ONE, before, kept, level=level, seed=seed, out=out)
        if encoded is not None and rest is None and residual is not None and kept is not None:
            np.copyto(residual, kept)
        return encoded

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
        before = NOTHING if residual is None else residual
        return self.fuse(total, scale, before, new_residual, level=level, seed=seed, out=out)

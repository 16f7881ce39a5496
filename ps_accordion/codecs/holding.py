"""Encode a key of which some slices have no gradient this round.

Several small tensors share a key. Where a tensor was not used, its span is *held*: it counts as zero, and its residual stays
as it is, for the round in which the tensor is used again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import CodecError
from .base import Codec, Encoded, FloatVector, Hint, Payload

__all__ = ["Held", "check_holding", "encode_holding", "without"]

Held = Sequence[tuple[int, int]]
"""Spans of a key: (first element, elements)."""


def without(vector: FloatVector, held: Held) -> FloatVector:
    """Return a copy of `vector` with the held spans zero. Copies: fused keys are small, and held spans rare."""
    copy = vector.copy()
    for start, length in held:
        copy[start : start + length] = 0.0
    return copy


def check_holding(codec: Codec, held: Held) -> None:
    """Raise `CodecError` if spans are to be held by a codec that sends something for a zero, which nobody would take back."""
    if held and not codec.zero_kept:
        raise CodecError(f"codec {codec.name} sends something for zeros and cannot hold spans; expected fused keys to go dense")


def encode_holding(
    codec: Codec,
    gradient: FloatVector,
    residual: FloatVector | None,
    held: Held,
    *,
    level: float,
    seed: int,
    out: Payload,
    rest: FloatVector | None = None,
    hint: Hint | None = None,
) -> Encoded | None:
    """Do what `codec.encode` does, with the held spans as zero and their residual left as it is.

    What the gradient holds in a held span, finite or not, is not looked at.
    """
    if not held:
        return codec.encode(gradient, residual, level=level, seed=seed, out=out, rest=rest, hint=hint)
    check_holding(codec, held)
    gradient = without(gradient, held)
    if residual is None:
        return codec.encode(gradient, None, level=level, seed=seed, out=out, hint=hint)
    kept = [residual[start : start + length].copy() for start, length in held]
    for start, length in held:
        residual[start : start + length] = np.float32(0.0)
    try:
        return codec.encode(gradient, residual, level=level, seed=seed, out=out, rest=rest, hint=hint)
    finally:
        for (start, length), saved in zip(held, kept, strict=True):
            residual[start : start + length] = saved
            if rest is not None:
                rest[start : start + length] = saved

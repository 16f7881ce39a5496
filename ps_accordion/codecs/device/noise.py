"""Random bits on a device; `codecs/kernels/noise.py` says what they are."""

from __future__ import annotations

import torch

from ..noise import noise_key

__all__ = ["hashed"]


def hashed(place: torch.Tensor, seed: int) -> torch.Tensor:
    """Return 32 bits for each place, int32 as the places are."""
    low, high = (word - (1 << 32) if word >> 31 else word for word in noise_key(seed))
    x = place ^ low
    x = _mixed(x, 16) * 0x7FEB352D
    x = (_mixed(x, 15) ^ high) * (0x846CA68B - (1 << 32))
    return _mixed(x, 16)


def _mixed(x: torch.Tensor, shift: int) -> torch.Tensor:
    """Return `x ^ (x >> shift)`, with zeros shifted in."""
    return x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))

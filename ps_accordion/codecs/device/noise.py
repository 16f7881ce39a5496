"""Random bits on a device; `codecs/kernels/noise.py` says what they are."""

from __future__ import annotations

import torch

from ..noise import noise_key

__all__ = ["hashed", "key_of", "signed"]


def signed(word: int) -> int:
    """Return 32 bits as the number from -2^31 on that they are as int32."""
    return word - (1 << 32) if word >> 31 else word


def key_of(seed: int) -> tuple[int, int]:
    """Return the words that a seed is hashed with, as int32."""
    low, high = noise_key(seed)
    return signed(low), signed(high)


def hashed(place: torch.Tensor, key: tuple[int, ...] | torch.Tensor) -> torch.Tensor:
    """Return 32 bits for each place, int32 as the places are; `key` is `key_of(seed)`, or an int32[2] of it on the device."""
    low, high = key[0], key[1]
    x = place ^ low
    x = _mixed(x, 16) * 0x7FEB352D
    x = (_mixed(x, 15) ^ high) * (0x846CA68B - (1 << 32))
    return _mixed(x, 16)


def _mixed(x: torch.Tensor, shift: int) -> torch.Tensor:
    """Return `x ^ (x >> shift)`, with zeros shifted in."""
    return x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))

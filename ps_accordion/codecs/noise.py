"""The key of random bits: `kernels/noise.py` makes them of it."""

from __future__ import annotations

from ..seeds import mix64

__all__ = ["noise_key"]


def noise_key(seed: int) -> tuple[int, int]:
    """Return the two words that key the noise of a seed: (lower, upper) of `mix64(seed)`."""
    mixed = mix64(seed)
    return mixed & 0xFFFFFFFF, mixed >> 32

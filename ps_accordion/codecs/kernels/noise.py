"""Random bits that follow from a place and a key, the same wherever they are computed."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import helper

__all__ = ["hashed"]


@helper
def hashed(place: Any, low: Any, high: Any) -> Any:
    """Return 32 bits that follow from a place and a key of two words, all of them uint32."""
    # 32 bits wide at every step, or it is computed in 64, at half the speed.
    x = np.uint32(place ^ low)
    x = np.uint32(x ^ np.uint32(x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ np.uint32(x >> np.uint32(15)))
    x = np.uint32(np.uint32(x ^ high) * np.uint32(0x846CA68B))
    return np.uint32(x ^ np.uint32(x >> np.uint32(16)))

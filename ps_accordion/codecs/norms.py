"""Norms that are the same to the bit on every host."""

from __future__ import annotations

import math

import numpy as np

from . import kernels
from .base import FloatVector
from .workspace import borrow

__all__ = ["norm", "shrink"]


def norm(vector: FloatVector) -> float:
    """Return the L2 norm of float32[n]: float64 sums in 64 lanes (`kernels/vector.py`), so the order is fixed."""
    return math.sqrt(kernels.vector.squares(vector, borrow("lanes", kernels.vector.LANES, np.float64)))


def shrink(vector: FloatVector, factor: np.float32) -> float:
    """Multiply float32[n] by `factor` in place; return the L2 norm of what that took away."""
    return math.sqrt(kernels.vector.shrink(vector, factor, borrow("lanes", kernels.vector.LANES, np.float64)))

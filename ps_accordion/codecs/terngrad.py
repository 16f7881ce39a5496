"""terngrad: every element is -s, 0 or s, at random, so that the mean is the clipped element (Wen et al., arXiv 1705.07878).

    s = min(max|v|, 2.5 sigma)        P(D = sign(v) s) = min(|v|, s) / s,  else D = 0

Clipping shortens the largest elements, so the mean is not quite v, and what is lost is not kept: unbiased up to clipping.
The paper has one s a layer and shares it between workers. Here each bucket has its own, and sigma is the root of its mean square:
deviations from zero, which is where gradients lie. It is a float64 sum in 64 lanes, in the order of `kernels/vector.py`.
What rounds is `qsgd` at 2 bits: noise is 15 bits of a hash, and s lies between 2^-126 and 2^120.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .qsgd import Qsgd

__all__ = ["TernGrad"]


@dataclass(frozen=True)
class TernGrad(Qsgd):
    """Clipped, then one of three numbers. Level: bits an element, always 2."""

    name: ClassVar[str] = "terngrad"
    widths: ClassVar[tuple[int, ...]] = (2,)
    clipped: ClassVar[int] = 1

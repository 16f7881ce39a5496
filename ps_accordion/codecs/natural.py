"""natural: signs and exponents, every element rounded stochastically to a power of two (Horvath et al., arXiv 1905.10988).

With 2^k <= |v| <= 2^(k + 1):

    P(D = sign(v) 2^(k + 1)) = (|v| - 2^k) / 2^k,  else D = sign(v) 2^k

D is v in the mean and its error, over seeds, is no longer than 1/8 of the energy, whatever the numbers are: so nothing is kept.
The exponent counts down from the power of two above the largest element of a bucket, in 7 bits: 126 octaves. What is below them
is rounded to the last of them or to zero, in proportion too.
The paper sends 9 bits, with the exponent of float32. Here it is 8 and a scale a bucket.
The noise of an element is 16 bits of a hash (`kernels/buckets.py`), so the mean is right to 2^-17 of the step.
Scales lie between 2^-126 and 2^120, so that magnitudes above 2^120 are clipped there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from . import kernels
from .base import FloatVector
from .buckets import BucketCodec, Parts
from .noise import noise_key
from .workspace import borrow

__all__ = ["Natural"]


@dataclass(frozen=True)
class Natural(BucketCodec):
    """Powers of two. Level: bits an element, always 8."""

    name: ClassVar[str] = "natural"
    widths: ClassVar[tuple[int, ...]] = (8,)
    powers: ClassVar[int] = 1

    def keeps(self, level: float) -> bool:
        """Return False: what is lost is zero in the mean."""
        return False

    def quantise(
        self,
        a: FloatVector,
        scale: np.float32,
        b: FloatVector,
        rest: FloatVector | None,
        *,
        width: int,
        seed: int,
        parts: Parts,
    ) -> int:
        """Round to powers of two; nothing is kept. See `BucketCodec.quantise`."""
        v = borrow("bucket", self.bucket, np.float32)
        low, high = noise_key(seed)
        peak = kernels.buckets.natural(a, scale, b, v, self.bucket, low, high, parts.scales, parts.codes)
        if rest is not None:
            kernels.vector.clear(rest)
        return int(peak)

"""qsgd: codes of 8, 4 or 2 bits, linear to the largest element of a bucket, rounded stochastically ("linear dithering").

Alistarh et al., QSGD, arXiv 1610.02132, section 3:

    unit = max|v| / L,  L = 2^(bits - 1) - 1        q = floor(v / unit) or one more, so that E q = v / unit        D = q * unit

D is v in the mean, so nothing is kept: what rounding adds is noise, which the mean over workers and rounds takes away. Feedback
would do harm, because the noise may be longer than the vector. `int` is the counterpart that keeps what it loses.
The paper scales by the norm of a bucket and codes the levels with Elias codes. Scaling by the largest element has less variance
at these bits, and codes of a fixed width have a fixed size; later implementations of the authors do both.
The noise of an element is 15 bits of a hash (`kernels/buckets.py`), so the mean is right to 2^-16 of a unit, at most.
Units lie between 2^-126 and 2^120: elements above L * 2^120 are clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from . import kernels
from .base import FloatVector
from .buckets import BucketCodec, Parts, scratch_codes
from .noise import noise_key
from .workspace import borrow

__all__ = ["Qsgd"]


@dataclass(frozen=True)
class Qsgd(BucketCodec):
    """Codes rounded stochastically. Level: bits an element, 8, 4 or 2."""

    name: ClassVar[str] = "qsgd"
    widths: ClassVar[tuple[int, ...]] = (8, 4, 2)
    clipped: ClassVar[int] = 0
    """1 to clip elements far from zero first, else 0."""

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
        """Round stochastically; nothing is kept. See `BucketCodec.quantise`."""
        v, wide = borrow("bucket", self.bucket, np.float32), scratch_codes(self.bucket)
        lanes = borrow("lanes", kernels.buckets.LANES, np.float64)
        low, high = noise_key(seed)
        peak = kernels.buckets.dither(
            a, scale, b, v, width, self.bucket, self.clipped, low, high, parts.scales, parts.codes, wide, lanes
        )
        if rest is not None:
            kernels.vector.clear(rest)
        return int(peak)

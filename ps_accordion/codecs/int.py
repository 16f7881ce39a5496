"""int: codes of 8, 4 or 2 bits, linear to the largest element of a bucket, rounded to nearest (Dettmers, arXiv 1511.04561).

What rounding loses stays in the residual, as 1-bit SGD has it (Seide et al., 2014; why that works: Karimireddy et al., arXiv
1901.09847).

    unit = max|v| / L,  L = 2^(bits - 1) - 1        q = round(v / unit), ties to even        D = q * unit

Rounding errs by half a unit at most, and costs half the squared error of stochastic rounding: `qsgd` is the unbiased counterpart.
The unit is kept between 2^-126 and 2^120, so that neither it nor its inverse is denormal and every code is finite. Elements below
2^-127 wait in the residual until they add up; those above L * 2^120 are sent in several rounds.
D is 0 or within a factor of two of v, or both are multiples of one small power of two, so `v - D` is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from . import kernels
from .base import FloatVector
from .buckets import BucketCodec, Parts, scratch_codes
from .cache import goes_past
from .packing import need_rest
from .workspace import borrow

__all__ = ["Int"]


@dataclass(frozen=True)
class Int(BucketCodec):
    """Codes rounded to nearest. Level: bits an element, 8, 4 or 2."""

    name: ClassVar[str] = "int"
    widths: ClassVar[tuple[int, ...]] = (8, 4, 2)

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
        """Round to nearest, and keep what that loses; see `BucketCodec.quantise`."""
        need_rest(self, rest, width)
        assert rest is not None
        wide, v = scratch_codes(self.bucket), borrow("bucket", self.bucket, np.float32)
        return int(
            kernels.buckets.nearest(
                a, scale, b, rest, goes_past(rest.size), width, self.bucket, parts.scales, parts.codes, wide, v
            )
        )

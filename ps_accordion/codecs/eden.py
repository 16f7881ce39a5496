"""eden: rotate at random, quantise to the best levels for normal numbers, in 1 to 4 bits (Vargaftik et al., arXiv 2108.08842).

With one bit it is DRIVE (Vargaftik et al., arXiv 2105.08339):

    y = H S v,  S random signs, H the Hadamard transform        c = the nearest level to each y / deviation
    size = <c, y> / <c, c>                                      D(v) = size * S H c / R

A rotation makes normal numbers of anything, one large element or many small ones, so one table of levels fits all, and the error
does not depend on what gradients look like: 0.363, 0.117, 0.035 and 0.0095 of the energy with 1, 2, 3 and 4 bits.

The papers choose the size <y, y> / <c, y>, with which D is v in the mean over rotations, and keep nothing; the error is larger
then, 0.571, 0.133, 0.036 and 0.0096. Here it is the one that loses least. What is lost is |v|^2 (1 - cos^2 of the angle between y
and c), less than all of it for every vector, so feedback converges, and D + what is kept is v, in one round and in all.
`docs/decisions/0023-what-eden-keeps.md` has the evidence.

Columns of 1,024 elements are rotated, sixteen side by side, each with a size of its own; `kernels/hadamard.py` says what is a
column. The additions have a fixed order, so a payload decodes to the same bits everywhere. Rotations are each member's own, and
new in each round; the payload has the seed. Of a tile with a magnitude of 2^126 or more, nothing is sent.

The payload is that of `rotated.py`, its sizes from 0 to 2^114; `kernels/eden.py` has the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from . import kernels
from .base import Encoded, FloatVector, Payload
from .noise import noise_key
from .packing import INFINITE, need_rest
from .rotated import Parts, RotatedCodec
from .workspace import borrow

__all__ = ["Eden"]


@dataclass(frozen=True)
class Eden(RotatedCodec):
    """Rotated codes, and what they do not carry is kept. Level: bits an element, 1 to 4."""

    name: ClassVar[str] = "eden"
    widths: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)
    log_largest: ClassVar[int] = 114

    def libraries(self) -> frozenset[str]:
        """Return the modules of `kernels` that it runs; see `Codec.libraries`."""
        return super().libraries() | {"eden"}

    def fuse(
        self,
        a: FloatVector,
        scale: np.float32,
        b: FloatVector,
        rest: FloatVector | None,
        *,
        level: float,
        seed: int,
        out: Payload,
    ) -> Encoded | None:
        """Rotate, quantise, and keep what that loses; see `OnePassCodec.fuse`."""
        need_rest(self, rest, level)
        n = a.size
        _, sizes, codes = self.begin_payload(seed, n, level, out)
        low, high = noise_key(seed)
        work, wide = _scratch()
        if kernels.eden.encode(a, scale, b, rest, int(level), low, high, sizes, codes, work, wide) >= INFINITE:
            return None
        return Encoded(self.payload_bound(n, level), n)

    def add_tiles(self, parts: Parts, width: int, first: int, weight: np.float32, fresh: int, total: FloatVector) -> None:
        """Add what the codes stand for, rotated back; see `RotatedCodec.add_tiles`."""
        kernels.eden.add(parts.codes, parts.sizes, width, first, *noise_key(parts.seed), weight, fresh, *_scratch(), total)


def _scratch() -> tuple[FloatVector, Payload]:
    return borrow("rotated", kernels.eden.WORK, np.float32), borrow("wide", kernels.hadamard.GROUP, np.uint8)

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

Payload, little-endian, with T = ceil(n / 16384) tiles, and R rows of 16 elements in all of them together:

    u64     seed of the signs
    f32     sizes, 16 T of them, from 0 to 2^114
    bytes   codes, 2 R level of them (`kernels/eden.py`)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

import numpy as np

from ..errors import CodecError, PayloadError
from . import kernels
from .base import Coding, Encoded, FloatVector, Payload
from .noise import noise_key
from .onepass import OnePassCodec
from .packing import INFINITE, ONE, check_length, need_rest
from .workspace import borrow

__all__ = ["PREAMBLE", "TILE", "WIDTH", "Eden", "Parts", "parts_of", "rows_of"]

WIDTH: Final = 16
TILE: Final = 1024 * WIDTH
PREAMBLE: Final = 8
_LARGEST_BITS: Final = (114 + 127) << 23


class Parts(NamedTuple):
    """The parts of a payload.

    Attributes:
        seed: Of the signs.
        sizes: float32[16 * tiles], a view.
        codes: uint8[bytes of all codes], a view.
    """

    seed: int
    sizes: FloatVector
    codes: Payload


@dataclass(frozen=True)
class Eden(OnePassCodec):
    """Rotated codes. Level: bits an element, 1 to 4."""

    name: ClassVar[str] = "eden"
    zero_kept: ClassVar[bool] = False

    def libraries(self) -> frozenset[str]:
        """Return the modules of `kernels` that it runs; see `Codec.libraries`."""
        return super().libraries() | {"eden"}

    def check_level(self, level: float) -> None:
        """Raise `CodecError` unless `level` is 1, 2, 3 or 4."""
        if level not in (1, 2, 3, 4):
            raise CodecError(f"eden: expected a level of 1, 2, 3 or 4 (bits an element), got {level!r}")

    def payload_bound(self, elements: int, level: float) -> int:
        """Return the payload's length in bytes; every payload has it."""
        self.check_level(level)
        return PREAMBLE + 4 * WIDTH * -(-elements // TILE) + 2 * rows_of(elements) * int(level)

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
        n, end = a.size, self.payload_bound(a.size, level)
        out[:PREAMBLE] = np.frombuffer(seed.to_bytes(PREAMBLE, "little"), np.uint8)
        _, sizes, codes = parts_of(out[:end], n)
        low, high = noise_key(seed)
        work, wide = _scratch()
        if kernels.eden.encode(a, scale, b, rest, int(level), low, high, sizes, codes, work, wide) >= INFINITE:
            return None
        return Encoded(end, n)

    def validate(self, payload: Payload, coding: Coding) -> None:
        """Raise `PayloadError` unless the length is right, and all sizes keep all codes finite."""
        check_length(self, payload, coding)
        sizes = parts_of(payload, coding.elements).sizes
        if int(sizes.view(np.uint32).max(initial=0)) > _LARGEST_BITS:
            raise PayloadError("eden: expected sizes from 0 to 2^114, got another one")

    def decode(self, payload: Payload, coding: Coding, out: FloatVector) -> None:
        """Write what the codes stand for, rotated back, to `out`."""
        self._add(payload, coding, ONE, 1, out)

    def peek(self, payload: Payload, coding: Coding, start: int, out: FloatVector) -> None:
        """Write a stretch of D(payload) to `out`: whole tiles are rotated back, and cut."""
        first, last = start // TILE, -(-(start + out.size) // TILE)
        whole = borrow("peeked", min(last * TILE, coding.elements) - first * TILE, np.float32)
        seed, sizes, codes = parts_of(payload, coding.elements)
        sizes, codes = sizes[first * WIDTH : last * WIDTH], codes[first * TILE * int(coding.level) // 8 :]
        kernels.eden.add(codes, sizes, int(coding.level), first * TILE, *noise_key(seed), ONE, 1, *_scratch(), whole)
        out[:] = whole[start - first * TILE :][: out.size]

    def begin(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Set `total` to `0 + weight` times what the codes stand for."""
        self._add(payload, coding, weight, 1, total)

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Add `weight` times what the codes stand for to `total`."""
        self._add(payload, coding, weight, 0, total)

    @staticmethod
    def _add(payload: Payload, coding: Coding, weight: np.float32, fresh: int, total: FloatVector) -> None:
        seed, sizes, codes = parts_of(payload, coding.elements)
        kernels.eden.add(codes, sizes, int(coding.level), 0, *noise_key(seed), weight, fresh, *_scratch(), total)


def rows_of(elements: int) -> int:
    """Return how many rows all tiles have: the last as few as hold what is left, but a power of two."""
    whole, left = divmod(elements, TILE)
    return whole * (TILE // WIDTH) + (1 << (-(-left // WIDTH) - 1).bit_length() if left else 0)


def parts_of(payload: Payload, elements: int) -> Parts:
    """Return the parts of a payload that has its length."""
    codes_at = PREAMBLE + 4 * WIDTH * -(-elements // TILE)
    seed = int.from_bytes(payload[:PREAMBLE].tobytes(), "little")
    return Parts(seed, payload[PREAMBLE:codes_at].view(np.float32), payload[codes_at:])


def _scratch() -> tuple[FloatVector, Payload]:
    return borrow("rotated", kernels.eden.WORK, np.float32), borrow("wide", kernels.hadamard.GROUP, np.uint8)

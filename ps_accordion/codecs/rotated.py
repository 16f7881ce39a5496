"""What codecs share that rotate a vector at random and send a code an element and a size a column (`kernels/hadamard.py`).

Payload, little-endian, with T = ceil(n / 16384) tiles, and R rows of 16 elements in all of them together:

    u64     seed of the signs
    f32     sizes, 16 T of them, from 0 to the largest that keeps all codes finite
    bytes   codes, 2 R level of them

What a code stands for, and how it is chosen, is the codec's own.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

import numpy as np

from ..errors import CodecError, PayloadError
from .base import Coding, FloatVector, Payload
from .onepass import OnePassCodec
from .packing import ONE, check_length
from .workspace import borrow

__all__ = ["PREAMBLE", "TILE", "WIDTH", "Parts", "RotatedCodec", "parts_of", "rows_of", "tiles_of"]

WIDTH: Final = 16
TILE: Final = 1024 * WIDTH
PREAMBLE: Final = 8


class Parts(NamedTuple):
    """The parts of a payload, or of some tiles of it.

    Attributes:
        seed: Of the signs.
        sizes: float32[16 * tiles], a view.
        codes: uint8[bytes of all codes], a view.
    """

    seed: int
    sizes: FloatVector
    codes: Payload


@dataclass(frozen=True)
class RotatedCodec(OnePassCodec):
    """A codec of rotated columns. Level: bits an element."""

    zero_kept: ClassVar[bool] = False
    widths: ClassVar[tuple[int, ...]]
    """Levels that the codec has."""
    log_largest: ClassVar[int]
    """The largest size, as the exponent of a power of two."""

    def check_level(self, level: float) -> None:
        """Raise `CodecError` unless `level` is among `widths`."""
        if level not in self.widths:
            known = f"{', '.join(map(str, self.widths[:-1]))} or {self.widths[-1]}"
            raise CodecError(f"{self.name}: expected a level of {known} (bits an element), got {level!r}")

    def payload_bound(self, elements: int, level: float) -> int:
        """Return the payload's length in bytes; every payload has it."""
        self.check_level(level)
        return PREAMBLE + 4 * WIDTH * -(-elements // TILE) + 2 * rows_of(elements) * int(level)

    def begin_payload(self, seed: int, elements: int, level: float, out: Payload) -> Parts:
        """Write the seed of the signs to the front of `out`; return the parts of the payload, of which the others are to come."""
        out[:PREAMBLE] = np.frombuffer(seed.to_bytes(PREAMBLE, "little"), np.uint8)
        return parts_of(out[: self.payload_bound(elements, level)], elements)

    @abstractmethod
    def add_tiles(self, parts: Parts, width: int, first: int, weight: np.float32, fresh: int, total: FloatVector) -> None:
        """Set `total := total + weight * D` (two roundings), or `0 + weight * D` if `fresh` is not 0.

        Args:
            parts: Of whole tiles; the codes may go on behind them.
            width: Bits of a code.
            first: Where `total` begins in the vector, a multiple of TILE.
            weight: A factor.
            fresh: 1 if what `total` holds counts as zero, else 0.
            total: float32[n].
        """

    def validate(self, payload: Payload, coding: Coding) -> None:
        """Raise `PayloadError` unless the length is right, and all sizes keep all codes finite."""
        check_length(self, payload, coding)
        sizes = parts_of(payload, coding.elements).sizes
        if int(sizes.view(np.uint32).max(initial=0)) > (self.log_largest + 127) << 23:
            raise PayloadError(f"{self.name}: expected sizes from 0 to 2^{self.log_largest}, got another one")

    def decode(self, payload: Payload, coding: Coding, out: FloatVector) -> None:
        """Write what the codes stand for, rotated back, to `out`."""
        self.begin(payload, coding, ONE, out)

    def peek(self, payload: Payload, coding: Coding, start: int, out: FloatVector) -> None:
        """Write a stretch of D(payload) to `out`: whole tiles are rotated back, and cut."""
        first, parts = tiles_of(payload, coding, start, out.size)
        whole = borrow("peeked", min(first + parts.sizes.size * (TILE // WIDTH), coding.elements) - first, np.float32)
        self.add_tiles(parts, int(coding.level), first, ONE, 1, whole)
        out[:] = whole[start - first :][: out.size]

    def begin(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Set `total` to `0 + weight` times what the codes stand for."""
        self.add_tiles(parts_of(payload, coding.elements), int(coding.level), 0, weight, 1, total)

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Add `weight` times what the codes stand for to `total`."""
        self.add_tiles(parts_of(payload, coding.elements), int(coding.level), 0, weight, 0, total)


def rows_of(elements: int) -> int:
    """Return how many rows all tiles have: the last as few as hold what is left, but a power of two."""
    whole, left = divmod(elements, TILE)
    return whole * (TILE // WIDTH) + (1 << (-(-left // WIDTH) - 1).bit_length() if left else 0)


def parts_of(payload: Payload, elements: int) -> Parts:
    """Return the parts of a payload that has its length."""
    codes_at = PREAMBLE + 4 * WIDTH * -(-elements // TILE)
    seed = int.from_bytes(payload[:PREAMBLE].tobytes(), "little")
    return Parts(seed, payload[PREAMBLE:codes_at].view(np.float32), payload[codes_at:])


def tiles_of(payload: Payload, coding: Coding, start: int, elements: int) -> tuple[int, Parts]:
    """Return where the tiles begin that have a stretch of the vector, and their parts; the codes go on behind them."""
    seed, sizes, codes = parts_of(payload, coding.elements)
    first, last = start // TILE, -(-(start + elements) // TILE)
    return first * TILE, Parts(seed, sizes[first * WIDTH : last * WIDTH], codes[first * TILE * int(coding.level) // 8 :])

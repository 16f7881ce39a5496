"""onebit: a sign an element and a size a chunk, with feedback (Seide et al., 2014; Karimireddy et al., arXiv 1901.09847).

    D(v)_i = -s if v_i < 0 else s          s = mean |v_j| over the chunk of i

The mean is the size that loses least, 1 - ||v||_1^2 / (m ||v||_2^2) of the energy of a chunk of m elements, and always less than
all of it, so feedback converges; the root mean square, which others send, can lose more than there was.
A size a chunk costs next to nothing, fits a vector whose parts differ in magnitude, and lets sum, size, signs and residual be
made while the chunk is in the cache. The order in which magnitudes are added up is part of the format: `kernels/signs.py` has it.

Payload, little-endian, with C = ceil(n / level) chunks:

    f32   sizes, C of them
    u32   signs, ceil(n / 32) words: bit j of word w is 1 if element 32 w + j is below zero, and 0 beyond n
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError, PayloadError
from . import kernels
from .base import Coding, Encoded, FloatVector, Hint, Payload
from .cache import goes_past
from .packing import INFINITE, ONE, check_length, need_rest
from .signs import SignCodec, words_of
from .workspace import borrow

__all__ = ["OneBit"]

LEAST: Final = 64
"""Elements of the shortest chunk: as many as there are lanes."""
MOST: Final = 1 << 16
"""Elements of the longest chunk: 256 KiB still lie in a second-level cache, and longer ones save no bytes worth counting."""


@dataclass(frozen=True)
class OneBit(SignCodec):
    """A bit an element. Level: elements that share a size, a power of two from 64 to 65,536; fewer is lighter."""

    name: ClassVar[str] = "onebit"

    def check_level(self, level: float) -> None:
        """Raise `CodecError` unless `level` is a power of two from 64 to 65,536."""
        if not LEAST <= level <= MOST or level != int(level) or int(level) & (int(level) - 1):
            raise CodecError(f"onebit: expected a level that is a power of two from {LEAST} to {MOST} (a chunk), got {level!r}")

    def payload_bound(self, elements: int, level: float) -> int:
        """Return the payload's length in bytes; every payload has it."""
        return 4 * (self._chunks(elements, level) + words_of(elements))

    def encode(
        self,
        gradient: FloatVector,
        residual: FloatVector | None,
        *,
        level: float,
        seed: int,
        out: Payload,
        rest: FloatVector | None = None,
        hint: Hint | None = None,
    ) -> Encoded | None:
        """Encode at a worker; see `Codec.encode`."""
        need_rest(self, residual, level)
        assert residual is not None
        # What is not finite may turn up in the last chunk, and must leave the residual as it was. To look for it first takes one
        # pass that writes nothing, less than a second vector would.
        if rest is None and kernels.vector.peak_of_sum(gradient, residual) >= INFINITE:
            return None
        return self._split(gradient, ONE, residual, residual if rest is None else rest, rest is not None, level, out)

    def reencode(
        self,
        total: FloatVector,
        scale: np.float32,
        residual: FloatVector | None,
        new_residual: FloatVector | None,
        *,
        level: float,
        seed: int,
        out: Payload,
        hint: Hint | None = None,
    ) -> Encoded | None:
        """Encode at a server; see `Codec.reencode`."""
        need_rest(self, new_residual, level)
        assert new_residual is not None
        if residual is None:
            kernels.vector.clear(new_residual)
        past = residual is not None
        return self._split(total, scale, new_residual if residual is None else residual, new_residual, past, level, out)

    def _split(
        self, a: FloatVector, scale: np.float32, b: FloatVector, v: FloatVector, past: bool, level: float, out: Payload
    ) -> Encoded | None:
        """Set `v := a * scale + b`, write its sizes and signs to `out`, and leave in `v` what they do not carry.

        `past`: whether `v` is other memory than the rest, and may be written past the cache.
        """
        n = v.size
        sizes, words = self.parts(out[: self.payload_bound(n, level)], n, level)
        lanes = borrow("lanes", kernels.vector.LANES, np.float64)
        row = borrow("row", int(level), np.float32)
        if not kernels.signs.split(a, scale, b, v, past and goes_past(n), int(level), sizes, words, row, lanes):
            return None
        return Encoded(4 * (sizes.size + words.size), n)

    def validate(self, payload: Payload, coding: Coding) -> None:
        """Raise `PayloadError` unless length, sizes and the bits beyond the end are those of an encoder."""
        n = coding.elements
        check_length(self, payload, coding)
        sizes, words = self.parts(payload, n, coding.level)
        if int(sizes.view(np.uint32).max()) >= INFINITE:
            raise PayloadError("onebit: expected sizes that are finite and not below zero, got another one")
        self.check_end(words, n)

    def parts(self, payload: Payload, elements: int, level: float) -> tuple[FloatVector, NDArray[np.uint32]]:
        """Return sizes and words; see `SignCodec.parts`."""
        words_at = 4 * self._chunks(elements, level)
        return payload[:words_at].view(np.float32), payload[words_at:].view(np.uint32)

    def sizes_of(self, rows: NDArray[np.uint8], elements: int, level: float) -> NDArray[np.float32]:
        """Return what stands at the front of each payload; see `SignCodec.sizes_of`."""
        return rows[:, : 4 * self._chunks(elements, level)].view(np.float32)

    def chunk(self, level: float) -> int:
        """Return the level."""
        return int(level)

    def _chunks(self, elements: int, level: float) -> int:
        self.check_level(level)
        return -(-elements // int(level))

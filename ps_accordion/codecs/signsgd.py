"""signsgd: a sign an element up, the sign that most workers sent down (Bernstein et al., arXiv 1802.04434 and 1810.05291).

    worker   D(v)_i = level * sign(v_i)          server   D(p)_i = level * sign(sum over members of weight * sign(v_i))

The server's sum of what members sent is level times the vote, so its sign is the majority's, and what it sends has the size of
the level again: whatever the gradients, plain SGD moves every element by the learning rate times the level. The papers have level
1 and a learning rate of 1e-4; at 2^-10, the default, a learning rate of 0.1 does the same, and tensors that go dense, with
gradients as they are, keep the one that they are used to.

A zero is a coin toss, at workers (nothing says which way) and at servers (a tie, which two workers have at every element on which
they disagree): a fixed sign would push what has no gradient for ever, and a payload has no third value. Coins are hashes of the
seed, one word for 32 elements.

As published, nothing is kept of what a sign does not carry, and it is not noise either: where gradients of one sign are many and
small, and those of the other few and large, majority and mean disagree, and no number of rounds mends that (Karimireddy et al.,
arXiv 1901.09847). `onebit` is the counterpart with feedback. The ledger has what is not sent as lost, by design.

Payload, little-endian:

    u32   signs, ceil(n / 32) words: bit j of word w is 1 if element 32 w + j is negative, and 0 beyond n
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError
from . import kernels
from .base import Coding, Encoded, FloatVector, Payload
from .noise import noise_key
from .onepass import OnePassCodec
from .packing import check_length
from .signs import SignCodec, words_of
from .workspace import borrow

__all__ = ["SignSGD"]

LEAST: Final = 2.0**-30
MOST: Final = 2.0**30
"""Sizes of a step beyond which no learning rate makes sense. Powers of two, so that votes add up exactly and ties are ties."""
PIECE: Final = 1 << 12
"""Elements that are made at a time; they stay in a first-level cache."""


@dataclass(frozen=True)
class SignSGD(OnePassCodec, SignCodec):
    """A vote an element. Level: what a sign stands for, a power of two from 2^-30 to 2^30."""

    name: ClassVar[str] = "signsgd"

    def libraries(self) -> frozenset[str]:
        """Return the modules of `kernels` that it runs; see `Codec.libraries`."""
        return super().libraries() | {"votes"}

    def check_level(self, level: float) -> None:
        """Raise `CodecError` unless `level` is a power of two from 2^-30 to 2^30."""
        if not LEAST <= level <= MOST or np.frexp(level)[0] != 0.5:
            raise CodecError(
                f"signsgd: expected a level that is a power of two from 2^-30 to 2^30 (what a sign stands for), got {level!r}"
            )

    def payload_bound(self, elements: int, level: float) -> int:
        """Return the payload's length in bytes; every payload has it."""
        self.check_level(level)
        return 4 * words_of(elements)

    def keeps(self, level: float) -> bool:
        """Return False: what is lost is lost."""
        return False

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
        """Write signs, and coins for zeros; see `OnePassCodec.fuse`."""
        nbytes = self.payload_bound(a.size, level)
        low, high = noise_key(seed)
        piece = borrow("piece", PIECE, np.float32)
        if not kernels.votes.cast(a, scale, b, piece, low, high, out[:nbytes].view(np.uint32)):
            return None
        if rest is not None:
            kernels.vector.clear(rest)
        return Encoded(nbytes, a.size)

    def validate(self, payload: Payload, coding: Coding) -> None:
        """Raise `PayloadError` unless the length, and the bits beyond the end, are those of an encoder."""
        check_length(self, payload, coding)
        self.check_end(payload.view(np.uint32), coding.elements)

    def parts(self, payload: Payload, elements: int, level: float) -> tuple[FloatVector, NDArray[np.uint32]]:
        """Return the level as often as there are chunks, and words; see `SignCodec.parts`."""
        return np.full(-(-elements // self.chunk(level)), level, np.float32), payload.view(np.uint32)

    def sizes_of(self, rows: NDArray[np.uint8], elements: int, level: float) -> NDArray[np.float32]:
        """Return the level as often as there are chunks; see `SignCodec.sizes_of`."""
        return np.full((len(rows), -(-elements // self.chunk(level))), level, np.float32)

    def chunk(self, level: float) -> int:
        """Return a number, whatever the level is: all elements have one size."""
        return 1 << 16

    def rounding(self, payload: Payload, coding: Coding, start: int, vector: FloatVector) -> NDArray[np.float64]:
        """Return zeros: what is not sent is cut off, and no noise. An element whose sign is not that of `vector` stays whole."""
        sent = np.empty(vector.size, np.float32)
        self.peek(payload, coding, start, sent)
        np.copyto(vector, sent, where=np.sign(sent) * vector >= 0)
        return np.zeros(vector.size)

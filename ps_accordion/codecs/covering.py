"""What codecs share whose members send the same elements: the places follow from the shared seed, so none are sent.

Payloads of one level and seed are added without decoding, and what goes down is as small as what went up.
An encoder sends the elements as they are: nothing is rounded, and what is not covered stays in the residual.

    draw = mix64(seed)                                     (`seeds.py`; a bijection)

says which elements a payload covers, and each codec says how. *Independent* coverage: the seed is drawn anew every round.
*Cyclic* coverage: the draws of a key are numbered by the round, each covers what comes after the one before, and the seed is what
`mix64` makes that draw of. So a receiver needs to know of neither, and nothing is counted anywhere: a worker that comes in, or
goes on from a checkpoint, knows the round. A skipped round's elements go back into residuals and have their turn in the next
cycle. After a change of level the next cycle begins wherever the round number says, and covers everything.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ..errors import CodecError, PayloadError
from ..seeds import SHARED, seed_for
from . import kernels
from .base import Codec, Coding, Encoded, FloatVector, Hint, Payload
from .cache import goes_past
from .fraction import check_fraction
from .packing import INFINITE, ONE, joined, need_rest, summed
from .workspace import borrow

__all__ = ["Coverage", "CoveringCodec", "push_seed"]

Coverage = Literal["independent", "cyclic"]


@dataclass(frozen=True)
class CoveringCodec(Codec):
    """A codec that sends the elements that a shared seed names. Level: the fraction that is sent, in (0, 1].

    Attributes:
        coverage: How seeds are made, round after round; receivers do not need it.
    """

    linear: ClassVar[bool] = True
    shared_seed: ClassVar[bool] = True
    coverage: Coverage = "independent"

    def __post_init__(self) -> None:
        """Refuse a coverage that does not exist."""
        if self.coverage not in ("independent", "cyclic"):
            raise CodecError(f"{self.name}: expected coverage to be 'independent' or 'cyclic', got {self.coverage!r}")

    def check_level(self, level: float) -> None:
        """Raise `CodecError` unless `level` is in (0, 1]."""
        check_fraction(self.name, level)

    @abstractmethod
    def length(self, elements: int, level: float) -> int:
        """Return how many of `elements` are covered at most; raise `CodecError` if the level is not legal."""

    @abstractmethod
    def covered(self, elements: int, level: float, seed: int) -> int:
        """Return how many of `elements` are covered with this seed; the level is legal."""

    @abstractmethod
    def seed_of_turn(self, elements: int, level: float, *, stream: int, turn: int) -> int:
        """Return the seed of one turn of cyclic coverage.

        Args:
            elements: Length of the key.
            level: The codec's setting.
            stream: 64 bits that are the key's own.
            turn: Its number: the round.
        """

    @abstractmethod
    def send(self, v: FloatVector, *, level: float, seed: int, out: Payload) -> Encoded:
        """Write the covered elements of `v`, float32[n], to the front of `out`, and zero to their places in `v`."""

    def payload_bound(self, elements: int, level: float) -> int:
        """Return the length in bytes of the longest payload."""
        return 4 * self.length(elements, level)

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
        """Encode at a worker; see `Codec.encode`. The sum is made where what is not sent of it stays."""
        need_rest(self, residual, level)
        v = borrow("v", gradient.size, np.float32) if rest is None else rest
        if rest is not None and residual is not None:
            peak = _sum_past(gradient, ONE, residual, rest)
        else:
            peak = summed(gradient, residual, v)
        if peak >= INFINITE:
            return None
        encoded = self.send(v, level=level, seed=seed, out=out)
        if rest is None and residual is not None:
            np.copyto(residual, v)
        return encoded

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
        """Encode at a server; see `Codec.reencode`. The sum is made where what is not sent of it stays."""
        need_rest(self, new_residual, level)
        assert new_residual is not None
        if residual is None:
            peak = int(kernels.vector.scaled_into(total, scale, new_residual))
        else:
            peak = _sum_past(total, scale, residual, new_residual)
        return None if peak >= INFINITE else self.send(new_residual, level=level, seed=seed, out=out)

    def validate(self, payload: Payload, coding: Coding) -> None:
        """Raise `PayloadError` unless the payload has a finite value for each covered element."""
        n = coding.elements
        try:
            self.check_level(coding.level)
        except CodecError as error:
            raise PayloadError(str(error)) from None
        count = self.covered(n, coding.level, coding.seed)
        if coding.count != count or payload.size != 4 * count:
            raise PayloadError(
                f"{self.name}: expected {count} entries in {4 * count} bytes at level {coding.level!r} of {n}, "
                f"got {coding.count} entries in {payload.size} bytes"
            )
        if kernels.vector.peak(payload.view(np.float32)) >= INFINITE:
            raise PayloadError(f"{self.name}: expected finite float32 values, got one that is infinite or not a number")

    def sum_payloads(
        self, payloads: list[Payload], weights: list[np.float32], scale: np.float32, coding: Coding, out: Payload
    ) -> Encoded | None:
        """Add the values of the same elements; see `Codec.sum_payloads`."""
        nbytes = 4 * coding.count
        rows, total = joined(payloads).view(np.float32), out[:nbytes].view(np.float32)
        if kernels.vector.sum_rows(rows, np.array(weights), scale, total) >= INFINITE:
            return None
        return Encoded(nbytes, coding.count)

    def begin_all(
        self, payloads: Sequence[Payload], codings: Sequence[Coding], weights: Sequence[np.float32], total: FloatVector
    ) -> None:
        """Sum values of the same elements before they go to their places; see `Codec.begin_all`."""
        first = codings[0]
        if codings.count(first) != len(codings):
            super().begin_all(payloads, codings, weights, total)
            return
        values = borrow("values", first.count, np.float32).view(np.uint8)
        self.sum_payloads(list(payloads), list(weights), ONE, first, values)  # what is not finite shows in the total, too
        self.decode(values, first, total)


def _sum_past(a: FloatVector, scale: np.float32, b: FloatVector, out: FloatVector) -> int:
    """Write `a * scale + b` to `out`, other memory; return the bits of the largest magnitude."""
    row = borrow("row", kernels.vector.ROW, np.float32)
    return int(kernels.vector.sum_past(a, scale, b, row, goes_past(out.size), out))


def push_seed(
    codec: Codec, elements: int, level: float, *, job: int, layout: int, key: int, round_: int, slot: int
) -> int:  # fmt: skip
    """Return the seed that a worker encodes a push with.

    Args:
        codec: The codec.
        elements: Length of the key.
        level: The codec's setting.
        job: Seed of the job.
        layout: Number of the layout.
        key: Number of the key.
        round_: Number of the round.
        slot: The worker's slot; of no consequence where all must draw alike.
    """
    if isinstance(codec, CoveringCodec) and codec.coverage == "cyclic":
        return codec.seed_of_turn(elements, level, stream=seed_for(job, layout, key, 0, SHARED), turn=round_)
    shared, own = (seed_for(job, layout, key, round_, who) for who in (SHARED, slot + 1))
    if codec.shared_half:
        return shared >> 32 << 32 | own & 0xFFFFFFFF
    return shared if codec.shared_seed else own

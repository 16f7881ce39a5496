"""powersgd: a matrix as the product of two thin factors, one of which all members share (Vogels et al., arXiv 1905.13727).

With a right basis Q, orthonormal and the same at all members, a worker sends what its matrix M has along it:

    P = M Q          D = P Q^T          M - D stays in its residual

Everybody's P may then be added up undecoded, in place of everybody's M. A server makes the sum orthonormal, P = P' R, and answers

    D = P' (Q R^T)^T, the same matrix                 P', the basis of the next round, a left one: that sends Q = M^T P

So rounds take the two halves of a power iteration by turns, and one round trip each; the basis turns towards what gradients have
most of. As in the authors' later code, each half has feedback of its own: M - D is a projection, which is never longer than M.

Payloads carry *both* factors, so that they can be decoded by whoever holds nothing else. What a worker encodes goes on from the
last result that it has seen (`following`); before the first, from a basis that follows from the shared seed. Where members hold
different bases all the same, a server decodes, adds, and encodes with the first one's: less well for a round, and no less right.

A key is a matrix of `rows` (`fitted`): a tensor's first dimension by all others. Without them it is taken to be nearly square.

Payload, little-endian, with r = min(level, rows, columns):

    u32   rows
    u32   which factor is orthonormal: 0 the left, 1 the right one
    f32   the left factor, r vectors of length rows
    f32   the right factor, r vectors of length columns
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final, Literal

import numpy as np

from ..errors import CodecError, PayloadError
from . import kernels
from .base import STATE, Codec, Coding, Encoded, FloatVector, Hint, Payload
from .cache import goes_past
from .factors import HEADER, LEFT, MOST, RIGHT, Basis, Parts, apart, nearly_square, orthonormal, turned
from .packing import INFINITE, combined, need_rest
from .workspace import borrow

__all__ = ["LARGEST", "SMALLEST", "PowerSgd"]

ONE_BITS: Final = 0x3F800000
"""Bits of 1.0: no element of a vector of length 1 is larger."""
SMALLEST: Final = (127 - 96) << 23
"""Bits of 2^-96. Of a vector of smaller ones products would lose their digits: it waits in the residual, and zeros are sent."""
LARGEST: Final = 96
"""Of a vector of elements of 2^96 and more as much is sent as keeps products finite; the rest goes in the next rounds."""
LIMIT: Final = (127 + 120) << 23
"""Bits of 2^120: 64 products of such an element with one of an orthonormal factor add up to something finite."""


@dataclass(frozen=True)
class PowerSgd(Codec):
    """Two thin factors. Level: the rank, a whole number from 1 to 64.

    Attributes:
        rows: Of the matrix; 0 takes the vector for one that is nearly square.
        basis: What the next encoding goes on from; None draws one.
    """

    name: ClassVar[str] = "powersgd"
    linear: ClassVar[bool] = True
    shared_seed: ClassVar[bool] = True
    scope: ClassVar[Literal["partition", "tensor"]] = "tensor"

    rows: int = field(default=0, kw_only=True, metadata=STATE)
    basis: Basis | None = field(default=None, kw_only=True, compare=False, repr=False, metadata=STATE)

    def libraries(self) -> frozenset[str]:
        """Return the modules of `kernels` that it runs; see `Codec.libraries`."""
        return super().libraries() | {"lowrank", "orthonormal"}

    def check_level(self, level: float) -> None:
        """Raise `CodecError` unless `level` is a whole number from 1 to 64."""
        if not 1 <= level <= MOST or level != int(level):
            raise CodecError(f"powersgd: expected a level that is a whole number from 1 to {MOST} (a rank), got {level!r}")

    def fitted(self, rows: int) -> PowerSgd:
        """Return this codec for matrices of so many rows; 0 for those whose shape is not known."""
        return self if rows == self.rows else replace(self, rows=rows)

    def following(self, payload: Payload, coding: Coding) -> PowerSgd:
        """Return this codec as it goes on from the orthonormal factor of a payload, which is copied."""
        parts = apart(payload, coding)
        return replace(self, basis=Basis(parts.side, parts.basis.reshape(parts.rank, -1).copy()))

    def payload_bound(self, elements: int, level: float) -> int:
        """Return the payload's length in bytes; every payload has it."""
        rows, columns, rank = self._matrix(elements, level)
        return HEADER + 4 * rank * (rows + columns)

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
        v, peak = rest, SMALLEST
        if v is None:  # What is not finite may turn up in the last row, and must leave the residual as it was.
            v, peak = residual, int(kernels.vector.peak_of_sum(gradient, residual))
            if peak >= INFINITE:
                return None
        parts, encoded = self.begun(gradient.size, level, seed, out)
        if _ordinary(peak):
            peak = _stepped(gradient, residual, parts, v)
            if _ordinary(peak):
                return encoded
        with np.errstate(over="ignore", invalid="ignore"):
            np.add(gradient, residual, out=v)
        peak = int(kernels.vector.peak(v))
        if peak >= INFINITE:
            return None
        _project(v, peak, parts)
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
        """Encode at a server, both halves of an iteration at once; see `Codec.reencode`."""
        need_rest(self, new_residual, level)
        assert new_residual is not None
        peak = combined(total, scale, residual)
        if peak >= INFINITE:
            return None
        parts, encoded = self.begun(total.size, level, seed, out)
        np.copyto(new_residual, total)
        if peak >= SMALLEST:
            p = _tamed(total, peak)
            _multiply(p, parts)
            orthonormal(parts.product, parts.rank, seed)
            parts = turned(parts, out)
            _multiply(p, parts)
            _subtract(new_residual, parts)
        else:
            parts.product.fill(0.0)
        return encoded

    def validate(self, payload: Payload, coding: Coding) -> None:
        """Raise `PayloadError` unless the payload is two whole factors, one with elements up to 1, the other up to 2^120."""
        try:
            self.check_level(coding.level)
        except CodecError as error:
            raise PayloadError(str(error)) from None
        if payload.size < HEADER:
            raise PayloadError(f"powersgd: expected a header of {HEADER} bytes, got a payload of {payload.size}")
        rows, side = (int(word) for word in payload[:HEADER].view(np.uint32))
        if not rows or coding.elements % rows or (self.rows and rows != self.rows):
            expected = self.rows or f"a divisor of {coding.elements}"
            raise PayloadError(f"powersgd: expected {expected} rows, got {rows}")
        columns = coding.elements // rows
        count = min(int(coding.level), rows, columns) * (rows + columns)
        if coding.count != count or payload.size != HEADER + 4 * count:
            raise PayloadError(
                f"powersgd: expected {count} entries in {HEADER + 4 * count} bytes at level {coding.level!r} of {rows} x "
                f"{columns}, got {coding.count} entries in {payload.size} bytes"
            )
        if side not in (LEFT, RIGHT):
            raise PayloadError(f"powersgd: expected the left (0) or the right (1) factor to be orthonormal, got {side}")
        parts = apart(payload, coding)
        if kernels.vector.peak(parts.basis) > ONE_BITS or kernels.vector.peak(parts.product) > LIMIT:
            raise PayloadError("powersgd: expected an orthonormal factor of elements up to 1, and another of up to 2^120")

    def decode(self, payload: Payload, coding: Coding, out: FloatVector) -> None:
        """Write the product of both factors to `out`."""
        self.peek(payload, coding, 0, out)

    def peek(self, payload: Payload, coding: Coding, start: int, out: FloatVector) -> None:
        """Write a stretch of the product of both factors to `out`."""
        parts = apart(payload, coding)
        kernels.lowrank.expand(parts.left, parts.right, parts.rank, start, out)

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Add `weight` times the product of both factors to `total`."""
        parts = apart(payload, coding)
        kernels.lowrank.add(parts.left, parts.right, parts.rank, weight, total, _row(parts))

    def addable(self, payloads: Sequence[Payload], coding: Coding) -> bool:
        """Return whether all payloads have the same basis, to the bit."""
        bases = [apart(payload, coding) for payload in payloads]
        first = bases[0].basis.tobytes()
        return all(each.side == bases[0].side and each.basis.tobytes() == first for each in bases[1:])

    def sum_payloads(
        self, payloads: list[Payload], weights: list[np.float32], scale: np.float32, coding: Coding, out: Payload
    ) -> Encoded | None:
        """Add the factors that are not shared, and turn the basis; see `Codec.sum_payloads`."""
        out[:HEADER] = payloads[0][:HEADER]
        parts, first = apart(out[: payloads[0].size], coding), apart(payloads[0], coding)
        parts.product.fill(0.0)
        for weight, payload in zip(weights, payloads, strict=True):
            kernels.vector.add(weight, apart(payload, coding).product, parts.product)
        peak = kernels.vector.scaled(parts.product, scale)
        if peak > LIMIT:
            return None
        if peak:
            mixing = orthonormal(parts.product, parts.rank, coding.seed)
            kernels.orthonormal.mix(mixing.reshape(-1), parts.rank, first.basis, parts.basis)
            parts = turned(parts, out)
        else:
            np.copyto(parts.basis, first.basis)  # nothing was sent, and nothing says where else to look
        return None if kernels.vector.peak(parts.product) > LIMIT else Encoded(HEADER + 4 * coding.count, coding.count)

    def release(self, residual: FloatVector, coding: Coding, payload: Payload, new_residual: FloatVector) -> bool:
        """Add what a residual has along the orthonormal factor of a sum, and take that away from it; see `Codec.release`."""
        parts = apart(payload[: HEADER + 4 * coding.count], coding)
        np.copyto(new_residual, residual)
        peak = kernels.vector.peak(residual)
        if peak < SMALLEST:
            return True
        room = np.empty(parts.left.size + parts.right.size, np.float32)
        left, right = room[: parts.left.size], room[parts.left.size :]
        covered = Parts(parts.rank, parts.side, left, right)
        np.copyto(covered.basis, parts.basis)
        _multiply(_tamed(residual, peak), covered)
        _subtract(new_residual, covered)
        kernels.vector.add(np.float32(1.0), covered.product, parts.product)
        return int(kernels.vector.peak(parts.product)) <= LIMIT

    def _matrix(self, elements: int, level: float) -> tuple[int, int, int]:
        """Return rows, columns and rank of a vector."""
        self.check_level(level)
        rows = self.rows or nearly_square(elements)
        if elements % rows:
            raise CodecError(f"powersgd: expected a matrix of {rows} rows, got {elements} elements, which {rows} does not divide")
        columns = elements // rows
        return rows, columns, min(int(level), rows, columns)

    def begun(self, elements: int, level: float, seed: int, out: Payload) -> tuple[Parts, Encoded]:
        """Write header and basis of a payload to `out`, uint8[>= payload_bound(elements, level)]; return it taken apart."""
        rows, columns, rank = self._matrix(elements, level)
        side = RIGHT if self.basis is None else self.basis.side
        count = rank * (rows + columns)
        out[:HEADER].view(np.uint32)[:] = rows, side
        parts = apart(out[: HEADER + 4 * count], Coding(self.name, level, elements, count, seed))
        vectors = parts.basis.reshape(rank, -1)
        kept = 0 if self.basis is None else min(rank, len(self.basis.vectors))
        if self.basis is not None:
            if self.basis.vectors.shape[1] != vectors.shape[1]:
                raise CodecError(
                    f"powersgd: expected a basis of vectors of length {vectors.shape[1]}, got {self.basis.vectors.shape[1]}"
                )
            vectors[:kept] = self.basis.vectors[:kept]
        if kept < rank:
            vectors[kept:] = 0.0
            orthonormal(parts.basis, rank, seed)
        return parts, Encoded(HEADER + 4 * count, count)


def _ordinary(peak: int) -> bool:
    return SMALLEST <= peak < (127 + LARGEST) << 23


def _row(parts: Parts) -> FloatVector:
    return borrow("row", parts.right.size // parts.rank, np.float32)


def _stepped(gradient: FloatVector, residual: FloatVector, parts: Parts, rest: FloatVector) -> int:
    """Do all of an ordinary encoding; return the peak that tells whether it was one."""
    given, lowrank = (gradient, residual, parts.basis, parts.rank), kernels.lowrank
    columns = parts.right.size // parts.rank
    past = rest is not residual and goes_past(rest.size) and columns % lowrank.LINE == 0
    if parts.side == RIGHT:
        past = past and columns <= lowrank.WIDE
        lanes, made = borrow("lanes", lowrank.LANES, np.float32), borrow("made", 4 * columns if past else 0, np.float32)
        return int(lowrank.step_across(*given, parts.left, rest, past, lanes, _row(parts), made))
    made = borrow("made", 4 * lowrank.BLOCK if past else 0, np.float32)
    peak = int(lowrank.step_down(*given, parts.right, rest, past, made))
    if _ordinary(peak):
        _subtract(rest, parts)
    return peak


def _project(v: FloatVector, peak: int, parts: Parts) -> None:
    """Write what `v` has along the basis, and take that away from it."""
    if peak < SMALLEST:
        parts.product.fill(0.0)
        return
    _multiply(_tamed(v, peak), parts)
    _subtract(v, parts)


def _tamed(v: FloatVector, peak: int) -> FloatVector:
    """Return `v`, or a copy that is shorter by a power of two, of which products are finite."""
    if _ordinary(peak):
        return v
    shorter = borrow("v", v.size, np.float32)
    kernels.vector.scaled_into(v, np.float32(2.0 ** (LARGEST - 1 - ((peak >> 23) - 127))), shorter)
    return shorter


def _multiply(v: FloatVector, parts: Parts) -> None:
    """Write the product of `v` with the basis."""
    if parts.side == RIGHT:
        kernels.lowrank.across(v, parts.basis, parts.rank, parts.left, borrow("lanes", kernels.lowrank.LANES, np.float32))
    else:
        kernels.lowrank.down(v, parts.basis, parts.rank, parts.right)


def _subtract(v: FloatVector, parts: Parts) -> None:
    kernels.lowrank.subtract(v, parts.left, parts.right, parts.rank, _row(parts))

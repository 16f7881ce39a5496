"""quic_fl: all members rotate alike and round at random, so that servers add rotated codes (Ben Basat et al., arXiv 2205.13341).

    y = H S v / R,  S random signs, H the Hadamard transform of R rows      the same S at all members of a round
    size = max |y| of a column        c = one of the two levels next to y / size, at random, y / size in the mean
    D(v) = S H (size * c)             server: C(mean of size * c), without any transform

D is v in the mean over seeds, so nothing is kept, at workers or servers; `eden` is the counterpart that keeps what it loses.
A rotation makes normal numbers of anything, so the error does not depend on what gradients look like: with levels

    k / (2 M - |k|),  M = 2^bits - 1,  k = -M, 2 - M, ..., M

which lie closer where normal numbers are more frequent, 0.68, 0.023 and 0.000079 of the energy with 2, 4 and 8 bits; evenly
spaced they would lose half as much again. A transform is linear, so sums may be made before it is undone: a server multiplies
levels by sizes, adds, and rounds again, where `eden` must undo every member's own rotation and do one of its own.

The paper sends rotated elements beyond a bound exactly, apart from the others, and gets by with fewer bits by tables that clients
and servers draw alike. Here the bound is the largest element: nothing lies beyond it, so every payload of a level has one length,
and D is v in the mean for every vector and every rotation. It costs a size a column, and there is no level of one bit.
`docs/decisions/0026-what-servers-add-undecoded.md` has the evidence.

*Seeds.* Signs follow from the upper half of a worker's seed, which all members share (`Codec.shared_half`), rounding from all of
it, the worker's own. The payload has the seed of the signs, so a receiver needs no other; a server whose members differ, or
that has a residual, decodes and encodes anew.

The payload is that of `rotated.py`; its sizes are 0, or from 2^-126 to 2^117. A column in which |y| reaches 2^117 is not
sent. A size is 2^-126 at least, so that the mean of denormal numbers is right, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from . import kernels
from .base import Changes, Coding, Encoded, FloatVector, Hint, Payload, Refolded
from .noise import noise_key
from .packing import INFINITE, ONE
from .rotated import TILE, WIDTH, Parts, RotatedCodec, parts_of, rows_of, tiles_of
from .workspace import borrow

__all__ = ["QuicFL", "seed_of_signs"]

BLOCK: Final = 2 * TILE
"""Elements that go through all steps before the next: half of a second-level cache of 256 KiB."""


@dataclass(frozen=True)
class QuicFL(RotatedCodec):
    """Codes under a rotation that all members share. Level: bits an element, 8, 4 or 2."""

    name: ClassVar[str] = "quic_fl"
    widths: ClassVar[tuple[int, ...]] = (8, 4, 2)
    log_largest: ClassVar[int] = 117
    shared_half: ClassVar[bool] = True

    def libraries(self) -> frozenset[str]:
        """Return the modules of `kernels` that it runs; see `Codec.libraries`."""
        return super().libraries() | {"quic_fl"}

    def keeps(self, level: float) -> bool:
        """Return False: what is lost is zero in the mean."""
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
        """Rotate and round at random; nothing is kept. See `OnePassCodec.fuse`."""
        n, signs = a.size, seed_of_signs(seed)
        parts = self.begin_payload(signs, n, level, out)
        work = borrow("tile", TILE + WIDTH, np.float32)
        for start, piece in _blocks(parts, int(level), n):
            span, rotated = slice(start, start + BLOCK), _rotated(n)
            if kernels.quic_fl.rotate(a[span], scale, b[span], start, *noise_key(signs), work, rotated) >= INFINITE:
                return None
            _quantise(rotated, ONE, n - start, start, int(level), seed, piece)
        if rest is not None:
            kernels.vector.clear(rest)
        return Encoded(self.payload_bound(n, level), n)

    def add_tiles(self, parts: Parts, width: int, first: int, weight: np.float32, fresh: int, total: FloatVector) -> None:
        """Rotate back what the codes stand for, and add it; see `RotatedCodec.add_tiles`."""
        n, key = total.size, noise_key(parts.seed)
        for start, piece in _blocks(parts, width, n):
            rotated = _rotated(n)
            _collect(piece, n - start, width, ONE, 1, rotated)
            ones = borrow("tile", WIDTH, np.float32)
            kernels.quic_fl.restore(rotated, first + start, *key, weight, fresh, ones, total[start : start + BLOCK])

    def fold(
        self,
        payloads: Sequence[Payload],
        codings: Sequence[Coding],
        weights: Sequence[np.float32],
        scale: np.float32,
        residual: FloatVector | None,
        new_residual: FloatVector | None,
        *,
        level: float,
        seed: int,
        out: Payload,
        scratch: FloatVector,
        hint: Hint | None = None,
        changes: Changes | None = None,
    ) -> Refolded | None:
        """Sum rotated codes, and round the sum: `C(y)` with `y := (0 + (weight * size) * c + ...) * scale`; see `Codec.fold`.

        In the order of the members, each operation rounded by itself. Where their rotations differ, or there is a residual that
        is not zero, all is decoded.
        """
        n = codings[0].elements
        members = [
            (parts_of(payload, coding.elements), int(coding.level), weight)
            for payload, coding, weight in zip(payloads, codings, weights, strict=True)
        ]
        signs = {parts.seed for parts, _, _ in members}
        if len(signs) > 1 or (residual is not None and kernels.vector.peak(residual)):
            return super().fold(
                payloads, codings, weights, scale, residual, new_residual,
                level=level, seed=seed, out=out, scratch=scratch, hint=hint, changes=changes,
            )  # fmt: skip
        answer = self.begin_payload(signs.pop(), n, level, out)
        pieces = [_blocks(parts, width, n) for parts, width, _ in members]
        for start, piece in _blocks(answer, int(level), n):
            rotated, fresh = _rotated(n), 1
            for theirs, (_, width, weight) in zip(pieces, members, strict=True):
                _collect(next(theirs)[1], n - start, width, weight, fresh, rotated)
                fresh = 0
            if _quantise(rotated, scale, n - start, start, int(level), seed, piece) >= INFINITE:
                return None
        if new_residual is not None:
            kernels.vector.clear(new_residual)
        return Refolded(Encoded(self.payload_bound(n, level), n), None)

    def rounding(self, payload: Payload, coding: Coding, start: int, vector: FloatVector) -> NDArray[np.float64]:
        """Return how far the roundings of a column may move one of its elements; of columns that are not sent, clip all.

        An element of D - v is a sum, with signs, of what each code of its column was rounded by, independent of each other. So it
        is no longer than the sum of their steps, and above four times the root of the sum of their squares in 2 exp(-32) of all
        cases, by Hoeffding's inequality.
        """
        first, (_, sizes, codes) = tiles_of(payload, coding, start, vector.size)
        width, n = int(coding.level), coding.elements - first
        most = float((1 << width) - 1)
        spans = [np.empty(0)]
        for place, row in enumerate(sizes.reshape(-1, WIDTH)):
            left = min(n - place * TILE, TILE)
            rotated = _rotated(left)
            piece = Parts(0, np.ones(WIDTH, np.float32), codes[place * TILE * width // 8 :])
            _collect(piece, left, width, ONE, 1, rotated)
            levels = np.abs(_columns(rotated, left).astype(np.float64))
            k = np.minimum(np.rint(2 * most * levels / (1 + levels)), most - 2)
            steps = (k + 2) / (2 * most - k - 2) - k / (2 * most - k)
            reach = np.minimum(steps.sum(0), 4 * np.sqrt(np.square(steps).sum(0))) * row
            spans.append(np.tile(reach, -(-left // WIDTH))[:left])
        distance = np.concatenate(spans)[start - first :][: vector.size]
        vector[distance == 0.0] = 0.0
        return distance


def seed_of_signs(seed: int) -> int:
    """Return the seed of a member's signs: the half of its own that all share."""
    return seed >> 32 << 32


def _rotated(elements: int) -> FloatVector:
    """Return the thread's scratch for the rotated tiles of a block, of so many elements at most."""
    return borrow("rotated", kernels.hadamard.ROOM * min(BLOCK // TILE, -(-elements // TILE)), np.float32)


def _blocks(parts: Parts, width: int, elements: int) -> Iterator[tuple[int, Parts]]:
    """Return where each block begins, and its parts."""
    for start in range(0, elements, BLOCK):
        sizes, at = parts.sizes[start // TILE * WIDTH :][: BLOCK // TILE * WIDTH], start * width // 8
        yield start, Parts(parts.seed, sizes, parts.codes[at : at + BLOCK * width // 8])


def _collect(piece: Parts, elements: int, width: int, weight: np.float32, fresh: int, rotated: FloatVector) -> None:
    work = borrow("factors", kernels.hadamard.GROUP, np.float32)
    kernels.quic_fl.collect(piece.codes, piece.sizes, elements, width, weight, fresh, work, rotated)


def _quantise(
    rotated: FloatVector, scale: np.float32, elements: int, start: int, width: int, seed: int, piece: Parts
) -> int:  # fmt: skip
    """Write sizes and codes of a block; return the bits of the largest magnitude."""
    group = kernels.hadamard.GROUP
    tops, inverse, wide = borrow("tops", group, np.int32), borrow("factors", group, np.float32), borrow("wide", group, np.uint8)
    low, high = noise_key(seed)
    return int(
        kernels.quic_fl.quantise(rotated, scale, elements, start, width, low, high, piece.sizes, piece.codes, tops, inverse, wide)
    )


def _columns(rotated: FloatVector, elements: int) -> FloatVector:
    """Return a rotated tile as rows of 16, float32[R, 16]."""
    groups = rotated[: kernels.hadamard.ROOM].reshape(-1, kernels.hadamard.PITCH)[:, : kernels.hadamard.GROUP]
    return groups.reshape(-1, WIDTH)[: rows_of(elements)]

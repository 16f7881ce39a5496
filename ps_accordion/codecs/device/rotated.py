"""What rotating codecs share on a device; `codecs/rotated.py` says what they share.

Rotations are additions in the order of the host, one operation a stage, and not a product with a matrix, whose order of additions
is the library's own. So a rotated vector has the host's bits.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch

from ..base import Coding, Payload
from ..kernels.hadamard import GROUP
from ..rotated import PREAMBLE, TILE, WIDTH, RotatedCodec, parts_of, rows_of
from .base import DeviceCodec
from .noise import hashed, key_of, signed
from .signs import unpacked

__all__ = ["RotatedTwin", "transformed"]


class RotatedTwin(DeviceCodec):
    """A codec of rotated columns."""

    codec: RotatedCodec
    recordable: ClassVar[bool] = True

    @abstractmethod
    def quantise(
        self, tiles: torch.Tensor, turns: torch.Tensor, first: int, width: int, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return codes, uint8 like `tiles`, sizes, float32[tiles, 16], and what is to be kept, float32 like `tiles`.

        Args:
            tiles: float32[tiles, rows, 16], zeros behind the vector.
            turns: Where signs turn, bool like `tiles`.
            first: Number of the first element in the vector.
            width: Bits of a code.
            noise: What noise is made with: int32[2], as `noise.key_of` returns it for the seed.
        """

    @abstractmethod
    def values(self, codes: torch.Tensor, sizes: torch.Tensor, turns: torch.Tensor, width: int) -> torch.Tensor:
        """Return what codes of tiles stand for, rotated back; all are as in `quantise`."""

    def seed_of_signs(self, seed: int) -> int:
        """Return the seed of the signs that a member with this seed has."""
        return seed

    def words(self, seed: int, *, elements: int, level: float) -> tuple[int, ...]:
        """Return the seed of the signs, lower half first, and what signs and noise are made with; see `DeviceCodec.words`."""
        key = self.seed_of_signs(seed)
        return signed(key & 0xFFFFFFFF), signed(key >> 32), *key_of(key), *key_of(seed)

    def pack(
        self, v: torch.Tensor, peak: torch.Tensor, payload: torch.Tensor, *, level: float, seed: int, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Write sizes and codes of `v`; see `DeviceCodec.pack`."""
        n, width, signs, noise = v.numel(), int(level), words[2:4], words[4:]
        payload[:PREAMBLE].view(torch.int32).copy_(words[:2])
        sizes_at, codes_at = PREAMBLE, PREAMBLE + 4 * WIDTH * -(-n // TILE)
        rests = []
        for first, tiles, rows, length in _spans(n):
            padded = torch.nn.functional.pad(v[first : first + length], (0, WIDTH * tiles * rows - length)).view(
                tiles, rows, WIDTH
            )
            codes, sizes, rest = self.quantise(padded, _signs(padded, first, signs), first, width, noise)
            payload[sizes_at : sizes_at + 4 * sizes.numel()].view(torch.float32).copy_(sizes.view(-1))
            packed = _packed(codes.view(-1, min(GROUP, WIDTH * rows)), width)
            payload[codes_at : codes_at + packed.numel()].copy_(packed.view(-1))
            sizes_at, codes_at = sizes_at + 4 * sizes.numel(), codes_at + packed.numel()
            rests.append(rest.view(-1)[:length])
        return torch.cat(rests) if len(rests) > 1 else rests[0], n

    def decode(self, payload: Payload, uploaded: torch.Tensor, coding: Coding, out: torch.Tensor) -> None:
        """Write what the codes stand for, rotated back, to `out`."""
        out.copy_(self._vector(payload, uploaded, coding)).add_(0.0)

    def accumulate(
        self, payload: Payload, uploaded: torch.Tensor, coding: Coding, weight: np.float32, total: torch.Tensor
    ) -> None:
        """Add `weight` times what the codes stand for to `total`."""
        total.add_(self._vector(payload, uploaded, coding) * float(weight))

    def _vector(self, payload: Payload, uploaded: torch.Tensor, coding: Coding) -> torch.Tensor:
        n, width = coding.elements, int(coding.level)
        parts = parts_of(payload, n)
        codes_at = PREAMBLE + 4 * parts.sizes.size
        sizes, packed = uploaded[PREAMBLE:codes_at].view(torch.float32), uploaded[codes_at:]
        pieces = []
        for first, tiles, rows, length in _spans(n):
            groups, each = WIDTH * tiles * rows // min(GROUP, WIDTH * rows), min(GROUP, WIDTH * rows)
            at = 2 * rows_of(first) * width
            codes = _unpacked(packed[at : at + groups * each * width // 8].view(groups, -1), width).view(tiles, rows, WIDTH)
            here = sizes[first // TILE * WIDTH :][: tiles * WIDTH].view(tiles, WIDTH)
            pieces.append(self.values(codes, here, _signs(codes, first, key_of(parts.seed)), width).view(-1)[:length])
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _spans(n: int) -> list[tuple[int, int, int, int]]:
    """Return (first element, tiles, rows of each, elements) of all whole tiles, and of what is left."""
    whole = n // TILE
    left = n - whole * TILE
    whole_ones = [(0, whole, TILE // WIDTH, whole * TILE)] if whole else []
    return whole_ones + ([(whole * TILE, 1, rows_of(left), left)] if left else [])


def _signs(tiles: torch.Tensor, first: int, key: tuple[int, int] | torch.Tensor) -> torch.Tensor:
    """Return where signs turn, bool like `tiles`; `first` is the number of their first element."""
    elements = tiles.numel()
    words = torch.arange(first // 32, first // 32 + -(-elements // 32), dtype=torch.int32, device=tiles.device)
    return unpacked(hashed(words, key), elements).view_as(tiles)


def transformed(y: torch.Tensor) -> torch.Tensor:
    """Return the Hadamard transform of each column, float32[tiles, rows, 16]."""
    tiles, rows, _ = y.shape
    half = rows // 2
    while half:
        pairs = y.reshape(tiles, rows // (2 * half), 2, half * WIDTH)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack((low + high, low - high), 2)
        half //= 2
    return y.reshape(tiles, rows, WIDTH)


def _packed(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Return codes, uint8[groups, m], with `8 / width` in a byte; of 3 bits, the lower two and then the highest."""
    if width == 3:
        return torch.cat((_packed(codes & 3, 2), _packed(codes >> 2, 1)), 1)
    parts = codes.view(codes.shape[0], 8 // width, -1)
    packed = parts[:, 0]
    for i in range(1, 8 // width):
        packed = packed | (parts[:, i] << (width * i))
    return packed


def _unpacked(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Return codes from bytes, uint8[groups, bytes]."""
    if width == 3:
        middle = packed.shape[1] * 2 // 3
        return _unpacked(packed[:, :middle], 2) | (_unpacked(packed[:, middle:], 1) << 2)
    return torch.cat([(packed >> (width * i)) & ((1 << width) - 1) for i in range(8 // width)], 1)

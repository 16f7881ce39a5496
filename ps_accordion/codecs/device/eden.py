"""eden on a device; `codecs/eden.py` says what it is.

Rotations are additions in the order of the host, one operation a stage, and not a product with a matrix, whose order of additions
is the library's own. So payload and residual have the host's bits.
"""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np
import torch

from ..base import Coding, Payload
from ..eden import PREAMBLE, TILE, WIDTH, Eden, parts_of, rows_of
from ..kernels.eden import LARGEST, LEVELS, MEAN, STEEPEST, THRESHOLDS, TOO_LARGE
from ..kernels.hadamard import GROUP
from .base import DeviceCodec, upload
from .noise import hashed
from .signs import unpacked

__all__ = ["EdenTwin"]

_LANES: Final = 1024
_MAGNITUDE: Final = 0x7FFFFFFF


class EdenTwin(DeviceCodec):
    """Rotated codes."""

    name: ClassVar[str] = "eden"
    codec: Eden

    def pack(
        self, v: torch.Tensor, peak: torch.Tensor, payload: torch.Tensor, *, level: float, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Write sizes and codes of `v`; see `DeviceCodec.pack`."""
        n, width = v.numel(), int(level)
        lower, upper = (word - (1 << 32) if word >> 31 else word for word in (seed & 0xFFFFFFFF, seed >> 32))
        payload[:4].view(torch.int32).fill_(lower)
        payload[4:PREAMBLE].view(torch.int32).fill_(upper)
        sizes_at, codes_at = PREAMBLE, PREAMBLE + 4 * WIDTH * -(-n // TILE)
        rests = []
        for first, tiles, rows, length in _spans(n):
            part = v[first : first + length]
            padded = torch.nn.functional.pad(part, (0, WIDTH * tiles * rows - length)).view(tiles, rows, WIDTH)
            signs = _signs(padded, first, seed)
            top = (padded.view(torch.int32) & _MAGNITUDE).view(tiles, -1).amax(1)
            exponent = (top >> 23).clamp_(1, TOO_LARGE)
            turned = torch.where(signs, padded.neg(), padded) * ((254 - exponent) << 23).view(torch.float32)[:, None, None]
            codes, numbers, sizes = _quantised(_transformed(turned), width, (exponent << 23).view(torch.float32))
            sizes.masked_fill_((exponent >= TOO_LARGE)[:, None], 0.0)
            payload[sizes_at : sizes_at + 4 * sizes.numel()].view(torch.float32).copy_(sizes.view(-1))
            packed = _packed(codes.view(-1, min(GROUP, WIDTH * rows)), width)
            payload[codes_at : codes_at + packed.numel()].copy_(packed.view(-1))
            sizes_at, codes_at = sizes_at + 4 * sizes.numel(), codes_at + packed.numel()
            rests.append(part - _back(numbers, signs, sizes).view(-1)[:length])
        return torch.cat(rests) if len(rests) > 1 else rests[0], n

    def decode(self, payload: Payload, coding: Coding, out: torch.Tensor) -> None:
        """Write what the codes stand for, rotated back, to `out`."""
        out.copy_(self._vector(payload, coding, out.device)).add_(0.0)

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: torch.Tensor) -> None:
        """Add `weight` times what the codes stand for to `total`."""
        total.add_(self._vector(payload, coding, total.device) * float(weight))

    @staticmethod
    def _vector(payload: Payload, coding: Coding, device: torch.device) -> torch.Tensor:
        n, width = coding.elements, int(coding.level)
        parts, uploaded = parts_of(payload, n), upload(payload, device)
        codes_at = PREAMBLE + 4 * parts.sizes.size
        sizes, codes = uploaded[PREAMBLE:codes_at].view(torch.float32), uploaded[codes_at:]
        pieces = []
        for first, tiles, rows, length in _spans(n):
            groups, each = WIDTH * tiles * rows // min(GROUP, WIDTH * rows), min(GROUP, WIDTH * rows)
            at = 2 * rows_of(first) * width
            wide = _unpacked(codes[at : at + groups * each * width // 8].view(groups, -1), width)
            level = _level((wide & ((1 << (width - 1)) - 1)).to(torch.int32), width)
            numbers = torch.where(wide >> (width - 1) != 0, level.neg(), level).view(tiles, rows, WIDTH)
            here = sizes[first // TILE * WIDTH :][: tiles * WIDTH].view(tiles, WIDTH)
            pieces.append(_back(numbers, _signs(numbers, first, parts.seed), here).view(-1)[:length])
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _spans(n: int) -> list[tuple[int, int, int, int]]:
    """Return (first element, tiles, rows of each, elements) of all whole tiles, and of what is left."""
    whole = n // TILE
    left = n - whole * TILE
    spans = [(0, whole, TILE // WIDTH, whole * TILE)] if whole else []
    return spans + ([(whole * TILE, 1, rows_of(left), left)] if left else [])


def _signs(tiles: torch.Tensor, first: int, seed: int) -> torch.Tensor:
    """Return where signs turn, bool like `tiles`; `first` is the number of their first element."""
    elements = tiles.numel()
    words = torch.arange(first // 32, first // 32 + -(-elements // 32), dtype=torch.int32, device=tiles.device)
    return unpacked(hashed(words, seed), elements).view_as(tiles)


def _transformed(y: torch.Tensor) -> torch.Tensor:
    """Return the Hadamard transform of each column, float32[tiles, rows, 16]."""
    tiles, rows, _ = y.shape
    half = rows // 2
    while half:
        pairs = y.reshape(tiles, rows // (2 * half), 2, half * WIDTH)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack((low + high, low - high), 2)
        half //= 2
    return y.reshape(tiles, rows, WIDTH)


def _columns(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of each column, float32[tiles, 16], in the order of `kernels/eden.py`."""
    tiles = x.shape[0]
    elements = x.numel() // tiles
    rows = x.reshape(tiles, -1, min(_LANES, elements))
    lanes = rows[:, 0].clone()
    for i in range(1, rows.shape[1]):
        lanes += rows[:, i]
    while lanes.shape[1] > WIDTH:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes


def _quantised(y: torch.Tensor, width: int, back: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes (uint8) and what they stand for, both like `y`, and float32[tiles, 16] of sizes."""
    magnitude, share = y.abs(), 1.0 / y.shape[1]
    inverse = torch.div(MEAN, _columns(magnitude) * share).clamp_(max=STEEPEST)
    z = magnitude * inverse[:, None]
    number = torch.zeros_like(y, dtype=torch.int32)
    for threshold in THRESHOLDS[width]:
        number += z >= threshold
    level = _level(number, width)
    sizes = (torch.div(_columns(level * magnitude), _columns(level * level)) * share * back[:, None]).clamp_(max=LARGEST)
    negative = y.view(torch.int32) < 0
    codes = (number | (negative.to(torch.int32) << (width - 1))).to(torch.uint8)
    return codes, torch.where(negative, level.neg(), level), sizes


def _level(number: torch.Tensor, width: int) -> torch.Tensor:
    """Return the magnitudes that have these numbers."""
    level = torch.full_like(number, LEVELS[width][0], dtype=torch.float32)
    for i, each in enumerate(LEVELS[width][1:], 1):
        level.masked_fill_(number == i, each)
    return level


def _back(numbers: torch.Tensor, signs: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return what numbers stand for, rotated back."""
    y = _transformed(numbers)
    return torch.where(signs, y.neg(), y) * sizes[:, None]


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

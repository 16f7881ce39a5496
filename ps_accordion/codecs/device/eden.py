"""eden on a device; `codecs/eden.py` says what it is."""

from __future__ import annotations

from typing import ClassVar, Final

import torch

from ..eden import Eden
from ..kernels.eden import LARGEST, LEVELS, MEAN, STEEPEST, THRESHOLDS, TOO_LARGE
from ..rotated import WIDTH
from .rotated import RotatedTwin, transformed

__all__ = ["EdenTwin"]

_LANES: Final = 1024
_MAGNITUDE: Final = 0x7FFFFFFF


class EdenTwin(RotatedTwin):
    """Rotated codes."""

    name: ClassVar[str] = "eden"
    codec: Eden

    def quantise(
        self, tiles: torch.Tensor, turns: torch.Tensor, first: int, width: int, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the nearest levels; see `RotatedTwin.quantise`."""
        top = (tiles.view(torch.int32) & _MAGNITUDE).view(len(tiles), -1).amax(1)
        exponent = (top >> 23).clamp_(1, TOO_LARGE)
        turned = torch.where(turns, tiles.neg(), tiles) * ((254 - exponent) << 23).view(torch.float32)[:, None, None]
        codes, numbers, sizes = _quantised(transformed(turned), width, (exponent << 23).view(torch.float32))
        sizes.masked_fill_((exponent >= TOO_LARGE)[:, None], 0.0)
        return codes, sizes, tiles - _back(numbers, turns, sizes)

    def values(self, codes: torch.Tensor, sizes: torch.Tensor, turns: torch.Tensor, width: int) -> torch.Tensor:
        """Return the levels, rotated back; see `RotatedTwin.values`."""
        level = _level((codes & ((1 << (width - 1)) - 1)).to(torch.int32), width)
        return _back(torch.where(codes >> (width - 1) != 0, level.neg(), level), turns, sizes)


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
    y = transformed(numbers)
    return torch.where(signs, y.neg(), y) * sizes[:, None]

"""quic_fl on a device; `codecs/quic_fl.py` says what it is, `codecs/kernels/quic_fl.py` how it rounds."""

from __future__ import annotations

from typing import ClassVar, Final

import torch

from ..kernels.hadamard import GROUP
from ..kernels.quic_fl import LARGEST, SMALLEST
from ..quic_fl import QuicFL, seed_of_signs
from ..rotated import WIDTH
from .noise import hashed
from .rotated import RotatedTwin, transformed

__all__ = ["QuicFLTwin"]

_MAGNITUDE: Final = 0x7FFFFFFF
_UNIFORM: Final = 0x7FFF


class QuicFLTwin(RotatedTwin):
    """Codes under a rotation that all members share."""

    name: ClassVar[str] = "quic_fl"
    codec: QuicFL

    def seed_of_signs(self, seed: int) -> int:
        """Return the half that all members share."""
        return seed_of_signs(seed)

    def quantise(
        self, tiles: torch.Tensor, turns: torch.Tensor, first: int, width: int, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Round at random, and keep nothing; see `RotatedTwin.quantise`."""
        count, rows, _ = tiles.shape
        y = transformed(torch.where(turns, tiles.neg(), tiles) * (1.0 / rows))
        top = (y.view(torch.int32) & _MAGNITUDE).amax(1).view(torch.float32)
        sizes = top.clamp(min=SMALLEST)
        nothing = (top == 0.0) | ~(top < LARGEST)
        inverse = torch.div(torch.ones_like(sizes), sizes).masked_fill_(nothing, 0.0)
        sizes.masked_fill_(nothing, 0.0)
        size = min(GROUP, WIDTH * rows)
        places = torch.arange(first, first + tiles.numel(), dtype=torch.int32, device=tiles.device).view(-1, size)
        word = hashed(places[:, : size // 2], noise)
        uniform = torch.cat(((word >> 17) & _UNIFORM, word & _UNIFORM), 1).view(count, rows, WIDTH)
        return _codes(y * inverse[:, None], uniform, float((1 << width) - 1)), sizes, torch.zeros_like(tiles)

    def values(self, codes: torch.Tensor, sizes: torch.Tensor, turns: torch.Tensor, width: int) -> torch.Tensor:
        """Return levels times sizes, rotated back; see `RotatedTwin.values`."""
        most = float((1 << width) - 1)
        y = transformed(_level(codes.to(torch.float32) * 2.0 - most, most) * sizes[:, None] + 0.0)
        return torch.where(turns, y.neg(), y)


def _level(k: torch.Tensor, most: float) -> torch.Tensor:
    """Return what odd numbers from `-most` to `most` stand for."""
    return torch.div(k, 2.0 * most - k.abs())


def _codes(z: torch.Tensor, noise: torch.Tensor, most: float) -> torch.Tensor:
    """Return codes of `z`, uint8 like it, rounded by a noise of 15 bits."""
    place = torch.div(z, z.abs() + 1.0) * most + most * 0.5
    # What is not finite becomes any code: it is not sent.
    lower = torch.nan_to_num(place.clamp(0.0, most - 1.0)).to(torch.int32).to(torch.float32)
    k = lower * 2.0 - most
    below, above = _level(k, most), _level(k + 2.0, most)
    up = z - below > (noise.to(torch.float32) + 0.5) * 2.0**-15 * (above - below)
    return (lower + up).to(torch.uint8)

"""Bits of words on a device, the first in the lowest bit."""

from __future__ import annotations

import torch

__all__ = ["packed", "unpacked"]


def packed(bits: torch.Tensor) -> torch.Tensor:
    """Return bool[n] as int32[ceil(n / 32)]; what is beyond n is 0."""
    n = bits.numel()
    rows = torch.zeros(-(-n // 32), 32, dtype=torch.int32, device=bits.device)
    rows.view(-1)[:n].copy_(bits)
    return (rows << _places(bits.device)).sum(1, dtype=torch.int32)


def unpacked(words: torch.Tensor, n: int) -> torch.Tensor:
    """Return bool[n] of int32[ceil(n / 32)]."""
    return ((words[:, None] >> _places(words.device)) & 1).view(-1)[:n] != 0


def _places(device: torch.device) -> torch.Tensor:
    return torch.arange(32, dtype=torch.int32, device=device)

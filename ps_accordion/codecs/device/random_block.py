"""random_block on a device; `codecs/random_block.py` says what it is. The host says where the block begins."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from ..base import Coding, Payload
from ..random_block import parts, start_of
from .base import DeviceCodec

__all__ = ["RandomBlockTwin"]


class RandomBlockTwin(DeviceCodec):
    """One shared random block."""

    name: ClassVar[str] = "random_block"
    recordable: ClassVar[bool] = True

    def words(self, seed: int, *, elements: int, level: float) -> tuple[int, ...]:
        """Return where the block begins; see `DeviceCodec.words`."""
        return (start_of(elements, seed),)

    def pack(
        self, v: torch.Tensor, peak: torch.Tensor, payload: torch.Tensor, *, level: float, seed: int, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Write the block of `v` that `seed` names; see `DeviceCodec.pack`."""
        block = payload.view(torch.float32)
        covered = (torch.arange(block.numel(), device=v.device) + words[0]) % v.numel()
        block.copy_(v.index_select(0, covered))
        return v.index_fill(0, covered, 0.0), block.numel()

    def decode(self, payload: Payload, uploaded: torch.Tensor, coding: Coding, out: torch.Tensor) -> None:
        """Write the block to its place in `out`, and zero elsewhere."""
        block = uploaded.view(torch.float32)
        out.zero_()
        for part, covered in parts(coding.elements, coding.count, coding.seed):
            out[covered].copy_(block[part])

    def accumulate(
        self, payload: Payload, uploaded: torch.Tensor, coding: Coding, weight: np.float32, total: torch.Tensor
    ) -> None:
        """Add `weight` times the block at its place in `total`."""
        block = uploaded.view(torch.float32) * float(weight)
        for part, covered in parts(coding.elements, coding.count, coding.seed):
            total[covered].add_(block[part])

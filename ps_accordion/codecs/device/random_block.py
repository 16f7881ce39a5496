"""random_block on a device; `codecs/random_block.py` says what it is. The place follows from the seed, which the host knows."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from ..base import Coding, Payload
from ..random_block import parts
from .base import DeviceCodec, upload

__all__ = ["RandomBlockTwin"]


class RandomBlockTwin(DeviceCodec):
    """One shared random block."""

    name: ClassVar[str] = "random_block"

    def pack(
        self, v: torch.Tensor, peak: torch.Tensor, payload: torch.Tensor, *, level: float, seed: int, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Write the block of `v` that `seed` names; see `DeviceCodec.pack`."""
        block, rest = payload.view(torch.float32), v.clone()
        for part, covered in parts(v.numel(), block.numel(), seed):
            block[part].copy_(v[covered])
            rest[covered].zero_()
        return rest, block.numel()

    def decode(self, payload: Payload, coding: Coding, out: torch.Tensor) -> None:
        """Write the block to its place in `out`, and zero elsewhere."""
        block = upload(payload, out.device).view(torch.float32)
        out.zero_()
        for part, covered in parts(coding.elements, coding.count, coding.seed):
            out[covered].copy_(block[part])

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: torch.Tensor) -> None:
        """Add `weight` times the block at its place in `total`."""
        block = upload(payload, total.device).view(torch.float32) * float(weight)
        for part, covered in parts(coding.elements, coding.count, coding.seed):
            total[covered].add_(block[part])

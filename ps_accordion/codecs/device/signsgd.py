"""signsgd on a device; `codecs/signsgd.py` says what it is."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from ..base import Coding, Payload
from .base import DeviceCodec, upload
from .noise import hashed, key_of
from .signs import packed, unpacked

__all__ = ["SignSGDTwin"]


class SignSGDTwin(DeviceCodec):
    """A vote an element."""

    name: ClassVar[str] = "signsgd"
    recordable: ClassVar[bool] = True

    def words(self, seed: int) -> tuple[int, ...]:
        """Return what coins are thrown with; see `DeviceCodec.words`."""
        return key_of(seed)

    def pack(
        self, v: torch.Tensor, peak: torch.Tensor, payload: torch.Tensor, *, level: float, seed: int, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Write signs, and coins for zeros; see `DeviceCodec.pack`."""
        n = v.numel()
        coins = hashed(torch.arange(-(-n // 32), dtype=torch.int32, device=v.device), words)
        payload.view(torch.int32).copy_(packed((v < 0) | ((v == 0) & unpacked(coins, n))))
        return torch.zeros_like(v), n

    def decode(self, payload: Payload, coding: Coding, out: torch.Tensor) -> None:
        """Write `-level` or `level` to each element of `out`."""
        out.copy_(self._signed(payload, coding, out.device))

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: torch.Tensor) -> None:
        """Add `-weight * level` or `weight * level` to each element of `total`."""
        total.add_(self._signed(payload, coding, total.device) * float(weight))

    @staticmethod
    def _signed(payload: Payload, coding: Coding, device: torch.device) -> torch.Tensor:
        size = torch.full((), coding.level, dtype=torch.float32, device=device)
        return torch.where(unpacked(upload(payload, device).view(torch.int32), coding.elements), -size, size)

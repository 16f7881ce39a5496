"""signsgd on a device; `codecs/signsgd.py` says what it is."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

import numpy as np
import torch

from ..base import Coding, Payload
from .base import DeviceCodec
from .noise import hashed, key_of
from .signs import packed, unpacked

__all__ = ["SignSGDTwin"]


class SignSGDTwin(DeviceCodec):
    """A vote an element."""

    name: ClassVar[str] = "signsgd"
    recordable: ClassVar[bool] = True

    def words(self, seed: int, *, elements: int, level: float) -> tuple[int, ...]:
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

    def kind(self, payload: Payload, coding: Coding) -> Hashable:
        """Return that nothing else does; see `DeviceCodec.kind`."""
        return True

    def decode(self, payload: Payload, uploaded: torch.Tensor, coding: Coding, out: torch.Tensor) -> None:
        """Write `-level` or `level` to each element of `out`."""
        out.copy_(self._signed(uploaded, coding))

    def accumulate(
        self, payload: Payload, uploaded: torch.Tensor, coding: Coding, weight: np.float32, total: torch.Tensor
    ) -> None:
        """Add `-weight * level` or `weight * level` to each element of `total`."""
        total.add_(self._signed(uploaded, coding) * float(weight))

    @staticmethod
    def _signed(uploaded: torch.Tensor, coding: Coding) -> torch.Tensor:
        size = torch.full((), coding.level, dtype=torch.float32, device=uploaded.device)
        return torch.where(unpacked(uploaded.view(torch.int32), coding.elements), -size, size)

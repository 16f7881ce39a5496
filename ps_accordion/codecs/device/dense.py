"""dense on a device; `codecs/dense.py` says what it is."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from ..base import Coding, Payload
from . import values
from .base import DeviceCodec, upload

__all__ = ["DenseTwin"]


class DenseTwin(DeviceCodec):
    """The whole vector, at 32 or 16 bits an element."""

    name: ClassVar[str] = "dense"
    recordable: ClassVar[bool] = True

    def pack(
        self, v: torch.Tensor, peak: torch.Tensor, payload: torch.Tensor, *, level: float, seed: int, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Write all of `v`; see `DeviceCodec.pack`."""
        if level == 32:
            payload.view(torch.float32).copy_(v)
            return torch.zeros_like(v), v.numel()
        return values.store(v, peak, "fp16", payload), v.numel()

    def decode(self, payload: Payload, coding: Coding, out: torch.Tensor) -> None:
        """Write the vector to `out`."""
        out.copy_(self._vector(payload, coding, out.device))

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: torch.Tensor) -> None:
        """Add `weight` times the vector to `total`."""
        total.add_(self._vector(payload, coding, total.device) * float(weight))

    @staticmethod
    def _vector(payload: Payload, coding: Coding, device: torch.device) -> torch.Tensor:
        uploaded = upload(payload, device)
        return uploaded.view(torch.float32) if coding.level == 32 else values.load(payload, uploaded, coding.elements)

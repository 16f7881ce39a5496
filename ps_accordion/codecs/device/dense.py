"""dense on a device; `codecs/dense.py` says what it is."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

import numpy as np
import torch

from ..base import Coding, Payload
from . import values
from .base import DeviceCodec

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

    def kind(self, payload: Payload, coding: Coding) -> Hashable:
        """Return that nothing else does; see `DeviceCodec.kind`."""
        return True

    def decode(self, payload: Payload, uploaded: torch.Tensor, coding: Coding, out: torch.Tensor) -> None:
        """Write the vector to `out`."""
        out.copy_(self._vector(uploaded, coding))

    def accumulate(
        self, payload: Payload, uploaded: torch.Tensor, coding: Coding, weight: np.float32, total: torch.Tensor
    ) -> None:
        """Add `weight` times the vector to `total`."""
        total.add_(self._vector(uploaded, coding) * float(weight))

    @staticmethod
    def _vector(uploaded: torch.Tensor, coding: Coding) -> torch.Tensor:
        return uploaded.view(torch.float32) if coding.level == 32 else values.load(uploaded, "fp16", coding.elements)

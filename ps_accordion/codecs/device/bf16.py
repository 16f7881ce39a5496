"""bf16 on a device; `codecs/bf16.py` says what it is. By integers, as on the host: a cast may round denormal numbers away."""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np
import torch

from ..base import Coding, Payload
from ..kernels.bfloat import LARGEST
from .base import DeviceCodec, upload

__all__ = ["BF16Twin"]

_MAGNITUDE: Final = 0x7FFFFFFF
_SIGN: Final = -(1 << 31)


class BF16Twin(DeviceCodec):
    """The upper halves of all elements."""

    name: ClassVar[str] = "bf16"
    recordable: ClassVar[bool] = True

    def pack(
        self, v: torch.Tensor, peak: torch.Tensor, payload: torch.Tensor, *, level: float, seed: int, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Write all of `v`; see `DeviceCodec.pack`."""
        word = v.view(torch.int32)
        magnitude = word & _MAGNITUDE
        rounded = (magnitude + ((magnitude >> 16) & 1) + 0x7FFF).bitwise_and_(~0xFFFF).clamp_(max=LARGEST << 16)
        sent = rounded | (word & _SIGN)
        payload.view(torch.int16).copy_(sent >> 16)
        return v - sent.view(torch.float32), v.numel()

    def decode(self, payload: Payload, coding: Coding, out: torch.Tensor) -> None:
        """Write the vector to `out`."""
        out.copy_(_vector(payload, out.device))

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: torch.Tensor) -> None:
        """Add `weight` times the vector to `total`."""
        total.add_(_vector(payload, total.device) * float(weight))


def _vector(payload: Payload, device: torch.device) -> torch.Tensor:
    return (upload(payload, device).view(torch.int16).to(torch.int32) << 16).view(torch.float32)

"""bf16 on a device; `codecs/bf16.py` says what it is. By integers, as on the host: a cast may round denormal numbers away."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar, Final

import numpy as np
import torch

from ..base import Coding, Payload
from ..kernels.bfloat import LARGEST
from .base import DeviceCodec

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

    def kind(self, payload: Payload, coding: Coding) -> Hashable:
        """Return that nothing else does; see `DeviceCodec.kind`."""
        return True

    def decode(self, payload: Payload, uploaded: torch.Tensor, coding: Coding, out: torch.Tensor) -> None:
        """Write the vector to `out`."""
        out.copy_(_vector(uploaded))

    def accumulate(
        self, payload: Payload, uploaded: torch.Tensor, coding: Coding, weight: np.float32, total: torch.Tensor
    ) -> None:
        """Add `weight` times the vector to `total`."""
        total.add_(_vector(uploaded) * float(weight))


def _vector(uploaded: torch.Tensor) -> torch.Tensor:
    return (uploaded.view(torch.int16).to(torch.int32) << 16).view(torch.float32)

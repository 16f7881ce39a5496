"""random_k on a device; `codecs/random_k.py` says what it is. The places follow from the seed, which the host knows."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from ..base import Coding, Payload
from ..random_k import RandomK, draw_of
from .base import DeviceCodec, upload
from .noise import hashed, key_of

__all__ = ["RandomKTwin"]


class RandomKTwin(DeviceCodec):
    """One shared random element of each stretch."""

    name: ClassVar[str] = "random_k"
    codec: RandomK

    def pack(
        self, v: torch.Tensor, peak: torch.Tensor, payload: torch.Tensor, *, level: float, seed: int, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Write the elements of `v` that `seed` names; see `DeviceCodec.pack`."""
        places = self._places(v.numel(), level, seed, v.device)
        count = places.numel()
        payload[: 4 * count].view(torch.float32).copy_(v.gather(0, places))
        return v.index_fill(0, places, 0.0), count

    def trim(self, payload: Payload, *, count: int, elements: int, level: float) -> Payload:
        """Cut off what a last, shorter stretch has no element for; see `DeviceCodec.trim`."""
        return payload[: 4 * count]

    def decode(self, payload: Payload, coding: Coding, out: torch.Tensor) -> None:
        """Write the values to their places in `out`, and zero elsewhere."""
        places = self._places(coding.elements, coding.level, coding.seed, out.device)
        out.zero_().scatter_(0, places, upload(payload, out.device).view(torch.float32))

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: torch.Tensor) -> None:
        """Add `weight` times the values at their places in `total`."""
        places = self._places(coding.elements, coding.level, coding.seed, total.device)
        values = upload(payload, total.device).view(torch.float32)
        total.scatter_(0, places, total.gather(0, places) + values * float(weight))

    def _places(self, elements: int, level: float, seed: int, device: torch.device) -> torch.Tensor:
        """Return int64[covered], rising."""
        m, count = self.codec.stretch(elements, level), self.codec.covered(elements, level, seed)
        key, turn = draw_of(seed, m)
        words = hashed(torch.arange(count, dtype=torch.int32, device=device), key_of(key)).to(torch.int64) & 0xFFFFFFFF
        places = ((words * m) >> 32).add_(turn)
        places = torch.where(places >= m, places - m, places)
        return places.add_(torch.arange(count, device=device) * m)

"""random_k on a device; `codecs/random_k.py` says what it is. The places follow from the seed, which the host knows."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from ..base import Coding, Payload
from ..random_k import RandomK, draw_of
from .base import DeviceCodec
from .noise import hashed, key_of

__all__ = ["RandomKTwin"]


class RandomKTwin(DeviceCodec):
    """One shared random element of each stretch."""

    name: ClassVar[str] = "random_k"
    codec: RandomK
    recordable: ClassVar[bool] = True

    def words(self, seed: int, *, elements: int, level: float) -> tuple[int, ...]:
        """Return what the hash is keyed with, and the turn; see `DeviceCodec.words`."""
        key, turn = draw_of(seed, self.codec.stretch(elements, level))
        return *key_of(key), turn

    def pack(
        self, v: torch.Tensor, peak: torch.Tensor, payload: torch.Tensor, *, level: float, seed: int, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Write the elements of `v` that `seed` names; see `DeviceCodec.pack`."""
        n = v.numel()
        places = self._places(words, self.codec.length(n, level), self.codec.stretch(n, level), v.device)
        # Behind the end of a last, shorter stretch there is nothing: one element too many stands for it.
        covered = places < n
        places = places.clamp_(max=n)
        rest = torch.zeros(n + 1, dtype=torch.float32, device=v.device)
        rest[:n].copy_(v)
        payload.view(torch.float32).copy_(rest.gather(0, places))
        return rest.index_fill_(0, places, 0.0)[:n], covered.sum(dtype=torch.int32)

    def trim(self, payload: Payload, *, count: int, elements: int, level: float) -> Payload:
        """Cut off what a last, shorter stretch has no element for; see `DeviceCodec.trim`."""
        return payload[: 4 * count]

    def decode(self, payload: Payload, uploaded: torch.Tensor, coding: Coding, out: torch.Tensor) -> None:
        """Write the values to their places in `out`, and zero elsewhere."""
        places = self._places_of(coding, out.device)
        out.zero_().scatter_(0, places, uploaded.view(torch.float32))

    def accumulate(
        self, payload: Payload, uploaded: torch.Tensor, coding: Coding, weight: np.float32, total: torch.Tensor
    ) -> None:
        """Add `weight` times the values at their places in `total`."""
        places = self._places_of(coding, total.device)
        values = uploaded.view(torch.float32)
        total.scatter_(0, places, total.gather(0, places) + values * float(weight))

    def _places_of(self, coding: Coding, device: torch.device) -> torch.Tensor:
        n, level = coding.elements, coding.level
        words = self.words(coding.seed, elements=n, level=level)
        return self._places(words, coding.count, self.codec.stretch(n, level), device)

    @staticmethod
    def _places(words: tuple[int, ...] | torch.Tensor, count: int, m: int, device: torch.device) -> torch.Tensor:
        """Return int64[count], rising: an element of each stretch of m."""
        stretches = torch.arange(count, dtype=torch.int32, device=device)
        drawn = hashed(stretches, words[:2]).to(torch.int64) & 0xFFFFFFFF
        places = ((drawn * m) >> 32).add_(words[2])
        places = torch.where(places >= m, places - m, places)
        return places.add_(stretches.to(torch.int64) * m)

"""onebit on a device; `codecs/onebit.py` says what it is.

Magnitudes are added up in the order of the host: a running sum down the rows of [chunks, chunk / 64, 64] adds each lane in order,
one thread a lane. `torch.use_deterministic_algorithms` forbids running sums of floats on accelerators; rows are then added one by
one, which gives the same bits in more launches.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

import numpy as np
import torch

from ..base import Coding, Payload
from .base import DeviceCodec
from .signs import packed, unpacked

__all__ = ["OneBitTwin"]

_LANES = 64


class OneBitTwin(DeviceCodec):
    """A sign an element and a size a chunk."""

    name: ClassVar[str] = "onebit"
    recordable: ClassVar[bool] = True

    def pack(
        self, v: torch.Tensor, peak: torch.Tensor, payload: torch.Tensor, *, level: float, seed: int, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Write sizes and signs of `v`; see `DeviceCodec.pack`."""
        n, chunk = v.numel(), int(level)
        sizes = _means(v, chunk)
        negative = v < 0
        words_at = 4 * sizes.numel()
        payload[:words_at].view(torch.float32).copy_(sizes)
        payload[words_at:].view(torch.int32).copy_(packed(negative))
        size = _spread(sizes, n, chunk)
        return v - torch.where(negative, -size, size), n

    def kind(self, payload: Payload, coding: Coding) -> Hashable:
        """Return that nothing else does; see `DeviceCodec.kind`."""
        return True

    def decode(self, payload: Payload, uploaded: torch.Tensor, coding: Coding, out: torch.Tensor) -> None:
        """Write `0 + -size` or `0 + size` to each element of `out`."""
        torch.add(self._signed(uploaded, coding), 0.0, out=out)

    def accumulate(
        self, payload: Payload, uploaded: torch.Tensor, coding: Coding, weight: np.float32, total: torch.Tensor
    ) -> None:
        """Add `-weight * size` or `weight * size` to each element of `total`."""
        total.add_(self._signed(uploaded, coding) * float(weight))

    @staticmethod
    def _signed(uploaded: torch.Tensor, coding: Coding) -> torch.Tensor:
        n, chunk = coding.elements, int(coding.level)
        words_at = 4 * -(-n // chunk)
        negative = unpacked(uploaded[words_at:].view(torch.int32), n)
        size = _spread(uploaded[:words_at].view(torch.float32), n, chunk)
        return torch.where(negative, -size, size)


def _means(v: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return the mean magnitude of each chunk as float32[chunks]."""
    n = v.numel()
    chunks = -(-n // chunk)
    rows = -(-min(n, chunk) // _LANES)  # a chunk that is alone may be short
    magnitudes = torch.zeros(chunks, rows, _LANES, dtype=torch.float64, device=v.device)
    magnitudes.view(-1)[:n].copy_(v.abs())
    lanes = _row_by_row(magnitudes) if _running_sums_forbidden(v.device) else torch.cumsum(magnitudes, 1)[:, -1]
    while lanes.size(1) > 1:
        half = lanes.size(1) // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    # Divided by a tensor: by a number, torch would multiply with one over it.
    lengths = torch.full((chunks,), float(chunk), dtype=torch.float64, device=v.device)
    lengths[-1:].fill_(float(n - (chunks - 1) * chunk))
    return (lanes[:, 0] / lengths).to(torch.float32)


def _running_sums_forbidden(device: torch.device) -> bool:
    return device.type != "cpu" and torch.are_deterministic_algorithms_enabled()


def _row_by_row(magnitudes: torch.Tensor) -> torch.Tensor:
    lanes = magnitudes[:, 0].clone()
    for row in range(1, magnitudes.size(1)):
        lanes += magnitudes[:, row]
    return lanes


def _spread(sizes: torch.Tensor, n: int, chunk: int) -> torch.Tensor:
    """Return the size of each element as float32[n]."""
    return sizes[:, None].expand(-1, min(n, chunk)).reshape(-1)[:n]

"""powersgd on a device; `codecs/powersgd.py` says what it is.

The basis is written on the host, where it has the same bits for all. The product is one matrix multiplication of torch, in
whatever order (and precision, if `torch.set_float32_matmul_precision` allows another) the device adds up: its bits are not those
of another device or of the host. Nobody needs them to be: what is kept is what the payload does not carry, and D(payload) has the
same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

import numpy as np
import torch

from ..base import Codec, Coding, Payload
from ..factors import HEADER, LEFT, apart
from ..powersgd import LARGEST, SMALLEST, PowerSgd
from .base import DeviceCodec, upload

__all__ = ["PowerSgdTwin"]


class PowerSgdTwin(DeviceCodec):
    """Two thin factors."""

    name: ClassVar[str] = "powersgd"

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec)
        assert isinstance(codec, PowerSgd)
        self._codec = codec

    def pack(
        self, v: torch.Tensor, peak: torch.Tensor, payload: torch.Tensor, *, level: float, seed: int, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Write both factors; see `DeviceCodec.pack`."""
        begun = np.zeros(payload.numel(), np.uint8)
        parts, encoded = self._codec.begun(v.numel(), level, seed, begun)
        payload.copy_(upload(begun, v.device))
        rows, columns = parts.left.size // parts.rank, parts.right.size // parts.rank
        left, right = _factors(payload, parts.rank, rows, columns)
        matrix = (v * _factor(peak)).view(rows, columns)
        if parts.side == LEFT:
            right.copy_(left @ matrix)
        else:
            left.copy_(right @ matrix.t())
        return v - _product(left, right).view(-1), encoded.count

    def kind(self, payload: Payload, coding: Coding) -> Hashable:
        """Return rank and shape; see `DeviceCodec.kind`."""
        parts = apart(payload, coding)
        return parts.rank, parts.left.size, parts.right.size

    def decode(self, payload: Payload, uploaded: torch.Tensor, coding: Coding, out: torch.Tensor) -> None:
        """Write the product of both factors to `out`."""
        out.copy_(self._decoded(payload, uploaded, coding))

    def accumulate(
        self, payload: Payload, uploaded: torch.Tensor, coding: Coding, weight: np.float32, total: torch.Tensor
    ) -> None:
        """Add `weight` times the product of both factors to `total`."""
        total.add_(self._decoded(payload, uploaded, coding) * float(weight))

    @staticmethod
    def _decoded(payload: Payload, uploaded: torch.Tensor, coding: Coding) -> torch.Tensor:
        parts = apart(payload, coding)
        rows, columns = parts.left.size // parts.rank, parts.right.size // parts.rank
        return _product(*_factors(uploaded, parts.rank, rows, columns)).view(-1)


def _factors(payload: torch.Tensor, rank: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32[rank, rows] and float32[rank, columns], views of a payload."""
    factors = payload[HEADER : HEADER + 4 * rank * (rows + columns)].view(torch.float32)
    return factors[: rank * rows].view(rank, rows), factors[rank * rows :].view(rank, columns)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return float32[rows, columns], added up vector by vector as on the host."""
    total = torch.zeros(left.size(1), right.size(1), dtype=torch.float32, device=left.device)
    for k in range(left.size(0)):
        total.add_(left[k][:, None] * right[k][None, :])
    return total


def _factor(peak: torch.Tensor) -> torch.Tensor:
    """Return by what a vector is multiplied first: 1, 0 where all of it is small, a power of two where some of it is large."""
    exponent = (peak >> 23) - 127
    shorter = ((LARGEST - 1 - exponent + 127) << 23).view(torch.float32)
    factor = torch.where(exponent >= LARGEST, shorter, torch.ones_like(shorter))
    return torch.where(peak < SMALLEST, torch.zeros_like(shorter), factor)

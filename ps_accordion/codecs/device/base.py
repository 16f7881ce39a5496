"""The contract of a twin: what `codecs/base.py` asks of a codec at a worker, with torch tensors.

Promises beyond that contract:

* the host does not wait: shapes follow from length and level, branches from both, and no scalar is read from a tensor;
* every float operation is one torch operation of its own, so that no compiler joins a product and a sum into one rounding;
* sums into memory are read, added and written back, not atomic: atomic additions flush denormals on some devices.

Denormals count, as on the host: `torch.set_flush_denormal` is off unless somebody calls it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import ClassVar

import numpy as np
import torch

from ..base import Codec, Coding, Payload

__all__ = ["DeviceCodec", "host_memory", "stage", "upload"]


class DeviceCodec(ABC):
    """The twin of one codec.

    Args:
        codec: The codec on the host; levels, bounds and options are its own.
    """

    name: ClassVar[str]
    """Wire name of the codec."""
    recordable: ClassVar[bool] = False
    """Whether `pack` launches the same work for the same length and level, whatever the seed: `words` carries what it needs of
    one. What is launched may then be recorded once, and launched again as a whole (`worker/recorded.py`)."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def words(self, seed: int, *, elements: int, level: float) -> tuple[int, ...]:
        """Return what `pack` needs to know of a seed: words of 32 bits, as numbers from -2^31 on, as many for every seed."""
        return ()

    @abstractmethod
    def pack(
        self, v: torch.Tensor, peak: torch.Tensor, payload: torch.Tensor, *, level: float, seed: int, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Write the payload of `v` and return what it does not carry.

        Args:
            v: float32[n]; only read. Where it is not finite, any result will do, and must not be an error.
            peak: int32[], bits of the largest magnitude in `v`.
            payload: uint8[payload_bound(n, level)], at an address that 4 divides; laid out for as many entries as there may be.
            level: The codec's setting.
            seed: 64-bit counter seed; for the shape of what is launched, and so not where it may be recorded.
            words: int32[m] on the device: what `words` returned for the seed.

        Returns:
            `v - D(payload)` as float32[n] in memory of its own, and how many entries the payload has.
        """

    def trim(self, payload: Payload, *, count: int, elements: int, level: float) -> Payload:
        """Return, on the host, the payload of `count` entries from one that is laid out for as many as there may be."""
        return payload

    def kind(self, payload: Payload, coding: Coding) -> Hashable:
        """Return what decides what `decode` launches, beside the length of the payload and all that `coding` says but the seed.

        None if that is more than can be said; otherwise `decode` may be recorded, and must take all else from `uploaded`.
        """
        return None

    @abstractmethod
    def decode(self, payload: Payload, uploaded: torch.Tensor, coding: Coding, out: torch.Tensor) -> None:
        """Write D(payload) over the whole of `out`, float32[n].

        Args:
            payload: uint8[nbytes] on the host, validated.
            uploaded: The same on the device, at an aligned address.
            coding: What the header of its message says.
            out: To be written, contiguous.
        """

    @abstractmethod
    def accumulate(
        self, payload: Payload, uploaded: torch.Tensor, coding: Coding, weight: np.float32, total: torch.Tensor
    ) -> None:
        """Add `weight * D(payload)` to `total`, float32[n]; the rest is as in `decode`."""


def host_memory(nbytes: int, device: torch.device) -> torch.Tensor:
    """Return uint8[nbytes] on the host that `device` copies to and from while nobody waits: pinned, but for the CPU's own."""
    pinned = device.type not in ("cpu", "meta")
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)


def stage(what: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return the bytes of an array on the host as uint8, in memory of their own that `device` copies from while nobody waits."""
    staged = host_memory(what.nbytes, device)
    np.copyto(staged.numpy(), what.view(np.uint8))
    return staged


def upload(payload: Payload, device: torch.device) -> torch.Tensor:
    """Return a copy of `payload` on `device`, at an aligned address; the host does not wait for it."""
    return stage(payload, device).to(device, non_blocking=True)

"""topk on a device; `codecs/topk.py` says what it is.

Everything has the shape that k entries take, however many there are:

1. torch.topk gives the k-th largest magnitude, as bits (which of equal elements it names does not matter, only the value does).
2. An element is chosen if it is larger, or equal and among the first so many equal ones; running sums of the choice say where
   each chosen element goes in the payload.
3. The j-th chosen element is where the running sum first reaches j: a binary search for each of the k entries. Nothing is
   scattered, so no order of writing matters. Entries that are missing, because fewer than k are not zero, name a spare element.

The host cuts the missing entries out when the payload arrives, since only then it knows how many there are.
"""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np
import torch

from ...errors import CodecError
from ..base import Coding, Payload
from ..topk import CHUNK, TopK
from ..values import PREAMBLE, width
from . import values
from .base import DeviceCodec, upload

__all__ = ["TopKTwin"]

_MAGNITUDE: Final = 0x7FFFFFFF
_MOST: Final = (1 << 31) - 1
"""Running sums are 32 bits wide."""


class TopKTwin(DeviceCodec):
    """The largest elements and where they are."""

    name: ClassVar[str] = "topk"
    codec: TopK

    def pack(
        self, v: torch.Tensor, peak: torch.Tensor, payload: torch.Tensor, *, level: float, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Write the largest elements of `v`; see `DeviceCodec.pack`."""
        n = v.numel()
        if n > _MOST:
            raise CodecError(f"topk: expected at most {_MOST} elements on a device, got {n}; cut the tensor into partitions")
        k = self.codec.kept(n, level)
        place = _places_of_largest(v, k)
        wanted = torch.arange(1, k + 1, dtype=torch.int32, device=v.device)
        index = torch.searchsorted(place, wanted)
        # What is missing has index n: one element too many to write to.
        rest = torch.empty(n + 1, dtype=torch.float32, device=v.device)
        rest[:n].copy_(v)
        lost = values.store(rest.index_select(0, index), peak, self.codec.values, payload)
        rest.scatter_(0, index, lost)
        places_at, counts_at = self._layout(k)
        payload[places_at:counts_at].view(torch.int16).copy_(index & (CHUNK - 1))
        payload[counts_at:].view(torch.int16).copy_(_in_chunks(place))
        return rest[:n], place[n - 1]

    def trim(self, payload: Payload, *, count: int, elements: int, level: float) -> Payload:
        """Cut out the entries that are missing; see `DeviceCodec.trim`."""
        k = self.codec.kept(elements, level)
        if count == k:
            return payload
        places_at, counts_at = self._layout(k)
        end_of_values = PREAMBLE + count * width(self.codec.values)
        return np.concatenate((payload[:end_of_values], payload[places_at : places_at + 2 * count], payload[counts_at:]))

    def decode(self, payload: Payload, coding: Coding, out: torch.Tensor) -> None:
        """Write the values to their places in `out`, and zero elsewhere."""
        index, sent = _entries(payload, coding, out.device)
        out.zero_().scatter_(0, index, sent)

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: torch.Tensor) -> None:
        """Add `weight` times the values at their places in `total`."""
        index, sent = _entries(payload, coding, total.device)
        total.scatter_(0, index, total.gather(0, index) + sent * float(weight))

    def _layout(self, k: int) -> tuple[int, int]:
        """Return where the places and the counts of a payload with k entries begin."""
        places_at = PREAMBLE + k * width(self.codec.values)
        return places_at, places_at + 2 * k


def _places_of_largest(v: torch.Tensor, k: int) -> torch.Tensor:
    """Return int32[n]: how many of the k largest of `v` lie at or before each element."""
    magnitude = v.view(torch.int32) & _MAGNITUDE
    top = torch.topk(magnitude, k, sorted=False).values
    # Not zero: where fewer than k elements are larger than zero, all of those are chosen.
    least = top.amin().clamp_(min=1)
    ties = k - (top > least).sum(dtype=torch.int32)
    larger = torch.cumsum(magnitude > least, 0, dtype=torch.int32)
    equal = torch.cumsum(magnitude == least, 0, dtype=torch.int32)
    return larger.add_(torch.minimum(equal, ties))


def _in_chunks(place: torch.Tensor) -> torch.Tensor:
    """Return how many chosen elements lie in each chunk, from running sums."""
    n = place.numel()
    if n <= CHUNK:
        return place[n - 1 :]
    ends = torch.cat((place[CHUNK - 1 : n - 1 : CHUNK], place[n - 1 :]))
    return torch.diff(ends, prepend=torch.zeros_like(ends[:1]))


def _entries(payload: Payload, coding: Coding, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64[count] of rising indices and float32[count] of values, on the device."""
    uploaded = upload(payload, device)
    counts_at = payload.size - 2 * -(-coding.elements // CHUNK)
    index = uploaded[counts_at - 2 * coding.count : counts_at].view(torch.int16).to(torch.int64)
    if coding.elements > CHUNK:
        # A full chunk counts 32,768, which is negative in 16 signed bits.
        counts = uploaded[counts_at:].view(torch.int16).to(torch.int32) & 0xFFFF
        entries = torch.arange(coding.count, dtype=torch.int32, device=device)
        index += torch.searchsorted(torch.cumsum(counts, 0, dtype=torch.int32), entries, right=True) * CHUNK
    return index, values.load(payload, uploaded, coding.count)

"""Codecs that send single elements on a device; `codecs/entries.py` says what they write.

Everything has the shape that k entries take, however many there are:

1. torch.topk gives the k-th largest magnitude, as bits (which of equal elements it names does not matter, only the value does).
   Where elements must reach more than that, what they must reach is the least instead.
2. An element is chosen if it is larger than the least, or equal and among the first so many equal ones; running sums of the
   choice say where each chosen element goes in the payload.
3. The j-th chosen element is where the running sum first reaches j: a binary search for each of the k entries. Nothing is
   scattered, so no order of writing matters. Entries that are missing, because fewer than k are large enough, name a spare one.

The host, which learns the count with the payload, cuts the missing entries out.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar, Final

import numpy as np
import torch

from ...errors import CodecError
from ..base import Coding, Payload
from ..entries import PACKED_AT, EntriesCodec, chunk_of, length_of
from ..values import FORMS, PACKED, PREAMBLE, block_length
from . import values
from .base import DeviceCodec

__all__ = ["EntriesTwin"]

_MAGNITUDE: Final = 0x7FFFFFFF
_MOST: Final = (1 << 31) - 1
"""Running sums are 32 bits wide."""


class EntriesTwin(DeviceCodec):
    """Some elements and where they are."""

    codec: EntriesCodec
    recordable: ClassVar[bool] = True

    def floor(self, level: float) -> int:
        """Return the magnitude bits, 1 at least, that an element must reach to be sent."""
        return 1

    def pack(
        self, v: torch.Tensor, peak: torch.Tensor, payload: torch.Tensor, *, level: float, seed: int, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Write what is sent of `v`; see `DeviceCodec.pack`."""
        n, name = v.numel(), self.codec.name
        if n > _MOST:
            raise CodecError(f"{name}: expected at most {_MOST} elements on a device, got {n}; cut the tensor into partitions")
        k, form = self.codec.kept(n, level), self.codec.values
        peak = peak.masked_fill(peak < self.floor(level), 0)  # that of what is sent, where anything is
        floor = torch.full_like(peak, self.floor(level))
        if form == "packed":
            unit, least = values.packed_unit(peak)
            floor = torch.maximum(floor, least)
        place = _places_of_largest(v, k, floor)
        wanted = torch.arange(1, k + 1, dtype=torch.int32, device=v.device)
        index = torch.searchsorted(place, wanted)
        # What is missing has index n: one element too many to write to.
        rest = torch.empty(n + 1, dtype=torch.float32, device=v.device)
        rest[:n].copy_(v)
        sent, in_chunk = rest.index_select(0, index), index & (chunk_of(form) - 1)
        counts_at = length_of(n, k, form) - 2 * -(-n // chunk_of(form))
        if form == "packed":
            payload[:PREAMBLE].view(torch.int32).fill_(PACKED)
            payload[PREAMBLE:PACKED_AT].view(torch.float32).copy_(unit)
            entries, lost = values.packed(sent, unit)
            payload[PACKED_AT:counts_at].view(torch.int16).copy_(entries | in_chunk)
        else:
            lost = values.store(sent, peak, form, payload)
            payload[block_length(form, k) : counts_at].view(torch.int16).copy_(in_chunk)
        rest.scatter_(0, index, lost)
        payload[counts_at:].view(torch.int16).copy_(_in_chunks(place, chunk_of(form)))
        return rest[:n], place[n - 1]

    def trim(self, payload: Payload, *, count: int, elements: int, level: float) -> Payload:
        """Cut out the entries that are missing; see `DeviceCodec.trim`."""
        k, form = self.codec.kept(elements, level), self.codec.values
        if count == k:
            return payload
        counts_at = length_of(elements, k, form) - 2 * -(-elements // chunk_of(form))
        if form == "packed":
            return np.concatenate((payload[: PACKED_AT + 2 * count], payload[counts_at:]))
        places_at, block = block_length(form, k), payload[: block_length(form, count)].copy()
        if form == "int8" and count % 2:
            block[-1] = 0
        return np.concatenate((block, payload[places_at : places_at + 2 * count], payload[counts_at:]))

    def kind(self, payload: Payload, coding: Coding) -> Hashable:
        """Return the format of the values; None where entries are missing, for how many are varies. See `DeviceCodec.kind`."""
        return FORMS[payload[0]] if coding.count == self.codec.kept(coding.elements, coding.level) else None

    def decode(self, payload: Payload, uploaded: torch.Tensor, coding: Coding, out: torch.Tensor) -> None:
        """Write the values to their places in `out`, and zero elsewhere."""
        index, sent = _entries(payload, uploaded, coding)
        out.zero_().scatter_(0, index, sent)

    def accumulate(
        self, payload: Payload, uploaded: torch.Tensor, coding: Coding, weight: np.float32, total: torch.Tensor
    ) -> None:
        """Add `weight` times the values at their places in `total`."""
        index, sent = _entries(payload, uploaded, coding)
        total.scatter_(0, index, total.gather(0, index) + sent * float(weight))


def _places_of_largest(v: torch.Tensor, k: int, floor: torch.Tensor) -> torch.Tensor:
    """Return int32[n]: how many of the k largest of `v`, as far as they reach `floor`, lie at or before each element."""
    magnitude = v.view(torch.int32) & _MAGNITUDE
    top = torch.topk(magnitude, k, sorted=False).values
    # Where fewer than k elements reach the floor, all of those are chosen.
    least = torch.maximum(top.amin(), floor)
    ties = k - (top > least).sum(dtype=torch.int32)
    larger = torch.cumsum(magnitude > least, 0, dtype=torch.int32)
    equal = torch.cumsum(magnitude == least, 0, dtype=torch.int32)
    return larger.add_(torch.minimum(equal, ties))


def _in_chunks(place: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return how many chosen elements lie in each chunk, from running sums."""
    n = place.numel()
    if n <= chunk:
        return place[n - 1 :]
    ends = torch.cat((place[chunk - 1 : n - 1 : chunk], place[n - 1 :]))
    return torch.diff(ends, prepend=torch.zeros_like(ends[:1]))


def _entries(payload: Payload, uploaded: torch.Tensor, coding: Coding) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64[count] of rising indices and float32[count] of values, on the device."""
    form = FORMS[payload[0]]
    chunk = chunk_of(form)
    counts_at = payload.size - 2 * -(-coding.elements // chunk)
    words = uploaded[counts_at - 2 * coding.count : counts_at].view(torch.int16)
    index = words.to(torch.int64) & (chunk - 1)
    if coding.elements > chunk:
        # A full chunk counts 32,768, which is negative in 16 signed bits.
        counts = uploaded[counts_at:].view(torch.int16).to(torch.int32) & 0xFFFF
        entries = torch.arange(coding.count, dtype=torch.int32, device=uploaded.device)
        index += torch.searchsorted(torch.cumsum(counts, 0, dtype=torch.int32), entries, right=True) * chunk
    if form == "packed":
        return index, values.unpacked(words, uploaded[PREAMBLE:PACKED_AT].view(torch.float32))
    return index, values.load(uploaded, form, coding.count)

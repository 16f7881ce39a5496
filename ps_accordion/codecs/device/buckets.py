"""Quantising codecs on a device; `codecs/buckets.py` says what they are, `codecs/kernels/buckets.py` how they round."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from typing import ClassVar, Final

import numpy as np
import torch

from ..base import Coding, Payload
from ..buckets import PREAMBLE, BucketCodec, parts_of
from .base import DeviceCodec
from .noise import hashed, key_of

__all__ = ["BucketTwin", "IntTwin", "NaturalTwin", "QsgdTwin", "TernGradTwin"]

_MAGIC: Final = 1.5 * 2.0**23
_FIXED: Final = 256
_STEEPEST: Final = 2.0**126
_MAGNITUDE: Final = 0x7FFFFFFF
_MANTISSA: Final = 0x007FFFFF
_SMALLEST: Final = 2.0**-126
_LARGEST: Final = 2.0**120
_LANES: Final = 64
_DEVIATIONS: Final = 2.5


class BucketTwin(DeviceCodec):
    """A codec with one scale a bucket."""

    codec: BucketCodec
    recordable: ClassVar[bool] = True

    def pack(
        self, v: torch.Tensor, peak: torch.Tensor, payload: torch.Tensor, *, level: float, seed: int, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Write scales and codes of `v`; see `DeviceCodec.pack`."""
        n, bucket, width = v.numel(), self.codec.bucket, int(level)
        buckets = -(-n // bucket)
        codes_at = PREAMBLE + 4 * buckets
        payload[:PREAMBLE].view(torch.int32).fill_(bucket)
        scales, out = payload[PREAMBLE:codes_at].view(torch.float32), payload[codes_at:]
        rows = torch.nn.functional.pad(v, (0, buckets * bucket - n)).view(buckets, bucket)
        top = (rows.view(torch.int32) & _MAGNITUDE).amax(1).view(torch.float32)
        codes, rest = self.quantise(rows, top, scales, width=width, words=words, last=n - (buckets - 1) * bucket)
        whole = n // bucket
        at = whole * (bucket * width // 8)
        out[:at].view(whole, bucket * width // 8).copy_(_packed(codes[:whole], width))
        if whole < buckets:
            out[at:].copy_(_packed(codes[whole:, : n - whole * bucket], width).view(-1))
        return rest.reshape(-1)[:n], n

    @abstractmethod
    def quantise(
        self, rows: torch.Tensor, top: torch.Tensor, scales: torch.Tensor, *, width: int, words: torch.Tensor, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes, uint8, and what is to be kept, float32, both [buckets, bucket] as `rows`.

        Args:
            rows: float32[buckets, bucket], zeros behind the vector.
            top: float32[buckets], the largest magnitude of each.
            scales: float32[buckets], to be written.
            width: Bits of a code.
            words: What `words` returned, int32 on the device.
            last: Elements of the last bucket.
        """

    def kind(self, payload: Payload, coding: Coding) -> Hashable:
        """Return the length of a bucket; see `DeviceCodec.kind`."""
        return parts_of(payload, coding)[0]

    def decode(self, payload: Payload, uploaded: torch.Tensor, coding: Coding, out: torch.Tensor) -> None:
        """Write what the codes stand for to `out`."""
        out.copy_(self._vector(payload, uploaded, coding)).add_(0.0)

    def accumulate(
        self, payload: Payload, uploaded: torch.Tensor, coding: Coding, weight: np.float32, total: torch.Tensor
    ) -> None:
        """Add `weight` times what the codes stand for to `total`."""
        total.add_(self._vector(payload, uploaded, coding) * float(weight))

    def _vector(self, payload: Payload, uploaded: torch.Tensor, coding: Coding) -> torch.Tensor:
        n, width = coding.elements, int(coding.level)
        bucket, parts = parts_of(payload, coding)
        codes_at = PREAMBLE + 4 * parts.scales.size
        scales, codes = uploaded[PREAMBLE:codes_at].view(torch.float32), uploaded[codes_at:]
        whole = n // bucket
        at = whole * (bucket * width // 8)
        pieces = [self.values(_unpacked(codes[:at].view(whole, bucket * width // 8), width), width) * scales[:whole, None]]
        if whole < parts.scales.size:
            left = _unpacked(codes[at:].view(1, -1), width)[:, : n - whole * bucket]
            pieces.append(self.values(left, width) * scales[whole:, None])
        return torch.cat([piece.view(-1) for piece in pieces])

    def values(self, codes: torch.Tensor, width: int) -> torch.Tensor:
        """Return what codes stand for in units of their scale, float32."""
        return codes.to(torch.float32) - float(1 << (width - 1))


class IntTwin(BucketTwin):
    """Codes rounded to nearest."""

    name: ClassVar[str] = "int"

    def quantise(
        self, rows: torch.Tensor, top: torch.Tensor, scales: torch.Tensor, *, width: int, words: torch.Tensor, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Round to nearest; see `BucketTwin.quantise`."""
        limit, magic = float((1 << (width - 1)) - 1), _MAGIC + (1 << (width - 1))
        torch.div(top, torch.full_like(top, limit), out=scales)  # by a number, a GPU would multiply with one over it
        scales.clamp_(_SMALLEST, _LARGEST)
        shifted = (rows * torch.div(1.0, scales)[:, None]).clamp_(-limit, limit).add_(magic)
        return (shifted.view(torch.int32) & 0xFF).to(torch.uint8), rows - (shifted - magic) * scales[:, None]


class QsgdTwin(BucketTwin):
    """Codes rounded stochastically."""

    name: ClassVar[str] = "qsgd"

    def words(self, seed: int, *, elements: int, level: float) -> tuple[int, ...]:
        """Return what noise is made with; see `DeviceCodec.words`."""
        return key_of(seed)

    def quantise(
        self, rows: torch.Tensor, top: torch.Tensor, scales: torch.Tensor, *, width: int, words: torch.Tensor, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Round stochastically; nothing is kept. See `BucketTwin.quantise`."""
        limit, half = float((1 << (width - 1)) - 1), 1 << (width - 1)
        top = top.clamp(max=limit * _LARGEST)
        torch.div(top, torch.full_like(top, limit), out=scales)  # by a number, a GPU would multiply with one over it
        scales.clamp_(min=_SMALLEST)
        inverse = torch.div(limit, top).clamp_(max=_STEEPEST)[:, None]
        fixed = (torch.minimum(torch.maximum(rows, -top[:, None]), top[:, None]) * inverse).add_(_FIXED + half)
        noise = _noise16(rows, words, last)
        noise = torch.where(_front(rows, last), noise >> 1, noise) & 0x7FFF
        return (((fixed.view(torch.int32) + noise) >> 15) & 0xFF).to(torch.uint8), torch.zeros_like(rows)


class TernGradTwin(QsgdTwin):
    """Clipped, then one of three numbers."""

    name: ClassVar[str] = "terngrad"

    def quantise(
        self, rows: torch.Tensor, top: torch.Tensor, scales: torch.Tensor, *, width: int, words: torch.Tensor, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip, and round stochastically; nothing is kept. See `BucketTwin.quantise`."""
        buckets, bucket = rows.shape
        lengths = torch.full((buckets,), float(bucket), dtype=torch.float64, device=rows.device)
        lengths[-1:].fill_(float(last))
        squares = rows.to(torch.float64).square_().view(buckets, -1, _LANES)
        lanes = squares[:, 0].clone()
        for i in range(1, squares.shape[1]):
            lanes += squares[:, i]
        half = _LANES // 2
        while half:
            lanes = lanes[:, :half] + lanes[:, half:]
            half //= 2
        deviation = (lanes[:, 0] / lengths).sqrt_().mul_(_DEVIATIONS).to(torch.float32)
        return super().quantise(rows, torch.minimum(top, deviation), scales, width=width, words=words, last=last)


class NaturalTwin(BucketTwin):
    """Powers of two."""

    name: ClassVar[str] = "natural"

    def words(self, seed: int, *, elements: int, level: float) -> tuple[int, ...]:
        """Return what noise is made with; see `DeviceCodec.words`."""
        return key_of(seed)

    def quantise(
        self, rows: torch.Tensor, top: torch.Tensor, scales: torch.Tensor, *, width: int, words: torch.Tensor, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Round to powers of two; nothing is kept. See `BucketTwin.quantise`."""
        scales.view(torch.int32).copy_((top.view(torch.int32) + _MANTISSA) & ~_MANTISSA)
        scales.clamp_(_SMALLEST, _LARGEST)
        word = (rows * torch.div(1.0, scales)[:, None]).view(torch.int32)
        noise = ((_noise16(rows, words, last) & 0xFFFF) << 7) | 0x40
        exponent = (((word & _MAGNITUDE) + noise) >> 23).clamp_(max=127)
        return (exponent | ((word >> 24) & 0x80)).to(torch.uint8), torch.zeros_like(rows)

    def values(self, codes: torch.Tensor, width: int) -> torch.Tensor:
        """Return powers of two, and their signs."""
        word = codes.view(torch.int8).to(torch.int32)
        return (((word & 0x7F) << 23) | (word & -(1 << 31))).view(torch.float32)


def _front(rows: torch.Tensor, last: int) -> torch.Tensor:
    """Return bool[buckets, bucket]: whether an element is in the first half of what its bucket has."""
    buckets, bucket = rows.shape
    lengths = torch.full((buckets, 1), bucket, dtype=torch.int32, device=rows.device)
    lengths[-1:].fill_(last)
    return torch.arange(bucket, dtype=torch.int32, device=rows.device) < (lengths + 1) // 2


def _noise16(rows: torch.Tensor, words: torch.Tensor, last: int) -> torch.Tensor:
    """Return 16 signed bits of noise for each element, int32: one hash serves two, one in either half of a bucket."""
    buckets, bucket = rows.shape
    place = torch.arange(bucket // 2, dtype=torch.int32, device=rows.device)
    starts = torch.arange(0, buckets * bucket, bucket, dtype=torch.int32, device=rows.device)
    word = hashed(starts[:, None] + place, words)
    noise = torch.cat((word >> 16, word << 16 >> 16), 1)
    middle = (last + 1) // 2
    if last < bucket:
        noise[-1, :last] = torch.cat((word[-1, :middle] >> 16, word[-1, : last - middle] << 16 >> 16))
    return noise


def _packed(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Return codes, uint8[rows, m], with `8 / width` in a byte."""
    if width == 8:
        return codes
    per_byte = 8 // width
    count = -(-codes.shape[1] // per_byte)
    parts = torch.nn.functional.pad(codes, (0, count * per_byte - codes.shape[1])).view(-1, per_byte, count)
    packed = parts[:, 0]
    for i in range(1, per_byte):
        packed = packed | (parts[:, i] << (width * i))
    return packed


def _unpacked(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Return codes from bytes, uint8[rows, bytes]."""
    if width == 8:
        return packed
    return torch.cat([(packed >> (width * i)) & ((1 << width) - 1) for i in range(8 // width)], 1)

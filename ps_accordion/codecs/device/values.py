"""Values on a device; `codecs/values.py` and `codecs/kernels/packed.py` say what they are and why."""

from __future__ import annotations

import math
from typing import Final

import torch

from ..values import FP16, FP32, INT8, PREAMBLE, ValueFormat

__all__ = ["load", "packed", "packed_unit", "store", "unpacked"]

_LOWEST: Final = -126
_FIRST: Final = {FP16: 127 + 14, INT8: 127 + 6}
"""A peak with exponent bits b comes into [2^14, 2^15) by 2^(141 - b). Denormal peaks, b = 0, are below `_LOWEST` in any case."""
_LARGEST: Final = 32752.0
_OCTAVE: Final = 1 << 23
_MAGNITUDE: Final = 0x7FFFFFFF


def store(values: torch.Tensor, peak: torch.Tensor, form: ValueFormat, block: torch.Tensor) -> torch.Tensor:
    """Write a block of `values`, float32[count], to the front of `block`, uint8; return what it loses, float32[count].

    `peak` is int32[] and may exceed the largest magnitude among the values.
    """
    preamble, body, count = block[:PREAMBLE].view(torch.int32), block[PREAMBLE:], values.numel()
    if form == "fp32":
        preamble.fill_(FP32)
        body[: 4 * count].view(torch.float32).copy_(values)
        return torch.zeros_like(values)
    number = FP16 if form == "fp16" else INT8
    exponent = ((peak >> 23) - _FIRST[number]).clamp_(min=_LOWEST).masked_fill_(peak == 0, 0)
    preamble.copy_(exponent * (1 << 16) + number)
    scaled = values * _power(-exponent)
    if form == "int8":
        octets = scaled.clamp_(-127.0, 127.0).round_()
        body[:count].copy_(octets.to(torch.int8).view(torch.uint8))
        body[count : count + count % 2].zero_()
        return values - octets.mul_(_power(exponent))
    halves = body[: 2 * count].view(torch.float16)
    halves.copy_(scaled.clamp_(-_LARGEST, _LARGEST))
    return values - halves.to(torch.float32).mul_(_power(exponent))


def load(block: torch.Tensor, form: ValueFormat, count: int) -> torch.Tensor:
    """Return the values of a checked block, uint8, of `form` as float32[count]."""
    body = block[PREAMBLE:]
    if form == "fp32":
        return body[: 4 * count].view(torch.float32)
    stored = body[:count].view(torch.int8) if form == "int8" else body[: 2 * count].view(torch.float16)
    return stored.to(torch.float32).mul_(_power(block[:PREAMBLE].view(torch.int32)[0] >> 16))


def packed_unit(peak: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the unit, float32[], for a largest magnitude with bits `peak`, int32[], and the least bits that can be packed."""
    unit = (peak - 7 * _OCTAVE).clamp_(_OCTAVE, 247 * _OCTAVE).view(torch.float32)
    return unit, _border(unit).clamp_(min=_OCTAVE)


def packed(values: torch.Tensor, unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return exponents and signs of values that can be packed, int64[count] with the bits of a place clear, and what is lost."""
    words = values.view(torch.int32)
    magnitude = words & _MAGNITUDE
    exponent = ((magnitude - _border(unit)) >> 23).clamp_(0, 7)
    entries = (exponent << 12) | ((words >> 16) & 0x8000)
    return entries.to(torch.int64), values - unpacked(entries, unit)


def unpacked(entries: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Return what entries, integers of at least 16 bits, stand for as float32."""
    words = entries.to(torch.int32)
    magnitude = unit.view(torch.int32) + (((words >> 12) & 7) << 23)
    return (magnitude | ((words << 16) & -(1 << 31))).view(torch.float32)


def _border(unit: torch.Tensor) -> torch.Tensor:
    """Return the magnitude bits of sqrt(1/2) times the unit."""
    return (unit.to(torch.float64) * math.sqrt(2.0)).to(torch.float32).view(torch.int32) - _OCTAVE


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """Return 2^exponent as float32[]; it is a normal number for every exponent that a block has."""
    return ((exponent + 127) << 23).view(torch.float32)

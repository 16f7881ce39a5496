"""Value blocks on a device; `codecs/values.py` says what they are and why."""

from __future__ import annotations

from typing import Final

import torch

from ..base import Payload
from ..values import FP16, FP32, PREAMBLE, ValueFormat, power, read_preamble, width

__all__ = ["load", "store"]

_LOWEST: Final = -126
_FIRST: Final = 127 + 14
"""A peak with exponent bits b comes into [2^14, 2^15) by 2^(141 - b). Denormal peaks, b = 0, are below `_LOWEST` in any case."""
_LARGEST: Final = 32752.0


def store(values: torch.Tensor, peak: torch.Tensor, form: ValueFormat, block: torch.Tensor) -> torch.Tensor:
    """Write a block of `values`, float32[count], to the front of `block`, uint8; return what it loses, float32[count].

    `peak` is int32[] and may exceed the largest magnitude among the values.
    """
    preamble = block[:PREAMBLE].view(torch.int32)
    body = block[PREAMBLE : PREAMBLE + values.numel() * width(form)]
    if form == "fp32":
        preamble.fill_(FP32)
        body.view(torch.float32).copy_(values)
        return torch.zeros_like(values)
    exponent = ((peak >> 23) - _FIRST).clamp_(min=_LOWEST).masked_fill_(peak == 0, 0)
    preamble.copy_(exponent * (1 << 16) + FP16)
    halves = body.view(torch.float16)
    halves.copy_((values * _power(-exponent)).clamp_(-_LARGEST, _LARGEST))
    return values - halves.to(torch.float32).mul_(_power(exponent))


def load(payload: Payload, uploaded: torch.Tensor, count: int) -> torch.Tensor:
    """Return the values of a checked block as float32[count] on the device that `uploaded`, a copy of `payload`, lies on."""
    form, exponent = read_preamble(payload)
    if form == FP32:
        return uploaded[PREAMBLE : PREAMBLE + 4 * count].view(torch.float32)
    halves = uploaded[PREAMBLE : PREAMBLE + 2 * count].view(torch.float16)
    return halves.to(torch.float32).mul_(float(power(exponent)))


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """Return 2^exponent as float32[]; it is a normal number for every exponent that a block has."""
    return ((exponent + 127) << 23).view(torch.float32)

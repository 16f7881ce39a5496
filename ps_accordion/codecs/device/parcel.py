"""Encode on a device, and bring to the host in one copy what it must know; decode what comes from there.

A parcel is a header and a payload:

    f64  norm of what a switch rule threw away of the residual
    i32  entries in the payload
    i32  1 if gradient + residual is finite, else 0
    ...  payload, laid out for as many entries as there may be
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import numpy as np
import torch

from ..base import Coding, Payload
from ..holding import Held, check_holding
from ..packing import INFINITE
from ..switch import Rule
from .base import DeviceCodec, upload
from .switch import settle

__all__ = ["Advance", "Opened", "accumulate", "decode", "encode", "open_parcel"]

_HEADER: Final = struct.Struct("<dii")
_MAGNITUDE: Final = 0x7FFFFFFF


class Opened(NamedTuple):
    """What a parcel held.

    Attributes:
        payload: uint8[nbytes], in the parcel's memory or, if entries were missing, in memory of its own.
        count: Entries in it, for the header of the message.
        loss: L2 norm of what the switch rule threw away.
    """

    payload: Payload
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    loss: float


class Advance(NamedTuple):
    """How the velocity of a key goes on, if what it is handed in for is finite (`Codec.momentum`).

    Attributes:
        velocity: float32[n], what it was; changed in place.
        following: float32[n], what it becomes, but zero where the payload of a codec with momentum is not.
    """

    velocity: torch.Tensor
    following: torch.Tensor


def encode(
    twin: DeviceCodec,
    gradient: torch.Tensor,
    residual: torch.Tensor | None,
    *,
    level: float,
    seed: int,
    held: Held = (),
    rule: Rule = "keep",
    advance: Advance | None = None,
    words: torch.Tensor | None = None,
) -> torch.Tensor:
    """Encode `v = gradient + residual` and leave in `residual` what the payload does not carry; the host does not wait.

    Args:
        twin: The codec.
        gradient: [n] of any floating type, contiguous, only read; it counts as float32. In held spans it may hold anything.
        residual: float32[n] on the same device, contiguous, updated in place, but not where `v` is not finite; None means zero,
            and that nothing is to be kept (dense only).
        level: The codec's setting.
        seed: 64-bit counter seed.
        held: Spans that count as zero and keep their residual (`codecs/holding.py`).
        rule: What happens to the residual first (`codecs/switch.py`).
        advance: What becomes of the velocity of which `gradient` was made.
        words: What the twin makes of the seed (`DeviceCodec.words`), if it lies on the device already.

    Returns:
        The parcel, uint8 on the device, in memory of its own.
    """
    check_holding(twin.codec, held)
    n, device = gradient.numel(), gradient.device
    parcel = torch.empty(_HEADER.size + twin.codec.payload_bound(n, level), dtype=torch.uint8, device=device)
    header, payload = parcel[: _HEADER.size], parcel[_HEADER.size :]
    header.zero_()
    if gradient.dtype == torch.float64:  # or the sum would be made in float64
        gradient = gradient.to(torch.float32)
    before = residual
    if residual is not None and rule != "keep":
        before, lost = settle(rule, residual, _without(gradient, held))
        header[:8].view(torch.float64).copy_(lost)
    v = torch.empty(n, dtype=torch.float32, device=device)
    if before is None:
        # With zero, so that -0.0 becomes 0.0 as on the host.
        torch.add(gradient.to(torch.float32), 0.0, out=v)
    else:
        torch.add(before, gradient, out=v)  # widens half precision as it goes
    for start, length in held:
        v[start : start + length].zero_()
    peak = _peak(v)
    finite = peak < INFINITE
    if words is None:
        words = _uploaded(twin.words(seed, elements=n, level=level), device)
    rest, count = twin.pack(v, peak, payload, level=level, seed=seed, words=words)
    entries, flag = header[8:12].view(torch.int32), header[12:].view(torch.int32)
    flag.copy_(finite)
    if isinstance(count, int):
        entries.fill_(count)
    else:
        entries.copy_(count)
    if advance is not None:
        # Where D(payload) is not zero: it and the rest add up to v, exactly.
        following = advance.following.masked_fill(v != rest, 0.0) if twin.codec.momentum else advance.following
        torch.where(finite, following, advance.velocity, out=advance.velocity)
    if residual is not None and before is not None:
        for start, length in held:
            rest[start : start + length].copy_(before[start : start + length])
        torch.where(finite, rest, residual, out=residual)
    return parcel


def _uploaded(words: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return words as int32 on the device; the host does not wait for it."""
    if not words:
        return torch.empty(0, dtype=torch.int32, device=device)
    return upload(np.array(words, np.int32).view(np.uint8), device).view(torch.int32)


def decode(twin: DeviceCodec, payload: Payload, coding: Coding, out: torch.Tensor) -> None:
    """Write D(payload) over the whole of `out`, float32[n]; the host does not wait. The payload lies there, and is validated."""
    twin.decode(payload, upload(payload, out.device), coding, out)


def accumulate(twin: DeviceCodec, payload: Payload, coding: Coding, weight: np.float32, total: torch.Tensor) -> None:
    """Add `weight * D(payload)` to `total`, float32[n]; the host does not wait. The payload lies there, and is validated."""
    twin.accumulate(payload, upload(payload, total.device), coding, weight, total)


def open_parcel(twin: DeviceCodec, parcel: Payload, *, elements: int, level: float) -> Opened | None:
    """Return what a parcel that has come to the host holds; None if the vector was not finite."""
    loss, count, finite = _HEADER.unpack_from(parcel.data)
    if not finite:
        return None
    return Opened(twin.trim(parcel[_HEADER.size :], count=count, elements=elements, level=level), count, loss)


def _peak(v: torch.Tensor) -> torch.Tensor:
    """Return the bits of the largest magnitude as int32[]; those of NaN are above those of infinity."""
    low, high = torch.aminmax(v)
    return torch.maximum(low.neg(), high).view(torch.int32) & _MAGNITUDE


def _without(gradient: torch.Tensor, held: Held) -> torch.Tensor:
    if not held:
        return gradient
    gradient = gradient.clone()
    for start, length in held:
        gradient[start : start + length].zero_()
    return gradient

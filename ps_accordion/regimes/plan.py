"""A plan as bytes: what a shard puts behind the result that carries it.

One msgpack array:

    [1, version, expires_round, batch_multiplier, period, reason, palette, indices, critical]

    palette   [[codec, level], ...]   1 to 16 different choices, each used by some tensor
    indices   bytes[tensors]          which choice of the palette a tensor has
    critical  bytes[ceil(tensors / 8)]  bit i % 8 (lowest first) of byte i / 8 is the regime of tensor i; spare bits are 0

The leading 1 is the version of this format. Numbers are integers but for the levels, which are floats.
A plan for 160 tensors takes about 270 bytes.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np

from ..errors import WireError
from .base import Choice, Plan

__all__ = [
    "MAX_BATCH_MULTIPLIER",
    "MAX_CODEC_NAME",
    "MAX_PALETTE",
    "MAX_PERIOD",
    "MAX_REASON",
    "decode_plan",
    "encode_plan",
    "plan_bound",
]

FORMAT = 1
MAX_PALETTE = 16
"""Different choices in one plan. Accordion needs two; a ladder of levels is still read by people."""
MAX_CODEC_NAME = 64
MAX_REASON = 256
"""Bytes of the reason: one sentence."""
MAX_BATCH_MULTIPLIER = 4096
MAX_PERIOD = 1 << 20
MAX_NUMBER = (1 << 63) - 1
"""Versions and rounds fit a signed 64-bit integer in every language."""
_MAX_LEVEL = 1e9
_OVERHEAD = 256
"""More than all msgpack heads and fixed numbers of a plan take."""


def plan_bound(tensors: int) -> int:
    """Return the most bytes that a plan for `tensors` tensors can take."""
    return _OVERHEAD + MAX_REASON + MAX_PALETTE * (MAX_CODEC_NAME + 16) + tensors + (tensors + 7) // 8


def encode_plan(plan: Plan) -> bytes:
    """Return `plan` as bytes that `decode_plan` reads back to an equal plan.

    Raises:
        WireError: The plan is outside the limits of this format; its policy must give other numbers.
    """
    palette = list(dict.fromkeys(plan.choices))
    if len(plan.critical) != len(plan.choices):
        raise WireError(f"a plan has as many regimes as choices, got {len(plan.critical)} and {len(plan.choices)}")
    numbers = {choice: index for index, choice in enumerate(palette)}
    indices = np.fromiter((numbers[choice] for choice in plan.choices), dtype=np.int64, count=len(plan.choices))
    _check(plan, palette)
    critical = np.packbits(np.array(plan.critical, dtype=bool), bitorder="little")
    return bytes(
        msgpack.packb(
            [
                FORMAT,
                plan.version,
                plan.expires_round,
                plan.batch_multiplier,
                plan.period,
                plan.reason,
                [[choice.codec, float(choice.level)] for choice in palette],
                indices.astype(np.uint8).tobytes(),
                critical.tobytes(),
            ]
        )
    )


def decode_plan(data: bytes, tensors: int) -> Plan:
    """Read a plan that came over a socket.

    Args:
        data: The bytes.
        tensors: Tensors of the layout that it must be for; from the agreed layout, never from the wire.

    Raises:
        WireError: The bytes are not a plan for so many tensors within the limits. Safe on any bytes.
    """
    if len(data) > plan_bound(tensors):
        raise WireError(f"a plan for {tensors} tensors has at most {plan_bound(tensors)} bytes, this one has {len(data)}")
    try:
        fields = msgpack.unpackb(
            data,
            max_array_len=MAX_PALETTE,
            max_str_len=max(MAX_REASON, MAX_CODEC_NAME),
            max_bin_len=max(tensors, 1),
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(f"not a plan ({len(data)} bytes): {error or type(error).__name__}") from None
    if not isinstance(fields, list) or len(fields) != 9:
        raise WireError(f"a plan is an array of 9 fields, got {_brief(fields)}")
    if _integer(fields[0], "format", FORMAT) != FORMAT:
        raise WireError(f"a plan has format {FORMAT}, got {fields[0]!r}")
    palette = _palette(fields[6])
    indices = np.frombuffer(_bytes(fields[7], "choices", tensors), dtype=np.uint8)
    if set(np.unique(indices).tolist()) != set(range(len(palette))):
        raise WireError(f"the choices of a plan use all of its palette of {len(palette)} and nothing else")
    packed = np.frombuffer(_bytes(fields[8], "regimes", (tensors + 7) // 8), dtype=np.uint8)
    bits = np.unpackbits(packed, bitorder="little")
    if bits[tensors:].any():
        raise WireError("the spare bits behind the regimes of a plan are zero, got ones")
    plan = Plan(
        version=_integer(fields[1], "version", MAX_NUMBER),
        choices=tuple(palette[index] for index in indices.tolist()),
        critical=tuple(map(bool, bits[:tensors].tolist())),
        expires_round=_integer(fields[2], "expires_round", MAX_NUMBER),
        batch_multiplier=_integer(fields[3], "batch_multiplier", MAX_BATCH_MULTIPLIER),
        period=_integer(fields[4], "period", MAX_PERIOD),
        reason=_string(fields[5], "reason", MAX_REASON),
    )
    _check(plan, palette)
    return plan


def _check(plan: Plan, palette: list[Choice]) -> None:
    """Raise `WireError` unless the plan is one that this format carries: for both directions."""
    if not 1 <= len(palette) <= MAX_PALETTE:
        raise WireError(f"a plan has 1 to {MAX_PALETTE} different choices, got {len(palette)}")
    _integer(plan.version, "version", MAX_NUMBER)
    _integer(plan.expires_round, "expires_round", MAX_NUMBER)
    multiplier = _integer(plan.batch_multiplier, "batch_multiplier", MAX_BATCH_MULTIPLIER)
    period = _integer(plan.period, "period", MAX_PERIOD)
    if multiplier < 1 or period < 1:
        raise WireError(f"batch multiplier and period are at least 1, got {multiplier} and {period}")
    _string(plan.reason, "reason", MAX_REASON)
    for choice in palette:
        _string(choice.codec, "codec", MAX_CODEC_NAME)
        if not choice.codec or not (math.isfinite(choice.level) and 0 < choice.level <= _MAX_LEVEL):
            raise WireError(f"a choice is a codec and a level above 0, finite and at most {_MAX_LEVEL:g}; got {choice!r}")


def _palette(value: Any) -> list[Choice]:
    if not isinstance(value, list):
        raise WireError(f"the palette of a plan is an array, got {_brief(value)}")
    palette = []
    for pair in value:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], float)):
            raise WireError(f"a choice is [codec, level] with a float level, got {_brief(pair)}")
        palette.append(Choice(_string(pair[0], "codec", MAX_CODEC_NAME), pair[1]))
    if len(set(palette)) != len(palette):
        raise WireError(f"the choices in a palette differ, got {_brief(value)}")
    return palette


def _integer(value: Any, name: str, largest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
        raise WireError(f"{name} of a plan is an integer from 0 to {largest}, got {_brief(value)}")
    return value


def _string(value: Any, name: str, largest: int) -> str:
    if not isinstance(value, str) or len(value.encode(errors="surrogatepass")) > largest:
        raise WireError(f"{name} of a plan is text of at most {largest} bytes, got {_brief(value)}")
    return value


def _bytes(value: Any, name: str, length: int) -> bytes:
    if not isinstance(value, bytes) or len(value) != length:
        raise WireError(f"the {name} of a plan are {length} bytes, got {_brief(value)}")
    return value


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

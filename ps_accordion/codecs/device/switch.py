"""The residual at a switch, on a device; `codecs/switch.py` says what the rules are."""

from __future__ import annotations

import numpy as np
import torch

from ...errors import CodecError
from ..switch import CLIP, RULES, Rule

__all__ = ["norm", "settle"]

_LANES = 64


def norm(vector: torch.Tensor) -> torch.Tensor:
    """Return the L2 norm of `vector` as float64[], summed in the order of `codecs/norms.py`.

    A running sum down the rows of [n / 64, 64] adds each lane in order, one thread a lane: a millisecond or two for a long key,
    where a tree takes microseconds. But it runs at switches only, and the residual then has the bits that a host's has.

    `torch.use_deterministic_algorithms` forbids running sums of floats on accelerators, whatever the dimension. Rows are then
    added in halves: the same on every run, but the last bits of the norm may not be the host's. The float32 factor that follows
    from two norms still is, but for about one switch in 10^8.
    """
    n = vector.numel()
    rows = torch.zeros(-(-n // _LANES), _LANES, dtype=torch.float64, device=vector.device)
    rows.view(-1)[:n].copy_(vector)
    rows.mul_(rows)
    forbidden = vector.device.type != "cpu" and torch.are_deterministic_algorithms_enabled()
    lanes = _in_halves(rows) if forbidden else torch.cumsum(rows, 0)[-1]
    while lanes.numel() > 1:
        half = lanes.numel() // 2
        lanes = lanes[:half] + lanes[half:]
    if lanes.device.type == "cpu":
        # torch may hand this to a library that rounds one root in a hundred wrongly; numpy's is the processor's own.
        return torch.from_numpy(np.sqrt(lanes.numpy()))[0]
    return lanes[0].sqrt()


def _in_halves(rows: torch.Tensor) -> torch.Tensor:
    while (count := rows.size(0)) > 1:
        half = count // 2
        rows = torch.cat((rows[:half] + rows[half : 2 * half], rows[2 * half :]))
    return rows[0]


def settle(rule: Rule, residual: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is left of a residual at a switch to lighter compression, and the L2 norm of what is thrown away.

    Args:
        rule: `clip` or `reset`.
        residual: float32[n], only read.
        reference: [n], only read: this worker's gradient.

    Returns:
        float32[n] in memory of its own, and float64[].

    Raises:
        CodecError: There is no such rule, or it asks for nothing.
    """
    if rule == "reset":
        return torch.zeros_like(residual), norm(residual)
    if rule != "clip":
        raise CodecError(f"expected a rule that changes residuals at a switch, among {', '.join(RULES[1:])}, got {rule!r}")
    length, allowed = norm(residual), norm(reference).mul_(CLIP)
    # A reference that is not finite makes the round a skip; it must not make the residual one too.
    too_long = torch.isfinite(allowed) & (length > allowed)
    factor = torch.where(too_long, allowed / length, 1.0).to(torch.float32)
    left = residual * factor
    return left, norm(residual.to(torch.float64) - left)

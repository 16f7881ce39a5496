"""What happens to a stored residual when a tensor's compression turns lighter.

Under heavy compression a residual grows to many times a gradient. Light compression would send most of it at once,
a step as long as dozens of ordinary ones, which can wreck a run. The rules:

* `keep`: nothing happens.
* `reset`: the residual becomes zero.
* `clip`: the residual is scaled down to `CLIP` times the norm of the reference, if it is longer. The reference is the current
  gradient at a worker, and the mean of the round's pushes at a server.

Arithmetic of `clip`, which a replay repeats to the bit: both norms are float64 (`norms.py`);
allowed = CLIP * (scale * norm(reference)); factor = float32(allowed / norm(residual)); residual := residual * factor in float32.
What a rule throws away is returned, for the loss ledger.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import numpy as np

from ..errors import CodecError
from .base import FloatVector
from .norms import norm, shrink
from .registry import DEFAULT, Choice, Codecs, find

__all__ = ["CLIP", "RULES", "Rule", "lighter", "settle"]

Rule = Literal["keep", "clip", "reset"]
RULES: Final = ("keep", "clip", "reset")

CLIP: Final = 1.0
"""A residual as long as one gradient at most doubles the step's input, whatever had piled up; training survives a doubled step
where it does not survive one dozens of times too long."""


def lighter(new: Choice, old: Choice, elements: int, *, codecs: Codecs | None = None) -> bool:
    """Return whether `new` sends more than `old` for a key of `elements`."""
    known = DEFAULT if codecs is None else codecs
    return find(known, new[0]).payload_bound(elements, new[1]) > find(known, old[0]).payload_bound(elements, old[1])


def settle(rule: Rule, residual: FloatVector, reference: FloatVector, *, scale: float = 1.0) -> float:
    """Treat a residual at a switch to lighter compression; return the L2 norm of what is thrown away.

    Args:
        rule: `keep`, `clip` or `reset`.
        residual: float32[n], changed in place.
        reference: float32[n], only read.
        scale: Factor that the reference still lacks.

    Raises:
        CodecError: There is no such rule.
    """
    if rule == "keep":
        return 0.0
    if rule == "reset":
        lost = norm(residual)
        residual.fill(0.0)
        return lost
    if rule == "clip":
        return _clip(residual, CLIP * (scale * norm(reference)))
    raise CodecError(f"expected a rule for residuals at a switch among {', '.join(RULES)}, got {rule!r}")


def _clip(residual: FloatVector, allowed: float) -> float:
    length = norm(residual)
    # A reference that is not finite makes the round a skip; it must not make the residual one too.
    if not math.isfinite(allowed) or length <= allowed:
        return 0.0
    return shrink(residual, np.float32(allowed / length))

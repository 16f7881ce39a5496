"""One level for the whole run: the baseline that every adaptive policy has to beat at equal bytes.

    level(tensor) = light, always

To run at another static level, set `codec.light` to it.
"""

from __future__ import annotations

from .base import Decision, Policy, Window

__all__ = ["Static"]


class Static(Policy):
    """Leave every tensor at the light choice, which is also what all processes start from; no plan is ever sent."""

    def window(self, window: Window) -> Decision | None:
        """Ignore the statistics."""
        return None

    def rate(self, rate: float, round_: int) -> Decision | None:
        """Ignore the learning rate."""
        return None

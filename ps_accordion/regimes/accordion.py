"""Accordion: light compression while a tensor's gradient norm changes, heavy compression while it does not.

At every check, `interval` windows apart, for each tensor separately:

    ratio = | norm_old - norm_now | / norm_old
    critical  <=>  ratio >= threshold,  or  the learning rate dropped
    choice = light if critical else heavy

`norm_now` is the norm of the vector sum of raw gradients over the window that just ended, and `norm_old` the same over the
window `interval` earlier; the windows in between are not looked at.
The rule is two-valued and has no memory beyond those two windows.

Agarwal, Wang, Lee, Venkataraman, Papailiopoulos: Accordion: Adaptive Gradient Communication via Critical Learning Regime
Identification, MLSys 2021, section 4 and algorithm 1. Departures, each with its reason:

* **A drop of the learning rate is relative.** The paper returns to light compression whenever the next rate is lower; a cosine
  schedule lowers it every epoch and would never compress. Here a drop is a rate at or below `rate_drop` times the rate at the
  last reset. For step schedules that divide by two or more the two rules agree.
* **All members count.** The released code lets worker 0 decide from its own part of the data. `signal="mean"` takes the mean of
  the norms over all members, so that no single part decides; `signal="released"` takes the lowest member's row.
* **In doubt, light.** A statistic that is missing or not finite on either side of the comparison makes its tensor critical.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .base import Choice, Decision, Policy, Window

__all__ = ["Accordion"]

Vector = NDArray[np.float64]


class Accordion(Policy):
    """Detect critical regimes from norms that change, one tensor at a time.

    Args:
        tensors: How many tensors the layout has.
        light: Choice in critical regimes, and whenever in doubt.
        heavy: Choice elsewhere.
        threshold: A relative change of the norm of at least this is critical (the paper's eta).
        interval: Windows between two checks.
        signal: "mean" over all members, or "released": the lowest member alone.
        rate_drop: In (0, 1). A rate at or below this fraction of the rate at the last reset is a drop.
    """

    def __init__(
        self,
        tensors: int,
        *,
        light: Choice,
        heavy: Choice,
        threshold: float = 0.5,
        interval: int = 10,
        signal: Literal["mean", "released"] = "mean",
        rate_drop: float = 0.5,
    ) -> None:
        super().__init__(tensors, light=light, heavy=heavy)
        self.threshold = threshold
        self.interval = interval
        self.signal = signal
        self.rate_drop = rate_drop
        self._checked: tuple[int, Vector] | None = None
        self._reference_rate: float | None = None
        self._dropped_at: int | None = None

    def window(self, window: Window) -> Decision | None:
        """Check at every `interval`-th window; the others are not looked at."""
        if window.index % self.interval:
            return None
        now = self._signal(window)
        old = np.full_like(now, np.nan)
        if self._checked is not None and self._checked[0] == window.index - self.interval:
            old = self._checked[1]
        first = self._checked is None
        self._checked = (window.index, now)
        if self._dropped_at is not None and self._dropped_at >= window.round:
            # The drop was reported before the window that it follows was complete. A check on gradients from before the drop
            # must not take the light levels back; the next one may.
            return self._decide(np.ones(self.tensors, dtype=bool), old, now, "learning rate dropped as the window ended")
        if first:
            return self._decide(np.ones(self.tensors, dtype=bool), old, now, "first window")
        usable = np.isfinite(old) & np.isfinite(now)
        critical = ~usable | (_ratio(old, now) >= self.threshold)
        reason = f"check at window {window.index}: {int(critical.sum())} of {self.tensors} tensors critical"
        if not usable.all():
            reason += f", {int((~usable).sum())} for want of statistics"
        return self._decide(critical, old, now, reason)

    def rate(self, rate: float, round_: int) -> Decision | None:
        """Return light levels for all on a drop; a rate that rises (warm-up) only raises the reference."""
        reference = self._reference_rate
        if reference is None or rate > reference:
            self._reference_rate = rate
            return None
        if reference <= 0 or rate > self.rate_drop * reference:
            return None
        self._reference_rate = rate
        self._dropped_at = round_
        return self.all_light(f"learning rate dropped from {reference:g} to {rate:g}")

    def _signal(self, window: Window) -> Vector:
        if self.signal == "released":
            return np.array(window.norms[0], dtype=np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # What overflows is not finite, and then the tensor is critical.
            return np.array(np.mean(window.norms, axis=0), dtype=np.float64)

    def _decide(self, critical: NDArray[np.bool_], old: Vector, now: Vector, reason: str) -> Decision:
        flags = tuple(critical.tolist())
        statistics = {"norm_old": old, "norm_now": now, "ratio": _ratio(old, now)}
        return Decision(
            tuple(self.light if flag else self.heavy for flag in flags),
            flags,
            reason,
            {name: tuple(values.tolist()) for name, values in statistics.items()},
        )


def _ratio(old: Vector, now: Vector) -> Vector:
    """Return |old - now| / old; infinite where old is 0, NaN where either is not finite."""
    ratio = np.full_like(old, math.nan)
    usable = np.isfinite(old) & np.isfinite(now)
    ratio[usable & (old == 0)] = math.inf
    divide = usable & (old != 0)
    with np.errstate(over="ignore"):
        ratio[divide] = np.abs(old[divide] - now[divide]) / old[divide]
    return ratio

"""Accordion: light compression while a tensor's gradient norm changes, heavy compression while it does not.

At every check, `interval` windows apart, for each tensor separately:

    ratio = | norm_old - norm_now | / norm_old
    critical  <=>  ratio >= threshold,  or  the learning rate dropped
    choice = light if critical else heavy

`norm_now` is the norm of the vector sum of raw gradients over the window that just ended, and `norm_old` the same over the
window `interval` earlier; the windows in between are not looked at.
The rule is two-valued and has no memory beyond those two windows.

With `batch_multiplier` above 1 the same rule also chooses the batch, once for the whole model, beside the levels:

    NORM  = sqrt(sum over tensors of norm^2)
    batch = 1 while critical(NORM),  batch_multiplier from the first check on at which it is not

The batch only grows, as published: a smaller one after a larger one was seen to disturb training. A worker makes one step of so
many batches; its gradient is their mean, and the learning rate of that step is multiplied by their number (linear scaling: Goyal
et al., Accurate, Large Minibatch SGD, 2017). The worker does both, in `session.accumulate` (`worker/base.py`), and a shorter last
step has a smaller factor.

Agarwal, Wang, Lee, Venkataraman, Papailiopoulos: Accordion: Adaptive Gradient Communication via Critical Learning Regime
Identification, MLSys 2021, section 4 and algorithm 1. Departures, each with its reason:

* **A drop of the learning rate is relative.** The paper returns to light compression whenever the next rate is lower; a cosine
  schedule lowers it every epoch and would never compress. Here a drop is a rate at or below `rate_drop` times the rate at the
  last reset. For step schedules that divide by two or more the two rules agree.
* **All members count.** The released code lets worker 0 decide from its own part of the data. `signal="mean"` takes the mean of
  the norms over all members, so that no single part decides; `signal="released"` takes the lowest member's row.
* **In doubt, light.** A statistic that is missing or not finite on either side of the comparison makes its tensor critical.
  The batch is 1 again where that happens to the whole model's norm, and whenever all tensors turn light by decree: at a drop of
  the learning rate, and when a member joins. Published runs kept the large batch there; but a plan that expires also ends it.
* **Norms are taken per round where the batch may grow.** An epoch of larger batches has fewer rounds, so that the norm of its sum
  falls for that reason alone; divided by the rounds of its window it stays what it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .base import Choice, Decision, Policy, Window

__all__ = ["Accordion"]

Vector = NDArray[np.float64]


class Accordion(Policy):
    """Detect critical regimes from norms that change, one tensor at a time.

    Args:
        light: Choice of each tensor in critical regimes, and whenever in doubt.
        heavy: Choice of each elsewhere.
        threshold: A relative change of the norm of at least this is critical (the paper's eta).
        interval: Windows between two checks.
        signal: "mean" over all members, or "released": the lowest member alone.
        rate_drop: In (0, 1). A rate at or below this fraction of the rate at the last reset is a drop.
        batch_multiplier: Batches a step while the whole model is not critical; 1 leaves batches alone.
    """

    def __init__(
        self,
        *,
        light: Sequence[Choice],
        heavy: Sequence[Choice],
        threshold: float = 0.5,
        interval: int = 10,
        signal: Literal["mean", "released"] = "mean",
        rate_drop: float = 0.5,
        batch_multiplier: int = 1,
    ) -> None:
        super().__init__(light=light, heavy=heavy)
        self.threshold = threshold
        self.interval = interval
        self.signal = signal
        self.rate_drop = rate_drop
        self.batch_multiplier = batch_multiplier
        self._checked: tuple[int, Vector] | None = None
        self._last: tuple[int, int] = (-1, -1)
        self._grown = False
        self._reference_rate: float | None = None
        self._dropped_at: int | None = None

    def window(self, window: Window) -> Decision | None:
        """Check at every `interval`-th window; the norms of the others are not looked at."""
        rounds = self._rounds(window)
        if window.index % self.interval:
            return None
        now = self._signal(window) / rounds
        old = np.full_like(now, math.nan)
        if self._checked is not None and self._checked[0] == window.index - self.interval:
            old = self._checked[1]
        first = self._checked is None
        self._checked = (window.index, now)
        if self._dropped_at is not None and self._dropped_at >= window.round:
            # The drop was reported before the window that it follows was complete. A check on gradients from before the drop
            # must not take the light levels back; the next one may.
            self._grown = False
            return self._decide(np.ones(len(now), dtype=bool), old, now, "learning rate dropped as the window ended")
        if first:
            return self._decide(np.ones(len(now), dtype=bool), old, now, "first window")
        usable = np.isfinite(old) & np.isfinite(now)
        critical = ~usable | (_ratio(old, now) >= self.threshold)
        if self.batch_multiplier > 1:
            # The last entry stands for the whole model; it only chooses the batch. A large one stays while the norms are known.
            self._grown = bool(usable[-1] and (self._grown or not critical[-1]))
            usable = usable[:-1]
        of_tensors = critical[: self.tensors]
        reason = f"check at window {window.index}: {int(of_tensors.sum())} of {self.tensors} tensors critical"
        if not usable.all():
            reason += f", {int((~usable).sum())} for want of statistics"
        return self._decide(critical, old, now, reason)

    def rate(self, rate: float, round_: int) -> Decision | None:
        """Return light levels and single batches on a drop; a rate that rises (warm-up) only raises the reference."""
        reference = self._reference_rate
        if reference is None or rate > reference:
            self._reference_rate = rate
            return None
        if reference <= 0 or rate > self.rate_drop * reference:
            return None
        self._reference_rate = rate
        self._dropped_at = round_
        return self.all_light(f"learning rate dropped from {reference:g} to {rate:g}")

    def state(self) -> dict[str, Any]:
        """Return the norms of the last check, and what is known of rates and batches."""
        checked = None if self._checked is None else [self._checked[0], self._checked[1].tolist()]
        rates = [self._reference_rate, self._dropped_at]
        return {"checked": checked, "last": list(self._last), "grown": self._grown, "rates": rates}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        checked = state["checked"]
        self._checked = None if checked is None else (checked[0], np.array(checked[1], np.float64))
        self._last = (state["last"][0], state["last"][1])
        self._grown = state["grown"]
        self._reference_rate, self._dropped_at = state["rates"]

    def all_light(self, reason: str) -> Decision:
        """Return light compression for every tensor; the batch grows from 1 again."""
        self._grown = False
        return super().all_light(reason)

    def _rounds(self, window: Window) -> float:
        """Return by how many rounds norms are divided: those of the window, or 1 where the batch stays the same."""
        index, round_ = self._last
        self._last = (window.index, window.round)
        if self.batch_multiplier == 1:
            return 1.0
        return max(1.0, (window.round - round_) / max(1, window.index - index))

    def _signal(self, window: Window) -> Vector:
        """Return a norm a tensor, and one more of the whole model where it is needed."""
        norms = window.norms
        with np.errstate(over="ignore", invalid="ignore"):  # What overflows is not finite, and then the tensor is critical.
            if self.batch_multiplier > 1:
                norms = np.column_stack([norms, np.sqrt(np.sum(norms**2, axis=1))])
            if self.signal == "released":
                return np.array(norms[0], dtype=np.float64)
            return np.array(np.mean(norms, axis=0), dtype=np.float64)

    def _decide(self, critical: NDArray[np.bool_], old: Vector, now: Vector, reason: str) -> Decision:
        flags = tuple(critical[: self.tensors].tolist())
        statistics = {"norm_old": old, "norm_now": now, "ratio": _ratio(old, now)}
        batches = self.batch_multiplier if self._grown else 1
        if self.batch_multiplier > 1:
            reason += f"; batch x {batches}, the whole model's norm went from {old[-1]:.3g} to {now[-1]:.3g} a round"
        return Decision(
            tuple(light if flag else heavy for flag, light, heavy in zip(flags, self.light, self.heavy, strict=True)),
            flags,
            reason,
            batches,
            {name: tuple(values[: self.tensors].tolist()) for name, values in statistics.items()},
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

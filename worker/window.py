"""What a worker measures of its gradients for the regime policy: one norm a tensor and window.

    norm = || sum over the window's rounds of this worker's raw local gradient ||

Raw means before compression and before error feedback; the sum is a vector sum, so that noise of single batches cancels.

* **Sums.** `sums.py` keeps them, where the gradients lie, and of large tensors at sampled coordinates only.
* **Skipped rounds.** `add` copies into a staging buffer and `finish_round` adds it to the sums, or does not when the round was
  skipped. So what is not finite never reaches a sum, the statistic stays exact, and the price is one more pass over the
  sampled coordinates: less than keeping gradients, and better than giving up the window.
* **Windows have the same number at every worker.** In steps, window i is rounds i*N to i*N + N - 1; in epochs, epochs i*N to
  i*N + N - 1. A worker that did not see a window from its first round (it joined late) reports NaN for it, as does one whose
  rounds were all skipped.
* A tensor that was not used adds nothing; a tensor never used in a window has norm 0.

No allocation a step; the clock, the learning rate and the loss come from outside.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ps_accordion.errors import UsageError
from ps_accordion.layout import Layout
from ps_accordion.regimes.span import Span

from .memory import Gradient
from .sums import HostSums, Sums

__all__ = ["Report", "WindowStatistics"]


_STATE = ("window", "epoch", "whole", "committed", "last_round", "rate", "loss_sum", "loss_count")
"""What an open window is, beside its sums."""


class Report(NamedTuple):
    """What a worker tells the coordinator of one window.

    Attributes:
        window: Number of the window, from 0.
        round: Last round of the window that this worker finished.
        norms: float32[tensors], owned by the receiver; NaN where there is no statistic.
        rate: Learning rate in the last round; NaN where unknown.
        loss: Mean of the finite losses that were given; NaN if there were none.
    """

    window: int
    round: int
    norms: NDArray[np.float32]
    rate: float
    loss: float


class WindowStatistics:
    """Sums the gradients of one layout over windows.

    Args:
        layout: The tensors.
        span: Length of a window.
        sums: Where they are kept; None makes sums on the host.
    """

    def __init__(self, layout: Layout, span: Span, sums: Sums | None = None) -> None:
        self._span = span
        self._sums: Sums = HostSums(layout) if sums is None else sums
        self._tensors = len(layout.tensors)
        self._added: set[int] = set()
        self._window: int | None = None
        self._epoch: int | None = None
        self._whole = False
        self._committed = 0
        self._last_round = -1
        self._rate = math.nan
        self._loss_sum = 0.0
        self._loss_count = 0

    @property
    def waits_for_epoch(self) -> bool:
        """Whether windows are counted in epochs and nobody has begun one: then nothing is measured and no report ever comes."""
        return self._span.unit == "epoch" and self._epoch is None

    def add(self, tensor: int, gradient: Gradient) -> None:
        """Take in the gradient of one tensor in the open round; a second call in a round replaces the first.

        Args:
            tensor: Its index in the layout.
            gradient: [elements], contiguous, the whole flattened tensor, as the sums take it; only read, and not kept.

        Raises:
            UsageError: Wrong length or type, or not contiguous.
        """
        self._sums.stage(tensor, gradient)
        self._added.add(tensor)

    def begin_epoch(self, epoch: int) -> Report | None:
        """Say that the rounds from now on belong to `epoch`, counted from 0.

        Returns:
            The report of the window that ended with the epoch before, if one did. Always None for windows in steps.

        Raises:
            UsageError: The epoch is lower than the one before.
        """
        if self._span.unit != "epoch":
            return None
        if epoch < 0 or (self._epoch is not None and epoch < self._epoch):
            raise UsageError(f"epochs count up from 0: epoch {epoch} was begun after {self._epoch}")
        before, self._epoch = self._window, epoch
        window = epoch // self._span.length
        if window == before:
            return None
        report = self._close() if before is not None else None
        self._open(window, whole=epoch % self._span.length == 0)
        return report

    def finish_round(
        self, round_: int, *, rate: float = math.nan, loss: float = math.nan, skipped: bool = False
    ) -> Report | None:
        """Count what was added since the last call, or drop it if the round was skipped.

        Args:
            round_: The round that was decided, from 0.
            rate: Learning rate used in it.
            loss: This worker's loss in it.
            skipped: Whether it was skipped: then nothing is added, but the round still counts towards the window's length.

        Returns:
            The report of the window that this round ended, if it did (windows in steps only).
        """
        if self._span.unit == "step":
            window, position = divmod(round_, self._span.length)
            if window != self._window:
                self._open(window, whole=position == 0)
        if not skipped:
            self._sums.commit(self._added)
            self._committed += 1
            if math.isfinite(loss):
                self._loss_sum += loss
                self._loss_count += 1
        self._added.clear()
        self._last_round = round_
        self._rate = rate
        if self._span.unit == "step" and (round_ + 1) % self._span.length == 0:
            report = self._close()
            self._window = None
            return report
        return None

    def state(self) -> tuple[dict[str, Any], torch.Tensor]:
        """Return the open window between two rounds: plain types, and the sums, float32[watched elements] on the host."""
        return {name: getattr(self, f"_{name}") for name in _STATE}, self._sums.state()

    def restore(self, state: dict[str, Any], sums: torch.Tensor) -> None:
        """Go on from what `state` returned."""
        for name in _STATE:
            setattr(self, f"_{name}", state[name])
        self._sums.restore(sums)

    def _open(self, window: int, *, whole: bool) -> None:
        self._window = window
        self._whole = whole
        self._committed = 0
        self._loss_sum = 0.0
        self._loss_count = 0
        self._sums.clear()

    def _close(self) -> Report | None:
        if self._window is None or self._last_round < 0:
            return None
        known = self._whole and self._committed
        norms = self._sums.norms() if known else np.full(self._tensors, np.nan, dtype=np.float32)
        loss = self._loss_sum / self._loss_count if self._loss_count else math.nan
        return Report(self._window, self._last_round, norms, self._rate, loss)

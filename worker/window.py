"""What a worker measures of its gradients for the regime policy: one norm a tensor and window.

    norm = || sum over the window's rounds of this worker's raw local gradient ||

Raw means before compression and before error feedback; the sum is a vector sum, so that noise of single batches cancels.

* **Sampling.** A tensor of more than `FULL_BELOW` elements is watched at `SAMPLED` fixed coordinates only: contiguous runs of
  `RUN`, one at a fixed pseudo-random place in each of `SAMPLED / RUN` equal parts of the tensor, and the norm is scaled by
  sqrt(elements / SAMPLED). Runs at equal distances would fall on the same columns of a matrix whose width divides the distance.
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

import itertools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ps_accordion.errors import UsageError
from ps_accordion.layout import Layout
from ps_accordion.regimes.span import Span
from ps_accordion.seeds import mix64

__all__ = ["FULL_BELOW", "RUN", "SAMPLED", "Report", "WindowStatistics"]

FULL_BELOW = 1 << 16
"""Largest tensor of which every element is watched."""
SAMPLED = 1 << 14
"""Coordinates watched of a larger tensor: the norm is then known to about 1 % when entries are alike, and to about 5 % when all
of it sits in a third of a matrix's columns. Both sides of a comparison see the same coordinates."""
RUN = 64
"""Contiguous elements a sample: four cache lines, so that fetching them costs little more than one."""


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
    """

    def __init__(self, layout: Layout, span: Span) -> None:
        self._span = span
        self._elements = [tensor.elements for tensor in layout.tensors]
        watched = [SAMPLED if elements > FULL_BELOW else elements for elements in self._elements]
        # One array for all tensors, so that clearing is one pass; each tensor has a view of its part.
        self._all_sums = np.zeros(sum(watched), dtype=np.float32)
        staged = np.empty_like(self._all_sums)
        cuts = np.cumsum(watched)[:-1]
        self._sums = np.split(self._all_sums, cuts)
        self._staged = np.split(staged, cuts)
        self._runs = [_runs(index, elements) for index, elements in enumerate(self._elements)]
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

    def add(self, tensor: int, gradient: NDArray[np.float32]) -> None:
        """Take in the gradient of one tensor in the open round; a second call in a round replaces the first.

        Args:
            tensor: Its index in the layout.
            gradient: float32[elements], contiguous, the whole flattened tensor; only read, and not kept.

        Raises:
            UsageError: Wrong length, or not contiguous float32.
        """
        if gradient.shape != (self._elements[tensor],) or gradient.dtype != np.float32 or not gradient.flags.c_contiguous:
            raise UsageError(
                f"expected the whole gradient of tensor {tensor} as contiguous float32[{self._elements[tensor]}], "
                f"got {gradient.dtype}{list(gradient.shape)}; pass a flattened view"
            )
        runs = self._runs[tensor]
        if runs is None:
            np.copyto(self._staged[tensor], gradient)
        else:
            blocks = gradient[: gradient.size // RUN * RUN].reshape(-1, RUN)
            # mode="clip" lets numpy write to `out` directly; every index is in range.
            np.take(blocks, runs, axis=0, out=self._staged[tensor].reshape(-1, RUN), mode="clip")
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
            for tensor in self._added:
                total = self._sums[tensor]
                np.add(total, self._staged[tensor], out=total)
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

    def _open(self, window: int, *, whole: bool) -> None:
        self._window = window
        self._whole = whole
        self._committed = 0
        self._loss_sum = 0.0
        self._loss_count = 0
        self._all_sums[:] = 0

    def _close(self) -> Report | None:
        if self._window is None or self._last_round < 0:
            return None
        norms = np.full(len(self._sums), np.nan, dtype=np.float32)
        if self._whole and self._committed:
            with np.errstate(over="ignore"):  # What does not fit float32 is not finite, and then the tensor is critical.
                norms[:] = [self._norm(tensor) for tensor in range(len(self._sums))]
        loss = self._loss_sum / self._loss_count if self._loss_count else math.nan
        return Report(self._window, self._last_round, norms, self._rate, loss)

    def _norm(self, tensor: int) -> float:
        total = self._sums[tensor].astype(np.float64)
        return math.sqrt(float(np.sum(total * total)) * (self._elements[tensor] / total.size))


def _runs(tensor: int, elements: int) -> NDArray[np.intp] | None:
    """Return which blocks of `RUN` elements of a large tensor are watched, ascending; None where all are."""
    if elements <= FULL_BELOW:
        return None
    parts, blocks = SAMPLED // RUN, elements // RUN
    edges = itertools.pairwise(part * blocks // parts for part in range(parts + 1))
    chosen = [start + mix64(mix64(tensor) ^ part) % (end - start) for part, (start, end) in enumerate(edges)]
    return np.array(chosen, dtype=np.intp)

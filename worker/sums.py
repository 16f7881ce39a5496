"""Sums of gradients over a window, at the coordinates that are watched, and their norms.

A tensor of more than `FULL_BELOW` elements is watched at `SAMPLED` fixed coordinates only: contiguous runs of `RUN`, one at a
fixed pseudo-random place in each of `SAMPLED / RUN` equal parts of the tensor, and the norm is scaled by
sqrt(elements / SAMPLED). Runs at equal distances would fall on the same columns of a matrix whose width divides the distance.

No allocation a step that grows with the tensors, on the host; on a device, its own allocator has what is needed.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Collection
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ps_accordion.errors import UsageError
from ps_accordion.layout import Layout
from ps_accordion.seeds import mix64

from .memory import Gradient

__all__ = ["FULL_BELOW", "RUN", "SAMPLED", "DeviceSums", "HostSums", "Sums"]

FULL_BELOW = 1 << 16
"""Largest tensor of which every element is watched."""
SAMPLED = 1 << 14
"""Coordinates watched of a larger tensor: the norm is then known to about 1 % when entries are alike, and to about 5 % when all
of it sits in a third of a matrix's columns. Both sides of a comparison see the same coordinates."""
RUN = 64
"""Contiguous elements a sample: four cache lines, so that fetching them costs little more than one."""


class Sums(Protocol):
    """What a window asks of its sums. All are called between rounds, but for `stage`."""

    def stage(self, tensor: int, gradient: Gradient) -> None:
        """Keep what is watched of a gradient of the open round; on backward's thread.

        Raises:
            UsageError: It is not the whole gradient as contiguous [elements].
        """

    def commit(self, tensors: Collection[int]) -> None:
        """Add what was staged of these tensors to their sums."""

    def clear(self) -> None:
        """Begin sums of zero."""

    def state(self) -> torch.Tensor:
        """Return the sums, float32[watched elements] on the host, a copy."""

    def restore(self, sums: torch.Tensor) -> None:
        """Take over what `state` returned."""

    def norms(self) -> NDArray[np.float32]:
        """Return the norm of every sum, float32[tensors], owned by the caller; infinite where it does not fit."""


class HostSums:
    """Sums of gradients that are arrays of the host.

    Args:
        layout: The tensors.
    """

    def __init__(self, layout: Layout) -> None:
        self._elements = [tensor.elements for tensor in layout.tensors]
        watched = [_watched(elements) for elements in self._elements]
        # One array for all tensors, so that clearing is one pass; each tensor has a view of its part.
        self._all = np.zeros(sum(watched), dtype=np.float32)
        cuts = np.cumsum(watched)[:-1]
        self._sums = np.split(self._all, cuts)
        self.staged = np.split(np.empty_like(self._all), cuts)
        self._runs = [_runs(index, elements) for index, elements in enumerate(self._elements)]

    def stage(self, tensor: int, gradient: Gradient) -> None:
        """See `Sums.stage`."""
        if (
            not isinstance(gradient, np.ndarray)
            or gradient.shape != (self._elements[tensor],)
            or gradient.dtype != np.float32
            or not gradient.flags.c_contiguous
        ):
            raise UsageError(
                f"expected the whole gradient of tensor {tensor} as contiguous float32[{self._elements[tensor]}], "
                f"got {gradient.dtype}{list(gradient.shape)}; pass a flattened view"
            )
        runs = self._runs[tensor]
        if runs is None:
            np.copyto(self.staged[tensor], gradient)
        else:
            blocks = gradient[: gradient.size // RUN * RUN].reshape(-1, RUN)
            # mode="clip" lets numpy write to `out` directly; every index is in range.
            np.take(blocks, runs, axis=0, out=self.staged[tensor].reshape(-1, RUN), mode="clip")

    def commit(self, tensors: Collection[int]) -> None:
        """See `Sums.commit`."""
        for tensor in tensors:
            total = self._sums[tensor]
            np.add(total, self.staged[tensor], out=total)

    def clear(self) -> None:
        """See `Sums.clear`."""
        self._all[:] = 0

    def state(self) -> torch.Tensor:
        """See `Sums.state`."""
        return torch.from_numpy(self._all.copy())

    def restore(self, sums: torch.Tensor) -> None:
        """See `Sums.restore`."""
        self._all[:] = sums.numpy()

    def norms(self) -> NDArray[np.float32]:
        """See `Sums.norms`."""
        squares = []
        for part in self._sums:
            total = part.astype(np.float64)
            squares.append(float(np.sum(total * total)))
        return _norms(squares, self._elements)


class DeviceSums:
    """Sums of gradients that are tensors of one device.

    The host waits for the device in `norms` only. What is to be done between two rounds is noted, and launched by the next
    `stage`, on backward's stream. No other order is needed: a round is decided when its pushes have come to the host, and these
    come after what was staged in the same stream.

    Args:
        layout: The tensors.
        device: Where they lie.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._elements = [tensor.elements for tensor in layout.tensors]
        watched = [_watched(elements) for elements in self._elements]
        self._all = torch.empty(sum(watched), dtype=torch.float32, device=device)
        self._sums = torch.split(self._all, watched)
        self._staged = torch.split(torch.empty_like(self._all), watched)
        runs = [_runs(index, elements) for index, elements in enumerate(self._elements)]
        self._runs = [None if each is None else torch.from_numpy(each).to(device, torch.int64) for each in runs]
        self._owed: deque[Collection[int] | None] = deque()
        """Tensors whose staged part is to be added, or None where sums begin anew; in order."""

    @torch.no_grad()
    def stage(self, tensor: int, gradient: Gradient) -> None:
        """See `Sums.stage`."""
        if (
            not isinstance(gradient, torch.Tensor)
            or gradient.shape != (self._elements[tensor],)
            or not gradient.is_floating_point()
            or not gradient.is_contiguous()
        ):
            raise UsageError(
                f"expected the whole gradient of tensor {tensor} as a contiguous floating tensor of [{self._elements[tensor]}], "
                f"got {gradient.dtype}{list(gradient.shape)}; pass a flattened view"
            )
        self._settle()
        runs = self._runs[tensor]
        if runs is None:
            self._staged[tensor].copy_(gradient)
        else:
            blocks = gradient[: gradient.numel() // RUN * RUN].view(-1, RUN)
            self._staged[tensor].view(-1, RUN).copy_(blocks.index_select(0, runs))

    def commit(self, tensors: Collection[int]) -> None:
        """See `Sums.commit`."""
        self._owed.append(tuple(tensors))

    def clear(self) -> None:
        """See `Sums.clear`."""
        self._owed.append(None)

    @torch.no_grad()
    def state(self) -> torch.Tensor:
        """See `Sums.state`. Waits for the device, once."""
        self._settle()
        return self._all.to("cpu", copy=True)

    @torch.no_grad()
    def restore(self, sums: torch.Tensor) -> None:
        """See `Sums.restore`."""
        self._owed.clear()
        self._all.copy_(sums)

    @torch.no_grad()
    def norms(self) -> NDArray[np.float32]:
        """See `Sums.norms`. Waits for the device, once."""
        self._settle()
        squares = torch.stack([total.to(torch.float64).square_().sum() for total in self._sums])
        return _norms(squares.tolist(), self._elements)

    def _settle(self) -> None:
        while self._owed:
            tensors = self._owed.popleft()
            if tensors is None:
                self._all.zero_()
            elif tensors:
                torch._foreach_add_([self._sums[each] for each in tensors], [self._staged[each] for each in tensors])


def _norms(squares: list[float], elements: list[int]) -> NDArray[np.float32]:
    """Return norms from the sums of squares of what is watched."""
    norms = [math.sqrt(square * (count / _watched(count))) for square, count in zip(squares, elements, strict=True)]
    with np.errstate(over="ignore"):  # What does not fit float32 is not finite, and then the tensor is critical.
        return np.array(norms, dtype=np.float64).astype(np.float32)


def _watched(elements: int) -> int:
    return SAMPLED if elements > FULL_BELOW else elements


def _runs(tensor: int, elements: int) -> NDArray[np.intp] | None:
    """Return which blocks of `RUN` elements of a large tensor are watched, ascending; None where all are."""
    if elements <= FULL_BELOW:
        return None
    parts, blocks = SAMPLED // RUN, elements // RUN
    edges = itertools.pairwise(part * blocks // parts for part in range(parts + 1))
    chosen = [start + mix64(mix64(tensor) ^ part) % (end - start) for part, (start, end) in enumerate(edges)]
    return np.array(chosen, dtype=np.intp)

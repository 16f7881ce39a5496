"""One layout of a session, as wrappers see it: with servers or without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ps_accordion.layout import Layout

from .memory import Gradient

__all__ = ["Exchanging"]


class Exchanging(Protocol):
    """One layout of a session, as the wrapper sees it.

    Attributes:
        layout: The layout.
        settled: Says whether what was decided has reached its place.
        take: Returns the model's state after the last round, as bytes, for a worker that joins.
        apply: Takes over what `take` returned in another worker.
        rate: Returns the learning rate of the next step, NaN where it is not known.
        takes_tensors: Whether gradients are handed over as tensors, where they lie, or as float32 arrays of the host.
    """

    layout: Layout
    takes_tensors: bool
    settled: Callable[[], bool]
    take: Callable[[], bytes]
    apply: Callable[[bytes], None]
    rate: Callable[[], float]

    @property
    def leads(self) -> bool:
        """Whether this worker's buffers are the ones for all."""

    @property
    def batch_multiplier(self) -> int:
        """Batches that the next step takes, as the plan says."""

    def add(self, tensor: int, gradient: Gradient, *, used: bool = True) -> None:
        """Hand over a gradient; see `Exchange.add`."""

    def wait(self) -> str:
        """Wait until the round is decided; return DATA or SKIP."""

    def follow(self, batch_multiplier: int) -> None:
        """Take over what the leader of this host says of the next step; only where this process follows one."""

    def weigh(self, weight: float) -> None:
        """Let this worker's gradients count that much, from the next round on."""

    def join(self, *, divide_by_initial_world_size: bool) -> None:
        """Take no part in the rounds to come, but go through them, until all others do the same."""

    def wait_for_join(self) -> int | None:
        """Wait for that; return the slot whose state this worker must take over, or None if its own is up to date."""

"""The batches of one optimizer step, of which the last alone is shared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from .gradients import Gradients

__all__ = ["Batch", "MicroBatches"]

Batch = TypeVar("Batch")


class MicroBatches(Generic[Batch]):
    """The batches of one optimizer step. While one iterates, models synchronise in the last batch's backward only."""

    def __init__(self, batches: list[Batch], models: list[Gradients]) -> None:
        self._batches = batches
        self._models = models

    def __len__(self) -> int:
        """Return how many batches the step takes."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches."""
        with contextlib.ExitStack() as alone:
            for model in self._models:
                alone.enter_context(model.no_sync())
            yield from self._batches[:-1]
        yield from self._batches[-1:]

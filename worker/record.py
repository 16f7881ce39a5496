"""Everything that goes into a run's arithmetic, written to files: for an exact replay of the run (`run.record_gradients`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ps_accordion.codecs.base import FloatVector, Payload
from ps_accordion.wire import messages as m

__all__ = ["Record"]


class Record:
    """Writes gradients, results and residuals of one worker, a file each.

    Args:
        directory: Where; None writes nothing.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def gradient(self, layout: int, round_: int, key: int, used: int, gradient: FloatVector) -> None:
        """Write a key's raw gradient, before compression."""
        if self._directory is not None:
            np.savez(self._directory / f"gradient-{layout}-{round_}-{key}.npz", gradient=gradient, used=used)

    def result(self, result: m.Result, payload: Payload) -> None:
        """Write a result as it came."""
        if self._directory is not None:
            np.savez(
                self._directory / f"result-{result.layout}-{result.round}-{result.key}.npz",
                payload=payload, codec=result.codec, level=result.level, used=result.used, count=result.count, seed=result.seed,
            )  # fmt: skip

    def residual(self, layout: int, key: int, residual: FloatVector | None) -> None:
        """Write the residual that a key was left with."""
        if self._directory is not None and residual is not None:
            np.save(self._directory / f"residual-{layout}-{key}.npy", residual)

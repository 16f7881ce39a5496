"""Everything that goes into a run's arithmetic, written to files: for an exact replay of the run (`run.record_gradients`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ps_accordion.codecs.base import FloatVector, Payload
from ps_accordion.wire import messages as m

__all__ = ["Record"]


class Record:
    """Writes gradients, pushes, results and residuals of one worker, a file each.

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
            self._write(f"gradient-{layout}-{round_}-{key}.npz", gradient=gradient, used=used)

    def push(self, push: m.Push, payload: Payload | None) -> None:
        """Write a push before it is sent: what was counted is on the disk, even if this process is killed."""
        if self._directory is not None:
            self._write(
                f"push-{push.layout}-{push.round}-{push.key}-{push.incarnation}.npz",
                payload=np.zeros(0, np.uint8) if payload is None else payload, kind=push.kind, weight=push.weight, used=push.used,
                codec=push.codec, level=push.level, elements=push.elements, count=push.count, seed=push.seed,
            )  # fmt: skip

    def result(self, result: m.Result, payload: Payload) -> None:
        """Write a result as it came. One that a view takes back gives way to the next of its round."""
        if self._directory is not None:
            self._write(
                f"result-{result.layout}-{result.round}-{result.key}.npz",
                payload=payload, epoch=result.epoch, codec=result.codec, level=result.level, used=result.used,
                count=result.count, seed=result.seed,
            )  # fmt: skip

    def _write(self, name: str, **values: Any) -> None:
        """Write a file that is there whole or not at all."""
        assert self._directory is not None
        unfinished = self._directory / f"{name}.unfinished"
        with unfinished.open("wb") as stream:
            np.savez(stream, **values)
        unfinished.replace(self._directory / name)

    def residual(self, layout: int, key: int, residual: FloatVector | None) -> None:
        """Write the residual that a key was left with."""
        if self._directory is not None and residual is not None:
            np.save(self._directory / f"residual-{layout}-{key}.npy", residual)

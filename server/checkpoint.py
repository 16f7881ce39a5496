"""A shard's part of a checkpoint: the residual of each slice, by tensor and place in it, so that it fits any number of shards.

The bound of the last reply goes with it, because a larger one means that compression has turned lighter; and of the shard with
key 0 the plan: its last version, and one that waits for the next result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ps_accordion import checkpoint
from ps_accordion.errors import StorageError
from ps_accordion.layout import Key
from ps_accordion.wire import messages as m

from .record import KeyRecord
from .restoring import Restored
from .shard import Shard

__all__ = ["Residuals", "save"]

VALUES = "values"


def save(shard: Shard, request: m.Save, directory: Path) -> m.Saved | None:
    """Write what a shard keeps between the rounds that the workers stand at.

    Returns:
        What to answer, also where it cannot be written; None, no answer, as long as the shard lacks what it has had: it may have
        it when it is asked again.
    """
    if shard.lacks([layout for layout, _, _ in request.layouts]):
        return None
    said = m.Saved(True, shard.number, 0, request.step, request.layouts, attempt=request.attempt)
    arrays: dict[str, NDArray[Any]] = {}
    bounds: dict[str, int] = {}
    plans: dict[str, Any] = {}
    for layout, round_, skipped in request.layouts:
        for record in shard.records_of(layout):
            if record.round != round_ - 1:
                text = f"shard {shard.number} has finished round {record.round} of layout {layout}, and the workers {round_ - 1}"
                return replace(said, error=text)
            first = record.key.slices[0]
            bounds[f"{layout}.{first.tensor}.{first.start}"] = record.bound_before if skipped else record.bound
            arrays |= _arrays(layout, record, skipped=skipped)
            if record.key.number == 0:
                version, plan = shard.waiting_plan(layout)
                plans[str(layout)] = [record.plan, version, plan.hex()]
    values = json.dumps({"bounds": bounds, "plans": plans}).encode()
    arrays[VALUES] = np.frombuffer(values, np.uint8)
    from safetensors.numpy import save as packed  # not before somebody wants a checkpoint

    try:
        part = checkpoint.write_part(directory, f"shard-{shard.number}.safetensors", packed(arrays))
    except StorageError as error:
        return replace(said, error=str(error)[: m.MAX_TEXT])
    return replace(said, parts=[(part.file, part.nbytes, part.digest)])


def _arrays(layout: int, record: KeyRecord, *, skipped: bool) -> dict[str, NDArray[np.float32]]:
    half = record.halves[record.start(skipped=skipped)]
    if half is None:
        return {}
    return {
        f"{layout}.{part.tensor}.{part.start}": half[part.offset : part.offset + part.length].copy() for part in record.key.slices
    }


class Residuals:
    """What the shards of a checkpoint left, for shards that may be cut otherwise.

    Args:
        path: The checkpoint.

    Raises:
        ConfigError: There is none.
        StorageError: It is damaged.
    """

    def __init__(self, path: Path) -> None:
        from safetensors.numpy import load

        manifest = checkpoint.read(path)
        self._rounds = {layout.number: layout.round for layout in manifest.layouts}
        self._arrays: dict[tuple[int, int], list[tuple[int, NDArray[np.float32]]]] = {}
        self._bounds: dict[str, int] = {}
        self._plans: dict[str, Any] = {}
        for part in checkpoint.parts_named(manifest, "shard-"):
            arrays = load(checkpoint.read_part(path, part))
            values = json.loads(arrays.pop(VALUES).tobytes())
            self._bounds |= values["bounds"]
            self._plans |= values["plans"]
            for name, array in arrays.items():
                layout, tensor, start = map(int, name.split("."))
                self._arrays.setdefault((layout, tensor), []).append((start, array))

    def restored(self, layout: int, key: Key) -> Restored | None:
        """Return what a key goes on from; None where the checkpoint does not have its layout."""
        if layout not in self._rounds:
            return None
        first = key.slices[0]
        # Small keys may be cut otherwise; they have one level, so that no bound tells of a switch.
        bound = 0 if key.small else self._bounds.get(f"{layout}.{first.tensor}.{first.start}", 0)
        version, waiting, plan = self._plans.get(str(layout), (0, 0, "")) if key.number == 0 else (0, 0, "")
        return Restored(self._rounds[layout], self._residual(layout, key), bound, version, waiting, bytes.fromhex(plan))

    def _residual(self, layout: int, key: Key) -> NDArray[np.float32] | None:
        """Return a key's residual, float32[key.elements]; None where it is zero."""
        residual: NDArray[np.float32] | None = None
        for part in key.slices:
            for start, array in _overlapping(self._arrays.get((layout, part.tensor), ()), part.start, part.start + part.length):
                low, high = max(start, part.start), min(start + array.size, part.start + part.length)
                if residual is None:
                    residual = np.zeros(key.elements, np.float32)
                there = part.offset - part.start
                residual[low + there : high + there] = array[low - start : high - start]
        return residual


def _overlapping(
    arrays: Iterable[tuple[int, NDArray[np.float32]]], low: int, high: int
) -> Iterable[tuple[int, NDArray[np.float32]]]:
    return ((start, array) for start, array in arrays if start < high and start + array.size > low)

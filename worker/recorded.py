"""What a device is told for a key, told at once: the launches of an encoding are recorded, and then launched as a whole.

To launch an operation takes the host some ten microseconds and the device two, and an encoding has dozens of them. A recording
(a CUDA graph) is launched in the time of one. It works on memory of its own, which all keys share: a gradient, a residual and
what was made of a seed are copied there, the parcel and the new residual back. So one recording serves all keys of its kind,
which is a codec, a level and a length.

The first encoding of a kind is launched operation by operation: a device loads code when it needs it for the first time, and that
cannot be recorded. The second is recorded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import torch

from ps_accordion.codecs.device import DeviceCodec, encode, host_memory

from .streams import Mark, Recording, Streams, streams_of

__all__ = ["Recordings"]


@dataclass
class _Desk:
    """The memory of a device that recordings work on, one after the other."""

    streams: Streams
    gradient: torch.Tensor
    residual: torch.Tensor
    free: Mark | None = None
    """Where the stream that came last has done with it."""


@dataclass(frozen=True)
class _Kept:
    """A recording, and what it reads and writes: views of the desk, and words of its own."""

    recording: Recording
    gradient: torch.Tensor
    residual: torch.Tensor
    words: torch.Tensor


class Recordings:
    """The encodings of one model, recorded by kind. One thread at a time, on whatever stream.

    Args:
        longest: Elements of the longest key.
        limit: How many recordings are kept, at least 1; each holds a parcel on its device. What was used longest ago goes first.
        warn: Is told, once a kind, what could not be recorded, and why.
    """

    def __init__(self, longest: int, *, limit: int, warn: Callable[[str], None]) -> None:
        self._longest, self._limit, self._warn = longest, limit, warn
        self._desks: dict[torch.device, _Desk] = {}
        self._kept: OrderedDict[Hashable, _Kept | None] = OrderedDict()
        """By kind; None after the first encoding."""
        self._unable: set[Hashable] = set()

    def encode(
        self, twin: DeviceCodec, gradient: torch.Tensor, residual: torch.Tensor, *, level: float, seed: int
    ) -> torch.Tensor:
        """Encode as `codecs.device.encode` does where nothing is held, switched or given momentum; the same bits.

        Args:
            twin: The codec. All that come with one name must have the same options.
            gradient: [n] of any floating type, contiguous, only read.
            residual: float32[n] on the same device, updated in place.
            level: The codec's setting.
            seed: 64-bit counter seed.

        Returns:
            The parcel, uint8 on the device, in memory of its own.
        """
        device, n = residual.device, residual.numel()
        kind = (device, twin.name, level, n, torch.are_deterministic_algorithms_enabled())
        if twin.recordable and kind not in self._unable:
            kept = self._kept.get(kind)
            if kept is None and kind in self._kept:
                kept = self._record(kind, twin, device, n, level)
            self._keep(kind, kept)
            if kept is not None:
                return self._replay(kept, twin, gradient, residual, seed)
        return encode(twin, gradient, residual, level=level, seed=seed)

    def _keep(self, kind: Hashable, kept: _Kept | None) -> None:
        self._kept[kind] = kept
        self._kept.move_to_end(kind)
        if len(self._kept) > self._limit:
            self._kept.popitem(last=False)

    def _record(self, kind: Hashable, twin: DeviceCodec, device: torch.device, n: int, level: float) -> _Kept | None:
        desk = self._desk_on(device)
        gradient, residual = desk.gradient[:n], desk.residual[:n]
        words = torch.zeros(len(twin.words(0)), dtype=torch.int32, device=device)
        try:
            recording = desk.streams.recorded(lambda: encode(twin, gradient, residual, level=level, seed=0, words=words))
        except RuntimeError as error:
            self._warn(
                f"expected to record what codec {twin.name} at level {level:g} launches on {device} for {n} elements, "
                f"got: {error}; each operation is launched by itself, which takes longer"
            )
            recording = None
        if recording is None:
            self._unable.add(kind)
            return None
        return _Kept(recording, gradient, residual, words)

    def _replay(self, kept: _Kept, twin: DeviceCodec, gradient: torch.Tensor, residual: torch.Tensor, seed: int) -> torch.Tensor:
        desk = self._desk_on(residual.device)
        if desk.free is not None:
            desk.streams.follow(desk.free)
        kept.gradient.copy_(gradient)
        kept.residual.copy_(residual)
        if kept.words.numel():
            words = host_memory(4 * kept.words.numel(), residual.device).view(torch.int32)
            np.copyto(words.numpy(), np.array(twin.words(seed), np.int32))
            kept.words.copy_(words, non_blocking=True)
        parcel = kept.recording.launch().clone()
        residual.copy_(kept.residual)
        desk.free = desk.streams.mark()
        return parcel

    def _desk_on(self, device: torch.device) -> _Desk:
        desk = self._desks.get(device)
        if desk is None:
            gradient, residual = torch.empty(2, self._longest, dtype=torch.float32, device=device)
            desk = self._desks[device] = _Desk(streams_of(device), gradient, residual)
        return desk

"""What a device is told for a key, told at once: launches are recorded, and then launched as a whole.

To launch an operation takes the host some ten microseconds and the device two; to encode a key takes dozens of them, to decode
one a dozen. A recording (a CUDA graph) is launched in the time of one. It works on memory of its own, where all that differs from
key to key and from round to round is copied to and from. So one recording serves all keys of its kind: those of one codec, level,
length and whatever else decides what is launched.

What is met for the first time is launched operation by operation: a device loads code when it needs it for the first time, which
cannot be recorded. When it is met again a recording of it is wanted. The thread of backward makes it before it encodes the next
key, whether for encoding or decoding: no other part of a model runs at that moment, which might draw random numbers there.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ps_accordion.codecs import Coding
from ps_accordion.codecs.base import Payload
from ps_accordion.codecs.device import DeviceCodec, encode, stage
from ps_accordion.layout import Slice

from .streams import Mark, Recording, streams_of

__all__ = ["Part", "Recordings"]

Part = tuple[Slice, torch.Tensor]
"""A slice of a key and its elements: a flat, contiguous view of a gradient, [length] of any floating type."""

_REMEMBERED = 1024
"""Kinds that are remembered as met once."""
_ALIGNED = 128
"""Every vector begins at a multiple of so many elements: how memory is aligned decides which code a device runs."""


@dataclass(frozen=True)
class _Wanted:
    """What is to be recorded: `work` launches something that reads `dtype[size]` from the host, and returns what that makes."""

    size: int
    dtype: torch.dtype
    work: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Kept:
    """A recording, and the memory that goes with it alone: what it reads from the host."""

    recording: Recording
    given: torch.Tensor


class _Desk:
    """Recordings of one device that share memory, and so are launched one after the other.

    Args:
        device: The device.
        vectors: How many vectors they share.
        longest: Elements of each.
        limit: How many recordings are kept, at least 1. What was used longest ago goes first.
        warn: Is told what could not be recorded, and why. That is once: nothing more is recorded then.
    """

    def __init__(self, device: torch.device, vectors: int, longest: int, limit: int, warn: Callable[[str], None]) -> None:
        self.device = device
        self._shape = vectors, -(-longest // _ALIGNED) * _ALIGNED
        self._memory: torch.Tensor | None = None
        self._streams = streams_of(device)
        self._free: Mark | None = None
        """Where the stream that came last has done with the memory."""
        self._limit, self._warn = limit, warn
        self._met: OrderedDict[Hashable, None] = OrderedDict()
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._without = False
        """Whether there is no way to record."""
        self.wanted: dict[tuple[str, Hashable], _Wanted] = {}
        """What is to be recorded, by codec and kind."""

    def vectors(self, elements: int) -> Sequence[torch.Tensor]:
        """Return the front of each vector that is shared, float32[elements]."""
        if self._memory is None:
            self._memory = torch.empty(self._shape, dtype=torch.float32, device=self.device)
            self._free = self._streams.mark()  # until then, other work may be at the memory that this is made of
        return self._memory[:, :elements].unbind()

    def find(self, name: str, kind: Hashable, want: Callable[[], _Wanted]) -> _Kept | None:
        """Return the recording of a kind, if there is one; what `want` returns is wanted when the kind is met again."""
        if self._without or torch.are_deterministic_algorithms_enabled():
            return None  # with those, other work is launched, and some of it looks at what it sorts
        kept = self._kept.get((name, kind))
        if kept is not None:
            self._kept.move_to_end((name, kind))
        elif (name, kind) in self._met and (name, kind) not in self.wanted:
            self.wanted[name, kind] = want()
        return kept

    def meet(self, name: str, kind: Hashable) -> None:
        """Note a kind of which all has been launched, operation by operation."""
        self._met[name, kind] = None
        self._met.move_to_end((name, kind))
        if len(self._met) > _REMEMBERED:
            self._met.popitem(last=False)

    def record(self) -> None:
        """Record what is wanted."""
        if torch.are_deterministic_algorithms_enabled():
            return
        while self.wanted and not self._without:
            (name, kind), want = self.wanted.popitem()
            recording = None
            try:
                self.vectors(0)  # before: what is made or marked while a device records is part of the recording
                last = self._free
                with self.turn():
                    memory = torch.empty(want.size, dtype=want.dtype, device=self.device)
                recording = self._streams.recorded(partial(want.work, memory))
            except RuntimeError as error:
                self._warn(
                    f"expected to record what codec {name} launches on {self.device}, got: {error}; "
                    "each operation is launched by itself from now on, which takes longer"
                )
            if recording is None:
                self._without = True
                self.wanted.clear()
            else:
                self._kept[name, kind] = _Kept(recording, memory)
                if len(self._kept) > self._limit:
                    if last is not None:
                        last.synchronize()  # so that nothing runs any more that uses the memory of what goes
                    self._kept.popitem(last=False)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let what is launched inside have the memory for itself."""
        if self._free is not None:
            self._streams.follow(self._free)
        try:
            yield
        finally:
            self._free = self._streams.mark()


class Recordings:
    """Encodings and decodings of one model, recorded. One thread at a time encodes and records, any decode; on whatever streams.

    Args:
        longest: Elements of the longest key.
        limit: How many recordings are kept of either, at least 1.
        warn: Is told what could not be recorded, and why. Nothing more is recorded then.
    """

    def __init__(self, longest: int, *, limit: int, warn: Callable[[str], None]) -> None:
        self._longest, self._limit, self._warn = longest, limit, warn
        self._encoding: dict[torch.device, _Desk] = {}
        self._decoding: dict[torch.device, _Desk] = {}
        """Memory of their own: the next gradients are encoded while results are decoded."""
        self._decodes = threading.Lock()

    def record(self) -> None:
        """Record what has been wanted since; launches nothing. To be called where nobody draws random numbers on the device."""
        for desk in self._encoding.values():
            desk.record()
        for desk in tuple(self._decoding.values()):
            if desk.wanted:
                with self._decodes:
                    desk.record()

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
        if not twin.recordable:
            return encode(twin, gradient, residual, level=level, seed=seed)
        n, desk = residual.numel(), self._desk(self._encoding, residual.device, vectors=2)
        words = twin.words(seed, elements=n, level=level)

        def work(given: torch.Tensor) -> torch.Tensor:
            ours, left = desk.vectors(n)
            return encode(twin, ours, left, level=level, seed=0, words=given)  # what needs a seed is in the words

        kept = desk.find(twin.name, (n, level), lambda: _Wanted(len(words), torch.int32, work))
        if kept is None:
            parcel = encode(twin, gradient, residual, level=level, seed=seed)
            desk.meet(twin.name, (n, level))
            return parcel
        ours, left = desk.vectors(n)
        with desk.turn():
            ours.copy_(gradient)
            left.copy_(residual)
            if words:
                kept.given.copy_(stage(np.array(words, np.int32), desk.device).view(torch.int32), non_blocking=True)
            parcel = kept.recording.launch().clone()
            residual.copy_(left)
        return parcel

    def decode(self, twin: DeviceCodec, payload: Payload, coding: Coding, out: Sequence[Part]) -> None:
        """Decode as `codecs.device.decode` does, to all slices of a key, in order; the same bits.

        Args:
            twin: The codec. All that come with one name must have the same options.
            payload: uint8[nbytes] on the host, validated; only read, before this returns.
            coding: What the header of its message says.
            out: To be written.
        """
        (_, first), kind = out[0], twin.kind(payload, coding)
        device, staged = first.device, stage(payload, first.device)
        which = (coding.elements, coding.level, coding.count, payload.size, kind)
        if kind is not None and self._decode_recorded(twin, which, payload, staged, coding, out):
            return
        uploaded = staged.to(device, non_blocking=True)
        if len(out) == 1 and first.dtype == torch.float32:
            twin.decode(payload, uploaded, coding, first)
        else:
            whole = torch.empty(coding.elements, dtype=torch.float32, device=device)
            twin.decode(payload, uploaded, coding, whole)
            _spread(whole, out)
        if kind is not None:
            with self._decodes:
                self._desk(self._decoding, device, vectors=1).meet(twin.name, which)

    def _decode_recorded(
        self,
        twin: DeviceCodec,
        which: Hashable,
        payload: Payload,
        staged: torch.Tensor,
        coding: Coding,
        out: Sequence[Part],
    ) -> bool:
        """Decode from a recording, and return whether there is one."""
        with self._decodes:
            n, desk = coding.elements, self._desk(self._decoding, out[0][1].device, vectors=1)

            def want() -> _Wanted:
                like = payload.copy()  # the caller's memory is another message's by the time of recording

                def work(given: torch.Tensor) -> torch.Tensor:
                    (vector,) = desk.vectors(n)
                    twin.decode(like, given, coding, vector)
                    return vector

                return _Wanted(payload.size, torch.uint8, work)

            kept = desk.find(twin.name, which, want)
            if kept is not None:
                with desk.turn():
                    kept.given.copy_(staged, non_blocking=True)
                    _spread(kept.recording.launch(), out)
        return kept is not None

    def _desk(self, desks: dict[torch.device, _Desk], device: torch.device, *, vectors: int) -> _Desk:
        desk = desks.get(device)
        if desk is None:
            desk = desks[device] = _Desk(device, vectors, self._longest, self._limit, self._warn)
        return desk


def _spread(vector: torch.Tensor, out: Sequence[Part]) -> None:
    for part, view in out:
        view.copy_(vector[part.offset : part.offset + part.length])

"""What comes back of a key whose shard has lost its memory: the last result, from a worker that was given it."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import Buffer

from ps_accordion.codecs import registry
from ps_accordion.codecs.base import Coding
from ps_accordion.codecs.registry import Codecs
from ps_accordion.errors import WireError
from ps_accordion.layout import Key
from ps_accordion.wire import messages as m
from ps_accordion.wire.framing import join_frames

from .record import Finished

__all__ = ["bound_of", "finished_of"]


def finished_of(result: m.Result, frames: Sequence[Buffer], key: Key) -> Finished:
    """Return a result as it is kept, once it agrees with the layout.

    Raises:
        WireError: It does not.
    """
    if len(frames) != len(result.frames) + bool(result.plan):
        raise WireError(f"a result of {len(result.frames)} frames to restore key {key.number} from, with {len(frames)} frames")
    if result.kind == "DATA":
        if result.elements != key.elements:
            raise WireError(f"a result to restore key {key.number} from: expected {key.elements} elements, got {result.elements}")
        payload = join_frames(frames[: len(result.frames)], result.frames)
        coding = Coding(result.codec, result.level, result.elements, result.count, result.seed)
        registry.get(result.codec).validate(payload, coding)
    return Finished(result, tuple(memoryview(bytes(frame)) for frame in frames))


def bound_of(result: m.Result, codecs: Codecs) -> int:
    """Return the bound of a result's payload in bytes; 0, as before the first round, where it has none."""
    if result.kind != "DATA":
        return 0
    return registry.find(codecs, result.codec).payload_bound(result.elements, result.level)

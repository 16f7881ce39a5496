"""What a key goes on from in the middle: a checkpoint or, once a shard's memory is lost, the last result that a worker keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from typing_extensions import Buffer

from ps_accordion.codecs import registry
from ps_accordion.codecs.base import Coding, FloatVector
from ps_accordion.codecs.registry import Codecs
from ps_accordion.errors import WireError
from ps_accordion.layout import Key
from ps_accordion.ledger import NO_TALLY, Probe
from ps_accordion.wire import messages as m
from ps_accordion.wire.framing import join_frames

from .record import Finished
from .replaying import Base

__all__ = ["Restore", "Restored", "base_of", "bound_of", "finished_of"]


class Restored(NamedTuple):
    """What a key goes on from that begins in the middle: what a checkpoint has of it.

    Attributes:
        round: The round that comes next.
        residual: float32[key.elements], or None where it is zero; copied.
        bound: Size of the last reply's bound in bytes; 0 where it is not known, or does not matter.
        plan: Version of the last plan that its results have carried.
        waiting: Version of one that waits for the next result.
        waiting_plan: And its bytes.
    """

    round: int
    residual: FloatVector | None
    bound: int
    plan: int
    waiting: int
    waiting_plan: bytes


Restore = Callable[[int, Key], Restored | None]
"""Layout and key to what the key goes on from; None where it begins."""


def base_of(probe: Probe | None, restored: Restored | None) -> Base:
    """Return what a key begins with: nothing, or what a checkpoint has of it."""
    if restored is None:
        return Base(0)
    tally = NO_TALLY if probe is None else NO_TALLY.plus(came=probe.vector(restored.residual).mass)
    return Base(restored.round, restored.bound, tally, residual=restored.residual)


def finished_of(result: m.Result, frames: Sequence[Buffer], key: Key, codecs: Codecs) -> Finished:
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
        registry.find(codecs, result.codec).validate(payload, coding)
    return Finished(result, tuple(memoryview(bytes(frame)) for frame in frames))


def bound_of(result: m.Result, codecs: Codecs) -> int:
    """Return the bound of a result's payload in bytes; 0, as before the first round, where it has none."""
    if result.kind != "DATA":
        return 0
    return registry.find(codecs, result.codec).payload_bound(result.elements, result.level)

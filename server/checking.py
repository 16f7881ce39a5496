"""What a shard asks of a push before it holds it, and what the pushes of a round say of their senders. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from typing_extensions import Buffer

from ps_accordion.codecs import Push as FoldPush
from ps_accordion.codecs import registry
from ps_accordion.codecs.base import Coding, Payload
from ps_accordion.codecs.registry import Codecs
from ps_accordion.errors import PayloadError, WireError
from ps_accordion.layout import Key
from ps_accordion.wire import messages as m
from ps_accordion.wire.framing import join_frames

from .record import Held

__all__ = ["checked", "coding", "pushed", "same", "standing", "unfit"]

EXACT = ("dense", 32.0)
"""Codec and level of buffers: all workers must have the lead's bits. And of a residual that is handed over: nothing is left."""


def checked(push: m.Push, frames: Sequence[Buffer], key: Key, *, codecs: Codecs, most: int) -> Payload | None:
    """Return a push's payload, once everything in its header and the payload agrees with the layout; None where it has none.

    Whether it is finite, a fold may have to find out (`Codec.fits`).

    Args:
        push: The header.
        frames: What came behind it.
        key: The key that it is of.
        codecs: Codecs by name.
        most: Bytes of the largest payload that there is room for.

    Raises:
        WireError: The header does not fit the layout.
        CodecError: The payload is not safe to decode, or the codec is not known.
    """
    if push.used & ~key.all_used:
        raise WireError(f"used bits {push.used:#b} for a key of {len(key.slices)} slices")
    if key.buffer and push.kind in ("UNUSED", "JOINED", "FLUSH") and push.weight:
        raise WireError(f"key {key.number} holds buffers, of which one worker's count: {push.kind} has weight 0 there")
    if push.kind != "DATA" and not (push.kind == "FLUSH" and push.used and not key.buffer):
        if frames or push.frames or push.used:
            raise WireError(f"a push of kind {push.kind} has no payload and no used bits")
        if push.kind == "EMPTY" and push.weight:
            raise WireError(f"a push of kind EMPTY has weight 0, got {push.weight!r}")
        return None
    if push.elements != key.elements:
        raise PayloadError(f"expected {key.elements} elements, the header says {push.elements}")
    if key.buffer and (push.codec, push.level) != EXACT:
        raise WireError(f"key {key.number} holds buffers, which travel as dense at 32, got {push.codec} at {push.level!r}")
    if push.kind == "FLUSH" and (push.codec, push.level) != EXACT:
        raise WireError(f"a residual is handed over as dense at 32, got {push.codec} at {push.level!r}")
    if not push.used or push.weight <= 0:
        raise WireError(f"a push of kind {push.kind} needs used bits and a weight, got {push.used:#b} and {push.weight!r}")
    codec = registry.find(codecs, push.codec)
    codec.check_level(push.level)
    payload = join_frames(frames, push.frames, fixed=not codec.takes_any(push.level))
    bound = codec.payload_bound(push.elements, push.level)
    if bound > most and push.kind != "FLUSH":  # of which nothing is stored, and which has the vector's own length
        raise WireError(
            f"{push.codec} at {push.level!r} may take {bound} bytes, and no level of this job more than {most} for this key; "
            "give all workers the coordinator's settings"
        )
    if payload.nbytes > bound:
        raise PayloadError(f"expected at most {bound} bytes of {push.codec}, got {payload.nbytes}")
    codec.fits(payload, coding(push))
    return payload


def pushed(held: list[Held]) -> list[FoldPush]:
    """Return what is to be folded: the pushes of a round that have a payload, in the order given."""
    return [FoldPush(each.message.weight, coding(each.message), each.payload) for each in held if each.payload is not None]


def unfit(held: list[Held], codecs: Codecs) -> list[tuple[Held, str]]:
    """Return the pushes whose payloads `checked` has let pass though they are not finite, each with what is wrong with it."""
    found = []
    for each in held:
        if each.payload is not None:
            try:
                registry.find(codecs, each.message.codec).validate(each.payload, coding(each.message))
            except PayloadError as error:
                found.append((each, str(error)))
    return found


def coding(push: m.Push) -> Coding:
    """Return what a push's header says of its payload."""
    return Coding(push.codec, push.level, push.elements, push.count, push.seed)


def standing(held: list[Held], current: frozenset[int] | None) -> tuple[int, frozenset[int]]:
    """Return the lead of a round, and the slots that have the state after it.

    The lead is the lowest slot that trains. Where none does, it is one that has the last state and can hand it out: who is JOINED
    goes on after the round, who is EMPTY does not.
    """
    kinds = {each.message.slot: each.message.kind for each in held}
    training = frozenset(slot for slot, kind in kinds.items() if kind not in ("JOINED", "FLUSH", "EMPTY"))
    if training:
        return min(training), training
    if "FLUSH" in kinds.values():  # no JOIN, and nothing that anybody could apply
        last = (current or frozenset(kinds)) & kinds.keys() or frozenset(kinds)
        return min(last), last
    joined = frozenset(slot for slot, kind in kinds.items() if kind == "JOINED")
    last = (current or frozenset()) & kinds.keys() or frozenset(kinds)
    return min(joined & last or last), joined or last


def same(held: Held, push: m.Push, payload: Payload | None) -> bool:
    """Whether a push is the one that is held already, to the byte."""
    if held.message != push:
        return False
    return payload is None or (held.payload is not None and np.array_equal(held.payload, payload))

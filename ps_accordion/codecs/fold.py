"""The server's fold: all pushes of one key and round in, one result out. Pure: no state but its arguments.

The order of the arithmetic is part of the contract, so that an independent replay agrees to the bit.
With W = `total_weight`, all in float32 but the division, each operation rounded by itself:

    scale = float32(1.0 / W)                         the division in float64
    total = 0
    total = total + float32(weight) * D(payload)     for each push, in rank order
    p     = total * scale + residual
    payload = C(p),  new_residual = p - D(payload)

If all pushes share one linear coding, the same sums are made over payload entries, undecoded, and a residual that an earlier
codec left is added on the covered coordinates only: what is covered gets the same bits either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import CodecError
from .base import Changes, Codec, Coding, Encoded, FloatVector, Hint, Payload
from .holding import Held, without
from .registry import DEFAULT, Choice, Codecs, find, lightest
from .switch import Rule, settle

__all__ = ["Folded", "Push", "fold", "keep", "sum_decoded"]


class Push(NamedTuple):
    """One member's contribution to a key: validated, and with data.

    Attributes:
        weight: Factor of its gradient in the sum, from the header.
        coding: What the header says of the payload.
        payload: uint8[nbytes], validated, only read.
    """

    weight: float
    coding: Coding
    payload: Payload


class Folded(NamedTuple):
    """What a fold produced.

    Attributes:
        coding: For the result's header.
        nbytes: Bytes written to the front of `out`.
        wrote: Whether `new_residual` was written; where it was not, the residual stays what it was (zero if there was none).
        lost: L2 norm of what the switch rule threw away from the residual.
        changes: What `new_residual` has that `residual` has not, where that is little and known.
    """

    coding: Coding
    nbytes: int
    wrote: bool
    lost: float
    changes: Changes | None = None


def fold(
    pushes: Sequence[Push],
    residual: FloatVector | None,
    new_residual: FloatVector | None,
    *,
    elements: int,
    total_weight: float,
    seed_reply: int,
    scratch: FloatVector,
    out: Payload,
    codecs: Codecs | None = None,
    reply: Choice | None = None,
    held: Held = (),
    rule: Rule = "keep",
    hint: Hint | None = None,
    changes: Changes | None = None,
) -> Folded | None:
    """Sum the pushes of a round, add the residual, and encode once.

    Args:
        pushes: At least one, in rank order.
        residual: float32[n], only read; None means zero.
        new_residual: float32[n], other memory than `residual`; None only where `residual` is None and the reply is exact,
            or a sum of linear payloads.
        elements: n, from the layout.
        total_weight: Sum of the weights of all members that count, those without a payload included.
        seed_reply: Counter seed for encoding the reply, where the pushes do not set it.
        scratch: float32[n], overwritten.
        out: uint8, 4-byte aligned, as large as the bound of any reply.
        codecs: Codecs by name, with the options to encode the reply with; None takes those without options.
        reply: Codec and level of the reply; None takes the lightest that was pushed.
        held: Spans that nobody used: what the result has there counts for nothing, their residual is carried over as it is.
        rule: What happens to the residual first, if the reply is lighter than the last one (`switch.py`).
        hint: Of this key, at this server; None for none.
        changes: What `residual` has that `new_residual` has not: what the fold said that made `residual` out of what
            `new_residual` holds. None where `new_residual` may hold anything.

    Returns:
        None when something in the result is not finite; `new_residual` is then undefined.

    Raises:
        CodecError: Members drew different positions: their (level, seed) of a shared-seed codec differ.
    """
    if not pushes or not total_weight > 0.0:
        raise ValueError(f"expected pushes with data and a positive total weight, got {len(pushes)} and {total_weight!r}")
    known = DEFAULT if codecs is None else codecs
    shared = _shared_coding(pushes, known)
    first = pushes[0].coding
    choice = lightest([(push.coding.codec, push.coding.level) for push in pushes], elements, codecs=known)
    if reply is not None:
        choice = reply
    codec = find(known, choice[0])
    with np.errstate(over="ignore"):  # what comes of it is not finite, and is seen then
        scale = np.float32(1.0 / total_weight)
    seed = seed_reply if shared is None else shared.seed
    if rule != "keep" and residual is not None and not residual.any():
        rule = "keep"  # There is nothing to settle, and no reason to fold in another way than where there is no residual.
    undecoded = (
        codec.linear
        and not held
        and (residual is None or rule == "keep")
        and choice == (first.codec, first.level)
        and all(_same_entries(push.coding, first) for push in pushes)
        and codec.addable([push.payload for push in pushes], first)
    )
    if undecoded:
        return _sum(codec, pushes, residual, new_residual, scale=scale, out=out)
    of_choice = next((push for push in pushes if (push.coding.codec, push.coding.level) == choice), None)
    if of_choice is not None:
        codec = codec.following(of_choice.payload, of_choice.coding)
    if not held and (residual is None or rule == "keep") and all(push.coding.codec == codec.name for push in pushes):
        refolded = codec.fold(
            *_columns(pushes), scale, residual, new_residual,
            level=choice[1], seed=seed, out=out, scratch=scratch, hint=hint, changes=changes,
        )  # fmt: skip
        if refolded is None:
            return None
        written, changed = refolded
        coding = _coding(codec, choice[1], elements, written, seed)
        return Folded(coding, written.nbytes, new_residual is not None, 0.0, changed)
    sum_decoded(pushes, scratch, codecs=known)
    for start, length in held:
        scratch[start : start + length] = 0.0
    base, lost = residual, 0.0
    if residual is not None and held:
        base = without(residual, held)
    if base is not None and rule != "keep":
        base = base.copy()
        lost = settle(rule, base, scratch, scale=float(scale))
    encoded = codec.reencode(scratch, scale, base, new_residual, level=choice[1], seed=seed, out=out, hint=hint)
    if encoded is None:
        return None
    if new_residual is not None:
        for start, length in held:
            new_residual[start : start + length] = 0.0 if residual is None else residual[start : start + length]
    return Folded(_coding(codec, choice[1], elements, encoded, seed), encoded.nbytes, new_residual is not None, lost)


def keep(
    pushes: Sequence[Push],
    residual: FloatVector | None,
    new_residual: FloatVector,
    *,
    total_weight: float,
    scratch: FloatVector,
    codecs: Codecs | None = None,
) -> bool:
    """Keep the mean of a round in the residual, without any result: new_residual = total * scale + residual, as in `fold`.

    Args:
        pushes: At least one, in rank order.
        residual: float32[n], only read; None means zero.
        new_residual: float32[n], other memory than `residual`; overwritten.
        total_weight: Sum of the weights of all members that count.
        scratch: float32[n], overwritten.
        codecs: Codecs by name.

    Returns:
        False when something in it is not finite; `new_residual` is then undefined.
    """
    sum_decoded(pushes, scratch, codecs=codecs)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller hears of it
        np.multiply(scratch, np.float32(1.0 / total_weight), out=new_residual)
        if residual is not None:
            new_residual += residual
    return bool(np.isfinite(new_residual).all())


def sum_decoded(pushes: Sequence[Push], total: FloatVector, *, codecs: Codecs | None = None) -> None:
    """Set `total`, float32[n], to the sum of weight * D(payload), in the order of the pushes: the first half of a fold."""
    known = DEFAULT if codecs is None else codecs
    if len({push.coding.codec for push in pushes}) == 1:
        find(known, pushes[0].coding.codec).begin_all(*_columns(pushes), total)
        return
    for position, push in enumerate(pushes):
        member = find(known, push.coding.codec)
        add = member.accumulate if position else member.begin
        add(push.payload, push.coding, np.float32(push.weight), total)


def _columns(pushes: Sequence[Push]) -> tuple[list[Payload], list[Coding], list[np.float32]]:
    """Return payloads, codings and weights."""
    return (
        [push.payload for push in pushes],
        [push.coding for push in pushes],
        [np.float32(push.weight) for push in pushes],
    )


def _sum(
    codec: Codec,
    pushes: Sequence[Push],
    residual: FloatVector | None,
    new_residual: FloatVector | None,
    *,
    scale: np.float32,
    out: Payload,
) -> Folded | None:
    coding = pushes[0].coding
    payloads = [push.payload for push in pushes]
    encoded = codec.sum_payloads(payloads, [np.float32(push.weight) for push in pushes], scale, coding, out)
    if encoded is None:
        return None
    if residual is not None:
        if new_residual is None:
            raise ValueError("expected memory for the residual that is left, got None")
        if not codec.release(residual, coding, out, new_residual):
            return None
    return Folded(coding._replace(count=encoded.count), encoded.nbytes, residual is not None, 0.0)


def _shared_coding(pushes: Sequence[Push], codecs: Codecs) -> Coding | None:
    """Return the coding of the pushes that drew shared positions, or None if none did; raise if they differ."""
    first: Coding | None = None
    rank = 0
    for position, push in enumerate(pushes):
        if not find(codecs, push.coding.codec).shared_seed:
            continue
        if first is None:
            first, rank = push.coding, position
        elif not _same_entries(push.coding, first):
            raise CodecError(
                f"members drew different positions: push {rank} is {_describe(first)}, push {position} is "
                f"{_describe(push.coding)}; all members must hold the same plan and job seed"
            )
    return first


def _same_entries(mine: Coding, theirs: Coding) -> bool:
    return (mine.codec, mine.level, mine.seed) == (theirs.codec, theirs.level, theirs.seed)


def _describe(coding: Coding) -> str:
    return f"{coding.codec} at level {coding.level!r} with seed {coding.seed:#018x}"


def _coding(codec: Codec, level: float, elements: int, encoded: Encoded, seed: int) -> Coding:
    return Coding(codec.name, level, elements, encoded.count, seed if codec.shared_seed else 0)

"""What a worker keeps of one key: its residual, and how a gradient becomes a push.

A coder is used by one thread at a time: the codec thread that owns the key.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec import structs

from ps_accordion.codecs import Hint, encode_holding, registry, settle, workspace
from ps_accordion.codecs.base import Coding, FloatVector, Payload
from ps_accordion.codecs.covering import push_seed
from ps_accordion.config import Settings
from ps_accordion.layout import Key
from ps_accordion.regimes.base import Choice
from ps_accordion.wire import messages as m
from ps_accordion.wire.framing import frame_lengths

from .account import Account
from .following import KeyCodecs
from .velocity import Velocity

__all__ = ["KeyCoder", "Pushed", "coding_of"]

_OURS = 3
"""References to a buffer that nobody else holds: the attribute, a local name, and the argument of `getrefcount`."""
_ROOMY = 2
"""A buffer is given up for a payload of less than half its size: levels change by more than that."""


@dataclass(frozen=True)
class Pushed:
    """A push that is ready to go.

    Attributes:
        message: Its header.
        payload: Its payload, or None; it must not change until the round is decided.
        loss: Norm of what a switch of level threw away of the residual; itemised in the ledger.
    """

    message: m.Push
    payload: Payload | None
    loss: float


class KeyCoder:
    """Encodes, decodes and takes back for one key.

    Args:
        layout: Number of the layout.
        key: The key.
        settings: The settings of the job.
        slot: This worker's slot.
        incarnation: And its incarnation.
        momenta: Momentum that gradients are given before they are encoded, slice by slice; empty for none.
        take: Returns memory that servers read payloads from, of so many bytes; None where they do not.
    """

    def __init__(
        self,
        layout: int,
        key: Key,
        settings: Settings,
        *,
        slot: int,
        incarnation: int,
        momenta: Sequence[float] = (),
        take: Callable[[int], Payload | None] = lambda nbytes: None,
    ) -> None:
        self.layout = layout
        self.key = key
        self._residual: FloatVector | None = None
        self._begun = False
        """Whether there is a residual; it takes no memory while it is zero."""
        self._settings = settings
        self.codecs = KeyCodecs(key, settings)
        self.incarnation = incarnation
        """A worker that was taken out of the run comes back under another."""
        self._slot = slot
        self.bound = 0
        self._hint = Hint()
        self._out: Payload | None = None
        self._take = take
        self._account = Account(layout, key)
        self._velocity = Velocity(key, momenta) if momenta else None

    @property
    def account(self) -> Account:
        """What this key's pushes and residual come to so far."""
        return self._account

    @property
    def residual(self) -> FloatVector | None:
        """What pushes have not carried, float32[key.elements]; None before the first. The coder's: other memory after a push."""
        if self._residual is None and self._begun:
            return np.zeros(self.key.elements, np.float32)
        return self._residual

    def encode(
        self, gradient: FloatVector, *, round_: int, used: int, choice: Choice, previous_skipped: bool, weight: float = 1.0
    ) -> Pushed:
        """Encode this worker's gradient of one round; what the payload does not carry stays in the residual.

        Args:
            gradient: float32[key.elements], contiguous, only read; its unused slices hold anything.
            round_: Number of the round.
            used: Bit i is set when slice i has a gradient.
            choice: Codec and level.
            previous_skipped: Whether the round before was skipped.
            weight: What it counts for in the mean.

        Returns:
            A push of kind DATA, or SKIP when gradient + residual is not finite (the residual is then untouched).
        """
        key, settings = self.key, self._settings
        codec = self.codecs.find(choice.codec)
        bound = codec.payload_bound(key.elements, choice.level)
        keeps = codec.keeps(choice.level)
        self._begun = True
        if keeps and self._residual is None:
            self._residual = workspace.zeros(key.elements)
        unused = key.elements_of(used)
        if self._velocity is not None:
            gradient = self._velocity.advance(gradient, unused)
        loss, before, thrown = 0.0, None, 0.0
        if self._residual is not None and 0 < self.bound < bound:
            before = self._residual.copy()
            loss = settle(settings.codec.residual_at_switch, self._residual, gradient)
            thrown = self._account.mass(before) - self._account.mass(self._residual) if loss else 0.0
        seed = push_seed(
            codec, key.elements, choice.level,
            job=settings.seed, layout=self.layout, key=key.number, round_=round_, slot=self._slot,
        )  # fmt: skip
        out = self._room(bound, lent=codec.takes_any(choice.level))
        held = [(part.offset, part.length) for part in unused]
        old, rest = self._residual, None if self._residual is None else workspace.take(key.elements)
        encoded = encode_holding(
            codec, gradient, old, held, level=choice.level, seed=seed, out=out, rest=rest, hint=self._hint
        )  # fmt: skip
        if old is not None and rest is not None:
            if encoded is not None:
                self._residual, rest = rest, old
            workspace.give(rest)  # `old` keeps its contents as long as nothing else is encoded
        if encoded is None:
            if self._residual is not None and before is not None:
                self._residual[:] = before
            if self._velocity is not None:
                self._velocity.drop()
            push = self.without_payload("SKIP", round_=round_, previous_skipped=previous_skipped, weight=weight)
            return Pushed(push, None, 0.0)
        self.bound = bound
        if not keeps and not held:
            self._residual = None  # all of it is on its way, and zeros need not be added in the next round
        payload = out[: encoded.nbytes]
        message = m.Push(
            self.layout, key.number, round_, self._slot, self.incarnation, "DATA", weight, used, previous_skipped,
            codec.name, choice.level, key.elements, encoded.count, seed if codec.shared_seed else 0,
            frame_lengths(encoded.nbytes),
        )  # fmt: skip
        if not key.buffer:
            self._account.pushed(
                codec, payload, coding_of(message), gradient, unused,
                before=old, residual=self._residual, thrown=thrown,
            )  # fmt: skip
        if self._velocity is not None:
            self._velocity.keep(codec, payload, coding_of(message))
        return Pushed(message, payload, loss)

    def _room(self, nbytes: int, *, lent: bool) -> Payload:
        """Return memory for a payload: of the lane, if it may be `lent` and that is read, or that of the last one.

        Unless somebody still holds that: a round is over before the next is encoded, but a copy that was sent again may still
        wait in a socket. Every view of a payload holds a reference to its memory, so the count of references tells.
        """
        if lent and (room := self._take(nbytes)) is not None:
            self._out = None
            return room
        out = self._out
        if out is None or not nbytes <= out.nbytes <= _ROOMY * nbytes or sys.getrefcount(out) > _OURS:
            out = self._out = np.empty(nbytes, np.uint8)
        return out[:nbytes]

    def without_payload(self, kind: m.PushKind, *, round_: int, previous_skipped: bool, weight: float = 1.0) -> m.Push:
        """Return a push of kind UNUSED, SKIP, JOINED, FLUSH or EMPTY, whose weight is 0. The residual is untouched."""
        weight = 0.0 if kind == "EMPTY" else weight
        return m.Push(self.layout, self.key.number, round_, self._slot, self.incarnation, kind, weight, 0, previous_skipped)

    def flush(self, *, round_: int, previous_skipped: bool, weight: float) -> Pushed:
        """Return a push of kind FLUSH with all of the residual, which is zero then; without a payload if it is zero already."""
        residual = self.residual
        self._residual = None
        return self.handed_over(residual, round_=round_, previous_skipped=previous_skipped, weight=weight)

    def handed_over(self, residual: FloatVector | None, *, round_: int, previous_skipped: bool, weight: float) -> Pushed:
        """Return a push of kind FLUSH with a residual, float32[key.elements], which is no longer this key's; None is zero."""
        key = self.key
        used = 0 if residual is None else _filled(residual, key)
        push = self.without_payload("FLUSH", round_=round_, previous_skipped=previous_skipped, weight=weight)
        if residual is None or not used:
            return Pushed(push, None, 0.0)
        codec, level = registry.get("dense"), 32.0
        payload = np.empty(codec.payload_bound(key.elements, level), np.uint8)
        encoded = codec.encode(residual, None, level=level, seed=0, out=payload)
        assert encoded is not None, "a residual is finite"
        coding = {"codec": codec.name, "level": level, "elements": key.elements, "count": encoded.count}
        push = structs.replace(push, used=used, frames=frame_lengths(payload.nbytes), **coding)
        self._account.pushed(codec, payload, coding_of(push), None)
        return Pushed(push, payload, 0.0)

    def host_residual(self) -> FloatVector | None:
        """Return a copy of the residual, float32[key.elements], or None if there is none."""
        residual = self.residual
        return None if residual is None else residual.copy()

    def set_residual(self, residual: FloatVector) -> None:
        """Take over a residual, float32[key.elements]; it is copied."""
        self._account.replaced(self._residual, residual)
        self._residual = residual.copy()

    @property
    def moves(self) -> bool:
        """Whether some slice is given momentum before it is encoded."""
        return self._velocity is not None

    def host_velocity(self) -> FloatVector | None:
        """Return a copy of the velocity, float32[key.elements], or None if there is none."""
        vector = None if self._velocity is None else self._velocity.vector
        return None if vector is None else vector.copy()

    def set_velocity(self, velocity: FloatVector) -> None:
        """Take over a velocity, float32[key.elements]; it is copied. Of keys that have momentum."""
        assert self._velocity is not None
        self._velocity.vector = velocity.copy()

    def take_back(self, push: m.Push, payload: Payload) -> None:
        """Add a pushed payload to the residual again, because its round was skipped: delayed, not lost."""
        coding = coding_of(push)
        if self._residual is None:
            self._residual = np.zeros(self.key.elements, np.float32)
        codec = self.codecs.find(push.codec)
        codec.accumulate(payload, coding, np.float32(1), self._residual)
        self._account.taken_back(codec, payload, coding)


def _filled(vector: FloatVector, key: Key) -> int:
    """Return the slices, as bits, in which float32[key.elements] is anything but zero."""
    slices = enumerate(key.slices)
    return sum(1 << bit for bit, part in slices if vector[part.offset : part.offset + part.length].any())


def coding_of(message: m.Push | m.Result) -> Coding:
    """Return what a header says of its payload."""
    return Coding(message.codec, message.level, message.elements, message.count, message.seed)

"""One layout's gradients, round by round: they come in as backward makes them, and the aggregate goes back in their place.

The thread that computes gradients calls `add`; codec threads encode and decode; the thread that owns the sockets keeps the
rounds. Each hands on by queue, so nothing here takes a lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import Buffer

from ps_accordion.codecs import registry
from ps_accordion.codecs.base import FloatVector, Payload
from ps_accordion.errors import TooManySkips, UsageError
from ps_accordion.layout import Key, Layout, Slice
from ps_accordion.regimes.base import Choice
from ps_accordion.wire import messages as m

from .coder import KeyCoder, Pushed, coding_of
from .rounds import Decide, Decode, Rounds

if TYPE_CHECKING:
    from .client import Client

__all__ = ["Exchange", "Timing"]


@dataclass
class Timing:
    """Where the time of a round went, in seconds; `encode` and `decode` are summed over the codec threads."""

    last_gradient: float = 0.0
    encode: float = 0.0
    decode: float = 0.0


@dataclass
class _Open:
    """The round that is being filled: a gradient a tensor, and how many of a key's slices are still to come."""

    waiting: list[int]
    gradients: dict[int, FloatVector] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)


class Exchange:
    """The rounds of one layout at this worker, with everything that they move.

    Args:
        client: Sockets and threads of this worker.
        number: Number of the layout.
        layout: The layout.
        decided: Called, on the socket's thread, when a round is decided and its aggregate stands in the gradients' memory.
    """

    def __init__(self, client: Client, number: int, layout: Layout, decided: Callable[[Decide, Timing], None]) -> None:
        self.client = client
        self.number = number
        self.layout = layout
        self.rounds = Rounds(number, layout, client.settings)
        slot, incarnation = client.membership.slot, client.membership.incarnation
        self.coders = [KeyCoder(number, key, client.settings, slot=slot, incarnation=incarnation) for key in layout.keys]
        self._decided = decided
        self._keys_of: dict[int, list[tuple[Key, Slice]]] = {index: [] for index in range(len(layout.tensors))}
        for key in layout.keys:
            for part in key.slices:
                self._keys_of[part.tensor].append((key, part))
        self._open: _Open | None = None
        self._timing = Timing()
        self._skipping = False
        self._flat = {key.number: np.empty(key.elements, np.float32) for key in layout.keys if len(key.slices) > 1}
        """Where fused small tensors are gathered before they are encoded, and decoded before they are spread."""

    # ------------------------------------------------------------ the thread that computes gradients

    def add(self, tensor: int, gradient: FloatVector, *, used: bool = True) -> None:
        """Hand over the gradient of one tensor for this round; the first call of a round begins it.

        Args:
            tensor: Index in the layout.
            gradient: float32[elements], contiguous and flat. It is read until the round is decided and then holds the aggregate:
                the caller leaves it alone until `decided` is called.
            used: Whether this worker has a gradient for it; if not, `gradient` only says where the aggregate goes.

        Raises:
            UsageError: The tensor has been handed over in this round already.
        """
        now = time.perf_counter()
        if self._open is None:
            self._open = _Open([len(key.slices) for key in self.layout.keys])
            self._timing = Timing()
            self._skipping = False
        current = self._open
        if tensor in current.gradients:
            raise UsageError(f"tensor {self.layout.tensors[tensor].name!r} already has a gradient in round {self.rounds.round}")
        current.gradients[tensor] = gradient
        if used:
            current.used.add(tensor)
        self._timing.last_gradient = now
        for key, _ in self._keys_of[tensor]:
            current.waiting[key.number] -= 1
            if not current.waiting[key.number]:
                self.client.codecs.submit(key.number, self._encoding(key, current))

    # ------------------------------------------------------------ codec threads

    def _encoding(self, key: Key, current: _Open) -> Callable[[], None]:
        def encode() -> None:
            began = time.perf_counter()
            pushed = self._encode(key, current)
            seconds = time.perf_counter() - began
            self.client.call(lambda: self._on_pushed(pushed, seconds))

        return encode

    def _encode(self, key: Key, current: _Open) -> Pushed:
        rounds, coder = self.rounds, self.coders[key.number]
        used = sum(1 << position for position, part in enumerate(key.slices) if part.tensor in current.used)
        if not used or self._skipping:
            kind: m.PushKind = "SKIP" if self._skipping else "UNUSED"
            push = coder.without_payload(kind, round_=rounds.round, previous_skipped=rounds.previous_skipped)
            return Pushed(push, None, 0.0)
        vector = self._gathered(key, current.gradients)
        self.client.record.gradient(self.number, rounds.round, key.number, used, vector)
        choice: Choice = rounds.choice(key)
        pushed = coder.encode(vector, round_=rounds.round, used=used, choice=choice, previous_skipped=rounds.previous_skipped)
        if pushed.message.kind == "SKIP":
            self._skipping = True
        return pushed

    def _gathered(self, key: Key, gradients: dict[int, FloatVector]) -> FloatVector:
        """Return the key's vector: a view of the gradient, or a copy where small tensors are fused."""
        if len(key.slices) == 1:
            part = key.slices[0]
            return gradients[part.tensor][part.start : part.start + part.length]
        flat = self._flat[key.number]
        for part in key.slices:
            flat[part.offset : part.offset + part.length] = gradients[part.tensor][part.start : part.start + part.length]
        return flat

    def _decoding(self, key: Key, decode: Decode, gradients: dict[int, FloatVector]) -> Callable[[], None]:
        def work() -> None:
            began = time.perf_counter()
            codec, coding = registry.get(decode.result.codec), coding_of(decode.result)
            if len(key.slices) == 1:
                part = key.slices[0]
                codec.decode(decode.payload, coding, gradients[part.tensor][part.start : part.start + part.length])
            else:
                flat = self._flat[key.number]
                codec.decode(decode.payload, coding, flat)
                for part in key.slices:
                    gradients[part.tensor][part.start : part.start + part.length] = flat[part.offset : part.offset + part.length]
            seconds = time.perf_counter() - began
            self.client.call(lambda: self._on_decoded(key.number, seconds))

        return work

    def _taking_back(self, push: m.Push, payload: Payload) -> Callable[[], None]:
        return lambda: self.coders[push.key].take_back(push, payload)

    # ------------------------------------------------------------ the thread that owns the sockets

    def _on_pushed(self, pushed: Pushed, seconds: float) -> None:
        self._timing.encode += seconds
        if pushed.loss:
            self.client.events.write(
                event="loss",
                layout=self.number,
                key=pushed.message.key,
                round=pushed.message.round,
                norm=pushed.loss,
                why="switch",
            )
        self.client.carry(self.rounds.pushed(pushed.message, pushed.payload, time.monotonic()))

    def on_result(self, result: m.Result, frames: Sequence[Buffer]) -> None:
        """Take in a result."""
        decode = self.rounds.on_result(result, frames)
        if decode is None:
            self._try_decide()
            return
        self.client.record.result(decode.result, decode.payload)
        if self._open is None:  # finished: nobody wants the aggregate
            self.rounds.decoded(decode.key)
            self._try_decide()
            return
        key = self.layout.keys[decode.key]
        self.client.codecs.submit(decode.key, self._decoding(key, decode, self._open.gradients))

    def _on_decoded(self, key: int, seconds: float) -> None:
        self._timing.decode += seconds
        self.rounds.decoded(key)
        self._try_decide()

    def _try_decide(self) -> None:
        round_ = self.rounds.round
        try:
            decision = self.rounds.decide()
        except TooManySkips:
            self._note_skip(round_)
            raise
        if decision is None:
            return
        for push, payload in decision.take_back:
            self.client.codecs.submit(push.key, self._taking_back(push, payload))
        if decision.kind == "SKIP":
            self._note_skip(round_)
        self._open = None
        self._decided(decision, self._timing)
        if self.rounds.finished and not self.rounds.ended:
            self._push_empty()

    def _note_skip(self, round_: int) -> None:
        self.client.events.write(event="skip", layout=self.number, round=round_)

    @property
    def is_open(self) -> bool:
        """Whether some gradient of a round has been handed over, and the round is not decided."""
        return self._open is not None

    def finish(self) -> None:
        """Say in every round from now on that this worker has no more gradients, until all have finished."""
        if not self.rounds.finished:
            self.rounds.finished = True
            self._push_empty()

    def _push_empty(self) -> None:
        rounds, now = self.rounds, time.monotonic()
        for coder in self.coders:
            push = coder.without_payload("EMPTY", round_=rounds.round, previous_skipped=rounds.previous_skipped)
            self.client.carry(rounds.pushed(push, None, now))

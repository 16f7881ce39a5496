"""An exchange of gradients that lie on the host: codec threads do all the work, a vector at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ps_accordion.codecs.base import FloatVector, Payload
from ps_accordion.layout import Key, Layout
from ps_accordion.selection import Selection
from ps_accordion.telemetry import trace
from ps_accordion.wire import messages as m

from .coder import KeyCoder, Pushed
from .exchange import Exchange, Open, Timing
from .rounds import Decide, Decode

if TYPE_CHECKING:
    from .client import Client

__all__ = ["HostExchange"]


class HostExchange(Exchange):
    """An exchange whose gradients are float32 arrays; see `Exchange`.

    Args:
        client: As for `Exchange`, like those that follow.
        number: Number of the layout.
        layout: The layout.
        decided: Called when a round is decided.
        trains: Whether these are gradients, which may be given momentum, and not what a script wants the mean of.
    """

    takes_tensors = False

    def __init__(
        self,
        client: Client,
        number: int,
        layout: Layout,
        decided: Callable[[Decide, Timing], None],
        *,
        trains: bool = True,
    ) -> None:
        super().__init__(client, number, layout, decided)
        slot, incarnation = client.membership.slot, client.membership.incarnation
        selection = Selection(client.settings.codec, layout)
        self._coders = [
            KeyCoder(
                number,
                key,
                client.settings,
                slot=slot,
                incarnation=incarnation,
                momenta=selection.momenta(key) if trains else (),
                take=client.transport.lending.take,
            )
            for key in layout.keys
        ]
        self._flat = {key.number: np.empty(key.elements, np.float32) for key in layout.keys if len(key.slices) > 1}
        """Where fused small tensors are gathered before they are encoded, and decoded before they are spread."""

    @property
    def coders(self) -> Sequence[KeyCoder]:
        """The coders, by key."""
        return self._coders

    def residuals(self) -> Iterable[tuple[int, FloatVector | None]]:
        """See `Exchange.residuals`. Owned by the coders."""
        return [(coder.key.number, coder.residual) for coder in self._coders]

    def _begin(self, key: Key, current: Open) -> None:
        self.client.codecs.submit(key.number, self._encoding(key, current))

    def _take_back(self, push: m.Push, payload: Payload) -> None:
        # Behind what is queued for the key, and before what the next round will queue.
        self.client.codecs.submit(push.key, lambda: self._coders[push.key].take_back(push, payload))

    # ------------------------------------------------------------ codec threads

    def _encoding(self, key: Key, current: Open) -> Callable[[], None]:
        def encode() -> None:
            began = trace.now()
            pushed = self._encode(key, current)
            if pushed.payload is not None:
                self.client.transport.lending.seal(pushed.payload)
            seconds = (trace.now() - began) / 1e9
            self._trace("encode", began, pushed.message)
            self.client.call_soon(lambda: self._on_pushed(pushed, seconds))

        return encode

    def _encode(self, key: Key, current: Open) -> Pushed:
        rounds, coder = self.rounds, self._coders[key.number]
        used, weight = current.part_of(key)
        if not used:
            push = coder.without_payload("UNUSED", round_=rounds.round, previous_skipped=rounds.previous_skipped, weight=weight)
            return Pushed(push, None, 0.0)
        vector = self._gathered(key, current.gradients)
        self.client.record.gradient(self.number, rounds.round, key.number, used, vector)
        # Also when another key has turned out not to be finite: this one's gradient comes back when the round is skipped.
        return coder.encode(
            vector,
            round_=rounds.round,
            used=used,
            choice=rounds.choice(key),
            previous_skipped=rounds.previous_skipped,
            weight=weight,
        )

    def _gathered(self, key: Key, gradients: dict[int, FloatVector]) -> FloatVector:
        """Return the key's vector: a view of the gradient, or a copy where small tensors are fused."""
        if len(key.slices) == 1:
            part = key.slices[0]
            return gradients[part.tensor][part.start : part.start + part.length]
        flat = self._flat[key.number]
        for part in key.slices:
            flat[part.offset : part.offset + part.length] = gradients[part.tensor][part.start : part.start + part.length]
        return flat

    def _decode(self, key: Key, decode: Decode, current: Open) -> None:
        gradients: dict[int, FloatVector] = current.gradients
        if len(key.slices) == 1:
            part = key.slices[0]
            out = gradients[part.tensor][part.start : part.start + part.length]
            decode.codec.receive(decode.payload, decode.coding, out)
            return
        flat = self._flat[key.number]
        decode.codec.receive(decode.payload, decode.coding, flat)
        for part in key.slices:
            gradients[part.tensor][part.start : part.start + part.length] = flat[part.offset : part.offset + part.length]

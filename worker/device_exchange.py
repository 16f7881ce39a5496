"""An exchange of gradients that lie on a torch device; `device.py` says what each thread does there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ps_accordion.codecs import registry
from ps_accordion.codecs.base import FloatVector, Payload
from ps_accordion.codecs.device import twin_of
from ps_accordion.layout import Key, Layout
from ps_accordion.selection import Selection
from ps_accordion.telemetry import trace
from ps_accordion.wire import messages as m

from .device import DeviceCoder, Pending
from .exchange import Exchange, Open, Timing
from .memory import Gradient
from .recorded import Part, Recordings
from .rounds import Decide, Decode

if TYPE_CHECKING:
    from .client import Client

__all__ = ["DeviceExchange"]


class DeviceExchange(Exchange):
    """An exchange whose gradients are tensors of one device; see `Exchange`, and `HostExchange` for the arguments.

    Raises:
        CodecError: The codec of a tensor has no form for accelerators.
    """

    takes_tensors = True

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
        selection = Selection(client.settings.codec, layout)
        for codec in sorted(selection.codecs()):
            twin_of(registry.find(self.rounds.codecs, codec))  # Now, not in the middle of the first backward.
        recordings = Recordings(
            max((key.elements for key in layout.keys), default=0),
            limit=max(1, len(selection.kinds())),
            warn=self._warn,
        )
        slot, incarnation = client.membership.slot, client.membership.incarnation
        self._coders = [
            DeviceCoder(
                *(number, key, client.settings),
                slot=slot,
                incarnation=incarnation,
                recordings=recordings,
                momenta=selection.momenta(key) if trains else (),
            )
            for key in layout.keys
        ]
        self._records = client.settings.run.record_gradients

    def _warn(self, text: str) -> None:
        self.client.events.write(event="warning", reason=text)
        print(f"ps-accordion: {text}", file=sys.stderr, flush=True)

    @property
    def coders(self) -> Sequence[DeviceCoder]:
        """The coders, by key."""
        return self._coders

    def residuals(self) -> Iterable[tuple[int, FloatVector | None]]:
        """See `Exchange.residuals`. Copies; none where the run keeps no records, for it waits for the device."""
        return [(coder.key.number, coder.host_residual()) for coder in self._coders] if self._records else []

    def add(self, tensor: int, gradient: Gradient, *, used: bool = True) -> None:
        """Hand over a gradient; see `Exchange.add`. The host waits for nothing. Buffers may come as an array of the host."""
        super().add(tensor, torch.from_numpy(gradient) if isinstance(gradient, np.ndarray) else gradient, used=used)

    def _begin(self, key: Key, current: Open) -> None:
        began = time.perf_counter()
        rounds, coder, parts = self.rounds, self._coders[key.number], _parts(key, current)
        used, weight = current.part_of(key)
        if used and self._records:
            self.client.record.gradient(self.number, rounds.round, key.number, used, coder.host_gradient(parts))
        pending = coder.begin(
            parts,
            round_=rounds.round,
            used=used,
            choice=rounds.choice(key),
            previous_skipped=rounds.previous_skipped,
            weight=weight,
        )
        self.client.codecs.submit(key.number, self._finishing(pending, time.perf_counter() - began))

    def _take_back(self, push: m.Push, payload: Payload) -> None:
        # At once: it is only noted, and backward's thread looks for it as soon as the round is decided.
        self._coders[push.key].take_back(push, payload)

    # ------------------------------------------------------------ codec threads

    def _finishing(self, pending: Pending, seconds: float) -> Callable[[], None]:
        def finish() -> None:
            began = trace.now()
            pushed = pending.pushed()
            self._trace("encode", began, pushed.message)
            self.client.call(lambda: self._on_pushed(pushed, seconds))

        return finish

    def _decode(self, key: Key, decode: Decode, current: Open) -> None:
        decode.codec.validate(decode.payload, decode.coding)
        self._coders[key.number].decode(decode.result, decode.payload, _parts(key, current))


def _parts(key: Key, current: Open) -> list[Part]:
    gradients: dict[int, torch.Tensor] = current.gradients
    return [(part, gradients[part.tensor][part.start : part.start + part.length]) for part in key.slices]

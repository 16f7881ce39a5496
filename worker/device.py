"""The side of a key that a worker keeps on a torch device: its residual, and how a gradient there becomes a push.

    thread of backward   begin     launches the encoding and the copy of the parcel, on the gradient's stream; never waits
    codec thread         pushed    waits for the copy, makes the message
    codec thread         decode    copies a result's payload to the device and decodes it on a stream of its own; waits for that
    any, between rounds  take_back notes a payload; `begin` adds it to the residual before it encodes

Behind a parcel comes what the ledger looks at: 2,048 elements of the gradient, and now and then of the residual.

The calls of one round come after all those of the round before; the caller sees to it, by a lock or a queue between the threads.
So residual and streams need no lock. `coder.py` is the same for gradients that the host holds, and has the same results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from msgspec import structs

from ps_accordion.codecs import Held, Rule
from ps_accordion.codecs.base import FloatVector, Payload
from ps_accordion.codecs.covering import push_seed
from ps_accordion.codecs.device import DeviceCodec, accumulate, encode, open_parcel, twin_of
from ps_accordion.config import Settings
from ps_accordion.layout import Key
from ps_accordion.regimes.base import Choice
from ps_accordion.wire import messages as m
from ps_accordion.wire.framing import frame_lengths

from .account import Account
from .coder import KeyCoder, Pushed, coding_of
from .following import KeyCodecs
from .recorded import Part, Recordings
from .streams import Mark, Streams, streams_of
from .velocity import DeviceVelocity

__all__ = ["DeviceCoder", "Pending"]


@dataclass(frozen=True)
class _Parcel:
    """A parcel on its way to the host."""

    twin: DeviceCodec
    memory: Payload
    arrived: Mark
    used: int
    level: float
    seed: int
    bound: int
    stretches: dict[str, FloatVector]
    """What the ledger looks at, float32[probe.length] each: `gradient`, and `before` and `after` of the residual."""


class Pending:
    """A push that the device still works on."""

    def __init__(self, coder: DeviceCoder, parcel: _Parcel | None, header: m.Push) -> None:
        self._coder = coder
        self._parcel = parcel
        self._header = header

    def pushed(self) -> Pushed:
        """Wait for the payload and return the push: of kind DATA, SKIP where gradient + residual is not finite, or UNUSED."""
        parcel, header = self._parcel, self._header
        if parcel is None:
            return Pushed(header, None, 0.0)
        parcel.arrived.synchronize()
        elements = self._coder.key.elements
        opened = open_parcel(parcel.twin, parcel.memory, elements=elements, level=parcel.level)
        if opened is None:
            return Pushed(structs.replace(header, kind="SKIP"), None, 0.0)
        self._coder.note_bound(parcel.bound)
        codec = parcel.twin.codec
        message = structs.replace(
            header,
            kind="DATA",
            used=parcel.used,
            codec=codec.name,
            level=parcel.level,
            elements=elements,
            count=opened.count,
            seed=parcel.seed if codec.shared_seed else 0,
            frames=frame_lengths(opened.payload.size),
        )
        if not self._coder.key.buffer:
            self._coder.note_push(message, opened.payload, parcel.stretches, opened.loss)
        return Pushed(message, opened.payload, opened.loss)


class DeviceCoder:
    """Encodes, decodes and takes back for one key, on the device of its gradients.

    Args:
        layout: Number of the layout.
        key: The key.
        settings: The settings of the job.
        slot: This worker's slot.
        incarnation: And its incarnation.
        momenta: Momentum that gradients are given before they are encoded, slice by slice; empty for none.
        recordings: Of what is launched, shared by all keys of a model.
    """

    def __init__(
        self,
        layout: int,
        key: Key,
        settings: Settings,
        *,
        slot: int,
        incarnation: int,
        recordings: Recordings,
        momenta: Sequence[float] = (),
    ) -> None:
        self.layout = layout
        self.key = key
        self.residual: torch.Tensor | None = None
        self._settings = settings
        self._slot = slot
        self._host = KeyCoder(layout, key, settings, slot=slot, incarnation=incarnation)
        """For pushes without a payload, and the last one. It never has a residual."""
        self.bound = 0
        self._streams: Streams | None = None
        self._ready: Mark | None = None
        """Where backward's stream stood when the gradients had been handed over: before it, they must not be written."""
        self._owed: deque[tuple[m.Push, Payload]] = deque()
        self._recordings = recordings
        self._velocity = DeviceVelocity(key, momenta) if momenta else None

    # ------------------------------------------------------------ the thread of backward

    @torch.no_grad()
    def begin(
        self,
        gradients: Sequence[Part],
        *,
        round_: int,
        used: int,
        choice: Choice,
        previous_skipped: bool,
        weight: float = 1.0,
    ) -> Pending:
        """Launch the encoding of this worker's gradient of one round, on the calling thread's stream; the host does not wait.

        Args:
            gradients: All slices of the key, in order. They are only read. Where a slice is not used, they hold anything.
            round_: Number of the round.
            used: Bit i is set when slice i has a gradient. If none has, nothing is encoded, and the push is UNUSED.
            choice: Codec and level.
            previous_skipped: Whether the round before was skipped.
            weight: What it counts for in the mean.

        Returns:
            The push; every one must be sent, because its payload has left the residual.

        Raises:
            CodecError: The codec has no form for accelerators.
            UsageError: torch knows no streams for the gradients' device.
        """
        self._recordings.record()
        device = gradients[0][1].device
        streams = self._streams_of(device)
        header = self.without_payload("UNUSED", round_=round_, previous_skipped=previous_skipped, weight=weight)
        if not used:
            self._ready = streams.mark()
            return Pending(self, None, header)
        codec = self.codecs.find(choice.codec)
        twin, bound = twin_of(codec), codec.payload_bound(self.key.elements, choice.level)
        self._settle_debts(device)
        residual = self._residual_on(device)
        rule: Rule = self._settings.codec.residual_at_switch if 0 < self.bound < bound else "keep"
        seed = push_seed(
            codec, self.key.elements, choice.level,
            job=self._settings.seed, layout=self.layout, key=self.key.number, round_=round_, slot=self._slot,
        )  # fmt: skip
        unused = self.key.elements_of(used)
        held: Held = [(part.offset, part.length) for part in unused]
        gathered, advance = _gathered(gradients), None
        if self._velocity is not None:
            gathered, advance = self._velocity.advance(gathered, unused)
        watched = self.account.probe.counts and not self.key.buffer
        stretches = {"gradient": self._stretch(gathered)} if watched else {}
        if watched and (rule != "keep" or codec.noisy(choice.level)):
            stretches["before"] = self._stretch(residual).clone()
        if held or rule != "keep" or advance is not None:
            parcel = encode(twin, gathered, residual, level=choice.level, seed=seed, held=held, rule=rule, advance=advance)
        else:
            parcel = self._recordings.encode(twin, gathered, residual, level=choice.level, seed=seed)
        if "before" in stretches or self.account.due:
            stretches["after"] = self._stretch(residual)
        memory, self._ready = streams.fetch(torch.cat([parcel, *stretches.values()]) if stretches else parcel)
        rows = memory[len(parcel) :].view(np.float32).reshape(len(stretches), self.account.probe.length)
        looks = dict(zip(stretches, rows, strict=True))
        made = _Parcel(twin, memory[: len(parcel)], self._ready, used, choice.level, seed, bound, looks)
        return Pending(self, made, header)

    def _stretch(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the stretch of a vector that the ledger watches, as bytes."""
        probe = self.account.probe
        return vector[probe.start : probe.start + probe.length].to(torch.float32).contiguous().view(torch.uint8)

    # ------------------------------------------------------------ codec threads

    def note_bound(self, bound: int) -> None:
        """Note the payload bound of a push that was made; a larger one in a later round is a switch to lighter compression."""
        self.bound = bound

    def note_push(self, push: m.Push, payload: Payload, stretches: dict[str, FloatVector], loss: float) -> None:
        """Note in the ledger what a push of kind DATA came to; where a switch threw something away, that is what it lacks."""
        account, coding, unused = self.account, coding_of(push), self.key.elements_of(push.used)
        codec = self.codecs.find(push.codec)
        seen = {name: account.probe.image(stretch) for name, stretch in stretches.items()}
        gradient, after, thrown = seen.get("gradient"), seen.get("after"), 0.0
        if loss and "before" in seen:
            came = account.probe.vector(gradient, unused).mass - account.probe.payload(codec, payload, coding).mass
            thrown = came + account.mass(seen["before"]) - account.mass(after)
        account.pushed(codec, payload, coding, gradient, unused, before=seen.get("before"), residual=after, thrown=thrown)

    @torch.no_grad()
    def decode(self, result: m.Result, payload: Payload, out: Sequence[Part]) -> None:
        """Write the aggregate to all slices of the key; it stands there on every stream when this returns.

        Args:
            result: The header.
            payload: Its payload, validated; only read, and not needed any more afterwards.
            out: All slices of the key, in order.
        """
        twin = twin_of(self.codecs.find(result.codec))
        with self._streams_of(out[0][1].device).aside(self._ready):
            self._recordings.decode(twin, payload, coding_of(result), out)

    # ------------------------------------------------------------ between rounds

    def take_back(self, push: m.Push, payload: Payload) -> None:
        """Add a pushed payload to the residual again, because its round was skipped: delayed, not lost.

        It is only noted here, and added when the next round begins: the payload must not change until then.
        """
        self._owed.append((push, payload))
        self.account.taken_back(self.codecs.find(push.codec), payload, coding_of(push))

    def without_payload(self, kind: m.PushKind, *, round_: int, previous_skipped: bool, weight: float = 1.0) -> m.Push:
        """Return a push without a payload, as `KeyCoder.without_payload` does. The residual is untouched."""
        return self._host.without_payload(kind, round_=round_, previous_skipped=previous_skipped, weight=weight)

    def flush(self, *, round_: int, previous_skipped: bool, weight: float) -> Pushed:
        """Return a push with all of the residual, as `KeyCoder.flush` does. Waits for the device."""
        self._settle_debts(torch.device("cpu") if self.residual is None else self.residual.device)
        residual = self.host_residual()
        self.residual = None
        return self._host.handed_over(residual, round_=round_, previous_skipped=previous_skipped, weight=weight)

    @property
    def account(self) -> Account:
        """What this key's pushes come to so far."""
        return self._host.account

    @property
    def codecs(self) -> KeyCodecs:
        """The codecs of this key, on the host."""
        return self._host.codecs

    @property
    def incarnation(self) -> int:
        """Of this worker, in the headers of its pushes."""
        return self._host.incarnation

    @incarnation.setter
    def incarnation(self, incarnation: int) -> None:
        self._host.incarnation = incarnation

    @torch.no_grad()
    def host_residual(self) -> FloatVector | None:
        """Return a copy of the residual, float32[n], with what was taken back, or None if there is none. Waits for the device."""
        if self.residual is not None:
            self._settle_debts(self.residual.device)
        return None if self.residual is None else self.residual.cpu().numpy().copy()

    def set_residual(self, residual: FloatVector) -> None:
        """Take over a residual, float32[n]; it is copied. The device it belongs on is known with the first gradient."""
        self.account.replaced(self.host_residual(), residual)
        self._owed.clear()
        self.residual = torch.from_numpy(residual.copy())

    @property
    def moves(self) -> bool:
        """Whether some slice is given momentum before it is encoded."""
        return self._velocity is not None

    @torch.no_grad()
    def host_velocity(self) -> FloatVector | None:
        """Return a copy of the velocity, float32[n], or None if there is none. Waits for the device."""
        vector = None if self._velocity is None else self._velocity.vector
        return None if vector is None else vector.cpu().numpy().copy()

    def set_velocity(self, velocity: FloatVector) -> None:
        """Take over a velocity, float32[n]; it is copied. The device it belongs on is known with the first gradient."""
        assert self._velocity is not None
        self._velocity.vector = torch.from_numpy(velocity.copy())

    @staticmethod
    @torch.no_grad()
    def host_gradient(gradients: Sequence[Part]) -> FloatVector:
        """Return a copy of a key's gradient as float32[n], for records. Waits for the device."""
        return _gathered(gradients).to(torch.float32).cpu().numpy().copy()

    def _settle_debts(self, device: torch.device) -> None:
        while self._owed:
            push, payload = self._owed.popleft()
            twin = twin_of(self.codecs.find(push.codec))
            accumulate(twin, payload, coding_of(push), np.float32(1), self._residual_on(device))

    def _residual_on(self, device: torch.device) -> torch.Tensor:
        if self.residual is None:
            self.residual = torch.zeros(self.key.elements, dtype=torch.float32, device=device)
        elif self.residual.device != device:
            self.residual = self.residual.to(device)
        return self.residual

    def _streams_of(self, device: torch.device) -> Streams:
        if self._streams is None:
            self._streams = streams_of(device)
        return self._streams


def _gathered(gradients: Sequence[Part]) -> torch.Tensor:
    """Return the key's vector, [n]: the only slice itself, or all in a row, in the widest of their types."""
    return gradients[0][1] if len(gradients) == 1 else torch.cat([view for _, view in gradients])

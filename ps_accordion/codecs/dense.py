"""dense: every element, as float32 or as halves with one power-of-two scale a payload.

At 32 bits the payload is the vector's own bytes and nothing is lost.
At 16 bits what rounding loses stays in the residual, so even a value that rounds to zero arrives in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import CodecError, PayloadError
from . import kernels, values
from .base import Changes, Coding, Encoded, FloatVector, Hint, Payload, Refolded
from .cache import goes_past
from .packing import INFINITE, PackingCodec, check_length, summed
from .workspace import borrow

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(PackingCodec):
    """The whole vector. Level: bits an element, 32 or 16."""

    name: ClassVar[str] = "dense"

    def libraries(self) -> frozenset[str]:
        """Return the modules of `kernels` that it runs; see `Codec.libraries`."""
        return super().libraries() | {"half"}

    def check_level(self, level: float) -> None:
        """Raise `CodecError` unless `level` is 32 or 16."""
        if level not in (16, 32):
            raise CodecError(f"dense: expected a level of 16 or 32 (bits an element), got {level!r}")

    def exact(self, level: float) -> bool:
        """Return whether nothing is lost: at 32 bits."""
        return level == 32

    def takes_any(self, level: float) -> bool:
        """Return whether the bytes need only be as many as before: at 32 bits, where nothing but elements is in them."""
        return level == 32

    def payload_bound(self, elements: int, level: float) -> int:
        """Return the payload's length in bytes; every payload has it."""
        self.check_level(level)
        return 4 * elements if level == 32 else values.PREAMBLE + 2 * elements

    def encode(
        self,
        gradient: FloatVector,
        residual: FloatVector | None,
        *,
        level: float,
        seed: int,
        out: Payload,
        rest: FloatVector | None = None,
        hint: Hint | None = None,
    ) -> Encoded | None:
        """Encode at a worker; see `Codec.encode`. Without a residual, what 16 bits cannot hold is lost."""
        self.check_level(level)
        if level == 16:
            return super().encode(gradient, residual, level=level, seed=seed, out=out, rest=rest)
        n = gradient.size
        # The sum is written where it is sent from.
        if summed(gradient, residual, out[: 4 * n].view(np.float32)) >= INFINITE:
            return None
        kept = residual if rest is None else rest
        if kept is not None:
            kernels.vector.clear(kept)
        return Encoded(4 * n, n)

    def reencode(
        self,
        total: FloatVector,
        scale: np.float32,
        residual: FloatVector | None,
        new_residual: FloatVector | None,
        *,
        level: float,
        seed: int,
        out: Payload,
        hint: Hint | None = None,
    ) -> Encoded | None:
        """Encode at a server; see `Codec.reencode`."""
        n = total.size
        if level != 32 or residual is not None:
            return super().reencode(total, scale, residual, new_residual, level=level, seed=seed, out=out)
        if kernels.vector.scaled_into(total, scale, out[: 4 * n].view(np.float32)) >= INFINITE:
            return None
        if new_residual is not None:
            kernels.vector.clear(new_residual)
        return Encoded(4 * n, n)

    def pack(self, v: FloatVector, peak: int, rest: FloatVector | None, *, level: float, seed: int, out: Payload) -> Encoded:
        """Write all of `v`; see `PackingCodec.pack`."""
        n = v.size
        if level == 32:
            out[: 4 * n].view(np.float32)[:] = v
            if rest is not None:
                kernels.vector.clear(rest)
            return Encoded(4 * n, n)
        kept = borrow("lost", n, np.float32) if rest is None else rest
        return Encoded(values.store(v, peak, "fp16", kept, out), n)

    def validate(self, payload: Payload, coding: Coding) -> None:
        """Raise `PayloadError` unless the payload holds exactly the vector, all of it finite."""
        n = coding.elements
        check_length(self, payload, coding)
        if coding.level == 32:
            _need_finite(kernels.vector.peak(payload.view(np.float32)))
            return
        form, _ = values.read_preamble(payload)
        if form != values.FP16:
            raise PayloadError(f"dense: expected value format {values.FP16} (half) at level 16, got {form}")
        values.check(payload, form, n)

    def fits(self, payload: Payload, coding: Coding) -> None:
        """Raise `PayloadError` unless the payload is as long as the vector; at 16 bits, whatever else is wrong with it."""
        if coding.level == 32:
            check_length(self, payload, coding)
        else:
            self.validate(payload, coding)

    def receive(self, payload: Payload, coding: Coding, out: FloatVector) -> None:
        """Write the vector to `out`; raise `PayloadError` if it is not finite, or of another length."""
        if coding.level != 32:
            super().receive(payload, coding, out)
            return
        check_length(self, payload, coding)
        row = borrow("row", kernels.vector.ROW, np.float32)
        _need_finite(kernels.vector.copied(payload.view(np.float32), row, goes_past(out.size), out))

    def decode(self, payload: Payload, coding: Coding, out: FloatVector) -> None:
        """Write the vector to `out`."""
        if coding.level == 32:
            out[:] = payload.view(np.float32)
            return
        form, exponent = values.read_preamble(payload)
        kernels.half.decode(values.values_of(payload, form, coding.elements), values.power(exponent), out)

    def peek(self, payload: Payload, coding: Coding, start: int, out: FloatVector) -> None:
        """Write a stretch of the vector to `out`."""
        end = start + out.size
        if coding.level == 32:
            out[:] = payload.view(np.float32)[start:end]
            return
        form, exponent = values.read_preamble(payload)
        kernels.half.decode(values.values_of(payload, form, coding.elements)[start:end], values.power(exponent), out)

    def begin(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Set `total` to `0 + weight` times the vector."""
        if coding.level == 32:
            kernels.vector.begin(weight, payload.view(np.float32), total)
        else:
            super().begin(payload, coding, weight, total)

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Add `weight` times the vector to `total`."""
        if coding.level == 32:
            kernels.vector.add(weight, payload.view(np.float32), total)
            return
        form, exponent = values.read_preamble(payload)
        kernels.half.add(values.values_of(payload, form, coding.elements), values.power(exponent), weight, total)

    def fold(
        self,
        payloads: Sequence[Payload],
        codings: Sequence[Coding],
        weights: Sequence[np.float32],
        scale: np.float32,
        residual: FloatVector | None,
        new_residual: FloatVector | None,
        *,
        level: float,
        seed: int,
        out: Payload,
        scratch: FloatVector,
        hint: Hint | None = None,
        changes: Changes | None = None,
    ) -> Refolded | None:
        """Sum payloads and encode the sum again, the last one in the pass that writes the result; see `Codec.fold`."""
        whole = level == 32 and residual is None and len(payloads) > 1 and all(coding.level == 32 for coding in codings)
        if not whole:
            return super().fold(
                payloads, codings, weights, scale, residual, new_residual,
                level=level, seed=seed, out=out, scratch=scratch, hint=hint, changes=changes,
            )  # fmt: skip
        *first, last = (payload.view(np.float32) for payload in payloads)
        n, total = last.size, out[: 4 * last.size].view(np.float32)
        if len(first) == 1:
            peak = kernels.vector.both(weights[0], first[0], weights[1], last, scale, total)
        else:
            self.begin_all(payloads[:-1], codings[:-1], weights[:-1], scratch)
            peak = kernels.vector.added(scratch, weights[-1], last, scale, total)
        if peak >= INFINITE:
            return None
        if new_residual is not None:
            kernels.vector.clear(new_residual)
        return Refolded(Encoded(4 * n, n), None)

    def _need_rest(self, rest: FloatVector | None, level: float) -> None:
        """Accept None: without a residual, dense at 16 bits is plain rounding."""


def _need_finite(peak: int) -> None:
    if peak >= INFINITE:
        raise PayloadError("dense: expected finite float32 values, got one that is infinite or not a number")

"""The contract of a codec: what every compressor promises to workers, servers and the wire.

A codec turns a float32 vector into a payload and back.
It holds options only; everything that changes is handed in: the residual lives with the worker or the shard that owns it.

Two sides use it:

* a **worker** calls `encode`: `v = gradient + residual`, payload = C(v), and keeps `v - D(payload)` as its residual;
* a **server** calls `validate` and `accumulate` for each member's payload in rank order, then `reencode`:
  `p = total * scale + residual`, payload = C(p), and `p - D(payload)` goes into the *other* half of its double buffer,
  which is undo and durability at once.

Both sides call `decode` on what the server answers, and get the same bits.

Promises that every codec keeps (the shared test suite checks them):

* `D(payload) + new_residual == v`, bit for bit where the arithmetic is exact, else to a few ulp; or, where nothing is kept,
  D(payload) is v in the mean over seeds (but for `signsgd`, whose loss is the point of it);
* the same bytes for the same input, level and seed, on every host and with any number of threads: reductions have a fixed
  order, no reassociation, no contraction, and no randomness but the counter seed that is handed in;
* not finite in, nothing changed: `encode` returns None and leaves the residual as it was;
* `validate` accepts only payloads that the kernels can read without leaving their arrays, whatever the bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import kernels

__all__ = ["STATE", "Changes", "Codec", "Coding", "Encoded", "FloatVector", "Hint", "Payload", "Refolded"]

FloatVector = NDArray[np.float32]
Payload = NDArray[np.uint8]


STATE = {"of": "key"}
"""Metadata of fields of a codec that are no options: what `fitted` and `following` set."""


class Coding(NamedTuple):
    """What a message header says of a payload: enough to decode it without knowing the plan.

    Attributes:
        codec: Wire name of the codec.
        level: The codec's setting, in the codec's own unit (a kept fraction, a number of bits).
        elements: Length of the vector; compared with the layout, never trusted.
        count: Entries in the payload; compared with its length and with the bound.
        seed: 64-bit counter seed shared by all members, for codecs that draw positions from it; 0 otherwise.
    """

    codec: str
    level: float
    elements: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    seed: int


class Encoded(NamedTuple):
    """How much of the output buffer an encoder used.

    Attributes:
        nbytes: Bytes written to the front of the buffer.
        count: Entries written, for the header.
    """

    nbytes: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here


class Changes(NamedTuple):
    """All that a fold changed: where the new residual differs from the old one, and what it has there.

    Whoever folds the next round from that new residual into the memory of the old one can bring it up to date with these alone.
    They say nothing any more once either has been written otherwise.

    Attributes:
        places: uint32, two lists, each of which rises from one 32,768 elements to the next. Nobody writes them again.
        values: float32, what the new residual has there; where a place comes twice, the later one.
        split: Where the second list begins.
    """

    places: NDArray[np.uint32]
    values: FloatVector
    split: int


class Refolded(NamedTuple):
    """What `Codec.fold` wrote.

    Attributes:
        encoded: Of the payload.
        changes: What it changed, where that is little and known.
    """

    encoded: Encoded
    changes: Changes | None


@dataclass(slots=True)
class Hint:
    """What an encoder remembers of one key from round to round, to be faster. No bit of any payload or residual depends on it.

    Whoever encodes a key keeps one for it, and nobody stores it or takes it back.

    Attributes:
        threshold: Magnitude bits that somewhat more elements than are to be sent reach the next time, most likely; 0 for none.
        smallest: Magnitude bits of the smallest element that was sent the last time; 0 before the first.
        trend: By how much that rises a round, smoothed.
        error: How far that was off, smoothed.
    """

    threshold: int = 0
    smallest: int = 0
    trend: int = 0
    error: int = 1 << 19


@dataclass(frozen=True)
class Codec(ABC):
    """One compressor. Subclasses are frozen dataclasses whose fields are its options, but for those marked `STATE`."""

    name: ClassVar[str]
    """Wire name, as it stands in message headers and in the configuration."""
    linear: ClassVar[bool] = False
    """Whether payloads of one (level, seed) may be summed without decoding them."""
    shared_seed: ClassVar[bool] = False
    """Whether all members must use one seed a round (else each worker draws its own)."""
    shared_half: ClassVar[bool] = False
    """Whether members' seeds of a round have their upper half in common, and the lower is their own (`covering.push_seed`)."""
    feedback: ClassVar[bool] = True
    """Whether encoding loses anything, so that a residual must be kept."""
    zero_kept: ClassVar[bool] = True
    """Whether a zero decodes as zero: only then can a span of a key be held (`holding.py`)."""
    levels: ClassVar[tuple[float, float] | None] = None
    """Light and heavy level where a job sets none; of codecs of other distributions, ours have theirs in `compression.LEVELS`."""
    scope: ClassVar[Literal["partition", "tensor"]] = "partition"
    """Whether it works on partitions of a tensor or needs the tensor whole."""

    @property
    def momentum(self) -> float:
        """Momentum that a worker gives the gradient before it encodes, in place of its optimizer, in [0, 1); 0 for none.

        What `encode` gets is then `u := momentum * u + gradient`, where u is kept at the worker, and masked by `mask`.
        """
        return 0.0

    def libraries(self) -> frozenset[str]:
        """Return the modules of `kernels` whose code it runs, with these options and whatever the level.

        `warm` makes them ready; what is missing here is compiled in the middle of a step.
        """
        return frozenset({"vector", "momentum"} if self.momentum else {"vector"})

    @abstractmethod
    def check_level(self, level: float) -> None:
        """Raise `CodecError`, naming the legal range, unless `level` is one this codec knows."""

    def takes_any(self, level: float) -> bool:
        """Return whether a payload may be read where somebody else may write: safely, whatever its bytes become meanwhile.

        Where not, `decode` and its like rely on what `validate` has seen.
        """
        return False

    @abstractmethod
    def payload_bound(self, elements: int, level: float) -> int:
        """Return the largest payload in bytes that `elements` floats can take at `level`.

        Indices, scales and counts are included: this is the honest price of a level, and the size of every buffer.
        """

    def lightness(self, level: float) -> float:
        """Return a number that is larger for the lighter of two levels; it decides where payload bounds are equal."""
        return level

    def fitted(self, rows: int) -> Codec:
        """Return this codec for keys that are matrices of so many rows, or of no known shape (0). Scope `tensor` only."""
        return self

    def following(self, payload: Payload, coding: Coding) -> Codec:
        """Return this codec as it encodes next after a payload, validated, of the same key. Scope `tensor` only.

        A worker encodes after the last result that it has seen; a server, where it cannot add payloads up, after one of them.
        """
        return self

    def exact(self, level: float) -> bool:
        """Return whether D(C(v)) == v at `level`, so that no residual needs to be kept."""
        return not self.feedback

    def keeps(self, level: float) -> bool:
        """Return whether what the payload does not carry must be kept: not where it is nothing, nor where it is zero in the mean.

        Where it need not, a residual that is handed in all the same goes with the vector, and zeros are left.
        """
        return not self.exact(level)

    def noisy(self, level: float) -> bool:
        """Return whether what is lost is kept nowhere: noise, where D(C(v)) is v in the mean, or cut off by design."""
        return not self.keeps(level) and not self.exact(level)

    @abstractmethod
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
        """Encode `v = gradient + residual` and keep what the payload does not carry.

        Args:
            gradient: float32[n], contiguous, only read.
            residual: float32[n], contiguous; None means zero, and that nothing is to be kept
                (allowed where not `keeps(level)`, and for dense).
            level: The codec's setting.
            seed: 64-bit counter seed of this (job, layout, key, round, member or all).
            out: uint8[>= payload_bound(n, level)], owned by the caller, 4-byte aligned; the payload is written to its front.
            rest: float32[n], written in full with what is kept, other memory than `residual`, which is then only read. None:
                what is kept replaces `residual`, which takes one more pass.
            hint: Of this key, at this worker; None for none.

        Returns:
            How much was written; None when any element of `v` is not finite, and then `residual` is untouched, and `rest`
            undefined.
        """

    def mask(self, payload: Payload, coding: Coding, velocity: FloatVector) -> None:
        """Set zero in `velocity`, float32[n], where D(payload) is not zero. Of codecs that have `momentum`.

        Args:
            payload: It has been validated, or was encoded here.
            coding: What its header says.
            velocity: The u of `momentum`, changed in place.
        """
        sent = np.empty_like(velocity)
        self.decode(payload, coding, sent)
        velocity[sent != 0] = 0.0

    @abstractmethod
    def validate(self, payload: Payload, coding: Coding) -> None:
        """Raise `PayloadError` unless `payload` is safe to decode as `coding` says.

        Must be safe on any bytes: lengths, counts, indices and scales are all checked here, and nowhere else.
        """

    def fits(self, payload: Payload, coding: Coding) -> None:
        """Raise `PayloadError` unless `payload` is safe to fold as `coding` says; what else is wrong with it, a fold finds.

        `validate`, unless a codec can do with less: a payload that is not finite makes a sum that is not.
        """
        self.validate(payload, coding)

    def receive(self, payload: Payload, coding: Coding, out: FloatVector) -> None:
        """Do `validate` and `decode`, where a codec can in one pass; what `out` holds is undefined if that raises."""
        self.validate(payload, coding)
        self.decode(payload, coding, out)

    @abstractmethod
    def decode(self, payload: Payload, coding: Coding, out: FloatVector) -> None:
        """Write D(payload) over the whole of `out`, float32[n]. The payload has been validated."""

    @abstractmethod
    def peek(self, payload: Payload, coding: Coding, start: int, out: FloatVector) -> None:
        """Write D(payload)[start : start + out.size] to `out`, at the cost of that many elements. The payload has been validated.

        The same bits as `decode` has there. For the ledger, which watches a stretch of every vector.
        """

    def rounding(self, payload: Payload, coding: Coding, start: int, vector: FloatVector) -> NDArray[np.float64]:
        """Return how far apart the two numbers are to one of which each element of a stretch was rounded. Noisy levels only.

        For the ledger, which has what was encoded and what was sent, and takes what lies between for noise up to this distance.
        What is clipped is lost; that is all of it where a codec keeps nothing and is not v in the mean either.

        Args:
            payload: It has been validated.
            coding: What its header says.
            start: First element of the stretch.
            vector: float32[m], what was encoded there; it is clipped, in place, as the codec clips.

        Returns:
            float64[m], at least `|vector - D(payload)|` in exact arithmetic.
        """
        raise NotImplementedError(f"{self.name} does not round at random")

    @abstractmethod
    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Add `weight * D(payload)` to `total`, float32[n], in place. The payload has been validated."""

    def begin(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Set `total`, float32[n], to `0 + weight * D(payload)`: `accumulate` where nothing has been added yet."""
        kernels.vector.clear(total)
        self.accumulate(payload, coding, weight, total)

    def begin_all(
        self, payloads: Sequence[Payload], codings: Sequence[Coding], weights: Sequence[np.float32], total: FloatVector
    ) -> None:
        """Set `total`, float32[n], to `0 + weight * D(payload)` of each member, one after another.

        `begin` and `accumulate`, unless a codec has a way to the same bits in fewer passes. At least one, all of them validated.
        """
        for position, (payload, coding, weight) in enumerate(zip(payloads, codings, weights, strict=True)):
            add = self.accumulate if position else self.begin
            add(payload, coding, weight, total)

    @abstractmethod
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
        """Encode `p = total * scale + residual` and write what the payload does not carry to `new_residual`.

        Args:
            total: float32[n], the weighted sum of the members' payloads; may be overwritten.
            scale: One over the sum of the weights.
            residual: float32[n], only read; None means zero.
            new_residual: float32[n], written in full, never the same memory as `residual`;
                None only where not `keeps(level)` and `residual` is None.
            level: The codec's setting.
            seed: 64-bit counter seed of this (job, layout, key, round, all).
            out: uint8[>= payload_bound(n, level)], owned by the caller, 4-byte aligned.
            hint: Of this key, at this server; None for none.

        Returns:
            How much was written; None when any element of `p` is not finite (`new_residual` is then undefined).
        """

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
        """Sum payloads and encode the sum again: `begin_all` and `reencode`, unless a codec has a shorter way.

        To the same bits, or to others that follow as well from what is handed in, where the codec says which (`quic_fl.py`); a
        residual of zeros is then as good as none.

        Args:
            payloads: At least one, of this codec, all of them validated.
            codings: What their headers say.
            weights: Factors of theirs in the sum.
            scale: As in `reencode`.
            residual: As in `reencode`.
            new_residual: As in `reencode`.
            level: As in `reencode`.
            seed: As in `reencode`.
            out: As in `reencode`.
            scratch: float32[n], overwritten.
            hint: As in `reencode`.
            changes: What `residual` has that `new_residual` has not; None where that is not known. A codec may ignore it.

        Returns:
            How much was written, and what has changed; None when the sum is not finite (`new_residual` is then undefined).
        """
        self.begin_all(payloads, codings, weights, scratch)
        encoded = self.reencode(scratch, scale, residual, new_residual, level=level, seed=seed, out=out, hint=hint)
        return None if encoded is None else Refolded(encoded, None)

    def addable(self, payloads: Sequence[Payload], coding: Coding) -> bool:
        """Return whether payloads of one coding may be summed without decoding them. Linear codecs only."""
        return True

    def sum_payloads(
        self, payloads: list[Payload], weights: list[np.float32], scale: np.float32, coding: Coding, out: Payload
    ) -> Encoded | None:
        """Sum payloads of one coding without decoding them: `out = scale * sum(weight * payload)`. Linear codecs only.

        Returns:
            How much was written; None when the sum is not finite.
        """
        raise NotImplementedError(f"{self.name} is not linear")

    def release(self, residual: FloatVector, coding: Coding, payload: Payload, new_residual: FloatVector) -> bool:
        """Add the residual's covered coordinates to a summed payload and clear them. Linear codecs only.

        `payload += residual[covered]`, `new_residual = residual` with the covered coordinates zero: what a linear codec does
        with a residual that an earlier codec left on the server.

        Returns:
            False when the payload is no longer finite.
        """
        raise NotImplementedError(f"{self.name} is not linear")

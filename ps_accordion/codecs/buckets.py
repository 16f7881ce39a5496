"""What quantising codecs share: a payload of buckets, each with a scale of its own and a code an element.

Payload, little-endian, with B elements a bucket, C = ceil(n / B) buckets and b bits a code:

    u32     B
    f32     scale of each bucket, C of them, from 2^-126 to 2^120
    bytes   codes of one bucket after the other; w = ceil(m * b / 8) bytes for a bucket of m elements (`kernels/buckets.py`)

Every payload of one length, level and bucket has the same size. Its preamble says what the bucket is: a receiver needs no option.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import CodecError, PayloadError
from . import kernels
from .base import Coding, Encoded, FloatVector, Payload
from .cache import goes_past
from .onepass import OnePassCodec
from .packing import INFINITE, ONE
from .workspace import borrow

__all__ = ["BUCKETS", "PREAMBLE", "BucketCodec", "Parts", "bucket_of", "parts_of", "scratch_codes"]

BUCKETS = (128, 256, 512, 1024, 2048, 4096)
"""Elements that may share a scale: fewer cost more than 1/4 bit each, more leave the first-level cache."""
PREAMBLE = 4


class Parts(NamedTuple):
    """The parts of a payload, as views.

    Attributes:
        scales: float32[buckets].
        codes: uint8[bytes of all codes].
    """

    scales: FloatVector
    codes: Payload


class _Member(NamedTuple):
    """A payload that is summed."""

    parts: Parts
    width: int
    bucket: int
    weight: np.float32


@dataclass(frozen=True)
class BucketCodec(OnePassCodec):
    """A codec with one scale a bucket. Level: bits a code.

    Attributes:
        bucket: Elements that share a scale. Encoders use it; decoders read it from the payload.
    """

    widths: ClassVar[tuple[int, ...]]
    """Levels that the codec has."""
    powers: ClassVar[int] = 0
    """1 where codes are natural, else 0."""
    bucket: int = 512

    def libraries(self) -> frozenset[str]:
        """Return the modules of `kernels` that it runs; see `Codec.libraries`."""
        return super().libraries() | {"buckets", "codes"}

    def __post_init__(self) -> None:
        """Refuse a bucket that no payload may have."""
        if self.bucket not in BUCKETS:
            raise CodecError(f"{self.name}: expected a bucket among {', '.join(map(str, BUCKETS))}, got {self.bucket!r}")

    def check_level(self, level: float) -> None:
        """Raise `CodecError` unless `level` is among `widths`."""
        if level not in self.widths:
            known = ", ".join(map(str, self.widths))
            raise CodecError(f"{self.name}: expected a level among {known} (bits an element), got {level!r}")

    def payload_bound(self, elements: int, level: float) -> int:
        """Return the payload's length in bytes; every payload has it."""
        self.check_level(level)
        return _length(elements, self.bucket, int(level))

    def fuse(
        self,
        a: FloatVector,
        scale: np.float32,
        b: FloatVector,
        rest: FloatVector | None,
        *,
        level: float,
        seed: int,
        out: Payload,
    ) -> Encoded | None:
        """Write buckets; see `OnePassCodec.fuse`."""
        self.check_level(level)
        n, width = a.size, int(level)
        end = _length(n, self.bucket, width)
        out[:PREAMBLE].view(np.uint32)[0] = self.bucket
        parts = _parts(out[:end], n, self.bucket)
        if self.quantise(a, scale, b, rest, width=width, seed=seed, parts=parts) >= INFINITE:
            return None
        return Encoded(end, n)

    @abstractmethod
    def quantise(
        self,
        a: FloatVector,
        scale: np.float32,
        b: FloatVector,
        rest: FloatVector | None,
        *,
        width: int,
        seed: int,
        parts: Parts,
    ) -> int:
        """Write scales and codes of `v = a * scale + b`, and all that is to be kept to `rest`.

        Args:
            a: float32[n].
            scale: A factor.
            b: float32[n], or empty for zero.
            rest: float32[n], other memory than `b`; None where there is no residual.
            width: Bits of a code.
            seed: 64-bit counter seed.
            parts: Of the payload, to be filled.

        Returns:
            The bits of a largest magnitude in `v`. Where it is not finite, what has been written is undefined.
        """

    def validate(self, payload: Payload, coding: Coding) -> None:
        """Raise `PayloadError` unless the payload holds exactly one code an element, and scales that keep all codes finite."""
        n = coding.elements
        try:
            self.check_level(coding.level)
        except CodecError as error:
            raise PayloadError(str(error)) from None
        if payload.size < PREAMBLE:
            raise PayloadError(f"{self.name}: expected a preamble of {PREAMBLE} bytes, got {payload.size}")
        bucket = bucket_of(payload)
        if bucket not in BUCKETS:
            raise PayloadError(f"{self.name}: expected a bucket among {', '.join(map(str, BUCKETS))}, got {bucket}")
        length = _length(n, bucket, int(coding.level))
        if coding.count != n or payload.size != length:
            raise PayloadError(
                f"{self.name}: expected {n} entries in {length} bytes at level {coding.level!r} with a bucket of {bucket}, "
                f"got {coding.count} entries in {payload.size} bytes"
            )
        if not kernels.codes.check(_parts(payload, n, bucket).scales):
            raise PayloadError(f"{self.name}: expected scales from 2^-126 to 2^120, got another")

    def decode(self, payload: Payload, coding: Coding, out: FloatVector) -> None:
        """Write what the codes stand for to `out`."""
        self._gather([_member(payload, coding, ONE)], out, past=goes_past(out.size))

    def peek(self, payload: Payload, coding: Coding, start: int, out: FloatVector) -> None:
        """Write what a stretch of the codes stands for to `out`: whole buckets are read, and cut."""
        bucket, parts = parts_of(payload, coding)
        first, last = start // bucket, -(-(start + out.size) // bucket)
        whole = borrow("peeked", min(last * bucket, coding.elements) - first * bucket, np.float32)
        codes = parts.codes[first * bucket * int(coding.level) // 8 :]
        self._gather([_Member(Parts(parts.scales[first:last], codes), int(coding.level), bucket, ONE)], whole)
        out[:] = whole[start - first * bucket :][: out.size]

    def rounding(self, payload: Payload, coding: Coding, start: int, vector: FloatVector) -> NDArray[np.float64]:
        """Return the step of linear codes; of powers, the power of two that an element is not below."""
        bucket, parts = parts_of(payload, coding)
        width, end = int(coding.level), start + vector.size
        scales = np.repeat(parts.scales[start // bucket : -(-end // bucket)], bucket)[start % bucket :][: vector.size]
        # Scaled up and down again, the largest element of a bucket may have become one or two units of the last place shorter.
        largest = scales if self.powers else scales * np.float32(((1 << (width - 1)) - 1) * (1 + 2.0**-21))
        np.clip(vector, -largest, largest, out=vector)
        steps = scales.astype(np.float64)
        if not self.powers:
            return steps
        _, exponents = np.frexp(vector.astype(np.float64))
        return np.maximum(np.where(vector == 0, 0.0, np.ldexp(0.5, exponents)), 2.0**-126 * steps)

    def begin(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Set `total` to `0 + weight` times what the codes stand for."""
        self._gather([_member(payload, coding, weight)], total)

    def accumulate(self, payload: Payload, coding: Coding, weight: np.float32, total: FloatVector) -> None:
        """Add `weight` times what the codes stand for to `total`."""
        self._gather([_member(payload, coding, weight)], total, begun=True)

    def begin_all(
        self, payloads: Sequence[Payload], codings: Sequence[Coding], weights: Sequence[np.float32], total: FloatVector
    ) -> None:
        """Sum up to `kernels.codes.MOST` members at once, so that a sum is read and written once and not once a member."""
        members = [_member(*each) for each in zip(payloads, codings, weights, strict=True)]
        for first in range(0, len(members), kernels.codes.MOST):
            self._gather(members[first : first + kernels.codes.MOST], total, begun=first > 0)

    def _gather(self, members: Sequence[_Member], total: FloatVector, *, begun: bool = False, past: bool = False) -> None:
        """Add up to `kernels.codes.MOST` members to `total`, or set it to their sum, `past` the cache if nobody reads it soon."""
        shapes = np.array([each for member in members for each in (member.width, member.bucket)], np.uint32)
        weights = np.array([member.weight for member in members], np.float32)
        missing = kernels.codes.MOST - len(members)
        codes = [member.parts.codes for member in members] + [members[0].parts.codes] * missing
        scales = [member.parts.scales for member in members] + [members[0].parts.scales] * missing
        row = borrow("piece", kernels.codes.PIECE, np.float32)
        wide = scratch_codes(max(member.bucket for member in members))
        arguments: list[Any] = [len(members), int(begun), self.powers, shapes, weights, *codes, *scales, wide, row, past, total]
        kernels.codes.gather(*arguments)


def _code_bytes(elements: int, bucket: int, width: int) -> int:
    """Return the bytes of all codes: those of a last, shorter bucket are rounded up."""
    whole, left = divmod(elements, bucket)
    return whole * (bucket * width // 8) + -(-left * width // 8)


def scratch_codes(bucket: int) -> NDArray[np.uint8]:
    """Return the thread's scratch for codes of one bucket, a byte each."""
    return borrow("wide", bucket + 3, np.uint8)


def bucket_of(payload: Payload) -> int:
    """Return what the preamble of a payload says, whatever that is."""
    return int.from_bytes(payload[:PREAMBLE].tobytes(), "little")


def parts_of(payload: Payload, coding: Coding) -> tuple[int, Parts]:
    """Return bucket and parts of a payload that has been validated."""
    bucket = bucket_of(payload)
    return bucket, _parts(payload, coding.elements, bucket)


def _member(payload: Payload, coding: Coding, weight: np.float32) -> _Member:
    bucket, parts = parts_of(payload, coding)
    return _Member(parts, int(coding.level), bucket, weight)


def _parts(payload: Payload, elements: int, bucket: int) -> Parts:
    codes_at = PREAMBLE + 4 * -(-elements // bucket)
    return Parts(payload[PREAMBLE:codes_at].view(np.float32), payload[codes_at:])


def _length(elements: int, bucket: int, width: int) -> int:
    return PREAMBLE + 4 * -(-elements // bucket) + _code_bytes(elements, bucket, width)

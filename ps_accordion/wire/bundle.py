"""Several messages to one peer as one: a *bundle*.

A message costs each process on its way about as much for being one as for what it says: frames, a checksum, system calls, and
threads that wake. So who has several things ready for one peer sends them together. Nothing waits in order to be bundled, the
machines know nothing of it, and a bundle is lost, doubled or late as a whole, as any message may be.

    header frame    the message ["bundle", [[message, [length of each payload frame]], ...]], framed as any other
    one more frame  all their payload frames, one behind another, each at a multiple of 8 bytes; none where they have no byte
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import msgspec
from typing_extensions import Buffer

from ..errors import WireError
from . import framing
from .messages import MAX_BUNDLED, Bundle, Message

__all__ = ["MOST_BYTES", "Part", "bundled", "parts_of"]

Part: TypeAlias = tuple[Message, Sequence[Buffer]]
"""A message and its payload frames."""

MOST_BYTES = 1 << 17
"""Payload of a bundle. It arrives as a whole, so a larger one would keep a slow link's other end waiting for what is there:
this much takes 10 ms at 100 Mbit/s. And its frames are copied, which for less than this takes no longer than telling ZeroMQ."""
MOST_HEADER = 1 << 15
"""Bytes that the messages of a bundle take together, so that its header stays far below the limit of headers."""
ALIGNMENT = 8
"""Kernels read payloads as numbers of up to 4 bytes where they lie."""


def bundled(parts: Iterable[Part]) -> Iterator[list[Buffer]]:
    """Yield the frames of few messages that say the same as these, in their order.

    Args:
        parts: The messages. Payload frames of one that goes by itself are not copied: see `framing.pack`.
    """
    waiting: list[Part] = []
    packed: list[bytes] = []
    header = payload = 0
    for part in parts:
        body = msgspec.msgpack.encode(part[0])
        nbytes = sum(_aligned(memoryview(frame).nbytes) for frame in part[1])
        if waiting and (
            len(waiting) == MAX_BUNDLED or header + len(body) > MOST_HEADER or payload + nbytes > MOST_BYTES
        ):  # fmt: skip
            yield _frames(waiting, packed)
            waiting, packed, header, payload = [], [], 0, 0
        waiting.append(part)
        packed.append(body)
        header += len(body)
        payload += nbytes
    if waiting:
        yield _frames(waiting, packed)


def _frames(parts: list[Part], packed: list[bytes]) -> list[Buffer]:
    if len(parts) == 1:
        return framing.pack(*parts[0])
    joined = bytearray()
    entries: list[tuple[msgspec.Raw, list[int]]] = []
    for (_, payload), body in zip(parts, packed, strict=True):
        lengths = []
        for frame in payload:
            view = memoryview(frame)
            lengths.append(view.nbytes)
            if view.nbytes:
                joined += bytes(-len(joined) % ALIGNMENT)
                joined += view
        entries.append((msgspec.Raw(body), lengths))
    return framing.pack(Bundle(entries), (joined,) if joined else ())


def parts_of(message: Message, payload: Sequence[Buffer]) -> list[Part]:
    """Return the messages in one that `framing.unpack` returned: itself, unless it is a bundle.

    The payload frames of a bundle's messages are views of its own.

    Raises:
        WireError: A bundle holds what is no message, or another bundle, or its frame is not as long as its lengths say.
    """
    if not isinstance(message, Bundle):
        return [(message, payload)]
    if len(payload) > 1:
        raise WireError(f"expected at most one frame behind the header of a bundle, got {len(payload)}")
    joined = memoryview(payload[0] if payload else b"")
    parts: list[Part] = []
    end = 0
    for raw, lengths in message.parts:
        one = framing.decode(raw)
        if isinstance(one, Bundle):
            raise WireError("expected messages in a bundle, got another bundle")
        frames = []
        for length in lengths:
            start = _aligned(end) if length else end
            end = start + length
            frames.append(joined[start:end])
        parts.append((one, frames))
    if end != joined.nbytes:
        raise WireError(f"expected {end} bytes behind the header of a bundle, got {joined.nbytes}")
    return parts


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT

"""From messages to frames and back, with every limit set.

A message is a header frame and up to 17 raw frames (a payload of 1 to 16, then perhaps a plan):

    header frame = magic "PSA" | protocol version (1 byte) | checksum (8 bytes, little endian) | msgpack array

The checksum is xxh3-64 over the msgpack bytes followed by all other frames.
Nothing is decoded before the checksum agrees, and nothing is allocated by a size from the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import xxhash
from typing_extensions import Buffer

from ..errors import WireError
from . import messages
from .messages import Message

__all__ = [
    "MAX_FRAME",
    "MAX_HEADER",
    "PROTOCOL_VERSION",
    "decode",
    "frame_lengths",
    "join_frames",
    "pack",
    "split_frames",
    "unpack",
]

PROTOCOL_VERSION = 2
MAGIC = b"PSA"
PRELUDE = 12
MAX_HEADER = 1 << 19
"""A view of 1,024 members and as many shards with addresses of 256 characters takes 300 KiB. Pushes and results take under
512 bytes, questions about 256 keys 1.3 KB, the longest reason 8 KB."""
MAX_FRAME = (1 << 22) + (1 << 12)
"""One partition of dense float32 and some room. Larger payloads travel in several frames."""
MAX_FRAMES = 18

_KINDS = tuple(
    kind
    for name in messages.__all__
    if isinstance(kind := getattr(messages, name), type) and issubclass(kind, Message) and kind is not Message
)
_ANY: Any = None
for _kind in _KINDS:
    _ANY = _kind if _ANY is None else _ANY | _kind
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(_ANY, strict=True)
"""Checks types, ranges and lengths as it reads: a length that the header cannot hold is refused before memory is taken for it."""


def pack(message: Message, payload: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return the frames of a message.

    Args:
        message: What to say.
        payload: Raw frames to follow it. They are not copied: the caller must leave them alone until they are sent.
    """
    body = msgspec.msgpack.encode(message)
    checksum = xxhash.xxh3_64(body)
    for frame in payload:
        checksum.update(frame)
    prelude = MAGIC + bytes([PROTOCOL_VERSION]) + checksum.intdigest().to_bytes(8, "little")
    return [prelude + body, *payload]


def unpack(frames: Sequence[Buffer]) -> tuple[Message, list[Buffer]]:
    """Return the message in these frames, and its payload frames as they are.

    Raises:
        WireError: Wrong magic, another protocol version, a wrong checksum, or a header that is no message of this protocol.
    """
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise WireError(f"expected 1 to {MAX_FRAMES} frames, got {len(frames)}")
    header = bytes(memoryview(frames[0])[: MAX_HEADER + 1])
    if len(header) > MAX_HEADER or len(header) <= PRELUDE or header[:3] != MAGIC:
        raise WireError(f"expected a header frame that starts with {MAGIC!r}, got {header[:16]!r} ({len(header)} bytes)")
    if header[3] != PROTOCOL_VERSION:
        raise WireError(
            f"protocol version {header[3]} from there, {PROTOCOL_VERSION} here; "
            "install the same release of ps-accordion everywhere"
        )
    body, payload = header[PRELUDE:], list(frames[1:])
    checksum = xxhash.xxh3_64(body)
    for frame in payload:
        if memoryview(frame).nbytes > MAX_FRAME:
            raise WireError(f"expected frames of at most {MAX_FRAME} bytes, got {memoryview(frame).nbytes}")
        checksum.update(frame)
    expected = int.from_bytes(header[4:PRELUDE], "little")
    if checksum.intdigest() != expected:
        raise WireError(f"checksum {checksum.intdigest():016x} of what came, {expected:016x} of what was sent")
    return decode(body), payload


def decode(body: Buffer) -> Message:
    """Return the message that msgpack bytes stand for.

    Raises:
        WireError: They are no message of this protocol.
    """
    try:
        return _DECODER.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"not a message of this protocol: {error} (it starts with {bytes(memoryview(body)[:24])!r})") from None


def split_frames(data: Buffer) -> tuple[memoryview, ...]:
    """Return bytes, which stay the caller's, in frames that are not too long."""
    whole = memoryview(data)
    return tuple(whole[start : start + MAX_FRAME] for start in range(0, whole.nbytes, MAX_FRAME))


def frame_lengths(nbytes: int) -> list[int]:
    """Return the lengths of the frames that so many bytes are split into."""
    return [min(MAX_FRAME, nbytes - start) for start in range(0, nbytes, MAX_FRAME)]


def join_frames(frames: Sequence[Buffer], lengths: Sequence[int], *, fixed: bool = True) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return payload frames as one array whose memory is aligned for 4-byte numbers.

    A single large frame is used as it lies, if it may be; the array then keeps the frame alive.

    Args:
        frames: The frames that came.
        lengths: What the header says of each.
        fixed: Whether nobody else may write it: a read-only frame is then copied, as it may lie in the memory of another process.

    Raises:
        WireError: Number or lengths differ.
    """
    sizes = [memoryview(frame).nbytes for frame in frames]
    if sizes != list(lengths):
        raise WireError(f"expected payload frames of {list(lengths)} bytes, got {sizes}")
    if len(frames) == 1:
        array = np.frombuffer(memoryview(frames[0]), np.uint8)
        if (array.flags.writeable or not fixed) and array.ctypes.data % 4 == 0:
            return array
    whole = np.empty(sum(sizes), np.uint8)
    start = 0
    for frame, size in zip(frames, sizes, strict=True):
        whole[start : start + size] = np.frombuffer(memoryview(frame), np.uint8)
        start += size
    return whole

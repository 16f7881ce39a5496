"""What a worker that trains hands to one that joins in the middle: where the rounds stand, and the state of the model.

    length of the standing (4 bytes, little-endian) | standing (msgpack) | state of the model (safetensors, or nothing)

The state is that after the last round, with which the open one begins: the joiner is a member of the view already, so the others
cannot finish the open round without it.
"""

from __future__ import annotations

import msgspec

from ps_accordion.errors import WireError

from .rounds import Standing

__all__ = ["packed", "unpacked"]

_PRELUDE = 4
_DECODER = msgspec.msgpack.Decoder(Standing)


def packed(standing: Standing, model: bytes) -> bytes:
    """Return both as one run of bytes."""
    head = msgspec.msgpack.encode(standing)
    return len(head).to_bytes(_PRELUDE, "little") + head + model


def unpacked(data: bytes) -> tuple[Standing, bytes]:
    """Return what `packed` was given.

    Raises:
        WireError: The bytes are something else.
    """
    end = _PRELUDE + int.from_bytes(data[:_PRELUDE], "little")
    try:
        return _DECODER.decode(data[_PRELUDE:end]), data[end:]
    except msgspec.DecodeError as error:
        raise WireError(f"a donor's state of {len(data)} bytes does not begin with where its rounds stand: {error}") from None

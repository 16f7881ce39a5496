"""A record in shared memory that is never half written: two slots, of which the older is overwritten.

    slot = checksum (8 bytes) | sequence (8) | number of parts (4) | length of each part (18 x 4) | parts, one behind another

The checksum is xxh3-64 over all that follows it, up to the end of the parts. It is computed from the slot's own memory, so it
cannot be there before that is, and it is the last thing written. A process that is killed anywhere leaves the other slot as it
was. A reader takes the slot with the higher sequence among those whose checksum is right.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import xxhash
from typing_extensions import Buffer

from ps_accordion.errors import StorageError

__all__ = ["ALIGNMENT", "MAX_PARTS", "Damaged", "Slots", "aligned"]

MAX_PARTS = 18
"""A header, a plan and the 16 frames of a payload."""
ALIGNMENT = 64
"""A line of cache: what vector instructions want at most, and what one core takes from another."""

_CHECKSUM = struct.Struct("<Q")
_PREAMBLE = struct.Struct(f"<QI{MAX_PARTS}I")
_BODY = 128
"""Where the parts begin: the preamble's 92 bytes with the checksum, aligned."""


class Damaged(Exception):
    """What is stored cannot be trusted; the text says why. It does not leave this room: the shard starts blank, and says so."""


def aligned(nbytes: int) -> int:
    """Return the next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Slots:
    """One record, written as a whole or not at all. One thread at a time.

    Args:
        memory: `Slots.nbytes(capacity)` bytes, shared with whoever reads it after us. Ours to write until `close`.

    Raises:
        Damaged: Neither slot holds a record. A new one is made by `Slots.format`.
    """

    def __init__(self, memory: memoryview) -> None:
        half = len(memory) // 2
        self._slots = (memory[:half], memory[half:])
        self.capacity = half - _BODY
        found = [sequence for sequence in map(_sequence, self._slots) if sequence is not None]
        if not found:
            raise Damaged("both copies of a record have a wrong checksum")
        self._last = max(found)

    @staticmethod
    def nbytes(capacity: int) -> int:
        """Return the memory that a record of at most `capacity` bytes takes."""
        return 2 * aligned(_BODY + capacity)

    @classmethod
    def format(cls, memory: memoryview) -> Slots:
        """Make a record that was never written out of memory that is all zeros."""
        _seal(memory, 0, ())
        return cls(memory)

    def write(self, *parts: Buffer) -> None:
        """Replace the record. When this returns, a reader finds the new one; until then, the old one.

        Args:
            parts: At most `MAX_PARTS`, together at most `capacity` bytes. They are copied.

        Raises:
            StorageError: They are too many or too long; the old record stands.
        """
        views = [memoryview(part).cast("B") for part in parts]
        lengths = [view.nbytes for view in views]
        if len(parts) > MAX_PARTS or sum(lengths) > self.capacity:
            raise StorageError(
                f"expected a record of at most {MAX_PARTS} parts and {self.capacity} bytes, got {len(parts)} parts and "
                f"{sum(lengths)} bytes; this is a mistake of whoever reserved the space, please report it"
            )
        slot = self._slots[(self._last + 1) & 1]
        start = _BODY
        for view, length in zip(views, lengths, strict=True):
            slot[start : start + length] = view
            start += length
        _seal(slot, self._last + 1, lengths)
        self._last += 1

    def read(self) -> list[bytes] | None:
        """Return copies of the parts as last written; None if there was no write."""
        return None if self._last == 0 else _parts(self._slots[self._last & 1])

    def before(self) -> list[bytes] | None:
        """Return copies of the parts as they were before the last write; None if there was no earlier one, or it is damaged."""
        slot = self._slots[(self._last + 1) & 1]
        return _parts(slot) if self._last > 1 and _sequence(slot) == self._last - 1 else None

    def close(self) -> None:
        """Let go of the memory; a write or read after this is a ValueError, as with a closed file."""
        for slot in self._slots:
            slot.release()


def _parts(slot: memoryview) -> list[bytes]:
    _, count, *lengths = _PREAMBLE.unpack_from(slot, _CHECKSUM.size)
    ends = accumulate([_BODY, *lengths[:count]])
    return [bytes(slot[start:end]) for start, end in pairwise(ends)]


def _seal(slot: memoryview, sequence: int, lengths: Sequence[int]) -> None:
    end = _BODY + sum(lengths)
    _PREAMBLE.pack_into(slot, _CHECKSUM.size, sequence, len(lengths), *lengths, *(0,) * (MAX_PARTS - len(lengths)))
    _CHECKSUM.pack_into(slot, 0, xxhash.xxh3_64_intdigest(slot[_CHECKSUM.size : end]))


def _sequence(slot: memoryview) -> int | None:
    """Return the number of the write that a slot holds; None where it holds none, or a part of one."""
    fields: tuple[Any, ...] = _PREAMBLE.unpack_from(slot, _CHECKSUM.size)
    sequence, count, *lengths = fields
    end = _BODY + sum(lengths)
    if count > MAX_PARTS or end > len(slot):
        return None  # the lengths are as little to be trusted as the rest
    right = _CHECKSUM.unpack_from(slot)[0] == xxhash.xxh3_64_intdigest(slot[_CHECKSUM.size : end])
    return int(sequence) if right else None

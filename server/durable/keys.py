"""The file of one layout: of each key of the shard two halves of its residual, and its record.

Behind the label stands what the layout can be made from again; the body has the keys, one behind another, each
part 64-byte aligned:

    extra = msgpack [table, [[elements, payload, plan], ...]]
    key   = half 0 (float32[elements]) | half 1 (float32[elements]) | slots of the record
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash
from typing_extensions import Buffer

from ps_accordion.codecs.base import FloatVector
from ps_accordion.errors import StorageError

from .mapped import Label, MappedFile
from .slots import Damaged, Slots, aligned

__all__ = ["MAX_KEY_HEADER", "KeySize", "KeyStore", "LayoutFile", "Stored", "identity"]

MAX_KEY_HEADER = 8 << 10
"""Bytes of a key's header: a result's message has less than 512, two lists of 1,024 slots as msgpack 6 KiB."""


class KeySize(NamedTuple):
    """What a key may need.

    Attributes:
        elements: Length of its vector.
        payload: Bytes of a result's payload, all frames together, at the lightest level that the job may use.
        plan: Bytes of a plan; 0 for a key that carries none.
    """

    elements: int
    payload: int
    plan: int = 0


class Stored(NamedTuple):
    """A key's record, copied out of the shared memory."""

    header: bytes
    frames: tuple[bytes, ...]
    plan: bytes


class KeyStore:
    """One key between rounds. One thread at a time.

    The halves are written where they lie, and nothing says of a half whether it is finished: that is for the record to say.
    So a fold writes the half that the stored record does not need, and `store` comes after it.

    Attributes:
        halves: Two vectors, float32[elements], shared with the file; zeros until somebody writes them. Kernels may write them
            until the store is closed, and nobody after that. They stay mapped as long as somebody holds one.
    """

    def __init__(self, memory: memoryview, size: KeySize, *, fresh: bool) -> None:
        vector = size.elements * np.dtype(np.float32).itemsize
        first, second, end = aligned(vector), 2 * aligned(vector), _nbytes(size)
        self.halves: tuple[FloatVector, FloatVector] = (
            np.frombuffer(memory[:vector], np.float32),
            np.frombuffer(memory[first : first + vector], np.float32),
        )
        self._size = size
        self._slots = Slots.format(memory[second:end]) if fresh else Slots(memory[second:end])

    def load(self) -> Stored | None:
        """Return the record as last stored; None if there was none."""
        parts = self._slots.read()
        return None if parts is None else Stored(parts[0], tuple(parts[2:]), parts[1])

    def store(self, header: Buffer, frames: Sequence[Buffer] = (), plan: Buffer = b"") -> None:
        """Replace the record, as a whole or not at all, wherever the process is killed.

        Args:
            header: At most `MAX_KEY_HEADER` bytes.
            frames: At most 16, together at most `KeySize.payload` bytes.
            plan: At most `KeySize.plan` bytes. All are copied.

        Raises:
            StorageError: Something is longer than was reserved; the old record stands.
        """
        lengths = (memoryview(header).nbytes, sum(memoryview(frame).nbytes for frame in frames), memoryview(plan).nbytes)
        reserved = (MAX_KEY_HEADER, self._size.payload, self._size.plan)
        if any(length > limit for length, limit in zip(lengths, reserved, strict=True)):
            raise StorageError(
                f"expected a header, payload and plan of at most {reserved} bytes, got {lengths}; this is a mistake of whoever "
                "added the layout, please report it"
            )
        self._slots.write(header, plan, *frames)

    def close(self) -> None:
        """Let go of the record. The halves stay mapped as long as somebody holds them."""
        self._slots.close()


class LayoutFile:
    """All keys of one layout.

    Attributes:
        table: The layout's table, as it was given.
        identity: Sixteen hexadecimal digits that differ when the table or a size differs.
        keys: In the order of the sizes.
    """

    def __init__(self, file: MappedFile, table: bytes, sizes: Sequence[KeySize], *, fresh: bool) -> None:
        self.table = table
        self.identity = identity(table, sizes)
        self._file = file
        self.keys: list[KeyStore] = []
        start = 0
        for size in sizes:
            self.keys.append(KeyStore(file.body[start : start + _nbytes(size)], size, fresh=fresh))
            start += _nbytes(size)

    @classmethod
    def create(cls, path: Path | None, label: Label, table: bytes, sizes: Sequence[KeySize]) -> LayoutFile:
        """Make the file, its space reserved; what has its name is replaced when it is complete.

        Raises:
            StorageError: There is not enough space.
        """
        file = MappedFile.create(path, label, extra=_packed(table, sizes), nbytes=sum(map(_nbytes, sizes)))
        layout = cls(file, table, sizes, fresh=True)
        file.publish()
        return layout

    @classmethod
    def open(cls, path: Path, expected: Label, *, digest: int | None) -> LayoutFile:
        """Map a file that is there, and look at every record.

        Args:
            path: The file.
            expected: Whose it is.
            digest: Of its body, if it has been closed.

        Raises:
            Damaged: It is cut short, or something in it is not what was stored.
            ConfigError: It is another job's, shard's or format's.
        """
        file = MappedFile.open(path, expected)
        table, sizes = msgspec.msgpack.decode(file.extra, type=tuple[bytes, list[KeySize]])
        if len(file.body) != sum(map(_nbytes, sizes)):
            raise Damaged(f"{path} holds {len(file.body)} bytes behind its label, expected {sum(map(_nbytes, sizes))}")
        if digest is not None and file.digest() != digest:
            raise Damaged(f"{path} is not as it was when it was closed: another checksum")
        try:
            return cls(file, table, sizes, fresh=False)
        except Damaged as damage:
            raise Damaged(f"{path}: {damage}") from None

    def settle(self) -> int:
        """Write all to the disk, and return the digest of the body."""
        self._file.flush()
        return self._file.digest()

    def close(self) -> None:
        """Let go of the records."""
        for key in self.keys:
            key.close()


def identity(table: bytes, sizes: Sequence[KeySize]) -> str:
    """Return sixteen hexadecimal digits that differ when the table or a size differs."""
    return xxhash.xxh3_64_hexdigest(_packed(table, sizes))


def _packed(table: bytes, sizes: Sequence[KeySize]) -> bytes:
    return msgspec.msgpack.encode((table, list(sizes)))


def _nbytes(size: KeySize) -> int:
    vector = size.elements * np.dtype(np.float32).itemsize
    return 2 * aligned(vector) + Slots.nbytes(MAX_KEY_HEADER + size.payload + size.plan)

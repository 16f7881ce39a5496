"""Copies of a shard's residuals, which stay where its state is lost: on another disk, or on one that servers share.

    <directory>/shard-<n>-layout-<m>.snapshot    of every key slots for the last two copies, each whole or not there

The files are mapped and nothing is synced, as those of the state. A copy that did not reach a disk has a wrong checksum, and is
none: then there is the one before, or the shard begins without its residual, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import xxhash
from typing_extensions import Buffer

from .mapped import Label, MappedFile, explained
from .slots import Damaged, Slots, aligned

__all__ = ["Copies", "Snapshots"]

MAX_COPY_HEADER = 1 << 10
"""Bytes of what is said of a copy: a round, a bound, the six sums of an account."""


class Copies:
    """The last two copies of one key. One thread at a time."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    def keep(self, header: Buffer, vector: Buffer = b"") -> None:
        """Put a copy in the place of the older one.

        Args:
            header: At most `MAX_COPY_HEADER` bytes.
            vector: float32[elements], or nothing for zeros. Both are copied.
        """
        self._slots.write(header, vector)

    def found(self) -> list[tuple[bytes, bytes]]:
        """Return header and vector of each copy, the newest first."""
        return [(parts[0], parts[1]) for parts in (self._slots.read(), self._slots.before()) if parts is not None]

    def close(self) -> None:
        """Let go of the memory."""
        self._slots.close()


class Snapshots:
    """The copies of one shard.

    Args:
        directory: Where the files are; made if it is not there. None is memory that ends with the process.
        shard: Number of the shard in the run.
        job: What tells this job from others.

    Attributes:
        lost: Why copies that were there could not be used, for people; empty where none were lost.
    """

    def __init__(self, directory: Path | None, *, shard: int, job: str) -> None:
        self.lost = ""
        self._directory = directory
        self._shard = shard
        self._job = xxhash.xxh3_64_intdigest(job.encode())
        self._copies: dict[int, list[Copies]] = {}

    def hold(self, layout: int, elements: Sequence[int]) -> list[Copies]:
        """Return the copies of each of a layout's keys; make room, if there is none.

        Args:
            layout: Number of the layout.
            elements: Of each key of this shard, in order.

        Raises:
            ConfigError: The file is another job's, or the directory is none that we may write.
            StorageError: There is not enough space.
        """
        if layout not in self._copies:
            self._copies[layout] = self._opened(layout, elements) or self._made(layout, elements)
        return self._copies[layout]

    def close(self) -> None:
        """Let go of the files; they stay. Closing twice is harmless."""
        for copies in self._copies.values():
            for each in copies:
                each.close()
        self._copies = {}

    def discard(self) -> None:
        """Remove the files, and let go of them: the run is over."""
        for path in map(self._path, self._copies):
            if path is not None:
                with explained(path):
                    path.unlink(missing_ok=True)
        if self._directory is not None:
            with suppress(OSError):  # others' are there still
                self._directory.rmdir()
        self.close()

    def _path(self, layout: int) -> Path | None:
        return None if self._directory is None else self._directory / f"shard-{self._shard}-layout-{layout}.snapshot"

    def _label(self, layout: int) -> Label:
        return Label(self._shard, self._job, 0, layout)  # whatever the boot: copies outlive it

    def _opened(self, layout: int, elements: Sequence[int]) -> list[Copies] | None:
        path = self._path(layout)
        if self._directory is None or path is None:
            return None
        with explained(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                return None
        try:
            file = MappedFile.open(path, self._label(layout))
            if file.extra != msgspec.msgpack.encode(list(elements)) or len(file.body) != sum(map(_nbytes, elements)):
                raise Damaged(f"{path} holds copies of other keys")
            return [Copies(Slots(memory)) for memory in _cut(file.body, elements)]
        except Damaged as damage:
            self.lost = str(damage)
            return None

    def _made(self, layout: int, elements: Sequence[int]) -> list[Copies]:
        extra = msgspec.msgpack.encode(list(elements))
        file = MappedFile.create(self._path(layout), self._label(layout), extra=extra, nbytes=sum(map(_nbytes, elements)))
        copies = [Copies(Slots.format(memory)) for memory in _cut(file.body, elements)]
        file.publish()
        return copies


def _nbytes(elements: int) -> int:
    return Slots.nbytes(MAX_COPY_HEADER + aligned(4 * elements))


def _cut(body: memoryview, elements: Sequence[int]) -> list[memoryview]:
    parts, start = [], 0
    for count in elements:
        parts.append(body[start : start + _nbytes(count)])
        start += _nbytes(count)
    return parts

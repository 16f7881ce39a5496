"""A file of fixed size in memory, with a label that says whose it is.

    file  = label | checksum of label and extra (8 bytes) | extra | body
    label = magic (8 bytes) | format version (4) | shard (4) | job (8) | boot (8) | layout (8, -1 for none) | length of extra (8)

A new file is made under another name, with all its space reserved, and gets its own name when it is complete. So a file is
whole or not there; and a disk that is full is an error when the file is made, not a SIGBUS in the middle of training.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from ps_accordion.errors import ConfigError, PsAccordionError, StorageError

from .slots import Damaged, aligned

__all__ = ["FORMAT_VERSION", "Label", "MappedFile", "explained"]

MAGIC = b"PSASTATE"
FORMAT_VERSION = 1

_LABEL = struct.Struct("<8sIIQQqQ")
_CHECKSUM = struct.Struct("<Q")
_EXTRA = _LABEL.size + _CHECKSUM.size

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FAILED = (errno.EIO, errno.ENOMEM, errno.ENFILE, errno.EMFILE, errno.ENOLCK, errno.ENODEV, errno.EOPNOTSUPP, errno.ESTALE)


class Label(NamedTuple):
    """Whose memory a file is.

    Attributes:
        shard: Number of the shard.
        job: Digest of what tells one job from another.
        boot: Which memory of the shard; 0 where any will do.
        layout: Number of the layout; -1 for the shard's own file.
    """

    shard: int
    job: int
    boot: int
    layout: int = -1


class MappedFile:
    """A file in memory. Use `create` or `open`.

    Attributes:
        label: What stands at its front.
        extra: Bytes that belong to the label and never change.
        body: The bytes behind the label, shared with the file, 64-byte aligned in it. Views of it may be handed out: the memory
            stays mapped, and one descriptor open, until the last of them is gone.
    """

    def __init__(self, path: Path | None, memory: memoryview, mapping: mmap.mmap | None, label: Label, extra: bytes) -> None:
        self.path = path
        self.label = label
        self.extra = extra
        self.body = memory[aligned(_EXTRA + len(extra)) :]
        self._mapping = mapping

    @classmethod
    def create(cls, path: Path | None, label: Label, *, extra: bytes = b"", nbytes: int) -> MappedFile:
        """Return a new file whose body is `nbytes` of zeros. It has its name only after `publish`.

        Args:
            path: The file. None takes memory that ends with the process.
            label: Whose it is.
            extra: Bytes that belong to the label.
            nbytes: Size of the body.

        Raises:
            StorageError: There is not that much space.
            ConfigError: The directory is not ours to write.
        """
        total = aligned(_EXTRA + len(extra)) + nbytes
        front = _LABEL.pack(MAGIC, FORMAT_VERSION, label.shard, label.job, label.boot, label.layout, len(extra))
        front += _CHECKSUM.pack(xxhash.xxh3_64_intdigest(front + extra)) + extra
        if path is None:
            memory, mapping = np.zeros(total, np.uint8).data, None
        else:
            with explained(path, total):
                memory, mapping = _reserve(_unfinished(path), total)
        memory[: len(front)] = front
        return cls(path, memory, mapping, label, extra)

    @classmethod
    def open(cls, path: Path, expected: Label) -> MappedFile:
        """Map a file that is there.

        Raises:
            Damaged: It is not a complete file of ours, or not of this boot.
            ConfigError: It is of another job, shard or format, or not ours to read and write.
        """
        with explained(path), path.open("r+b") as file:
            if os.fstat(file.fileno()).st_size < _EXTRA:
                raise Damaged(f"{path} has {os.fstat(file.fileno()).st_size} bytes, its label alone has {_EXTRA}")
            mapping = mmap.mmap(file.fileno(), 0)
        memory = memoryview(mapping)
        magic, version, shard, job, boot, layout, length = _LABEL.unpack_from(memory)
        if magic != MAGIC:
            raise Damaged(f"{path} starts with {magic!r}, expected {MAGIC!r}")
        if version != FORMAT_VERSION:
            raise _not_ours(path, f"format version {FORMAT_VERSION}", f"version {version}")
        end = _EXTRA + length
        checksum = xxhash.xxh3_64(memory[: _LABEL.size])
        checksum.update(memory[_EXTRA:end])
        if end > len(memory) or checksum.intdigest() != _CHECKSUM.unpack_from(memory, _LABEL.size)[0]:
            raise Damaged(f"the label of {path} has a wrong checksum")
        if job != expected.job:
            raise _not_ours(path, f"the state of job {expected.job:016x}", f"that of job {job:016x}")
        if (shard, layout) != (expected.shard, expected.layout):
            raise _not_ours(path, _name(expected.shard, expected.layout), _name(shard, layout))
        if expected.boot and boot != expected.boot:
            raise Damaged(f"{path} belongs to boot {boot} of the shard, not to {expected.boot}")
        return cls(path, memory, mapping, Label(shard, job, boot, layout), bytes(memory[_EXTRA:end]))

    def publish(self) -> None:
        """Give a new file its name, in place of what had it."""
        if self.path is not None:
            with explained(self.path):
                try:
                    _unfinished(self.path).rename(self.path)
                except BaseException:
                    _unfinished(self.path).unlink()
                    raise

    def digest(self) -> int:
        """Return the xxh3-64 of the body, about 0.1 s for a GiB that is in memory."""
        return xxhash.xxh3_64_intdigest(self.body)

    def flush(self) -> None:
        """Return when all that was written is on the disk."""
        if self._mapping is not None and self.path is not None:
            with explained(self.path):
                self._mapping.flush()


@contextmanager
def explained(path: Path, nbytes: int = 0) -> Iterator[None]:
    """Turn what the system says of `path` into an error of ours.

    Args:
        path: The file, or the directory.
        nbytes: What it should be able to hold.

    Raises:
        StorageError: No space, or the disk has failed.
        ConfigError: The path is not one that can hold the state.
    """
    try:
        yield
    except PsAccordionError:
        raise
    except OSError as error:
        what = "it is not a directory" if error.errno in (errno.EEXIST, errno.ENOTDIR) else error.strerror or str(error)
        if error.errno in _FULL:
            size = f"{nbytes} bytes of " if nbytes else ""
            raise StorageError(f"expected room for {size}{path}, got {what!r}, and {_room(path)}; {_MAKE_ROOM}") from None
        if error.errno in _FAILED:
            raise StorageError(f"{path} cannot be used: {what}; look after the disk, or name another directory") from None
        raise ConfigError(f"{path} cannot be used: {what}; name a directory that this process may make and write") from None


_MAKE_ROOM = "free some (*.bad beside it may be removed), lift a limit on file size (ulimit -f), or name another directory"


def _room(path: Path) -> str:
    with suppress(OSError):
        free = os.statvfs(path.parent)
        return f"{free.f_bavail * free.f_frsize} bytes are free"
    return "how much is free is not known"


def _reserve(path: Path, nbytes: int) -> tuple[memoryview, mmap.mmap]:
    with path.open("w+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            mapping = mmap.mmap(file.fileno(), nbytes)
        except BaseException:
            path.unlink()
            raise
    return memoryview(mapping), mapping


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _name(shard: int, layout: int) -> str:
    return f"shard {shard}" + (f", layout {layout}" if layout >= 0 else "")


def _not_ours(path: Path, expected: str, found: str) -> ConfigError:
    return ConfigError(f"expected {expected} in {path}, found {found}; name another directory, or remove it if it is not needed")

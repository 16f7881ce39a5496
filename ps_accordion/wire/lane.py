"""A *lane*: memory of one process from which others on its host read payloads where they lie.

    lane  = label (magic, identity), a page | block | block | ...
    block = stamp (8 bytes), up to 64 | the bytes of one payload; it begins at a page

The memory is a file without a name (memfd), sealed, so that it can neither shrink nor grow: a read of it cannot fail, and nothing
is left behind, however the processes end. Who reads it opens `/proc/PROCESS/fd/DESCRIPTOR` once and maps it, read-only. It stays
readable when its owner has died.

A block is written by its owner alone, and again when nobody *there* holds it any more. Whoever reads it elsewhere does so as
long as the protocol says that it stands. Where that may have passed, the stamp tells: it changes before the block is written.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import secrets
import stat
import struct
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from typing_extensions import Buffer

from ..errors import WireError

__all__ = ["LEAST", "Loan", "OtherLane", "OwnLane", "Span"]

LEAST = 1 << 16
"""Bytes of a payload from which it is worth a place in a lane: to copy less takes no longer than to say where it lies."""
SIZE = 1 << 35
"""Bytes of a lane, of which only those that were written take memory. It cannot grow, so it is larger than what a process has."""

_NAME = "ps-accordion-lane"
_LINE = 64
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_LABEL = struct.Struct("<8sQ")
_MAGIC = b"PSALANE1"
_STAMP = struct.Struct("<Q")


class Span(NamedTuple):
    """Where a payload lies in a lane.

    Attributes:
        offset: Of its first byte.
        nbytes: Its length.
        stamp: Of its block, as long as that holds this payload.
    """

    offset: int
    nbytes: int
    stamp: int


class OwnLane:
    """The lane of this process. Any thread may take from it.

    Raises:
        OSError: There is no memory of this kind, or not so much of it.
    """

    def __init__(self) -> None:
        self.identity = secrets.randbits(63) + 1
        self.descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, SIZE)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self._memory = mmap.mmap(self.descriptor, SIZE)
        except BaseException:
            os.close(self.descriptor)
            raise
        _LABEL.pack_into(self._memory, 0, _MAGIC, self.identity)
        self._address = _address_of(self._memory)
        self._lock = threading.Lock()
        self._end = mmap.PAGESIZE
        self._free: defaultdict[int, deque[int]] = defaultdict(deque)
        """Where blocks begin that nobody holds, by length."""
        self._stamps: dict[int, int] = {}
        """Stamps of the others, by the offset of their bytes."""
        self._digests: dict[int, tuple[int, int]] = {}
        """Length and digest of what is known to stay as it is, by the same."""
        self._counter = itertools.count(1)

    def take(self, nbytes: int) -> NDArray[np.uint8] | None:
        """Return uint8[nbytes] with arbitrary contents; None where the lane is full.

        The memory is the caller's until the last array or memoryview of it is gone, and is then taken again.
        """
        length = -(-(_LINE + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        free = self._free[length]
        try:
            begin = free.pop()  # the last one given back: most likely it is in the cache still
        except IndexError:
            with self._lock:
                begin = self._end
                if begin + length > SIZE:
                    return None
                self._end += length
        stamp = next(self._counter)
        _STAMP.pack_into(self._memory, begin, stamp)
        block = np.frombuffer(self._memory, np.uint8, nbytes, begin + _LINE)
        self._stamps[begin + _LINE] = stamp
        weakref.finalize(block, self._give_back, begin, free).atexit = False
        return block

    def _give_back(self, begin: int, free: deque[int]) -> None:
        self._digests.pop(begin + _LINE, None)
        del self._stamps[begin + _LINE]
        free.append(begin)

    def span_of(self, frame: Buffer) -> Span | None:
        """Return where bytes lie that begin with a block of this lane; None where they lie elsewhere."""
        view = memoryview(frame)
        offset = _address_of(view) - self._address
        stamp = self._stamps.get(offset)
        return None if stamp is None else Span(offset, view.nbytes, stamp)

    def seal(self, frame: Buffer) -> None:
        """Compute the digest of a block that does not change any more: soonest while it is in the cache."""
        span = self.span_of(frame)
        if span is not None:
            self._digests[span.offset] = span.nbytes, xxhash.xxh3_64_intdigest(frame)

    def digest_of(self, spans: Sequence[Span], frames: Sequence[Buffer]) -> int:
        """Return the xxh3-64 of frames that lie in these places."""
        known = self._digests.get(spans[0].offset) if len(spans) == 1 else None
        if known is not None and known[0] == spans[0].nbytes:
            return known[1]
        digest = xxhash.xxh3_64()
        for frame in frames:
            digest.update(frame)
        return digest.intdigest()

    def close(self) -> None:
        """Let nobody else open it. Who has done so, or holds a block, keeps the memory."""
        os.close(self.descriptor)


class OtherLane:
    """The lane of another process, to read.

    Args:
        process: Number of the process.
        descriptor: Of the lane, there.
        identity: What it must have.

    Raises:
        OSError: There is no such process or descriptor that this process may see.
        WireError: What is there is not that lane.
    """

    def __init__(self, process: int, descriptor: int, identity: int) -> None:
        path = Path(f"/proc/{process}/fd/{descriptor}")
        # Not opened before it is known to be no pipe and no device.
        if not (target := str(path.readlink())).startswith(f"/memfd:{_NAME}"):
            raise WireError(f"expected a lane at {path}, found {target}")
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            found = os.fstat(opened)
            sealed = fcntl.fcntl(opened, fcntl.F_GET_SEALS) & _SEALS == _SEALS
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or not sealed or found.st_size < mmap.PAGESIZE:
                raise WireError(f"expected a sealed lane of user {os.geteuid()} at {path}, found one of user {found.st_uid}")
            self._memory = mmap.mmap(opened, found.st_size, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(opened)
        if _LABEL.unpack_from(self._memory) != (_MAGIC, identity):
            raise WireError(f"expected lane {identity:016x} at {path}, found another; are processes numbered as there?")
        self.identity = identity
        self.process = process

    def loan(self, spans: Sequence[Span], digest: int) -> Loan:
        """Return what lies in these places.

        Args:
            spans: The places.
            digest: xxh3-64 of what was lent, all of it.

        Raises:
            WireError: A place is not inside a block.
        """
        for offset, nbytes, _ in spans:
            if offset % mmap.PAGESIZE != _LINE or offset < mmap.PAGESIZE or offset + nbytes > len(self._memory):
                raise WireError(f"expected a place inside a lane of {len(self._memory)} bytes, got {nbytes} from {offset} on")
        return Loan(self._memory, tuple(spans), digest)


class Loan:
    """Payload frames that lie in the lane of another process.

    Attributes:
        frames: Their bytes, read-only; the memory stays readable as long as somebody holds one.
    """

    def __init__(self, memory: mmap.mmap, spans: tuple[Span, ...], digest: int) -> None:
        whole = memoryview(memory)
        self.frames: tuple[Buffer, ...] = tuple(whole[offset : offset + nbytes] for offset, nbytes, _ in spans)
        self._memory = memory
        self._spans = spans
        self._digest = digest

    def verified(self) -> bool:
        """Compare the checksum; return whether the frames still hold what was lent. Whoever uses them does this first.

        Raises:
            WireError: They hold something else although nobody has taken the memory again.
        """
        digest = xxhash.xxh3_64()
        for frame in self.frames:
            digest.update(frame)
        if not self.stands:
            return False
        if digest.intdigest() != self._digest:
            raise WireError(f"checksum {digest.intdigest():016x} of what lies in the lane, {self._digest:016x} of what was lent")
        return True

    @property
    def stands(self) -> bool:
        """Whether the frames hold what was lent: then all that was read of them so far was that, too."""
        return all(_STAMP.unpack_from(self._memory, offset - _LINE)[0] == stamp for offset, _, stamp in self._spans)


def _address_of(memory: Buffer) -> int:
    return int(np.frombuffer(memoryview(memory), np.uint8).__array_interface__["data"][0])

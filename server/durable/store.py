"""The files of one shard: which memory it is, whether it can be trusted, the shard's record, and its layouts.

    body of shard-<n>.state = slots of what is known of the files (`Life`) | slots of the shard's record

What is found at a start:

    nothing                                              a new memory, with a new boot
    files of another job, shard or format                ConfigError; nothing is touched
    closed, and all checksums right                      the same memory
    not closed, and the machine has been up since        the same memory: its kernel has kept every byte that was stored
    not closed, and the machine has started anew         lost: pages may have reached the disk in any order
    anything missing, cut short or with a wrong checksum lost

Where one file is lost, all are: a shard is whole or blank, and the run must know which. A new memory is made, and what is lost is
kept as `*.bad`. All this may be interrupted anywhere: files get their names when they are complete, the new memory says from its
first moment what was lost, and repeats it until somebody has written the shard's record.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import msgspec
import xxhash
from typing_extensions import Buffer

from ps_accordion.errors import ConfigError

from .keys import KeySize, KeyStore, LayoutFile, identity
from .lock import Lock
from .mapped import Label, MappedFile, explained
from .slots import Damaged, Slots

__all__ = ["MAX_SHARD_RECORD", "Life", "ShardStore"]

KERNEL_BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Differs after every start of the machine."""
MAX_SHARD_RECORD = 64 << 10
"""Bytes of a shard's record: 1,024 members take 12 KiB as msgpack, the cuts of as many layouts 24."""
MAX_LIFE = 32 << 10
"""Bytes of what is known of the files: 1,024 layouts at 15 bytes each, and some room."""

_LIFE, _RECORD = Slots.nbytes(MAX_LIFE), Slots.nbytes(MAX_SHARD_RECORD)


class Life(msgspec.Struct, frozen=True):
    """What is known of a shard's files.

    Attributes:
        kernel: Start of the machine under which they were last opened; empty where the machine does not tell.
        closed: Whether they were closed, and are on the disk.
        record: If so, digest of the slots of the shard's record.
        layouts: If so, digest of each layout's body, by number; else 0.
        lost: Why the memory before this one was not usable; empty if there was none, or somebody has taken note.
    """

    kernel: str
    closed: bool
    record: int
    layouts: dict[int, int]
    lost: str


class ShardStore:
    """The durable memory of one shard. Use `open`, and close it; one thread at a time.

    Attributes:
        boot: Which memory this is, 1 <= boot < 2**63: drawn when it was made, the same after every restart.
        fresh: Whether it was made just now: nothing is stored.
        lost: Why what was there before was not usable, for people; empty where nothing was lost. Said again at every start until
            `write_record` is called.
    """

    def __init__(self, directory: Path | None, shard: int, job: str) -> None:
        self.boot = 0
        self.fresh = False
        self.lost = ""
        self._directory = directory
        self._label = Label(shard, xxhash.xxh3_64_intdigest(job.encode()), 0)
        self._lock: Lock | None = None
        self._kernel = _kernel_boot()
        self._files: dict[int, LayoutFile] = {}
        self._file: MappedFile | None = None

    @classmethod
    def open(cls, directory: Path | None, *, shard: int, job: str) -> Self:
        """Open the memory of a shard, or make a new one.

        Args:
            directory: Where the files are; made if it is not there. None is memory that ends with the process.
            shard: Number of the shard in the run.
            job: What tells this job from others, any text. The files keep a digest of it.

        Raises:
            ConfigError: The files are another job's, or of another format; another process has them open; or the directory is
                none that we may write.
            StorageError: There is not enough space, or the disk fails.
        """
        store = cls(directory, shard, job)
        try:
            store._open()
        except BaseException:
            store._let_go()
            raise
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def record(self) -> bytes:
        """The shard's record as last written; empty if it never was."""
        parts = self._record.read()
        return parts[0] if parts else b""

    def write_record(self, data: Buffer) -> None:
        """Replace the shard's record, as a whole or not at all, wherever the process is killed.

        It is one record and each key's is another: what concerns both must be so written that it can be done again at a start.

        Args:
            data: At most `MAX_SHARD_RECORD` bytes. They are copied.

        Raises:
            StorageError: They are too long; the old record stands.
        """
        self._record.write(data)

    @property
    def layouts(self) -> dict[int, bytes]:
        """The tables of the layouts that are stored, by number."""
        return {number: file.table for number, file in self._files.items()}

    def add_layout(self, number: int, table: bytes, sizes: Sequence[KeySize]) -> list[KeyStore]:
        """Return the memory of a layout's keys; make it, its space reserved, if it is not there.

        Args:
            number: Number of the layout.
            table: Its table; given back after a restart.
            sizes: Of the keys of this shard, in order.

        Returns:
            One store a key, in the same order; the same ones each time.

        Raises:
            ConfigError: The layout is stored with another table or other sizes.
            StorageError: There is not enough space.
        """
        stored = self._files.get(number)
        if stored is None:
            label = self._label._replace(layout=number)
            stored = LayoutFile.create(self._path(f"layout-{number}"), label, table, sizes)
            self._remember(dict.fromkeys([*self._files, number], 0))
            self._files[number] = stored
        elif stored.identity != identity(table, sizes):
            where = self._path(f"layout-{number}") or "memory"
            raise ConfigError(
                f"expected layout {number} with digest {stored.identity}, as it is in {where}, "
                f"got one with digest {identity(table, sizes)}: the model, the partitions or the codec's levels have changed; "
                "start with what the run was started with, or name another directory"
            )
        return stored.keys

    def close(self) -> None:
        """Write all to the disk, and note that it is whole. Closing twice is harmless.

        Nobody may write a half during or after this: a half that is changed afterwards makes the next start find the shard lost.
        """
        try:
            if self._file is not None and self._directory is not None:
                digests = {number: file.settle() for number, file in self._files.items()}
                self._remember(digests, closed=True)
                self._file.flush()
                _sync(self._directory)
        finally:
            self._let_go()

    def discard(self) -> None:
        """Remove the files, and let go of them: the run is over, and nobody will need them."""
        try:
            for path in (self._path(), *(self._path(f"layout-{number}") for number in self._files)):
                if path is not None:
                    with explained(path):
                        path.unlink(missing_ok=True)
            if self._lock is not None:
                self._lock.discard()
        finally:
            self._let_go()

    # ------------------------------------------------------------ opening

    def _open(self) -> None:
        path = self._path()
        if self._directory is None or path is None:
            self._make()
            return
        with explained(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self._directory / f"shard-{self._label.shard}.lock", f"shard {self._label.shard}")
        with explained(self._directory):
            found, layouts = path.exists(), sorted(self._directory.glob(f"{path.stem}-layout-*.state"))
        try:
            if found:
                self._take_in(path)
                return
            if layouts:
                raise Damaged(f"{path} is gone, and {layouts[0].name} of the same shard is still there")
        except Damaged as damage:
            self.lost = f"{damage}; what was stored is kept as *.bad"
        self._files = {}
        with explained(self._directory):
            if found:
                shutil.copyfile(path, _aside(path))
            self._make()
            for each in layouts:
                each.rename(_aside(each))

    def _make(self) -> None:
        self.fresh = True
        self.boot = secrets.randbelow((1 << 63) - 1) + 1
        self._label = self._label._replace(boot=self.boot)
        self._file = MappedFile.create(self._path(), self._label, nbytes=_LIFE + _RECORD)
        self._life, self._record = Slots.format(self._file.body[:_LIFE]), Slots.format(self._file.body[_LIFE:])
        self._remember({})
        self._file.publish()

    def _take_in(self, path: Path) -> None:
        file = MappedFile.open(path, self._label)
        if len(file.body) != _LIFE + _RECORD:
            raise Damaged(f"{path} holds {len(file.body)} bytes behind its label, expected {_LIFE + _RECORD}")
        try:
            self._life, self._record = Slots(file.body[:_LIFE]), Slots(file.body[_LIFE:])
        except Damaged as damage:
            raise Damaged(f"{path}: {damage}") from None
        life = msgspec.msgpack.decode(b"".join(self._life.read() or ()), type=Life)
        if not life.closed and not (life.kernel and life.kernel == self._kernel):
            raise Damaged(
                f"{path} was not closed before the machine started anew ({life.kernel or 'unknown'} then, "
                f"{self._kernel or 'unknown'} now), so it may be on the disk in part"
            )
        if life.closed and _digest_of(file) != life.record:
            raise Damaged(f"{path} is not as it was when it was closed: another checksum")
        for number, digest in life.layouts.items():
            each = path.with_name(f"{path.stem}-layout-{number}.state")
            if not each.exists():
                raise Damaged(f"{each} is gone")
            label = file.label._replace(layout=number)
            self._files[number] = LayoutFile.open(each, label, digest=digest if life.closed else None)
        self.boot, self._label, self._file = file.label.boot, file.label, file
        self.lost = "" if self._record.read() else life.lost
        self._remember(dict.fromkeys(self._files, 0))
        file.flush()  # or else a machine that stops later may find on its disk all as it was when it was closed, and believe it

    # ------------------------------------------------------------ the rest

    def _path(self, what: str = "") -> Path | None:
        name = f"shard-{self._label.shard}" + (f"-{what}" if what else "")
        return None if self._directory is None else self._directory / f"{name}.state"

    def _remember(self, layouts: dict[int, int], *, closed: bool = False) -> None:
        assert self._file is not None
        record = _digest_of(self._file) if closed else 0
        self._life.write(msgspec.msgpack.encode(Life(self._kernel, closed, record, layouts, self.lost)))

    def _let_go(self) -> None:
        for layout in self._files.values():
            layout.close()
        if self._file is not None:
            self._life.close()
            self._record.close()
        if self._lock is not None:
            self._lock.close()
        self._files, self._file, self._lock = {}, None, None


def _digest_of(file: MappedFile) -> int:
    return xxhash.xxh3_64_intdigest(file.body[_LIFE:])


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".bad")


def _kernel_boot() -> str:
    with suppress(OSError):
        return KERNEL_BOOT.read_text(encoding="ascii").strip()
    return ""


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with explained(directory):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)

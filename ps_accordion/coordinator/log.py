"""The coordinator's log: what the next coordinator of the same job must know, on the disk before anybody is told of it.

`<directory>/coordinator.log` is text, one JSON object a line:

    {"log":{"format":1,"job":"9d1c"},"xxh3":"c0d2f9d6f5a3b1e0"}
    {"start":{"term":1,"pid":4711,"host":"a","time":1767225600.0},"xxh3":"..."}
    {"record":{"view":1},"xxh3":"..."}

`xxh3` is the xxh3-64 of the line up to its comma, seeded with that of the line before (0 before the first): a line that was
changed, taken out, repeated or moved is noticed. Every line is fsynced before the next is written, so only the end of the file
can be what is left of a write that did not finish: a last line without its newline was never acknowledged, and is cut off.
Anything else that does not fit is damage, and nothing is read past it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from ..errors import ConfigError, StorageError

__all__ = ["Log"]

FORMAT = 1
NAME = "coordinator.log"
_HEADER = b'{"log":{"format":'
_SEAL = b',"xxh3":"%016x"}'
_SEAL_SIZE = len(_SEAL % 0)


class Log:
    """What the coordinators of one job have recorded; the open one holds the file alone. A context manager.

    Attributes:
        records: What earlier coordinators of this job recorded, in order.
        term: Which coordinator of this job this is: 1 for the first. It is on the disk.
        torn: The end of the file that was cut off, because its write had not finished; empty where all was well.
    """

    def __init__(self, file: Path | None, descriptor: int, found: _Found) -> None:
        """Use `Log.open`."""
        self.records = found.records
        self.term = found.starts + 1
        self.torn = found.torn
        self._file = file
        self._descriptor = descriptor
        self._size = found.size
        self._sum = found.sum
        self._refusal = ""

    @classmethod
    def open(cls, directory: Path | None, *, job: str) -> Log:
        """Open the log of a job, or start it; when this returns, a start of this term is on the disk.

        Args:
            directory: Where the log is; it is made if need be. None keeps nothing: every term is the first.
            job: What tells this job from others. A log of another job is refused.

        Raises:
            ConfigError: Another process has the log open, or it is of another job or format.
            StorageError: The log is damaged, or the file cannot be read or written.
        """
        if directory is None:
            return cls(None, -1, _Found())
        file = directory / NAME
        try:
            _make(directory)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _unusable(file, error) from error
        try:
            return cls._opened(file, descriptor, job)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def _opened(cls, file: Path, descriptor: int, job: str) -> Log:
        try:
            data = _locked(file, descriptor)
            found = _read(file, data, job)
            log = cls(file, descriptor, found)
            if found.size:
                # The last line may be in the memory of the system only: its writer was killed before the fsync, or that failed.
                # Written once more, it is on the disk before anybody acts on it.
                log._size = data.rfind(b"\n", 0, found.size - 1) + 1
                lines = data[log._size : found.size]
            else:
                lines = log._line("log", {"format": FORMAT, "job": job})
            start = {"term": log.term, "pid": os.getpid(), "host": socket.gethostname(), "time": round(time.time(), 6)}
            lines += log._line("start", start)
            os.ftruncate(descriptor, found.size)
            log._write(lines)
            _sync(file.parent)  # whoever made the file may not have come so far
        except StorageError:
            raise
        except OSError as error:
            raise _unusable(file, error) from error
        return log

    def append(self, record: Mapping[str, Any]) -> None:
        """Record something; it is on the disk when this returns.

        After a write that failed nobody knows what is there, so the log takes nothing more until it is opened again.

        Args:
            record: Plain JSON: finite numbers, text, lists, dicts with text as keys, true, false, None.

        Raises:
            TypeError, ValueError: The record would not be read back as it is; nothing was written.
            StorageError: It could not be written, or an earlier one could not, or the log is closed.
        """
        if self._refusal:
            raise StorageError(self._refusal)
        line = self._line("record", record)
        if self._file is None:
            return
        size = self._size
        self._refusal = f"{self._file}: takes no record after one that could not be written; open the log again"
        try:
            self._write(line)
        except OSError as error:
            with contextlib.suppress(OSError):  # where this fails too, the next `open` cuts off what is not whole
                os.ftruncate(self._descriptor, size)
            raise _unusable(self._file, error) from error
        self._refusal = ""

    def close(self) -> None:
        """Close the log and let others open it. Closing twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._refusal = f"{self._file or 'the log'}: is closed, and takes no record; open it again"

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, kind: str, value: Mapping[str, Any]) -> bytes:
        """Return the next line."""
        plain = dict(value)
        text = json.dumps({kind: plain}, separators=(",", ":"), allow_nan=False)
        if json.loads(text) != {kind: plain}:
            raise TypeError(f"expected a record of plain JSON values, which is read back as it is; got {plain!r}")
        body = text[:-1].encode()
        self._sum = xxhash.xxh3_64_intdigest(body, self._sum)
        return body + _SEAL % self._sum + b"\n"

    def _write(self, lines: bytes) -> None:
        rest = memoryview(lines)
        while rest:
            written = os.pwrite(self._descriptor, rest, self._size)
            self._size += written
            rest = rest[written:]
        os.fsync(self._descriptor)


class _Found(NamedTuple):
    """What a file holds: bytes of whole lines, the last line's checksum, starts, records, and what follows the last line."""

    size: int = 0
    sum: int = 0
    starts: int = 0
    records: tuple[dict[str, Any], ...] = ()
    torn: bytes = b""


def _read(file: Path, data: bytes, job: str) -> _Found:
    *lines, torn = data.split(b"\n")
    if not lines and not torn.startswith(_HEADER[: len(torn)]):
        raise ConfigError(f"{file}: is not a coordinator's log; move the file away, or name another run directory")
    sum_, starts, records = 0, 0, []
    for number, line in enumerate(lines, start=1):
        body = line[:-_SEAL_SIZE]
        sum_ = xxhash.xxh3_64_intdigest(body, sum_)
        if line != body + _SEAL % sum_:
            raise _damaged(file, number)
        [(kind, value)] = json.loads(body + b"}").items()
        if number == 1:
            _check(file, value, job)
        elif kind == "start":
            starts += 1
        else:
            records.append(value)
    return _Found(len(data) - len(torn), sum_, starts, tuple(records), torn)


def _check(file: Path, header: dict[str, Any], job: str) -> None:
    if header["format"] != FORMAT:
        raise ConfigError(
            f"{file}: expected a log of format {FORMAT}, found {header['format']!r}; "
            "go on with the release that wrote it, or name another run directory"
        )
    if header["job"] != job:
        raise ConfigError(
            f"{file}: expected the log of job {job!r}, found that of job {header['job']!r}; "
            "name the run directory of this job, or a new one"
        )


def _locked(file: Path, descriptor: int) -> bytes:
    """Take the file for this process alone; return what is in it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{file}: another coordinator has this log open: {_holder(_content(descriptor))}; "
            "end that one first, or name another run directory"
        ) from None
    return _content(descriptor)


def _content(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb", closefd=False) as stream:
        return stream.read()


def _holder(data: bytes) -> str:
    """Say who started last, from the text of a log that another process writes to."""
    for line in reversed(data.split(b"\n")[:-1]):
        with contextlib.suppress(ValueError, KeyError):
            start = json.loads(line)["start"]
            return f"process {start['pid']} on {start['host']}"
    return "a process that has just started"


def _make(directory: Path) -> None:
    """Make a directory so that it is there after a crash of the machine."""
    if not directory.is_dir():
        _make(directory.parent)
        directory.mkdir(exist_ok=True)
        _sync(directory.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unusable(file: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{file}: the coordinator's log cannot be read or written: {error.strerror}; make room or give access to it, "
        "or name another run directory"
    )


def _damaged(file: Path, number: int) -> StorageError:
    return StorageError(
        f"{file}, line {number}: the line is not as it was written, so nothing from there on can be trusted; "
        "put back a copy of the file from before, or start the run anew in another run directory"
    )

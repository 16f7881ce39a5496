"""JSON lines in the run directory: one object an event or a round.

Every role has its own file, so that no two processes write to one: `events-coordinator.jsonl`, `events-server-0.jsonl`,
`events-worker-1.jsonl`, `metrics-worker-1.jsonl`, `rounds-server-0.jsonl`.
"""

from __future__ import annotations

import json
import math
import threading
import time
from io import FileIO
from pathlib import Path
from typing import Any

from ..errors import StorageError

__all__ = ["JsonLines"]

_CHUNK = 1 << 16


class JsonLines:
    """Appends objects to one file, a line each, flushed at once: a killed process keeps what it wrote.

    Any thread may write. What a killed process left of a line in the file is cut off, so that a line always starts one.

    Args:
        file: Where to append; None writes nothing.
        fields: Fields that every line carries.
    """

    def __init__(self, file: Path | None, **fields: Any) -> None:
        self._fields = fields
        self._lock = threading.Lock()
        self._stream: FileIO | None = None
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            _cut_off_torn_line(file)
            self._stream = FileIO(file, "a")

    @classmethod
    def of_role(cls, directory: str, kind: str, role: str, number: int | None = None) -> JsonLines:
        """Open `<directory>/<kind>-<role>[-<number>].jsonl`; an empty directory writes nothing."""
        name = role if number is None else f"{role}-{number}"
        return cls(Path(directory) / f"{kind}-{name}.jsonl" if directory else None, role=name)

    @property
    def on(self) -> bool:
        """Whether anything is written."""
        return self._stream is not None

    def write(self, **fields: Any) -> None:
        """Append one object, with the wall-clock time in seconds in front.

        Raises:
            StorageError: The disk is full, or fails. What was appended before is whole.
        """
        stream = self._stream
        if stream is None:
            return
        line = json.dumps(_plain({"time": round(time.time(), 6)} | self._fields | fields)).encode() + b"\n"
        with self._lock:
            if not stream.closed:
                self._append(stream, line)

    def _append(self, stream: FileIO, line: bytes) -> None:
        try:
            while line:
                line = line[stream.write(line) :]  # a disk that fills up may take a part, and says why only then
        except OSError as error:
            raise StorageError(
                f"{stream.name}: expected to append a line of the log, got: {error.strerror}; make room, or name a run directory "
                "(run.directory) on another disk"
            ) from error

    def close(self) -> None:
        """Close the file. Closing twice is harmless."""
        if self._stream is not None:
            with self._lock:
                self._stream.close()


def _cut_off_torn_line(file: Path) -> None:
    with file.open("ab+") as stream:
        end = size = stream.tell()
        last = b""
        while end and b"\n" not in last:
            begin = max(0, end - _CHUNK)
            stream.seek(begin)
            last = stream.read(end - begin)
            end = begin
        whole = end + last.rfind(b"\n") + 1
        if whole < size:
            stream.truncate(whole)


def _plain(value: Any) -> Any:
    """Return `value` in types that JSON has: NaN and infinity become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value

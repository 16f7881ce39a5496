"""What every thread did when: spans in a file a process, and one picture of the run for chrome://tracing or ui.perfetto.dev.

Processes of one machine share a clock (`time.perf_counter_ns`), and their spans are placed by it. Machines are placed by their
wall clocks, so between them the picture is as exact as those agree.

A file holds a JSON line for the process, one for each thread, and one for each span: `[name, thread, begin, length, fields]`,
in nanoseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import StorageError

__all__ = ["Trace", "merge", "now"]

TOGETHER = 512
"""Spans that are written at once; a process that is killed loses those that wait."""
PATTERN = "trace-*.jsonl"
now = time.perf_counter_ns
"""The clock of all spans, in nanoseconds."""


class Trace:
    """Spans of one process. Any thread may write; without a file nothing happens.

    Args:
        directory: Where the file goes, `trace-<role>-<number>.jsonl`; empty for none.
        role: `worker` or `server`.
        number: Of the role. A process that takes another's place goes on in its file.

    Raises:
        StorageError: The file cannot be made.
    """

    def __init__(self, directory: str = "", role: str = "", number: int = 0) -> None:
        self._lock = threading.Lock()
        self._spans: list[str] = []
        self._known: set[int] = set()
        self._stream: IO[str] | None = None
        if not directory:
            return
        file = Path(directory) / f"trace-{role}-{number}.jsonl"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = file.open("a", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{file}: expected to write a trace there, got: {error.strerror}") from error
        self._write(
            {"role": role, "number": number, "pid": os.getpid(), "machine": _machine(), "at": now(), "wall": time.time_ns()}
        )

    @property
    def on(self) -> bool:
        """Whether anything is written."""
        return self._stream is not None

    def span(self, name: str, began: int, **fields: int | str) -> None:
        """Note that this thread has done `name` since `began` until now."""
        if self._stream is not None:
            self.lay(name, threading.get_native_id(), began, now() - began, fields, thread_name=threading.current_thread().name)

    def lay(self, name: str, thread: int, began: int, length: int, fields: dict[str, int | str], *, thread_name: str) -> None:
        """Note a span on any thread, or on one that is none and has a name only.

        Args:
            name: What was done.
            thread: Its number.
            began: When, by `now`.
            length: Nanoseconds.
            fields: What else there is to say.
            thread_name: Said once.
        """
        with self._lock:
            if self._stream is None:
                return
            if thread not in self._known:
                self._known.add(thread)
                self._spans.append(json.dumps({"thread": thread, "name": thread_name}))
            self._spans.append(json.dumps([name, thread, began, length, fields]))
            if len(self._spans) >= TOGETHER:
                self._flush()

    def close(self) -> None:
        """Write what waits, and close the file. Closing twice is harmless."""
        with self._lock:
            if self._stream is not None:
                self._flush()
                self._stream.close()
                self._stream = None

    def _write(self, head: dict[str, Any]) -> None:
        with self._lock:
            self._spans.append(json.dumps(head))
            self._flush()

    def _flush(self) -> None:
        spans, self._spans = self._spans, []
        assert self._stream is not None
        try:
            self._stream.write("".join(f"{line}\n" for line in spans))
            self._stream.flush()
        except OSError:  # a picture is worth less than the run
            with contextlib.suppress(OSError):
                self._stream.close()
            self._stream = None


def merge(directories: Iterable[Path], file: Path) -> int:
    """Write one Chrome trace of all processes whose spans lie in some run directories.

    A push is drawn as an arrow from where a worker encoded it to where a server folded it, and a result from there to where each
    worker decoded it.

    Args:
        directories: One, or those of several machines.
        file: Written, and overwritten.

    Returns:
        How many spans there are.

    Raises:
        StorageError: There are no spans, or the file cannot be written.
    """
    sources = sorted(source for directory in directories for source in Path(directory).glob(PATTERN))
    if not sources:
        raise StorageError(
            f"expected files {PATTERN} in {', '.join(map(str, directories))}, found none; run the job with --trace"
        )
    names, clocks = list[dict[str, Any]](), dict[str, int]()
    spans = [span for process, source in enumerate(sources) for span in _spans(source, process, names, clocks)]
    placed = [*spans, *_arrows(spans)]
    start = min((span["ts"] for span in spans), default=0)
    for event in placed:
        event["ts"] = (event["ts"] - start) / 1000
    try:
        with file.open("w", encoding="utf-8") as stream:
            json.dump({"displayTimeUnit": "ms", "traceEvents": names + placed}, stream)
    except OSError as error:
        raise StorageError(f"{file}: expected to write the trace there, got: {error.strerror}") from error
    return len(spans)


def _spans(source: Path, process: int, names: list[dict[str, Any]], clocks: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield the spans of one file, in nanoseconds of the wall clock.

    Args:
        source: The file.
        process: Number of its process in the picture.
        names: What names process and threads is added.
        clocks: What to add to the clock of each machine; the first process of a machine says it for all of them.
    """
    shift = 0
    for line in source.read_text(encoding="utf-8").splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue  # what a killed process left of a line
        if isinstance(said, list):
            name, thread, began, length, fields = said
            place = {"pid": process, "tid": thread, "ts": began + shift, "dur": length / 1000}
            yield {"ph": "X", "name": name, "args": fields} | place
        elif "thread" in said:
            names.append(_named("thread_name", said["name"], process) | {"tid": said["thread"]})
        else:
            shift = clocks.setdefault(said["machine"], said["wall"] - said["at"])
            names.append(_named("process_name", f"{said['role']} {said['number']} (pid {said['pid']})", process))


def _named(kind: str, name: str, process: int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "args": {"name": name}}


def _arrows(spans: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the arrows between the spans of one key and round: encode -> fold -> decode."""
    of: dict[tuple[int, int, int], dict[str, list[dict[str, Any]]]] = {}
    for span in spans:
        if span["name"] in ("encode", "fold", "decode"):
            fields = span["args"]
            where = (fields["layout"], fields["key"], fields["round"])
            of.setdefault(where, {}).setdefault(span["name"], []).append(span)
    number = 0
    for stages in of.values():
        for fold in stages.get("fold", ()):
            pairs = [("push", push, fold) for push in stages.get("encode", ())]
            pairs += [("result", fold, result) for result in stages.get("decode", ())]
            for name, tail, head in pairs:
                number += 1
                common = {"name": name, "cat": name, "id": number}
                end = tail["ts"] + int(1000 * tail["dur"]) - 1  # within it, or it would hang in the air
                yield common | {"ph": "s", "pid": tail["pid"], "tid": tail["tid"], "ts": end}
                yield common | {"ph": "f", "bp": "e", "pid": head["pid"], "tid": head["tid"], "ts": head["ts"]}


def _machine() -> str:
    """Return what only processes of this machine say, until it is started anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return os.uname().nodename if hasattr(os, "uname") else ""

"""Finds what a piece of a test run has left behind: processes, threads, descriptors, files.

A look costs about a quarter of a millisecond, so that it can be taken before and after every test.
Only when something is left does it wait: threads and sockets of libraries may take a moment to close, and what hangs in a
reference cycle closes when the cycle is collected (with a ResourceWarning, which fails the test as well).
"""

import gc
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

PATIENCE = 3.0
"""Seconds that leftovers get to close by themselves. Our own roles promise less."""

MARK = "LEAK_WATCH"
"""Variable that every process started by this run inherits: it finds those whose parent has died, too."""


class Look(NamedTuple):
    """What exists at one moment."""

    processes: frozenset[str]
    threads: frozenset[threading.Thread]
    descriptors: dict[str, str]
    files: frozenset[Path]


class Watch:
    """Compares looks. `directories` are where a file left behind is noticed."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self.directories = directories
        self.reported: set[str] = set()
        self.mark = os.environ[MARK] = uuid.uuid4().hex

    @contextmanager
    def over(self, what: str) -> Iterator[None]:
        """Fail, naming `what`, if something that was not there before is there after the body."""
        before = self.look()
        yield
        left = self._left(before)
        if not left:
            return
        gc.collect()
        deadline = time.monotonic() + PATIENCE
        while (left := self._left(before)) and time.monotonic() < deadline:
            time.sleep(0.01)
        if left:
            self._end(before)
            self.reported.update(left)  # A wider scope that ends later has nothing new to say of these.
            pytest.fail(f"{what} left behind:\n  " + "\n  ".join(left), pytrace=False)

    def look(self) -> Look:
        """Take in what exists now."""
        return Look(
            frozenset(name for name in os.listdir("/proc") if name.isdigit()),
            frozenset(threading.enumerate()),
            dict(_descriptors()),
            frozenset(Path(directory, name) for directory in self.directories for name in os.listdir(directory)),
        )

    def _left(self, before: Look) -> list[str]:
        now = self.look()
        left = [f"process {number}: {_command(number)}" for number in self._ours(before, now)]
        left += [f"thread {thread.name!r}" for thread in now.threads - before.threads if _counts(thread)]
        left += [
            f"descriptor {number}: {target}"
            for number, target in now.descriptors.items()
            if before.descriptors.get(number) != target
        ]
        left += [f"file {path}" for path in now.files - before.files]
        return [line for line in left if line not in self.reported]

    def _ours(self, before: Look, now: Look) -> list[str]:
        return [number for number in sorted(now.processes - before.processes) if _is_child(number) or self._is_marked(number)]

    def _is_marked(self, number: str) -> bool:
        with suppress(OSError):
            return f"{MARK}={self.mark}".encode() in Path("/proc", number, "environ").read_bytes().split(b"\0")
        return False

    def _end(self, before: Look) -> None:
        """End what was left, so that it is not in the way of the tests that follow."""
        for number in self._ours(before, self.look()):
            with suppress(OSError):
                os.kill(int(number), signal.SIGKILL)
            with suppress(OSError):
                os.waitpid(int(number), 0)


def _counts(thread: threading.Thread) -> bool:
    # A thread that was not started by Python, such as torch's autograd, looks like this once a hook ran in it; it stays.
    return thread.is_alive() and not isinstance(thread, threading._DummyThread)


def _descriptors() -> Iterator[tuple[str, str]]:
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # The one that lists this directory is closed by now.
            yield number, os.readlink(f"/proc/self/fd/{number}")


def _is_child(number: str) -> bool:
    with suppress(OSError):
        # The name in parentheses may hold anything, so the fields are counted from its end: state, parent.
        return int(Path("/proc", number, "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
    return False


def _command(number: str) -> str:
    with suppress(OSError):
        words = Path("/proc", number, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return words[:200] or "ended, but nobody has waited for it"
    return "gone meanwhile"

"""One child process: started in a session of its own, bound to the launcher's life, read line by line."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from ps_accordion.errors import ConfigError, PsAccordionError

from . import guard as guard_program

__all__ = ["Child", "Guard", "Kind", "LineReader", "Program"]

Kind = Literal["coordinator", "server", "worker"]

TAIL_LINES = 40
"""Lines of standard error kept for the end: a Python traceback through torch is about 30."""
MAX_LINE = 1 << 16
"""A line longer than this is cut in parts, so that output without line ends cannot fill the memory."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Program:
    """What to start.

    Attributes:
        name: Who it is on the screen, such as `worker 1`.
        kind: Its role: the run has gone well when all workers have.
        argv: Program and arguments. No shell sees them.
        environment: The whole environment.
    """

    name: str
    kind: Kind
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)


class Guard:
    """The guard process, as the launcher holds it. A context manager; see `guard.py` for what it does."""

    def __init__(self) -> None:
        self._leaders: set[int] = set()
        self._directories: list[Path] = []
        self._start()

    def _start(self) -> None:
        read, self._write = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(guard_program.__file__))],
                stdin=read,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        finally:
            os.close(read)

    @property
    def descriptor(self) -> int:
        """Write end of the pipe, for a child to announce itself before it runs its program."""
        return self._write

    def check(self) -> None:
        """Start the guard again should it have been killed, and tell it everything."""
        if self._process.poll() is None:
            return
        os.close(self._write)
        self._start()
        for directory in self._directories:
            self._say(f"d {directory}")
        for leader in self._leaders:
            self._say(f"+{leader}")

    def note(self, leader: int) -> None:
        """Remember a session that exists. The child has announced it already; this is for a new guard."""
        self._leaders.add(leader)

    def forget(self, leader: int) -> None:
        """Say that a session is empty: its number may soon mean another process."""
        self._leaders.discard(leader)
        self._say(f"-{leader}")

    def remove_at_end(self, directory: Path) -> None:
        """Have a directory removed when the launcher ends, in whatever way."""
        self._directories.append(directory)
        self._say(f"d {directory}")

    def _say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # `check` starts a new one
            os.write(self._write, f"{line}\n".encode())

    def close(self) -> None:
        """Let the guard finish its work, and wait for it."""
        if self._write < 0:
            return
        os.close(self._write)
        self._write = -1
        self._process.wait()

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LineReader:
    """Cut a stream of bytes into lines of text."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that `data` completes; empty data (the end) also returns an unfinished line."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE or (not data and self._rest):
            lines.append(self._rest)
            self._rest = b""
        return [_text(line) for line in lines]


def _text(line: bytes) -> str:
    # A progress bar rewrites its line with carriage returns: what it says last is what a terminal would show.
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", errors="replace")


class Child:
    """A started program."""

    def __init__(self, program: Program, guard: Guard) -> None:
        """Start it.

        Raises:
            ConfigError: There is no such program, or it may not be executed.
            PsAccordionError: The system could not start a process.
        """
        self.program = program
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self.started = time.monotonic()
        self.ended: float | None = None
        self._session_empty = False
        guard.check()
        try:
            self._process = subprocess.Popen(
                program.argv,
                env=dict(program.environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
                preexec_fn=_before_program(os.getpid(), guard.descriptor),
            )
        except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
            raise ConfigError(
                f"{program.name}: cannot run {program.argv[0]!r}: {error.strerror}; check the command's name and path"
            ) from None
        except (OSError, subprocess.SubprocessError) as error:
            raise PsAccordionError(f"{program.name}: the system could not start a process: {error}") from error
        guard.note(self._process.pid)

    @property
    def pid(self) -> int:
        """Process id, which is also the id of its session and process group."""
        return self._process.pid

    @property
    def streams(self) -> tuple[IO[bytes], IO[bytes]]:
        """Its standard output and standard error."""
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        return self._process.stdout, self._process.stderr

    @property
    def seconds(self) -> float:
        """How long it has lived, in seconds; 0 as long as nobody has seen its end."""
        return (self.ended or self.started) - self.started

    @property
    def gone(self) -> bool:
        """Whether nothing is left of it: no process in its session, no output that was not read."""
        return self._session_empty and all(stream.closed for stream in self.streams)

    def poll(self) -> int | None:
        """Return its exit code as a shell would give it (128 + N for signal N), or None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        if self.ended is None:
            self.ended = time.monotonic()
        return 128 - code if code < 0 else code

    def signal(self, number: int) -> None:
        """Send a signal to its whole process group; nothing happens once it has ended."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def end_session(self, guard: Guard) -> None:
        """Once it has ended: kill whatever it left running, and tell the guard that its session is empty."""
        if not self._session_empty and guard_program.end_session(self.pid):
            guard.forget(self.pid)
            self._session_empty = True  # from here on its number may mean another process

    def kill(self, guard: Guard) -> None:
        """Kill it and everything that it started, now, and close its streams."""
        self.signal(signal.SIGKILL)
        self._process.wait()
        self.end_session(guard)
        self.close()

    def close(self) -> None:
        """Close its streams."""
        for stream in self.streams:
            stream.close()


def _before_program(parent: int, guard_descriptor: int) -> Callable[[], None]:
    def prepare() -> None:
        # Between fork and exec, in the child. Announcing itself here leaves no moment in which the launcher could die
        # with the guard not knowing of a child that already runs its program.
        os.write(guard_descriptor, b"+%d\n" % os.getpid())
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)

    return prepare

"""Lets jobs that run at the same time take turns: a benchmark says how many steps, and each worker answers what they took.

Pipes in a directory carry it, so that it crosses no network and nobody spins while others have their turn.
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

__all__ = ["Stopped", "Turns", "given"]

LOOK_S = 0.5
"""How often the benchmark looks whether the processes still live while it waits for them."""


class Stopped(Exception):
    """A job ended before its turn did."""


class Turns:
    """The benchmark's end of one job.

    Args:
        directory: Where the pipes are; it exists.
        job: Name of the job, as `given` has it.
        workers: How many workers the job has.
        alive: Whether all of its processes live.
    """

    def __init__(self, directory: Path, job: str, workers: int, alive: Callable[[], bool]) -> None:
        self._alive = alive
        self._job = job
        for rank in range(workers):
            for end in ("go", "done"):
                os.mkfifo(_pipe(directory, job, rank, end))
        # Opened for both, which does not wait for the other side.
        self._go = [_pipe(directory, job, rank, "go").open("r+b", buffering=0) for rank in range(workers)]
        self._done = [_pipe(directory, job, rank, "done").open("r+b", buffering=0) for rank in range(workers)]

    def take(self, steps: int) -> list[float]:
        """Have the job make steps, and return what each took the slowest worker, in milliseconds.

        Raises:
            Stopped: A process of the job has ended.
        """
        return [max(times) for times in zip(*self._asked(steps), strict=True)]

    def end(self) -> list[str]:
        """Tell the workers that this was all, and return each one's hash of its parameters."""
        return self._asked(0)

    def _asked(self, steps: int) -> list[Any]:
        for pipe in self._go:
            pipe.write(f"{steps}\n".encode())
        return [json.loads(self._line(pipe)) for pipe in self._done]

    def _line(self, pipe: IO[bytes]) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            if select.select([pipe], [], [], LOOK_S)[0]:
                line += os.read(pipe.fileno(), 1 << 16)
            elif not self._alive():
                raise Stopped(f"a process of {self._job} has ended")
        return line


def given(directory: Path, job: str, rank: int) -> Iterator[tuple[int, Callable[[Any], None]]]:
    """Yield, in a worker, how many steps to make now, and how to answer; 0 steps is the last turn."""
    with (
        _pipe(directory, job, rank, "go").open("r") as go,
        _pipe(directory, job, rank, "done").open("w") as done,
    ):

        def answer(value: Any) -> None:
            done.write(json.dumps(value) + "\n")
            done.flush()

        while steps := int(go.readline()):
            yield steps, answer
        yield 0, answer


def _pipe(directory: Path, job: str, rank: int, end: str) -> Path:
    return directory / f"{job}-{rank}.{end}"

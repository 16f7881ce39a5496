"""How many threads work on codecs, and on which cores."""

from __future__ import annotations

import contextlib
import os

__all__ = ["MOST_THREADS", "codec_threads", "keep_apart", "usable_cores"]

MOST_THREADS = 2
"""Codec threads of a worker that is not told how many. Between kernels they are Python, one at a time: on 16 cores two were
faster than one, and than four (docs/decisions/0032-codec-threads-apart.md)."""


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def codec_threads(cores: int) -> int:
    """Return how many codec threads a worker takes that has so many cores to itself, and is not told."""
    return max(1, min(MOST_THREADS, cores))


def keep_apart(index: int, count: int) -> None:
    """Keep the calling thread, number `index` of `count`, to a share of the cores that it may use; all share what is too few.

    Threads of one process wake each other for Python's lock, several times a key, and Linux likes to run who is woken where its
    waker runs: left alone, several of them may share one core for seconds, while others are idle.
    """
    cores = sorted(os.sched_getaffinity(0))
    if count <= len(cores):
        with contextlib.suppress(OSError):  # some sandboxes forbid it, and it changes nothing but the time
            os.sched_setaffinity(0, cores[index::count])  # 0: this thread, not all of the process

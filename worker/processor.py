"""Processor time by kind of thread, of a worker and of the servers beside it: what the kernel has counted (Linux).

worker codec, worker sockets, worker zeromq     threads of this process
server shards, server sockets, server zeromq    threads of all servers that the same launcher has started
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from pathlib import Path

__all__ = ["Seconds", "server_seconds", "servers", "worker_seconds"]

Seconds = dict[str, float]
"""By kind of thread."""

_PROC = Path("/proc")
_SERVER = b"ps_accordion.server"
_ZEROMQ = "ZMQbg"
"""How ZeroMQ calls its threads."""
_OURS = {"ps-accordion-codec": "worker codec", "ps-accordion-io": "worker sockets"}


def worker_seconds() -> Seconds:
    """Return the processor seconds of this process's threads so far, by kind; nothing where the kernel does not say."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for thread in threading.enumerate():
        for prefix, kind in _OURS.items():
            if thread.name.startswith(prefix):
                seconds[kind] += _seconds(_PROC / "self/task" / str(thread.native_id))
    for task in _tasks("self"):
        if _name(task).startswith(_ZEROMQ):
            seconds["worker zeromq"] += _seconds(task)
    return seconds


def server_seconds() -> Seconds:
    """Return the processor seconds of the threads of all servers that have the same parent as this process, by kind."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for process in servers():
        for task in _tasks(process.name):
            zeromq = _name(task).startswith(_ZEROMQ)
            kind = "server zeromq" if zeromq else "server sockets" if task.name == process.name else "server shards"
            seconds[kind] += _seconds(task)
    return seconds


def servers() -> list[Path]:
    """Return the directories in /proc of all servers that have the same parent as this process."""
    found = []
    for process in _PROC.glob("[0-9]*"):
        try:
            if _SERVER in (process / "cmdline").read_bytes().split(b"\0") and _parent(process) == os.getppid():
                found.append(process)
        except OSError:
            continue  # it has ended, or is not ours to look at
    return found


def _tasks(process: str) -> list[Path]:
    return list((_PROC / process / "task").glob("[0-9]*"))


def _name(task: Path) -> str:
    return _read(task / "comm")


def _seconds(task: Path) -> float:
    """Return the processor seconds of a thread: the first number of its schedstat, in nanoseconds."""
    text = _read(task / "schedstat")
    return int(text.split()[0]) / 1e9 if text else 0.0


def _parent(process: Path) -> int:
    return int((process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""  # the thread has ended, or this kernel does not count

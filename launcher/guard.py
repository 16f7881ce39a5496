"""The guard: a small process that ends what a dead launcher left behind.

The launcher holds the write end of a pipe whose read end is the guard's standard input. Lines tell the guard what exists:

    +PID      a process started that leads a session of its own (the child says so itself, before it runs its program)
    -PID      that session is empty
    d PATH    a directory to remove with the run

When the pipe closes, the launcher has ended, well or by SIGKILL, and the guard kills every session that is left.
A signal on the parent's death (`child.py`) does the same for direct children; the guard reaches their children too.

This file is run by its path, isolated and without site packages, so that it starts in about 20 ms: standard library only.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

__all__ = ["end_session", "main", "session_members"]

END_SECONDS = 5.0
"""How long killed processes may take to disappear. SIGKILL needs milliseconds; only a process stuck in the kernel needs more."""


def session_members(leader: int) -> list[int]:
    """Return the ids of all living processes whose session or process group is `leader`'s."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it ended while we looked
            continue
        # pid (name) state parent group session ...: the name may hold blanks and brackets, so count from its end.
        state, _parent, group, session = stat.rpartition(")")[2].split()[:4]
        if state not in "ZX" and leader in (int(group), int(session)):
            found.append(int(entry.name))
    return found


def end_session(leader: int, *, seconds: float = END_SECONDS) -> bool:
    """Kill every process of a session, and wait until they are gone.

    Args:
        leader: Process id of the session's first process, living or dead.
        seconds: How long to wait.

    Returns:
        Whether the session is empty now.
    """
    give_up = time.monotonic() + seconds
    pause = 0.001
    while members := session_members(leader):
        for member in members:  # again on every pass: a process may fork between the look and the kill
            try:
                os.kill(member, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > give_up:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return True


def main() -> None:
    """Read what the launcher says until the pipe closes, then end what is left."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    leaders: set[int] = set()
    directories: list[str] = []
    for line in sys.stdin:
        word = line.rstrip("\n")
        if word.startswith("+"):
            leaders.add(int(word[1:]))
        elif word.startswith("-"):
            leaders.discard(int(word[1:]))
        elif word.startswith("d "):
            directories.append(word[2:])
    for leader in leaders:
        end_session(leader)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()

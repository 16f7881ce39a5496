"""Named places at which a process can be made to die, for tests: what is on the disk there, and what has been sent, is known.

`PS_ACCORDION_CRASH_AT=c.proposed` kills every process that reaches that point, the first time; `c.proposed:3` the third time.
A process that was started again after a death (`PS_ACCORDION_RESTART`) lives on.
"""

from __future__ import annotations

import os
import signal
import time

__all__ = ["CRASH_VARIABLE", "reach"]

CRASH_VARIABLE = "PS_ACCORDION_CRASH_AT"

_left: dict[str, int] | None = None
"""How often a point may still be reached, of those that are armed; None until the environment has been looked at."""


def reach(point: str, *, after: float = 0.0) -> None:
    """End this process as SIGKILL does, if the environment names this point; else do nothing.

    Args:
        point: Its name.
        after: Seconds to live on first, so that what was handed to the sockets leaves.
    """
    global _left
    if _left is None:
        _left = _armed()
    if point not in _left:
        return
    _left[point] -= 1
    if _left[point] == 0:
        time.sleep(after)
        os.kill(os.getpid(), signal.SIGKILL)


def _armed() -> dict[str, int]:
    named = os.environ.get(CRASH_VARIABLE, "")
    if not named or "PS_ACCORDION_RESTART" in os.environ:
        return {}
    point, _, times = named.partition(":")
    return {point: int(times or 1)}

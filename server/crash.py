"""Points at which a test can have a server killed, in its first life only.

`PS_ACCORDION_CRASH_AT=s.half:3` kills the process when it comes to `s.half` for the third time. Without it nothing happens.

    s.frozen      a promise is written, and not sent yet
    s.half        a fold has written its half of the residual, and the round is not marked finished
    s.marked      the round is marked finished, and no result has left
    s.sent_some   one member has the result, the others do not
    s.view        a view is written, and not applied to any key
"""

from __future__ import annotations

import itertools
import os
import signal

from ps_accordion import role

__all__ = ["CRASH_VARIABLE", "here"]

CRASH_VARIABLE = "PS_ACCORDION_CRASH_AT"
_count = itertools.count(1)


def here(point: str) -> None:
    """Die here, if the environment says so."""
    wanted, _, number = os.environ.get(CRASH_VARIABLE, "").partition(":")
    if wanted == point and role.restart_number() == 0 and next(_count) == int(number or 1):
        os.kill(os.getpid(), signal.SIGKILL)

"""What the processes of all roles do alike: find their settings, and turn an error into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from .errors import PsAccordionError
from .sources import ENVIRONMENT_PREFIX

__all__ = ["CONFIG_VARIABLE", "RESTART_VARIABLE", "config_file", "guarded", "restart_number"]

CONFIG_VARIABLE = ENVIRONMENT_PREFIX + "CONFIG"
RESTART_VARIABLE = ENVIRONMENT_PREFIX + "RESTART"
"""Set by the launcher in a process that it starts again: how often it has done so."""


def config_file() -> str | None:
    """Return the config file named by the environment, or None."""
    return os.environ.get(CONFIG_VARIABLE) or None


def restart_number() -> int:
    """Return how often the launcher has started this process again after a death; 0 where nobody says."""
    text = os.environ.get(RESTART_VARIABLE, "")
    return int(text) if text.isdecimal() else 0


def guarded(role: str, main: Callable[[], int]) -> int:
    """Call `main`; print an error of ours as one line and return its exit code. Ctrl-C returns 130 without a traceback.

    SIGTERM ends the process at once: a role keeps nothing that needs tidying.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        return main()
    except PsAccordionError as error:
        print(f"{role}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130

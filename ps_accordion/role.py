"""What the processes of all roles do alike: find their settings, and turn an error into one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from .config import ENVIRONMENT_PREFIX
from .errors import PsAccordionError

__all__ = ["CONFIG_VARIABLE", "config_file", "guarded"]

CONFIG_VARIABLE = ENVIRONMENT_PREFIX + "CONFIG"


def config_file() -> str | None:
    """Return the config file named by the environment, or None."""
    return os.environ.get(CONFIG_VARIABLE) or None


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

"""`python -m ps_accordion.coordinator`: one coordinator in the foreground, set by the environment."""

from __future__ import annotations

import sys

from .. import role
from ..imports import collection_paused


def main() -> int:
    """Run the coordinator of one run; return its exit code."""
    with collection_paused():
        from .. import config
        from . import loop
    return loop.run(config.load(role.config_file()))


if __name__ == "__main__":
    sys.exit(role.guarded("coordinator", main))

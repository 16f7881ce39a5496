"""`python -m ps_accordion.server --number N`: one server in the foreground, set by the environment."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

from ps_accordion import config, role
from ps_accordion.imports import collection_paused

from .heap import keep_freed_memory


def main() -> int:
    """Run one server; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ps_accordion.server", description="One server of a run.")
    parser.add_argument("--number", type=int, required=True, help="number of this server, from 0")
    number = parser.parse_args().number
    keep_freed_memory()
    # Where kernels are not kept yet, numba compiles them, and loads scipy for linear algebra that no kernel of ours has: 0.2 s.
    # None means: it is not installed.
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]  # as Python documents it
    modules["scipy"] = None
    with collection_paused():
        from . import loop
    return loop.run(config.load(role.config_file()), number)


if __name__ == "__main__":
    sys.exit(role.guarded("server", main))

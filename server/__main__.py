"""`python -m ps_accordion.server --number N`: one server in the foreground, set by the environment."""

from __future__ import annotations

import argparse
import sys

from ps_accordion import config, role

from . import loop


def main() -> int:
    """Run one server; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ps_accordion.server", description="One server of a run.")
    parser.add_argument("--number", type=int, required=True, help="number of this server, from 0")
    number = parser.parse_args().number
    return loop.run(config.load(role.config_file()), number)


if __name__ == "__main__":
    sys.exit(role.guarded("server", main))

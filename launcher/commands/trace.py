"""`ps-accordion trace`: one picture of what all processes of a run did, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ps_accordion.telemetry.trace import merge

__all__ = ["trace"]


def trace(*directories: Path, out: Annotated[Path, Parameter(name=["--out", "-o"])] = Path("trace.json")) -> int:
    """Draw the spans of a run that was made with --trace, for chrome://tracing or ui.perfetto.dev. Both read it offline.

    Args:
        directories: The run directory, or those of several machines; machines are placed by their wall clocks.
        out: Where the picture goes.
    """
    spans = merge(directories or (Path(),), out)
    print(f"{spans} spans in {out}")
    return 0

"""`ps-accordion bench codecs`: how fast every codec is beside a plain copy, and what it loses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ps_accordion.codecs import names, suite, warm
from ps_accordion.codecs.values import ValueFormat
from ps_accordion.errors import ConfigError
from ps_accordion.selection import levels_of

from ..codec_rivals import rivals_of
from ..codec_speed import FOLDS, Case, measure, measure_kernels
from ..machine import machine
from ..progress import human_bytes

__all__ = ["bar", "cases_of", "codecs"]

BAR = 18
"""Characters of the longest bar."""
BAR_COPIES = 3.0
"""Copies that the longest bar stands for; what takes longer ends in an arrow."""


def codecs(
    *,
    only: str = "",
    elements: int = 16_777_216,
    threads: int = 1,
    values: ValueFormat = "fp16",
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> int:
    """Time every operation of every codec as a multiple of numpy.copyto of the same vector, in the same run.

    A worker encodes (encode_feedback: what is kept goes beside the old residual, as in training; encode_turned: the other half,
    of codecs that take turns; encode_in_place: over it; encode: nothing is kept), a server sums what 2, 4 or 8 members pushed
    (fold), or adds it undecoded (linear_sum), and encodes the sum (reencode), or does both at once (answer, of 8); both sides
    decode. PyTorch's own top k, PowerSGD and cast to fp16 are timed beside topk, powersgd and dense 16, on one thread, if it is
    installed. Run it on a quiet machine: whatever else uses the memory is in the figures.

    Args:
        only: Codecs to measure, as name or name:level, separated by commas; a name alone takes its light and its heavy level.
            Empty takes all.
        elements: Length of the float32 vectors; 262144 is a quarter of the largest key, and stays in the cache.
        threads: How many threads work at once, each on vectors of its own.
        values: How dgc, threshold and topk write what they keep.
        json_file: Write the rows to this file, too.
    """
    for name, value in (("elements", elements), ("threads", threads)):
        if value < 1:
            raise ConfigError(f"command line: --{name} {value}: expected at least 1")
    cases = cases_of(only)
    known = suite(values=values)
    warm((known[case.codec], case.level) for case in cases)
    console, rows, beside = Console(), list[dict[str, Any]](), list[dict[str, Any]]()
    plural = "s" if threads > 1 else ""
    console.print(f"{human_bytes(4 * elements)} of float32, {threads} thread{plural}; a full bar is {BAR_COPIES:g} copies")
    beside += measure_kernels(elements, threads)
    _show_rows(
        console,
        "kernels: read and sum take two vectors, as feedback must; sum writes a third; rotate is a Hadamard",
        beside,
    )
    for case in cases:
        measured = list(measure(case, elements, threads, values=values))
        rivals = list(rivals_of(case, elements)) if threads == 1 else []
        _show(console, case, measured, rivals)
        rows += measured
        beside += rivals
    console.print("; ".join(f"{name} {value}" for name, value in machine().items()), style="dim", highlight=False)
    if json_file is not None:
        json_file.write_text(
            json.dumps({"machine": machine(), "rows": rows, "beside": beside}, indent=2) + "\n", encoding="utf-8"
        )
    return 0


def cases_of(only: str) -> list[Case]:
    """Return the cases that `--only` names: `name` or `name:level`, separated by commas; all codecs if it is empty.

    Raises:
        ConfigError: A name is unknown, or a level is no number.
    """
    cases: list[Case] = []
    for part in only.split(",") if only else names():
        name, colon, level = part.strip().partition(":")
        if name not in names():
            raise ConfigError(f"command line: --only expects codecs among {', '.join(names())}, got {part!r}")
        try:
            cases += [Case(name, float(level))] if colon else [Case(name, each) for each in levels_of(name)]
        except ValueError:
            raise ConfigError(f"command line: --only expects name or name:level, such as topk:0.01; got {part!r}") from None
    return cases


def _show(console: Console, case: Case, rows: list[dict[str, Any]], rivals: list[dict[str, Any]]) -> None:
    title = f"{case.codec} {case.level:g}: {rows[0]['bytes_per_element']:g} bytes an element"
    _show_rows(console, title, rows + rivals, case.codec)
    errors = ", ".join(f"{name} {error:.3g}" for name, error in rows[0]["sq_error"].items())
    console.print(f"squared error: {errors}\n", highlight=False)


def _show_rows(console: Console, title: str, rows: list[dict[str, Any]], codec: str = "kernels") -> None:
    table = Table(title=title, title_justify="left")
    for heading in ("op", "ms", "GB/s", "copies", "a member"):
        table.add_column(heading, justify="left" if heading == "op" else "right", no_wrap=True, min_width=len(heading))
    table.add_column("", width=BAR + 1, no_wrap=True)
    for row in rows:
        copies = row["vs_memcpy"]
        members = [number for number in FOLDS if row["op"].endswith(str(number))]
        each = f"{copies / members[0]:.2f}" if members else ""
        name = row["op"] if row["codec"] == codec else f"{row['codec']} {row['op']}".removesuffix(" encode_feedback")
        table.add_row(name, f"{row['ms']:.3f}", f"{row['gbps']:.1f}", f"{copies:.2f}", each, bar(copies))
    console.print(table)


def bar(copies: float) -> Text:
    """Return a bar as long as an operation takes; green is faster than a copy."""
    eighths = round(8 * BAR * min(copies, BAR_COPIES) / BAR_COPIES)
    drawn = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
    style = "green" if copies <= 1 else "yellow" if copies <= BAR_COPIES else "red"
    return Text(drawn + ("▶" if copies > BAR_COPIES else ""), style=style)

"""`ps-accordion bench pushpull` and `bench step`: what we do beside what people use today, through real processes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from ps_accordion.errors import ConfigError

from .. import local
from ..job_speed import Case, Job, measured, pushpull_rows
from ..machine import machine
from ..progress import human_bytes

__all__ = ["parse_cases", "pushpull", "step"]


def pushpull(
    *,
    elements: int = 26_214_400,
    workers: int = 2,
    servers: int = 2,
    shards_per_server: int = 1,
    pairs: int = 15,
    cases: str = "topk:0.01,dense:32,dense:32:socket",
    link: local.Link = "ipc",
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> int:
    """Time push_pull of one large float32 tensor beside gloo all_reduce of the same tensor, in turn.

    Args:
        elements: Length of the tensor; the default is 100 MiB.
        workers: How many workers push.
        servers: How many servers aggregate.
        shards_per_server: Shards, and so compute threads, in a server.
        pairs: How often each of the two is timed.
        cases: What to measure, as codec:level,codec:level; codec:level:socket has payloads go through sockets, where processes
            of one host otherwise read large ones from each other's memory (servers.lane).
        link: What carries ours: ipc (Unix sockets) or tcp (loopback). gloo always uses TCP on loopback.
        json_file: Write the rows to this file, too.
    """
    _at_least_one(elements=elements, pairs=pairs)
    job = Job(workers, servers, shards_per_server, link, pairs, elements)
    rows = pushpull_rows(parse_cases(cases), job)
    if isinstance(rows, int):
        return rows
    _show_pushpull(rows, job)
    return _written(json_file, rows)


def step(
    *,
    layers: int = 6,
    width: int = 2048,
    batch: int = 8,
    workers: int = 2,
    servers: int = 2,
    shards_per_server: int = 1,
    pairs: int = 15,
    cases: str = "topk:0.01,onebit:512,dense:32",
    baselines: str = "ddp,ddp_fp16,ddp_powersgd",
    device: str = "cpu",
    link: local.Link = "ipc",
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> int:
    """Time a whole training step beside DistributedDataParallel over gloo, in turn, and beside a model that shares nothing.

    Everything runs on this machine without a limit on the network, where all-reduce is at its best; `python -m benchmarks.vs_ddp`
    in a checkout measures limited links.

    Args:
        layers: Linear layers of the network; the default has 25 million parameters.
        width: Inputs and outputs of a layer.
        batch: Rows of a worker's batch.
        workers: How many workers train.
        servers: How many servers aggregate.
        shards_per_server: Shards, and so compute threads, in a server.
        pairs: How often each way is timed.
        cases: What to measure, as codec:level,codec:level.
        baselines: What to compare with: some of ddp, ddp_fp16 (its fp16 hook), ddp_powersgd (its PowerSGD hook at rank 4).
        device: Where the models lie: cpu, or an accelerator that all workers share, such as cuda. gloo goes through the host.
        link: What carries ours: ipc (Unix sockets) or tcp (loopback). gloo always uses TCP on loopback.
        json_file: Write the rows to this file, too.
    """
    _at_least_one(layers=layers, width=width, batch=batch, pairs=pairs)
    others = _baselines(baselines)
    job = Job(workers, servers, shards_per_server, link, pairs, layers * width * (width + 1))
    sizes = ("--layers", str(layers), "--width", str(width), "--batch", str(batch), "--device", device)
    rows = []
    for case in parse_cases(cases):
        took = measured(case, job, ("step", *sizes, "--baselines", *others), exact=others[0] == "ddp")
        if isinstance(took, int):
            return took
        alone_ms = round(statistics.median(took.times["alone"]), 3)
        rows += [row | {"alone_ms": alone_ms} for row in took.rows({name: name for name in others})]
    _show_step(rows, others, f"A step of {layers} layers of {width} x {width}, batch {batch}, on {device}; {job}")
    return _written(json_file, rows)


def parse_cases(text: str) -> list[Case]:
    """Read `codec:level,codec:level`, each perhaps with `:socket` behind it.

    Raises:
        ConfigError: It is not of that form.
    """
    cases = []
    for part in text.split(","):
        codec, colon, level = part.strip().removesuffix(":socket").partition(":")
        try:
            cases.append(Case(codec, float(level), lane=not part.strip().endswith(":socket")))
        except ValueError:
            colon = ""
        if not colon or not codec:
            raise ConfigError(f"command line: --cases expects codec:level, such as topk:0.01; got {part!r}")
    return cases


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"command line: --{name} {value}: expected at least 1")


def _baselines(text: str) -> tuple[str, ...]:
    # Not from the worker's module: that imports torch, which takes seconds and may be missing where servers are.
    known = ("ddp", "ddp_fp16", "ddp_powersgd")
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in known:
            raise ConfigError(f"command line: --baselines expects some of {', '.join(known)}; got {name!r}")
    return names


def _show_pushpull(rows: list[dict[str, Any]], job: Job) -> None:
    caption = (
        "medians in ms; ratio: ours / gloo all_reduce, so below 1 is faster. bytes: a worker's, both ways.\n"
        "encode and decode: time on a worker's codec threads, within ours, and beside each other"
    )
    headings = ("case", "ours", "gloo", "ratio", "encode", "decode", "bytes", "fewer")
    lines = [
        (
            row["case"],
            f"{row['ms']:.1f}",
            f"{row['baseline_ms']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['encode_ms']:.1f}",
            f"{row['decode_ms']:.1f}",
            human_bytes(row["bytes_a_worker"]),
            f"{row['fewer_bytes']:.1f}x",
        )
        for row in rows
    ]
    _print(f"push_pull of {human_bytes(4 * job.elements)} float32; {job}", caption, headings, lines)


def _show_step(rows: list[dict[str, Any]], others: Sequence[str], title: str) -> None:
    caption = "medians in ms, and ours / its, so below 1 is faster. alone: the same step with nothing shared"
    lines = []
    for first in range(0, len(rows), len(others)):
        one = rows[first : first + len(others)]
        beside = (f"{row['baseline_ms']:.0f} {row['ratio']:.2f}" for row in one)
        lines.append((one[0]["case"], f"{one[0]['ms']:.0f}", f"{one[0]['alone_ms']:.0f}", *beside))
    _print(title, caption, ("case", "ours", "alone", *others), lines)


def _print(title: str, caption: str, headings: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    console = Console()
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    console.print("; ".join(f"{name} {value}" for name, value in machine().items()), style="dim", highlight=False)


def _written(file: Path | None, rows: list[dict[str, Any]]) -> int:
    if file is not None:
        file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")
    return 0

"""`ps-accordion bench pushpull`: push_pull of one large tensor beside gloo all_reduce, through real processes."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from ps_accordion import config
from ps_accordion.errors import ConfigError

from .. import local
from ..machine import machine
from ..progress import Tail, human_bytes
from ..screen import Screen

__all__ = ["Case", "parse_cases", "pushpull"]

MEASURED = ("encode", "wait", "decode")
"""Parts of a push_pull, as the metrics name them."""


class Case(NamedTuple):
    """A codec and a level to measure."""

    codec: str
    level: float


def pushpull(
    *,
    elements: int = 26_214_400,
    workers: int = 2,
    servers: int = 2,
    shards_per_server: int = 1,
    pairs: int = 15,
    cases: str = "topk:0.01,dense:32",
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
        cases: What to measure, as codec:level,codec:level.
        link: What carries ours: ipc (Unix sockets) or tcp (loopback). gloo always uses TCP on loopback.
        json_file: Write the rows to this file, too.
    """
    for name, value in (("elements", elements), ("pairs", pairs)):
        if value < 1:
            raise ConfigError(f"command line: --{name} {value}: expected at least 1")
    rows = []
    for case in parse_cases(cases):
        with tempfile.TemporaryDirectory(prefix="psa-bench-") as directory, Screen("none") as screen:
            settings = config.load(
                overrides={
                    "workers.count": workers,
                    "servers.count": servers,
                    "servers.shards_per_server": shards_per_server,
                    "codec.name": case.codec,
                    "codec.light": case.level,
                    "codec.heavy": case.level,
                    "regime.policy": "static",
                    "run.directory": f"{directory}/run",
                }
            )
            command = _command(Path(directory), elements, pairs, exact=case == Case("dense", 32))
            ending = local.run(settings, command, screen=screen, link=link)
            if ending.exit_code:
                return ending.exit_code
            rows.append(_row(case, Path(directory), settings, link, elements))
    _show(rows, elements)
    if json_file is not None:
        _write(json_file, rows)
    return 0


def parse_cases(text: str) -> list[Case]:
    """Read `codec:level,codec:level`.

    Raises:
        ConfigError: It is not of that form.
    """
    cases = []
    for part in text.split(","):
        codec, colon, level = part.strip().partition(":")
        try:
            cases.append(Case(codec, float(level)))
        except ValueError:
            colon = ""
        if not colon or not codec:
            raise ConfigError(f"command line: --cases expects codec:level, such as topk:0.01; got {part!r}")
    return cases


def _command(directory: Path, elements: int, pairs: int, *, exact: bool) -> tuple[str, ...]:
    return (
        *(sys.executable, "-P", "-m", "ps_accordion.worker.bench"),
        *("--elements", str(elements), "--pairs", str(pairs)),
        *("--rendezvous", str(directory / "gloo"), "--result", str(directory / "result-{rank}.json")),
        *(("--exact",) if exact else ()),
    )


def _row(case: Case, directory: Path, settings: config.Settings, link: str, elements: int) -> dict[str, Any]:
    workers = settings.workers.count
    results = [json.loads((directory / f"result-{rank}.json").read_text(encoding="utf-8")) for rank in range(workers)]
    # All have come to a barrier before: an operation takes as long as it takes the slowest worker.
    pairs = {name: [max(times) for times in zip(*(one[name] for one in results), strict=True)] for name in ("ms", "baseline_ms")}
    metrics = [row for file in (directory / "run").glob("metrics-worker-*.jsonl") for row in Tail(file).read()]
    counted = [row for row in metrics if row["round"] >= max(row["round"] for row in metrics) + 1 - len(pairs["ms"])]
    ms, baseline_ms = statistics.median(pairs["ms"]), statistics.median(pairs["baseline_ms"])
    moved = statistics.mean(row["push_bytes"] + row["pull_bytes"] for row in counted)
    return {
        "case": f"{case.codec}:{case.level:g}",
        "codec": case.codec,
        "level": case.level,
        "workers": workers,
        "servers": settings.servers.count,
        "shards_per_server": settings.servers.shards_per_server,
        "link": link,
        "elements": elements,
        "ms": round(ms, 3),
        "baseline": "gloo all_reduce",
        "baseline_ms": round(baseline_ms, 3),
        "ratio": round(ms / baseline_ms, 4),
        "pairs": {name: [round(value, 3) for value in values] for name, values in pairs.items()},
        "bytes_a_worker": round(moved),
        "fewer_bytes": round(8 * elements / moved, 2),
        **{f"{name}_ms": round(1000 * statistics.mean(row[f"{name}_s"] for row in counted), 3) for name in MEASURED},
    }


def _show(rows: list[dict[str, Any]], elements: int) -> None:
    console = Console()
    first = rows[0]
    place = f"{first['workers']} workers, {first['servers']} servers, {first['link']}"
    table = Table(title=f"push_pull of {human_bytes(4 * elements)} float32; {place}", title_justify="left")
    table.caption = (
        "medians; ratio: ours / gloo all_reduce, so below 1 is faster. bytes: a worker's, both ways.\n"
        "encode and decode: time on a worker's codec threads, within ours, and beside each other"
    )
    table.caption_justify = "left"
    for heading in ("case", "ours ms", "gloo ms", "ratio", "encode ms", "decode ms", "bytes", "fewer"):
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["case"],
            f"{row['ms']:.1f}",
            f"{row['baseline_ms']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['encode_ms']:.1f}",
            f"{row['decode_ms']:.1f}",
            human_bytes(row["bytes_a_worker"]),
            f"{row['fewer_bytes']:.1f}x",
        )
    console.print(table)
    console.print("; ".join(f"{name} {value}" for name, value in machine().items()), style="dim", highlight=False)


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")

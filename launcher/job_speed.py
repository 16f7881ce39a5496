"""How long jobs of the benches take, and what their threads do meanwhile: real processes, beside what people use today."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ps_accordion import config

from . import local
from .progress import Tail
from .screen import Screen

__all__ = ["Case", "Job", "Measured", "measured", "pushpull_rows"]

MEASURED = ("encode", "wait", "decode")
"""Parts of a round, as the metrics name them."""
EXACT = ("dense", 32)


class Case(NamedTuple):
    """What is measured: a codec, a level, and whether payloads may be read from the memory of whoever sends them."""

    codec: str
    level: float
    lane: bool = True

    def __str__(self) -> str:
        return f"{self.codec}:{self.level:g}" + ("" if self.lane else ":socket")


class Measured(NamedTuple):
    """What one case took.

    Attributes:
        fields: What its rows have in common: the case, the job, the bytes, and the parts of a round.
        times: Milliseconds of each turn, of the slowest worker, by way.
    """

    fields: dict[str, Any]
    times: dict[str, list[float]]

    def rows(self, baselines: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return a row beside each baseline: its way and its name."""
        ms = statistics.median(self.times["ours"])
        rows = []
        for way, name in baselines.items():
            baseline_ms = statistics.median(self.times[way])
            pairs = {"ms": self.times["ours"], "baseline_ms": self.times[way]}
            row = {
                "ms": round(ms, 3),
                "baseline": name,
                "baseline_ms": round(baseline_ms, 3),
                "ratio": round(ms / baseline_ms, 4),
            }
            rounded = {each: [round(value, 3) for value in values] for each, values in pairs.items()}
            rows.append(self.fields | row | {"pairs": rounded})
        return rows


class Job(NamedTuple):
    """What is the same in all cases."""

    workers: int
    servers: int
    shards_per_server: int
    link: local.Link
    turns: int
    elements: int

    def __str__(self) -> str:
        return f"{self.workers} workers, {self.servers} servers, {self.link}"


def measured(case: Case, job: Job, what: Sequence[str], *, exact: bool = True) -> Measured | int:
    """Run one case; return what it took, or the exit code of what failed."""
    with tempfile.TemporaryDirectory(prefix="psa-bench-") as name, Screen("none") as screen:
        directory = Path(name)
        settings = config.load(
            overrides={
                "workers.count": job.workers,
                "servers.count": job.servers,
                "servers.shards_per_server": job.shards_per_server,
                "codec.name": case.codec,
                "codec.light": case.level,
                "codec.heavy": case.level,
                "servers.lane": "auto" if case.lane else "off",
                "regime.policy": "static",
                "run.directory": f"{directory}/run",
            }
        )
        command = (
            *(sys.executable, "-P", "-m", "ps_accordion.worker.bench", "--turns", str(job.turns)),
            *("--rendezvous", str(directory / "gloo"), "--result", str(directory / "result-{rank}.json")),
            *(("--exact",) if exact and case[:2] == EXACT else ()),
            *what,
        )
        ending = local.run(settings, command, screen=screen, link=job.link)
        if ending.exit_code:
            return ending.exit_code
        results = [json.loads((directory / f"result-{rank}.json").read_text(encoding="utf-8")) for rank in range(job.workers)]
        partition = config.load(directory / "run" / "config.toml", environment={}).partition_elements
        metrics = [row for file in (directory / "run").glob("metrics-worker-*.jsonl") for row in Tail(file).read()]
    # All have come to a barrier before: an operation takes as long as it takes the slowest worker.
    every = [one["times"] for one in results]
    times = {way: [max(turn) for turn in zip(*(one[way] for one in every), strict=True)] for way in every[0]}
    counted = [row for row in metrics if row["round"] >= max(row["round"] for row in metrics) + 1 - job.turns]
    moved = statistics.mean(row["push_bytes"] + row["pull_bytes"] for row in counted)
    lent = statistics.mean(row["lane_push_bytes"] + row["lane_pull_bytes"] for row in counted)
    cpu = {kind: [one["cpu_ms"][kind] for one in results if kind in one["cpu_ms"]] for kind in results[0]["cpu_ms"]}
    fields = {
        "case": str(case),
        "codec": case.codec,
        "level": case.level,
        "workers": job.workers,
        "servers": job.servers,
        "shards_per_server": job.shards_per_server,
        "partition_elements": partition,
        "link": job.link,
        "elements": job.elements,
        "bytes_a_worker": round(moved),
        "lane_bytes_a_worker": round(lent),
        "fewer_bytes": round(8 * job.elements / moved, 2),
        **{f"{name}_ms": round(1000 * statistics.mean(row[f"{name}_s"] for row in counted), 3) for name in MEASURED},
        "cpu_ms": {kind: round(statistics.mean(every), 3) for kind, every in cpu.items()},
    }
    return Measured(fields, times)


def pushpull_rows(cases: Sequence[Case], job: Job) -> list[dict[str, Any]] | int:
    """Return a row a case of push_pull of one tensor beside gloo all_reduce; or the exit code of what failed."""
    rows: list[dict[str, Any]] = []
    for case in cases:
        took = measured(case, job, ("pushpull", "--elements", str(job.elements)))
        if isinstance(took, int):
            return took
        rows += took.rows({"all_reduce": "gloo all_reduce"})
    return rows

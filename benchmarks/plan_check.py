"""Is what `ps-accordion plan` predicts what really happens?

    python -m benchmarks.plan_check [--steps 15] [--only 1,4] [--json FILE]

Jobs run in network namespaces (`hosts.py`, so this needs root), on one machine whose cores all processes share: the simulation is
told so. What messages, bytes and codecs cost is measured first, as `plan` does it. From that, and from what the same workers take
when they share nothing, in turn with them, six configurations are predicted; nothing is fitted to what they take.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import hosts, jobs, phases, vs_ddp
from ps_accordion.capacity import Compute, Job, Link, Step, simulate
from ps_accordion.capacity.models import linear
from ps_accordion.cores import codec_threads
from ps_accordion.launcher.coefficients import costs_now
from ps_accordion.launcher.machine import machine
from ps_accordion.regimes.base import Choice

WARM_UP = 3
"""Steps that are not counted."""
GOOD = 0.20
"""A prediction is good if it is no further off than this."""
LAYERS, WIDTH = 6, 2048
ONEBIT, TOPK, SPARSE, DENSE = Choice("onebit", 8192.0), Choice("topk", 0.01), Choice("topk", 0.001), Choice("dense", 32.0)


class Setting(NamedTuple):
    """One job on machines.

    Attributes:
        choice: Codec and level.
        link: Of every host, as tc writes it.
        workers: How many.
        servers: How many.
        colocated: Whether servers are on the workers' hosts.
        delay_ms: Each way.
    """

    choice: Choice
    link: str
    workers: int = 2
    servers: int = 2
    colocated: bool = False
    delay_ms: float = 0.0

    def __str__(self) -> str:
        where = " on the workers' hosts" if self.colocated else ""
        far = f", {self.delay_ms:g} ms each way" if self.delay_ms else ""
        codec, level = self.choice
        return f"{codec} {level:g}, {self.link}, {self.workers} workers, {self.servers} servers{where}{far}"

    def job(self, compute: Compute) -> Job:
        """Return what the simulation is told of it."""
        cores = len(os.sched_getaffinity(0))
        link = Link(hosts.bits_of(self.link), self.delay_ms / 2000)
        return Job(
            tensors=tuple(linear(LAYERS, WIDTH)),
            choice=self.choice,
            workers=self.workers,
            servers=self.servers,
            shards_per_server=1,
            worker_link=link,
            server_link=link,
            worker_cores=cores,
            server_cores=cores,
            shared_cores=cores,
            threads=codec_threads(cores),
            compute=compute,
            colocated=self.colocated,
        )


CHECKED = (
    Setting(ONEBIT, "1gbit"),
    Setting(DENSE, "1gbit", servers=1),
    Setting(TOPK, "100mbit"),
    Setting(DENSE, "200mbit", workers=4, servers=4),
    Setting(DENSE, "200mbit", colocated=True),
    Setting(SPARSE, "100mbit", servers=1, delay_ms=20.0),
)


def main() -> None:
    """Predict, measure, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="steps that are counted (default: 15)")
    parser.add_argument("--only", default="1,2,3,4,5,6", help="configurations to check, by number (default: all six)")
    parser.add_argument("--json", type=Path, help="write the rows and the costs to this file, too")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that hosts and processes go away then, too
    try:
        checked = [CHECKED[int(number) - 1] for number in options.only.split(",")]
    except (ValueError, IndexError):
        parser.error(f"--only: expected numbers from 1 to {len(CHECKED)}, got {options.only!r}")
    print(json.dumps(machine()))
    try:
        result = _checked(checked, options.steps)
    except hosts.Unavailable as error:
        print(f"not measured: {error}", file=sys.stderr)
        raise SystemExit(0) from None
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n", encoding="utf-8")


def _checked(settings: list[Setting], steps: int) -> dict[str, Any]:
    nothing = Compute()
    choices = {choice for setting in settings for choice in setting.job(nothing).choices}
    costs, benches = costs_now(choices, [], told=_say)
    shares = phases.shares(LAYERS, steps)
    rows = []
    for setting in settings:
        ms, alone_ms = _measured(setting, steps)
        cores = len(os.sched_getaffinity(0))
        # Of more workers than cores each has a part of one while it computes: the simulation shares cores itself.
        seconds = alone_ms / 1e3 * min(1.0, cores / setting.workers)
        compute = Compute(*(seconds * share for share in shares))
        copying = costs.copy * LAYERS * WIDTH * (WIDTH + 1)
        step = simulate(setting.job(compute._replace(backward=compute.backward + copying)), costs)
        rows.append(_row(setting, step, ms, alone_ms))
    _show(rows)
    return {"rows": rows, "shares": shares, "coefficients": [row for bench in benches for row in bench.rows]}


def _measured(setting: Setting, steps: int) -> tuple[float, float]:
    """Return the median milliseconds of a step, and of one that shares nothing, the two in turn."""
    codec, level = setting.choice
    job = jobs.Job(f"{codec}:{level:g}", "ours", codec, level)
    count = setting.workers + (0 if setting.colocated else setting.servers)
    with (
        hosts.hosts(count, setting.link, setting.delay_ms) as made,
        tempfile.TemporaryDirectory(prefix="psa-plan-check-") as name,
    ):
        workers = made[: setting.workers]
        servers = made[setting.workers :] or [workers[number % len(workers)] for number in range(setting.servers)]
        place = jobs.Place(workers, servers)
        with (
            vs_ddp.started(job, place, Path(name), LAYERS) as ours,
            vs_ddp.started(jobs.Job("alone", "alone"), place, Path(name), LAYERS) as alone,
        ):
            pairs = [(*ours.take(1), *alone.take(1)) for _ in range(WARM_UP + steps)][WARM_UP:]
            alone.end()
            if len(set(ours.end())) > 1:
                raise SystemExit(f"the replicas of {setting} differ at the end")
    ms, alone_ms = (statistics.median(times) for times in zip(*pairs, strict=True))
    fastest, slowest = min(pairs)[0], max(pairs)[0]
    _say(f"{setting}: {ms:.1f} ms, from {fastest:.1f} to {slowest:.1f}; {alone_ms:.1f} where nothing is shared")
    return ms, alone_ms


def _row(setting: Setting, step: Step, ms: float, alone_ms: float) -> dict[str, Any]:
    predicted = 1e3 * step.seconds
    return {
        "name": str(setting),
        **{name: list(value) if isinstance(value, tuple) else value for name, value in setting._asdict().items()},
        "ms": round(ms, 2),
        "alone_ms": round(alone_ms, 2),
        "predicted_ms": round(predicted, 2),
        "error": round(predicted / ms - 1, 4),
        "limit": step.limit,
        "busy": {name: round(share, 3) for name, share in step.busy.items()},
    }


def _show(rows: list[dict[str, Any]]) -> None:
    width = max(len(row["name"]) for row in rows)
    print(f"\n{'':{width}} {'measured':>9} {'predicted':>10} {'error':>7}  limited by")
    for row in rows:
        times = f"{row['ms']:>9.1f} {row['predicted_ms']:>10.1f} {row['error']:>+7.1%}"
        print(f"{row['name']:{width}} {times}  {row['limit']}")
    good = sum(abs(row["error"]) <= GOOD for row in rows)
    print(f"within {GOOD:.0%}: {good} of {len(rows)}", flush=True)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"in {time.monotonic() - began:.0f} s")

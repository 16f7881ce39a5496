"""Is a training step over a slow network faster than with DistributedDataParallel?

    python -m benchmarks.vs_ddp [--links 1gbit,100mbit] [--delay MS] [--pairs 15] [--json FILE] [--plot FILE]

Every worker and server has a host of its own: a network namespace whose link is limited in both directions (`hosts.py`), so this
needs root. Two workers train six linear layers of 2048 x 2048 (25 M parameters, batch 8, SGD with momentum, a thread a process).
The baselines are DistributedDataParallel over gloo: plain, with its fp16 hook, and with its PowerSGD hook at rank 4 (one bucket).
`alone` trains without sharing anything: no way of sharing is faster than that.

All of them run at the same time and take turns, so that what disturbs one disturbs all; who waits sends only signs of life.
Ratios are of the medians. At the end all replicas of a job must have the same hash.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import hosts, plots, turns
from benchmarks.jobs import Job, Place, Processes, start
from benchmarks.training import WAYS
from ps_accordion import config
from ps_accordion.errors import ConfigError
from ps_accordion.launcher.machine import machine

WARM_UP = 2
"""Turns of each that are not counted."""
HELD = (0.85, 1.02)
"""Shares of its rate that a limited link carries; outside of that the figures would not be of that link."""
MANY = 8
"""Connections that look how much a link with a delay carries: one alone takes many round trips to find out."""
CASES = "onebit:512,topk:0.01,topk:0.001,dense:32"
BASELINES = "ddp,ddp_fp16,ddp_powersgd"


def main() -> None:
    """Measure each link, and print a table of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", default="1gbit,100mbit", help="rates to measure (default: 1gbit,100mbit)")
    parser.add_argument("--cases", default=CASES, help=f"ours, as codec:level,... (default: {CASES})")
    parser.add_argument("--baselines", default=BASELINES, help=f"what to compare with (default: {BASELINES})")
    parser.add_argument("--delay", type=float, default=0, help="milliseconds that a packet takes, each way (default: 0)")
    parser.add_argument("--pairs", type=int, default=15, help="turns of each that are counted (default: 15)")
    parser.add_argument("--steps", type=int, default=1, help="steps in a turn (default: 1)")
    parser.add_argument("--workers", type=int, default=2, help="workers, a host each (default: 2)")
    parser.add_argument("--servers", type=int, default=2, help="servers (default: 2)")
    parser.add_argument("--colocated", action="store_true", help="servers on the workers' hosts, not on hosts of their own")
    parser.add_argument("--layers", type=int, default=6, help="linear layers of the network (default: 6)")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument("--plot", type=Path, help="draw the steps to this file, .svg or .png, too")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that hosts and processes go away then, too
    try:
        baselines = [_baseline(name) for name in options.baselines.split(",") if name]
        jobs = [Job("alone", "alone"), *baselines, *map(_case, options.cases.split(","))]
        links = options.links.split(",")
        for link in links:
            hosts.bits_of(link)
    except (ValueError, ConfigError) as error:
        parser.error(str(error))
    print(json.dumps(machine()))
    rows = []
    for link in links:
        try:
            rows += measured(jobs, link, options)
        except hosts.Unavailable as error:
            print(f"not measured: {error}", file=sys.stderr)
            raise SystemExit(0) from None
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        plots.save_steps(rows, options.plot)


def _baseline(name: str) -> Job:
    if name not in WAYS or not name.startswith("ddp"):
        raise ValueError(f"--baselines: expected some of {BASELINES}, got {name!r}")
    return Job(name, name)


def _case(text: str) -> Job:
    codec, colon, level = text.partition(":")
    if not colon:
        raise ValueError(f"--cases: expected codec:level, such as topk:0.01, got {text!r}")
    config.load(overrides={"codec.name": codec, "codec.light": float(level), "codec.heavy": float(level)})
    return Job(text, "ours", codec, float(level))


def measured(jobs: list[Job], link: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Let all jobs take turns over one kind of link; return a row for each of ours beside each baseline."""
    apart = 0 if options.colocated else options.servers
    with (
        hosts.hosts(options.workers + apart, link, options.delay) as made,
        tempfile.TemporaryDirectory(prefix="psa-vs-ddp-") as name,
        contextlib.ExitStack() as stack,
    ):
        workers = made[: options.workers]
        place = Place(workers, made[options.workers :] or [workers[n % len(workers)] for n in range(options.servers)])
        _check(place, link, MANY if options.delay else 1)
        running = {}
        for job in jobs:  # one after the other: each begins by sending all its parameters over the same links
            began = time.monotonic()
            running[job.name] = stack.enter_context(started(job, place, Path(name), options.layers))
            running[job.name].take(1)
            print(f"{link} {job.name} has made its first step after {time.monotonic() - began:.0f} s", flush=True)
        times: dict[str, list[float]] = {job: [] for job in running}
        moved: dict[str, list[float]] = {job: [] for job in running}
        for turn in range(WARM_UP + options.pairs):
            for job in list(running)[turn % len(running) :] + list(running)[: turn % len(running)]:
                before = sum(sum(hosts.carried(host)) for host in workers)
                times[job].append(statistics.median(running[job].take(options.steps)))
                after = sum(sum(hosts.carried(host)) for host in workers)
                moved[job].append((after - before) / options.steps / len(workers))
            shown = " · ".join(f"{job} {values[-1]:.0f}" for job, values in times.items())
            print(f"{link} {'warm-up' if turn < WARM_UP else f'turn {turn - 1} of {options.pairs}'}, ms: {shown}", flush=True)
        for job, waiting in running.items():
            if len(set(waiting.end())) > 1 and job != "alone":
                raise SystemExit(f"the replicas of {job} differ at the end")
    medians = {job: statistics.median(values[WARM_UP:]) for job, values in times.items()}
    carried = {job: statistics.median(values[WARM_UP:]) for job, values in moved.items()}
    _show(link, jobs, medians, carried, options)
    rows = []
    for job in jobs:
        for baseline in jobs:
            if job.way == "ours" and baseline.way != "ours":
                rows.append(
                    {
                        "case": job.name,
                        "codec": job.codec,
                        "level": job.level,
                        "workers": options.workers,
                        "servers": options.servers,
                        "colocated": options.colocated,
                        "link": link,
                        "delay_ms": options.delay,
                        "ms": round(medians[job.name], 2),
                        "baseline": baseline.name,
                        "baseline_ms": round(medians[baseline.name], 2),
                        "ratio": round(medians[job.name] / medians[baseline.name], 4),
                        "bytes_a_worker": round(carried[job.name]),
                        "pairs": {"ms": times[job.name][WARM_UP:], "baseline_ms": times[baseline.name][WARM_UP:]},
                    }
                )
    return rows


def _check(place: Place, link: str, connections: int) -> None:
    workers = place.workers
    reached = hosts.throughput(workers[0], workers[1], connections) if len(workers) > 1 else hosts.bits_of(link)
    share = reached / hosts.bits_of(link)
    who = "one TCP connection carries" if connections == 1 else f"{connections} TCP connections together carry"
    print(f"{link}: {who} {reached / 1e6:.1f} Mbit/s, {share:.0%} of it")
    if not HELD[0] <= share <= HELD[1]:
        low, high = (f"{bound:.0%}" for bound in HELD)
        raise SystemExit(
            f"{link}: expected {low} to {high} of the rate; the limit does not hold, or the machine is too slow for it"
        )


@contextlib.contextmanager
def started(job: Job, place: Place, directory: Path, layers: int) -> Iterator[turns.Turns]:
    """Start the processes of a job, whose output goes to a file; end them on the way out."""
    training = [sys.executable, "-m", "benchmarks.training", job.way, "--turns", str(directory), "--job", job.name]
    training += ["--layers", str(layers)]
    with Processes(directory / f"{job.name}.log") as processes:
        waiting = turns.Turns(directory, job.name, len(place.workers), processes.alive)
        try:
            start(job, place, directory, training, processes)
            yield waiting
            processes.wait(30)
        except (turns.Stopped, subprocess.TimeoutExpired) as error:
            raise SystemExit(f"{error}; exit codes {processes.codes()}\n{processes.said()}") from None


def _show(link: str, jobs: list[Job], ms: dict[str, float], moved: dict[str, float], options: argparse.Namespace) -> None:
    where = "on the workers' hosts" if options.colocated else "on hosts of their own"
    far = f", {options.delay:g} ms each way" if options.delay else ""
    print(f"\n{link} a host{far}, {options.workers} workers, {options.servers} servers {where}, {options.pairs} turns, medians")
    baselines = [job.name for job in jobs if job.way != "ours"]
    print(f"{'':14} {'ms a step':>10} {'MB a worker':>12} " + " ".join(f"{'x ' + name:>14}" for name in baselines))
    for job in jobs:
        times = " ".join(f"{ms[name] / ms[job.name]:>14.2f}" for name in baselines)
        print(f"{job.name:14} {ms[job.name]:>10.1f} {moved[job.name] / 1e6:>12.2f} {times}")
    print(flush=True)


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"in {time.monotonic() - began:.0f} s")

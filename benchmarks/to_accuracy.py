"""How long does it take to train to some accuracy over a slow network, beside DistributedDataParallel?

    python -m benchmarks.to_accuracy [--link 100mbit] [--seeds 3] [--epochs 8] [--target 0.96] [--json FILE] [--plot FILE]

Two workers and two servers, a host each (`hosts.py`; needs root), train a network of 1.1 million parameters (64, 1024, 1024, 10
wide) on scikit-learn's handwritten digits: four fifths of them, a half a worker, batch 16, SGD with momentum. The others are what
the accuracy is of, four times an epoch. Each way has the link for itself; all have the same data, order, first parameters, and
rates, of which nothing was tuned for any. Seconds count from before the first step, evaluations included, start-up not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import hosts, plots
from benchmarks.jobs import Job, Place, Processes, start
from benchmarks.training import WAYS, end_of
from ps_accordion.launcher.machine import machine

JOBS = (
    Job("ddp", "ddp"),
    Job("ddp_fp16", "ddp_fp16"),
    Job("ddp_powersgd", "ddp_powersgd"),
    Job("onebit:8192", "ours", "onebit", 8192),
    Job("topk:0.01", "ours", "topk", 0.01),
    Job("topk:0.1-0.01", "ours", "topk", 0.1, 0.01),
)
BATCH, RATE, MOMENTUM, WIDTH = 16, 0.05, 0.9, 1024
LOOKS = 4
"""Evaluations an epoch."""
PATIENCE_S = 600


def main() -> None:
    """Train in every way and with every seed, and print when each came to the accuracy."""
    if len(sys.argv) > 1 and sys.argv[1] == "train":
        train(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", default="100mbit", help="rate of every host's link (default: 100mbit)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of each run (default: 8)")
    parser.add_argument("--target", type=float, default=0.96, help="the accuracy (default: 0.96)")
    parser.add_argument("--json", type=Path, help="write all curves to this file, too")
    parser.add_argument("--plot", type=Path, help="draw the curves to this file, .svg or .png, too")
    options = parser.parse_args()
    print(json.dumps(machine()))
    rows: list[dict[str, Any]] = []
    try:
        for seed in range(options.seeds):
            for job in JOBS[seed % len(JOBS) :] + JOBS[: seed % len(JOBS)]:
                rows.append({"case": job.name, "seed": seed, "link": options.link, "curve": curve(job, seed, options)})
                print(f"seed {seed}  {_line(rows[-1], options.target)}", flush=True)
    except hosts.Unavailable as error:
        print(f"not measured: {error}", file=sys.stderr)
        raise SystemExit(0) from None
    show(rows, options)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        plots.save_curves(rows, options.plot)


def curve(job: Job, seed: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """Train once; return what was seen at each evaluation: epoch, seconds, accuracy."""
    with hosts.hosts(4, options.link) as made, tempfile.TemporaryDirectory(prefix="psa-accuracy-") as name:
        place, file = Place(made[:2], made[2:]), Path(name, "curve.jsonl")
        training = [sys.executable, "-m", "benchmarks.to_accuracy", "train", job.way, str(file), str(seed), str(options.epochs)]
        with Processes(Path(name, "log")) as processes:
            start(job, place, Path(name), training, processes)
            try:
                processes.wait(PATIENCE_S)
            except subprocess.TimeoutExpired as error:
                raise SystemExit(f"{job.name}: {error}\n{processes.said()}") from None
            if any(processes.codes()):
                raise SystemExit(f"{job.name}: exit codes {processes.codes()}\n{processes.said()}")
        return [json.loads(line) for line in file.read_text().splitlines()]


def train(way: str, file: Path, seed: int, epochs: int) -> None:
    """Be a worker; the first appends what it sees to a file."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    (inputs, targets), (unseen, answers) = _digits(seed)
    with WAYS[way](module) as (model, rank):
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
        steps = len(targets) // (2 * BATCH)
        began = time.perf_counter()
        for epoch in range(epochs):
            order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(1000 * seed + epoch))
            for step in range(steps):
                mine = order[(2 * step + rank) * BATCH :][:BATCH]
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs[mine]), targets[mine]).backward()
                optimizer.step()
                if rank == 0 and (step + 1) % (steps // LOOKS) == 0:
                    with torch.no_grad():
                        accuracy = (module(unseen).argmax(1) == answers).double().mean().item()
                    seen = {"epoch": epoch + (step + 1) / steps, "seconds": time.perf_counter() - began, "accuracy": accuracy}
                    with file.open("a", encoding="utf-8") as out:
                        out.write(json.dumps(seen) + "\n")
    end_of(way)


def _digits(seed: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    # Only here: the process that starts the others has no need of it.
    from sklearn.datasets import load_digits

    data = load_digits()
    inputs, targets = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    known, unseen = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return (inputs[known], targets[known]), (inputs[unseen], targets[unseen])


def reached(row: dict[str, Any], target: float) -> float | None:
    """Return the seconds after which a run had some accuracy for the first time; None if it never had."""
    return next((seen["seconds"] for seen in row["curve"] if seen["accuracy"] >= target), None)


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print a table of medians over seeds."""
    print(f"\n{options.link} a host, 2 workers, 2 servers on hosts of their own, {options.seeds} seeds, medians")
    print(f"{'':28} {'s to ' + format(options.target, '.1%'):>12} {'x ddp':>7} {'s to the end':>13} {'accuracy then':>14}")
    first = _median([reached(row, options.target) for row in rows if row["case"] == "ddp"])
    for job in JOBS:
        mine = [row for row in rows if row["case"] == job.name]
        needed = _median([reached(row, options.target) for row in mine])
        ratio = f"{first / needed:.1f}" if first and needed else "-"
        end = _median([row["curve"][-1]["seconds"] for row in mine])
        accuracy = statistics.mean(row["curve"][-1]["accuracy"] for row in mine)
        print(f"{job.name:28} {'never' if needed is None else f'{needed:.1f}':>12} {ratio:>7} {end:>13.1f} {accuracy:>14.2%}")


def _median(values: list[float | None]) -> float | None:
    return None if None in values else statistics.median(value for value in values if value is not None)


def _line(row: dict[str, Any], target: float) -> str:
    needed, last = reached(row, target), row["curve"][-1]
    when = f"never {target:.1%}" if needed is None else f"{target:.1%} after {needed:.1f} s"
    return f"{row['case']:28} {when}, {last['accuracy']:.2%} at the end after {last['seconds']:.1f} s"


if __name__ == "__main__":
    main()
